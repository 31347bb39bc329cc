"""DreamerV3's actor loss as a torch module."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import InteractionType, dispatch, set_interaction_type
from torch import Tensor, nn

from rlloss import checks, statistics
from rlloss.dreamer_v3 import BehaviourTargets, dreamer_v3_actor_loss, dreamer_v3_returns, imagine, reduced
from rlloss.policy import CategoricalPolicy, EvaluatedPolicy, NormalPolicy, Policy
from rlloss.returns import lambda_return
from rlloss.types import ApplyFn, Params, Scalar
from rlloss_nn.functional import functionalize
from rlloss_nn.loss_module import LossModule, NestedKey, by_name, check_network, one_number
from rlloss_nn.statistics import ReturnRange

#: Ways to look ahead, by the names of torchrl, and the lambda of those that fix it.
VALUE_ESTIMATORS = {"TDLambda": None, "TD0": 0.0, "TD1": 1.0}


class _Networks(nn.Module):
    """Several networks under one roof, where a weight that two of them share is one parameter."""

    def __init__(self, **networks: nn.Module | None) -> None:
        super().__init__()
        for name, network in networks.items():
            self.add_module(name, network)

    def forward(self, use: Callable[[Any], Any]) -> Any:
        """Whatever ``use`` makes of the networks, with the parameters they have at the time."""
        return use(self)


class _Frozen(NamedTuple):
    """Networks that a loss runs and others train: not registered, so not in its parameters."""

    value_model: nn.Module
    model_based_env: nn.Module
    continuation_model: nn.Module | None


class _Rollout(NamedTuple):
    """What is known of an imagined rollout of T = horizon + 1 steps; the rewards begin with one never read."""

    states: tuple[Tensor, Tensor]  # [*batch, T, *] each
    outputs: dict[NestedKey, Tensor]  # [*batch, T, *]: the action, and what else the actor writes
    reward: Tensor  # [*batch, T]
    value: Tensor  # [*batch, T]
    continuation: Tensor  # [*batch, T]


class DreamerV3ActorLoss(LossModule):
    r"""Loss of DreamerV3's actor, on rollouts it imagines itself.

    .. math:: L = -\mathrm{mean}\left[w_t \, (\log \pi(\mathrm{sg}(a_t) | s_t) \, A_t + \eta \,
              \mathrm{H}[\pi(s_t)])\right] \quad \text{or} \quad
              -\mathrm{mean}\left[w_t \, (R_t / S + \eta \, \mathrm{H}[\pi(s_t)])\right]

    The functions are :func:`rlloss.imagine`, :func:`rlloss.dreamer_v3_returns` and
    :func:`rlloss.dreamer_v3_actor_loss`. The first form, by the score of the actions, is the author's; the second,
    through the model, is the default of torchrl and so here.

    Source: Hafner et al. 2023 (arXiv:2301.04104); names and defaults as torchrl 0.14.1 ``DreamerV3ActorLoss``.

    Args:
        actor_model: reads state and belief and writes a sampled action. Its ``get_dist(tensordict)`` gives the
            distribution, of ``torch.distributions`` or of ``rlloss.policy``.
        value_model: reads state and belief and writes "state_value" [..., 1].
        model_based_env: one step of the world, or an environment that has it as ``world_model``: reads state, belief
            and action and writes the next state and belief, and "reward". Of an environment nothing else is used.
        continuation_model: reads state and belief and writes "continuation" [..., 1], the probability that the episode
            goes on. None: always.
        imagination_horizon: steps of a rollout.
        discount_loss: whether steps weigh less the less likely, and the later, they are.
        entropy_bonus: eta.
        use_reinforce: the form by the score.
        return_normalization: whether returns count in units of their range.
        return_normalization_rate: of the range, see :func:`rlloss.return_range_update`.
        return_normalization_quantiles: likewise.
        return_normalization_min_scale: smallest unit.
        gamma: discount.
        lmbda: 0 looks one step ahead, 1 to the end.

    ``loss(td)`` reads "state" and "belief" [*batch, *] and returns ``(losses, imagined)``. Losses: ``loss_actor``, and
    for the record ``actor_entropy``, ``return_low``, ``return_high``, ``return_scale``, ``continuation_mean``.
    Imagined, detached, [*batch, horizon]: states, what the actor wrote, "lambda_target" and "discount_weight", which
    :class:`DreamerV3ValueLoss` reads, and ``"next"``. Only the actor's parameters are this module's own, and only they
    get a gradient. The range of the returns is in buffers, and moves in train mode only.

    Names are changed by ``set_keys(state=..., belief=..., reward=..., value=..., action=..., continuation=...,
    discount_weight=...)``; ``action_log_prob``, ``done`` and ``terminated``, which torchrl has, name nothing that is
    read: imagination never ends.

    Raises:
        TypeError, ValueError: if a network is no module or a knob out of range.
        KeyError: at the call, if an entry is missing.

    Example:
        >>> from tensordict.nn import TensorDictModule as Mod, TensorDictSequential as Seq
        >>> from tensordict.nn import NormalParamExtractor, ProbabilisticTensorDictModule as Prob
        >>> from tensordict.nn import ProbabilisticTensorDictSequential as Actor
        >>> both = ["state", "belief"]
        >>> world = Seq(Mod(lambda s, b, a: (s + a, b), in_keys=[*both, "action"], out_keys=both),
        ...             Mod(lambda s: -s.square().sum(-1, True), in_keys=["state"], out_keys=["reward"]))
        >>> head = nn.Sequential(nn.Linear(2, 4), NormalParamExtractor())
        >>> actor = Actor(Mod(head, in_keys=["state"], out_keys=["loc", "scale"]),
        ...               Prob(in_keys=["loc", "scale"], out_keys=["action"],
        ...                    distribution_class=torch.distributions.Normal))
        >>> value = Mod(nn.Linear(2, 1), in_keys=["state"], out_keys=["state_value"])
        >>> loss = DreamerV3ActorLoss(actor, value, world, use_reinforce=True)
        >>> losses, imagined = loss(TensorDict({"state": torch.randn(8, 2), "belief": torch.zeros(8, 3)}, [8]))
        >>> losses["loss_actor"].shape, imagined["lambda_target"].shape
        (torch.Size([]), torch.Size([8, 15, 1]))
    """

    @dataclass
    class _AcceptedKeys:
        state: NestedKey = "state"
        belief: NestedKey = "belief"
        reward: NestedKey = "reward"
        value: NestedKey = "state_value"
        action: NestedKey = "action"
        action_log_prob: NestedKey = "action_log_prob"
        done: NestedKey = "done"
        terminated: NestedKey = "terminated"
        continuation: NestedKey = "continuation"
        discount_weight: NestedKey = "discount_weight"

    default_keys = _AcceptedKeys
    tensor_keys: _AcceptedKeys
    out_keys = ["loss_actor"]  # noqa: RUF012  (a ClassVar would hide it from `dispatch`)

    def __init__(
        self,
        actor_model: nn.Module,
        value_model: nn.Module,
        model_based_env: nn.Module,
        *,
        continuation_model: nn.Module | None = None,
        imagination_horizon: int = 15,
        discount_loss: bool = True,
        entropy_bonus: Scalar = 3e-4,
        use_reinforce: bool = False,
        return_normalization: bool = True,
        return_normalization_rate: Scalar = 0.01,
        return_normalization_quantiles: tuple[float, float] = (0.05, 0.95),
        return_normalization_min_scale: Scalar = 1.0,
        gamma: Scalar = 0.99,
        lmbda: Scalar = 0.95,
    ) -> None:
        super().__init__()
        networks = {"actor_model": actor_model, "value_model": value_model, "model_based_env": model_based_env}
        for name, network in networks.items():
            check_network("DreamerV3ActorLoss", name, network)
        self.actor_model = actor_model
        self._frozen = _Frozen(value_model, model_based_env, continuation_model)
        self.imagination_horizon = imagination_horizon
        self.discount_loss = discount_loss
        self.entropy_bonus = entropy_bonus
        self.use_reinforce = use_reinforce
        self.return_normalization = return_normalization
        self.return_normalization_rate = return_normalization_rate
        self.return_normalization_quantiles = return_normalization_quantiles
        self.return_normalization_min_scale = return_normalization_min_scale
        self.gamma, self.lmbda = gamma, lmbda
        self.return_range = ReturnRange()
        self._check_knobs()

    @property
    def value_model(self) -> nn.Module:
        """The critic that rollouts are judged by."""
        return self._frozen.value_model

    @property
    def model_based_env(self) -> nn.Module:
        """What rollouts are imagined with."""
        return self._frozen.model_based_env

    @property
    def continuation_model(self) -> nn.Module | None:
        """What tells how likely a rollout goes on."""
        return self._frozen.continuation_model

    @property
    def return_low(self) -> Tensor:
        """Moving average of the low percentile of the returns, []."""
        return self.return_range.low

    @property
    def return_high(self) -> Tensor:
        """Moving average of the high percentile of the returns, []."""
        return self.return_range.high

    def make_value_estimator(
        self, value_type: Any = None, *, gamma: Scalar | None = None, lmbda: Scalar | None = None
    ) -> None:
        """Choose how returns look ahead, as torchrl does it.

        Args:
            value_type: "TDLambda", "TD0" (one step) or "TD1" (to the end), or torchrl's enum of those; None: the first.
            gamma: discount; None: as it is.
            lmbda: of "TDLambda"; None: as it is.
        """
        kind = "TDLambda" if value_type is None else getattr(value_type, "name", value_type)
        function = "DreamerV3ActorLoss.make_value_estimator"
        checks.option(function, "value_type", kind, VALUE_ESTIMATORS)
        gamma, lmbda = self.gamma if gamma is None else gamma, self.lmbda if lmbda is None else lmbda
        checks.knob(function, "gamma", gamma, 0.0, 1.0)
        checks.knob(function, "lmbda", lmbda, 0.0, 1.0)
        fixed = VALUE_ESTIMATORS[kind]
        self.gamma, self.lmbda = gamma, lmbda if fixed is None else fixed

    def lambda_target(self, reward: Tensor, value: Tensor, continuation: Tensor | None = None) -> Tensor:
        """Returns [*batch, T, 1] of T steps, by the reward, value and continuation [*batch, T, 1] that follow each."""
        following = [reward, value, torch.ones_like(reward) if continuation is None else continuation]
        reward, value, continuation = (torch.nn.functional.pad(x.squeeze(-1), (1, 0)) for x in following)
        return lambda_return(reward, value, continuation, discount=self.gamma, lmbda=self.lmbda).unsqueeze(-1)

    def functional(
        self,
    ) -> tuple[Callable[..., tuple[Tensor, dict[str, Any], Any]], dict[str, Tensor], dict[str, Tensor], Any]:
        """``(loss_fn, params, frozen_params, return_range)``.

        ``loss_fn(params, frozen_params, return_range, tensordict) -> (loss, aux, return_range)`` is this loss with the
        actor's parameters, those of the networks that others train, and the range of the returns taken out.
        ``aux["imagined"]`` is the rollout, and ``aux["losses"]`` has the loss and what is for the record, all detached.
        What the networks draw, they draw from torch's generators.
        """
        frozen = self._frozen
        world = getattr(frozen.model_based_env, "world_model", frozen.model_based_env)
        networks = _Networks(
            actor=self.actor_model, value=frozen.value_model, world=world, continuation=frozen.continuation_model
        )
        apply, params = functionalize(networks)
        own = {name.removeprefix("actor."): x for name, x in params.items() if name.startswith("actor.")}
        frozen_params = {name: x for name, x in params.items() if not name.startswith("actor.")}

        def loss_fn(
            params: Params, frozen_params: Params, return_range: statistics.ReturnRange, tensordict: TensorDictBase
        ) -> tuple[Tensor, dict[str, Any], statistics.ReturnRange]:
            own = {f"actor.{name}": x for name, x in by_name(params).items()}
            return self._loss(apply, own, by_name(frozen_params), return_range, tensordict)

        return loss_fn, own, frozen_params, self.return_range.state

    def _of_tensordict(self, tensordict: TensorDictBase) -> tuple[TensorDictBase, TensorDictBase]:
        loss_fn, *arguments = self.functional()
        loss, aux, return_range = loss_fn(*arguments, tensordict)
        losses = TensorDict({**aux["losses"], "loss_actor": loss}, [])
        self.return_range.load_state(return_range)
        return losses, aux["imagined"]

    @dispatch(auto_batch_size=False)  # type: ignore[untyped-decorator]
    def _of_entries(self, tensordict: TensorDictBase) -> TensorDictBase:
        return self._of_tensordict(tensordict)[0]

    def _loss(
        self,
        apply: ApplyFn,
        own: dict[str, Tensor],
        frozen: dict[str, Tensor],
        return_range: statistics.ReturnRange,
        tensordict: TensorDictBase,
    ) -> tuple[Tensor, dict[str, Any], statistics.ReturnRange]:
        constant = {name: x.detach() for name, x in {**own, **frozen}.items()}
        # Only a loss through the model needs the way from the parameters to the rollout.
        imagining = constant if self.use_reinforce else {**constant, **own}
        rollout = apply(imagining, lambda networks: self._imagine(networks, tensordict))
        targets, scale, return_range = self._targets(rollout, return_range)
        action = rollout.outputs[self.tensor_keys.action]
        batch = {
            "features": {"states": [x.detach() for x in rollout.states], "action": action.detach()},
            "action": action,
            **targets._asdict(),
        }

        def actor(own: Params, features: Any) -> Policy:
            policy: Policy = apply(
                {**constant, **own}, lambda networks: self._policy(networks.actor, features, targets.weight.shape)
            )
            return policy

        estimator = "score" if self.use_reinforce else "pathwise"
        loss, aux = dreamer_v3_actor_loss(own, batch, actor=actor, entropy=self.entropy_bonus, estimator=estimator)
        record = {
            "loss_actor": loss,
            "actor_entropy": reduced(targets.weight * aux["entropy"], "mean"),
            "return_low": return_range.low.clone(),
            "return_high": return_range.high.clone(),
            "return_scale": scale,
            "continuation_mean": reduced(rollout.continuation[..., 1:], "mean"),
        }
        imagined = self._imagined(rollout, targets)
        return loss, {"losses": {k: x.detach() for k, x in record.items()}, "imagined": imagined}, return_range

    def _imagine(self, networks: Any, tensordict: TensorDictBase) -> _Rollout:
        keys = self.tensor_keys
        start = [self._get(tensordict, name, getattr(keys, name)).detach() for name in ("state", "belief")]
        batch = tuple(tensordict.batch_size) or tuple(start[0].shape[:-1])

        def policy(_: Any, state: tuple[Tensor, ...], noise: Any) -> dict[NestedKey, Tensor]:
            written = networks.actor(self._tensordict(state, batch))
            self._get(written, "action", keys.action, "It is what the actor decides.")
            return {k: x for k, x in written.items(True, True) if k not in (keys.state, keys.belief)}

        def dynamics(
            _: Any, state: tuple[Tensor, ...], outputs: dict[NestedKey, Tensor], noise: Any
        ) -> tuple[Tensor, ...]:
            inputs = self._tensordict(state, batch)
            inputs.set(keys.action, outputs[keys.action])
            written, why = networks.world(inputs), "The world model writes it."
            *states, reward = (self._get(written, k, getattr(keys, k), why) for k in ("state", "belief", "reward"))
            return *states, one_number("DreamerV3ActorLoss", "reward", reward, batch)

        nothing = start[0].new_zeros(batch)
        with set_interaction_type(InteractionType.RANDOM):
            rollout = imagine(
                None,
                (*start, nothing),
                {},
                dynamics=dynamics,
                policy=policy,
                horizon=self.imagination_horizon,
                time_dim=len(batch),
            )
        *states, reward = rollout.states
        value = self._prediction(networks.value, "value", states, reward.shape)
        continuation = torch.ones_like(reward)
        if networks.continuation is not None:
            continuation = self._prediction(networks.continuation, "continuation", states, reward.shape)
        return _Rollout((states[0], states[1]), rollout.actions, reward, value, continuation)

    def _targets(
        self, rollout: _Rollout, return_range: statistics.ReturnRange
    ) -> tuple[BehaviourTargets, Tensor, statistics.ReturnRange]:
        """Returns, advantage and weight, the scale of the advantage, and the new range."""
        _, _, reward, value, continuation = rollout
        # Without normalisation: the range of nothing, which scales by 1.
        nothing = statistics.ReturnRange(*map(torch.zeros_like, return_range))
        used = return_range if self.return_normalization else nothing
        minimum = self.return_normalization_min_scale if self.return_normalization else 1.0
        targets, moved = dreamer_v3_returns(
            reward,
            continuation,
            value,
            used,
            rate=self.return_normalization_rate if self.training and self.return_normalization else 0.0,
            quantiles=self.return_normalization_quantiles,
            minimum=minimum,
            discount=self.gamma,
            lmbda=self.lmbda,
        )
        scale = statistics.return_range_scale(moved, minimum=minimum)
        if not self.use_reinforce:
            returns = lambda_return(reward, value, continuation, discount=self.gamma, lmbda=self.lmbda)
            targets = targets._replace(advantage=returns / scale)
        if not self.discount_loss:
            targets = targets._replace(weight=torch.ones_like(targets.weight))
        return targets, scale, moved if self.return_normalization else return_range

    def _imagined(self, rollout: _Rollout, targets: BehaviourTargets) -> TensorDictBase:
        """The rollout as torchrl's environments give it."""
        keys, steps = self.tensor_keys, targets.weight.shape
        dim = len(steps) - 1

        def cut(x: Tensor, first: int) -> Tensor:
            return x.detach().narrow(dim, first, steps[-1])

        now, following = (self._tensordict([cut(x, i) for x in rollout.states], steps) for i in (0, 1))
        for key, x in rollout.outputs.items():
            now.set(key, cut(x, 0))
        following.set(keys.reward, cut(rollout.reward, 1).unsqueeze(-1))
        if self.continuation_model is not None:
            now.set(keys.continuation, cut(rollout.continuation, 0).unsqueeze(-1))
            following.set(keys.continuation, cut(rollout.continuation, 1).unsqueeze(-1))
        now.set("next", following)
        now.set("lambda_target", targets.returns.unsqueeze(-1))
        now.set(keys.discount_weight, targets.weight.unsqueeze(-1))
        return now.detach()

    def _policy(self, actor: Any, features: Mapping[str, Any], steps: tuple[int, ...]) -> Policy:
        distribution = actor.get_dist(self._tensordict(features["states"], steps))
        if isinstance(distribution, (NormalPolicy, CategoricalPolicy, EvaluatedPolicy, Mapping)):
            return distribution
        if not self.use_reinforce and not distribution.has_rsample:
            wanted, guess = "one with rsample", "A choice has no derivative: set use_reinforce=True."
            got = type(distribution).__name__
            raise ValueError(checks.text("DreamerV3ActorLoss", "the actor's distribution", wanted, got, guess))
        try:
            entropy = distribution.entropy()
        except NotImplementedError:
            # Squashed distributions have no closed form.
            entropy = -distribution.log_prob(distribution.rsample())
        return EvaluatedPolicy(*(_summed(x, steps) for x in (distribution.log_prob(features["action"]), entropy)))

    def _prediction(self, network: nn.Module, name: str, states: list[Tensor], steps: tuple[int, ...]) -> Tensor:
        written = network(self._tensordict(states, steps))
        prediction = self._get(written, name, getattr(self.tensor_keys, name))
        return one_number("DreamerV3ActorLoss", name, prediction, steps)

    def _tensordict(self, states: Any, batch: tuple[int, ...]) -> TensorDictBase:
        tensordict = TensorDict({}, batch)
        for key, x in zip((self.tensor_keys.state, self.tensor_keys.belief), states, strict=False):
            tensordict.set(key, x)
        return tensordict

    def _check_knobs(self) -> None:
        function = "DreamerV3ActorLoss"
        checks.integer(function, "imagination_horizon", self.imagination_horizon, 1)
        for name in ("discount_loss", "use_reinforce", "return_normalization"):
            checks.flag(function, name, getattr(self, name))
        for name in ("gamma", "lmbda", "return_normalization_rate"):
            checks.knob(function, name, getattr(self, name), 0.0, 1.0)
        checks.knob(function, "return_normalization_min_scale", self.return_normalization_min_scale, 0.0)
        checks.knob(function, "entropy_bonus", self.entropy_bonus, float("-inf"))
        # Says what is wrong with the quantiles.
        statistics.return_range_update(
            statistics.return_range_init(), torch.zeros(1), quantiles=self.return_normalization_quantiles
        )

    def _read_keys(self) -> list[NestedKey]:
        return [self.tensor_keys.state, self.tensor_keys.belief]


def _summed(x: Tensor, steps: tuple[int, ...]) -> Tensor:
    """A log-probability or entropy of each step, also where it comes for each number of the action."""
    return x.flatten(len(steps)).sum(-1) if x.ndim > len(steps) else x
