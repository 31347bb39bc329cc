"""DreamerV3's actor loss, critic loss and whole objective as torch modules."""

import copy
import pickle

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import (
    InteractionType,
    NormalParamExtractor,
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    TensorDictSequential,
    set_interaction_type,
)
from torch import nn
from torch.distributions import Independent, Normal, OneHotCategorical, TanhTransform, TransformedDistribution
from torch.func import grad, vmap

import rlloss
from rlloss.policy import CategoricalPolicy, NormalPolicy
from rlloss_nn import DreamerV3ActorLoss, DreamerV3Loss, DreamerV3ModelLoss, DreamerV3ValueLoss, SoftUpdate

B, T, H, STATE, BELIEF, ACTION, BINS = 2, 4, 3, 5, 3, 2, 11
BOTH = ["state", "belief"]


class Joined(nn.Module):
    """One linear layer on all that it is given, and something after it."""

    def __init__(self, inputs, outputs, after=None):
        super().__init__()
        self.linear, self.after = nn.Linear(inputs, outputs), after or nn.Identity()

    def forward(self, *inputs):
        return self.after(self.linear(torch.cat(inputs, -1)))


class Step(Joined):
    """The next state and belief."""

    def forward(self, *inputs):
        return torch.tanh(super().forward(*inputs)).split([STATE, BELIEF], -1)


class Decode(nn.Module):
    """What logits of two-hot stand for."""

    def forward(self, logits):
        return rlloss.two_hot_decode(logits, rlloss.symexp_bins(BINS, dtype=logits.dtype)).unsqueeze(-1)


class OwnActor(nn.Module):
    """An actor whose distributions are those of ``rlloss``; ``noise`` scales what it draws."""

    def __init__(self, discrete=False, noise=1.0):
        super().__init__()
        self.joined, self.discrete, self.noise = Joined(STATE + BELIEF, 2 * ACTION), discrete, noise

    def get_dist(self, td):
        outputs = self.joined(td["state"], td["belief"])
        if self.discrete:
            return CategoricalPolicy(outputs[..., None, :ACTION])
        return rlloss.bounded_normal(*outputs.chunk(2, -1))

    def forward(self, td):
        policy = self.get_dist(td)
        if self.discrete:
            return td.set("action", OneHotCategorical(logits=policy.logits).sample())
        noise = self.noise * torch.randn_like(policy.mean) if self.noise else 0.0
        return td.set("action", policy.mean + policy.stddev * noise)


def squashed(loc, scale):
    """Has no closed form of its entropy."""
    return TransformedDistribution(Independent(Normal(loc, scale), 1), TanhTransform(cache_size=1))


def one_hot(loc, scale):
    return OneHotCategorical(logits=loc + 0 * scale)


def torch_actor(distribution=Normal, keys=BOTH, action="action"):
    head = Joined(STATE + BELIEF, 2 * ACTION, NormalParamExtractor())
    return ProbabilisticTensorDictSequential(
        TensorDictModule(head, in_keys=keys, out_keys=["loc", "scale"]),
        ProbabilisticTensorDictModule(in_keys=["loc", "scale"], out_keys=[action], distribution_class=distribution),
    )


def make_actor(kind="own"):
    torch.manual_seed(1)
    return {
        "own": OwnActor,
        "choice": lambda: OwnActor(discrete=True),
        "normal": torch_actor,
        "independent": lambda: torch_actor(lambda loc, scale: Independent(Normal(loc, scale), 1)),
        "squashed": lambda: torch_actor(squashed),
        "one_hot": lambda: torch_actor(one_hot),
    }[kind]()


def world_and_reward(keys=BOTH, action="action", reward="reward"):
    torch.manual_seed(2)
    step = TensorDictModule(Step(STATE + BELIEF + ACTION, STATE + BELIEF), in_keys=[*keys, action], out_keys=keys)
    return TensorDictSequential(step, TensorDictModule(Joined(STATE + BELIEF, 1), in_keys=keys, out_keys=[reward]))


class World(nn.Module):
    """Takes actions with and without groups."""

    def __init__(self):
        super().__init__()
        self.inner = world_and_reward()

    def forward(self, td):
        action = td["action"]
        return self.inner(td.set("action", action.reshape(*td.batch_size, ACTION)))


def critic(kind="symlog_mse", keys=BOTH, value="state_value", logits="state_value_logits", seed=3):
    torch.manual_seed(seed)
    if kind == "symlog_mse":
        return TensorDictModule(Joined(STATE + BELIEF, 1), in_keys=keys, out_keys=[value])
    head = TensorDictModule(Joined(STATE + BELIEF, BINS), in_keys=keys, out_keys=[logits])
    return TensorDictSequential(head, TensorDictModule(Decode(), in_keys=[logits], out_keys=[value]))


def continuing(keys=BOTH, out="continuation"):
    torch.manual_seed(4)
    return TensorDictModule(Joined(STATE + BELIEF, 1, nn.Sigmoid()), in_keys=keys, out_keys=[out])


def starts(*batch, seed=0):
    torch.manual_seed(seed)
    batch = batch or (6,)
    return TensorDict({"state": torch.randn(*batch, STATE), "belief": torch.randn(*batch, BELIEF)}, batch)


def actor_loss(kind="own", **knobs):
    return DreamerV3ActorLoss(make_actor(kind), critic(), World(), **{"imagination_horizon": H, **knobs})


def seeded(function, *args):
    torch.manual_seed(7)
    return function(*args)


def gradients(loss, module):
    return torch.autograd.grad(loss, list(module.parameters()), retain_graph=True, materialize_grads=True)


# The actor's loss.


def rollout_of(loss, imagined):
    """The rollout's states [.., H + 1, *], walked again with the actions it took."""
    state, world = imagined[..., 0].select(*BOTH), loss.model_based_env
    states, rewards = [state], [torch.zeros(state.batch_size)]
    for action in imagined["action"].unbind(len(state.batch_size)):
        following = world(state.copy().set("action", action))
        rewards.append(following["reward"].squeeze(-1))
        state = following.select(*BOTH)
        states.append(state)
    return torch.stack(states, -1), torch.stack(rewards, -1)


