"""Random network distillation as torch modules: the predictor's loss, and the intrinsic reward."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase, is_tensor_collection
from tensordict.nn import TensorDictModuleBase, dispatch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from rlloss import checks
from rlloss.rnd import rnd_error_and_target_features, rnd_loss, rnd_reward, rnd_reward_stats_update, rows_drawn
from rlloss.statistics import DiscountedSum
from rlloss.types import ApplyFn
from rlloss_nn.functional import functionalize
from rlloss_nn.loss_module import LossModule, NestedKey, check_network, entry, is_key
from rlloss_nn.statistics import RunningMeanStd


class RNDLoss(LossModule):
    r"""Loss that trains the predictor of random network distillation.

    .. math:: L = \frac{1}{|I|} \sum_{i \in I} \frac{1}{K} \sum_k \left(\hat f_k(z_i) - f_k(z_i)\right)^2

    over ceil(update_fraction * B) rows I, drawn without repetition from torch's global generator at each call. Both
    networks run on those rows only, in the dtype of their own parameters. The function is :func:`rlloss.rnd_loss`.

    Source: Burda et al. 2018 (arXiv:1810.12894); names and defaults as torchrl 0.14.1 ``RNDLoss``.

    Args:
        predictor_network: observations [B, *obs] -> features [B, K]; trained.
        target_network: likewise; its parameters are frozen and it is kept in eval mode.
        obs_rms: statistics the observations are normalised with: any object with ``mean`` and ``var``, usually that of
            :class:`RNDReward`. None: no normalisation; uint8 images become floats in [0, 1].
        obs_clip: normalised observations are clipped to [-obs_clip, obs_clip].
        reduction: "mean", "sum" or "none": [*batch] with zeros where a sample was not drawn.
        update_fraction: share of the batch that is drawn, in [0, 1].
        target_features_key: where :class:`RNDReward` wrote the target's features of these observations, so that the
            target network need not run again. They belong to the statistics before the rollout, while the predictor
            sees the observations by ``obs_rms`` as it is at the call: exactly the loss without reuse where the
            statistics have not moved in between, and close to it once they hardly move. None: the target network runs.

    The observations are read under ``("next", "observation")``; ``set_keys(observation=...)`` changes that. All
    dimensions of the TensorDict's batch size count as samples; where it has none, the first of the observation does.

    Raises:
        ValueError: if ``update_fraction`` is outside [0, 1], ``obs_clip`` is negative, ``reduction`` is unknown or the
            networks share a parameter, or ``target_features_key`` is no key; at the call, if the features do not fit.
        TypeError: if ``update_fraction`` is not a number or a network no module.
        KeyError: at the call, if the observation is missing, or the features that are to be reused.

    Example:
        >>> predictor = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64))
        >>> target = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64))
        >>> loss = RNDLoss(predictor, target)
        >>> batch = TensorDict({"next": {"observation": torch.randn(32, 4)}}, [32])
        >>> loss(batch)["loss_predictor"].backward()
    """

    @dataclass
    class _AcceptedKeys:
        observation: NestedKey = ("next", "observation")

    default_keys = _AcceptedKeys
    tensor_keys: _AcceptedKeys
    out_keys = ["loss_predictor"]  # noqa: RUF012  (a ClassVar would hide it from `dispatch`)

    def __init__(
        self,
        predictor_network: nn.Module,
        target_network: nn.Module,
        *,
        obs_rms: Any | None = None,
        obs_clip: float = 5.0,
        reduction: str = "mean",
        update_fraction: float = 0.25,
        target_features_key: NestedKey | None = None,
    ) -> None:
        super().__init__()
        if isinstance(update_fraction, Tensor):
            guess = "The number of rows cannot depend on the value of a tensor."
            raise TypeError(checks.text("RNDLoss", "update_fraction", "a number", "a tensor", guess))
        checks.within("RNDLoss", "update_fraction", update_fraction, 0.0, 1.0)
        checks.within("RNDLoss", "obs_clip", obs_clip, 0.0, math.inf)
        checks.option("RNDLoss", "reduction", reduction, ("mean", "sum", "none"))
        _key_or_none("RNDLoss", target_features_key, [self.tensor_keys.observation])
        _freeze_target("RNDLoss", predictor_network, target_network)
        self.predictor_network = predictor_network
        self.target_network = target_network
        self.obs_rms = obs_rms
        self.obs_clip = obs_clip
        self.reduction = reduction
        self.update_fraction = update_fraction
        self.target_features_key = target_features_key

    def train(self, mode: bool = True) -> "RNDLoss":
        """Switch the predictor's mode; the target stays in eval mode, or dropout in it would move the goal."""
        super().train(mode)
        self.target_network.eval()
        return self

    def functional(self) -> tuple[Callable[..., Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """``(loss_fn, pred_params, target_params)``.

        ``loss_fn(pred_params, target_params, batch, key_mask=None, target_features=None)`` is :func:`rlloss.rnd_loss`
        with this module's networks and settings; the batch is a tensor of observations or a TensorDict, and nothing is
        drawn: which samples count is up to ``key_mask``, for instance :func:`rlloss.rnd_key_mask`. For a TensorDict of
        several batch dimensions, rows count through all of them, and a bool mask and features have them in front.
        Features that are not handed in are read from the TensorDict where this module has a ``target_features_key``.
        """
        predictor, pred_params = functionalize(self.predictor_network)
        target, target_params = functionalize(self.target_network)

        def loss_fn(
            pred_params: Any,
            target_params: Any,
            batch: Any,
            key_mask: Tensor | None = None,
            target_features: Tensor | None = None,
        ) -> Tensor:
            params, networks = (pred_params, target_params), (predictor, target)
            if not is_tensor_collection(batch):
                if target_features is None and self.target_features_key is not None:
                    wanted, guess = "handed in with a batch that is no TensorDict", "This loss never runs the target."
                    raise ValueError(checks.text("RNDLoss", "target_features", wanted, "None", guess))
                return self._loss(params, batch, key_mask, networks, target_features)
            samples, leading = self._samples(batch)
            if isinstance(key_mask, Tensor) and key_mask.dtype == torch.bool:
                checks.same_shape("RNDLoss", "key_mask", key_mask, "the batch", leading)
                key_mask = key_mask.reshape(-1)
            features = self._features(batch, leading, target_features)
            return self._unflatten(self._loss(params, samples, key_mask, networks, features), leading)

        return loss_fn, pred_params, target_params

    def _of_tensordict(self, tensordict: TensorDictBase) -> TensorDictBase:
        samples, leading = self._samples(tensordict)
        networks = _run(self.predictor_network), _run(self.target_network)
        params = list(self.predictor_network.parameters()), list(self.target_network.parameters())
        loss = self._loss(params, samples, self._draw(samples), networks, self._features(tensordict, leading))
        return TensorDict({"loss_predictor": self._unflatten(loss, leading)}, [])

    def _loss(
        self,
        params: tuple[Any, Any],
        batch: Any,
        key_mask: Tensor | None,
        networks: tuple[ApplyFn, ApplyFn],
        target_features: Tensor | None,
    ) -> Tensor:
        _to_eval(self.target_network)
        predictor, target = map(_in_dtype_of_params, networks)
        return rnd_loss(
            *params,
            batch,
            key_mask,
            predictor=predictor,
            target=target,
            obs_stats=self.obs_rms,
            obs_clip=self.obs_clip,
            reduction=self.reduction,
            target_features=target_features,
        )

    def _samples(self, tensordict: TensorDictBase) -> tuple[Any, tuple[int, ...]]:
        """The observations [samples, *obs], and the batch dimensions that were flattened."""
        observation = self._get(tensordict, "observation", self.tensor_keys.observation)
        leading = tuple(tensordict.batch_size)
        if not leading and is_tensor_collection(observation):
            wanted = "one with a batch size, where the observation is a TensorDict"
            raise ValueError(checks.text("RNDLoss", "tensordict", wanted, "batch size []"))
        if not leading and observation.ndim > 1:
            leading = tuple(observation.shape[:1])
        return observation.reshape(math.prod(leading), *observation.shape[len(leading) :]), leading

    def _features(self, tensordict: TensorDictBase, leading: tuple[int, ...], features: Any = None) -> Tensor | None:
        """The target's features [samples, ..., K], where they are handed in or have a key."""
        key = self.target_features_key
        if features is None:
            if key is None:
                return None
            features = entry("RNDLoss", tensordict, key, "RNDReward(..., target_features_key=...) writes them.")
        known = checks.tensor("RNDLoss", "target_features", features)
        checks.leading_shape("RNDLoss", "target_features", known, "the batch", leading)
        return known.reshape(math.prod(leading), *known.shape[len(leading) :])

    def _unflatten(self, loss: Tensor, leading: tuple[int, ...]) -> Tensor:
        return loss.reshape((*leading, *loss.shape[1:])) if self.reduction == "none" else loss

    def _draw(self, samples: Any) -> Tensor | None:
        if self.update_fraction == 1:
            return None
        size, device = samples.shape[0], tree_flatten(samples)[0][0].device
        return torch.randperm(size, device=device)[: rows_drawn(size, self.update_fraction)]

    def _read_keys(self) -> list[NestedKey]:
        features = [] if self.target_features_key is None else [self.target_features_key]
        return [self.tensor_keys.observation, *features]


class RNDReward(TensorDictModuleBase):  # type: ignore[misc]
    r"""Intrinsic reward of random network distillation, with both running statistics in buffers.

    .. math:: r = \frac{e}{\sqrt{\mathrm{Var}[\textstyle\sum_{k \ge 0} \gamma^k e_{t-k}]}}

    In train mode a call follows the author's order: the bonus e is computed with the old observation statistics,
    which then take in the observations; the statistics of the discounted sum of the bonus take in the new sums; the
    bonus is divided by their standard deviation. In eval mode no statistic moves. The functions are
    :func:`rlloss.rnd_error_and_target_features`, :func:`rlloss.rnd_reward_stats_update` and
    :func:`rlloss.rnd_reward`.

    Source: Burda et al. 2018 (arXiv:1810.12894), section 2.4; openai/random-network-distillation@f75c0f1 ppo_agent.py
    ``PpoAgent.update``.

    Args:
        predictor_network: observations [N, *obs] -> features [N, K].
        target_network: likewise; its parameters are frozen and it is kept in eval mode.
        observation_shape: of one observation; statistics are kept for each of its entries.
        env_shape: of the parallel environments, ``()`` for one. A TensorDict holds one step of them, [*env_shape], or
            a piece of their trajectories, [*env_shape, T].
        in_keys: where the observations are, by default ``("next", "observation")``.
        out_keys: where the reward goes, by default ``("next", "intrinsic_reward")``, of shape [*batch, 1].
        discount: gamma of the intrinsic reward, in [0, 1].
        obs_clip: normalised observations are clipped to [-obs_clip, obs_clip].
        target_features_key: where the target's features go, [*batch, K], for the same argument of :class:`RNDLoss`.
            None: nowhere.

    Share the observation statistics with the loss: ``RNDLoss(predictor, target, obs_rms=reward.obs_rms)``.

    Raises:
        ValueError: if ``discount`` is outside [0, 1], ``obs_clip`` is negative, ``in_keys`` or ``out_keys`` are not
            a list of one key, ``target_features_key`` is no key or one of theirs, or the networks share a parameter; at
            the call, if the observation does not fit ``env_shape`` and ``observation_shape``.
        TypeError: if a network is no module, or a shape not a tuple of ints.
        KeyError: at the call, if the observation is missing.

    Example:
        >>> reward = RNDReward(nn.Linear(4, 8), nn.Linear(4, 8), observation_shape=(4,), env_shape=(2,))
        >>> td = reward(TensorDict({"next": {"observation": torch.randn(2, 5, 4)}}, [2, 5]))
        >>> td["next", "intrinsic_reward"].shape
        torch.Size([2, 5, 1])
    """

    discounted_sum: Tensor

    def __init__(
        self,
        predictor_network: nn.Module,
        target_network: nn.Module,
        *,
        observation_shape: Sequence[int],
        env_shape: Sequence[int] = (),
        in_keys: Sequence[NestedKey] = (("next", "observation"),),
        out_keys: Sequence[NestedKey] = (("next", "intrinsic_reward"),),
        discount: float = 0.99,
        obs_clip: float = 5.0,
        target_features_key: NestedKey | None = None,
    ) -> None:
        super().__init__()
        checks.within("RNDReward", "discount", discount, 0.0, 1.0)
        checks.within("RNDReward", "obs_clip", obs_clip, 0.0, math.inf)
        self.in_keys, self.out_keys = _one_key("in_keys", in_keys), _one_key("out_keys", out_keys)
        # Fixed, while `out_keys` are what `select_out_keys` leaves of them.
        self._written = self.out_keys + _key_or_none("RNDReward", target_features_key, [*self.in_keys, *self.out_keys])
        self.out_keys = list(self._written)
        observation_shape = checks.shape("RNDReward", "observation_shape", observation_shape)
        env_shape = checks.shape("RNDReward", "env_shape", env_shape)
        _freeze_target("RNDReward", predictor_network, target_network)
        self.predictor_network = predictor_network
        self.target_network = target_network
        self.obs_rms = RunningMeanStd(observation_shape)
        self.reward_rms = RunningMeanStd(())
        self.register_buffer("discounted_sum", torch.zeros(env_shape))
        self.discount = discount
        self.obs_clip = obs_clip

    def train(self, mode: bool = True) -> "RNDReward":
        """Switch whether statistics move; the target stays in eval mode."""
        super().train(mode)
        self.target_network.eval()
        return self

    @dispatch(auto_batch_size=False)  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the intrinsic reward into ``tensordict``, and the target's features where they have a key."""
        observation = entry("RNDReward", tensordict, self.in_keys[0])
        steps = self._steps(observation)
        error, features = self._error(observation, steps)
        sums, stats = DiscountedSum(self.discounted_sum), self.reward_rms.state
        if self.training:
            envs = self.discounted_sum.shape
            sums, stats = rnd_reward_stats_update(
                sums, stats, error.reshape(*envs, math.prod(steps[len(envs) :])), discount=self.discount
            )
        written = rnd_reward(stats, error).unsqueeze(-1), features
        for key, value in zip(self._written, written, strict=False):
            tensordict.set(key, value)
        # Last, so that a call that fails leaves the statistics as they were.
        if self.training:
            self.obs_rms.update(observation)
            self.discounted_sum.copy_(sums.value)
            self.reward_rms.load_state(stats)
        return tensordict

    def _error(self, observation: Tensor, steps: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        _to_eval(self.target_network)
        error, features = rnd_error_and_target_features(
            list(self.predictor_network.parameters()),
            list(self.target_network.parameters()),
            observation.reshape(math.prod(steps), *self.obs_rms.mean.shape),
            predictor=_in_dtype_of_params(_run(self.predictor_network)),
            target=_in_dtype_of_params(_run(self.target_network)),
            obs_stats=self.obs_rms,
            obs_clip=self.obs_clip,
        )
        return error.reshape(steps), features.reshape(*steps, *features.shape[1:])

    def _steps(self, observation: Tensor) -> tuple[int, ...]:
        """The observation's leading dimensions: those of the environments, then perhaps time."""
        event, envs = tuple(self.obs_rms.mean.shape), tuple(self.discounted_sum.shape)
        leading = tuple(observation.shape[: observation.ndim - len(event)])
        if (*leading, *event) != tuple(observation.shape) or leading not in (envs, (*envs, *leading[len(envs) :][:1])):
            wanted = f"of shape {[*envs, *event]} or {[*envs, 'T', *event]}"
            raise ValueError(checks.text("RNDReward", "observation", wanted, checks.describe(observation)))
        return leading


def _freeze_target(function: str, predictor: nn.Module, target: nn.Module) -> None:
    """Make ``target`` constant; refused where that would stop the predictor from learning."""
    check_network(function, "predictor_network", predictor)
    check_network(function, "target_network", target)
    trained = {id(parameter) for parameter in predictor.parameters()}
    shared = [name for name, parameter in target.named_parameters() if id(parameter) in trained]
    if shared:
        wanted, got = "a network with parameters of its own", f"one that has the predictor's {shared[0]!r}"
        guess = "Freezing it would freeze the predictor: make two networks."
        raise ValueError(checks.text(function, "target_network", wanted, got, guess))
    target.requires_grad_(False).eval()


def _run(network: nn.Module) -> ApplyFn:
    """``network`` with the parameters it has."""
    return lambda _, x: network(x)


def _in_dtype_of_params(apply: ApplyFn) -> ApplyFn:
    """The loss computes in float32 at least; a bfloat16 network cannot, nor a float32 one on float64 observations."""

    def call(params: Any, observation: Any) -> Any:
        dtype = next((p.dtype for p in tree_flatten(params)[0] if p.is_floating_point()), None)
        return apply(params, observation if dtype is None else tree_map(lambda x: x.to(dtype), observation))

    return call


def _to_eval(target: nn.Module) -> None:
    """Others who hold the target may have switched it back to train mode."""
    if target.training:
        target.eval()


def _one_key(argument: str, keys: Sequence[NestedKey]) -> list[NestedKey]:
    if isinstance(keys, str) or len(keys) != 1 or not is_key(keys[0]):
        guess = f"Did you mean [{keys!r}]?" if is_key(keys) else ""
        raise ValueError(checks.text("RNDReward", argument, "a list of one key", checks.describe(keys), guess))
    return list(keys)


def _key_or_none(function: str, key: NestedKey | None, taken: list[NestedKey]) -> list[NestedKey]:
    """``key`` in a list, or an empty one."""
    if key is None:
        return []
    if not is_key(key) or key in taken:
        wanted = f"None or a key other than {', '.join(map(repr, taken))}"
        raise ValueError(checks.text(function, "target_features_key", wanted, checks.describe(key)))
    return [key]
