r"""DreamerV3's world-model loss: terms on tensors, and the loss on parameters."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, TypedDict, Unpack

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.utils._pytree import tree_map

from rlloss import checks
from rlloss.categorical import balanced_kl, categorical_kl_terms, unimix
from rlloss.transforms import symlog
from rlloss.two_hot import symexp_bins, two_hot_cross_entropy
from rlloss.types import ApplyFn, Batch, Params, Scalar

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
    k = model_knobs(knobs)
    _check_keys(batch, k)
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
    k = model_knobs(knobs)
    terms = dreamer_v3_model_terms(outputs, batch, **knobs)
    mask = batch["mask"] if checks.has(batch, "mask") else None
    unweighted = {name: _mean(term, mask) for name, term in terms.items()}
    weighted = {name: _weight(name, k) * loss for name, loss in unweighted.items()}
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
    _check_keys(batch, model_knobs(knobs))
    outputs = world_model(params, _silence(batch))
    weighted, unweighted, terms = dreamer_v3_model_losses(outputs, batch, **knobs)
    aux = {"losses": tree_map(torch.detach, unweighted), "terms": tree_map(torch.detach, terms), "outputs": outputs}
    return sum(weighted.values(), start=torch.zeros_like(weighted["reco"])), aux


FUNCTION = "dreamer_v3_model_loss"
WHY_CONTINUE = "lambda_continue > 0 asks for it; set lambda_continue=0 to train without."


class _Steps(NamedTuple):
    """The leading dimensions of a batch, and which steps of it count."""

    shape: tuple[int, ...]
    mask: Tensor | None

    def keep(self, x: Tensor) -> Tensor:
        """``x`` where the mask is True, 0 elsewhere: selected, so that a NaN leaves no trace in the gradient."""
        if self.mask is None:
            return x
        return torch.where(checks.align(self.mask, x), x, 0)

    def flat(self, x: Tensor) -> Tensor:
        """[*steps, -1], also for an empty batch."""
        return x.reshape(*self.shape, math.prod(x.shape[len(self.shape) :]))

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
    posterior, prior = unimix(posterior, k["unimix"]), unimix(prior, k["unimix"])
    return {"kl": balanced_kl(posterior, prior, k["kl_alpha"], k["free_bits"]).mean(-1)}


def _reconstruction_term(outputs: Mapping[str, Any], batch: Batch, steps: _Steps, k: Mapping[str, Any]) -> Tensor:
    observation, reconstruction = batch["observation"], _output(outputs, "reconstruction")
    if isinstance(observation, Tensor):
        return _head_term("observation", observation, reconstruction, steps, k)
    if not hasattr(reconstruction, "keys"):
        wanted = f"a mapping with {sorted(observation.keys())} like observation"
        raise TypeError(checks.text(FUNCTION, "reconstruction", wanted, checks.describe(reconstruction)))
    if sorted(observation.keys()) != sorted(reconstruction.keys()):
        wanted, got = f"a mapping with {sorted(observation.keys())}", f"keys {sorted(reconstruction.keys())}"
        raise KeyError(checks.text(FUNCTION, "reconstruction", wanted, got, "One head for each observation."))
    heads = [_head_term(head, observation[head], reconstruction[head], steps, k) for head in observation.keys()]
    return torch.stack(heads).sum(0)


def _head_term(head: str, target: Tensor, prediction: Tensor, steps: _Steps, k: Mapping[str, Any]) -> Tensor:
    is_image = isinstance(target, Tensor) and target.dtype == torch.uint8
    target = checks.real(FUNCTION, f"observation {head!r}", target).detach()
    prediction = checks.floating(FUNCTION, f"reconstruction of {head!r}", prediction)
    checks.leading_shape(FUNCTION, f"observation {head!r}", target, "the logits", steps.shape)
    checks.same_shape(FUNCTION, f"reconstruction of {head!r}", prediction, "the observation", target.shape)
    target, prediction = steps.keep(target), steps.keep(prediction)
    if is_image:
        target = target.to(prediction.dtype) / 255
    transforms = k["reco_transform"]
    transform = transforms if isinstance(transforms, str) else transforms[head]
    if transform == "auto":
        transform = "none" if is_image else "symlog_target"
    if transform != "none":
        target = symlog(target)
    if transform == "symlog":
        prediction = symlog(prediction)
    error = steps.flat(prediction - target)
    error = error.square() if k["reco_loss"] == "l2" else error.abs()
    return error.mean(-1) if k["global_average"] else error.sum(-1)


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
    bins = symexp_bins(k["num_reward_bins"], dtype=prediction.dtype, device=prediction.device)
    return two_hot_cross_entropy(steps.keep(prediction), reward, bins)


def _continue_term(outputs: Mapping[str, Any], batch: Batch, steps: _Steps, k: Mapping[str, Any]) -> Tensor:
    terminated = checks.boolean(FUNCTION, "terminated", batch["terminated"])
    logits = checks.floating(FUNCTION, "continue_logits", _output(outputs, "continue_logits", WHY_CONTINUE))
    logits = steps.keep(steps.scalar("continue_logits", logits))
    target: Tensor = (~steps.scalar("terminated", terminated)).to(logits.dtype) * k["continue_target_scale"]
    return -(target * logsigmoid(logits) + (1 - target) * logsigmoid(-logits))


def _output(outputs: Mapping[str, Any], key: str, why: str = "") -> Any:
    return checks.take(FUNCTION, "world_model(params, batch)", outputs, key, why)


def _check_keys(batch: Batch, k: Mapping[str, Any]) -> None:
    """What the knobs ask of the batch is there: known before the world model runs."""
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
            got = f"keys {sorted(k['reco_transform'].keys())}"
            raise KeyError(checks.text(FUNCTION, "reco_transform", f"an option or a mapping with {heads}", got))


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


def _mean(term: Tensor, mask: Tensor | None) -> Tensor:
    number = max(term.numel(), 1) if mask is None else mask.sum().clamp_min(1)
    return term.sum() / number


def _weight(name: str, k: Mapping[str, Any]) -> Scalar:
    weight: Scalar = k[f"lambda_{name}"]
    return k["lambda_kl"] * weight if name in ("dynamic", "representation") else weight


def _wanted(weight: Scalar) -> bool:
    return isinstance(weight, Tensor) or weight > 0


def model_knobs(knobs: Mapping[str, Any]) -> Mapping[str, Any]:
    """All knobs, those left out with their defaults; raises where one is unknown or out of range."""
    for name in knobs:
        if name not in DREAMER_V3_DEFAULTS:
            guess = checks.did_you_mean(name, DREAMER_V3_DEFAULTS)
            wanted = f"one of {sorted(DREAMER_V3_DEFAULTS)}"
            raise TypeError(checks.text(FUNCTION, "each knob", wanted, repr(name), guess))
    k = {**DREAMER_V3_DEFAULTS, **knobs}
    for name in ("kl_alpha", "unimix", "continue_target_scale"):
        checks.knob(FUNCTION, name, k[name], 0.0, 1.0)
    for name in [name for name in k if name.startswith("lambda_")] + ["free_bits"]:
        checks.knob(FUNCTION, name, k[name], 0.0)
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