@pytest.mark.parametrize("kind", ["own", "choice", "normal", "independent", "one_hot"])
@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"continuation": True, "gamma": 0.9, "lmbda": 0.5},
        {"discount_loss": False, "entropy_bonus": 0.3},
        {"return_normalization": False, "gamma": torch.tensor(0.8)},
        {"return_normalization_rate": 1.0, "return_normalization_quantiles": (0.2, 0.7)},
        {"return_normalization_rate": 1.0, "return_normalization_min_scale": 0.01},
    ],
)
def test_actor_loss_by_the_score_is_that_of_the_pure_functions(kind, knobs):
    knobs = dict(knobs)
    model = continuing() if knobs.pop("continuation", False) else None
    loss = actor_loss(kind, use_reinforce=True, continuation_model=model, **knobs)
    losses, imagined = loss(starts())
    with torch.no_grad():
        states, reward = rollout_of(loss, imagined)
        value = loss.value_model(states.copy())["state_value"].squeeze(-1)
        continuation = torch.ones_like(reward) if model is None else model(states.copy())["continuation"].squeeze(-1)
    normalised = loss.return_normalization
    targets, after = rlloss.dreamer_v3_returns(
        reward,
        continuation,
        value,
        rlloss.return_range_init(),
        discount=loss.gamma,
        lmbda=loss.lmbda,
        rate=loss.return_normalization_rate if normalised else 0.0,
        quantiles=loss.return_normalization_quantiles,
        minimum=loss.return_normalization_min_scale if normalised else 1.0,
    )
    weight = targets.weight if loss.discount_loss else torch.ones_like(targets.weight)

    def policy(_, features):
        distribution = loss.actor_model.get_dist(features)
        if isinstance(distribution, (NormalPolicy, CategoricalPolicy)):
            return distribution
        if isinstance(distribution, OneHotCategorical):
            return CategoricalPolicy(distribution.logits.unsqueeze(-2))
        return NormalPolicy(distribution.mean, distribution.stddev)

    action = imagined["action"]
    if kind == "one_hot":
        action = action.unsqueeze(-2)
    action = torch.cat([action, action[:, :1]], 1)
    batch = {"features": states.select(*BOTH), "action": action, "advantage": targets.advantage, "weight": weight}
    expected, aux = rlloss.dreamer_v3_actor_loss(
        None,
        {**batch, "features": {key: states[key] for key in BOTH}},
        actor=lambda _, x: policy(_, TensorDict(x, [6, H])),
        entropy=loss.entropy_bonus,
    )
    torch.testing.assert_close(losses["loss_actor"], expected, rtol=1e-5, atol=1e-6)
    got, wanted = (gradients(x, loss.actor_model) for x in (losses["loss_actor"], expected))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(imagined["lambda_target"].squeeze(-1), targets.returns)
    torch.testing.assert_close(imagined["discount_weight"].squeeze(-1), weight)
    torch.testing.assert_close(losses["actor_entropy"], (weight * aux["entropy"]).mean())
    torch.testing.assert_close(losses["continuation_mean"], continuation[:, 1:].mean())
    assert losses["return_low"] == loss.return_low == (after.low if normalised else 0)
    assert losses["return_high"] == loss.return_high == (after.high if normalised else 0)
    minimum = loss.return_normalization_min_scale if normalised else 1.0
    torch.testing.assert_close(losses["return_scale"], rlloss.return_range_scale(after, minimum=minimum))


@pytest.mark.parametrize("kind", ["own", "normal"])
def test_actor_loss_through_the_model_is_the_gradient_of_the_return(kind):
    loss = actor_loss(kind, continuation_model=continuing(), entropy_bonus=0.1, return_normalization_rate=1.0)
    td = starts()
    losses, imagined = seeded(loss, td)
    scale, weight = losses["return_scale"], imagined["discount_weight"].squeeze(-1)
    torch.manual_seed(7)
    state, states, rewards = td, [td], [torch.zeros(6)]
    for _ in range(H):
        with set_interaction_type(InteractionType.RANDOM):
            action = loss.actor_model(state.detach())["action"]
        following = loss.model_based_env(state.copy().set("action", action))
        state = following.select(*BOTH)
        states.append(state)
        rewards.append(following["reward"].squeeze(-1))
    states, reward = torch.stack(states, 1), torch.stack(rewards, 1)
    value = loss.value_model(states.copy())["state_value"].squeeze(-1)
    going = loss.continuation_model(states.copy())["continuation"].squeeze(-1)
    returns = rlloss.lambda_return(reward, value, going, discount=0.99)
    distribution = loss.actor_model.get_dist(states[:, :-1].detach())
    stddev = distribution.stddev
    entropy = rlloss.policy_entropy(NormalPolicy(torch.zeros_like(stddev), stddev))
    expected = -(weight * (returns / scale + 0.1 * entropy)).mean()
    torch.testing.assert_close(losses["loss_actor"], expected)
    got, wanted = (gradients(x, loss.actor_model) for x in (losses["loss_actor"], expected))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)
    assert max(x.abs().max() for x in got) > 0.01


def test_entropy_without_a_closed_form_is_estimated():
    loss = actor_loss("squashed", use_reinforce=True, entropy_bonus=1.0, gamma=1.0)
    td = starts(2000)
    losses, imagined = loss(td)
    distribution = loss.actor_model.get_dist(imagined.select(*BOTH))
    samples = torch.stack([-distribution.log_prob(distribution.rsample()) for _ in range(20)]).mean()
    torch.testing.assert_close(losses["actor_entropy"], samples.detach(), rtol=0.1, atol=0.02)
    assert max(x.abs().max() for x in gradients(losses["loss_actor"], loss.actor_model)) > 0


@pytest.mark.parametrize("reinforce", [True, False])
def test_actor_loss_trains_the_actor_alone(reinforce):
    loss = actor_loss(use_reinforce=reinforce, continuation_model=continuing())
    td = starts()
    td["state"].requires_grad_()
    losses, imagined = loss(td)
    losses["loss_actor"].backward()
    assert all(p.grad.abs().sum() > 0 for p in loss.actor_model.parameters())
    for other in (loss.value_model, loss.model_based_env, loss.continuation_model):
        assert all(p.requires_grad and p.grad is None for p in other.parameters())
    assert td["state"].grad is None
    assert not any(x.requires_grad for name, x in losses.items() if name != "loss_actor")
    assert not any(x.requires_grad for x in imagined.values(True, True))
    assert {id(p) for p in loss.parameters()} == {id(p) for p in loss.actor_model.parameters()}


def test_what_is_imagined():
    loss = actor_loss("normal", continuation_model=continuing())
    _, imagined = loss(starts(2, 3))
    assert imagined.batch_size == (2, 3, H)
    shapes = {key: tuple(x.shape[3:]) for key, x in imagined.items(True, True)}
    assert shapes == {
        "state": (STATE,),
        "belief": (BELIEF,),
        "loc": (ACTION,),
        "scale": (ACTION,),
        "action": (ACTION,),
        "continuation": (1,),
        "lambda_target": (1,),
        "discount_weight": (1,),
        ("next", "state"): (STATE,),
        ("next", "belief"): (BELIEF,),
        ("next", "reward"): (1,),
        ("next", "continuation"): (1,),
    }
    assert torch.equal(imagined["next", "state"][:, :, :-1], imagined["state"][:, :, 1:])
    assert torch.equal(imagined["next", "continuation"][:, :, :-1], imagined["continuation"][:, :, 1:])


def test_range_moves_in_train_mode_only_and_comes_back_with_the_state_dict():
    loss = actor_loss(use_reinforce=True)
    assert list(loss.state_dict()) == [
        "actor_model.joined.linear.weight",
        "actor_model.joined.linear.bias",
        "return_range.low",
        "return_range.high",
    ]
    low = loss.return_low
    for _ in range(3):
        losses, _ = loss(starts())
    assert loss.return_low is low, "others may hold the buffer"
    assert losses["return_low"] is not low
    assert loss.return_high != 0
    before = copy.deepcopy(loss.state_dict())
    loss.eval()
    loss(starts())
    assert all(torch.equal(x, before[name]) for name, x in loss.state_dict().items())
    other = actor_loss(use_reinforce=True)
    other.load_state_dict(before)
    assert other.return_range.state == loss.return_range.state


