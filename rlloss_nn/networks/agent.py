r"""DreamerV3's actor, and the agent: world model, actor and critic, to act with and to train.

Source of all: Hafner et al. 2023 (arXiv:2301.04104); danijar/dreamerv3@e3f0224 dreamerv3/agent.py ``Agent``.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from rlloss import checks
from rlloss.dreamer_v3 import DreamerV3Agent, Imagination, behaviour, noise_of
from rlloss.dreamer_v3 import imagine as imagine_with
from rlloss.policy import CategoricalPolicy, NormalPolicy, Policy, bounded_normal, categorical_policy, policy_sample
from rlloss_nn.functional import functionalize
from rlloss_nn.networks.heads import MLPHead
from rlloss_nn.networks.layers import MLP, linear, positive
from rlloss_nn.networks.loop import Loop
from rlloss_nn.networks.observations import ObservationShape
from rlloss_nn.networks.rssm import RSSMState
from rlloss_nn.networks.world_model import WorldModel


class Discrete(NamedTuple):
    """Choices as an action: one-hot floats [..., groups, classes]."""

    classes: int
    groups: int = 1


class Continuous(NamedTuple):
    """Numbers as an action: floats [..., size]."""

    size: int


#: One action, or several by name.
ActionSpace: TypeAlias = Discrete | Continuous | Mapping[str, Discrete | Continuous]


class Memory(NamedTuple):
    """What an agent remembers between two steps of an environment."""

    state: RSSMState  # [B, *]
    action: Tensor  # [B, action_dim]: the last action, flat


class Actor(nn.Module):
    r"""An MLP and linear layers to one distribution for each action.

    Source: danijar/dreamerv3@e3f0224 embodied/jax/heads.py ``MLPHead``, ``Head``; dreamerv3/configs.yaml ``policy``.

    Args:
        in_features: size of the features.
        actions: one action, or a mapping of them by name.
        layers: hidden layers.
        units: width of each.
        act: name of the activation.
        outscale: factor on the initial weights of the output layers.
        min_stddev: smallest deviation of a continuous action.
        max_stddev: largest.
        unimix: share of the uniform distribution in a discrete action; see :func:`~rlloss.policy.categorical_policy`.

    Raises:
        ValueError: if a size is not positive, or there is no action.
        TypeError: if an action is neither :class:`Discrete` nor :class:`Continuous`.

    Example:
        >>> Actor(8, {"jump": Discrete(2), "steer": Continuous(3)})(torch.zeros(5, 8))["steer"].mean.shape
        torch.Size([5, 3])
    """

    def __init__(
        self,
        in_features: int,
        actions: ActionSpace,
        *,
        layers: int = 3,
        units: int = 64,
        act: str = "silu",
        outscale: float = 0.01,
        min_stddev: float = 0.1,
        max_stddev: float = 1.0,
        unimix: float = 0.0,
    ):
        super().__init__()
        self.spaces, self.single = _spaces("Actor", actions)
        self.unimix, self.min_stddev, self.max_stddev = unimix, min_stddev, max_stddev
        self.mlp = MLP(in_features, units, layers, act)
        width = self.mlp.out_features
        self.out = nn.ModuleList(linear(width, _outputs(space), outscale=outscale) for space in self.spaces.values())

    def forward(self, features: Tensor) -> Policy:
        """[..., in_features] to the distribution of the action, or a dict of several by name."""
        checks.last_dimension("Actor", "features", features, self.mlp.in_features)
        return self.policy(self.outputs(features))

    def outputs(self, features: Tensor) -> list[Tensor]:
        """Numbers that describe the distribution of each action."""
        x = self.mlp(features)
        return [layer(x) for layer in self.out]

    def policy(self, outputs: list[Tensor]) -> Policy:
        """The distributions that :meth:`outputs` describe."""
        named = zip(self.spaces.items(), outputs, strict=True)
        policies = {name: self._policy(space, x) for (name, space), x in named}
        return policies[SINGLE] if self.single else policies

    def _policy(self, space: Discrete | Continuous, outputs: Tensor) -> NormalPolicy | CategoricalPolicy:
        if isinstance(space, Discrete):
            logits = torch.unflatten(outputs, -1, (space.groups, space.classes))
            return categorical_policy(logits, unimix=self.unimix)
        mean, stddev = outputs.chunk(2, -1)
        return bounded_normal(mean, stddev, minimum=self.min_stddev, maximum=self.max_stddev)


class Agent(nn.Module):
    r"""World model, actor and critic in one module, to act in an environment and to be trained by
    :func:`rlloss.dreamer_v3_loss`.

    Several actions enter the world model flattened and concatenated in the order of their names
    (:meth:`flatten_action`).

    Args:
        observation_shape: as :class:`WorldModel` takes it.
        actions: one action, or a mapping of them by name.
        actor_layers: hidden layers of the actor.
        critic_layers: hidden layers of the critic.
        num_value_bins: bins of the two-hot value.
        actor_unimix: share of the uniform distribution in a discrete action.
        **sizes: of the world model, such as ``**SIZES["12m"]``; actor and critic share ``units`` and ``act``.

    Raises:
        ValueError: if a size is not possible, or there is no action.
        TypeError: if an action is neither :class:`Discrete` nor :class:`Continuous`.

    Example:
        >>> agent = Agent((3,), Discrete(2), deter=16, hidden=8, stoch=4, units=8)
        >>> noise = {"latent": torch.zeros(1, 4, 4), "policy": torch.zeros(1, 1, 2)}
        >>> memory, action = agent.act(agent.initial(1), torch.zeros(1, 3), torch.tensor([True]), noise)
        >>> action.shape
        torch.Size([1, 1, 2])
    """

    def __init__(
        self,
        observation_shape: ObservationShape,
        actions: ActionSpace,
        *,
        actor_layers: int = 3,
        critic_layers: int = 3,
        num_value_bins: int = 255,
        actor_unimix: float = 0.0,
        **sizes: Any,
    ):
        super().__init__()
        self.spaces, self.single = _spaces("Agent", actions)
        self.action_dim = sum(map(_size, self.spaces.values()))
        self.world_model = WorldModel(observation_shape, self.action_dim, **sizes)
        size, shared = self.world_model.feature_size, {k: v for k, v in sizes.items() if k in ("units", "act")}
        self.actor = Actor(size, actions, layers=actor_layers, unimix=actor_unimix, **shared)
        self.critic = MLPHead(size, num_value_bins, layers=critic_layers, **shared)

    def forward(self, batch: Any) -> dict[str, Any]:
        """The same as :meth:`observe`."""
        return self.observe(batch)

    def observe(self, batch: Any) -> dict[str, Any]:
        """What :class:`WorldModel` makes of a batch of sequences, its "state" :class:`RSSMState` [B, T, *] included."""
        return with_state(self.world_model(batch))

    def imagine(self, start: RSSMState, noise: Mapping[str, Any], *, horizon: int) -> Imagination:
        """Rollouts of the actor through the world model.

        Args:
            start: [B, *].
            noise: {"dynamics": Gumbel noise [B, horizon, groups, classes], "policy": of [B, horizon + 1, ...], as
                :func:`rlloss.policy_sample` takes it}.
            horizon: number of transitions, at least 1.

        Returns:
            States and actions, [B, horizon + 1, ...] each.

        Raises:
            TypeError, ValueError: as :func:`rlloss.imagine`.
        """

        def dynamics(_: Any, state: RSSMState, action: Any, noise: Tensor) -> RSSMState:
            return self.world_model.imagine_step(state, self.flatten_action(action), noise)

        def policy(_: Any, state: RSSMState, noise: Any) -> Any:
            return policy_sample(self.policy(state), noise)

        return imagine_with(None, start, noise, dynamics=dynamics, policy=policy, horizon=horizon)

    def act(self, memory: Memory, observation: Any, is_first: Tensor, noise: Mapping[str, Any]) -> tuple[Memory, Any]:
        """What to do now.

        Args:
            memory: of the steps before; :meth:`initial` at the very first.
            observation: [B, *obs] or a mapping of them.
            is_first: bool [B], where an episode begins: the memory before it is dropped.
            noise: {"latent": Gumbel noise [B, groups, classes], "policy": as :func:`rlloss.policy_sample` takes it, [B,
                ...]}; zeros take the most likely action.

        Returns:
            ``(memory, action)``: the action as sampled, for each name [B, ...].

        Raises:
            KeyError: if noise or an observation is missing.
            TypeError, ValueError: if a tensor has another dtype or shape.
        """
        latent = checks.take("Agent.act", "noise", noise, "latent")
        tokens = self.world_model.encoder(observation)
        state, _ = self.world_model.rssm.observe_step(memory.state, tokens, memory.action, is_first, latent)
        action = policy_sample(self.policy(state), checks.take("Agent.act", "noise", noise, "policy"))
        return Memory(state, self.flatten_action(action)), action

    def policy(self, state: RSSMState) -> Policy:
        """Distribution of the action in states [..., *]."""
        policy: Policy = self.actor(self.world_model.features(*state))
        return policy

    def value(self, state: RSSMState) -> Tensor:
        """Logits [..., num_value_bins] of the value of states [..., *]."""
        logits: Tensor = self.critic(self.world_model.features(*state))
        return logits

    def initial(self, batch_size: int) -> Memory:
        """The memory before the first step: zeros."""
        state = self.world_model.rssm.initial(batch_size)
        return Memory(state, state.deter.new_zeros(batch_size, self.action_dim))

    def flatten_action(self, action: Any) -> Tensor:
        """[..., action_dim], as the world model reads it, of an action or a mapping of them by name."""
        parts = zip(self._parts(action, "Agent.flatten_action", "action"), self.spaces.values(), strict=True)
        return torch.cat([x.flatten(-2) if isinstance(space, Discrete) else x for x, space in parts], -1)

    def noise(self, *leading: int, generator: torch.Generator | None = None) -> dict[str, Any]:
        """Fresh noise for [leading] steps, as :meth:`act` takes it: "latent", and "policy" for each action."""
        like, rssm = self.world_model.rssm.core_gates.bias, self.world_model.rssm

        def draw(kind: str, *shape: int) -> Tensor:
            x = torch.empty(*leading, *shape, dtype=like.dtype, device=like.device)
            # The logarithm of an exponential variable, negated, is Gumbel distributed.
            return x.normal_(generator=generator) if kind == "normal" else -x.exponential_(generator=generator).log()

        latent = draw("gumbel", rssm.stoch, rssm.classes)
        policy = {
            name: draw("gumbel", space.groups, space.classes)
            if isinstance(space, Discrete)
            else draw("normal", space.size)
            for name, space in self.spaces.items()
        }
        return {"latent": latent, "policy": policy[SINGLE] if self.single else policy}

    def functional(
        self, *, step_backend: str | None = None, autocast: torch.dtype | None = None
    ) -> tuple[DreamerV3Agent, dict[str, dict[str, Tensor]]]:
        """``(agent, params)``, as :func:`rlloss.dreamer_v3_loss` takes them; nothing is copied.

        Args:
            step_backend: of ``torch.compile``, such as "inductor", for steps of the loops over time: with
                ``torch.compile(loss, fullgraph=True)`` around the loss one step of each is compiled, see
                :meth:`RSSM.compile_steps`, and all else is one graph without a loop. A rollout, actor included, is such
                a loop too: the ``rollout`` of the agent, to be called in place of :func:`rlloss.imagine`, which would
                be unrolled. None leaves loops to the compiler.
            autocast: dtype that matrix products of the networks are made in, such as ``torch.bfloat16``. Parameters,
                recurrent states and all outputs, and so losses, gradients and statistics, stay float32. None for none.
        """
        if step_backend is not None:
            self.world_model.rssm.compile_steps(backend=step_backend)
        model, features = self.world_model, self.world_model.features
        world_model, model_params = functionalize(model)
        critic, critic_params = functionalize(self.critic)
        reward, continuation = _part(model, "reward_head"), _part(model, "continue_head")
        actor, actor_params = functionalize(self.actor, method="outputs")
        step = _part(model, "rssm", "imagine_step")

        def dynamics(params: Any, state: RSSMState, action: Any, noise: Tensor) -> Any:
            return step(params, state, self.flatten_action(action), noise)[0]

        # What the actor puts out becomes a distribution after the cast: its deviations have float32's digits.
        cast = partial(_cast, kind=next(self.parameters()).device.type, dtype=autocast)
        outputs = cast(lambda params, state: actor(params, features(*state)))
        agent = DreamerV3Agent(
            world_model=cast(lambda params, batch: with_state(world_model(params, batch))),
            dynamics=cast(dynamics),
            reward=cast(lambda params, state: reward(params, features(*state))),
            continuation=cast(lambda params, state: continuation(params, features(*state)).squeeze(-1)),
            actor=lambda params, state: self.actor.policy(outputs(params, state)),
            critic=cast(lambda params, state: critic(params, features(*state))),
        )
        if step_backend is not None:
            agent = agent._replace(rollout=_Rollout(self, agent, step_backend))
        return agent, {"world_model": model_params, "actor": actor_params, "critic": critic_params}

    def _parts(self, named: Any, function: str, argument: str) -> list[Any]:
        """What belongs to each action, in the order of their names."""
        named = {SINGLE: named} if self.single else named
        return [checks.take(function, argument, named, name) for name in self.spaces]

    def _named(self, parts: list[Any]) -> Any:
        """The other way round: as a dict, or what belongs to the only action."""
        return parts[0] if self.single else dict(zip(self.spaces, parts, strict=True))


class _Rollout:
    """:func:`rlloss.imagine` of an agent as functions, whose steps a compiler takes for one operation."""

    def __init__(self, agent: Agent, functions: DreamerV3Agent, backend: str):
        self.agent, self.loop = agent, Loop(self.step, backend)
        self.dynamics, self.policy = behaviour(functions)
        # Network and name of each weight: all of the actor and of the RSSM, though a step reads no posterior.
        self.used = [("actor", name) for name, _ in agent.actor.named_parameters()]
        names = (name for name, _ in agent.world_model.named_parameters())
        self.used += [("world_model", name) for name in names if name.startswith("rssm.")]

    def __call__(self, params: Any, start: RSSMState, noise: Mapping[str, Any], horizon: int) -> Imagination:
        start = RSSMState(*start)
        if not torch.compiler.is_compiling():
            return imagine_with(params, start, noise, dynamics=self.dynamics, policy=self.policy, horizon=horizon)
        horizon = checks.integer("imagine", "horizon", horizon, 1)
        latent = checks.tensor("imagine", "noise['dynamics']", noise_of(noise, "dynamics", horizon, 1))
        drawn = noise_of(noise, "policy", horizon + 1, 1)
        parts = [checks.tensor("imagine", "noise['policy']", x) for x in self._parts(drawn, "noise['policy']")]
        weights = [params[network][name] for network, name in self.used]
        deter, stoch, *actions = self.loop(weights, list(start), [x[:, :-1] for x in parts], [latent])
        states = (torch.cat([x.unsqueeze(1), after], 1) for x, after in zip(start, (deter, stoch), strict=True))
        # In the last state there is an action, but no transition.
        state = RSSMState(deter[:, -1].detach(), stoch[:, -1].detach())
        last = self._parts(self.policy(params, state, tree_map(lambda x: x[:, -1], drawn)))
        actions = [torch.cat([x, y.unsqueeze(1)], 1) for x, y in zip(actions, last, strict=True)]
        return Imagination(RSSMState(*states), self.agent._named(actions))

    def step(self, weights: list[Tensor], carry: list[Tensor], drawn: list[Tensor], latent: list[Tensor]) -> Any:
        """One step, as :class:`Loop` takes it."""
        params: dict[str, dict[str, Tensor]] = {"actor": {}, "world_model": {}}
        for (network, name), weight in zip(self.used, weights, strict=True):
            params[network][name] = weight
        # As in `imagine`, the policy sees states without their gradient.
        action = self.policy(params, RSSMState(*map(torch.detach, carry)), self.agent._named(drawn))
        return list(self.dynamics(params, RSSMState(*carry), action, *latent)), self._parts(action)

    def _parts(self, named: Any, argument: str = "action") -> list[Tensor]:
        return self.agent._parts(named, "imagine", argument)


#: Name of an action that has none.
SINGLE = "action"


def with_state(outputs: dict[str, Any]) -> dict[str, Any]:
    """Outputs of the world model, with the latent state as one entry."""
    return {**outputs, "state": RSSMState(outputs["deter"], outputs["stoch"])}


def _part(module: nn.Module, name: str, method: str = "forward") -> Callable[..., Any]:
    """A submodule as a function of the whole module's parameters: to put in all of them would take longer."""
    prefix = f"{name}."
    apply, _ = functionalize(module.get_submodule(name), method=method)

    def apply_part(params: Mapping[str, Tensor], *inputs: Any) -> Any:
        return apply(
            {key.removeprefix(prefix): params[key] for key in params.keys() if key.startswith(prefix)}, *inputs
        )

    return apply_part


