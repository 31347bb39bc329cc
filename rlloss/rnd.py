r"""Random network distillation: a predictor learns a fixed random network; where it fails, the state is new."""

import math
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from rlloss import checks, pages, random
from rlloss.fused import watched
from rlloss.statistics import (
    VARIANCE_FLOOR,
    DiscountedSum,
    RunningMeanStd,
    discounted_sum_update,
    running_mean_std_normalize,
    running_mean_std_update,
)
from rlloss.types import ApplyFn, Batch, Params, Scalar


class ObservationStatistics(Protocol):
    """Anything with a mean and a variance: our ``RunningMeanStd``, pure or module, or torchrl's."""

    @property
    def mean(self) -> Any: ...  # noqa: D102
    @property
    def var(self) -> Any: ...  # noqa: D102


def rnd_key_mask(key: Tensor, batch_size: int, fraction: float = 0.25, *, exact: bool = True) -> Tensor:
    r"""Which samples of a batch train the predictor.

    The paper trains on a random quarter of the samples, so that the bonus of many parallel environments does not
    decay faster than that of few. ``exact`` rows are as random, always equally many, and let :func:`rnd_loss` run the
    networks on them alone.

    Source: Burda et al. 2018 (arXiv:1810.12894), appendix A.2; openai/random-network-distillation@f75c0f1
    policies/cnn_policy_param_matched.py (the Bernoulli mask, ``u < p``).

    Args:
        key: int64 [2], see :mod:`rlloss.random`.
        batch_size: number of samples B.
        fraction: f, in [0, 1].
        exact: rows of exactly ceil(f * B) samples without repetition, else an independent draw for each sample.

    Returns:
        int64 rows [ceil(f * B)] if ``exact``, else bool [B].

    Raises:
        TypeError: if ``key`` is not an int64 tensor, ``batch_size`` not an int, ``exact`` not a bool, or ``fraction`` a
            tensor where ``exact``: a shape cannot depend on its value.
        ValueError: if ``fraction`` is outside [0, 1], ``batch_size`` is negative or ``key`` is not of shape [2].

    Example:
        >>> from rlloss import random
        >>> rnd_key_mask(random.key(0), 32).shape, rnd_key_mask(random.key(0), 32, exact=False).shape
        (torch.Size([8]), torch.Size([32]))
    """
    checks.within("rnd_key_mask", "fraction", fraction, 0.0, 1.0)
    checks.flag("rnd_key_mask", "exact", exact)
    if isinstance(batch_size, Tensor):
        guess = "Did you pass the batch? Its size is batch.shape[0]."
        raise TypeError(checks.text("rnd_key_mask", "batch_size", "an int", checks.describe(batch_size), guess))
    batch_size = checks.integer("rnd_key_mask", "batch_size", batch_size)
    if not exact:
        return random.bernoulli(key, fraction, (batch_size,))
    if isinstance(fraction, Tensor):
        guess = "Only exact=False takes a tensor: the number of rows cannot depend on a value."
        raise TypeError(checks.text("rnd_key_mask", "fraction", "a number", checks.describe(fraction), guess))
    return random.permutation(key, batch_size)[: rows_drawn(batch_size, fraction)]


def rows_drawn(batch_size: int, fraction: float) -> int:
    """ceil(fraction * batch_size): the number of rows in an exact mask."""
    # 0.07 * 100 is 7.000000000000001; the tolerance keeps a product that is whole from gaining a row.
    return math.ceil(float(fraction) * batch_size * (1 - 1e-12))