def test_state_dict_of_another_shape_is_refused_by_name_and_nothing_overwritten():
    loss = actor_loss()
    before = {name: x.clone() for name, x in loss.state_dict().items()}
    given = {name: x + 1 for name, x in before.items()}
    for name, bad in (("return_range.low", torch.zeros(1)), ("actor_model.joined.linear.bias", torch.zeros(9))):
        match = rf"DreamerV3ActorLoss.load_state_dict: '{name}' must be of shape \[.*\] like the module's own, got"
        with pytest.raises(ValueError, match=match):
            loss.load_state_dict({**given, name: bad})
        assert all(torch.equal(x, before[name]) for name, x in loss.state_dict().items())


def test_state_dict_of_other_names_is_refused_and_nothing_overwritten():
    loss = actor_loss()
    before = {name: x.clone() for name, x in loss.state_dict().items()}
    given = {name: x + 1 for name, x in before.items()}
    high = given.pop("return_range.high")
    for bad, what in ((given, r"missing \['return_range.high'\]"), ({**before, "top": high}, r"unexpected \['top'\]")):
        with pytest.raises(KeyError, match=rf"DreamerV3ActorLoss.load_state_dict: state_dict must be .*{what}"):
            loss.load_state_dict(bad)
        assert all(torch.equal(x, before[name]) for name, x in loss.state_dict().items())
    loss.load_state_dict(given, strict=False)
    assert torch.equal(loss.return_low, given["return_range.low"])
    assert torch.equal(loss.return_high, before["return_range.high"])


def test_casts_leave_the_range_wide():
    loss = actor_loss().to(torch.bfloat16)
    assert loss.return_low.dtype == torch.float32
    assert loss.double().return_low.dtype == torch.float64


def test_value_estimators_of_torchrl():
    loss = actor_loss()
    assert (loss.gamma, loss.lmbda) == (0.99, 0.95)
    loss.make_value_estimator("TD0", gamma=0.9)
    assert (loss.gamma, loss.lmbda) == (0.9, 0.0)
    loss.make_value_estimator("TD1")
    assert (loss.gamma, loss.lmbda) == (0.9, 1.0)
    loss.make_value_estimator(gamma=0.5, lmbda=0.25)
    assert (loss.gamma, loss.lmbda) == (0.5, 0.25)
    loss.make_value_estimator()
    assert (loss.gamma, loss.lmbda) == (0.5, 0.25), "kept where not given"
    match = r"make_value_estimator: value_type must be one of 'TDLambda', 'TD0', 'TD1', got 'GAE'"
    with pytest.raises(ValueError, match=match):
        loss.make_value_estimator("GAE")
    with pytest.raises(ValueError, match=r"make_value_estimator: gamma must be in \[0, 1\], got 2"):
        loss.make_value_estimator(gamma=2)


@pytest.mark.parametrize(("name", "said"), [("gamma", "discount"), ("lmbda", "lmbda")])
def test_knobs_that_are_set_later_are_checked_at_the_call(name, said):
    loss = actor_loss()
    setattr(loss, name, 3.0)
    with pytest.raises(ValueError, match=rf"{said} must be in \[0, 1\], got 3.0"):
        loss(starts())


def test_lambda_target():
    loss = actor_loss(gamma=1.0, lmbda=0.5)
    reward, value = torch.tensor([[[1.0], [2.0], [3.0]]]), torch.tensor([[[10.0], [20.0], [30.0]]])
    got = loss.lambda_target(reward, value, torch.full_like(reward, 0.5))
    torch.testing.assert_close(got, torch.tensor([[[6.375], [11.5], [18.0]]]))
    chain = rlloss.lambda_return(
        torch.tensor([0.0, 1, 2, 3]), torch.tensor([0.0, 10, 20, 30]), torch.ones(4), discount=1.0, lmbda=0.5
    )
    torch.testing.assert_close(loss.lambda_target(reward, value).flatten(), chain)


def test_actor_names_can_be_set():
    keys = [("deep", "s"), "b"]
    names = {"state": ("deep", "s"), "belief": "b", "action": "a", "reward": ("r", "x"), "value": "v"}
    names |= {"continuation": "c", "discount_weight": "w"}
    torch.manual_seed(1)
    actor = torch_actor(keys=keys, action="a")
    loss = DreamerV3ActorLoss(
        actor,
        critic(keys=keys, value="v"),
        world_and_reward(keys, "a", ("r", "x")),
        continuation_model=continuing(keys, "c"),
        imagination_horizon=H,
    )
    loss.set_keys(**names)
    assert loss.in_keys == keys
    plain = DreamerV3ActorLoss(
        make_actor("normal"), critic(), world_and_reward(), continuation_model=continuing(), imagination_horizon=H
    )
    td = starts()
    renamed = TensorDict({"deep": {"s": td["state"]}, "b": td["belief"]}, [6])
    (losses, imagined), (expected, _) = seeded(loss, renamed), seeded(plain, td)
    torch.testing.assert_close(losses["loss_actor"], expected["loss_actor"])
    assert {("deep", "s"), "b", "a", "c", "w", ("next", "r", "x"), ("next", "c")} <= set(imagined.keys(True, True))
    assert torch.equal(seeded(lambda: loss(deep_s=td["state"], b=td["belief"])), expected["loss_actor"])


def test_environment_with_a_world_model_is_the_step_it_holds():
    class Environment(nn.Module):
        def __init__(self):
            super().__init__()
            self.world_model = World()

    step, environment = actor_loss(), DreamerV3ActorLoss(make_actor(), critic(), Environment(), imagination_horizon=H)
    td = starts()
    assert seeded(step, td)[0]["loss_actor"] == seeded(environment, td)[0]["loss_actor"]


def test_actor_keywords_and_caller_unchanged():
    loss, td = actor_loss(), starts()
    before = td.clone()
    expected = seeded(loss, td)[0]["loss_actor"]
    assert (td == before).all()
    assert set(td.keys()) == set(before.keys())
    assert torch.equal(seeded(lambda: loss(state=td["state"], belief=td["belief"])), expected)
    assert torch.equal(seeded(lambda: loss(td["state"], td["belief"])), expected)


@pytest.mark.parametrize("reinforce", [True, False])
def test_actor_functional_is_the_module_with_its_parameters_taken_out(reinforce):
    loss, td = actor_loss(use_reinforce=reinforce), starts()
    loss_fn, params, frozen, state = loss.functional()
    assert set(params) == {name for name, _ in loss.actor_model.named_parameters()}
    value, aux, after = seeded(loss_fn, params, frozen, state, td)
    assert state.low == 0, "nothing is written"
    losses, imagined = seeded(loss, td)
    assert torch.equal(value, losses["loss_actor"])
    assert torch.equal(aux["losses"]["return_scale"], losses["return_scale"])
    assert (aux["imagined"] == imagined).all()
    assert after == loss.return_range.state
    wanted = gradients(losses["loss_actor"], loss.actor_model)
    detached = {name: p.detach() for name, p in params.items()}
    got = seeded(grad(lambda p: loss_fn(p, frozen, state, td)[0]), detached)
    torch.testing.assert_close(list(got.values()), list(wanted))
    other = {name: p + 0.1 for name, p in detached.items()}
    assert seeded(loss_fn, other, frozen, state, td)[0] != value
    as_td = TensorDict(detached, []).unflatten_keys(".")
    assert torch.equal(seeded(loss_fn, as_td, frozen, state, td)[0], value)