def _cast(function: Callable[..., Any], *, kind: str, dtype: torch.dtype | None) -> Callable[..., Any]:
    """``function`` under autocast on a kind of device, what it puts out in float32."""
    if dtype is None:
        return function

    def call(*inputs: Any) -> Any:
        with torch.autocast(kind, dtype):
            outputs = function(*inputs)
        return tree_map(lambda x: x.float() if x.dtype == dtype else x, outputs)

    return call


def _spaces(function: str, actions: ActionSpace) -> tuple[dict[str, Discrete | Continuous], bool]:
    """The actions in the order of their names, and whether there is but one without a name."""
    single = not isinstance(actions, Mapping)
    spaces: dict[str, Any] = dict(sorted(actions.items())) if isinstance(actions, Mapping) else {SINGLE: actions}
    if not spaces:
        raise ValueError(checks.text(function, "actions", "at least one action", "none"))
    for name, space in spaces.items():
        if not isinstance(space, (Discrete, Continuous)):
            wanted = "a Discrete, a Continuous or a mapping of them"
            raise TypeError(checks.text(function, "actions" if single else name, wanted, checks.describe(space)))
        positive(function, **space._asdict())
    return spaces, single


def _size(space: Discrete | Continuous) -> int:
    return space.groups * space.classes if isinstance(space, Discrete) else space.size


def _outputs(space: Discrete | Continuous) -> int:
    """How many numbers describe the distribution."""
    return _size(space) * (1 if isinstance(space, Discrete) else 2)
