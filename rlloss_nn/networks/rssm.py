r"""Recurrent state-space model: the dynamics of DreamerV3's world model.

Source of all: Hafner et al. 2023 (arXiv:2301.04104), section "World model learning"; danijar/dreamerv3@e3f0224
dreamerv3/rssm.py ``RSSM``.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from rlloss import checks
from rlloss.categorical import straight_through_one_hot, unimix
from rlloss_nn.functional import functionalize
from rlloss_nn.networks.layers import MLP, BlockLinear, RMSNorm, activation, divisible, exact_shape, linear, positive
from rlloss_nn.networks.loop import Loop


class RSSMState(NamedTuple):
    """What the model remembers between two steps."""

    deter: Tensor  # [B, deter], float: the recurrent state
    stoch: Tensor  # [B, groups, classes], float: a one-hot sample for each group


#: Parameters that a step of each loop reads, by the beginnings of their names.
CORE = ("deter_in.", "stoch_in.", "core_")
OBSERVING = (*CORE, "posterior_norm.", "posterior_mlp.", "posterior_logits.")
IMAGINING = (*CORE, "action_in.", "prior_")


class Observed(NamedTuple):
    """What :meth:`RSSM.observe` returns."""

    deter: Tensor  # [B, T, deter]
    stoch: Tensor  # [B, T, groups, classes], sampled from the posterior
    prior_logits: Tensor  # [B, T, groups, classes], before unimix
    posterior_logits: Tensor  # [B, T, groups, classes], before unimix
    state: RSSMState  # after the last step


class Imagined(NamedTuple):
    """What :meth:`RSSM.imagine` returns."""

    deter: Tensor  # [B, L, deter]
    stoch: Tensor  # [B, L, groups, classes], sampled from the prior
    prior_logits: Tensor  # [B, L, groups, classes], before unimix
    state: RSSMState  # after the last step


class RSSM(nn.Module):
    r"""Recurrent state-space model with a block GRU and categorical latents.

    .. math:: h_t = \mathrm{core}(h_{t-1}, z_{t-1}, a_{t-1}), \quad \hat z_t \sim \mathrm{prior}(h_t), \quad
              z_t \sim \mathrm{posterior}(h_t, x_t)

    ``action[:, t]`` is the action taken *before* ``tokens[:, t]`` was seen; where ``is_first`` it is ignored, together
    with the state before it. Discrete actions come in one-hot, as floats.

    Nothing is drawn inside: ``noise`` is Gumbel noise, shaped like the logits (``rlloss.random.gumbel``); zeros take
    the mode. The logits returned are those of the networks; sampling mixes the uniform distribution in, and so must
    the loss (``unimix``).

    Args:
        action_dim: size of an action.
        embed_dim: size of the tokens, an encoded observation.
        deter: size of the recurrent state, divisible by ``blocks``.
        hidden: width of all other layers.
        stoch: number of categorical variables ("groups").
        classes: classes of each.
        blocks: blocks of the recurrent layers.
        dyn_layers: hidden layers of the recurrent step.
        obs_layers: hidden layers of the posterior, at least 1.
        img_layers: hidden layers of the prior.
        unimix: share of the uniform distribution in what is sampled from.
        act: name of the activation.
        absolute: whether the posterior sees the tokens only, without the recurrent state.

    Raises:
        ValueError: if a size is not positive, ``blocks`` does not divide ``deter`` or ``act`` is unknown.

    Example:
        >>> rssm = RSSM(2, 10, deter=16, hidden=8, stoch=3, classes=4)
        >>> action, is_first = torch.zeros(5, 7, 2), torch.zeros(5, 7, dtype=torch.bool)
        >>> outputs = rssm.observe(torch.zeros(5, 7, 10), action, is_first, torch.zeros(5, 7, 3, 4))
        >>> outputs.deter.shape, outputs.prior_logits.shape
        (torch.Size([5, 7, 16]), torch.Size([5, 7, 3, 4]))
    """

    def __init__(
        self,
        action_dim: int,
        embed_dim: int,
        *,
        deter: int = 512,
        hidden: int = 64,
        stoch: int = 32,
        classes: int = 4,
        blocks: int = 8,
        dyn_layers: int = 1,
        obs_layers: int = 1,
        img_layers: int = 2,
        unimix: float = 0.01,
        act: str = "silu",
        absolute: bool = False,
    ):
        super().__init__()
        positive("RSSM", action_dim=action_dim, embed_dim=embed_dim, hidden=hidden, stoch=stoch, classes=classes)
        positive("RSSM", obs_layers=obs_layers)
        divisible("RSSM", "deter", deter, "blocks", blocks)
        checks.within("RSSM", "dyn_layers", dyn_layers, 0)
        checks.within("RSSM", "img_layers", img_layers, 0)
        checks.within("RSSM", "unimix", unimix, 0.0, 1.0)
        self.action_dim, self.embed_dim, self.deter = action_dim, embed_dim, deter
        self.stoch, self.classes, self.blocks = stoch, classes, blocks
        self.unimix, self.absolute = unimix, absolute
        self.act = activation("RSSM", act)

        self.deter_in = MLP(deter, hidden, 1, act)
        self.stoch_in = MLP(stoch * classes, hidden, 1, act)
        self.action_in = MLP(action_dim, hidden, 1, act)
        sizes = [deter + 3 * hidden * blocks] + [deter] * dyn_layers
        self.core_layers = nn.ModuleList(BlockLinear(sizes[i], deter, blocks) for i in range(dyn_layers))
        self.core_norms = nn.ModuleList(RMSNorm(deter) for _ in range(dyn_layers))
        self.core_gates = BlockLinear(sizes[-1], 3 * deter, blocks)

        self.prior_mlp = MLP(deter, hidden, img_layers, act)
        self.prior_logits = linear(self.prior_mlp.out_features, stoch * classes)
        self.posterior_in = linear((0 if absolute else deter) + embed_dim, hidden)
        self.posterior_norm = RMSNorm(hidden)
        self.posterior_mlp = MLP(hidden, hidden, obs_layers - 1, act)
        self.posterior_logits = linear(hidden, stoch * classes)
        self.compiled: tuple[Loop, Loop] | None = None

    def compile_steps(self, *, backend: str = "inductor") -> None:
        """Let a compiler take the loops of :meth:`observe` and :meth:`imagine` for one operation each (:class:`Loop`).

        A compiler that sees a loop over time unrolls it, which takes minutes for 64 steps. So, one step is compiled, at
        its first call, for all of them, and what is compiled around it is one graph (``fullgraph``). Where nothing is
        compiled around it, all is as before, ``torch.func`` transforms included; so it is in a copy.

        Args:
            backend: as ``torch.compile`` takes it.
        """
        self.compiled = self._step("_observe", OBSERVING, backend), self._step("_imagine_action", IMAGINING, backend)

    def _step(self, method: str, names: tuple[str, ...], backend: str) -> Loop:
        """A method for one step as a function of its weights: those of ``names``, then what else it takes as one."""
        apply, own = functionalize(self, method=method)
        used = [name for name in own if name.startswith(names)]

        def step(weights: list[Tensor], carry: list[Tensor], *inputs: list[Tensor]) -> Any:
            params = {**own, **dict(zip(used, weights, strict=False))}
            rest = [x for part in inputs for x in part] + weights[len(used) :]
            state, logits = apply(params, RSSMState(*carry), *rest)
            return list(state), [logits]

        return Loop(step, backend)

    def _weights(self, names: tuple[str, ...]) -> list[Tensor]:
        return [p for name, p in self.named_parameters() if name.startswith(names)]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "compiled": None}

    def forward(
        self, tokens: Tensor, action: Tensor, is_first: Tensor, noise: Tensor, state: RSSMState | None = None
    ) -> Observed:
        """The same as :meth:`observe`."""
        return self.observe(tokens, action, is_first, noise, state)

    def initial(self, batch_size: int) -> RSSMState:
        """The state before the first step: zeros."""
        like = self.core_gates.bias
        return RSSMState(like.new_zeros(batch_size, self.deter), like.new_zeros(batch_size, self.stoch, self.classes))

    def observe(
        self, tokens: Tensor, action: Tensor, is_first: Tensor, noise: Tensor, state: RSSMState | None = None
    ) -> Observed:
        r"""Follow a batch of sequences, correcting each step by what was seen.

        Args:
            tokens: [B, T, embed_dim], encoded observations; T at least 1.
            action: [B, T, action_dim], the action before each observation.
            is_first: bool [B, T], where an episode begins: state and action before it are replaced by zeros, so that
                not even a NaN in them reaches a value or gradient.
            noise: [B, T, groups, classes], Gumbel noise for the samples of the posterior.
            state: state before the first step; None for :meth:`initial`.

        Returns:
            Everything over [B, T], and the last state.

        Raises:
            TypeError: if an argument has another dtype.
            ValueError: if an argument has another shape.
        """
        function = "RSSM.observe"
        _is_first(function, is_first, ("B", "T"))
        tokens = self._tokens(function, tokens, is_first.shape)
        action = self._action(function, action, is_first.shape)
        noise = self._noise(function, noise, is_first.shape)
        batch_size = is_first.shape[0]
        state = self.initial(batch_size) if state is None else self._state(function, state, batch_size)

        # What does not depend on the state is computed for all steps at once, outside the loop.
        action_inputs = self._action_inputs(torch.where(is_first.unsqueeze(-1), 0.0, action))
        deter_weight, token_weight = self._posterior_weights()
        token_inputs = functional.linear(tokens, token_weight, self.posterior_in.bias)

        if self.compiled is not None and torch.compiler.is_compiling():
            weights = [*self._weights(OBSERVING), deter_weight]
            loop = self.compiled[0](weights, list(state), [action_inputs, token_inputs], [is_first, noise])
            deters, stochs, posterior_logits = loop
            state = RSSMState(deters[:, -1], stochs[:, -1])
            return Observed(deters, stochs, self.prior(deters), posterior_logits, state)
        states, logits = [], []
        inputs = [x.unbind(1) for x in (action_inputs, token_inputs, is_first, noise)]
        for action_input, token_input, is_first_t, noise_t in zip(*inputs, strict=True):
            state, logits_t = self._observe(state, action_input, token_input, is_first_t, noise_t, deter_weight)
            states.append(state)
            logits.append(logits_t)
        deters, stochs = (torch.stack(x, 1) for x in zip(*states, strict=True))
        return Observed(deters, stochs, self.prior(deters), torch.stack(logits, 1), state)

    def observe_step(
        self, state: RSSMState, tokens: Tensor, action: Tensor, is_first: Tensor, noise: Tensor
    ) -> tuple[RSSMState, Tensor]:
        """One step of :meth:`observe`, for acting in an environment.

        Args:
            state: state before the step.
            tokens: [B, embed_dim].
            action: [B, action_dim], the action before the observation.
            is_first: bool [B].
            noise: [B, groups, classes].

        Returns:
            ``(state, posterior_logits)``.

        Raises:
            TypeError: if an argument has another dtype.
            ValueError: if an argument has another shape.
        """
        function = "RSSM.observe_step"
        _is_first(function, is_first, ("B",))
        tokens = self._tokens(function, tokens, is_first.shape)
        action = self._action(function, action, is_first.shape)
        noise = self._noise(function, noise, is_first.shape)
        state = _reset(self._state(function, state, is_first.shape[0]), is_first)
        deter = self._core(state, self._action_inputs(torch.where(is_first.unsqueeze(-1), 0.0, action)))
        logits = self.posterior(deter, tokens)
        return RSSMState(deter, self._sample(logits, noise)), logits

    def imagine(self, state: RSSMState, action: Tensor, noise: Tensor) -> Imagined:
        """Predict what a sequence of actions leads to, without seeing anything.

        Args:
            state: state to start from.
            action: [B, L, action_dim], L at least 1: the first leads from ``state`` to the first prediction.
            noise: [B, L, groups, classes], Gumbel noise for the samples of the prior.

        Returns:
            Everything over [B, L], and the last state.

        Raises:
            TypeError: if an argument has another dtype.
            ValueError: if an argument has another shape.
        """
        function = "RSSM.imagine"
        action = self._action(function, action, ("B", "L"))
        noise = self._noise(function, noise, action.shape[:2])
        state = self._state(function, state, action.shape[0])

        if self.compiled is not None and torch.compiler.is_compiling():
            deters, stochs, all_logits = self.compiled[1](self._weights(IMAGINING), list(state), [action], [noise])
            return Imagined(deters, stochs, all_logits, RSSMState(deters[:, -1], stochs[:, -1]))
        states, logits = [], []
        action_inputs = self._action_inputs(action)
        for action_input, noise_t in zip(action_inputs.unbind(1), noise.unbind(1), strict=True):
            state, logits_t = self._imagine(state, action_input, noise_t)
            states.append(state)
            logits.append(logits_t)
        deters, stochs = (torch.stack(x, 1) for x in zip(*states, strict=True))
        return Imagined(deters, stochs, torch.stack(logits, 1), state)

    def imagine_step(self, state: RSSMState, action: Tensor, noise: Tensor) -> tuple[RSSMState, Tensor]:
        """One step of :meth:`imagine`, for actions that depend on the state.

        Args:
            state: state before the step.
            action: [B, action_dim].
            noise: [B, groups, classes].

        Returns:
            ``(state, prior_logits)``.

        Raises:
            TypeError: if an argument has another dtype.
            ValueError: if an argument has another shape.
        """
        function = "RSSM.imagine_step"
        action = self._action(function, action, ("B",))
        noise = self._noise(function, noise, action.shape[:1])
        state = self._state(function, state, action.shape[0])
        return self._imagine_action(state, action, noise)

    def core(self, state: RSSMState, action: Tensor) -> Tensor:
        """The deterministic step: a state and the action [B, action_dim] after it to the next deter [B, deter]."""
        action = self._action("RSSM.core", action, ("B",))
        return self._core(self._state("RSSM.core", state, action.shape[0]), self._action_inputs(action))

    def prior(self, deter: Tensor) -> Tensor:
        """Logits [..., groups, classes] of the latent that follows from the recurrent state [..., deter] alone."""
        checks.last_dimension("RSSM.prior", "deter", deter, self.deter)
        logits: Tensor = self.prior_logits(self.prior_mlp(deter))
        return torch.unflatten(logits, -1, (self.stoch, self.classes))

    def posterior(self, deter: Tensor, tokens: Tensor) -> Tensor:
        """Logits [..., groups, classes] of the latent, given deter [..., deter] and tokens [..., embed_dim]."""
        checks.last_dimension("RSSM.posterior", "deter", deter, self.deter)
        checks.last_dimension("RSSM.posterior", "tokens", tokens, self.embed_dim)
        deter_weight, token_weight = self._posterior_weights()
        token_input = functional.linear(tokens, token_weight, self.posterior_in.bias)
        return self._posterior(deter, token_input, deter_weight)

    def _core(self, state: RSSMState, action_input: Tensor) -> Tensor:
        inputs = torch.cat([self.deter_in(state.deter), self.stoch_in(state.stoch.flatten(-2)), action_input], -1)
        deter = torch.unflatten(state.deter, -1, (self.blocks, self.deter // self.blocks))
        shared = inputs.unsqueeze(-2).expand(*deter.shape[:-1], inputs.shape[-1])
        x = torch.cat([deter, shared], -1).flatten(-2)
        for layer, norm in zip(self.core_layers, self.core_norms, strict=True):
            x = self.act(norm(layer(x)))
        gates = torch.unflatten(self.core_gates(x), -1, (self.blocks, 3, self.deter // self.blocks))
        reset, candidate, update = gates.unbind(-2)
        candidate = torch.tanh(torch.sigmoid(reset) * candidate)
        # A gate that starts mostly closed lets the state remember from the first update on.
        update = torch.sigmoid(update - 1)
        following: Tensor = update * candidate + (1 - update) * deter
        return following.flatten(-2)

    def _observe(
        self,
        state: RSSMState,
        action_input: Tensor,
        token_input: Tensor,
        is_first: Tensor,
        noise: Tensor,
        deter_weight: Tensor,
    ) -> tuple[RSSMState, Tensor]:
        """A step of the loop over time: all that depends on the state."""
        deter = self._core(_reset(state, is_first), action_input)
        logits = self._posterior(deter, token_input, deter_weight)
        return RSSMState(deter, self._sample(logits, noise)), logits

    def _imagine(self, state: RSSMState, action_input: Tensor, noise: Tensor) -> tuple[RSSMState, Tensor]:
        """A step of the loop over actions."""
        deter = self._core(state, action_input)
        logits = self.prior(deter)
        return RSSMState(deter, self._sample(logits, noise)), logits

    def _imagine_action(self, state: RSSMState, action: Tensor, noise: Tensor) -> tuple[RSSMState, Tensor]:
        return self._imagine(state, self._action_inputs(action), noise)

    def _action_inputs(self, action: Tensor) -> Tensor:
        # An action outside [-1, 1] enters as -1 or 1, but keeps a gradient, which a clamp would not.
        inputs: Tensor = self.action_in(action / action.detach().abs().clamp(min=1))
        return inputs

    def _posterior_weights(self) -> tuple[Tensor, Tensor]:
        """The first posterior layer reads [deter, tokens]; its two halves, so that the tokens' runs outside the loop.

        They stay one parameter, as in the source: what acts on whole tensors (adaptive clipping) sees the same norm.
        """
        weight = self.posterior_in.weight
        return weight[:, : -self.embed_dim], weight[:, -self.embed_dim :]

    def _posterior(self, deter: Tensor, token_input: Tensor, deter_weight: Tensor) -> Tensor:
        x = token_input if self.absolute else token_input + functional.linear(deter, deter_weight)
        x = self.act(self.posterior_norm(x))
        logits: Tensor = self.posterior_logits(self.posterior_mlp(x))
        return torch.unflatten(logits, -1, (self.stoch, self.classes))

    def _sample(self, logits: Tensor, noise: Tensor) -> Tensor:
        # In the dtype of the state, not of the logits: under autocast all steps start from a state of one kind.
        return straight_through_one_hot(unimix(logits, self.unimix), noise).to(self.core_gates.bias.dtype)

    def _tokens(self, function: str, tokens: Tensor, leading: Sequence[int]) -> Tensor:
        tokens = checks.floating(function, "tokens", tokens)
        exact_shape(function, "tokens", tokens, (*leading, self.embed_dim))
        return tokens.to(self.core_gates.bias.dtype)

    def _action(self, function: str, action: Tensor, leading: Sequence[int | str]) -> Tensor:
        action = checks.floating(function, "action", action, "Discrete actions come in one-hot, as floats.")
        exact_shape(function, "action", action, (*leading, self.action_dim))
        if action.ndim == 3 and action.shape[1] == 0:
            raise ValueError(checks.text(function, "action", "of at least one step", checks.describe(action)))
        return action.to(self.core_gates.bias.dtype)

    def _noise(self, function: str, noise: Tensor, leading: Sequence[int]) -> Tensor:
        noise = checks.floating(function, "noise", noise)
        exact_shape(function, "noise", noise, (*leading, self.stoch, self.classes))
        return noise

    def _state(self, function: str, state: RSSMState, batch_size: int) -> RSSMState:
        if not isinstance(state, tuple) or len(state) != 2:
            raise TypeError(checks.text(function, "state", "an RSSMState(deter, stoch)", checks.describe(state)))
        deter = checks.floating(function, "state.deter", state[0])
        stoch = checks.floating(function, "state.stoch", state[1])
        exact_shape(function, "state.deter", deter, (batch_size, self.deter))
        exact_shape(function, "state.stoch", stoch, (batch_size, self.stoch, self.classes))
        dtype = self.core_gates.bias.dtype
        return RSSMState(deter.to(dtype), stoch.to(dtype))


def _reset(state: RSSMState, is_first: Tensor) -> RSSMState:
    """Zeros where an episode begins; selected, not multiplied, so that a stale NaN is gone."""
    deter = torch.where(is_first.reshape(-1, 1), 0.0, state.deter)
    return RSSMState(deter, torch.where(is_first.reshape(-1, 1, 1), 0.0, state.stoch))


def _is_first(function: str, is_first: Tensor, leading: Sequence[str]) -> None:
    checks.boolean(function, "is_first", is_first)
    guess = "Did you mean is_first.squeeze(-1)?" if is_first.shape[len(leading) :] == (1,) else ""
    exact_shape(function, "is_first", is_first, leading, guess)