@pytest.mark.parametrize("reinforce", [True, False])
def test_ensemble_of_actors_by_vmap_equals_a_loop(reinforce):
    loss = DreamerV3ActorLoss(
        OwnActor(noise=0.0), critic(), World(), imagination_horizon=H, use_reinforce=reinforce, entropy_bonus=0.1
    )
    loss_fn, params, frozen, state = loss.functional()
    frozen = {name: x.detach() for name, x in frozen.items()}
    members = [{name: p.detach() + 0.1 * i for name, p in params.items()} for i in range(3)]
    stacked = {name: torch.stack([member[name] for member in members]) for name in params}
    one = grad(lambda p, x: loss_fn(p, frozen, state, x)[0])
    td = starts()
    got = vmap(one, in_dims=(0, None))(stacked, td)
    for i, member in enumerate(members):
        expected = one(member, td)
        torch.testing.assert_close({name: x[i] for name, x in got.items()}, expected, rtol=1e-4, atol=1e-6)


def test_gradient_by_discount_and_entropy_weight():
    """Meta-gradients: a knob may be a tensor that is differentiated."""
    td = starts()

    networks = [network.double() for network in (make_actor(), critic(), World())]
    networks[0].noise = 0.0

    def value(knobs):
        gamma, entropy, lmbda = knobs
        knobs = {"gamma": gamma, "lmbda": lmbda, "entropy_bonus": entropy, "imagination_horizon": H}
        loss_fn, *arguments = DreamerV3ActorLoss(*networks, **knobs).functional()
        return loss_fn(*arguments, td.double())[0]

    knobs = torch.tensor([0.9, 0.1, 0.7], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(value, knobs)


# The critic's loss.


def value_loss(kind="symlog_mse", **knobs):
    return DreamerV3ValueLoss(critic(kind), kind, **{"num_value_bins": BINS, **knobs})


def moved(loss):
    """The slow critic somewhere else, so that it matters."""
    with torch.no_grad():
        for x in loss.target_value_model_params.values(True, True):
            x.add_(0.1)
    return loss


def imagined_batch(*batch, weight=True):
    batch = batch or (6, H)
    td = starts(*batch)
    td["lambda_target"] = 3 * torch.randn(*batch, 1)
    if weight:
        td["discount_weight"] = torch.rand(*batch, 1)
    return td


@pytest.mark.parametrize("kind", ["symlog_mse", "two_hot"])
@pytest.mark.parametrize("slow", [0.0, 0.7])
@pytest.mark.parametrize("reduction", [None, "sum", "none"])
@pytest.mark.parametrize("batch", [(6, H), (6,), (0, H)])
def test_value_loss_is_that_of_the_pure_function(kind, slow, reduction, batch):
    loss = value_loss(kind, slow_critic_regularization=slow, reduction=reduction)
    td = imagined_batch(*batch)
    key = "state_value" if kind == "symlog_mse" else "state_value_logits"
    slow_model = copy.deepcopy(loss.value_model)
    if slow:
        moved(loss)
        with torch.no_grad():
            for p in slow_model.parameters():
                p.add_(0.1)
    losses, returned = loss(td)
    prediction, slow_prediction = loss.value_model(td.copy())[key], slow_model(td.copy())[key]
    returns, weight = td["lambda_target"].squeeze(-1), td["discount_weight"].squeeze(-1)
    terms = rlloss.dreamer_v3_value_terms(
        prediction, slow_prediction, returns, weight, slow_weight=slow, value_loss=kind
    )
    reduce = {None: lambda x: x.sum() / max(x.numel(), 1), "sum": torch.sum, "none": lambda x: x}[reduction]
    torch.testing.assert_close(losses["loss_value"], reduce(terms))
    got, wanted = (gradients(x.sum(), loss.value_model) for x in (losses["loss_value"], reduce(terms)))
    torch.testing.assert_close(got, wanted)
    slow_value = slow_model(td.copy())["state_value"].squeeze(-1)
    expected = rlloss.dreamer_v3_value_terms(prediction, None, slow_value, weight, slow_weight=0.0, value_loss=kind)
    torch.testing.assert_close(losses["value_slow_loss"], reduce(expected.detach()) * (slow > 0))
    assert not losses["value_slow_loss"].requires_grad
    assert set(returned.keys()) == set(td.keys())


@pytest.mark.parametrize("discount_loss", [True, False])
def test_weights_where_the_batch_has_none(discount_loss):
    td = imagined_batch(weight=False)
    loss = value_loss(discount_loss=discount_loss, gamma=0.5, reduction="none")
    even = value_loss(discount_loss=False, reduction="none")(td)[0]["loss_value"]
    weight = torch.tensor([1.0, 0.5, 0.25]) if discount_loss else torch.ones(3)
    torch.testing.assert_close(loss(td)[0]["loss_value"], weight * even)
    # Without a time dimension there is nothing to discount.
    flat = imagined_batch(6, weight=False)
    assert torch.equal(
        loss(flat)[0]["loss_value"], value_loss(discount_loss=False, reduction="none")(flat)[0]["loss_value"]
    )


def test_discount_of_the_actor_is_taken():
    actor, td = actor_loss(gamma=0.5), imagined_batch(weight=False)
    loss, own = value_loss(actor_loss=actor), value_loss(gamma=0.25)
    assert torch.equal(loss(td)[0]["loss_value"], value_loss(gamma=0.5)(td)[0]["loss_value"])
    actor.make_value_estimator(gamma=0.25)
    assert torch.equal(loss(td)[0]["loss_value"], own(td)[0]["loss_value"])
    assert len(list(loss.parameters())) == 2, "the actor's are not the critic's"
    own.sync_gamma_with_actor_loss(actor_loss(gamma=0.75))
    assert own.gamma == 0.75


def replay_batch(*batch, trailing=True):
    batch = batch or (B, T)
    torch.manual_seed(5)
    td = starts(*batch)
    td["bootstrap"] = torch.randn(*batch)
    shape = (*batch, 1) if trailing else batch
    done = torch.rand(shape) < 0.3
    td["next"] = TensorDict(
        {"reward": torch.randn(shape), "done": done, "terminated": done & (torch.rand(shape) < 0.5)}, batch
    )
    return td


@pytest.mark.parametrize("kind", ["symlog_mse", "two_hot"])
@pytest.mark.parametrize("slow", [0.0, 0.7])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("trailing", [True, False])
def test_replay_loss_is_that_of_the_pure_function(kind, slow, reduction, trailing):
    loss, td = value_loss(kind, slow_critic_regularization=slow, reduction=reduction), replay_batch(trailing=trailing)
    if slow:
        moved(loss)
    _, params, slow_params = loss.functional()
    td["state"].requires_grad_()
    key = "state_value" if kind == "symlog_mse" else "state_value_logits"

    def apply(params, features):
        return torch.func.functional_call(loss.value_model, params, (TensorDict(features, [B, T - 1]),))[key]

    steps = {name: td["next", name].reshape(B, T) for name in ("reward", "terminated")}
    batch = {"features": {name: td[name] for name in BOTH}, "is_last": td["next", "done"].reshape(B, T), **steps}
    expected, _ = rlloss.dreamer_v3_replay_value_loss(
        params,
        slow_params,
        {**batch, "bootstrap": td["bootstrap"]},
        critic=apply,
        discount=1 - 1 / 50.0,
        lmbda=0.8,
        slow_weight=slow,
        value_loss=kind,
        reduction=reduction,
    )
    got = loss.replay_value_loss(td, horizon=50.0, lmbda=0.8)["loss_replay_value"]
    assert got.shape == ((B, T - 1) if reduction == "none" else ())
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(gradients(got.sum(), loss), gradients(expected.sum(), loss))
    got.sum().backward()
    assert td["state"].grad[:, :-1].abs().sum() > 0
    assert (td["state"].grad[:, -1] == 0).all()


def test_value_losses_train_the_critic_alone():
    loss = moved(value_loss("two_hot", slow_critic_regularization=1.0))
    loss(imagined_batch())[0]["loss_value"].backward()
    assert all(p.grad.abs().sum() > 0 for p in loss.parameters())
    assert {id(p) for p in loss.parameters()} == {id(p) for p in loss.value_model.parameters()}
    slow = list(loss.target_value_model_params.values(True, True))
    assert len(slow) == 2
    assert not any(x.requires_grad or x.grad is not None for x in slow)


def test_slow_critic_starts_as_a_copy_moves_and_is_saved():
    loss = value_loss(slow_critic_regularization=1.0)
    names = ["module.linear.weight", "module.linear.bias"]
    assert list(loss.state_dict()) == [f"value_model.{n}" for n in names] + [
        f"target_value_model_params.{n}" for n in names
    ]
    _, params, slow = loss.functional()
    assert all(torch.equal(params[name], slow[name]) for name in names)
    with torch.no_grad():
        for p in loss.value_model.parameters():
            p.add_(1.0)
    before = {name: x.clone() for name, x in slow.items()}
    loss.update_target(0.25)
    for name in names:
        torch.testing.assert_close(slow[name], before[name].lerp(params[name].detach(), 0.25))
    other = value_loss(slow_critic_regularization=1.0)
    other.load_state_dict(loss.state_dict())
    assert all(torch.equal(x, slow[name]) for name, x in other.functional()[2].items())
    bad = {**loss.state_dict(), "target_value_model_params.module.linear.bias": torch.zeros(2)}
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"'target_value_model_params.module.linear.bias' must be of shape \[1\]"):
        other.load_state_dict(bad)
    assert all(torch.equal(x, before[name]) for name, x in other.state_dict().items())


