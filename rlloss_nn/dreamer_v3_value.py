"""DreamerV3's critic loss as a torch module, with the slow critic."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase, TensorDictParams
from tensordict.nn import dispatch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.parameter import UninitializedParameter

from rlloss import checks
from rlloss.dreamer_v3 import (
    REDUCTIONS,
    VALUE_LOSSES,
    dreamer_v3_replay_value_loss,
    dreamer_v3_value_terms,
    reduced,
)
from rlloss.optim import ema_update
from rlloss.two_hot import symexp_bins, symexp_decode
from rlloss.types import ApplyFn, Params, Scalar
from rlloss_nn.dreamer_v3_actor import DreamerV3ActorLoss
from rlloss_nn.functional import functionalize
from rlloss_nn.loss_module import LossModule, NestedKey, by_name, check_network, next_key, one_number

# Read without complaint here, but a critic that is also to work with torchrl should know.
OLDER_CRITIC = (
    "DreamerV3ValueLoss: the critic writes logits under {!r}, as older ones do. "
    "In torchrl that is deprecated, to be removed in v0.16: write them under {!r}."
)


class DreamerV3ValueLoss(LossModule):
    r"""Loss of DreamerV3's critic, on imagined rollouts and on replayed sequences, with a slow copy of it inside.

    .. math:: L = \mathrm{mean}\left[w_t \, (\ell(v(s_t), R_t) +
              \rho \, \ell(v(s_t), \mathrm{sg}(v_{slow}(s_t))))\right]

    The functions are :func:`rlloss.dreamer_v3_value_terms` and :func:`rlloss.dreamer_v3_replay_value_loss`. For the
    author's current code: ``value_loss="two_hot", slow_critic_regularization=1.0``.

    Source: Hafner et al. 2023 (arXiv:2301.04104); names and defaults as torchrl 0.14.1 ``DreamerV3ValueLoss``.

    Args:
        value_model: reads a state and writes "state_value" [..., 1]; for "two_hot" also "state_value_logits"
            [..., num_value_bins].
        value_loss: "symlog_mse" or "two_hot".
        discount_loss: whether later steps weigh less where the batch holds no "discount_weight" and has a time
            dimension, its last.
        gamma: discount of those weights.
        num_value_bins: width of the logits.
        actor_loss: whose ``gamma`` is taken in place of ``gamma``.
        slow_critic_regularization: rho. Where it is not 0, ``target_value_model_params`` hold a slow copy of the
            critic, which :meth:`update_target` or :class:`~rlloss_nn.optim.SoftUpdate` moves after each step of the
            optimiser. It is in the state_dict, and not in ``parameters()``.
        reduction: "mean", "sum" or "none".

    ``loss(td)`` reads what the critic reads, "lambda_target" and, if it is there, "discount_weight" [*batch, 1], as
    :class:`DreamerV3ActorLoss` writes them, and returns ``(losses, td)``: ``loss_value`` and, for the record,
    ``value_slow_loss``.

    Names are changed by ``set_keys(value=..., value_logits=..., discount_weight=..., reward=..., done=...,
    terminated=..., bootstrap=...)``; the last four are of :meth:`replay_value_loss`.

    Raises:
        TypeError, ValueError: if the critic is no module, an option unknown or a number out of range; at the call, if
            shapes do not fit.
        KeyError: at the call, if an entry is missing.

    Example:
        >>> from tensordict.nn import TensorDictModule as Mod
        >>> critic = Mod(nn.Linear(4, 1), in_keys=["state"], out_keys=["state_value"])
        >>> loss = DreamerV3ValueLoss(critic, slow_critic_regularization=1.0)
        >>> batch = TensorDict({"state": torch.randn(8, 15, 4), "lambda_target": torch.randn(8, 15, 1)}, [8, 15])
        >>> losses, _ = loss(batch)
        >>> losses["loss_value"].backward()
        >>> loss.update_target(rate=0.02)
    """

    @dataclass
    class _AcceptedKeys:
        value: NestedKey = "state_value"
        value_logits: NestedKey = "state_value_logits"
        discount_weight: NestedKey = "discount_weight"
        reward: NestedKey = "reward"
        done: NestedKey = "done"
        terminated: NestedKey = "terminated"
        bootstrap: NestedKey = "bootstrap"

    default_keys = _AcceptedKeys
    tensor_keys: _AcceptedKeys
    out_keys = ["loss_value"]  # noqa: RUF012  (a ClassVar would hide it from `dispatch`)

    def __init__(
        self,
        value_model: nn.Module,
        value_loss: str = "symlog_mse",
        discount_loss: bool = True,
        gamma: Scalar = 0.99,
        num_value_bins: int = 255,
        actor_loss: DreamerV3ActorLoss | None = None,
        slow_critic_regularization: Scalar = 0.0,
        reduction: str | None = None,
    ) -> None:
        super().__init__()
        function = "DreamerV3ValueLoss"
        check_network(function, "value_model", value_model)
        checks.option(function, "value_loss", value_loss, sorted(VALUE_LOSSES))
        checks.flag(function, "discount_loss", discount_loss)
        checks.knob(function, "gamma", gamma, 0.0, 1.0)
        checks.integer(function, "num_value_bins", num_value_bins, 2)
        checks.knob(function, "slow_critic_regularization", slow_critic_regularization, 0.0)
        self.reduction = "mean" if reduction is None else reduction
        checks.option(function, "reduction", self.reduction, REDUCTIONS)
        self.value_model = value_model
        self.value_loss = value_loss
        self.discount_loss = discount_loss
        self.gamma = gamma
        self.num_value_bins = num_value_bins
        self.slow_critic_regularization = slow_critic_regularization
        # In a tuple, so that the actor's parameters do not become this module's, too.
        self._actor_loss = (actor_loss,)
        if self._with_slow:
            _, params = functionalize(value_model)
            slow = TensorDict({name: x.detach().clone() for name, x in params.items()}, []).unflatten_keys(".")
            self.target_value_model_params = TensorDictParams(slow, no_convert=True)

    @property
    def value_model_params(self) -> TensorDictBase:
        """The critic's parameters and buffers by name, as torchrl has them."""
        return TensorDict.from_module(self.value_model)

    @property
    def value_bins(self) -> Tensor:
        """What the logits of "two_hot" stand for, [num_value_bins]."""
        device = next((x.device for x in self.value_model.parameters()), None)
        return symexp_bins(self.num_value_bins, device=device)

    def sync_gamma_with_actor_loss(self, actor_loss: DreamerV3ActorLoss) -> None:
        """Take over the discount that ``actor_loss`` has now."""
        self.gamma = actor_loss.gamma

    @torch.no_grad()
    def update_target(self, rate: Scalar = 0.02) -> None:
        """Move the slow critic towards the critic, by :func:`rlloss.ema_update`; buffers are copied.

        Args:
            rate: share of the critic, in [0, 1]: 1 copies.

        Raises:
            ValueError: if there is no slow critic, or ``rate`` is outside [0, 1].
        """
        if not self._with_slow:
            guess = "Without it there is no slow critic."
            function = "DreamerV3ValueLoss.update_target"
            raise ValueError(checks.text(function, "slow_critic_regularization", "above 0", "0", guess))
        _, params = functionalize(self.value_model)
        slow = by_name(self.target_value_model_params)
        trained = [name for name, _ in self.value_model.named_parameters()]
        moved = ema_update({n: slow[n] for n in trained}, {n: params[n] for n in trained}, rate=rate)
        for name, x in {**params, **moved}.items():
            slow[name].copy_(x)

    def functional(self) -> tuple[Callable[..., tuple[Tensor, dict[str, Any]]], dict[str, Tensor], Params | None]:
        """``(loss_fn, params, slow_params)``.

        ``loss_fn(params, slow_params, tensordict) -> (loss, aux)`` is this loss with the parameters taken out.
        ``slow_params`` are None without a slow critic. ``aux``, detached: "loss_value" and "value_slow_loss".
        """
        apply, params = functionalize(self.value_model)

        def loss_fn(
            params: Params, slow_params: Params | None, tensordict: TensorDictBase
        ) -> tuple[Tensor, dict[str, Any]]:
            return self._loss(apply, params, slow_params, tensordict)

        return loss_fn, params, self._slow_params

    def replay_value_loss(
        self, tensordict: TensorDictBase, *, horizon: Scalar = 333.0, lmbda: Scalar = 0.95
    ) -> TensorDictBase:
        """The critic's loss on replayed sequences, :func:`rlloss.dreamer_v3_replay_value_loss`.

        Its gradient passes into what the critic reads.

        Args:
            tensordict: [*batch, T]: what the critic reads, "bootstrap" (the first return imagined from each state) and,
                under ``"next"``, "reward", "done" (an episode ends, and another may follow) and "terminated".
            horizon: the discount is 1 - 1 / horizon; at least 1.
            lmbda: 0 looks one step ahead, 1 to the end.

        Returns:
            "loss_replay_value", without a weight.

        Raises:
            KeyError: if an entry is missing.
            TypeError, ValueError: as the function.
        """
        checks.knob("DreamerV3ValueLoss.replay_value_loss", "horizon", horizon, 1.0)
        self._see(tensordict)
        apply, params = functionalize(self.value_model)
        loss = self._replay_loss(apply, params, self._slow_params, tensordict, horizon, lmbda)
        return TensorDict({"loss_replay_value": loss}, [])

    def _of_tensordict(self, tensordict: TensorDictBase) -> tuple[TensorDictBase, TensorDictBase]:
        self._see(tensordict)
        loss_fn, params, slow_params = self.functional()
        loss, aux = loss_fn(params, slow_params, tensordict)
        return TensorDict({**aux, "loss_value": loss}, []), tensordict.detach()

    @dispatch(auto_batch_size=False)  # type: ignore[untyped-decorator]
    def _of_entries(self, tensordict: TensorDictBase) -> TensorDictBase:
        return self._of_tensordict(tensordict)[0]

    def _loss(
        self, apply: ApplyFn, params: Params, slow_params: Params | None, tensordict: TensorDictBase
    ) -> tuple[Tensor, dict[str, Any]]:
        inputs = self._inputs(tensordict)
        prediction = self._prediction(apply(params, inputs.copy()))
        steps = prediction.shape[:-1]
        returns = self._get(tensordict, "lambda_target", "lambda_target", "DreamerV3ActorLoss writes it.")
        returns = one_number("DreamerV3ValueLoss", "lambda_target", returns, steps)
        weight = self._weight(tensordict, returns)
        slow = None
        if self._with_slow:
            slow = self._prediction(apply(by_name(slow_params), inputs.copy())).detach()
        terms = dreamer_v3_value_terms(
            prediction, slow, returns, weight, slow_weight=self.slow_critic_regularization, value_loss=self.value_loss
        )
        loss = reduced(terms, self.reduction)
        record = {"loss_value": loss, "value_slow_loss": self._slow_loss(prediction, slow, weight)}
        return loss, {name: x.detach() for name, x in record.items()}

    @torch.no_grad()
    def _slow_loss(self, prediction: Tensor, slow: Tensor | None, weight: Tensor) -> Tensor:
        """The slow critic's part on its own, for the record."""
        if slow is None:
            return reduced(torch.zeros_like(weight), self.reduction)
        value = symexp_decode(slow) if self.value_loss == "two_hot" else slow.squeeze(-1)
        terms = dreamer_v3_value_terms(prediction, None, value, weight, slow_weight=0.0, value_loss=self.value_loss)
        return reduced(terms, self.reduction)

    def _replay_loss(
        self,
        apply: ApplyFn,
        params: Params,
        slow_params: Params | None,
        tensordict: TensorDictBase,
        horizon: Scalar,
        lmbda: Scalar,
    ) -> Tensor:
        keys = self.tensor_keys
        bootstrap = self._get(tensordict, "bootstrap", keys.bootstrap)
        steps = tuple(tensordict.batch_size) or tuple(bootstrap.shape)
        entries = {k: self._get(tensordict, k, next_key(getattr(keys, k))) for k in ("reward", "done", "terminated")}
        entries = {**entries, "bootstrap": bootstrap}
        entries = {k: one_number("DreamerV3ValueLoss", k, x, steps) for k, x in entries.items()}
        batch = {**entries, "is_last": entries["done"], "features": dict(self._inputs(tensordict).items(True, True))}

        def critic(params: Params, features: dict[NestedKey, Tensor]) -> Tensor:
            inputs = TensorDict({}, [*steps[:-1], steps[-1] - 1])
            for key, x in features.items():
                inputs.set(key, x)
            return self._prediction(apply(params, inputs))

        loss, _ = dreamer_v3_replay_value_loss(
            by_name(params),
            None if slow_params is None else by_name(slow_params),
            batch,
            critic=critic,
            discount=1 - 1 / horizon,
            lmbda=lmbda,
            slow_weight=self.slow_critic_regularization,
            value_loss=self.value_loss,
            reduction=self.reduction,
        )
        return loss

    def _prediction(self, written: TensorDictBase) -> Tensor:
        """What the loss compares: logits [..., num_value_bins], or the value [..., 1]."""
        function, keys = "DreamerV3ValueLoss", self.tensor_keys
        if self.value_loss == "symlog_mse":
            value: Tensor = self._get(written, "value", keys.value)
            checks.last_dimension(function, "value", value, 1, "Logits go with value_loss='two_hot'.")
            return value
        logits: Tensor | None = written.get(keys.value_logits, None)
        if logits is None and written.get(keys.value, None) is not None:
            logits = written.get(keys.value)
            if not is_compiling():
                warnings.warn(OLDER_CRITIC.format(keys.value, keys.value_logits), DeprecationWarning, stacklevel=7)
        if logits is None:
            logits = self._get(written, "value_logits", keys.value_logits, "value_loss='two_hot' compares logits.")
        guess = "Set num_value_bins to the width of the head, or value_loss='symlog_mse' for a value."
        checks.last_dimension(function, "value_logits", logits, self.num_value_bins, guess)
        return logits

    def _weight(self, tensordict: TensorDictBase, returns: Tensor) -> Tensor:
        """[*steps]: how much each counts."""
        weight = tensordict.get(self.tensor_keys.discount_weight, None)
        if weight is not None:
            return one_number("DreamerV3ValueLoss", "discount_weight", weight, returns.shape)
        ones = torch.ones_like(returns)
        if not self.discount_loss or returns.ndim < 2:
            return ones
        (actor_loss,) = self._actor_loss
        gamma = checks.scalar_like(ones, self.gamma if actor_loss is None else actor_loss.gamma)
        return ones * gamma ** torch.arange(returns.shape[-1], dtype=ones.dtype, device=ones.device)

    def _inputs(self, tensordict: TensorDictBase) -> TensorDictBase:
        """What the critic reads, where it says what that is, without what it writes."""
        keys = getattr(self.value_model, "in_keys", None)
        return tensordict.copy() if keys is None else tensordict.select(*keys, strict=False)

    def _see(self, tensordict: TensorDictBase) -> None:
        """A lazy critic takes its shapes from the first batch."""
        if any(isinstance(x, UninitializedParameter) for x in self.value_model.parameters()):
            with torch.no_grad():
                self.value_model(self._inputs(tensordict).copy())

    @property
    def _slow_params(self) -> dict[str, Tensor] | None:
        return by_name(self.target_value_model_params) if self._with_slow else None

    @property
    def _with_slow(self) -> bool:
        weight = self.slow_critic_regularization
        return isinstance(weight, Tensor) or weight > 0

    def _read_keys(self) -> list[NestedKey]:
        return [*getattr(self.value_model, "in_keys", []), "lambda_target", self.tensor_keys.discount_weight]
