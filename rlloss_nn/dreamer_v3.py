"""DreamerV3's world-model loss as a torch module."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Unpack

from tensordict import TensorDict, TensorDictBase, is_non_tensor, is_tensor_collection, unravel_key
from tensordict.nn import dispatch
from torch import Tensor, nn
from torch.compiler import is_compiling

from rlloss import checks
from rlloss.dreamer_v3 import (
    DREAMER_V3_DEFAULTS,
    ModelKnobs,
    dreamer_v3_model_loss,
    dreamer_v3_model_losses,
    model_knobs,
)
from rlloss_nn.functional import functionalize
from rlloss_nn.loss_module import LossModule, NestedKey

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
        >>> import torch
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
        reward = self._get(inputs, "reward", _next(keys.reward))
        inputs.rename_key_(_next(keys.reward), _next(keys.true_reward))
        batch = {"reward": reward, "observation": self._heads(inputs, "pixels")}
        if self._with_continue:
            batch["terminated"] = inputs.get(_next(keys.terminated), None)
            if batch["terminated"] is None:
                why = f"Neither {_next(keys.terminated)!r} nor {_next(keys.done)!r} is there, and lambda_continue > 0."
                batch["terminated"] = self._get(inputs, "terminated", _next(keys.done), why)
        return inputs, batch

    def _outputs(self, written: TensorDictBase) -> Outputs:
        """What the world model wrote, under the names of the pure function."""
        if not is_tensor_collection(written):
            wanted, guess = "a TensorDict", "Did the world model forget to return what it wrote to?"
            got = checks.describe(written)
            raise TypeError(checks.text("DreamerV3ModelLoss", "world_model(tensordict)", wanted, got, guess))
        keys = self.tensor_keys
        outputs: Outputs = {
            "prior_logits": self._get(written, "prior_logits", _next(keys.prior_logits)),
            "posterior_logits": self._get(written, "posterior_logits", _next(keys.posterior_logits)),
            "reconstruction": self._heads(written, "reco_pixels"),
            "reward": self._predicted_reward(written),
            "tensordict": written,
        }
        if self._with_continue:
            why = "lambda_continue > 0 asks for the world model's continue prediction."
            outputs["continue_logits"] = self._get(written, "continue_pred", _next(keys.continue_pred), why)
        return outputs

    def _predicted_reward(self, written: TensorDictBase) -> Any:
        logits_key, key = _next(self.tensor_keys.reward_logits), _next(self.tensor_keys.reward)
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
        entries = [self._get(tensordict, name, _next(key)) for key in (observed if name == "pixels" else predicted)]
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
        own = [_next(key) for key in truth]
        moved = {_next(keys.true_reward): _next(keys.reward)}
        read = [moved.get(unravel_key(key), key) for key in getattr(self.world_model, "in_keys", [])]
        return list(dict.fromkeys([*read, *own]))


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


def _next(key: NestedKey) -> NestedKey:
    """The key under "next", where it is not there already."""
    parts = (key,) if isinstance(key, str) else tuple(key)
    return parts if parts[0] == "next" else ("next", *parts)