def test_soft_update_has_the_arguments_of_torchrl():
    for kwargs in ({"tau": 0.25}, {"eps": 0.75}):
        loss, other = (moved(value_loss(slow_critic_regularization=1.0)) for _ in range(2))
        SoftUpdate(loss, **kwargs).step()
        other.update_target(0.25)
        got, wanted = loss.state_dict(), other.state_dict()
        assert all(torch.equal(x, wanted[name]) for name, x in got.items())


def test_buffers_of_the_slow_critic_are_copied():
    model = TensorDictModule(nn.Sequential(nn.Linear(STATE, 1)), in_keys=["state"], out_keys=["state_value"])
    model.module.register_buffer("steps", torch.tensor(3))
    loss = DreamerV3ValueLoss(model, slow_critic_regularization=1.0)
    model.module.steps += 2
    loss.update_target(0.5)
    assert loss.target_value_model_params["module", "steps"] == 5


def test_tied_parameters_of_a_critic():
    first, head = nn.Linear(STATE, STATE), nn.Linear(STATE, 1)
    batch, outcomes = imagined_batch(), []
    for tied in (True, False):
        layers = nn.Sequential(*map(copy.deepcopy, (first, first, head)))
        if tied:
            layers[1].weight = layers[0].weight
        model = TensorDictModule(layers, in_keys=["state"], out_keys=["state_value"])
        loss = DreamerV3ValueLoss(model, slow_critic_regularization=1.0)
        before = loss(batch.copy())[0]["loss_value"]
        before.backward()
        weights = {layers[0].weight, layers[1].weight}
        with torch.no_grad():
            for weight in weights:
                weight.add_(0.1)
        loss.update_target()
        outcomes.append((before, sum(weight.grad for weight in weights), loss(batch.copy())[0]["loss_value"]))
    torch.testing.assert_close(outcomes[0], outcomes[1])


def test_lazy_critic_takes_its_shapes_from_the_first_batch():
    def lazy():
        return TensorDictModule(nn.LazyLinear(1), in_keys=["state"], out_keys=["state_value"])

    for call in (lambda loss: loss(imagined_batch()), lambda loss: loss.replay_value_loss(replay_batch())):
        loss = DreamerV3ValueLoss(lazy())
        call(loss)
        assert loss.value_model.module.weight.shape == (1, STATE)
    with pytest.raises(ValueError, match=r"uninitialised .*Call the module once on example data first"):
        DreamerV3ValueLoss(lazy(), slow_critic_regularization=1.0)


def test_logits_under_the_older_name_are_read_with_a_warning():
    model = TensorDictModule(Joined(STATE + BELIEF, BINS), in_keys=BOTH, out_keys=["state_value"])
    loss, td = DreamerV3ValueLoss(model, "two_hot", num_value_bins=BINS), imagined_batch()
    with pytest.warns(DeprecationWarning, match=r"under 'state_value'.*removed in v0.16.*'state_value_logits'"):
        losses, _ = loss(td)
    loss.set_keys(value_logits="state_value")
    assert torch.equal(loss(td)[0]["loss_value"], losses["loss_value"])


def test_value_names_can_be_set():
    loss = DreamerV3ValueLoss(critic("two_hot", value=("p", "v"), logits=("p", "l")), "two_hot", num_value_bins=BINS)
    loss.set_keys(value=("p", "v"), value_logits=("p", "l"), discount_weight="w", reward=("r", "x"), bootstrap="first")
    td, plain = imagined_batch(), value_loss("two_hot")
    assert torch.equal(loss(td.copy().rename_key_("discount_weight", "w"))[0]["loss_value"], plain(td)[0]["loss_value"])
    assert loss.in_keys == [*BOTH, "lambda_target", "w"]
    replay = replay_batch()
    expected = plain.replay_value_loss(replay)["loss_replay_value"]
    replay.rename_key_("bootstrap", "first").rename_key_(("next", "reward"), ("next", "r", "x"))
    assert torch.equal(loss.replay_value_loss(replay)["loss_replay_value"], expected)


def test_value_keywords_and_caller_unchanged():
    loss, td = value_loss("two_hot", slow_critic_regularization=1.0), imagined_batch()
    before = td.clone()
    expected = loss(td)[0]["loss_value"]
    assert (td == before).all()
    assert set(td.keys()) == set(before.keys())
    assert torch.equal(loss(**dict(td.items())), expected)
    replay = replay_batch()
    keys = set(replay.keys(True, True))
    loss.replay_value_loss(replay)
    assert set(replay.keys(True, True)) == keys


def test_value_functional_ensemble_by_vmap_equals_a_loop():
    loss = moved(value_loss("two_hot", slow_critic_regularization=1.0))
    loss_fn, params, slow = loss.functional()
    td = imagined_batch()
    assert torch.equal(loss_fn(params, slow, td)[0], loss(td)[0]["loss_value"])
    members = [{name: p.detach() + 0.1 * i for name, p in params.items()} for i in range(3)]
    stacked = {name: torch.stack([member[name] for member in members]) for name in params}
    one = grad(lambda p, x: loss_fn(p, slow, x)[0])
    got = vmap(one, in_dims=(0, None))(stacked, td)
    for i, member in enumerate(members):
        torch.testing.assert_close({name: x[i] for name, x in got.items()}, one(member, td))
    assert value_loss().functional()[2] is None


