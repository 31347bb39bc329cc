"""The same numbers as torchrl's actor and critic losses, and use in their place. Skipped where it is not installed."""

import itertools
import warnings
from collections.abc import Iterator

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import (
    NormalParamExtractor,
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    TensorDictSequential,
)
from torch import nn

import rlloss_nn

with warnings.catch_warnings():
    # Its own, on import.
    warnings.simplefilter("ignore")
    torchrl = pytest.importorskip("torchrl", reason="torchrl is not installed: nothing to compare with")
    from torchrl import objectives
    from torchrl.data import Bounded, Composite, Unbounded
    from torchrl.envs.model_based import DreamerEnv
    from torchrl.modules import SymExpTwoHot, TanhNormal, WorldModelWrapper
    from torchrl.objectives.utils import ValueEstimators

STATE, BELIEF, ACTION, BINS, H, B, T = 5, 3, 2, 11, 4, 3, 6
BOTH = ["state", "belief"]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """What torchrl warns of is not under test."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torchrl")
        warnings.filterwarnings("ignore", category=UserWarning, message=".*target network.*")
        yield


class Head(nn.Module):
    def __init__(self, inputs, outputs, after=None):
        super().__init__()
        self.linear, self.after = nn.Linear(inputs, outputs), after or nn.Identity()

    def forward(self, *inputs):
        return self.after(self.linear(torch.cat(inputs, -1)))


class Step(Head):
    def forward(self, *inputs):
        return torch.tanh(super().forward(*inputs)).split([STATE, BELIEF], -1)


def environment():
    torch.manual_seed(1)
    step = TensorDictModule(Step(STATE + BELIEF + ACTION, STATE + BELIEF), in_keys=[*BOTH, "action"], out_keys=BOTH)
    reward = TensorDictModule(Head(STATE + BELIEF, 1), in_keys=BOTH, out_keys=["reward"])
    env = DreamerEnv(WorldModelWrapper(step, reward), prior_shape=(STATE,), belief_shape=(BELIEF,))
    env.observation_spec = Composite(state=Unbounded(STATE), belief=Unbounded(BELIEF))
    env.state_spec = env.observation_spec.clone()
    env.action_spec, env.reward_spec = Bounded(-1, 1, (ACTION,)), Unbounded((1,))
    return env


def actor(distribution):
    torch.manual_seed(2)
    head = Head(STATE + BELIEF, 2 * ACTION, NormalParamExtractor())
    return ProbabilisticTensorDictSequential(
        TensorDictModule(head, in_keys=BOTH, out_keys=["loc", "scale"]),
        ProbabilisticTensorDictModule(in_keys=["loc", "scale"], out_keys=["action"], distribution_class=distribution),
    )


def independent(loc, scale):
    return torch.distributions.Independent(torch.distributions.Normal(loc, scale), 1)


def critic(kind="symlog_mse"):
    torch.manual_seed(3)
    if kind == "symlog_mse":
        return TensorDictModule(Head(STATE + BELIEF, 1), in_keys=BOTH, out_keys=["state_value"])
    logits = TensorDictModule(Head(STATE + BELIEF, BINS), in_keys=BOTH, out_keys=["state_value_logits"])
    decode = TensorDictModule(SymExpTwoHot(BINS), in_keys=["state_value_logits"], out_keys=["state_value"])
    return TensorDictSequential(logits, decode)


def continuing():
    torch.manual_seed(4)
    return TensorDictModule(Head(STATE + BELIEF, 1, nn.Sigmoid()), in_keys=BOTH, out_keys=["continuation"])


def starts(*batch):
    torch.manual_seed(5)
    return TensorDict({"state": torch.randn(*batch, STATE), "belief": torch.randn(*batch, BELIEF)}, batch)


def gradients(loss, module):
    return torch.autograd.grad(loss, list(module.parameters()), materialize_grads=True)


def evaluate(loss, td, module):
    """Losses, imagined rollout and the gradient by ``module``'s parameters, of three calls."""
    results = []
    for seed in range(3):
        torch.manual_seed(seed)
        losses, imagined = loss(td)
        results.append((losses.detach(), imagined, gradients(losses["loss_actor"], module)))
    return results


