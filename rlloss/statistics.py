r"""Running statistics as values: a NamedTuple, how it starts, how it moves, how it is read."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from rlloss import checks
from rlloss.types import Scalar

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

#: Variance below which a feature counts as constant, so that dividing by its root stays finite.
VARIANCE_FLOOR = 1e-8


class RunningMeanStd(NamedTuple):
    """Mean and population variance of everything seen so far, feature by feature."""

    mean: Tensor  # [*shape]
    var: Tensor  # [*shape]
    count: Tensor  # type: ignore[assignment]  # [], float64: float32 stops at 2**24; hides tuple.count


def running_mean_std_init(
    shape: Sequence[int] = (),
    *,
    epsilon: float = 1e-4,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> RunningMeanStd:
    r"""Statistics before the first update: mean 0, variance 1, weighing as much as ``epsilon`` samples.

    Source: Burda et al. 2018 (arXiv:1810.12894), section 2.4; openai/random-network-distillation@f75c0f1 mpi_util.py
    ``RunningMeanStd`` (float64 there: pass ``dtype=torch.float64`` for its exact numbers).

    Args:
        shape: of one sample: ``(4,)`` for vectors, ``(84, 84, 1)`` for statistics per pixel, ``()`` for scalars.
        epsilon: weight of the prior, in samples.
        dtype: of mean and variance, a floating-point dtype.
        device: of all three.

    Returns:
        The state.

    Raises:
        TypeError: if ``shape`` is not a tuple of ints or ``dtype`` not a floating-point dtype.
        ValueError: if a size or ``epsilon`` is negative, or ``epsilon`` infinite.

    Example:
        >>> running_mean_std_init((2,)).var
        tensor([1., 1.])
    """
    checks.within("running_mean_std_init", "epsilon", epsilon, 0.0)
    checks.floating_dtype("running_mean_std_init", dtype)
    shape = checks.shape("running_mean_std_init", "shape", shape)
    mean, var = torch.zeros(shape, dtype=dtype, device=device), torch.ones(shape, dtype=dtype, device=device)
    return RunningMeanStd(mean, var, torch.full((), epsilon, dtype=torch.float64, device=device))


def running_mean_std_update(state: RunningMeanStd, x: Tensor, *, group: "ProcessGroup | None" = None) -> RunningMeanStd:
    r"""Statistics of the union of what ``state`` has seen and ``x``.

    .. math:: w = \frac{n}{N + n}, \quad \mu' = \mu + w \, (\bar x - \mu), \quad
              \sigma'^2 = (1 - w) \, \sigma^2 + w \, \left(s^2 + (1 - w)(\bar x - \mu)^2\right)

    with the mean and population variance of the n samples of ``x``. The order of updates does not matter: any split
    of the data gives the statistics of the whole. A feature in which ``x`` has a NaN or an infinite value, or one whose
    square is infinite, keeps its mean and variance; an empty ``x``, or one with no finite feature, changes nothing.

    Source: Chan et al. 1979, "Updating formulae"; openai/random-network-distillation@f75c0f1 mpi_util.py
    ``update_mean_var_count_from_moments``.

    Args:
        state: statistics of samples of shape [*shape].
        x: [..., *shape], any numeric dtype, in its own units (uint8 images count 0 to 255). All leading dimensions are
            samples.
        group: process group whose members' samples are pooled first; every member gets the same result. None: only
            this process.

    Returns:
        The new state, with the dtypes of the old.

    Raises:
        TypeError: if ``x`` is not a tensor of numbers or ``state`` not a ``RunningMeanStd``.
        ValueError: if ``x`` does not end with the shape of the statistics.

    Example:
        >>> state = running_mean_std_update(running_mean_std_init((), epsilon=0.0), torch.tensor([1.0, 3.0]))
        >>> state.mean, state.var
        (tensor(2.), tensor(1.))
    """
    checks.state("running_mean_std_update", "state", state, RunningMeanStd)
    x = checks.real("running_mean_std_update", "x", x)
    leading = _leading("running_mean_std_update", x, state.mean)
    x = x.to(checks.compute_dtype(x, state.mean)).reshape(math.prod(leading), *state.mean.shape).detach()
    new, new_mean, new_var = _moments(x, state.count, group)
    total = state.count + new
    weight, old_weight = (new / total).to(x.dtype), (state.count / total).to(x.dtype)
    mean, var = state.mean.to(x.dtype), state.var.to(x.dtype)
    delta = new_mean - mean
    merged_mean = (mean + weight * delta).to(state.mean.dtype)
    merged_var = (old_weight * var + weight * (new_var + old_weight * delta.square())).to(state.var.dtype)
    # An empty batch has the mean 0 / 0, and so no finite feature.
    finite = torch.isfinite(merged_mean) & torch.isfinite(merged_var)
    return RunningMeanStd(
        torch.where(finite, merged_mean, state.mean),
        torch.where(finite, merged_var, state.var),
        torch.where(finite.any(), total, state.count),
    )


def running_mean_std_normalize(state: RunningMeanStd, x: Tensor, clip: Scalar | None = None) -> Tensor:
    r"""Samples in units of standard deviations from the mean.

    .. math:: \mathrm{clip}\left(\frac{x - \mu}{\sqrt{\max(\sigma^2, 10^{-8})}}, -c, c\right)

    Source: Burda et al. 2018 (arXiv:1810.12894), section 2.4; openai/random-network-distillation@f75c0f1
    policies/cnn_policy_param_matched.py (no floor there: the prior keeps its variance above 0).

    Args:
        state: statistics of samples of shape [*shape]; anything with ``mean`` and ``var``. Constants of the gradient.
        x: [..., *shape], any numeric dtype, in the units the statistics were taken in; computed in float32 at least.
        clip: bound of the result, or None.

    Returns:
        The shape of ``x``, in the dtype of ``x`` (float32 at least).

    Raises:
        TypeError: if ``x`` is not a tensor of numbers, or ``state`` lacks mean or variance.
        ValueError: if ``x`` does not end with the shape of the statistics, or ``clip`` is negative.

    Example:
        >>> running_mean_std_normalize(running_mean_std_init((2,)), torch.tensor([0.5, 9.0]), clip=5.0)
        tensor([0.5000, 5.0000])
    """
    if not checks.has_tensors(state, "mean", "var"):
        wanted = "an object with tensors mean and var"
        raise TypeError(checks.text("running_mean_std_normalize", "state", wanted, checks.describe(state)))
    x = checks.real("running_mean_std_normalize", "x", x)
    _leading("running_mean_std_normalize", x, state.mean)
    mean, var = state.mean.detach().to(x.dtype), state.var.detach().to(x.dtype)
    z = (x - mean) / var.clamp_min(VARIANCE_FLOOR).sqrt()
    if clip is None:
        return z
    checks.knob("running_mean_std_normalize", "clip", clip, 0.0, math.inf)
    bound = checks.scalar_like(z, clip)
    return torch.minimum(torch.maximum(z, -bound), bound)


class ReturnRange(NamedTuple):
    """Moving averages of a low and a high percentile of the returns."""

    low: Tensor  # []
    high: Tensor  # []


def return_range_init(*, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None) -> ReturnRange:
    """Both percentiles 0; nothing corrects the averages for starting there, as in the author's code.

    Source: danijar/dreamerv3@e3f0224 embodied/jax/utils.py ``Normalize`` (impl "perc", debias False).

    Args:
        dtype: of the state, a floating-point dtype.
        device: of the state.

    Returns:
        The state.

    Raises:
        TypeError: if ``dtype`` is not a floating-point dtype.

    Example:
        >>> return_range_init()
        ReturnRange(low=tensor(0.), high=tensor(0.))
    """
    checks.floating_dtype("return_range_init", dtype)
    return ReturnRange(torch.zeros((), dtype=dtype, device=device), torch.zeros((), dtype=dtype, device=device))


def return_range_update(
    state: ReturnRange,
    returns: Tensor,
    *,
    rate: Scalar = 0.01,
    quantiles: tuple[float, float] = (0.05, 0.95),
    group: "ProcessGroup | None" = None,
) -> ReturnRange:
    r"""Moves both percentiles towards those of a batch of returns.

    .. math:: p' = (1 - r) \, p + r \, \mathrm{percentile}(R)

    Percentiles are linearly interpolated between sorted values. A batch that is empty or holds a NaN or an infinite
    value leaves the state as it is: the author's code has no such guard, and there one NaN stays for good.

    Source: Hafner et al. 2023 (arXiv:2301.04104), section "Actor learning"; danijar/dreamerv3@e3f0224
    embodied/jax/utils.py ``Normalize``.

    Args:
        state: from :func:`return_range_init` or an earlier update.
        returns: any shape and numeric dtype, any number of elements.
        rate: weight of the new batch, in [0, 1].
        quantiles: the low and the high one, numbers in [0, 1].
        group: process group whose members' returns are gathered first, in equal numbers. None: only this process.

    Returns:
        The new state, with the dtype of the old.

    Raises:
        TypeError: if ``returns`` is not a tensor of numbers, ``state`` not a ``ReturnRange`` or ``quantiles`` no pair.
        ValueError: if ``rate`` or a quantile is outside [0, 1], or ``quantiles`` are not two in ascending order.

    Example:
        >>> state = return_range_update(return_range_init(), torch.arange(1001.0))
        >>> state
        ReturnRange(low=tensor(0.5000), high=tensor(9.5000))
    """
    checks.state("return_range_update", "state", state, ReturnRange)
    returns = checks.real("return_range_update", "returns", returns).detach().reshape(-1)
    checks.knob("return_range_update", "rate", rate, 0.0, 1.0)
    _check_quantiles("return_range_update", quantiles)
    if group is not None:
        returns = _gather(returns, group)
    if returns.shape[0] == 0:
        return state
    ordered = torch.sort(returns.to(checks.compute_dtype(returns, state.low))).values

    def move(old: Tensor, quantile: float) -> Tensor:
        new = (1 - rate) * old.to(ordered.dtype) + rate * _sorted_quantile(ordered, quantile)
        return new.to(old.dtype)

    low, high = move(state.low, float(quantiles[0])), move(state.high, float(quantiles[1]))
    finite = torch.isfinite(returns).all() & torch.isfinite(low) & torch.isfinite(high)
    return ReturnRange(torch.where(finite, low, state.low), torch.where(finite, high, state.high))


def return_range_scale(state: ReturnRange, *, minimum: Scalar = 1.0) -> Tensor:
    r"""What advantages are divided by.

    .. math:: \max(m, \mathrm{high} - \mathrm{low})

    Source: Hafner et al. 2023 (arXiv:2301.04104), section "Actor learning"; danijar/dreamerv3@e3f0224
    embodied/jax/utils.py ``Normalize.stats``.

    Args:
        state: of the returns.
        minimum: keeps small returns, and so noise, from being scaled up.

    Returns:
        [], at least ``minimum``.

    Raises:
        TypeError: if ``state`` is not a ``ReturnRange``.
        ValueError: if ``minimum`` is negative or infinite.

    Example:
        >>> return_range_scale(return_range_init())
        tensor(1.)
    """
    checks.state("return_range_scale", "state", state, ReturnRange)
    checks.knob("return_range_scale", "minimum", minimum, 0.0)
    span = state.high - state.low
    return torch.maximum(span, checks.scalar_like(span, minimum))


class MeanStd(NamedTuple):
    """Moving averages of a value and of its square, and of 1: how much of an average has been seen."""

    mean: Tensor  # []
    square: Tensor  # []
    correction: Tensor  # []


def mean_std_init(*, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None) -> MeanStd:
    """Averages of nothing: all 0.

    Source: danijar/dreamerv3@e3f0224 embodied/jax/utils.py ``Normalize`` (impl "meanstd").

    Args:
        dtype: of the state, a floating-point dtype.
        device: of the state.

    Returns:
        The state.

    Raises:
        TypeError: if ``dtype`` is not a floating-point dtype.

    Example:
        >>> mean_std_init().mean
        tensor(0.)
    """
    checks.floating_dtype("mean_std_init", dtype)
    return MeanStd(*[torch.zeros((), dtype=dtype, device=device) for _ in MeanStd._fields])


def mean_std_update(state: MeanStd, x: Tensor, *, rate: Scalar = 0.01, group: "ProcessGroup | None" = None) -> MeanStd:
    r"""Moves both averages towards those of a batch.

    .. math:: \mu' = (1 - r) \, \mu + r \, \bar x, \quad q' = (1 - r) \, q + r \, \overline{x^2}, \quad
              k' = (1 - r) \, k + r

    Unlike :func:`running_mean_std_update` it forgets: a value that changes with the policy is not stationary. A batch
    that is empty or holds a NaN or an infinite value, or one whose square is infinite, leaves the state as it is.

    Source: danijar/dreamerv3@e3f0224 embodied/jax/utils.py ``Normalize.update`` (impl "meanstd").

    Args:
        state: from :func:`mean_std_init` or an earlier update.
        x: any shape and numeric dtype.
        rate: weight of the new batch, in [0, 1].
        group: process group whose members' values are pooled first; every member gets the same result. None: only
            this process.

    Returns:
        The new state, with the dtype of the old.

    Raises:
        TypeError: if ``x`` is not a tensor of numbers or ``state`` not a ``MeanStd``.
        ValueError: if ``rate`` is outside [0, 1].

    Example:
        >>> state = mean_std_update(mean_std_init(), torch.tensor([1.0, 3.0]), rate=0.5)
        >>> state.mean, state.square, state.correction
        (tensor(1.), tensor(2.5000), tensor(0.5000))
    """
    checks.state("mean_std_update", "state", state, MeanStd)
    x = checks.real("mean_std_update", "x", x).detach()
    checks.knob("mean_std_update", "rate", rate, 0.0, 1.0)
    x = x.to(checks.compute_dtype(x, state.mean))
    number, total, squares = x.new_full((), x.numel()), x.sum(), x.square().sum()
    if group is not None:
        number, total, squares = (_sum_over(y, group) for y in (number, total, squares))
    batch = (total / number, squares / number, torch.ones_like(number))
    moved = [((1 - rate) * old.to(x.dtype) + rate * new).to(old.dtype) for old, new in zip(state, batch, strict=True)]
    # An empty batch has the mean 0 / 0.
    finite = torch.isfinite(moved[0]) & torch.isfinite(moved[1])
    return MeanStd(*[torch.where(finite, new, old) for new, old in zip(moved, state, strict=True)])


def mean_std_read(state: MeanStd, *, debias: bool = True, minimum: Scalar = 1e-8) -> tuple[Tensor, Tensor]:
    r"""What is subtracted from values, and what they are divided by then.

    .. math:: \left(\frac{\mu}{k}, \max\left(m, \sqrt{\max(0, q / k - (\mu / k)^2)}\right)\right)

    Source: danijar/dreamerv3@e3f0224 embodied/jax/utils.py ``Normalize.stats`` (impl "meanstd").

    Args:
        state: of the values.
        debias: divides by k, so that the averages do not remember that they started at 0; False sets k to 1.
        minimum: smallest deviation.

    Returns:
        ``(mean, std)``, [] each; before the first update 0 and ``minimum``.

    Raises:
        TypeError: if ``debias`` is not True or False or ``state`` not a ``MeanStd``.
        ValueError: if ``minimum`` is negative or infinite.

    Example:
        >>> state = mean_std_update(mean_std_init(), torch.tensor([1.0, 3.0]))
        >>> mean_std_read(state)
        (tensor(2.), tensor(1.))
    """
    checks.state("mean_std_read", "state", state, MeanStd)
    checks.flag("mean_std_read", "debias", debias)
    checks.knob("mean_std_read", "minimum", minimum, 0.0)
    mean, square, correction = (x.to(checks.compute_dtype(x)) for x in state)
    if debias:
        seen = torch.where(correction > 0, correction, 1.0)
        mean, square = mean / seen, square / seen
    std = (square - mean.square()).clamp_min(0).sqrt()
    return mean, torch.maximum(std, checks.scalar_like(std, minimum))


class DiscountedSum(NamedTuple):
    """A sum over the past, each step weighing less: the forward filter of RND's reward scale."""

    value: Tensor  # [...], one sum for each environment