# The whole objective.


class Observe(nn.Module):
    """A world model that shares the step and the reward of the rollouts."""

    def __init__(self, world):
        super().__init__()
        self.encode, self.world = nn.Linear(6, STATE + BELIEF), world
        self.logits = nn.ModuleDict({k: nn.Linear(STATE + BELIEF, 8) for k in ("prior_logits", "posterior_logits")})
        self.decode = nn.Linear(STATE + BELIEF, 6)
        self.in_keys = [("next", "pixels")]

    def forward(self, td):
        z = torch.tanh(self.encode(td["next", "pixels"]))
        following = TensorDict(dict(zip(BOTH, z.split([STATE, BELIEF], -1), strict=True)), td.batch_size)
        for name, head in self.logits.items():
            following[name] = head(z).unflatten(-1, (2, 4))
        following["reco_pixels"] = self.decode(z)
        acted = following.select(*BOTH).set("action", torch.ones(*td.batch_size, ACTION, dtype=z.dtype))
        following["reward"] = self.world(acted)["reward"]
        return td.set("next", td["next"].copy().update(following))


def whole(kind="two_hot", seed=9, slow=1.0, reinforce=True, noise=1.0, horizon=H, **knobs):
    torch.manual_seed(seed)
    world, value, actor = world_and_reward(), critic(kind), OwnActor(noise=noise)
    model = DreamerV3ModelLoss(Observe(world), reward_two_hot=False, detach_output=False, free_bits=0.01)
    act = DreamerV3ActorLoss(actor, value, world, imagination_horizon=horizon, use_reinforce=reinforce)
    judge = DreamerV3ValueLoss(value, kind, num_value_bins=BINS, actor_loss=act, slow_critic_regularization=slow)
    return DreamerV3Loss(model, act, judge, **knobs)


def sequences(seed=6):
    torch.manual_seed(seed)
    done = torch.rand(B, T, 1) < 0.3
    following = {
        "pixels": torch.randn(B, T, 6),
        "reward": torch.randn(B, T, 1),
        "done": done,
        "terminated": done & (torch.rand(B, T, 1) < 0.5),
    }
    return TensorDict({"next": following}, [B, T])


def total(losses):
    return sum(x for name, x in losses.items() if name.startswith("loss_"))


@pytest.mark.parametrize("kind", ["symlog_mse", "two_hot"])
def test_whole_objective_is_its_parts(kind):
    loss, td = whole(kind, replay_value_loss_weight=0.4, continuation_horizon=50.0, lmbda=0.8), sequences()
    before = td.clone()
    losses = seeded(loss, td)
    assert (td == before).all()
    parts = whole(kind)
    model, inferred = parts.model_loss(td)
    start = inferred["next"].select(*BOTH).detach().reshape(-1)
    actor, imagined = seeded(parts.actor_loss, start)
    value, _ = parts.value_loss(imagined)
    replay = inferred["next"].select(*BOTH)
    replay["bootstrap"] = imagined["lambda_target"][:, 0, 0].reshape(B, T)
    replay["next"] = td["next"].select("reward", "done", "terminated")
    replayed = parts.value_loss.replay_value_loss(replay, horizon=50.0, lmbda=0.8)["loss_replay_value"]
    expected = {**dict(model.items()), **dict(actor.items()), **dict(value.items())}
    expected |= {"loss_replay_value": 0.4 * replayed, "replay_value": replayed}
    context = losses.pop("replay_context")
    assert set(losses.keys()) == set(expected)
    assert [name for name in losses.keys() if name.startswith("loss_")] == loss.out_keys
    torch.testing.assert_close(dict(losses.items()), expected)
    got, wanted = gradients(total(losses), loss), gradients(total(expected), parts)
    torch.testing.assert_close(got, wanted)
    assert context.batch_size == (B, T)
    for key in BOTH:
        assert torch.equal(context[key], inferred["next", key])
        assert not context[key].requires_grad


def test_gradients_of_the_whole_objective_go_where_they_belong():
    loss = whole()
    losses = loss(sequences())
    groups = {
        "world": loss.model_loss,
        "actor": loss.actor_loss,
        "critic": loss.value_loss,
    }
    trained = {
        "loss_model_kl": {"world"},
        "loss_model_reco": {"world"},
        "loss_model_reward": {"world"},
        "loss_actor": {"actor"},
        "loss_value": {"critic"},
        "loss_replay_value": {"world", "critic"},
    }
    for name in loss.out_keys:
        reached = set()
        for group, module in groups.items():
            by_parameter = torch.autograd.grad(
                losses[name], list(module.parameters()), retain_graph=True, allow_unused=True
            )
            reached |= {group} if any(x is not None for x in by_parameter) else set()
        assert reached == trained[name], name


def test_replay_loss_can_be_left_out():
    loss, td = whole(replay_value_loss_weight=0.0), sequences()
    losses = loss(td)
    assert losses["loss_replay_value"] == losses["replay_value"] == 0
    assert ("next", "done") not in loss.in_keys
    td["next"].pop("done")
    loss(td)
    with pytest.raises(KeyError, match=r"DreamerV3Loss: .*'done'"):
        whole()(td)


@pytest.mark.parametrize("reinforce", [True, False])
def test_whole_functional_is_the_module_with_its_parameters_taken_out(reinforce):
    loss, td = whole(reinforce=reinforce), sequences()
    loss_fn, params, state = loss.functional()
    assert set(params) == {"world_model", "actor", "critic"}
    value, aux, after = seeded(loss_fn, params, state, td)
    assert state.return_range.high == 0
    losses = seeded(loss, td)
    torch.testing.assert_close(value, total(losses))
    assert after.return_range == loss.actor_loss.return_range.state
    for name, x in aux["losses"].items():
        if name != "loss_model":
            torch.testing.assert_close(x, losses[name].detach())
    assert (aux["replay_context"] == losses["replay_context"]).all()
    value.backward()
    got = [p.grad for p in loss.parameters()]
    loss.zero_grad()
    total(losses).backward()
    torch.testing.assert_close(got, [p.grad for p in loss.parameters()])


def test_rollouts_follow_the_parameters_that_are_handed_in():
    """What rollouts share with world model and critic is taken from those, not from the modules."""
    loss, other, td = whole(), whole(), sequences()
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.05)
        for group in other.functional()[1].values():
            assert group
    loss_fn, _, state = loss.functional()
    _, params, _ = other.functional()
    expected = seeded(other.functional()[0], params, state, td)[0]
    assert torch.equal(seeded(loss_fn, params, state, td)[0], expected)
    assert seeded(loss, td)["loss_value"] != seeded(other, td)["loss_value"]


def test_whole_functional_under_vmap_equals_a_loop():
    loss, td = whole(noise=0.0), sequences()
    loss_fn, params, state = loss.functional()
    params = {group: {name: x.detach() for name, x in named.items()} for group, named in params.items()}
    members = [{g: {n: x + 0.02 * i for n, x in named.items()} for g, named in params.items()} for i in range(2)]
    stacked = torch.utils._pytree.tree_map(lambda *x: torch.stack(x), *members)
    one = grad(lambda p, x: loss_fn(p, state, x)[0])
    got = vmap(one, in_dims=(0, None))(stacked, td)
    for i, member in enumerate(members):
        expected = one(member, td)
        torch.testing.assert_close(
            torch.utils._pytree.tree_map(lambda x, i=i: x[i], got), expected, rtol=1e-4, atol=1e-5
        )