def rnd_error(
    pred_params: Params,
    target_params: Params,
    batch: Batch,
    *,
    predictor: ApplyFn,
    target: ApplyFn | None = None,
    obs_stats: ObservationStatistics | Any | None = None,
    obs_clip: Scalar = 5.0,
) -> Tensor:
    r"""How far the predictor is from the target network, sample by sample: loss and raw intrinsic reward.

    .. math:: e = \frac{1}{K} \sum_k \left(\hat f_k(z; \theta) - \mathrm{sg}(f_k(z))\right)^2, \quad
              z = \mathrm{clip}\left(\frac{x - \mu}{\sigma}, -c, c\right)

    A mean over features, without a factor 1/2. Gradients reach the predictor's parameters (and the observation through
    the predictor); the target is evaluated on detached parameters.

    Source: Burda et al. 2018 (arXiv:1810.12894), section 2.2; openai/random-network-distillation@f75c0f1
    policies/cnn_policy_param_matched.py ``define_self_prediction_rew``.

    Args:
        pred_params: of the predictor, differentiated.
        target_params: of the target network, constants.
        batch: the observations: a tensor [..., *obs] or a pytree of them. With ``obs_stats`` they are taken in the
            units of the statistics; without, uint8 images become floats in [0, 1].
        predictor: ``(params, observations) -> features [..., K]``.
        target: likewise; None: the same apply function as the predictor.
        obs_stats: ``mean`` and ``var`` of one observation, or for a mapping of observations a mapping of those (the
            networks then get a dict). None: observations are not normalised.
        obs_clip: c, only used with ``obs_stats``.

    Returns:
        [...], in float32 at least.

    Raises:
        TypeError: if an observation is not a tensor of numbers, features are not floating-point, an apply function is
            not callable, or statistics are not what ``obs_stats`` asks for.
        ValueError: if the features of the two networks differ in shape, the observation does not end with the shape of
            the statistics, or ``obs_clip`` is negative.
        KeyError: if statistics for one of several observations are missing.

    Example:
        >>> linear = lambda params, x: x @ params["weight"]
        >>> ones, zeros = {"weight": torch.ones(4, 2)}, {"weight": torch.zeros(4, 2)}
        >>> rnd_error(ones, zeros, torch.ones(3, 4), predictor=linear)
        tensor([16., 16., 16.])
    """
    return _error("rnd_error", pred_params, target_params, batch, predictor, target, obs_stats, obs_clip)[0]


def rnd_error_and_target_features(
    pred_params: Params,
    target_params: Params,
    batch: Batch,
    *,
    predictor: ApplyFn,
    target: ApplyFn | None = None,
    obs_stats: ObservationStatistics | Any | None = None,
    obs_clip: Scalar = 5.0,
) -> tuple[Tensor, Tensor]:
    r"""As :func:`rnd_error`, with the features of the target network, which :func:`rnd_loss` of the same batch reuses.

    .. math:: e, \; f(z)

    Source: as :func:`rnd_error`.

    Args:
        pred_params: see :func:`rnd_error`.
        target_params: see :func:`rnd_error`.
        batch: see :func:`rnd_error`.
        predictor: see :func:`rnd_error`.
        target: see :func:`rnd_error`.
        obs_stats: see :func:`rnd_error`.
        obs_clip: see :func:`rnd_error`.

    Returns:
        ``(error, target_features)``: [...] and [..., K], in float32 at least; the features detached.

    Raises:
        TypeError: as :func:`rnd_error`.
        ValueError: as :func:`rnd_error`.
        KeyError: as :func:`rnd_error`.

    Example:
        >>> linear = lambda params, x: x @ params["weight"]
        >>> ones, zeros, batch = {"weight": torch.ones(4, 2)}, {"weight": torch.zeros(4, 2)}, torch.ones(3, 4)
        >>> error, features = rnd_error_and_target_features(ones, zeros, batch, predictor=linear)
        >>> rnd_loss(ones, None, batch, torch.tensor([0, 2]), predictor=linear, target_features=features)
        tensor(16.)
    """
    function = "rnd_error_and_target_features"
    return _error(function, pred_params, target_params, batch, predictor, target, obs_stats, obs_clip)