def discounted_sum_init(
    shape: Sequence[int] = (), *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
) -> DiscountedSum:
    """Sums before the first reward: zeros, so that the first update gives the reward itself.

    Source: openai/random-network-distillation@f75c0f1 ppo_agent.py ``RewardForwardFilter``.

    Args:
        shape: of the rewards of one step, usually ``(environments,)``.
        dtype: of the sums, a floating-point dtype.
        device: of the sums.

    Returns:
        The state.

    Raises:
        TypeError: if ``shape`` is not a tuple of ints or ``dtype`` not a floating-point dtype.
        ValueError: if a size is negative.

    Example:
        >>> discounted_sum_init((2,))
        DiscountedSum(value=tensor([0., 0.]))
    """
    checks.floating_dtype("discounted_sum_init", dtype)
    return DiscountedSum(torch.zeros(checks.shape("discounted_sum_init", "shape", shape), dtype=dtype, device=device))


def discounted_sum_update(state: DiscountedSum, reward: Tensor, *, discount: Scalar = 0.99) -> DiscountedSum:
    r"""Sums after one more step.

    .. math:: e_t = \gamma \, e_{t-1} + r_t

    Runs forward in time and, like the exploration it scales, past the ends of episodes. A NaN or infinite reward
    leaves the sum of its environment as it is.

    Source: Burda et al. 2018 (arXiv:1810.12894), section 2.4; openai/random-network-distillation@f75c0f1 ppo_agent.py
    ``RewardForwardFilter.update``.

    Args:
        state: sums of shape [...].
        reward: [...], one step, any numeric dtype.
        discount: gamma, in [0, 1].

    Returns:
        The new state; ``value`` is the sum up to and with this step.

    Raises:
        TypeError: if ``reward`` is not a tensor of numbers or ``state`` not a ``DiscountedSum``.
        ValueError: if ``reward`` has another shape than the sums, or ``discount`` is outside [0, 1].

    Example:
        >>> state = discounted_sum_update(discounted_sum_init(), torch.tensor(1.0), discount=0.5)
        >>> discounted_sum_update(state, torch.tensor(1.0), discount=0.5).value
        tensor(1.5000)
    """
    checks.state("discounted_sum_update", "state", state, DiscountedSum)
    reward = checks.real("discounted_sum_update", "reward", reward)
    checks.same_shape("discounted_sum_update", "reward", reward, "the sums", state.value.shape)
    checks.knob("discounted_sum_update", "discount", discount, 0.0, 1.0)
    reward = reward.to(checks.compute_dtype(reward, state.value)).detach()
    value = (discount * state.value.to(reward.dtype) + reward).to(state.value.dtype)
    return DiscountedSum(torch.where(torch.isfinite(value), value, state.value))