def test_whole_objective_trains():
    loss, td = whole(), sequences()
    optimizer, updater = torch.optim.Adam(loss.parameters(), lr=3e-3), SoftUpdate(loss.value_loss, tau=0.02)
    values = []
    for _ in range(60):
        losses = seeded(loss, td)
        optimizer.zero_grad()
        total(losses).backward()
        optimizer.step()
        updater.step()
        values.append({name: x.item() for name, x in losses.items() if name.startswith("loss_")})
    for name in ("loss_model_reco", "loss_value", "loss_replay_value"):
        assert values[-1][name] < values[0][name], name


def test_whole_state_dict_holds_everything_once():
    loss = whole()
    names = list(loss.state_dict())
    parts = ("model_loss.world_model.", "actor_loss.actor_model.", "actor_loss.return_range.", "value_loss.")
    assert all(name.startswith(parts) for name in names)
    loss(sequences())
    other = whole(seed=10)
    other.load_state_dict(loss.state_dict())
    assert torch.equal(total(seeded(other.eval(), sequences())), total(seeded(loss.eval(), sequences())))
    bad = {**loss.state_dict(), "actor_loss.return_range.low": torch.zeros(3)}
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"DreamerV3Loss.load_state_dict: 'actor_loss.return_range.low' must be"):
        other.load_state_dict(bad)
    assert all(torch.equal(x, before[name]) for name, x in other.state_dict().items())


def test_whole_keywords():
    loss, td = whole(), sequences()
    loss.in_keys = [("next", name) for name in ("pixels", "reward", "done", "terminated")]
    values = seeded(lambda: loss(**{f"next_{name}": x for name, x in td["next"].items()}))
    expected = seeded(whole(), td)
    assert len(values) == len(loss.out_keys)
    for name, x in zip(loss.out_keys, values, strict=True):
        torch.testing.assert_close(x, expected[name])


# All of them.


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies(copied):
    loss, td = whole(), sequences()
    other = copied(loss)
    assert torch.equal(total(seeded(other.eval(), td)), total(seeded(loss.eval(), td)))
    shared = {id(p) for p in other.parameters()} & {id(p) for p in loss.parameters()}
    assert not shared
    value = other.actor_loss.value_model
    assert value is other.value_loss.value_model, "what is shared stays shared"


def test_double_precision():
    loss, td = whole().double(), sequences()
    for name in ("pixels", "reward"):
        td["next", name] = td["next", name].double()
    losses = loss(td)
    assert all(x.dtype == torch.float64 for x in losses.values(True, True))


@pytest.mark.parametrize("name", ["pathwise", "value", "whole"])
def test_compiled_equals_eager(name, monkeypatch):
    # Reading values, as validation does, breaks the graph.
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", False)
    whole_loss = whole(noise=0.0, horizon=1)
    loss, td = {
        "pathwise": (actor_loss("normal", imagination_horizon=1), starts()),
        "value": (moved(whole_loss.value_loss), imagined_batch()),
        "whole": (whole_loss, sequences()),
    }[name]
    before = copy.deepcopy(loss.state_dict())
    torch.compiler.reset()
    results = []
    for call in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        loss.load_state_dict(before)
        losses = seeded(call, td)
        value = total(losses[0] if isinstance(losses, tuple) else losses)
        after = {key: x.clone() for key, x in loss.state_dict().items()}
        results.append((value.detach(), gradients(value, loss), after))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


def test_functional_compiled_does_not_recompile():
    loss, td = whole(noise=0.0, horizon=1), sequences()
    loss_fn, params, state = loss.functional()
    params = {group: {name: x.detach() for name, x in named.items()} for group, named in params.items()}
    torch.compiler.reset()
    compiled = torch.compile(lambda *x: loss_fn(*x)[0], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(params, state, td), loss_fn(params, state, td)[0], rtol=1e-4, atol=1e-5)
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled(params, state, sequences(seed=8))


class ShrinkingWorld(World):
    def forward(self, td):
        written = super().forward(td)
        return written.set("state", written["state"][..., 1:])


def returning(key, value, keys=BOTH):
    return TensorDictModule(lambda state, belief: value(state), in_keys=keys, out_keys=[key])


def actor_with(**networks):
    given = {"actor_model": make_actor(), "value_model": critic(), "model_based_env": World(), **networks}
    return DreamerV3ActorLoss(**given, imagination_horizon=H, use_reinforce=True)