def rnd_loss(
    pred_params: Params,
    target_params: Params,
    batch: Batch,
    key_mask: Tensor | None = None,
    *,
    predictor: ApplyFn,
    target: ApplyFn | None = None,
    obs_stats: ObservationStatistics | Any | None = None,
    obs_clip: Scalar = 5.0,
    reduction: str = "mean",
    target_features: Tensor | None = None,
) -> Tensor:
    r"""Loss that trains the predictor.

    .. math:: L = \frac{\sum_i m_i \, e_i}{\max(1, \sum_i m_i)}

    with the errors of :func:`rnd_error`. Rows select before the networks run, so that unselected samples cost
    nothing; under a bool mask the networks run on a selected sample in their place. Either way a NaN in an unselected
    sample reaches neither loss nor gradient.

    Source: Burda et al. 2018 (arXiv:1810.12894), section 2.2 and appendix A.2;
    openai/random-network-distillation@f75c0f1 policies/cnn_policy_param_matched.py ``define_self_prediction_rew``.

    Args:
        pred_params: of the predictor, differentiated.
        target_params: of the target network, constants.
        batch: the observations, see :func:`rnd_error`; every leaf [B, *obs].
        key_mask: which samples count, see :func:`rnd_key_mask`: bool of the batch's leading shape weighs them, int64
            rows [k] select them (a repeated row counts twice, -1 is the last), None is all.
        predictor: ``(params, observations) -> features [B, K]``.
        target: likewise; None: the same apply function as the predictor.
        obs_stats: see :func:`rnd_error`.
        obs_clip: see :func:`rnd_error`.
        reduction: "mean" over the samples that count, "sum" over them (not rescaled by the fraction), or "none".
        target_features: [B, K], features of the target network for the *whole* batch, from
            :func:`rnd_error_and_target_features`; ``key_mask`` selects from them as from the batch. The target network
            does not run then: ``target`` is not called, and ``target_params`` may be None. Constants, taken as they
            are: where ``obs_stats`` have moved since, the predictor sees the batch in the new units and learns the
            features of the old ones. For exactly the loss without reuse, hand in the statistics they were made with.

    Returns:
        [], or with "none" [B] with zeros where a sample does not count. An empty batch or mask gives 0.

    Raises:
        TypeError: if ``key_mask`` is neither bool nor int64, ``target_features`` are not a floating-point tensor, and
            as :func:`rnd_error`.
        ValueError: if ``key_mask`` does not fit the batch or the errors, ``target_features`` not the batch or the
            predictor's features, ``reduction`` is unknown, and as :func:`rnd_error`.
        KeyError: as :func:`rnd_error`.

    Example:
        >>> linear = lambda params, x: x @ params["weight"]
        >>> ones, zeros = {"weight": torch.ones(4, 2)}, {"weight": torch.zeros(4, 2)}
        >>> rnd_loss(ones, zeros, torch.ones(3, 4), torch.tensor([True, False, True]), predictor=linear)
        tensor(16.)
    """
    checks.option("rnd_loss", "reduction", reduction, ("mean", "sum", "none"))
    _check_key_mask(batch, key_mask)
    features = None if target_features is None else _select_features(target_features, batch, key_mask)
    selected = _select(batch, key_mask)
    knobs = predictor, target, obs_stats, obs_clip, features
    error, _ = _error("rnd_loss", pred_params, target_params, selected, *knobs)
    number: Tensor | int = max(error.numel(), 1)
    if key_mask is not None and key_mask.dtype == torch.bool:
        checks.same_shape("rnd_loss", "key_mask", key_mask, "the errors", error.shape)
        error, number = torch.where(key_mask, error, 0.0), key_mask.sum().clamp_min(1)
    if reduction == "none":
        return error if key_mask is None or key_mask.dtype == torch.bool else _scatter(error, key_mask, _size(batch))
    return error.sum() / number if reduction == "mean" else error.sum()


