r"""DreamerV3's losses, of the world model and of the behaviour: terms on tensors, and losses on parameters."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict, Unpack

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_leaves, tree_map, tree_structure

from rlloss import checks, fused
from rlloss.categorical import balanced_kl, categorical_kl_terms
from rlloss.policy import (
    CategoricalPolicy,
    EvaluatedPolicy,
    NormalPolicy,
    Policy,
    policy_entropy,
    policy_log_prob,
    policy_sample,
)
from rlloss.returns import lambda_return
from rlloss.statistics import ReturnRange, return_range_scale, return_range_update
from rlloss.transforms import symlog
from rlloss.two_hot import bins_for, neighbours, symexp_decode, two_hot_cross_entropy, two_hot_decode
from rlloss.types import ApplyFn, Batch, Params, Scalar

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

KL_MODES = ("balanced", "separate")
RECO_LOSSES = ("l2", "l1")
RECO_TRANSFORMS = ("symlog", "symlog_target", "none", "auto")


class ModelKnobs(TypedDict, total=False):
    """The knobs of the world-model loss; those left out have the values of ``DREAMER_V3_DEFAULTS``.

    A real knob may be a 0-d tensor: it can then be differentiated, batched over, and changed without a recompilation;
    its range is not checked, because that would read it.
    """

    lambda_kl: Scalar  # weight of the KL terms, at least 0
    lambda_reco: Scalar  # weight of the reconstruction, at least 0
    lambda_reward: Scalar  # weight of the reward, at least 0
    lambda_continue: Scalar  # weight of the continuation, at least 0; the number 0 leaves the term out
    kl_mode: str  # "balanced" or "separate"
    kl_alpha: Scalar  # balanced: share of the term that trains the prior, in [0, 1]
    lambda_dynamic: Scalar  # separate: weight of the term that trains the prior, times lambda_kl
    lambda_representation: Scalar  # separate: weight of the term that trains the posterior, times lambda_kl
    free_bits: Scalar  # nats that cost nothing to save: for each categorical if balanced, for their sum if separate
    unimix: Scalar  # share of the uniform distribution mixed into both, in [0, 1]
    continue_target_scale: Scalar  # target of a step that goes on, in [0, 1]: 1, or a discount for the model to learn
    reco_loss: str  # "l2" (squared) or "l1" (absolute)
    reco_transform: str | Mapping[str, str]  # "symlog", "symlog_target", "none" or "auto", or head -> one of them
    reward_two_hot: bool  # the reward head predicts logits over bins, else the reward itself
    num_reward_bins: int  # of `symexp_bins`
    global_average: bool  # mean over the dimensions of an observation, else their sum


#: The knobs as the documents of the method that users know have them.
DREAMER_V3_DEFAULTS = ModelKnobs(
    lambda_kl=1.0,
    lambda_reco=1.0,
    lambda_reward=1.0,
    lambda_continue=0.0,
    kl_mode="balanced",
    kl_alpha=0.8,
    lambda_dynamic=1.0,
    lambda_representation=0.1,
    free_bits=1.0,
    unimix=0.0,
    continue_target_scale=1.0,
    reco_loss="l2",
    reco_transform="symlog",
    reward_two_hot=True,
    num_reward_bins=255,
    global_average=False,
)

#: The knobs that make it the author's current code (danijar/dreamerv3@e3f0224 dreamerv3/configs.yaml, horizon 333).
DREAMER_V3_OFFICIAL = ModelKnobs(
    kl_mode="separate",
    lambda_dynamic=1.0,
    lambda_representation=0.1,
    free_bits=1.0,
    unimix=0.01,
    lambda_continue=1.0,
    continue_target_scale=332 / 333,
    reco_transform="auto",
)


def dreamer_v3_model_terms(outputs: Mapping[str, Any], batch: Batch, **knobs: Unpack[ModelKnobs]) -> dict[str, Tensor]:
    r"""Unreduced terms of the world-model loss, before weights.

    - ``kl`` (balanced): mean over groups of :math:`\alpha \max(\mathrm{KL}(\mathrm{sg}(z) \| \hat z), b) +
      (1 - \alpha) \max(\mathrm{KL}(z \| \mathrm{sg}(\hat z)), b)`,
    - ``dynamic`` and ``representation`` (separate): :func:`~rlloss.categorical.categorical_kl_terms`,
    - ``reco``: :math:`\sum (\hat x - x)^2` or :math:`\sum |\hat x - x|` after ``reco_transform``, over all
      heads; a uint8 target becomes a float in [0, 1] first,
    - ``reward``: two-hot cross-entropy, or :math:`(\mathrm{symlog}(\hat r) - \mathrm{symlog}(r))^2`,
    - ``continue`` (where ``lambda_continue`` is not 0): binary cross-entropy against ``continue_target_scale`` where
      the step is not terminal, and 0 where it is.

    Source: Hafner et al. 2023 (arXiv:2301.04104), section "World model learning"; danijar/dreamerv3@e3f0224
    dreamerv3/agent.py ``Agent.loss``, dreamerv3/rssm.py; torchrl 0.14.1 ``DreamerV3ModelLoss`` for the balanced form.

    Args:
        outputs: of the world model, [B, T] leading: "prior_logits" and "posterior_logits" [B, T, groups, classes];
            "reconstruction" like the observation; "reward" [B, T, num_reward_bins], or [B, T] (also [B, T, 1]) if
            ``reward_two_hot`` is False; "continue_logits" [B, T] (also [B, T, 1]) where that term is wanted.
        batch: "observation": [B, T, *obs] or a mapping of those; "reward": [B, T] or [B, T, 1], any numeric dtype;
            "terminated": bool like the reward, where the continuation is wanted; optional "mask": bool [B, T], steps
            that count.
        **knobs: see :class:`ModelKnobs`.

    Returns:
        Name -> [B, T], in nats or squared units; 0 where ``mask`` is False, whatever the step holds. A batch may have
        any leading dimensions in place of [B, T].

    Raises:
        KeyError: if an entry is missing, naming those that are there.
        TypeError: if a dtype is wrong, or a knob unknown.
        ValueError: if shapes do not fit or a knob is out of range.

    Example:
        >>> logits = torch.zeros(2, 3, 4, 8)
        >>> outputs = {"prior_logits": logits, "posterior_logits": logits, "reward": torch.zeros(2, 3, 255),
        ...            "reconstruction": torch.zeros(2, 3, 5)}
        >>> batch = {"observation": torch.zeros(2, 3, 5), "reward": torch.zeros(2, 3)}
        >>> {name: term.shape for name, term in dreamer_v3_model_terms(outputs, batch).items()}
        {'kl': torch.Size([2, 3]), 'reco': torch.Size([2, 3]), 'reward': torch.Size([2, 3])}
    """
    k = _knobs_for(batch, knobs)
    return _model_terms(outputs, batch, k)


def dreamer_v3_model_losses(
    outputs: Mapping[str, Any], batch: Batch, **knobs: Unpack[ModelKnobs]
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    r"""Each term as a scalar with its weight, for those who log or combine them on their own.

    .. math:: L_i = \lambda_i \, \frac{\sum_{b,t} m_{bt} \, l_{i,bt}}{\max(1, \sum_{b,t} m_{bt})}

    Source: as :func:`dreamer_v3_model_terms`.

    Args:
        outputs: see :func:`dreamer_v3_model_terms`.
        batch: see :func:`dreamer_v3_model_terms`.
        **knobs: see :class:`ModelKnobs`.

    Returns:
        ``(weighted, unweighted, terms)``: name -> [] twice, and name -> [B, T].

    Raises:
        KeyError, TypeError, ValueError: as :func:`dreamer_v3_model_terms`.

    Example:
        >>> logits = torch.zeros(2, 3, 4, 8)
        >>> outputs = {"prior_logits": logits, "posterior_logits": logits, "reward": torch.zeros(2, 3, 255),
        ...            "reconstruction": torch.zeros(2, 3, 5)}
        >>> batch = {"observation": torch.ones(2, 3, 5), "reward": torch.zeros(2, 3)}
        >>> weighted, _, _ = dreamer_v3_model_losses(outputs, batch, lambda_kl=0.5)
        >>> weighted["kl"], weighted["reco"]
        (tensor(0.5000), tensor(2.4023))
    """
    k = _knobs_for(batch, knobs)
    terms = _model_terms(outputs, batch, k)
    # One by one: each can be differentiated without the others.
    number = _number_of_steps(batch, terms["reward"].numel())
    unweighted = {name: term.sum() / number for name, term in terms.items()}
    weighted = {name: _weight(name, loss, k) * loss for name, loss in unweighted.items()}
    return weighted, unweighted, terms


def dreamer_v3_model_loss(
    params: Params, batch: Batch, *, world_model: ApplyFn, **knobs: Unpack[ModelKnobs]
) -> tuple[Tensor, dict[str, Any]]:
    r"""World-model loss of DreamerV3.

    .. math:: L = \lambda_{kl} L_{kl} + \lambda_{reco} L_{reco} + \lambda_{reward} L_{reward} +
              \lambda_{continue} L_{continue}

    with the terms of :func:`dreamer_v3_model_terms`, averaged over the steps that count; in separate mode
    :math:`L_{kl} = \lambda_{dynamic} L_{dynamic} + \lambda_{representation} L_{representation}`.
    ``**DREAMER_V3_OFFICIAL`` makes it the author's current code.

    Source: Hafner et al. 2023 (arXiv:2301.04104), section "World model learning"; danijar/dreamerv3@e3f0224
    dreamerv3/agent.py ``Agent.loss``.

    Args:
        params: of the world model, differentiated.
        batch: what :func:`dreamer_v3_model_terms` reads, and whatever else the world model does (actions, is_first,
            noise). Where ``mask`` is False, NaN and infinite entries are given to the world model as zeros.
        world_model: ``(params, batch) -> outputs``, a mapping as :func:`dreamer_v3_model_terms` reads it.
        **knobs: see :class:`ModelKnobs`.

    Returns:
        ``(loss, aux)``: loss []; aux["losses"]: name -> [] and aux["terms"]: name -> [B, T], both unweighted and
        detached; aux["outputs"]: what the world model returned, not detached.

    Raises:
        KeyError, TypeError, ValueError: as :func:`dreamer_v3_model_terms`.

    Example:
        >>> def world_model(params, batch):
        ...     logits = params["logits"].expand(*batch["reward"].shape, 4, 8)
        ...     return {"prior_logits": logits, "posterior_logits": logits, "reconstruction": batch["observation"] * 0,
        ...             "reward": params["reward"].expand(*batch["reward"].shape, 255)}
        >>> params = {"logits": torch.zeros(4, 8), "reward": torch.zeros(255)}
        >>> batch = {"observation": torch.zeros(2, 3, 5), "reward": torch.zeros(2, 3)}
        >>> loss, aux = dreamer_v3_model_loss(params, batch, world_model=world_model)
        >>> loss, aux["losses"]["kl"]
        (tensor(6.5413), tensor(1.))
    """
    checks.function_of(FUNCTION, "world_model", world_model, "(params, batch) -> outputs")
    k = _knobs_for(batch, knobs)
    outputs = world_model(params, _silence(batch))
    terms = _model_terms(outputs, batch, k)
    stacked = torch.stack(list(terms.values())).reshape(len(terms), -1)
    losses = stacked.sum(1) / _number_of_steps(batch, stacked.shape[1])
    weights = torch.stack([_weight(name, losses, k) for name in terms])
    # Copies, for a loss may be added to in place, and what unbind returns may not.
    logged = {name: loss.clone() for name, loss in zip(terms, losses.detach().unbind(), strict=True)}
    terms = {name: term.detach() for name, term in terms.items()}
    return weights.dot(losses), {"losses": logged, "terms": terms, "outputs": outputs}


FUNCTION = "dreamer_v3_model_loss"
SHARES = ("kl_alpha", "unimix", "continue_target_scale")  # knobs in [0, 1]
WHY_CONTINUE = "lambda_continue > 0 asks for it; set lambda_continue=0 to train without."


def _model_terms(outputs: Mapping[str, Any], batch: Batch, k: Mapping[str, Any]) -> dict[str, Tensor]:
    posterior = checks.floating(FUNCTION, "posterior_logits", _output(outputs, "posterior_logits"))
    prior = checks.floating(FUNCTION, "prior_logits", _output(outputs, "prior_logits"))
    checks.rank_at_least(FUNCTION, "posterior_logits", posterior, ("groups", "classes"))
    checks.same_shape(FUNCTION, "prior_logits", prior, "posterior_logits", posterior.shape)
    steps = _Steps(tuple(posterior.shape[:-2]), _mask(batch, tuple(posterior.shape[:-2])))
    terms = _kl_terms(steps.keep(posterior), steps.keep(prior), k)
    terms["reco"] = _reconstruction_term(outputs, batch, steps, k)
    terms["reward"] = _reward_term(outputs, batch, steps, k)
    if _wanted(k["lambda_continue"]):
        terms["continue"] = _continue_term(outputs, batch, steps, k)
    return {name: steps.keep(term) for name, term in terms.items()}


class _Steps(NamedTuple):
    """The leading dimensions of a batch, and which steps of it count."""

    shape: tuple[int, ...]
    mask: Tensor | None

    def keep(self, x: Tensor) -> Tensor:
        """``x`` where the mask is True, 0 elsewhere: selected, so that a NaN leaves no trace in the gradient."""
        if self.mask is None:
            return x
        return torch.where(checks.align(self.mask, x), x, 0)

    def scalar(self, argument: str, x: Tensor, guess: str = "") -> Tensor:
        """One number a step: [*steps] or [*steps, 1] as [*steps]."""
        if tuple(x.shape) == (*self.shape, 1):
            return x.squeeze(-1)
        checks.same_shape(FUNCTION, argument, x, "the logits' leading dimensions", self.shape, guess)
        return x


def _kl_terms(posterior: Tensor, prior: Tensor, k: Mapping[str, Any]) -> dict[str, Tensor]:
    if k["kl_mode"] == "separate":
        dynamic, representation = categorical_kl_terms(posterior, prior, free_nats=k["free_bits"], unimix=k["unimix"])
        return {"dynamic": dynamic, "representation": representation}
    return {"kl": balanced_kl(posterior, prior, k["kl_alpha"], k["free_bits"], k["unimix"]).mean(-1)}


def _reconstruction_term(outputs: Mapping[str, Any], batch: Batch, steps: _Steps, k: Mapping[str, Any]) -> Tensor:
    observation, reconstruction = batch["observation"], _output(outputs, "reconstruction")
    if isinstance(observation, Tensor):
        return _head_term("observation", observation, reconstruction, steps, k)
    if not hasattr(reconstruction, "keys"):
        wanted = f"a mapping with {sorted(observation.keys())} like observation"
        raise TypeError(checks.text(FUNCTION, "reconstruction", wanted, checks.describe(reconstruction)))
    if sorted(observation.keys()) != sorted(reconstruction.keys()):
        wanted, got = f"a mapping with {sorted(observation.keys())}", f"keys {sorted(reconstruction.keys())}"
        guess = "One head for each observation."
        raise checks.MissingKeyError(checks.text(FUNCTION, "reconstruction", wanted, got, guess))
    heads = [_head_term(head, observation[head], reconstruction[head], steps, k) for head in observation.keys()]
    return torch.stack(heads).sum(0)


def _head_term(head: str, target: Tensor, prediction: Tensor, steps: _Steps, k: Mapping[str, Any]) -> Tensor:
    is_image = isinstance(target, Tensor) and target.dtype == torch.uint8
    target = target if is_image else checks.real(FUNCTION, f"observation {head!r}", target).detach()
    prediction = checks.floating(FUNCTION, f"reconstruction of {head!r}", prediction)
    checks.leading_shape(FUNCTION, f"observation {head!r}", target, "the logits", steps.shape)
    checks.same_shape(FUNCTION, f"reconstruction of {head!r}", prediction, "the observation", target.shape)
    target, prediction = steps.keep(target), steps.keep(prediction)
    transforms = k["reco_transform"]
    transform = transforms if isinstance(transforms, str) else transforms[head]
    if transform == "auto":
        transform = "none" if is_image else "symlog_target"
    if prediction.ndim == len(steps.shape):
        target, prediction = target.unsqueeze(-1), prediction.unsqueeze(-1)
    dims = prediction.ndim - len(steps.shape)
    options = {
        "dims": dims,
        "absolute": k["reco_loss"] == "l1",
        "symlog_prediction": transform == "symlog",
        "symlog_target": transform != "none",
    }
    (error,) = fused.reduce(fused.ErrorSum(partial(_error_sum, **options), **options), prediction, target)
    return error / math.prod(prediction.shape[-dims:]) if k["global_average"] else error


def _error_sum(
    prediction: Tensor, target: Tensor, *, dims: int, absolute: bool, symlog_prediction: bool, symlog_target: bool
) -> tuple[Tensor]:
    error = fused.errors(prediction, target, symlog_prediction, symlog_target)
    return ((error.abs() if absolute else error.square()).sum(tuple(range(-dims, 0))),)


def _reward_term(outputs: Mapping[str, Any], batch: Batch, steps: _Steps, k: Mapping[str, Any]) -> Tensor:
    reward = checks.real(FUNCTION, "reward", batch["reward"])
    reward = steps.keep(steps.scalar("reward", reward)).detach()
    prediction = checks.floating(FUNCTION, "the reward prediction", _output(outputs, "reward"))
    if not k["reward_two_hot"]:
        guess = "With reward_two_hot=False the model predicts the reward itself, not logits."
        prediction = steps.keep(steps.scalar("the reward prediction", prediction, guess))
        return (symlog(prediction) - symlog(reward)).square()
    guess = "Set num_reward_bins to the width of the head, or reward_two_hot=False for a scalar prediction."
    checks.last_dimension(FUNCTION, "the reward prediction", prediction, k["num_reward_bins"], guess)
    checks.leading_shape(FUNCTION, "the reward prediction", prediction, "the latent logits", steps.shape)
    return two_hot_cross_entropy(steps.keep(prediction), reward, bins_for(prediction))


def _continue_term(outputs: Mapping[str, Any], batch: Batch, steps: _Steps, k: Mapping[str, Any]) -> Tensor:
    terminated = checks.boolean(FUNCTION, "terminated", batch["terminated"])
    logits = checks.floating(FUNCTION, "continue_logits", _output(outputs, "continue_logits", WHY_CONTINUE))
    logits = steps.keep(steps.scalar("continue_logits", logits))
    target: Tensor = (~steps.scalar("terminated", terminated)).to(logits.dtype) * k["continue_target_scale"]
    return (target - 1) * logsigmoid(-logits) - target * logsigmoid(logits)


def _output(outputs: Mapping[str, Any], key: str, why: str = "") -> Any:
    return checks.take(FUNCTION, "world_model(params, batch)", outputs, key, why)


def _knobs_for(batch: Batch, knobs: Mapping[str, Any]) -> Mapping[str, Any]:
    """All knobs; what they ask of the batch is there, which is known before the world model runs."""
    k = model_knobs(knobs)
    observation = checks.take(FUNCTION, "batch", batch, "observation")
    checks.take(FUNCTION, "batch", batch, "reward")
    if _wanted(k["lambda_continue"]):
        checks.take(FUNCTION, "batch", batch, "terminated", WHY_CONTINUE)
    if not isinstance(observation, Tensor) and not (hasattr(observation, "keys") and len(observation.keys())):
        wanted = "a tensor or a mapping of at least one"
        raise TypeError(checks.text(FUNCTION, "observation", wanted, checks.describe(observation)))
    if not isinstance(k["reco_transform"], str):
        heads = ["observation"] if isinstance(observation, Tensor) else sorted(observation.keys())
        if sorted(k["reco_transform"].keys()) != heads:
            wanted, got = f"an option or a mapping with {heads}", f"keys {sorted(k['reco_transform'].keys())}"
            raise checks.MissingKeyError(checks.text(FUNCTION, "reco_transform", wanted, got))
    return k


def _mask(batch: Batch, steps: tuple[int, ...]) -> Tensor | None:
    if not checks.has(batch, "mask"):
        return None
    mask = checks.boolean(FUNCTION, "mask", batch["mask"])
    checks.same_shape(FUNCTION, "mask", mask, "the logits' leading dimensions", steps)
    return mask


def _silence(batch: Batch) -> Batch:
    """The batch without the non-finite entries of steps that do not count.

    Their finite entries stay: they may be there to warm up a recurrent state. A zero gradient at the outputs would
    not be enough, since a network's own backward multiplies it with the NaN.
    """
    if not checks.has(batch, "mask"):
        return batch
    mask = checks.boolean(FUNCTION, "mask", batch["mask"])

    def silence(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.shape[: mask.ndim] != mask.shape:
            return x
        return torch.where(checks.align(mask, x), x, torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0))

    return tree_map(silence, batch)


def reduced(terms: Tensor, reduction: str) -> Tensor:
    """The terms as ``reduction``, one of ``REDUCTIONS``, says; the mean of none is 0."""
    if reduction == "none":
        return terms
    total = terms.sum()
    return total / max(terms.numel(), 1) if reduction == "mean" else total


def _number_of_steps(batch: Batch, steps: int) -> Any:
    """How many of the steps count, at least 1."""
    return batch["mask"].sum().clamp_min(1) if checks.has(batch, "mask") else max(steps, 1)


def _weight(name: str, loss: Tensor, k: Mapping[str, Any]) -> Tensor:
    """A tensor: where a loss has a number as a factor, jvp(grad) of a function that casts it fails in the backward."""
    weight: Scalar = k[f"lambda_{name}"]
    return checks.scalar_like(loss, k["lambda_kl"] * weight if name in ("dynamic", "representation") else weight)


def _wanted(weight: Scalar) -> bool:
    return isinstance(weight, Tensor) or weight > 0


def model_knobs(knobs: Mapping[str, Any]) -> Mapping[str, Any]:
    """All knobs, those left out with their defaults; raises where one is unknown or out of range."""
    for name in knobs:
        if name not in DREAMER_V3_DEFAULTS:
            guess = checks.did_you_mean(name, DREAMER_V3_DEFAULTS)
            wanted = f"one of {sorted(DREAMER_V3_DEFAULTS)}"
            raise TypeError(checks.text(FUNCTION, "each knob", wanted, repr(name), guess))
        if name in SHARES:
            checks.knob(FUNCTION, name, knobs[name], 0.0, 1.0)
        elif name.startswith("lambda_") or name == "free_bits":
            checks.knob(FUNCTION, name, knobs[name], 0.0)
    k = {**DREAMER_V3_DEFAULTS, **knobs}
    for name in ("reward_two_hot", "global_average"):
        if not isinstance(k[name], bool):
            raise TypeError(checks.text(FUNCTION, name, "True or False", checks.describe(k[name])))
    if not isinstance(k["num_reward_bins"], int) or k["num_reward_bins"] < 2:
        got = checks.describe(k["num_reward_bins"])
        raise ValueError(checks.text(FUNCTION, "num_reward_bins", "an int of at least 2", got))
    checks.option(FUNCTION, "kl_mode", k["kl_mode"], KL_MODES)
    checks.option(FUNCTION, "reco_loss", k["reco_loss"], RECO_LOSSES)
    transforms = k["reco_transform"]
    for transform in transforms.values() if isinstance(transforms, Mapping) else [transforms]:
        checks.option(FUNCTION, "reco_transform", transform, RECO_TRANSFORMS)
    return k


class Imagination(NamedTuple):
    """What :func:`imagine` returns, one step longer than its horizon."""

    states: Any  # a pytree like start, [B, horizon + 1, ...]: the start itself, and what follows
    actions: Any  # a pytree like the policy's output, [B, horizon + 1, ...]: in each state, the last one's included


class BehaviourTargets(NamedTuple):
    """What :func:`dreamer_v3_returns` makes of a rollout, one step shorter than it."""

    returns: Tensor  # [..., T - 1]: lambda-returns
    advantage: Tensor  # [..., T - 1]: returns beyond the value, in units of their range
    weight: Tensor  # [..., T - 1]: chance that the episode goes on, discounted


ESTIMATORS = ("score", "pathwise")
VALUE_LOSSES = ("two_hot", "symlog_mse")
REDUCTIONS = ("mean", "sum", "none")


def imagine(
    params: Params,
    start: Any,
    noise: Mapping[str, Any],
    *,
    dynamics: Callable[..., Any],
    policy: Callable[..., Any],
    horizon: int,
    time_dim: int = 1,
) -> Imagination:
    r"""Follow a policy through a model of the world.

    .. math:: a_t = \pi(\mathrm{sg}(s_t), \epsilon_t), \quad s_{t+1} = f(s_t, a_t, \eta_t)

    The policy sees states without their gradient. What gradient reaches a state has come by the actions and the states
    before it; a loss that trains by the score of its actions detaches the states as well.

    Source: Hafner et al. 2023 (arXiv:2301.04104), section "Actor critic learning"; danijar/dreamerv3@e3f0224
    dreamerv3/rssm.py ``RSSM.imagine``, dreamerv3/agent.py ``Agent.loss``.

    Args:
        params: handed to both functions as it is.
        start: pytree of tensors [B, ...], any dtype: what the model remembers.
        noise: {"policy": pytree of [B, horizon + 1, ...], one entry for each action; "dynamics": pytree of
            [B, horizon, ...], one for each transition}. A function that needs none may be left out: it gets None.
        dynamics: ``(params, state, action, noise) -> state``.
        policy: ``(params, state, noise) -> action``, any pytree of tensors.
        horizon: number of transitions, at least 1.
        time_dim: where the time goes: the number of leading dimensions, 0 for a single rollout.

    Returns:
        States and actions, [B, horizon + 1, ...] each.

    Raises:
        TypeError: if ``horizon`` is not an int.
        ValueError: if ``horizon`` is below 1, noise has another number of steps, or ``dynamics`` gives back another
            structure or shape than that of ``start``.

    Example:
        >>> def dynamics(params, state, action, noise):
        ...     return state + action
        >>> def policy(params, state, noise):
        ...     return params * torch.ones_like(state)
        >>> rollout = imagine(torch.tensor(2.0), torch.zeros(1), {}, dynamics=dynamics, policy=policy, horizon=3)
        >>> rollout.states, rollout.actions
        (tensor([[0., 2., 4., 6.]]), tensor([[2., 2., 2., 2.]]))
    """
    horizon = checks.integer("imagine", "horizon", horizon, 1)
    actor_noise = _noise_of_steps(noise, "policy", horizon + 1, time_dim)
    model_noise = _noise_of_steps(noise, "dynamics", horizon, time_dim)
    states, actions = [start], []
    for step in range(horizon):
        actions.append(policy(params, tree_map(torch.detach, states[-1]), actor_noise[step]))
        states.append(dynamics(params, states[-1], actions[-1], model_noise[step]))
        _check_state(start, states[-1])
    actions.append(policy(params, tree_map(torch.detach, states[-1]), actor_noise[horizon]))
    return Imagination(_stack(states, time_dim), _stack(actions, time_dim))


def dreamer_v3_returns(
    reward: Tensor,
    continuation: Tensor,
    value: Tensor,
    range_state: ReturnRange,
    *,
    discount: Scalar = 1.0,
    lmbda: Scalar = 0.95,
    value_stats: tuple[Scalar, Scalar] | None = None,
    rate: Scalar = 0.01,
    quantiles: tuple[float, float] = (0.05, 0.95),
    minimum: Scalar = 1.0,
    group: "ProcessGroup | None" = None,
) -> tuple[BehaviourTargets, ReturnRange]:
    r"""What actor and critic are trained towards, of an imagined rollout.

    .. math:: R_t &= r_{t+1} + \gamma c_{t+1} \left((1 - \lambda) v_{t+1} + \lambda R_{t+1}\right) \\
              A_t &= (R_t - v_t) \, / \max(1, p_{95}(R) - p_5(R)) \\
              w_t &= c_0 \textstyle\prod_{i=1}^{t} \gamma c_i

    Here the gradients of the networks stop: ``reward``, ``continuation`` and ``value`` are constants, and so is the
    range of the returns. The targets can still be differentiated by ``discount`` and ``lmbda``. For an actor that is
    trained through the model, compose :func:`~rlloss.returns.lambda_return`, which stops nothing.

    Source: Hafner et al. 2023 (arXiv:2301.04104), eqs. 7 and 11; danijar/dreamerv3@e3f0224 dreamerv3/agent.py
    ``imag_loss``.

    Args:
        reward: [..., T], expected in each state. The first, like the first return, came before the rollout: never read.
        continuation: [..., T], probability that the episode goes on after a state, or bool.
        value: [..., T], of the critic.
        range_state: of the returns; updated before it is used.
        discount: gamma. 1 where the continuation has learned to discount (``continue_target_scale``), as in the
            author's code.
        lmbda: 0 looks one step ahead, 1 to the end.
        value_stats: ``(offset, scale)``: values are ``value * scale + offset``, for a critic trained on normalised
            returns. From before these returns.
        rate: see :func:`~rlloss.statistics.return_range_update`; 0 leaves the range as it is.
        quantiles: see :func:`~rlloss.statistics.return_range_update`.
        minimum: see :func:`~rlloss.statistics.return_range_scale`.
        group: see :func:`~rlloss.statistics.return_range_update`.

    Returns:
        ``(targets, range_state)``: targets of [..., T - 1], all but the last step.

    Raises:
        TypeError: if a dtype is wrong.
        ValueError: if the three differ in shape or have fewer than 2 steps, or a knob is out of range.

    Example:
        >>> reward, ones = torch.tensor([9.0, 1.0, 2.0]), torch.ones(3)
        >>> state = ReturnRange(torch.tensor(0.0), torch.tensor(0.0))
        >>> targets, state = dreamer_v3_returns(reward, ones, 0 * ones, state, discount=0.5, lmbda=1.0)
        >>> targets.returns, targets.weight
        (tensor([2., 2.]), tensor([1.0000, 0.5000]))
    """
    function = "dreamer_v3_returns"
    reward, value = checks.real(function, "reward", reward).detach(), checks.real(function, "value", value).detach()
    if reward.ndim == 0 or reward.shape[-1] < 2:
        guess = "A trailing dimension of 1? Pass x.squeeze(-1)." if reward.ndim > 1 else ""
        raise ValueError(checks.text(function, "reward", "of shape [..., T >= 2]", checks.describe(reward), guess))
    continuation = checks.tensor(function, "continuation", continuation).detach()
    checks.same_shape(function, "continuation", continuation, "reward", reward.shape, UNEQUAL_STEPS)
    checks.same_shape(function, "value", value, "reward", reward.shape, UNEQUAL_STEPS)
    value = _denormalize(function, value, value_stats)
    returns = lambda_return(reward, value, continuation, discount=discount, lmbda=lmbda)
    range_state = return_range_update(range_state, returns, rate=rate, quantiles=quantiles, group=group)
    advantage = (returns - value[..., :-1]) / return_range_scale(range_state, minimum=minimum)
    goes_on = torch.cumprod(continuation[..., :-1].to(returns.dtype), -1)
    steps = torch.arange(goes_on.shape[-1], dtype=returns.dtype, device=returns.device)
    weight = goes_on * checks.scalar_like(returns, discount) ** steps
    return BehaviourTargets(returns, advantage, weight), range_state


def dreamer_v3_actor_terms(
    policy: Policy,
    action: Any,
    advantage: Tensor,
    weight: Tensor,
    *,
    entropy: Scalar = 3e-4,
    estimator: str = "score",
    advantage_stats: tuple[Scalar, Scalar] | None = None,
) -> Tensor:
    r"""Unreduced loss of the actor.

    .. math:: -w \, (\log \pi(\mathrm{sg}(a) | s) \, A + \eta \, \mathrm{H}[\pi(s)]) \quad \text{or} \quad
              -w \, (A + \eta \, \mathrm{H}[\pi(s)])

    The first, by the score of the actions, serves actions of every kind; the second is for advantages that are
    themselves differentiable by the (continuous) actions, through the model. Log-probabilities and entropies of several
    actions add up.

    Source: Hafner et al. 2023 (arXiv:2301.04104), eq. 11; danijar/dreamerv3@e3f0224 dreamerv3/agent.py ``imag_loss``.
    Pathwise: Hafner et al. 2019 (arXiv:1912.01603), eq. 7.

    Args:
        policy: distributions, leading dimensions [..., T - 1]; see :func:`~rlloss.policy.policy_log_prob`.
        action: what was sampled from it, a constant; not read by the pathwise estimator.
        advantage: [..., T - 1], of :func:`dreamer_v3_returns`. Taken as it comes: what it depends on is differentiated.
        weight: [..., T - 1], likewise. Where it is 0, NaN and infinite entries of the others count as finite ones.
        entropy: eta.
        estimator: "score" or "pathwise". The advantage of :func:`dreamer_v3_returns` is a constant: by the path it
            trains nothing, and only the entropy is left. Pass :func:`~rlloss.returns.lambda_return` of the rollout.
        advantage_stats: ``(offset, scale)``: the advantage enters as ``(advantage - offset) / scale``.

    Returns:
        [..., T - 1].

    Raises:
        KeyError: if ``policy`` and ``action`` have different keys.
        TypeError: if a dtype is wrong.
        ValueError: if shapes do not fit, the estimator is unknown, or a pathwise policy has choices in it.

    Example:
        >>> policy, advantage = NormalPolicy(torch.zeros(2, 1), torch.ones(2, 1)), torch.tensor([1.0, -1.0])
        >>> dreamer_v3_actor_terms(policy, torch.zeros(2, 1), advantage, torch.ones(2), entropy=0.0)
        tensor([ 0.9189, -0.9189])

        By the path, where the reward is the action:

        >>> def loss(mean):
        ...     reward = torch.cat([torch.zeros(1), mean[0]])
        ...     returns = lambda_return(reward, torch.zeros(2), torch.ones(2), discount=0.99)
        ...     policy = NormalPolicy(mean, torch.ones(1, 1))
        ...     return dreamer_v3_actor_terms(policy, None, returns, torch.ones(1), estimator="pathwise").sum()
        >>> torch.func.grad(loss)(torch.zeros(1, 1))
        tensor([[-1.]])
    """
    knobs = _Actor("dreamer_v3_actor_terms", entropy, estimator, advantage_stats)
    return knobs.parts(policy, action, advantage, weight)["terms"]


def dreamer_v3_actor_loss(
    params: Params,
    batch: Batch,
    *,
    actor: ApplyFn,
    entropy: Scalar = 3e-4,
    estimator: str = "score",
    advantage_stats: tuple[Scalar, Scalar] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""Loss of the actor on imagined rollouts: mean of :func:`dreamer_v3_actor_terms`.

    .. math:: L = -\mathrm{mean}_{b, t < T - 1}\left[w_{bt} \, (\log \pi(\mathrm{sg}(a_{bt}) | s_{bt}) \, A_{bt} +
              \eta \, \mathrm{H}[\pi(s_{bt})])\right]

    Source: as :func:`dreamer_v3_actor_terms`.

    Args:
        params: of the actor, differentiated.
        batch: "features": pytree [..., T, *], what the actor sees; "action": pytree [..., T, *], for the score;
            "advantage", "weight": [..., T - 1]. The last step, which has no return, is cut off before the actor runs.
            Detach features that should get no gradient.
        actor: ``(params, features) -> policy``, a distribution or a mapping of them (:mod:`rlloss.policy`).
        entropy: see :func:`dreamer_v3_actor_terms`.
        estimator: see :func:`dreamer_v3_actor_terms`; with "pathwise" the advantage is made of
            :func:`~rlloss.returns.lambda_return`, for that of :func:`dreamer_v3_returns` would train the entropy alone.
        advantage_stats: see :func:`dreamer_v3_actor_terms`.

    Returns:
        ``(loss, aux)``: loss []; aux: "terms", "log_prob" and "entropy", detached, [..., T - 1].

    Raises:
        KeyError: if an entry is missing, or ``policy`` and ``action`` have different keys.
        TypeError, ValueError: as :func:`dreamer_v3_actor_terms`.

    Example:
        >>> def actor(params, features):
        ...     return NormalPolicy(features @ params, torch.ones(2, 3, 1))
        >>> batch = {"features": torch.ones(2, 4, 3), "action": torch.zeros(2, 4, 1)}
        >>> batch |= {"advantage": torch.ones(2, 3), "weight": torch.ones(2, 3)}
        >>> loss, aux = dreamer_v3_actor_loss(torch.zeros(3, 1), batch, actor=actor)
        >>> loss, aux["entropy"].shape
        (tensor(0.9185), torch.Size([2, 3]))
    """
    function = "dreamer_v3_actor_loss"
    weight, advantage = _weight_of(function, batch), checks.take(function, "batch", batch, "advantage")
    policy = actor(params, _without_last(function, "features", batch, weight))
    action = _without_last(function, "action", batch, weight) if estimator == "score" else None
    parts = _Actor(function, entropy, estimator, advantage_stats).parts(policy, action, advantage, weight)
    return reduced(parts["terms"], "mean"), tree_map(torch.detach, parts)