def _check_quantiles(function: str, quantiles: Sequence[float]) -> None:
    if not isinstance(quantiles, (tuple, list)):
        raise TypeError(checks.text(function, "quantiles", "two numbers", checks.describe(quantiles)))
    if len(quantiles) != 2 or any(isinstance(quantile, Tensor) for quantile in quantiles):
        raise ValueError(checks.text(function, "quantiles", "two numbers", checks.describe(quantiles)))
    for quantile in quantiles:
        checks.within(function, "quantiles", quantile, 0.0, 1.0)
    if quantiles[0] > quantiles[1]:
        raise ValueError(checks.text(function, "quantiles", "in ascending order", checks.describe(quantiles)))


def _leading(function: str, x: Tensor, mean: Tensor) -> tuple[int, ...]:
    """The dimensions of ``x`` before those of a sample."""
    leading = x.ndim - mean.ndim
    if leading < 0 or x.shape[leading:] != mean.shape:
        wanted = f"of shape [{', '.join(['...', *map(str, mean.shape)])}] like the statistics"
        raise ValueError(checks.text(function, "x", wanted, checks.describe(x)))
    return tuple(x.shape[:leading])


def _moments(x: Tensor, count: Tensor, group: "ProcessGroup | None") -> tuple[Tensor, Tensor, Tensor]:
    """Number (in the dtype of ``count``), mean and population variance over the first dimension."""
    number = torch.full_like(count, x.shape[0])
    total = x.sum(0)
    if group is not None:
        number, total = _sum_over(number, group), _sum_over(total, group)
    # Two passes: the deviations are small where the squares of the values are not.
    divisor = number.to(x.dtype)
    mean = total / divisor
    squares = (x - mean).square().sum(0)
    if group is not None:
        squares = _sum_over(squares, group)
    return number, mean, squares / divisor


def _sum_over(x: Tensor, group: "ProcessGroup") -> Tensor:
    x = x.clone()
    torch.distributed.all_reduce(x, group=group)
    return x


def _gather(x: Tensor, group: "ProcessGroup") -> Tensor:
    x = x.contiguous()
    parts = [torch.empty_like(x) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(parts, x, group=group)
    return torch.cat(parts)


def _sorted_quantile(ordered: Tensor, quantile: float) -> Tensor:
    # torch.quantile has no batching rule, refuses bf16 and more than 2**24 elements.
    position = quantile * (ordered.shape[0] - 1)
    below = math.floor(position)
    above = min(below + 1, ordered.shape[0] - 1)
    return torch.lerp(ordered[below], ordered[above], position - below)