def rnd_reward_stats_update(
    sums: DiscountedSum, stats: RunningMeanStd, error: Tensor, *, discount: Scalar = 0.99
) -> tuple[DiscountedSum, RunningMeanStd]:
    r"""Statistics of the discounted sums of the bonus, by which it is scaled.

    .. math:: e_t = \gamma e_{t-1} + r_t \text{ for each environment}, \quad
              \text{stats} \leftarrow \text{stats} \cup \{e_t\}

    The sums run forward in time from call to call and past the ends of episodes.

    Source: Burda et al. 2018 (arXiv:1810.12894), section 2.4; openai/random-network-distillation@f75c0f1 ppo_agent.py
    ``PpoAgent.update`` and ``RewardForwardFilter``.

    Args:
        sums: one for each environment, [...].
        stats: of the sums, of shape ().
        error: [..., T], the raw bonus of :func:`rnd_error`, time last.
        discount: gamma of the intrinsic reward, in [0, 1].

    Returns:
        ``(sums, stats)`` after these T steps.

    Raises:
        TypeError: if ``error`` is not a tensor of numbers, ``sums`` not a ``DiscountedSum`` or ``stats`` not a
            ``RunningMeanStd``.
        ValueError: if the shapes do not fit, or ``discount`` is outside [0, 1].

    Example:
        >>> from rlloss.statistics import discounted_sum_init, running_mean_std_init
        >>> sums, stats = discounted_sum_init((1,)), running_mean_std_init(epsilon=0.0)
        >>> sums, stats = rnd_reward_stats_update(sums, stats, torch.ones(1, 3), discount=1.0)
        >>> sums.value, stats.mean
        (tensor([3.]), tensor(2.))
    """
    checks.state("rnd_reward_stats_update", "sums", sums, DiscountedSum)
    checks.state("rnd_reward_stats_update", "stats", stats, RunningMeanStd)
    error = checks.real("rnd_reward_stats_update", "error", error).detach()
    checks.rank_at_least("rnd_reward_stats_update", "error", error, ("T",))
    checks.same_shape("rnd_reward_stats_update", "stats.mean", stats.mean, "a scalar's", ())
    values = []
    for step in error.unbind(-1):
        sums = discounted_sum_update(sums, step, discount=discount)
        values.append(sums.value)
    return (sums, running_mean_std_update(stats, torch.stack(values, -1))) if values else (sums, stats)


def rnd_reward(stats: RunningMeanStd, error: Tensor) -> Tensor:
    r"""Intrinsic reward: the bonus in units of the standard deviation of its discounted sum.

    .. math:: r = \frac{e}{\sqrt{\max(\sigma^2, 10^{-8})}}

    The mean is not subtracted: the bonus stays positive and keeps its order.

    Source: Burda et al. 2018 (arXiv:1810.12894), section 2.4; openai/random-network-distillation@f75c0f1 ppo_agent.py
    ``PpoAgent.update``.

    Args:
        stats: of shape (), from :func:`rnd_reward_stats_update`.
        error: any shape, the raw bonus of :func:`rnd_error`.

    Returns:
        The shape of ``error``, detached.

    Raises:
        TypeError: if ``error`` is not a tensor of numbers or ``stats`` not a ``RunningMeanStd``.
        ValueError: if ``stats`` are not those of a scalar.

    Example:
        >>> from rlloss.statistics import running_mean_std_init
        >>> rnd_reward(running_mean_std_init(), torch.tensor([1.0, 2.0]))
        tensor([1., 2.])
    """
    checks.state("rnd_reward", "stats", stats, RunningMeanStd)
    error = checks.real("rnd_reward", "error", error).detach()
    checks.same_shape("rnd_reward", "stats.var", stats.var, "a scalar's", ())
    return error / stats.var.detach().to(error.dtype).clamp_min(VARIANCE_FLOOR).sqrt()