def dreamer_v3_value_terms(
    prediction: Tensor,
    slow_prediction: Tensor | None,
    returns: Tensor,
    weight: Tensor,
    *,
    slow_weight: Scalar = 1.0,
    value_loss: str = "two_hot",
    bins: Tensor | None = None,
    value_stats: tuple[Scalar, Scalar] | None = None,
) -> Tensor:
    r"""Unreduced loss of a critic, with a slow copy of it as regulariser.

    .. math:: w \, (\ell(\hat v, R) + \rho \, \ell(\hat v, \mathrm{sg}(v_{slow})))

    where the loss of a prediction is its two-hot cross-entropy, or the squared difference of symlogs.

    Source: Hafner et al. 2023 (arXiv:2301.04104), eq. 10; danijar/dreamerv3@e3f0224 dreamerv3/agent.py ``imag_loss``
    and ``repl_loss``; torchrl 0.14.1 ``DreamerV3ValueLoss`` for the squared form.

    Args:
        prediction: logits [..., T - 1, num_bins], or the value itself, [..., T - 1] (also [..., T - 1, 1]), for
            "symlog_mse".
        slow_prediction: the same of the slow critic, a constant. May be None where ``slow_weight`` is the number 0.
        returns: [..., T - 1], of :func:`dreamer_v3_returns`. Taken as they come: what they depend on is differentiated.
        weight: [..., T - 1], likewise. Where it is 0, NaN and infinite entries of the others count as 0.
        slow_weight: rho.
        value_loss: "two_hot" or "symlog_mse".
        bins: [num_bins], ascending; None: :func:`~rlloss.two_hot.symexp_bins`, as many as there are logits.
        value_stats: ``(offset, scale)``: the returns enter as ``(returns - offset) / scale``.

    Returns:
        [..., T - 1].

    Raises:
        TypeError: if a dtype is wrong, or ``slow_prediction`` is missing.
        ValueError: if shapes do not fit or an option is unknown.

    Example:
        >>> logits = torch.zeros(3, 255)
        >>> dreamer_v3_value_terms(logits, logits, torch.tensor([0.0, 1.0, 9.0]), torch.tensor([1.0, 0.5, 0.0]))
        tensor([11.0825,  5.5413,  0.0000])
    """
    knobs = _Critic("dreamer_v3_value_terms", slow_weight, value_loss, bins, value_stats)
    return knobs.terms(prediction, slow_prediction, returns, weight)