REFUSED = {
    "actor is no module": (lambda: actor_with(actor_model=print), TypeError, "DreamerV3ActorLoss: actor_model must be"),
    "horizon of 0": (
        lambda: actor_loss(imagination_horizon=0),
        ValueError,
        r"DreamerV3ActorLoss: imagination_horizon must be at least 1, got 0",
    ),
    "horizon of a float": (
        lambda: actor_loss(imagination_horizon=3.0),
        TypeError,
        r"imagination_horizon must be an int, got float 3.0",
    ),
    "flag": (lambda: actor_loss(use_reinforce="yes"), TypeError, "use_reinforce must be True or False, got str 'yes'"),
    "gamma": (lambda: actor_loss(gamma=1.5), ValueError, r"DreamerV3ActorLoss: gamma must be in \[0, 1\], got 1.5"),
    "rate": (
        lambda: actor_loss(return_normalization_rate=2),
        ValueError,
        r"return_normalization_rate must be in \[0, 1\], got 2",
    ),
    "quantiles": (
        lambda: actor_loss(return_normalization_quantiles=(0.9, 0.1)),
        ValueError,
        "quantiles must be",
    ),
    "smallest unit": (
        lambda: actor_loss(return_normalization_min_scale=-1.0),
        ValueError,
        "return_normalization_min_scale must be at least 0, got -1.0",
    ),
    "no belief": (
        lambda: actor_loss()(starts().exclude("belief")),
        KeyError,
        r"DreamerV3ActorLoss: tensordict must be one with 'belief', got keys \['state'\]. .*set_keys\(belief=...\)",
    ),
    "no action": (
        lambda: actor_with(actor_model=returning("act", lambda x: x[..., :ACTION]))(starts()),
        KeyError,
        r"one with 'action', got keys .*'act'.*It is what the actor decides",
    ),
    "no reward": (
        lambda: actor_with(model_based_env=world_and_reward(reward="gain"))(starts()),
        KeyError,
        r"one with 'reward', got keys .*'gain'.*The world model writes it",
    ),
    "no value": (
        lambda: actor_with(value_model=critic(value="v"))(starts()),
        KeyError,
        r"one with 'state_value', got keys .*'v'",
    ),
    "logits as values": (
        lambda: actor_with(value_model=returning("state_value", lambda x: x))(starts()),
        ValueError,
        r"DreamerV3ActorLoss: value must be of shape \[6, 4\] like the states, got float32 \[6, 4, 5\]",
    ),
    "state of another shape": (
        lambda: actor_with(model_based_env=ShrinkingWorld())(starts()),
        ValueError,
        "imagine: the state of dynamics must be of shape",
    ),
    "choice through the model": (
        lambda: actor_loss("one_hot")(starts()),
        ValueError,
        r"DreamerV3ActorLoss: the actor's distribution must be one with rsample, got OneHotCategorical. "
        r"A choice has no derivative: set use_reinforce=True",
    ),
    "own choice through the model": (
        lambda: actor_loss("choice")(starts()),
        ValueError,
        "A choice has no derivative: use the score estimator",
    ),
    "critic is no module": (lambda: DreamerV3ValueLoss(print), TypeError, "DreamerV3ValueLoss: value_model must be"),
    "kind of loss": (
        lambda: DreamerV3ValueLoss(critic(), "mse"),
        ValueError,
        "value_loss must be one of 'symlog_mse', 'two_hot', got 'mse'",
    ),
    "reduction": (
        lambda: value_loss(reduction="max"),
        ValueError,
        "reduction must be one of 'mean', 'sum', 'none', got 'max'",
    ),
    "slow weight": (
        lambda: value_loss(slow_critic_regularization=-1.0),
        ValueError,
        "slow_critic_regularization must be at least 0, got -1.0",
    ),
    "bins": (lambda: value_loss("two_hot", num_value_bins=1), ValueError, "num_value_bins must be at least 2, got 1"),
    "other bins": (
        lambda: value_loss("two_hot", num_value_bins=12)(imagined_batch()),
        ValueError,
        r"value_logits must be of shape \[..., 12\], got float32 \[6, 3, 11\]. Set num_value_bins to the width",
    ),
    "values as logits": (
        lambda: DreamerV3ValueLoss(critic("two_hot", value="v", logits="state_value"))(imagined_batch()),
        ValueError,
        r"value must be of shape \[..., 1\], got float32 \[6, 3, 11\]. Logits go with value_loss='two_hot'",
    ),
    "no logits": (
        lambda: DreamerV3ValueLoss(critic(value="v"), "two_hot")(imagined_batch()),
        KeyError,
        r"one with 'state_value_logits', got keys .* value_loss='two_hot' compares logits",
    ),
    "no target": (
        lambda: value_loss()(imagined_batch().exclude("lambda_target")),
        KeyError,
        r"one with 'lambda_target', got keys .* DreamerV3ActorLoss writes it",
    ),
    "target of another shape": (
        lambda: value_loss()(imagined_batch().set("lambda_target", torch.zeros(6, H, 2))),
        ValueError,
        r"lambda_target must be of shape \[6, 3\] like the states, got float32 \[6, 3, 2\]",
    ),
    "weight of another shape": (
        lambda: value_loss()(imagined_batch().set("discount_weight", torch.zeros(6, H, 2))),
        ValueError,
        r"discount_weight must be of shape \[6, 3\]",
    ),
    "no bootstrap": (
        lambda: value_loss().replay_value_loss(replay_batch().exclude("bootstrap")),
        KeyError,
        r"one with 'bootstrap', got keys .*set_keys\(bootstrap=...\)",
    ),
    "no end": (
        lambda: value_loss().replay_value_loss(replay_batch().exclude(("next", "done"))),
        KeyError,
        r"set_keys\(done=...\)",
    ),
    "replay horizon": (
        lambda: value_loss().replay_value_loss(replay_batch(), horizon=0.5),
        ValueError,
        "DreamerV3ValueLoss.replay_value_loss: horizon must be at least 1, got 0.5",
    ),
    "one step replayed": (
        lambda: value_loss().replay_value_loss(replay_batch(B, 1)),
        ValueError,
        r"reward must be of shape \[..., T >= 2\]",
    ),
    "slow params of another structure": (
        lambda: value_loss("two_hot", slow_critic_regularization=1.0).functional()[0](
            value_loss("two_hot").functional()[1], {"module.0.module.linear.bias": torch.zeros(BINS)}, imagined_batch()
        ),
        KeyError,
        r"missing \['module.0.module.linear.weight'\]",
    ),
    "no slow critic to move": (
        lambda: value_loss().update_target(),
        ValueError,
        r"update_target: slow_critic_regularization must be above 0, got 0",
    ),
    "rate of the slow critic": (
        lambda: value_loss(slow_critic_regularization=1.0).update_target(2.0),
        ValueError,
        r"ema_update: rate must be in \[0, 1\], got 2.0",
    ),
    "soft update of nothing": (
        lambda: SoftUpdate(nn.Linear(1, 1), tau=0.1),
        TypeError,
        "SoftUpdate: loss_module must be",
    ),
    "soft update without a rate": (
        lambda: SoftUpdate(value_loss(slow_critic_regularization=1.0)),
        ValueError,
        "SoftUpdate: one of eps and tau must be given, got neither",
    ),
    "soft update with two": (
        lambda: SoftUpdate(value_loss(slow_critic_regularization=1.0), eps=0.1, tau=0.9),
        ValueError,
        "one of eps and tau must be given, got both",
    ),
    "soft update too fast": (
        lambda: SoftUpdate(value_loss(slow_critic_regularization=1.0), tau=1.1),
        ValueError,
        r"SoftUpdate: tau must be in \[0, 1\], got 1.1",
    ),
    "parts in another order": (
        lambda: DreamerV3Loss(whole().actor_loss, whole().model_loss, whole().value_loss),
        TypeError,
        "DreamerV3Loss: model_loss must be a DreamerV3ModelLoss, got DreamerV3ActorLoss",
    ),
    "detached model": (
        lambda: DreamerV3Loss(DreamerV3ModelLoss(World()), actor_loss(), value_loss()),
        ValueError,
        r"model_loss.detach_output must be False, got True. The replay loss trains the world model",
    ),
    "unreduced critic": (
        lambda: DreamerV3Loss(whole().model_loss, actor_loss(), value_loss(reduction="none")),
        ValueError,
        "value_loss.reduction must be 'mean' or 'sum', got 'none'",
    ),
    "replay weight": (lambda: whole(replay_value_loss_weight=-0.1), ValueError, "replay_value_loss_weight must be"),
    "continuation horizon": (
        lambda: whole(continuation_horizon=0),
        ValueError,
        "continuation_horizon must be at least 1",
    ),
    "whole discount": (lambda: whole(lmbda=1.1), ValueError, r"DreamerV3Loss: lmbda must be in \[0, 1\], got 1.1"),
    "a group of parameters is missing": (
        lambda: whole().functional()[0]({"actor": {}, "critic": {}}, whole().functional()[2], sequences()),
        KeyError,
        "DreamerV3Loss: params must be a mapping with 'world_model'",
    ),
}


@pytest.mark.parametrize(("call", "error", "match"), REFUSED.values(), ids=list(REFUSED))
def test_refusals(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_an_unknown_name_is_refused():
    for loss in (actor_loss(), value_loss(), whole()):
        with pytest.raises(ValueError, match=rf"{type(loss).__name__}.set_keys: each name must be one of"):
            loss.set_keys(nonsense="x")


def test_a_failed_call_leaves_the_range():
    loss = actor_loss(use_reinforce=True)
    loss(starts())
    before = loss.return_range.state.high.clone()
    with pytest.raises(KeyError):
        loss(starts().exclude("state"))
    assert loss.return_high == before


def test_a_bad_batch_does_not_poison_the_range():
    loss, td = actor_loss(use_reinforce=True), starts()
    loss(td)
    before = loss.return_range.state.high.clone()
    td["state"][0] = float("nan")
    loss(td)
    assert loss.return_high == before
