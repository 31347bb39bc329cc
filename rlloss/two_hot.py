r"""Regression as classification: a scalar as a distribution over fixed bins."""

import functools
import math
import numbers

import torch
from torch import Tensor

from rlloss import checks, fused
from rlloss.transforms import symexp


def symexp_bins(
    num_bins: int = 255,
    low: float = -20.0,
    high: float = 20.0,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    r"""Bin centres that are evenly spaced in symlog space.

    .. math:: b_k = \mathrm{symexp}\left(l + \frac{k}{n - 1} (h - l)\right)

    Where ``low == -high`` the upper half mirrors the lower bit for bit, with exactly one zero in the middle if
    ``num_bins`` is odd. For an even number the author's code has two zeros in the middle; here, as in torchrl, the grid
    stays strictly increasing and has none. Any other grid can be given to the functions of this file as it is.

    Source: Hafner et al. 2023 (arXiv:2301.04104), eq. 10; danijar/dreamerv3@e3f0224 embodied/jax/heads.py
    ``Head.symexp_twohot``.

    Args:
        num_bins: at least 2.
        low: symlog of the first bin.
        high: symlog of the last bin.
        dtype: of the result, a floating-point dtype; computed in float32 at least.
        device: of the result.

    Returns:
        [num_bins], strictly increasing, in the units of the value.

    Raises:
        TypeError: if ``num_bins`` is not an int, an end not a number, or ``dtype`` not a floating-point dtype.
        ValueError: if ``num_bins`` is below 2, ``low`` is not below ``high``, or a bin would be infinite in ``dtype``.

    Example:
        >>> symexp_bins(5)
        tensor([-4.8517e+08, -2.2025e+04,  0.0000e+00,  2.2025e+04,  4.8517e+08])
    """
    num_bins = checks.integer("symexp_bins", "num_bins", num_bins, low=2)
    for argument, end in (("low", low), ("high", high)):
        if not isinstance(end, numbers.Real):
            raise TypeError(checks.text("symexp_bins", argument, "a number", checks.describe(end)))
        checks.within("symexp_bins", argument, end, -math.inf)
    if not low < high:
        raise ValueError(checks.text("symexp_bins", "low", f"below high={high}", f"{low}"))
    checks.floating_dtype("symexp_bins", dtype)
    largest = math.log1p(torch.finfo(dtype).max)
    if max(-low, high) > largest:
        wanted = f"within {largest:.4g} of 0, so that bins are finite in {dtype}"
        raise ValueError(checks.text("symexp_bins", "low and high", wanted, f"{low} and {high}"))
    computed = torch.promote_types(dtype, torch.float32)
    if low != -high:
        steps = torch.arange(num_bins, dtype=computed, device=device)
        return symexp(low + (high - low) / (num_bins - 1) * steps).to(dtype)
    # Counted from the middle in whole numbers: 0 there is exact, which 1 - k * (1 / k) is not for every k.
    steps = torch.arange(1 - num_bins, num_bins, 2, dtype=computed, device=device)
    centres = high * (steps / (num_bins - 1))
    return torch.copysign(torch.expm1(centres.abs()), centres).to(dtype)


def two_hot_encode(x: Tensor, bins: Tensor) -> Tensor:
    r"""Weights of the two bins that enclose ``x``, so that their mean is ``x``.

    .. math:: w_k = \frac{b_{k+1} - x}{b_{k+1} - b_k}, \quad w_{k+1} = \frac{x - b_k}{b_{k+1} - b_k}
              \quad \text{for } b_k \le x < b_{k+1}

    Interpolates between the bins themselves (not their symlog). Values outside saturate at the end bins, infinite
    ones too; NaN stays NaN. The two-hot is a constant: no gradient reaches ``x``.

    Source: Hafner et al. 2023 (arXiv:2301.04104), section "Robust predictions"; danijar/dreamerv3@e3f0224
    embodied/jax/outs.py ``TwoHot.loss``.

    Args:
        x: [...], any numeric dtype; computed in float32 at least.
        bins: [num_bins], ascending, in the units of ``x``.

    Returns:
        [..., num_bins], rows sum to 1.

    Raises:
        TypeError: if ``x`` is not a tensor of numbers or ``bins`` not a floating-point tensor.
        ValueError: if ``bins`` is not one-dimensional with at least two entries.

    Example:
        >>> two_hot_encode(torch.tensor([0.5, 9.0]), torch.tensor([-1.0, 0.0, 2.0]))
        tensor([[0.0000, 0.7500, 0.2500],
                [0.0000, 0.0000, 1.0000]])
    """
    x = checks.real("two_hot_encode", "x", x)
    bins = _bins("two_hot_encode", bins).to(x.dtype)
    pair, weights = neighbours(x, bins)
    index = torch.arange(bins.shape[0], device=bins.device)
    below = torch.where(index == pair[..., :1], weights[..., :1], 0.0)
    return torch.where(index == pair[..., 1:], weights[..., 1:], below)


def two_hot_decode(logits: Tensor, bins: Tensor) -> Tensor:
    r"""Mean of the categorical distribution over ``bins``.

    .. math:: \hat y = \sum_k \mathrm{softmax}(l)_k \, b_k

    Mirrored bins are added in pairs, so that uniform logits give exactly 0 on an antisymmetric support.

    Source: Hafner et al. 2023 (arXiv:2301.04104), eq. 10; danijar/dreamerv3@e3f0224 embodied/jax/outs.py
    ``TwoHot.pred``.

    Args:
        logits: [..., num_bins], any float dtype; computed in float32 at least.
        bins: [num_bins], ascending, in the units of the value.

    Returns:
        [...], in the units of ``bins``.

    Raises:
        TypeError: if an argument is not a floating-point tensor.
        ValueError: if the last dimension of ``logits`` is not ``bins.numel()``.

    Example:
        >>> two_hot_decode(torch.zeros(255), symexp_bins(255))
        tensor(0.)
    """
    logits, bins = _logits_and_bins("two_hot_decode", logits, bins)
    weighted = torch.softmax(logits, -1) * bins
    return (weighted + weighted.flip(-1)).sum(-1) / 2


def symexp_decode(logits: Tensor) -> Tensor:
    """:func:`two_hot_decode` over :func:`symexp_bins`, one for each logit."""
    logits = logits.to(checks.compute_dtype(logits))
    return two_hot_decode(logits, bins_for(logits))


def two_hot_cross_entropy(logits: Tensor, target: Tensor, bins: Tensor) -> Tensor:
    r"""Cross-entropy between the two-hot encoding of ``target`` and a categorical over ``bins``.

    .. math:: L = -\sum_k \mathrm{twohot}(y)_k \, \log \mathrm{softmax}(l)_k

    Only two log-probabilities a row are read; the dense encoding never exists. No gradient reaches ``target``. A bin of
    weight 0 adds nothing, even where its logit is ``-inf``.

    Source: Hafner et al. 2023 (arXiv:2301.04104), section "Robust predictions"; danijar/dreamerv3@e3f0224
    embodied/jax/outs.py ``TwoHot.loss``.

    Args:
        logits: [..., num_bins], any float dtype; computed in float32 at least.
        target: [...], any numeric dtype. Infinite targets saturate at the end bins; a NaN target gives a NaN loss.
        bins: [num_bins], ascending, in the units of ``target``.

    Returns:
        [...], in nats.

    Raises:
        TypeError: if ``logits`` or ``bins`` is not a floating-point tensor or ``target`` not a tensor of numbers.
        ValueError: if the last dimension of ``logits`` is not ``bins.numel()`` or ``target`` has another shape.

    Example:
        >>> two_hot_cross_entropy(torch.zeros(255), torch.tensor(3.0), symexp_bins(255))
        tensor(5.5413)
    """
    function = "two_hot_cross_entropy"
    logits, bins = _logits_and_bins(function, logits, bins)
    target = checks.real(function, "target", target).to(logits.dtype)
    guess = "A trailing dimension of 1? Pass target.squeeze(-1)." if target.shape[-1:] == (1,) else ""
    checks.same_shape(function, "target", target, "logits without the bins", logits.shape[:-1], guess)
    return fused.reduce(fused.TwoHotCrossEntropy(_cross_entropy), logits, *neighbours(target, bins))[0]


def _cross_entropy(logits: Tensor, pair: Tensor, weights: Tensor) -> tuple[Tensor]:
    nats = -torch.gather(torch.log_softmax(logits, -1), -1, pair)
    return ((weights * nats).masked_fill(weights == 0, 0).sum(-1),)


def bins_for(logits: Tensor) -> Tensor:
    """:func:`symexp_bins` for logits of at least float32: as many, in their dtype and on their device."""
    if fused.watched(logits) or not logits.is_cpu:
        return symexp_bins(logits.shape[-1], dtype=logits.dtype, device=logits.device)
    # The same numbers each time, of operators so small that finding them again takes longest: copied instead.
    return torch.frombuffer(bytearray(_bytes_of_bins(logits.shape[-1], logits.dtype)), dtype=logits.dtype)


@functools.cache
def _bytes_of_bins(num_bins: int, dtype: torch.dtype) -> bytes:
    return bytes(symexp_bins(num_bins, dtype=dtype, device="cpu").untyped_storage())


def neighbours(x: Tensor, bins: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the bins below and above each value [..., 2], and their weights [..., 2]."""
    x = x.detach().clamp(bins[0], bins[-1])
    upper = torch.searchsorted(bins, x.contiguous(), right=True).clamp(1, bins.shape[0] - 1)
    pair = torch.stack((upper - 1, upper), -1)
    below, above = bins[pair].unbind(-1)
    # A support may hold a value twice, as the author's even grids hold zero: but for NaN, only the last pair of all is
    # chosen whatever it holds.
    return pair, torch.stack((above - x, x - below), -1) / (above - below).unsqueeze(-1)


def _bins(function: str, bins: Tensor) -> Tensor:
    bins = checks.floating(function, "bins", bins).detach()
    if bins.ndim != 1 or bins.shape[0] < 2:
        raise ValueError(checks.text(function, "bins", "of shape [num_bins >= 2]", checks.describe(bins)))
    return bins.contiguous()


def _logits_and_bins(function: str, logits: Tensor, bins: Tensor) -> tuple[Tensor, Tensor]:
    logits, bins = checks.floating(function, "logits", logits), _bins(function, bins)
    checks.last_dimension(function, "logits", logits, bins.shape[0], "One logit for each bin.")
    return logits, bins.to(logits.dtype)
