r"""Distributions over actions, made of the numbers a network puts out.

An action is a vector: of real numbers (:class:`NormalPolicy`), or of choices (:class:`CategoricalPolicy`). Several
actions at once are a mapping from name to distribution; their log-probabilities and entropies add up. A distribution of
another family comes evaluated (:class:`EvaluatedPolicy`): losses need no more of it.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from rlloss import categorical, checks
from rlloss.types import Scalar


class NormalPolicy(NamedTuple):
    """Independent normal distributions, one for each number of an action."""

    mean: Tensor  # [..., action_dim]
    stddev: Tensor  # [..., action_dim], above 0


class CategoricalPolicy(NamedTuple):
    """Independent choices, one for each group; a single choice is one group."""

    logits: Tensor  # [..., groups, classes]


class EvaluatedPolicy(NamedTuple):
    """A distribution of any other family: what is left of it once the action is known."""

    log_prob: Tensor  # [...], of that action
    entropy: Tensor  # [...]


#: The distribution of one action.
SinglePolicy: TypeAlias = NormalPolicy | CategoricalPolicy | EvaluatedPolicy

#: One distribution, or one for each action by name.
Policy: TypeAlias = SinglePolicy | Mapping[str, SinglePolicy]


def bounded_normal(mean: Tensor, stddev: Tensor, *, minimum: Scalar = 0.1, maximum: Scalar = 1.0) -> NormalPolicy:
    r"""Normal distributions with means in (-1, 1) and bounded deviations.

    .. math:: \mathcal{N}\left(\tanh(m), \; (b - a) \, \sigma(s + 2) + a\right)

    Samples are not squashed, so they may lie outside of [-1, 1] and their log-probability needs no correction.

    Source: Hafner et al. 2023 (arXiv:2301.04104), section "Actor learning"; danijar/dreamerv3@e3f0224
    embodied/jax/heads.py ``Head.bounded_normal``.

    Args:
        mean: [..., action_dim], m, as the network puts it out, any float dtype; computed in float32 at least.
        stddev: the same shape, s.
        minimum: a, the smallest deviation; above 0, densities are bounded.
        maximum: b, the largest.

    Returns:
        The distributions.

    Raises:
        TypeError: if ``mean`` or ``stddev`` is not a floating-point tensor.
        ValueError: if their shapes differ or are [], or not 0 <= ``minimum`` <= ``maximum``.

    Example:
        >>> bounded_normal(torch.zeros(2), torch.full((2,), 100.0))
        NormalPolicy(mean=tensor([0., 0.]), stddev=tensor([1., 1.]))
    """
    mean, stddev = _mean_and_stddev("bounded_normal", mean, stddev)
    checks.knob("bounded_normal", "minimum", minimum, 0.0)
    checks.knob("bounded_normal", "maximum", maximum, 0.0)
    if not isinstance(minimum, Tensor) and not isinstance(maximum, Tensor) and minimum > maximum:
        raise ValueError(checks.text("bounded_normal", "minimum", f"at most maximum={maximum}", repr(minimum)))
    low, high = checks.scalar_like(stddev, minimum), checks.scalar_like(stddev, maximum)
    return NormalPolicy(torch.tanh(mean), (high - low) * torch.sigmoid(stddev + 2) + low)


def categorical_policy(logits: Tensor, *, unimix: Scalar = 0.0) -> CategoricalPolicy:
    r"""Choices with the given logits.

    .. math:: p = (1 - u) \, \mathrm{softmax}(l) + u / C

    The paper mixes 1 % of the uniform distribution in. The author's current code does not, though its configuration
    says so (danijar/dreamerv3#219), and neither does the default here: pass ``unimix=0.01`` for the paper's.

    Source: Hafner et al. 2023 (arXiv:2301.04104), section "Actor learning"; danijar/dreamerv3@e3f0224
    embodied/jax/heads.py ``Head.categorical``.

    Args:
        logits: [..., groups, classes], any float dtype; computed in float32 at least.
        unimix: share u of the uniform distribution, in [0, 1].

    Returns:
        The distributions.

    Raises:
        TypeError: if ``logits`` is not a floating-point tensor.
        ValueError: if ``logits`` lacks groups or classes, or ``unimix`` is outside [0, 1].

    Example:
        >>> categorical_policy(torch.tensor([[1e4, 0.0]]), unimix=0.01).logits.exp()
        tensor([[0.9950, 0.0050]])
    """
    logits = _logits("categorical_policy", logits)
    checks.knob("categorical_policy", "unimix", unimix, 0.0, 1.0)
    return CategoricalPolicy(categorical.unimix(logits, unimix))


def policy_sample(policy: Policy, noise: Any) -> Any:
    r"""Actions, from noise that was drawn elsewhere.

    .. math:: a = \mu + \sigma \epsilon \quad \text{or} \quad a = \mathrm{onehot}(\arg\max_c (l_c + g_c))

    Noise of zeros gives the most likely action. Gradients flow into means and deviations, and into no logits.

    Source: danijar/dreamerv3@e3f0224 embodied/jax/outs.py ``Normal.sample``, ``Categorical.sample``.

    Args:
        policy: a distribution, or a mapping of them.
        noise: standard normal, [..., action_dim] like the mean (``rlloss.random.normal``), or Gumbel distributed,
            [..., groups, classes] like the logits (``rlloss.random.gumbel``); a mapping of those for a mapping.

    Returns:
        [..., action_dim], or one-hot floats [..., groups, classes], of which ``.argmax(-1)`` is what environments
        take; a dict of those for a mapping.

    Raises:
        KeyError: if ``policy`` and ``noise`` have different keys.
        TypeError: if noise is not a floating-point tensor, or ``policy`` no distribution.
        ValueError: if shapes do not fit.

    Example:
        >>> policy = {"move": categorical_policy(torch.tensor([[0.0, 1.0]])), "turn": NormalPolicy(*torch.ones(2, 1))}
        >>> policy_sample(policy, {"move": torch.zeros(1, 2), "turn": torch.tensor([0.5])})
        {'move': tensor([[0., 1.]]), 'turn': tensor([1.5000])}
    """
    if _is_single(policy):
        return _sample(policy, noise)
    return _by_key("policy_sample", policy, "noise", noise, _sample)


def policy_log_prob(policy: Policy, action: Any) -> Tensor:
    r"""Log-probability (or density) of actions, in nats, summed over all that makes up one action.

    .. math:: \sum_i \left[-\tfrac{1}{2} \left(\tfrac{a_i - \mu_i}{\sigma_i}\right)^2 - \log \sigma_i -
              \tfrac{1}{2} \log 2 \pi\right] \quad \text{or} \quad \sum_g \log \mathrm{softmax}(l_g)_{a_g}

    Source: danijar/dreamerv3@e3f0224 embodied/jax/outs.py ``Normal.logp``, ``Categorical.logp``, ``Agg.logp``.

    Args:
        policy: a distribution, or a mapping of them.
        action: as sampled. For :class:`NormalPolicy` [..., action_dim]; for :class:`CategoricalPolicy` one-hot floats
            [..., groups, classes] or indices, int [..., groups]; for :class:`EvaluatedPolicy` not read; a mapping of
            those for a mapping.

    Returns:
        [...]. Gradients flow into ``policy`` and ``action``.

    Raises:
        KeyError: if ``policy`` and ``action`` have different keys.
        TypeError: if an action has the wrong dtype, or ``policy`` is no distribution.
        ValueError: if shapes do not fit.

    Example:
        >>> policy_log_prob(categorical_policy(torch.zeros(3, 2)), torch.tensor([0, 1, 0]))
        tensor(-2.0794)
    """
    if _is_single(policy):
        return _log_prob(policy, action)
    return _total(_by_key("policy_log_prob", policy, "action", action, _log_prob).values())


def policy_entropy(policy: Policy) -> Tensor:
    r"""Entropy, in nats, summed over all that makes up one action.

    .. math:: \sum_i \left[\log \sigma_i + \tfrac{1}{2} \log 2 \pi e\right] \quad \text{or} \quad
              -\sum_g \sum_c p_{gc} \log p_{gc}

    Source: danijar/dreamerv3@e3f0224 embodied/jax/outs.py ``Normal.entropy``, ``Categorical.entropy``,
    ``Agg.entropy``.

    Args:
        policy: a distribution, or a mapping of them.

    Returns:
        [...].

    Raises:
        TypeError: if ``policy`` is no distribution.
        ValueError: if shapes do not fit.

    Example:
        >>> policy_entropy(NormalPolicy(torch.zeros(2), torch.ones(2)))
        tensor(2.8379)
    """
    if _is_single(policy):
        return _entropy(policy)
    return _total(_entropy(part) for part in _parts("policy_entropy", policy).values())


def _sample(policy: Any, noise: Tensor) -> Tensor:
    function = "policy_sample"
    noise = checks.floating(function, "noise", noise)
    if isinstance(policy, NormalPolicy):
        mean, stddev = _mean_and_stddev(function, *policy)
        checks.same_shape(function, "noise", noise, "the mean", mean.shape)
        return mean + stddev * noise
    logits = _logits(function, _single(function, policy).logits)
    checks.same_shape(function, "noise", noise, "the logits", logits.shape)
    return categorical.straight_through_one_hot(logits, noise).detach()


def _log_prob(policy: Any, action: Tensor) -> Tensor:
    function = "policy_log_prob"
    if isinstance(policy, EvaluatedPolicy):
        return checks.floating(function, "log_prob", policy.log_prob)
    action = checks.tensor(function, "action", action)
    if isinstance(policy, NormalPolicy):
        mean, stddev = _mean_and_stddev(function, *policy)
        action = checks.real(function, "action", action)
        checks.same_shape(function, "action", action, "the mean", mean.shape)
        z = (action - mean) / stddev
        return -(z.square() / 2 + torch.log(stddev) + math.log(2 * math.pi) / 2).sum(-1)
    logits = _logits(function, _single(function, policy).logits)
    log_p = torch.log_softmax(logits, -1)
    if action.dtype == torch.bool or action.is_floating_point():
        checks.same_shape(function, "action", action, "the logits", logits.shape, "Indices are integers.")
        # A class that is ruled out and not taken adds nothing: 0 times -inf.
        log_p = torch.where((action == 0) & torch.isinf(log_p), 0.0, log_p)
        return (log_p * action).sum((-2, -1))
    guess = "One choice is one group: action.unsqueeze(-1) with logits.unsqueeze(-2)."
    checks.same_shape(function, "action", action, "the logits without classes", logits.shape[:-1], guess)
    return torch.gather(log_p, -1, action.to(torch.int64).unsqueeze(-1)).sum((-2, -1))


def _entropy(policy: Any) -> Tensor:
    function = "policy_entropy"
    if isinstance(policy, NormalPolicy):
        _, stddev = _mean_and_stddev(function, *policy)
        return (torch.log(stddev) + math.log(2 * math.pi * math.e) / 2).sum(-1)
    if isinstance(policy, EvaluatedPolicy):
        return checks.floating(function, "entropy", policy.entropy)
    return categorical.categorical_entropy(_logits(function, _single(function, policy).logits)).sum(-1)


def _is_single(policy: Any) -> bool:
    return not hasattr(policy, "keys")


def _single(function: str, policy: Any) -> CategoricalPolicy:
    if isinstance(policy, CategoricalPolicy):
        return policy
    wanted = "a NormalPolicy, a CategoricalPolicy or a mapping of them"
    guess = "bounded_normal and categorical_policy make them of what a network puts out."
    raise TypeError(checks.text(function, "policy", wanted, checks.describe(policy), guess))


def _parts(function: str, policy: Any) -> dict[str, Any]:
    if not len(policy.keys()):
        raise ValueError(checks.text(function, "policy", "a mapping of at least one distribution", "an empty one"))
    return {key: policy[key] for key in policy.keys()}


def _by_key(
    function: str, policy: Any, argument: str, other: Any, apply: Callable[[Any, Any], Tensor]
) -> dict[str, Tensor]:
    """``apply`` of the entries of both mappings, key by key."""
    parts = _parts(function, policy)
    if not hasattr(other, "keys"):
        wanted = f"a mapping with {sorted(parts)} like policy"
        raise TypeError(checks.text(function, argument, wanted, checks.describe(other)))
    if sorted(other.keys()) != sorted(parts):
        wanted, got = f"a mapping with {sorted(parts)} like policy", f"keys {sorted(other.keys())}"
        raise checks.MissingKeyError(checks.text(function, argument, wanted, got, "One distribution for each action."))
    return {key: apply(part, other[key]) for key, part in parts.items()}


def _total(values: Iterable[Tensor]) -> Tensor:
    first, *rest = values
    return sum(rest, start=first)


def _mean_and_stddev(function: str, mean: Tensor, stddev: Tensor) -> tuple[Tensor, Tensor]:
    mean, stddev = checks.floating(function, "mean", mean), checks.floating(function, "stddev", stddev)
    checks.rank_at_least(function, "mean", mean, ("action_dim",))
    checks.same_shape(function, "stddev", stddev, "mean", mean.shape)
    return mean, stddev


def _logits(function: str, logits: Tensor) -> Tensor:
    logits = checks.floating(function, "logits", logits)
    if logits.ndim < 2 or logits.shape[-1] == 0:
        wanted, guess = "of shape [..., groups, classes >= 1]", "One choice is one group: logits.unsqueeze(-2)."
        raise ValueError(checks.text(function, "logits", wanted, checks.describe(logits), guess))
    return logits
