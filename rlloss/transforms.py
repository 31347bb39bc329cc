r"""Squashing of unbounded values: symlog and its inverse."""

from collections.abc import Callable

import torch
from torch import Tensor

from rlloss import checks


def symlog(x: Tensor) -> Tensor:
    r"""Logarithm of the magnitude, with the sign kept.

    .. math:: \mathrm{symlog}(x) = \mathrm{sign}(x) \, \log(1 + |x|)

    The derivative at 0 is 1, the mathematical value. The plain composition of ``sign`` and ``abs`` has derivative 0
    there, and would leave a zero-initialised head without a gradient.

    Source: Hafner et al. 2023 (arXiv:2301.04104), section "Robust predictions";
    danijar/dreamerv3@e3f0224 embodied/jax/nets.py ``symlog``
    (whose gradient at 0 is 0).

    Args:
        x: any shape and numeric dtype; computed in float32 at least.

    Returns:
        The shape of ``x``. ``inf`` stays ``inf``, NaN stays NaN.

    Raises:
        TypeError: if ``x`` is not a tensor of numbers.

    Example:
        >>> symlog(torch.tensor([-1.0, 0.0, 1.0]))
        tensor([-0.6931,  0.0000,  0.6931])
    """
    x = checks.real("symlog", "x", x)
    return _odd(torch.log1p, x)


def symexp(x: Tensor) -> Tensor:
    r"""Inverse of :func:`symlog`.

    .. math:: \mathrm{symexp}(x) = \mathrm{sign}(x) \, (\exp |x| - 1)

    The derivative at 0 is 1. In float32 the result is ``inf`` from about 89 on.

    Source: Hafner et al. 2023 (arXiv:2301.04104), section "Robust predictions";
    danijar/dreamerv3@e3f0224 embodied/jax/nets.py ``symexp``.

    Args:
        x: any shape and numeric dtype; computed in float32 at least.

    Returns:
        The shape of ``x``.

    Raises:
        TypeError: if ``x`` is not a tensor of numbers.

    Example:
        >>> symexp(symlog(torch.tensor([-1000.0, 0.0, 1e-8])))
        tensor([-1.0000e+03,  0.0000e+00,  1.0000e-08])
    """
    x = checks.real("symexp", "x", x)
    return _odd(torch.expm1, x)


def _odd(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The odd function that is ``function`` where ``x`` is positive, with slope 1 at 0."""
    sign = torch.sign(x.detach())
    return torch.where(x == 0, x, sign * function(sign * x))
