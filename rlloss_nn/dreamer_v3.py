"""DreamerV3's world-model loss and whole objective as torch modules."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Unpack

import torch
from tensordict import TensorDict, TensorDictBase, is_non_tensor, is_tensor_collection, unravel_key
from tensordict.nn import dispatch
from torch import Tensor, nn
from torch.compiler import is_compiling

from rlloss import checks
from rlloss.dreamer_v3 import (
    DREAMER_V3_DEFAULTS,
    DreamerV3State,
    ModelKnobs,
    dreamer_v3_model_loss,
    dreamer_v3_model_losses,
    model_knobs,
)
from rlloss.types import Params, Scalar
from rlloss_nn.dreamer_v3_actor import DreamerV3ActorLoss
from rlloss_nn.dreamer_v3_value import DreamerV3ValueLoss
from rlloss_nn.functional import functionalize
from rlloss_nn.loss_module import LossModule, NestedKey, by_name, check_network, next_key

Outputs = dict[str, Any]
KNOBS = tuple(DREAMER_V3_DEFAULTS)

# Read without complaint here, but a model that is also to work with torchrl should know.
OLDER_MODEL = (
    "DreamerV3ModelLoss: the world model writes reward logits under {!r}, as older models do. "
    "In torchrl that is deprecated, to be removed in v0.16: write them under {!r}."
)


class DreamerV3ModelLoss(LossModule):
    r"""World-model loss of DreamerV3, over a world model that reads and writes a TensorDict.

    .. math:: L = \sum_i \mathrm{loss\_model}_i

    The function is :func:`rlloss.dreamer_v3_model_loss`; each entry of the result is one of its terms, averaged and
    weighted. ``**rlloss.DREAMER_V3_OFFICIAL`` makes it the author's current code.

    Source: Hafner et al. 2023 (arXiv:2301.04104); names and defaults as torchrl 0.14.1 ``DreamerV3ModelLoss``.

    Args:
        world_model: reads a TensorDict [B, T] and writes, under ``"next"``, "prior_logits", "posterior_logits",
            "reco_pixels", the reward prediction as "reward_logits" (or, as older models do, as "reward"), and
            "continue_pred" where ``lambda_continue`` is not 0. It finds the true reward moved to "true_reward".
        detach_output: whether the returned TensorDict is detached; a loss on replayed values needs it attached.
        **knobs: weights and options of :class:`rlloss.dreamer_v3.ModelKnobs`, also kept as attributes.

    ``loss(td)`` returns ``(losses, outputs)``: scalars ``loss_model_kl`` (or ``loss_model_dynamic`` and
    ``loss_model_representation``), ``loss_model_reco``, ``loss_model_reward`` and, where wanted,
    ``loss_model_continue``, each with its weight; and what the world model returned. The caller's TensorDict stays as
    it is. A call with keywords (``next_pixels=..., next_reward=..., action=...``; see ``in_keys``), whose first two
    dimensions are those of the batch, returns the tuple of losses in the order of ``out_keys``.

    Names, all under ``"next"``, are changed by ``set_keys(reward=..., true_reward=..., prior_logits=...,
    posterior_logits=..., pixels=..., reco_pixels=..., continue_pred=..., done=..., terminated=...,
    reward_logits=...)``; ``pixels`` and ``reco_pixels`` may be lists, paired in order, whose losses are summed.

    Raises:
        TypeError, ValueError: if a knob is unknown or out of range; at the call, if the world model returns no
            TensorDict.
        KeyError: at the call, if an entry is missing, ``continue_pred`` or ``terminated`` and ``done`` included where
            ``lambda_continue`` is not 0.

    Example:
        >>> from tensordict.nn import TensorDictModule as Mod, TensorDictSequential as Seq
        >>> wm = Seq(Mod(nn.Unflatten(-1, (4, 2)), in_keys=["action"], out_keys=[("next", "prior_logits")]),
        ...          Mod(nn.Unflatten(-1, (4, 2)), in_keys=["action"], out_keys=[("next", "posterior_logits")]),
        ...          Mod(nn.Linear(8, 6), in_keys=["action"], out_keys=[("next", "reco_pixels")]),
        ...          Mod(nn.Linear(8, 255), in_keys=["action"], out_keys=[("next", "reward_logits")]))
        >>> td = TensorDict({"action": torch.randn(2, 3, 8),
        ...                  "next": {"pixels": torch.randn(2, 3, 6), "reward": torch.randn(2, 3, 1)}}, [2, 3])
        >>> losses, outputs = DreamerV3ModelLoss(wm)(td)
        >>> sorted(losses.keys())
        ['loss_model_kl', 'loss_model_reco', 'loss_model_reward']
    """

    @dataclass
    class _AcceptedKeys:
        reward: NestedKey = "reward"
        reward_logits: NestedKey = "reward_logits"
        true_reward: NestedKey = "true_reward"
        prior_logits: NestedKey = "prior_logits"
        posterior_logits: NestedKey = "posterior_logits"
        pixels: NestedKey | list[NestedKey] = "pixels"
        reco_pixels: NestedKey | list[NestedKey] = "reco_pixels"
        continue_pred: NestedKey = "continue_pred"
        done: NestedKey = "done"
        terminated: NestedKey = "terminated"

    default_keys = _AcceptedKeys
    tensor_keys: _AcceptedKeys

    def __init__(self, world_model: nn.Module, *, detach_output: bool = True, **knobs: Unpack[ModelKnobs]) -> None:
        super().__init__()
        check_network("DreamerV3ModelLoss", "world_model", world_model)
        for name, value in model_knobs(knobs).items():
            setattr(self, name, value)
        self.world_model = world_model
        self.detach_output = detach_output

    @property
    def knobs(self) -> ModelKnobs:
        """The weights and options as they are now."""
        knobs: ModelKnobs = {name: getattr(self, name) for name in KNOBS}  # type: ignore[assignment]
        return knobs

    @property
    def out_keys(self) -> list[str]:  # type: ignore[override]
        """Names of the losses this configuration gives, in the order of keyword calls."""
        knobs = self.knobs
        kl = ["kl"] if knobs["kl_mode"] == "balanced" else ["dynamic", "representation"]
        names = [*kl, "reco", "reward"] + ["continue"] * self._with_continue
        return [f"loss_model_{name}" for name in names]

    def functional(self) -> tuple[Callable[..., tuple[Tensor, dict[str, Any]]], dict[str, Tensor]]:
        """``(loss_fn, params)``.

        ``loss_fn(params, tensordict) -> (loss, aux)`` is :func:`rlloss.dreamer_v3_model_loss` with this module's world
        model, names and knobs; ``aux["outputs"]["tensordict"]`` is what the world model returned.
        """
        apply, params = functionalize(self.world_model)

        def loss_fn(params: Any, tensordict: TensorDictBase) -> tuple[Tensor, dict[str, Any]]:
            inputs, batch = self._split(tensordict)
            return dreamer_v3_model_loss(
                params, batch, world_model=lambda params, _: self._outputs(apply(params, inputs)), **self.knobs
            )

        return loss_fn, params

    def _of_tensordict(self, tensordict: TensorDictBase) -> tuple[TensorDictBase, TensorDictBase]:
        inputs, batch = self._split(tensordict)
        outputs = self._outputs(self.world_model(inputs))
        weighted, _, _ = dreamer_v3_model_losses(outputs, batch, **self.knobs)
        written = outputs["tensordict"]
        losses = TensorDict({f"loss_model_{name}": loss for name, loss in weighted.items()}, [])
        return losses, written.detach() if self.detach_output else written

    @dispatch(auto_batch_size=False)  # type: ignore[untyped-decorator]
    def _of_entries(self, tensordict: TensorDictBase) -> TensorDictBase:
        return self._of_tensordict(tensordict.auto_batch_size_(2))[0]

    def _split(self, tensordict: TensorDictBase) -> tuple[TensorDictBase, dict[str, Any]]:
        """What the world model reads (containers copied, the true reward moved away), and what its outputs are
        compared with.
        """
        inputs = _copy(tensordict)
        keys = self.tensor_keys
        reward = self._get(inputs, "reward", next_key(keys.reward))
        inputs.rename_key_(next_key(keys.reward), next_key(keys.true_reward))
        batch = {"reward": reward, "observation": self._heads(inputs, "pixels")}
        if self._with_continue:
            batch["terminated"] = inputs.get(next_key(keys.terminated), None)
            if batch["terminated"] is None:
                done = next_key(keys.done)
                why = f"Neither {next_key(keys.terminated)!r} nor {done!r} is there, and lambda_continue > 0."
                batch["terminated"] = self._get(inputs, "terminated", done, why)
        return inputs, batch

    def _outputs(self, written: TensorDictBase) -> Outputs:
        """What the world model wrote, under the names of the pure function."""
        if not is_tensor_collection(written):
            wanted, guess = "a TensorDict", "Did the world model forget to return what it wrote to?"
            got = checks.describe(written)
            raise TypeError(checks.text("DreamerV3ModelLoss", "world_model(tensordict)", wanted, got, guess))
        keys = self.tensor_keys
        outputs: Outputs = {
            "prior_logits": self._get(written, "prior_logits", next_key(keys.prior_logits)),
            "posterior_logits": self._get(written, "posterior_logits", next_key(keys.posterior_logits)),
            "reconstruction": self._heads(written, "reco_pixels"),
            "reward": self._predicted_reward(written),
            "tensordict": written,
        }
        if self._with_continue:
            why = "lambda_continue > 0 asks for the world model's continue prediction."
            outputs["continue_logits"] = self._get(written, "continue_pred", next_key(keys.continue_pred), why)
        return outputs

    def _predicted_reward(self, written: TensorDictBase) -> Any:
        logits_key, key = next_key(self.tensor_keys.reward_logits), next_key(self.tensor_keys.reward)
        if not self.knobs["reward_two_hot"]:
            return self._get(written, "reward", key, "The world model predicts no reward.")
        if written.get(logits_key, None) is not None or written.get(key, None) is None:
            return self._get(written, "reward_logits", logits_key, "The world model predicts no reward.")
        if not is_compiling():
            # Level 7 calls the module: Python shows this warning only where it comes from the user's own script.
            warnings.warn(OLDER_MODEL.format(key, logits_key), DeprecationWarning, stacklevel=7)
        return written.get(key)

    def _heads(self, tensordict: TensorDictBase, name: str) -> Any:
        """The tensor of a single head, or observation name -> tensor of several."""
        observed, predicted = _as_list(self.tensor_keys.pixels), _as_list(self.tensor_keys.reco_pixels)
        if len(observed) != len(predicted):
            text = f"pixels and reco_pixels must be lists of one length, got {observed} and {predicted}."
            raise ValueError(f"DreamerV3ModelLoss: {text}")
        entries = [self._get(tensordict, name, next_key(key)) for key in (observed if name == "pixels" else predicted)]
        if not isinstance(self.tensor_keys.pixels, list):
            return entries[0]
        heads = [_name(key) for key in observed]
        if len(set(heads)) < len(heads):
            # Several predictions of one observation: each counts.
            heads = [f"{head} {i}" for i, head in enumerate(heads)]
        return dict(zip(heads, entries, strict=True))

    @property
    def _with_continue(self) -> bool:
        weight = self.knobs["lambda_continue"]
        return isinstance(weight, Tensor) or weight > 0

    def _read_keys(self) -> list[NestedKey]:
        keys = self.tensor_keys
        truth = [*_as_list(keys.pixels), keys.reward] + [keys.terminated] * self._with_continue
        own = [next_key(key) for key in truth]
        moved = {next_key(keys.true_reward): next_key(keys.reward)}
        read = [moved.get(unravel_key(key), key) for key in getattr(self.world_model, "in_keys", [])]
        return list(dict.fromkeys([*read, *own]))


class DreamerV3Loss(LossModule):
    r"""DreamerV3's whole objective: the world model's losses, the actor's, and the critic's on both kinds of data.

    .. math:: L = L_{model} + L_{actor} + L_{value} + \lambda_{replay} L_{replay}

    Each state that the world model infers starts a rollout. It enters without its gradient; the critic's loss on the
    replayed sequences reaches the world model. The same as one pure function is :func:`rlloss.dreamer_v3_loss`.

    Source: Hafner et al. 2023 (arXiv:2301.04104); names and defaults as torchrl 0.14.1 ``DreamerV3Loss``.

    Args:
        model_loss: of the world model, which writes "state" and "belief" under ``"next"``; with
            ``detach_output=False`` where the replay loss is wanted.
        actor_loss: of the actor; its world and critic share their parameters with those of the other two.
        value_loss: of the critic.
        replay_value_loss_weight: of the critic's loss on the replayed sequences; the number 0 leaves it out.
        continuation_horizon: the discount in the replayed sequences is 1 - 1 / continuation_horizon.
        lmbda: of the replayed returns.

    ``loss(td)`` reads a TensorDict [B, T] and returns the weighted losses, whose names start with ``loss_`` and whose
    sum is the objective; the records of the three; ``replay_value``, the replay loss without its weight; and under
    "replay_context" the inferred states, detached.

    Names are changed by ``set_keys(state=..., belief=..., is_init=..., replay_context=...)``; "is_init" is read by the
    world model only.

    Raises:
        TypeError, ValueError: if a loss is of another class, a number out of range, or the model's output detached
            where the replay loss is wanted.
        KeyError: at the call, if an entry is missing.
    """

    @dataclass
    class _AcceptedKeys:
        state: NestedKey = "state"
        belief: NestedKey = "belief"
        is_init: NestedKey = "is_init"
        replay_context: NestedKey = "replay_context"

    default_keys = _AcceptedKeys
    tensor_keys: _AcceptedKeys

    def __init__(
        self,
        model_loss: DreamerV3ModelLoss,
        actor_loss: DreamerV3ActorLoss,
        value_loss: DreamerV3ValueLoss,
        *,
        replay_value_loss_weight: Scalar = 0.3,
        continuation_horizon: Scalar = 333.0,
        lmbda: Scalar = 0.95,
    ) -> None:
        super().__init__()
        kinds = {"model_loss": DreamerV3ModelLoss, "actor_loss": DreamerV3ActorLoss, "value_loss": DreamerV3ValueLoss}
        for (name, kind), loss in zip(kinds.items(), (model_loss, actor_loss, value_loss), strict=True):
            if not isinstance(loss, kind):
                raise TypeError(checks.text("DreamerV3Loss", name, f"a {kind.__name__}", checks.describe(loss)))
        if value_loss.reduction == "none":
            guess = "The sum of the losses is one scalar."
            raise ValueError(checks.text("DreamerV3Loss", "value_loss.reduction", "'mean' or 'sum'", "'none'", guess))
        checks.knob("DreamerV3Loss", "replay_value_loss_weight", replay_value_loss_weight, 0.0)
        checks.knob("DreamerV3Loss", "continuation_horizon", continuation_horizon, 1.0)
        checks.knob("DreamerV3Loss", "lmbda", lmbda, 0.0, 1.0)
        self.model_loss = model_loss
        self.actor_loss = actor_loss
        self.value_loss = value_loss
        self.replay_value_loss_weight = replay_value_loss_weight
        self.continuation_horizon = continuation_horizon
        self.lmbda = lmbda
        if self._with_replay and model_loss.detach_output:
            guess = "The replay loss trains the world model; or set replay_value_loss_weight=0."
            raise ValueError(checks.text("DreamerV3Loss", "model_loss.detach_output", "False", "True", guess))

    @property
    def out_keys(self) -> list[str]:  # type: ignore[override]
        """Names of the losses, in the order of keyword calls."""
        return [*self.model_loss.out_keys, "loss_actor", "loss_value", "loss_replay_value"]

    def functional(
        self,
    ) -> tuple[
        Callable[..., tuple[Tensor, dict[str, Any], DreamerV3State]], dict[str, dict[str, Tensor]], DreamerV3State
    ]:
        """``(loss_fn, params, state)``.

        ``loss_fn(params, state, tensordict) -> (loss, aux, state)``, with params {"world_model", "actor", "critic"} and
        one scalar for one optimiser. ``aux``, detached: "losses" by name, "imagined" and "replay_context". What the
        networks of the rollouts share with world model and critic follows those; the rest of them stays as it is.
        """
        model_fn, world_model = self.model_loss.functional()
        actor_fn, actor, frozen, return_range = self.actor_loss.functional()
        value_fn, critic, slow_critic = self.value_loss.functional()
        apply, _ = functionalize(self.value_loss.value_model)
        params = {"world_model": world_model, "actor": actor, "critic": critic}
        groups = tuple(params)
        owners = {id(x): (group, name) for group, named in params.items() for name, x in named.items()}
        shared = {name: owners[id(x)] for name, x in frozen.items() if id(x) in owners}

        def loss_fn(
            params: Mapping[str, Params], state: DreamerV3State, tensordict: TensorDictBase
        ) -> tuple[Tensor, dict[str, Any], DreamerV3State]:
            live = {k: by_name(checks.take("DreamerV3Loss", "params", params, k)) for k in groups}
            held = {**frozen, **{name: live[group][source] for name, (group, source) in shared.items()}}
            model, model_aux = model_fn(live["world_model"], tensordict)
            inferred = model_aux["outputs"]["tensordict"]
            actor, actor_aux, return_range = actor_fn(live["actor"], held, state.return_range, self._starts(inferred))
            imagined = actor_aux["imagined"]
            value, value_record = value_fn(live["critic"], state.slow_critic, imagined)
            losses = {"loss_model": model, "loss_actor": actor, "loss_value": value}
            record = {**actor_aux["losses"], **value_record}
            if self._with_replay:
                replayed = self._replayed(tensordict, inferred, imagined)
                args = (apply, live["critic"], state.slow_critic, replayed, self.continuation_horizon, self.lmbda)
                record["replay_value"] = self.value_loss._replay_loss(*args)
                losses["loss_replay_value"] = self.replay_value_loss_weight * record["replay_value"]
            detached = {name: x.detach() for name, x in {**record, **losses}.items()}
            aux = {"losses": detached, "imagined": imagined, "replay_context": self._context(inferred)}
            return sum(losses.values(), start=torch.zeros_like(model)), aux, state._replace(return_range=return_range)

        return loss_fn, params, DreamerV3State(slow_critic, return_range)

    def _of_tensordict(self, tensordict: TensorDictBase) -> TensorDictBase:
        losses, inferred = self.model_loss(tensordict)
        actor_losses, imagined = self.actor_loss(self._starts(inferred))
        value_losses, _ = self.value_loss(imagined)
        replay = torch.zeros_like(actor_losses["loss_actor"])
        if self._with_replay:
            replayed = self._replayed(tensordict, inferred, imagined)
            knobs = {"horizon": self.continuation_horizon, "lmbda": self.lmbda}
            replay = self.value_loss.replay_value_loss(replayed, **knobs)["loss_replay_value"]
        losses.update(actor_losses).update(value_losses)
        losses.set("loss_replay_value", self.replay_value_loss_weight * replay)
        losses.set("replay_value", replay.detach())
        return losses.set(self.tensor_keys.replay_context, self._context(inferred))

    @dispatch(auto_batch_size=False)  # type: ignore[untyped-decorator]
    def _of_entries(self, tensordict: TensorDictBase) -> TensorDictBase:
        return self._of_tensordict(tensordict.auto_batch_size_(2))

    def _context(self, inferred: TensorDictBase) -> TensorDictBase:
        """The inferred states [B, T, *], detached."""
        keys = self.tensor_keys
        context = TensorDict({}, inferred.batch_size)
        for name in ("state", "belief"):
            key = getattr(keys, name)
            context.set(key, self._get(inferred, name, next_key(key), "The world model infers it.").detach())
        return context

    def _starts(self, inferred: TensorDictBase) -> TensorDictBase:
        """Each of them as the start of a rollout, [B * T, *], under the names of the actor's loss."""
        context, keys = self._context(inferred).flatten(0, 1), self.actor_loss.tensor_keys
        starts = TensorDict({}, context.batch_size)
        starts.set(keys.state, context.get(self.tensor_keys.state))
        return starts.set(keys.belief, context.get(self.tensor_keys.belief))

    def _replayed(
        self, tensordict: TensorDictBase, inferred: TensorDictBase, imagined: TensorDictBase
    ) -> TensorDictBase:
        """What the critic's loss on replayed sequences reads, the way to the world model open."""
        keys, features = self.value_loss.tensor_keys, getattr(self.value_loss.value_model, "in_keys", None)
        replayed = inferred.get("next").copy() if features is None else inferred.get("next").select(*features)
        bootstrap = imagined.get("lambda_target").flatten(1)[:, 0].reshape(tensordict.batch_size)
        following = [self._get(tensordict, k, next_key(getattr(keys, k))) for k in ("reward", "done", "terminated")]
        replayed.set(keys.bootstrap, bootstrap)
        for key, x in zip((keys.reward, keys.done, keys.terminated), following, strict=True):
            replayed.set(next_key(key), x)
        return replayed

    @property
    def _with_replay(self) -> bool:
        weight = self.replay_value_loss_weight
        return isinstance(weight, Tensor) or weight > 0

    def _read_keys(self) -> list[NestedKey]:
        keys = self.value_loss.tensor_keys
        replayed = [next_key(key) for key in (keys.reward, keys.done, keys.terminated)] * self._with_replay
        return list(dict.fromkeys([*self.model_loss.in_keys, self.tensor_keys.is_init, *replayed]))


def _copy(tensordict: TensorDictBase) -> TensorDictBase:
    """New containers, nested ones too, of the same entries."""
    copy = tensordict.copy()
    # Compiled, a copy keeps the nested containers up to tensordict 0.13.
    for key, value in tensordict.items():
        if is_tensor_collection(value) and not is_non_tensor(value):
            copy.set(key, _copy(value))
    return copy


def _as_list(keys: NestedKey | list[NestedKey]) -> list[NestedKey]:
    return keys if isinstance(keys, list) else [keys]


def _name(key: NestedKey) -> str:
    return key if isinstance(key, str) else ".".join(key)