@pytest.mark.parametrize("knobs", [{}, {"gamma": 0.9, "lmbda": 0.5}, {"lmbda": 1.0}, {"lmbda": 0.0}])
@pytest.mark.parametrize("reinforce", [True, False])
@pytest.mark.parametrize("distribution", [TanhNormal, independent])
def test_actor_loss(knobs, reinforce, distribution):
    env, value, td, model = environment(), critic(), starts(7), continuing()
    for discount_loss, normalization in itertools.product((True, False), (True, False)):
        results, entropy = [], 0.0 if distribution is TanhNormal else 0.1
        for library in (objectives, rlloss_nn):
            policy = actor(distribution)
            loss = library.DreamerV3ActorLoss(
                policy,
                value,
                env,
                continuation_model=model,
                imagination_horizon=H,
                discount_loss=discount_loss,
                use_reinforce=reinforce,
                return_normalization=normalization,
                return_normalization_rate=0.5,
                return_normalization_min_scale=0.1,
                entropy_bonus=entropy,
            )
            loss.make_value_estimator(ValueEstimators.TDLambda, **knobs)
            results.append(evaluate(loss, td, policy))
        for (losses, imagined, grads), (wanted, wanted_imagined, wanted_grads) in zip(*results[::-1], strict=True):
            assert set(losses.keys()) == set(wanted.keys())
            names = [name for name in losses.keys() if entropy or name != "actor_entropy"]
            for name in names:
                torch.testing.assert_close(losses[name], wanted[name], rtol=1e-4, atol=1e-5)
            keys = set(imagined.keys(True, True))
            flags = {"done", "terminated", ("next", "done"), ("next", "terminated")}
            assert keys == set(wanted_imagined.keys(True, True)) - flags
            torch.testing.assert_close(
                imagined.to_dict(), wanted_imagined.select(*keys).to_dict(), rtol=1e-4, atol=1e-5
            )
            # Through the model theirs differs on purpose: it lets the actor's inputs carry gradients.
            if reinforce:
                torch.testing.assert_close(grads, wanted_grads, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("estimator", ["TD0", "TD1", "TDLambda"])
def test_without_a_continuation_model_theirs_looks_one_step_ahead(estimator):
    """It takes the last dimension, of size 1, for the time; here a rollout that always goes on has all its steps."""
    env, value, td, results = environment(), critic(), starts(7), []
    for library, name in ((objectives, estimator), (rlloss_nn, "TD0")):
        policy = actor(independent)
        loss = library.DreamerV3ActorLoss(policy, value, env, imagination_horizon=H, use_reinforce=True)
        loss.make_value_estimator(ValueEstimators[name])
        results.append(evaluate(loss, td, policy))
    for (losses, _, grads), (wanted, _, wanted_grads) in zip(*results, strict=True):
        torch.testing.assert_close(losses.to_dict(), wanted.to_dict(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(grads, wanted_grads, rtol=1e-4, atol=1e-5)


def test_one_step_through_the_model_has_the_same_gradient():
    """With one step there is no later input to carry a gradient."""
    results, env, value, td = [], environment(), critic(), starts(7)
    for library in (objectives, rlloss_nn):
        policy = actor(independent)
        loss = library.DreamerV3ActorLoss(policy, value, env, imagination_horizon=1, entropy_bonus=0.1)
        if library is objectives:
            loss.make_value_estimator()
        results.append(evaluate(loss, td, policy))
    for (_, _, grads), (_, _, wanted) in zip(*results, strict=True):
        torch.testing.assert_close(grads, wanted, rtol=1e-4, atol=1e-5)


def imagined(weight, *batch):
    td = starts(*batch)
    td["lambda_target"] = 3 * torch.randn(*batch, 1)
    if weight:
        td["discount_weight"] = torch.rand(*batch, 1)
    return td


@pytest.mark.parametrize("kind", ["symlog_mse", "two_hot"])
@pytest.mark.parametrize("slow", [0.0, 0.7])
def test_value_loss(kind, slow):
    for weight, discount_loss, reduction, batch in itertools.product(
        (True, False), (True, False), (None, "sum", "none"), ((B, T), (B,))
    ):
        td, results = imagined(weight, *batch), []
        for library in (objectives, rlloss_nn):
            value = critic(kind)
            loss = library.DreamerV3ValueLoss(
                value,
                kind,
                discount_loss,
                gamma=0.9,
                num_value_bins=BINS,
                slow_critic_regularization=slow,
                reduction=reduction,
            )
            with torch.no_grad():
                for x in loss.target_value_model_params.values(True, True) if slow else ():
                    x.add_(0.1 * (x.shape[0] != BINS or x.ndim > 1))
            losses, _ = loss(td)
            results.append((dict(losses.detach().items()), gradients(losses["loss_value"].sum(), value)))
        torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["symlog_mse", "two_hot"])
@pytest.mark.parametrize("slow", [0.0, 0.7])
def test_replay_value_loss(kind, slow):
    td = starts(B, T)
    done = torch.rand(B, T, 1) < 0.3
    td["bootstrap"] = torch.randn(B, T)
    terminated = done & (torch.rand(B, T, 1) < 0.5)
    td["next"] = TensorDict({"reward": torch.randn(B, T, 1), "done": done, "terminated": terminated}, [B, T])
    for reduction, horizon, lmbda in itertools.product(("mean", "sum", "none"), (333.0, 5.0), (0.95, 0.5, 1.0)):
        results = []
        for library in (objectives, rlloss_nn):
            value = critic(kind)
            kwargs = {"num_value_bins": BINS, "slow_critic_regularization": slow, "reduction": reduction}
            loss = library.DreamerV3ValueLoss(value, kind, **kwargs)
            result = loss.replay_value_loss(td, horizon=horizon, lmbda=lmbda)["loss_replay_value"]
            results.append((result.detach(), gradients(result.sum(), value)))
        torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


class Observe(nn.Module):
    """A world model that shares the step and the reward of the rollouts."""

    def __init__(self, world):
        super().__init__()
        self.encode, self.world, self.in_keys = nn.Linear(6, STATE + BELIEF), world, [("next", "pixels")]
        self.logits = nn.ModuleDict({k: nn.Linear(STATE + BELIEF, 8) for k in ("prior_logits", "posterior_logits")})
        self.decode = nn.Linear(STATE + BELIEF, 6)

    def forward(self, td):
        z = torch.tanh(self.encode(td["next", "pixels"]))
        following = TensorDict(dict(zip(BOTH, z.split([STATE, BELIEF], -1), strict=True)), td.batch_size)
        for name, head in self.logits.items():
            following[name] = head(z).unflatten(-1, (2, 4))
        following["reco_pixels"] = self.decode(z)
        acted = following.select(*BOTH).set("action", torch.ones(*td.batch_size, ACTION))
        following["reward"] = self.world(acted)["reward"]
        return td.set("next", td["next"].copy().update(following))


@pytest.mark.parametrize("kind", ["symlog_mse", "two_hot"])
@pytest.mark.parametrize("replay", [0.3, 0.0])
def test_whole_loss(kind, replay):
    torch.manual_seed(6)
    done = torch.rand(B, T, 1) < 0.3
    following = {"pixels": torch.randn(B, T, 6), "reward": torch.randn(B, T, 1), "done": done, "terminated": done}
    td, results = TensorDict({"next": following}, [B, T]), []
    for library in (objectives, rlloss_nn):
        env, value, policy = environment(), critic(kind), actor(independent)
        torch.manual_seed(7)
        observe = Observe(env.world_model)
        model_loss = library.DreamerV3ModelLoss(observe, reward_two_hot=False, detach_output=False, free_bits=0.01)
        actor_loss = library.DreamerV3ActorLoss(
            policy, value, env, continuation_model=continuing(), imagination_horizon=H, use_reinforce=True
        )
        if library is objectives:
            actor_loss.make_value_estimator()
        value_loss = library.DreamerV3ValueLoss(
            value, kind, num_value_bins=BINS, actor_loss=actor_loss, slow_critic_regularization=1.0
        )
        updater = library.SoftUpdate(value_loss, tau=0.02)
        loss = library.DreamerV3Loss(model_loss, actor_loss, value_loss, replay_value_loss_weight=replay)
        optimizer = torch.optim.SGD([*observe.parameters(), *value.parameters(), *policy.parameters()], lr=1e-3)
        for step in range(5):
            torch.manual_seed(step)
            losses = loss(td)
            optimizer.zero_grad()
            sum(x for name, x in losses.items() if name.startswith("loss_")).backward()
            optimizer.step()
            updater.step()
        trained = [p.detach() for module in (observe, value, policy) for p in module.parameters()]
        results.append((losses.detach().to_dict(), trained))
    assert set(results[1][0]) == set(results[0][0])
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


def test_keys_and_defaults_are_the_same():
    env, value, policy = environment(), critic(), actor(independent)
    theirs, ours = (library.DreamerV3ActorLoss(policy, value, env) for library in (objectives, rlloss_nn))
    assert vars(ours.tensor_keys) == vars(theirs.tensor_keys)
    names = ["imagination_horizon", "discount_loss", "entropy_bonus", "use_reinforce", "return_normalization"]
    for name in [*names, "return_normalization_rate", "return_normalization_quantiles"]:
        assert getattr(ours, name) == getattr(theirs, name)
    assert ours.return_normalization_min_scale == theirs.return_normalization_min_scale
    theirs.make_value_estimator()
    torch.testing.assert_close(ours.gamma, theirs.value_estimator.gamma.item())
    torch.testing.assert_close(ours.lmbda, theirs.value_estimator.lmbda.item())
    theirs, ours = (library.DreamerV3ValueLoss(value) for library in (objectives, rlloss_nn))
    assert vars(ours.tensor_keys) == vars(theirs.tensor_keys)
    for name in ("value_loss", "discount_loss", "gamma", "slow_critic_regularization", "reduction"):
        assert getattr(ours, name) == getattr(theirs, name)
    torch.testing.assert_close(ours.value_bins, theirs.value_bins, rtol=1e-5, atol=0.0)
    assert objectives.DreamerV3Loss.default_keys().__dict__ == rlloss_nn.DreamerV3Loss.default_keys().__dict__