def dreamer_v3_value_loss(
    params: Params,
    slow_params: Params | None,
    batch: Batch,
    *,
    critic: ApplyFn,
    slow_weight: Scalar = 1.0,
    value_loss: str = "two_hot",
    bins: Tensor | None = None,
    value_stats: tuple[Scalar, Scalar] | None = None,
    reduction: str = "mean",
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""Loss of the critic on imagined rollouts: mean of :func:`dreamer_v3_value_terms`.

    .. math:: L = \mathrm{mean}_{b, t < T - 1}\left[w_{bt} \, (\ell(v(s_{bt}), R_{bt}) + \rho \,
              \ell(v(s_{bt}), \mathrm{sg}(v_{slow}(s_{bt}))))\right]

    Source: as :func:`dreamer_v3_value_terms`.

    Args:
        params: of the critic, differentiated.
        slow_params: of its slow copy, constants. May be None where ``slow_weight`` is the number 0.
        batch: "features": pytree [..., T, *]; "returns" and "weight": [..., T - 1]. The last step, which has no return,
            is cut off before the critic runs. Detach features that should get no gradient.
        critic: ``(params, features) -> prediction``, as :func:`dreamer_v3_value_terms` reads it.
        slow_weight: see :func:`dreamer_v3_value_terms`.
        value_loss: see :func:`dreamer_v3_value_terms`.
        bins: see :func:`dreamer_v3_value_terms`.
        value_stats: see :func:`dreamer_v3_value_terms`.
        reduction: "mean", "sum" or "none".

    Returns:
        ``(loss, aux)``: loss [], or [..., T - 1] with "none"; aux: "terms" and "value" (what the critic predicts),
        detached, [..., T - 1].

    Raises:
        KeyError: if an entry is missing.
        TypeError, ValueError: as :func:`dreamer_v3_value_terms`; and if ``slow_params`` are of another structure.

    Example:
        >>> def critic(params, features):
        ...     return features @ params
        >>> batch = {"features": torch.ones(2, 4, 3), "returns": torch.ones(2, 3), "weight": torch.ones(2, 3)}
        >>> params = torch.zeros(3, 255)
        >>> loss, aux = dreamer_v3_value_loss(params, params, batch, critic=critic)
        >>> loss, aux["value"].shape
        (tensor(11.0825), torch.Size([2, 3]))
    """
    function = "dreamer_v3_value_loss"
    weight, returns = _weight_of(function, batch), checks.take(function, "batch", batch, "returns")
    knobs = _Critic(function, slow_weight, value_loss, bins, value_stats)
    return knobs.loss(critic, params, slow_params, batch, returns, weight, reduction)


def dreamer_v3_replay_value_loss(
    params: Params,
    slow_params: Params | None,
    batch: Batch,
    *,
    critic: ApplyFn,
    discount: Scalar = 332 / 333,
    lmbda: Scalar = 0.95,
    slow_weight: Scalar = 1.0,
    value_loss: str = "two_hot",
    bins: Tensor | None = None,
    value_stats: tuple[Scalar, Scalar] | None = None,
    reduction: str = "mean",
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""Loss of the critic on replayed sequences, which bootstraps from imagined returns.

    .. math:: L = \mathrm{mean}_{b, t < T - 1}\left[(1 - \mathrm{last}_{bt}) \, (\ell(v(s_{bt}), R_{bt}) + \rho \,
              \ell(v(s_{bt}), \mathrm{sg}(v_{slow}(s_{bt}))))\right]

    with the :func:`~rlloss.returns.lambda_return` of the replayed rewards. In the author's objective it weighs 0.3, and
    its gradient passes through the features into the world model.

    Source: Hafner et al. 2023 (arXiv:2301.04104), section "Critic learning"; danijar/dreamerv3@e3f0224
    dreamerv3/agent.py ``repl_loss``.

    Args:
        params: of the critic, differentiated.
        slow_params: of its slow copy, constants. May be None where ``slow_weight`` is the number 0.
        batch: "features": pytree [..., T, *]; "reward": [..., T]; "terminated": bool [..., T]; "is_last": bool
            [..., T], steps after which another episode follows: they are not trained on; "bootstrap": [..., T], what a
            state is worth: the first return imagined from it. Rewards and bootstrap are constants.
        critic: ``(params, features) -> prediction``, as :func:`dreamer_v3_value_terms` reads it.
        discount: gamma.
        lmbda: see :func:`~rlloss.returns.lambda_return`.
        slow_weight: see :func:`dreamer_v3_value_terms`.
        value_loss: see :func:`dreamer_v3_value_terms`.
        bins: see :func:`dreamer_v3_value_terms`.
        value_stats: see :func:`dreamer_v3_value_terms`.
        reduction: "mean", "sum" or "none".

    Returns:
        ``(loss, aux)``: loss [], or [..., T - 1] with "none"; aux: "terms", "value" and "returns", detached,
        [..., T - 1].

    Raises:
        KeyError: if an entry is missing.
        TypeError, ValueError: as :func:`dreamer_v3_value_loss`; also for fewer than 2 steps.

    Example:
        >>> def critic(params, features):
        ...     return features @ params
        >>> false = torch.zeros(2, 4, dtype=torch.bool)
        >>> batch = {"features": torch.ones(2, 4, 3), "terminated": false, "is_last": false}
        >>> batch |= {"reward": torch.ones(2, 4), "bootstrap": torch.ones(2, 4)}
        >>> loss, aux = dreamer_v3_replay_value_loss(torch.zeros(3, 255), torch.zeros(3, 255), batch, critic=critic)
        >>> loss, aux["returns"][0]
        (tensor(11.0825), tensor([3.8357, 2.9413, 1.9970]))
    """
    function = "dreamer_v3_replay_value_loss"
    steps = {name: checks.take(function, "batch", batch, name) for name in ("reward", "bootstrap")}
    steps = {name: checks.real(function, name, x).detach() for name, x in steps.items()}
    flags = {name: checks.take(function, "batch", batch, name) for name in ("terminated", "is_last")}
    flags = {name: checks.boolean(function, name, x) for name, x in flags.items()}
    if steps["reward"].ndim == 0 or steps["reward"].shape[-1] < 2:
        got = checks.describe(steps["reward"])
        raise ValueError(checks.text(function, "reward", "of shape [..., T >= 2]", got))
    for name, x in {**steps, **flags}.items():
        checks.same_shape(function, name, x, "reward", steps["reward"].shape, UNEQUAL_STEPS)
    goes_on, last = ~flags["terminated"], flags["is_last"]
    returns = lambda_return(steps["reward"], steps["bootstrap"], goes_on, last, discount=discount, lmbda=lmbda)
    knobs = _Critic(function, slow_weight, value_loss, bins, value_stats)
    weight = (~last[..., :-1]).to(returns.dtype)
    loss, aux = knobs.loss(critic, params, slow_params, batch, returns, weight, reduction)
    return loss, {**aux, "returns": returns.detach()}


class DreamerV3Agent(NamedTuple):
    """The networks of an agent as apply functions; a state is any pytree of tensors [..., *]."""

    world_model: ApplyFn  # (params["world_model"], batch) -> what the model loss reads, and "state" [B, T, *]
    dynamics: Callable[..., Any]  # (params["world_model"], state, action, noise) -> state
    reward: ApplyFn  # (params["world_model"], state) -> as the world model's "reward"
    continuation: ApplyFn  # (params["world_model"], state) -> logits [...] or [..., 1]
    actor: ApplyFn  # (params["actor"], state) -> a distribution or a mapping of them
    critic: ApplyFn  # (params["critic"], state) -> logits [..., num_bins]
    #: ``(params, start, noise, horizon) -> Imagination``, what :func:`imagine` makes of ``dynamics`` and ``actor`` by
    #: another way, such as one operation of a compiled graph; of all params, start and noise as ``imagine`` takes them,
    #: without a gradient. Who replaces one of those two replaces this as well, or sets it to None.
    rollout: Callable[..., Imagination] | None = None


class DreamerV3State(NamedTuple):
    """What the objective needs besides parameters, and does not differentiate."""

    slow_critic: Params  # like params["critic"]: a slow copy, moved after each step of the optimiser
    return_range: ReturnRange  # of the imagined returns


def dreamer_v3_loss(
    params: Mapping[str, Params],
    state: DreamerV3State,
    batch: Batch,
    noise: Mapping[str, Any],
    *,
    agent: DreamerV3Agent,
    horizon: int = 15,
    starts: int | None = None,
    discount: Scalar = 1.0,
    replay_discount: Scalar = 332 / 333,
    lmbda: Scalar = 0.95,
    entropy: Scalar = 3e-4,
    slow_weight: Scalar = 1.0,
    lambda_actor: Scalar = 1.0,
    lambda_value: Scalar = 1.0,
    lambda_replay_value: Scalar = 0.3,
    **knobs: Unpack[ModelKnobs],
) -> tuple[Tensor, dict[str, Any], DreamerV3State]:
    r"""The whole objective of DreamerV3: one scalar, for one optimiser.

    .. math:: L = L_{model} + \lambda_{actor} L_{actor} + \lambda_{value} L_{value} + \lambda_{replay} L_{replay}

    Each state the world model infers starts a rollout, of which actor and critic learn. Rollouts are imagined with
    detached parameters, from detached states: the actor's loss trains the actor, the critic's the critic, and only the
    model's and the replay loss reach the world model.

    The author's other switches are compositions. ``reward_grad=False``: a world model whose reward head reads detached
    features. The others are for the losses it is made of, called one by one and added up. ``repval_grad=False``:
    :func:`dreamer_v3_replay_value_loss` of detached features; ``ac_grads=True``: :func:`dreamer_v3_actor_loss` and
    :func:`dreamer_v3_value_loss` of features whose first step, the start, is not detached; ``slowtar=True``: the slow
    critic's value in :func:`dreamer_v3_returns`; ``valnorm``, ``advnorm``: ``value_stats`` and ``advantage_stats``, of
    :func:`~rlloss.statistics.mean_std_read`. Several processes share a range by the ``group`` of the returns.

    Source: Hafner et al. 2023 (arXiv:2301.04104); danijar/dreamerv3@e3f0224 dreamerv3/agent.py ``Agent.loss``, with the
    scales and switches of dreamerv3/configs.yaml.

    Args:
        params: {"world_model", "actor", "critic"}, differentiated.
        state: slow critic, which may be None where ``slow_weight`` is the number 0, and range of the returns.
        batch: as :func:`dreamer_v3_model_loss` reads it, without "mask"; with "terminated" and "is_last": bool [B, T].
        noise: of the rollouts, as :func:`imagine` reads it, with B * ``starts`` rows. A rollout's row is
            ``b * starts + t``.
        agent: the networks, and perhaps a way of its own to make rollouts.
        horizon: of the rollouts.
        starts: number of last states of each sequence that start a rollout, at least 2; None: all T.
        discount: in imagination; 1 where the continuation has learned to discount.
        replay_discount: in the replayed sequences.
        lmbda: see :func:`~rlloss.returns.lambda_return`.
        entropy: see :func:`dreamer_v3_actor_terms`.
        slow_weight: see :func:`dreamer_v3_value_terms`.
        lambda_actor: weight of the actor's loss.
        lambda_value: weight of the critic's loss in imagination.
        lambda_replay_value: weight of the critic's loss on the replayed sequences.
        **knobs: of the world model, see :class:`ModelKnobs`; those left out are the author's
            (``DREAMER_V3_OFFICIAL``). ``lambda_continue`` is above 0: rollouts go on as the continuation says.

    Returns:
        ``(loss, aux, state)``: loss []; aux: "losses" by name, unweighted scalars, "outputs" of the world model,
        "targets" and "entropy" of the rollouts, detached; the state with the new range.

    Raises:
        KeyError: if an entry of ``params``, ``batch`` or the outputs is missing.
        TypeError, ValueError: as the losses it is made of; and if ``state`` is no :class:`DreamerV3State`, its slow
            critic not like the critic, ``starts`` not in [2, T], ``lambda_continue`` 0, or there is a mask.

    Example:
        >>> def world_model(params, batch):
        ...     state = batch["observation"] * params
        ...     logits = state[..., None, :]
        ...     return {"prior_logits": logits, "posterior_logits": logits, "reconstruction": state, "state": state,
        ...             "reward": state, "continue_logits": state[..., 0]}
        >>> agent = DreamerV3Agent(
        ...     world_model=world_model, dynamics=lambda params, state, action, noise: state * params + action,
        ...     reward=lambda params, state: state * params, continuation=lambda params, state: state[..., :1] * params,
        ...     actor=lambda params, state: NormalPolicy(state * params, torch.ones_like(state)),
        ...     critic=lambda params, state: state * params)
        >>> params = {"world_model": torch.ones(()), "actor": torch.ones(()), "critic": torch.ones(())}
        >>> false, zeros = torch.zeros(2, 3, dtype=torch.bool), torch.zeros(2, 3)
        >>> batch = {"observation": torch.ones(2, 3, 5), "reward": zeros, "terminated": false, "is_last": false}
        >>> state = DreamerV3State(params["critic"], ReturnRange(torch.tensor(0.0), torch.tensor(0.0)))
        >>> noise = {"policy": torch.zeros(6, 4, 5)}
        >>> loss, aux, state = dreamer_v3_loss(params, state, batch, noise, agent=agent, horizon=3, num_reward_bins=5)
        >>> sorted(aux["losses"])
        ['actor', 'continue', 'dynamic', 'reco', 'replay_value', 'representation', 'reward', 'value']
    """
    function = "dreamer_v3_loss"
    if checks.has(batch, "mask"):
        raise ValueError(checks.text(function, "batch", "without a mask", "one", "Each step starts a rollout."))
    weights = {"lambda_actor": lambda_actor, "lambda_value": lambda_value, "lambda_replay_value": lambda_replay_value}
    for name, weight in {**weights, "slow_weight": slow_weight}.items():
        checks.knob(function, name, weight, 0.0)
    live = {name: checks.take(function, "params", params, name) for name in ("world_model", "actor", "critic")}
    if not isinstance(state, DreamerV3State):
        raise TypeError(checks.text(function, "state", "a DreamerV3State", checks.describe(state)))
    checks.state(function, "state.return_range", state.return_range, ReturnRange)
    if _wanted(slow_weight):
        _check_slow(function, "state.slow_critic", state.slow_critic, "params['critic']", live["critic"])
    settings: ModelKnobs = {**DREAMER_V3_OFFICIAL, **knobs}
    if not _wanted(model_knobs(settings)["lambda_continue"]):
        guess = "Rollouts go on as the continuation says, and nothing else trains it."
        raise ValueError(checks.text(function, "lambda_continue", "above 0", f"{settings['lambda_continue']!r}", guess))
    replayed = _last_steps(batch, starts)
    model_loss, model_aux = dreamer_v3_model_loss(live["world_model"], batch, world_model=agent.world_model, **settings)
    rows, steps = replayed["reward"].shape
    states = _plain(checks.take(function, "world_model(params, batch)", model_aux["outputs"], "state"))
    _check_states(function, states, batch["reward"].shape[:2])
    replayed = {**replayed, "features": tree_map(lambda x: x[:, -steps:], states)}

    rollout = _follow(live, replayed["features"], noise, agent, horizon)
    logits = agent.critic(live["critic"], rollout.states)
    slow = agent.critic(state.slow_critic, rollout.states)[:, :-1] if _wanted(slow_weight) else None
    reward, continuation, value = _expectations(live["world_model"], logits, rollout.states, agent, settings)
    targets, new_range = dreamer_v3_returns(
        reward, continuation, value, state.return_range, discount=discount, lmbda=lmbda
    )

    imagined = {"features": rollout.states, "action": rollout.actions, **targets._asdict()}
    actor_loss, actor_aux = dreamer_v3_actor_loss(live["actor"], imagined, actor=agent.actor, entropy=entropy)
    value_loss = reduced(
        dreamer_v3_value_terms(logits[:, :-1], slow, targets.returns, targets.weight, slow_weight=slow_weight),
        "mean",
    )
    replay_loss, _ = dreamer_v3_replay_value_loss(
        live["critic"],
        state.slow_critic,
        {**replayed, "bootstrap": targets.returns[:, 0].reshape(rows, steps)},
        critic=agent.critic,
        discount=replay_discount,
        lmbda=lmbda,
        slow_weight=slow_weight,
    )
    loss = model_loss + lambda_actor * actor_loss + lambda_value * value_loss + lambda_replay_value * replay_loss
    losses = {**model_aux["losses"], "actor": actor_loss, "value": value_loss, "replay_value": replay_loss}
    aux = {"losses": losses, "outputs": model_aux["outputs"], "targets": targets, "entropy": actor_aux["entropy"]}
    return loss, tree_map(torch.detach, aux), DreamerV3State(state.slow_critic, new_range)


UNEQUAL_STEPS = "All have one entry for each of the T steps."


def noise_of(noise: Mapping[str, Any], name: str, steps: int, time_dim: int) -> Any:
    """``noise[name]``, which has so many steps, or None where there is none."""
    if not hasattr(noise, "keys"):
        wanted = 'a mapping with "policy" and "dynamics"'
        raise TypeError(checks.text("imagine", "noise", wanted, checks.describe(noise)))
    if not checks.has(noise, name) or noise[name] is None:
        return None
    for x in tree_leaves(noise[name]):
        if x.ndim <= time_dim or x.shape[time_dim] != steps:
            wanted = f"of {steps} steps in dimension {time_dim}"
            guess = "The last state gets an action too: horizon + 1." if name == "policy" else ""
            raise ValueError(checks.text("imagine", f"noise[{name!r}]", wanted, checks.describe(x), guess))
    return noise[name]


def _noise_of_steps(noise: Mapping[str, Any], name: str, steps: int, time_dim: int) -> list[Any]:
    """Noise of each step, None where there is none."""
    drawn = noise_of(noise, name, steps, time_dim)
    if drawn is None:
        return [None] * steps
    return [tree_map(lambda x, step=step: x.select(time_dim, step), drawn) for step in range(steps)]


def _check_state(start: Any, state: Any) -> None:
    if tree_structure(start) != tree_structure(state):
        wanted, got = (f"{type(x).__name__} with entries {list(_shapes(x))}" for x in (start, state))
        raise ValueError(checks.text("imagine", "the state of dynamics", f"{wanted} like start", got))
    for before, after in zip(tree_leaves(start), tree_leaves(state), strict=True):
        checks.same_shape("imagine", "the state of dynamics", after, "start", before.shape)


def _stack(trees: list[Any], dim: int) -> Any:
    return tree_map(lambda *leaves: torch.stack(leaves, dim), *trees)


def _denormalize(function: str, value: Tensor, stats: tuple[Scalar, Scalar] | None) -> Tensor:
    offset, scale = _stats(function, "value_stats", value, stats)
    return value if stats is None else value * scale + offset


def _normalize(function: str, argument: str, x: Tensor, stats: tuple[Scalar, Scalar] | None) -> Tensor:
    offset, scale = _stats(function, argument, x, stats)
    return x if stats is None else (x - offset) / scale


def _stats(function: str, argument: str, x: Tensor, stats: tuple[Scalar, Scalar] | None) -> tuple[Tensor, Tensor]:
    offset, scale = (0.0, 1.0) if stats is None else stats
    checks.knob(function, f"{argument}[0]", offset, -math.inf)
    checks.knob(function, f"{argument}[1]", scale, 0.0)
    return checks.scalar_like(x, offset), checks.scalar_like(x, scale)


def _weight_of(function: str, batch: Batch) -> Tensor:
    weight = checks.floating(function, "weight", checks.take(function, "batch", batch, "weight"))
    checks.rank_at_least(function, "weight", weight, ("T - 1",))
    return weight


def _without_last(function: str, name: str, batch: Batch, weight: Tensor) -> Any:
    """The entry for the steps that have a weight, without what is not finite where the weight is 0."""
    dim, steps = weight.ndim - 1, weight.shape[-1]
    wanted = (*weight.shape[:-1], steps + 1)

    def cut(x: Tensor) -> Tensor:
        if tuple(x.shape[: dim + 1]) != wanted:
            shape = f"of shape [{', '.join(map(str, [*wanted, '...']))}], a step more than the weight"
            raise ValueError(checks.text(function, name, shape, checks.describe(x), checks.time_first(x.shape, wanted)))
        return _quiet(x.narrow(dim, 0, steps), weight)

    return tree_map(cut, _plain(checks.take(function, "batch", batch, name)))


def _quiet(x: Tensor, weight: Tensor, fill: float = 0.0) -> Tensor:
    """``x`` without the NaN and infinite entries of steps that weigh nothing."""
    if not x.is_floating_point():
        return x
    return torch.where(checks.align(weight == 0, x) & ~torch.isfinite(x), fill, x)


class _Actor(NamedTuple):
    """The knobs of the actor's loss, and who was asked."""

    function: str
    entropy: Scalar
    estimator: str
    advantage_stats: tuple[Scalar, Scalar] | None

    def parts(self, policy: Policy, action: Any, advantage: Tensor, weight: Tensor) -> dict[str, Tensor]:
        """Terms, and what they are made of."""
        checks.option(self.function, "estimator", self.estimator, ESTIMATORS)
        checks.knob(self.function, "entropy", self.entropy, -math.inf)
        weight = checks.floating(self.function, "weight", weight)
        advantage = checks.floating(self.function, "advantage", advantage)
        checks.same_shape(self.function, "advantage", advantage, "weight", weight.shape)
        gain = _normalize(self.function, "advantage_stats", _quiet(advantage, weight), self.advantage_stats)
        policy, action = _plain(policy), _plain(action)
        self._check(policy, weight)
        # Deviations must stay above 0; a 1 is as good as any other number for means and logits.
        policy = tree_map(lambda x: _quiet(x, weight, 1.0), policy)
        parts = {"entropy": policy_entropy(policy)}
        if self.estimator == "score":
            self._check_keys(policy, action)
            action = tree_map(lambda x: _quiet(x.detach(), weight), action)
            parts = {**parts, "log_prob": policy_log_prob(policy, action)}
            gain = parts["log_prob"] * gain
        return {**parts, "terms": -weight * (gain + self.entropy * parts["entropy"])}

    def _check(self, policy: Any, weight: Tensor) -> None:
        """Each distribution fits the weight, and has samples that can be differentiated if need be."""
        parts = {key: policy[key] for key in policy.keys()} if hasattr(policy, "keys") else {"": policy}
        for key, part in parts.items():
            argument = f"the policy of {key!r}" if key else "the policy"
            if not isinstance(part, (NormalPolicy, CategoricalPolicy, EvaluatedPolicy)):
                wanted = "a NormalPolicy, a CategoricalPolicy or a mapping of them"
                raise TypeError(checks.text(self.function, argument, wanted, checks.describe(part)))
            if isinstance(part, CategoricalPolicy) and self.estimator == "pathwise":
                guess = "A choice has no derivative: use the score estimator."
                raise ValueError(checks.text(self.function, argument, "a NormalPolicy", "a CategoricalPolicy", guess))
            if isinstance(part, EvaluatedPolicy):
                for name, x in part._asdict().items():
                    x = checks.floating(self.function, f"{name} of {argument}", x)
                    checks.same_shape(self.function, f"{name} of {argument}", x, "the weight", weight.shape)
                continue
            names = ["action_dim"] if isinstance(part, NormalPolicy) else ["groups", "classes"]
            if part[0].ndim != weight.ndim + len(names) or part[0].shape[: weight.ndim] != weight.shape:
                wanted = f"of shape [{', '.join(map(str, [*weight.shape, *names]))}] like the weight"
                raise ValueError(checks.text(self.function, argument, wanted, checks.describe(part[0])))

    def _check_keys(self, policy: Any, action: Any) -> None:
        """One distribution for each action."""
        if isinstance(policy, dict) and isinstance(action, dict) and sorted(policy) != sorted(action):
            wanted = f"a mapping with {sorted(action)} like action"
            raise checks.MissingKeyError(checks.text(self.function, "the policy", wanted, f"keys {sorted(policy)}"))


class _Critic(NamedTuple):
    """The knobs of the critic's losses, and who was asked."""

    function: str
    slow_weight: Scalar
    value_loss: str
    bins: Tensor | None
    value_stats: tuple[Scalar, Scalar] | None

    def loss(
        self,
        critic: ApplyFn,
        params: Params,
        slow_params: Params,
        batch: Batch,
        returns: Tensor,
        weight: Tensor,
        reduction: str,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The terms, reduced, and what they are made of."""
        checks.option(self.function, "reduction", reduction, REDUCTIONS)
        features = _without_last(self.function, "features", batch, weight)
        if _wanted(self.slow_weight):
            _check_slow(self.function, "slow_params", slow_params, "params", params)
        prediction = critic(params, features)
        slow = critic(tree_map(torch.detach, slow_params), features) if _wanted(self.slow_weight) else None
        terms = self.terms(prediction, slow, returns, weight)
        value = self._value("the prediction", prediction, weight)
        return reduced(terms, reduction), {"terms": terms.detach(), "value": value.detach()}

    def terms(self, prediction: Tensor, slow_prediction: Tensor | None, returns: Tensor, weight: Tensor) -> Tensor:
        checks.option(self.function, "value_loss", self.value_loss, VALUE_LOSSES)
        checks.knob(self.function, "slow_weight", self.slow_weight, 0.0)
        weight = checks.floating(self.function, "weight", weight)
        returns = checks.floating(self.function, "returns", returns)
        checks.same_shape(self.function, "returns", returns, "weight", weight.shape)
        returns = _normalize(self.function, "value_stats", _quiet(returns, weight), self.value_stats)
        prediction = self._prediction("the prediction", prediction, weight)
        terms = self._nats(prediction, returns)
        if _wanted(self.slow_weight):
            slow = self._value("the slow prediction", slow_prediction, weight).detach()
            terms = terms + self.slow_weight * self._nats(prediction, slow)
        return weight * terms

    def _prediction(self, argument: str, x: Any, weight: Tensor) -> Tensor:
        """Logits [..., T - 1, num_bins], or the value [..., T - 1]."""
        x = checks.floating(self.function, argument, x)
        if self.value_loss == "symlog_mse":
            x = x.squeeze(-1) if tuple(x.shape) == (*weight.shape, 1) else x
            guess = "Logits go with value_loss='two_hot'."
            checks.same_shape(self.function, argument, x, "the weight", weight.shape, guess)
        elif x.ndim != weight.ndim + 1 or x.shape[:-1] != weight.shape or x.shape[-1] < 2:
            wanted = f"of shape [{', '.join(map(str, weight.shape))}, num_bins >= 2] like the weight"
            guess = "A critic that predicts the value itself goes with value_loss='symlog_mse'."
            raise ValueError(checks.text(self.function, argument, wanted, checks.describe(x), guess))
        return _quiet(x, weight)

    def _value(self, argument: str, prediction: Any, weight: Tensor) -> Tensor:
        prediction = self._prediction(argument, prediction, weight)
        return prediction if self.value_loss == "symlog_mse" else two_hot_decode(prediction, self._bins(prediction))

    def _nats(self, prediction: Tensor, target: Tensor) -> Tensor:
        if self.value_loss == "symlog_mse":
            return (symlog(prediction) - symlog(target)).square()
        bins = self._bins(prediction)
        nats = two_hot_cross_entropy(prediction, target, bins)
        # A two-hot is a constant, but a return can be differentiated by its discount. What is added is 0, and has the
        # derivative of the interpolation between two bins.
        target = target.to(prediction.dtype).clamp(bins[0], bins[-1])
        pair, _ = neighbours(target, bins)
        rise = torch.gather(prediction, -1, pair).diff(dim=-1).squeeze(-1)
        slope = -rise / bins[pair].diff(dim=-1).squeeze(-1)
        return nats + torch.where(torch.isfinite(slope), slope, 0.0) * (target - target.detach())

    def _bins(self, prediction: Tensor) -> Tensor:
        if self.bins is None:
            return bins_for(prediction)
        return self.bins.detach().to(prediction.dtype).contiguous()


def _check_slow(function: str, argument: str, slow_params: Any, name: str, params: Params) -> None:
    """The slow critic has the parameters of the critic."""
    shapes, slow_shapes = _shapes(params), _shapes(slow_params)
    if shapes == slow_shapes:
        return
    # The first entry that differs says more than two long lists.
    names = sorted(x for x in {*shapes, *slow_shapes} if shapes.get(x) != slow_shapes.get(x))
    own, slow = (x.get(names[0], "nothing") for x in (shapes, slow_shapes))
    guess = "Start them as a copy of the parameters, or set slow_weight=0."
    got = f"{slow} where {name} have {own} at {names[0]}"
    raise ValueError(checks.text(function, argument, f"of the structure of {name}", got, guess))


def _shapes(params: Params) -> dict[str, list[int]]:
    """Shape of each parameter by name, in whatever nest and order."""
    leaves, _ = tree_flatten_with_path(params)
    return {keystr(path): list(x.shape) for path, x in leaves if isinstance(x, Tensor)}


def _plain(x: Any) -> Any:
    """``x`` with dicts for its mappings: a TensorDict would hold on to its batch size."""
    return {key: _plain(x[key]) for key in x.keys()} if hasattr(x, "keys") else x


def _last_steps(batch: Batch, starts: int | None) -> dict[str, Tensor]:
    """What the replay loss reads, [B, starts], of the steps that rollouts start from."""
    function = "dreamer_v3_loss"
    entries = {name: checks.take(function, "batch", batch, name) for name in ("reward", "terminated", "is_last")}
    if entries["reward"].ndim < 2:
        got = checks.describe(entries["reward"])
        raise ValueError(checks.text(function, "reward", "of shape [B, T] or [B, T, 1]", got))
    shape = entries["reward"].shape[:2]
    entries = {name: x.squeeze(-1) if tuple(x.shape) == (*shape, 1) else x for name, x in entries.items()}
    for name, x in entries.items():
        checks.same_shape(function, name, x, "the batch", shape)
    wanted = "an int, or None for all T"
    starts = checks.integer(function, "starts", shape[1] if starts is None else starts, 2, shape[1], wanted=wanted)
    return {name: x[:, -starts:] for name, x in entries.items()}


def _check_states(function: str, states: Any, shape: Sequence[int]) -> None:
    for x in tree_leaves(states):
        if not isinstance(x, Tensor) or tuple(x.shape[:2]) != tuple(shape):
            wanted = f"a pytree of tensors [{shape[0]}, {shape[1]}, ...]"
            raise TypeError(checks.text(function, "the state of the world model", wanted, checks.describe(x)))


def _follow(
    live: Mapping[str, Params], states: Any, noise: Mapping[str, Any], agent: DreamerV3Agent, horizon: int
) -> Imagination:
    """Rollouts from all states, [B * T, horizon + 1, *], with no gradient to anything."""
    start, frozen = tree_map(lambda x: x.detach().flatten(0, 1), states), tree_map(torch.detach, live)
    if agent.rollout is not None:
        return Imagination(*(tree_map(torch.detach, x) for x in agent.rollout(frozen, start, noise, horizon)))
    dynamics, policy = behaviour(agent)
    return imagine(frozen, start, noise, dynamics=dynamics, policy=policy, horizon=horizon)


def behaviour(agent: DreamerV3Agent) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Dynamics and policy of an agent, as :func:`imagine` takes them; for params of all networks."""

    def dynamics(params: Params, state: Any, action: Any, noise: Any) -> Any:
        return _plain(agent.dynamics(params["world_model"], state, action, noise))

    def policy(params: Params, state: Any, noise: Any) -> Any:
        return policy_sample(agent.actor(params["actor"], state), noise)

    return dynamics, policy


def _expectations(
    world_model: Params, logits: Tensor, states: Any, agent: DreamerV3Agent, settings: ModelKnobs
) -> tuple[Tensor, Tensor, Tensor]:
    """Reward, probability of going on and value of imagined states."""
    frozen = tree_map(torch.detach, world_model)
    reward, continuation = agent.reward(frozen, states), agent.continuation(frozen, states)
    shape = logits.shape[:-1]
    if model_knobs(settings)["reward_two_hot"]:
        reward = symexp_decode(reward)
    reward, continuation = (x.squeeze(-1) if tuple(x.shape) == (*shape, 1) else x for x in (reward, continuation))
    return reward, torch.sigmoid(continuation), symexp_decode(logits.detach())