def _error(
    function: str,
    pred_params: Params,
    target_params: Params,
    batch: Batch,
    predictor: ApplyFn,
    target: ApplyFn | None,
    obs_stats: Any,
    obs_clip: Scalar,
    features: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`rnd_error` in the name of ``function``, and the target's features, ``features`` where they are known."""
    checks.knob(function, "obs_clip", obs_clip, 0.0, math.inf)
    if features is None and target is None and target_params is None and pred_params is not None:
        guess = "Only rnd_loss with target_features does without."
        raise TypeError(checks.text(function, "target_params", "parameters of the target network", "None", guess))
    target = predictor if target is None else target
    for argument, apply in (("predictor", predictor), ("target", target)):
        checks.function_of(function, argument, apply, "(params, observations) -> features")
    observation = _prepare(function, "obs_stats", batch, obs_stats, obs_clip)
    goal: Any = features
    if features is None:
        # Before the predictor, and without a graph: its activations make room for the predictor's, which stay until the
        # backward pass. Fresh memory would cost more than the loss does.
        goal = tree_map(_detach, target(*tree_map(_detach, (target_params, observation))))
    prediction = checks.floating(function, "predictor(params, batch)", predictor(pred_params, observation))
    checks.rank_at_least(function, "predictor(params, batch)", prediction, ("features",))
    source = "target(params, batch)" if features is None else "target_features"
    goal = checks.floating(function, source, goal).detach()
    checks.same_shape(function, source, goal, "the predictor's features", prediction.shape)
    return (prediction - goal).square().mean(-1), goal


def _prepare(function: str, argument: str, batch: Batch, stats: Any, clip: Scalar) -> Batch:
    """Observations as floats, normalised where there are statistics, which the caller knows as ``argument``."""
    if stats is None:
        return tree_map(lambda x: _as_float(function, x), batch)
    if isinstance(batch, Tensor):
        x = checks.real(function, "batch", batch)
        _check_stats(function, argument, x, stats)
        return running_mean_std_normalize(stats, x, clip)
    if not hasattr(batch, "keys") or not hasattr(stats, "keys"):
        wanted, got = "a mapping like the observations", f"{type(stats).__name__} for a {type(batch).__name__}"
        raise TypeError(checks.text(function, argument, wanted, got))
    return {
        k: _prepare(function, f"{argument}[{k!r}]", batch[k], checks.take(function, argument, stats, k), clip)
        for k in batch.keys()
    }


def _check_stats(function: str, argument: str, x: Tensor, stats: Any) -> None:
    if not checks.has_tensors(stats, "mean", "var"):
        wanted = "an object with tensors mean and var"
        raise TypeError(checks.text(function, argument, wanted, checks.describe(stats)))
    for name, moment in (("mean", stats.mean), ("var", stats.var)):
        if tuple(moment.shape) != tuple(x.shape[max(0, x.ndim - moment.ndim) :]):
            wanted = f"statistics of the last dimensions of observations {list(x.shape)}"
            raise ValueError(checks.text(function, argument, wanted, f"{name} {checks.describe(moment)}"))


def _as_float(function: str, x: Tensor) -> Tensor:
    is_image = isinstance(x, Tensor) and x.dtype == torch.uint8
    x = checks.real(function, "batch", x)
    return x / 255 if is_image else x


def _detach(x: Any) -> Any:
    return x.detach() if isinstance(x, Tensor) else x


def _size(batch: Batch) -> int:
    size: int = tree_flatten(batch)[0][0].shape[0]
    return size


def _check_key_mask(batch: Batch, key_mask: Tensor | None) -> None:
    if key_mask is None:
        return
    checks.tensor("rnd_loss", "key_mask", key_mask)
    if key_mask.dtype not in (torch.bool, torch.int64):
        wanted = "bool [B] or int64 rows [k]"
        raise TypeError(checks.text("rnd_loss", "key_mask", wanted, checks.describe(key_mask)))
    is_rows = key_mask.dtype == torch.int64
    if key_mask.ndim == 0 or (is_rows and key_mask.ndim != 1):
        wanted = "rows of shape [k]" if is_rows else "bool [B]"
        raise ValueError(checks.text("rnd_loss", "key_mask", wanted, checks.describe(key_mask)))
    leaves = [checks.tensor("rnd_loss", "batch", leaf) for leaf in tree_flatten(batch)[0]]
    if not leaves or any(leaf.ndim == 0 or leaf.shape[0] != leaves[0].shape[0] for leaf in leaves):
        got = ", ".join(checks.describe(leaf) for leaf in leaves) or "no tensor"
        raise ValueError(checks.text("rnd_loss", "batch", "tensors [B, ...] where there is a key_mask", got))
    for leaf in leaves:
        if not is_rows and key_mask.shape != leaf.shape[: key_mask.ndim]:
            wanted = f"bool [{leaf.shape[0]}] like the batch"
            raise ValueError(checks.text("rnd_loss", "key_mask", wanted, checks.describe(key_mask)))


def _select_features(features: Tensor, batch: Batch, key_mask: Tensor | None) -> Tensor:
    """The target's features of the samples that count."""
    checks.tensor("rnd_loss", "target_features", features)
    leading: tuple[int, ...] = ()
    if key_mask is not None:
        leading = (_size(batch),) if key_mask.dtype == torch.int64 else tuple(key_mask.shape)
    if tuple(features.shape[: len(leading)]) != leading:
        wanted = f"of shape [{', '.join(map(str, [*leading, '...', 'K']))}] like the whole batch"
        guess = "Did you select rows? key_mask selects from target_features, too."
        raise ValueError(checks.text("rnd_loss", "target_features", wanted, checks.describe(features), guess))
    return checks.floating("rnd_loss", "target_features", _select(features, key_mask))


def _select(batch: Batch, key_mask: Tensor | None) -> Batch:
    if key_mask is None:
        return batch
    if key_mask.dtype == torch.int64:
        return tree_map(lambda x: _rows(x, key_mask), batch)
    if key_mask.numel() == 0:
        return batch
    # The first sample that counts stands in for those that do not: networks that are finite on what counts are finite
    # on it, which zeros do not promise (normalised features are 0 / 0 there). Where none counts, it may hold a NaN.
    first = key_mask.reshape(-1).to(torch.uint8).argmax().reshape(1)

    def select(x: Tensor) -> Tensor:
        samples = x.reshape(key_mask.numel(), *x.shape[key_mask.ndim :])
        stand_in = torch.nan_to_num(samples.index_select(0, first).squeeze(0), nan=0.0, posinf=0.0, neginf=0.0)
        return torch.where(checks.align(key_mask, x), x, stand_in)

    return tree_map(select, batch)


def _rows(x: Tensor, rows: Tensor) -> Tensor:
    """``x[rows]``, in the memory format of ``x``."""
    rows = _from_start(rows, x.shape[0])
    # Of images in channels_last, index_select would copy number by number, and into another memory format.
    last = x.ndim > 2 and x.stride(1) < x.stride(-1)
    x = x.movedim(1, -1) if last else x
    out = None
    # Rows of images are large: their pages would be fresh in each call. Written with out=, they have no gradient.
    if x.layout == torch.strided and not x.requires_grad and not watched(x, rows):
        out = pages.for_result(x, (rows.shape[0], *x.shape[1:]))
    chosen = torch.index_select(x, 0, rows, out=out)
    return chosen.movedim(-1, 1) if last else chosen


def _scatter(error: Tensor, rows: Tensor, size: int) -> Tensor:
    """[B]: each row's error in its place, zeros elsewhere."""
    checks.leading_shape("rnd_loss", "the errors", error, "key_mask", rows.shape)
    return error.new_zeros(size, *error.shape[1:]).index_add(0, _from_start(rows, size), error)


def _from_start(rows: Tensor, size: int) -> Tensor:
    """Rows counted from the end, which are negative, as rows counted from the start."""
    return torch.where(rows < 0, rows + size, rows)
