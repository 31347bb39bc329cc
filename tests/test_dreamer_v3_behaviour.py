"""DreamerV3's behaviour: golden numbers, the formulas in loops, what stops where, and every refusal."""

import math
from types import MappingProxyType

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from torch.func import grad, grad_and_value, jvp, vmap
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves, tree_map

from rlloss import (
    DREAMER_V3_OFFICIAL,
    CategoricalPolicy,
    DreamerV3Agent,
    DreamerV3State,
    EvaluatedPolicy,
    MeanStd,
    NormalPolicy,
    ReturnRange,
    bounded_normal,
    categorical_policy,
    dreamer_v3_actor_loss,
    dreamer_v3_actor_terms,
    dreamer_v3_loss,
    dreamer_v3_model_loss,
    dreamer_v3_replay_value_loss,
    dreamer_v3_returns,
    dreamer_v3_value_loss,
    dreamer_v3_value_terms,
    imagine,
    lambda_return,
    laprop_init,
    laprop_update,
    mean_std_read,
    mean_std_update,
    policy_entropy,
    policy_log_prob,
    policy_sample,
    return_range_init,
    return_range_scale,
    symexp_bins,
    two_hot_decode,
)

NAN, INF = float("nan"), float("inf")
BATCH, TIME, WIDTH, ACTION, CLASSES, BINS = 3, 5, 4, 2, 3, 11
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5}
DTYPES = [torch.float64, torch.float32]


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def relative(actual, expected, rtol):
    """Equal up to ``rtol`` of the largest entry."""
    assert_close(actual.double(), expected, rtol=rtol, atol=rtol * expected.abs().max().item())


def zero(x):
    return torch.equal(x, torch.zeros_like(x))


# ---- golden values: imagination --------------------------------------------------------------------------------------

CASES = ["disc", "disc_warm", "cont", "both", "nocontdisc_slowtar", "valnorm_advnorm", "noupdate"]


def inputs_of(data, case, dtype):
    """Tensors of a case: heads' outputs to differentiate, and the rest."""
    prefix = f"{case}.in."
    tensors = {key.removeprefix(prefix): x for key, x in data.items() if key.startswith(prefix)}
    tensors = {key: x.to(dtype) if x.is_floating_point() else x for key, x in tensors.items()}
    heads = {key: tensors[key] for key in ("rew", "con", "val", "slow")}
    return heads | {key: x for key, x in tensors.items() if key.startswith("pol.")}, tensors


def policy_of(heads, head):
    policy = {}
    for name in sorted({key.split(".")[1] for key in heads if key.startswith("pol.")}):
        if f"pol.{name}.logits" in heads:
            # A single choice is a group of its own.
            policy[name] = categorical_policy(heads[f"pol.{name}.logits"].unsqueeze(-2))
        else:
            raw = heads[f"pol.{name}.mean"], heads[f"pol.{name}.stddev"]
            policy[name] = bounded_normal(*raw, minimum=head["minstd"], maximum=head["maxstd"])
    return policy


def action_of(tensors):
    actions = {key.removeprefix("act."): x for key, x in tensors.items() if key.startswith("act.")}
    return {name: x if x.is_floating_point() else x.unsqueeze(-1) for name, x in actions.items()}


def normaliser(tensors, name, config, seen=None, update=True):
    """``(offset, scale)`` of a normaliser, and its state, after it has seen a batch if given."""
    if config["impl"] == "none":
        return None, None
    state = MeanStd(*(tensors[f"norm.{name}.{key}"] for key in ("mean", "sqrs", "corr")))
    if seen is not None and update:
        state = mean_std_update(state, seen, rate=config["rate"])
    return mean_std_read(state, minimum=config["limit"]), state


def behaviour(heads, tensors, config, bins):
    """Everything the authors' function computes, composed of ours."""
    knobs, update, last = config["imag_loss"], config["update"], slice(None, -1)
    value_stats, _ = normaliser(tensors, "valnorm", config["valnorm"])
    slow, value = (two_hot_decode(heads[name], bins) for name in ("slow", "val"))
    state = ReturnRange(tensors["norm.retnorm.lo"], tensors["norm.retnorm.hi"])
    targets, state = dreamer_v3_returns(
        heads["rew"],
        heads["con"],
        slow if knobs["slowtar"] else value,
        state,
        discount=1.0 if config["contdisc"] else 1 - 1 / config["horizon"],
        lmbda=knobs["lam"],
        value_stats=value_stats,
        rate=config["retnorm"]["rate"] if update else 0.0,
    )
    advantage_stats, adv_state = normaliser(tensors, "advnorm", config["advnorm"], targets.advantage, update)
    value_stats, val_state = normaliser(tensors, "valnorm", config["valnorm"], targets.returns, update)
    actor = dreamer_v3_actor_terms(
        tree_map(lambda x: x[:, last], policy_of(heads, config["policy_head"])),
        tree_map(lambda x: x[:, last], action_of(tensors)),
        targets.advantage,
        targets.weight,
        entropy=knobs["actent"],
        advantage_stats=advantage_stats,
    )
    critic = dreamer_v3_value_terms(
        heads["val"][:, last],
        heads["slow"][:, last],
        targets.returns,
        targets.weight,
        slow_weight=knobs["slowreg"],
        bins=bins,
        value_stats=value_stats,
    )
    return {"policy": actor, "value": critic}, targets, {"ret": state, "adv": adv_state, "val": val_state}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_authors_imagination_losses(golden, case, dtype):
    data, wide = golden("07_imag_loss"), TOLERANCE[dtype]
    config, bins = data.meta["cases"][case], data[f"{case}.bins"].to(dtype)
    heads, tensors = inputs_of(data, case, dtype)
    terms, targets, states = behaviour(heads, tensors, config, bins)
    for name, x in terms.items():
        assert x.dtype == dtype
        relative(x, data[f"{case}.out.{name}"], wide)
    relative(targets.returns, data[f"{case}.out.ret"], wide)
    relative(states["ret"].low, data[f"{case}.out.norm.retnorm.lo"], wide)
    relative(states["ret"].high, data[f"{case}.out.norm.retnorm.hi"], wide)
    for name in ("adv", "val"):
        if states[name] is not None:
            for ours, theirs in zip(states[name], ("mean", "sqrs", "corr"), strict=True):
                relative(ours, data[f"{case}.out.norm.{name}norm.{theirs}"], wide)
    met = {key.split(".out.met.")[1]: x for key, x in data.items() if key.startswith(f"{case}.out.met.")}
    relative(targets.advantage.mean(), met["adv"], 10 * wide)
    relative(targets.advantage.abs().mean(), met["adv_mag"], wide)
    policy = policy_of(heads, config["policy_head"])
    relative(policy_log_prob(policy, action_of(tensors)), data[f"{case}.out.aux.logpi"], wide)
    relative(policy_entropy(policy), data[f"{case}.out.aux.ent"], wide)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_authors_imagination_gradients(golden, case, dtype):
    data = golden("07_imag_loss")
    config, bins = data.meta["cases"][case], data[f"{case}.bins"].to(dtype)
    heads, tensors = inputs_of(data, case, dtype)
    for name in ("policy", "value"):
        gradients = grad(lambda heads, name=name: behaviour(heads, tensors, config, bins)[0][name].sum())(heads)
        expected = {key: x for key, x in data.items() if key.startswith(f"{case}.grad.{name}.")}
        trained = {key.split(f".grad.{name}.")[1] for key in expected}
        trained = {f"pol.{key}" if name == "policy" else key for key in trained}
        assert trained == ({"val"} if name == "value" else {key for key in heads if key.startswith("pol.")})
        for key, x in expected.items():
            at = key.split(f".grad.{name}.")[1]
            relative(gradients[f"pol.{at}" if name == "policy" else at], x, 1e-5)
        for key, gradient in gradients.items():
            # Neither the other networks nor the last step get anything.
            assert zero(gradient if key not in trained else gradient[:, -1]), key


@pytest.mark.parametrize("case", CASES)
def test_authors_imagination_losses_on_parameters(golden, case):
    data = golden("07_imag_loss")
    config, bins = data.meta["cases"][case], data[f"{case}.bins"]
    heads, tensors = inputs_of(data, case, torch.float64)
    _, targets, _ = behaviour(heads, tensors, config, bins)
    value_stats, _ = normaliser(tensors, "valnorm", config["valnorm"], targets.returns, config["update"])
    advantage_stats, _ = normaliser(tensors, "advnorm", config["advnorm"], targets.advantage, config["update"])
    batch = {**targets._asdict(), "action": action_of(tensors), "features": torch.arange(heads["rew"].shape[1])}
    batch["features"] = batch["features"].expand(heads["rew"].shape)

    def actor(params, features):
        return policy_of({key: x[:, : features.shape[1]] for key, x in params.items()}, config["policy_head"])

    loss, aux = dreamer_v3_actor_loss(
        heads, batch, actor=actor, entropy=config["imag_loss"]["actent"], advantage_stats=advantage_stats
    )
    assert_close(loss, data[f"{case}.out.policy"].mean(), rtol=1e-6, atol=1e-7)
    relative(aux["terms"], data[f"{case}.out.policy"], 1e-6)
    relative(aux["log_prob"], data[f"{case}.out.aux.logpi"][:, :-1], 1e-6)
    relative(aux["entropy"], data[f"{case}.out.aux.ent"][:, :-1], 1e-6)
    loss, aux = dreamer_v3_value_loss(
        {"logits": heads["val"]},
        {"logits": heads["slow"]},
        batch,
        critic=lambda params, features: params["logits"][:, : features.shape[1]],
        slow_weight=config["imag_loss"]["slowreg"],
        bins=bins,
        value_stats=value_stats,
    )
    assert_close(loss, data[f"{case}.out.value"].mean(), rtol=1e-6, atol=0)
    relative(aux["terms"], data[f"{case}.out.value"], 1e-6)
    relative(aux["value"], data[f"{case}.out.aux.val_pred"][:, :-1], 1e-6)


def test_every_array_of_the_imagination_file_is_of_a_case_above(golden):
    assert {key.split(".")[0] for key in golden("07_imag_loss")} == set(CASES)
    assert set(golden("07_imag_loss").meta["cases"]) == set(CASES)


# ---- golden values: replay -------------------------------------------------------------------------------------------

REPLAY_CASES = ["default", "b41", "slowtar", "valnorm", "valnorm_noupdate"]


def replay(heads, tensors, config, bins):
    knobs = config["repl_loss"]
    discount, lmbda = 1 - 1 / config["horizon"], knobs["lam"]
    goes_on = ~tensors["term"]
    returns = lambda_return(heads["rew"], heads["boot"], goes_on, tensors["last"], discount=discount, lmbda=lmbda)
    stats, state = None, None
    if "valnorm" in config:
        stats, state = normaliser(tensors, "valnorm", config["valnorm"], returns.detach(), config["update"])
    batch = {
        "features": tensors["last"],
        "reward": heads["rew"],
        "bootstrap": heads["boot"],
        "terminated": tensors["term"],
        "is_last": tensors["last"],
    }
    loss, aux = dreamer_v3_replay_value_loss(
        {"logits": heads["val"]},
        {"logits": heads["slow"]},
        batch,
        critic=lambda params, features: params["logits"][:, : features.shape[1]],
        discount=discount,
        lmbda=lmbda,
        slow_weight=knobs["slowreg"],
        bins=bins,
        value_stats=stats,
    )
    return loss, aux, state


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", REPLAY_CASES)
def test_authors_replay_loss(golden, case, dtype):
    data, wide = golden("07_repl_loss"), TOLERANCE[dtype]
    config, bins = data.meta["cases"][case], data[f"{case}.bins"].to(dtype)
    tensors = {k.split(".in.")[1]: x for k, x in data.items() if k.startswith(f"{case}.in.")}
    tensors = {k: x.to(dtype) if x.is_floating_point() else x for k, x in tensors.items()}
    heads = {key: tensors[key] for key in ("val", "slow", "rew", "boot")}
    loss, aux, state = replay(heads, tensors, config, bins)
    relative(aux["terms"], data[f"{case}.out.repval"], wide)
    relative(aux["returns"], data[f"{case}.out.ret"], wide)
    assert_close(loss.double(), data[f"{case}.out.repval"].mean(), rtol=wide, atol=0)
    assert zero(aux["terms"][tensors["last"][:, :-1]])
    if state is not None:
        for ours, theirs in zip(state, ("mean", "sqrs", "corr"), strict=True):
            relative(ours, data[f"{case}.out.norm.valnorm.{theirs}"], wide)
    gradients = grad(lambda heads: replay(heads, tensors, config, bins)[0] * aux["terms"].numel())(heads)
    relative(gradients["val"], data[f"{case}.grad.repval.val"], 1e-5)
    assert zero(gradients["val"][:, -1])
    for name in ("slow", "rew", "boot"):
        assert zero(gradients[name]), name


def test_every_array_of_the_replay_file_is_of_a_case_above(golden):
    assert {key.split(".")[0] for key in golden("07_repl_loss")} == set(REPLAY_CASES)


# ---- the formulas, written as loops ----------------------------------------------------------------------------------


def dynamics(params, state, action, noise):
    deter = torch.tanh(state["deter"] @ params["deter"] + action["turn"] @ params["turn"])
    moved = deter + action["press"].flatten(-2) @ params["press"]
    return {"deter": moved, "stoch": (moved @ params["stoch"]).sigmoid() + noise}


def heads(params, features):
    """The policy's distributions."""
    hidden = torch.cat([features["deter"], features["stoch"]], -1) @ params["actor"]
    turn = bounded_normal(hidden[..., :ACTION], hidden[..., ACTION : 2 * ACTION])
    return {"turn": turn, "press": categorical_policy(hidden[..., None, 2 * ACTION :], unimix=0.01)}


def sampled(params, state, noise):
    return policy_sample(heads(params, state), noise)


def critic(params, features):
    return torch.cat([features["deter"], features["stoch"]], -1) @ params["critic"]


def parameters(seed=1, dtype=torch.float32):
    shapes = {
        "deter": (WIDTH, WIDTH),
        "turn": (ACTION, WIDTH),
        "press": (CLASSES, WIDTH),
        "stoch": (WIDTH, 1),
        "actor": (WIDTH + 1, 2 * ACTION + CLASSES),
        "critic": (WIDTH + 1, BINS),
    }
    return {name: randn(*shape, seed=seed + i, dtype=dtype) for i, (name, shape) in enumerate(shapes.items())}


def start_and_noise(dtype=torch.float32, batch=BATCH, horizon=TIME - 1, seed=50):
    start = {"deter": randn(batch, WIDTH, seed=seed, dtype=dtype), "stoch": randn(batch, 1, seed=seed + 1, dtype=dtype)}
    turn = randn(batch, horizon + 1, ACTION, seed=seed + 2, dtype=dtype)
    press = randn(batch, horizon + 1, 1, CLASSES, seed=seed + 3, dtype=dtype)
    transitions = randn(batch, horizon, 1, seed=seed + 4, dtype=dtype)
    return start, {"policy": {"turn": turn, "press": press}, "dynamics": transitions}


def rollout_of(params, start, noise, horizon=TIME - 1, **knobs):
    return imagine(params, start, noise, dynamics=dynamics, policy=sampled, horizon=horizon, **knobs)


def make_batch(seed=100, dtype=torch.float32, batch=BATCH, time=TIME):
    """What both losses read, of no rollout in particular."""
    features = {"deter": randn(batch, time, WIDTH, seed=seed, dtype=dtype)}
    features["stoch"] = randn(batch, time, 1, seed=seed + 1, dtype=dtype)
    press = torch.randint(0, CLASSES, (batch, time, 1), generator=torch.Generator().manual_seed(seed))
    action = {"turn": randn(batch, time, ACTION, seed=seed + 2, dtype=dtype), "press": press}
    weight = torch.rand(batch, time - 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    returns, advantage = (3 * randn(batch, time - 1, seed=seed + i, dtype=dtype) for i in (3, 4))
    return {"features": features, "action": action, "weight": weight, "returns": returns, "advantage": advantage}


def make_replay(seed=200, dtype=torch.float32, batch=BATCH, time=TIME):
    generator = torch.Generator().manual_seed(seed)
    flags = {name: torch.rand(batch, time, generator=generator) < 0.3 for name in ("terminated", "is_last")}
    numbers = {name: randn(batch, time, seed=seed + i, dtype=dtype) for i, name in enumerate(("reward", "bootstrap"))}
    return {**flags, **numbers, "features": make_batch(seed, dtype, batch, time)["features"]}


def actor_loss(params, batch, **knobs):
    return dreamer_v3_actor_loss(params, batch, actor=heads, **knobs)[0]


def value_loss(params, slow_params, batch, **knobs):
    return dreamer_v3_value_loss(params, slow_params, batch, critic=critic, **knobs)[0]


def replay_loss(params, slow_params, batch, **knobs):
    return dreamer_v3_replay_value_loss(params, slow_params, batch, critic=critic, **knobs)[0]


def percentile(values, q):
    values = sorted(values)
    place = q * (len(values) - 1)
    low = math.floor(place)
    high = min(low + 1, len(values) - 1)
    return values[low] + (place - low) * (values[high] - values[low])


@pytest.mark.parametrize(("discount", "lmbda"), [(1.0, 0.95), (0.9, 0.5), (0.5, 0.0), (0.0, 1.0)])
def test_returns_are_the_formula(discount, lmbda):
    reward, value = 3 * randn(BATCH, TIME, seed=1), 3 * randn(BATCH, TIME, seed=2)
    go = torch.sigmoid(2 * randn(BATCH, TIME, seed=3))
    old = ReturnRange(torch.tensor(-20.0).double(), torch.tensor(30.0).double())
    targets, state = dreamer_v3_returns(reward, go, value, old, discount=discount, lmbda=lmbda, rate=0.3)
    returns, weight = torch.zeros(BATCH, TIME - 1).double(), torch.zeros(BATCH, TIME - 1).double()
    for b in range(BATCH):
        after = value[b, -1]
        for t in reversed(range(TIME - 1)):
            after = reward[b, t + 1] + discount * go[b, t + 1] * ((1 - lmbda) * value[b, t + 1] + lmbda * after)
            returns[b, t] = after
        for t in range(TIME - 1):
            weight[b, t] = go[b, 0] * math.prod(discount * go[b, i].item() for i in range(1, t + 1))
    low, high = (percentile(returns.flatten().tolist(), q) for q in (0.05, 0.95))
    low, high = 0.7 * -20 + 0.3 * low, 0.7 * 30 + 0.3 * high
    assert_close(targets.returns, returns)
    assert_close(targets.weight, weight)
    assert_close(state, ReturnRange(*(torch.tensor(x, dtype=torch.float64) for x in (low, high))))
    assert_close(targets.advantage, (returns - value[:, :-1]) / max(1.0, high - low))


def two_hot_nats(logits, target):
    n = len(logits)
    bins = [math.copysign(math.expm1(abs(x)), x) for x in (-20 + 40 * k / (n - 1) for k in range(n))]
    target = min(max(target, bins[0]), bins[-1])
    k = max(i for i in range(n - 1) if bins[i] <= target)
    upper = (target - bins[k]) / (bins[k + 1] - bins[k])
    total = math.log(sum(math.exp(x) for x in logits))
    return (1 - upper) * (total - logits[k]) + upper * (total - logits[k + 1])


def decoded(logits):
    n, total = len(logits), sum(math.exp(x) for x in logits)
    bins = [math.copysign(math.expm1(abs(x)), x) for x in (-20 + 40 * k / (n - 1) for k in range(n))]
    return sum(math.exp(x) / total * b for x, b in zip(logits, bins, strict=True))


def squash(x):
    return math.copysign(math.log1p(abs(x)), x)


@pytest.mark.parametrize("stats", [None, (0.5, 2.0)])
@pytest.mark.parametrize("slow_weight", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("kind", ["two_hot", "symlog_mse"])
def test_value_terms_are_the_formula(kind, slow_weight, stats):
    shape = (BATCH, TIME, BINS) if kind == "two_hot" else (BATCH, TIME)
    prediction, slow = randn(*shape, seed=1), randn(*shape, seed=2)
    returns, weight = 5 * randn(BATCH, TIME, seed=3), randn(BATCH, TIME, seed=4).sigmoid()
    knobs = {"slow_weight": slow_weight, "value_loss": kind, "value_stats": stats}
    terms = dreamer_v3_value_terms(prediction, slow, returns, weight, **knobs)
    offset, scale = stats or (0.0, 1.0)
    for b in range(BATCH):
        for t in range(TIME):
            goal, at, slow_at = (returns[b, t].item() - offset) / scale, prediction[b, t].tolist(), slow[b, t].tolist()
            if kind == "two_hot":
                nats = two_hot_nats(at, goal) + slow_weight * two_hot_nats(at, decoded(slow_at))
            else:
                nats = (squash(at) - squash(goal)) ** 2 + slow_weight * (squash(at) - squash(slow_at)) ** 2
            assert_close(terms[b, t].item(), weight[b, t].item() * nats)
    if kind == "symlog_mse":
        trailing = dreamer_v3_value_terms(prediction.unsqueeze(-1), slow.unsqueeze(-1), returns, weight, **knobs)
        assert_close(trailing, terms)


@pytest.mark.parametrize("estimator", ["score", "pathwise"])
def test_actor_terms_are_the_formula(estimator):
    batch = make_batch(dtype=torch.float64, time=TIME + 1)
    mean, stddev = randn(BATCH, TIME, ACTION, seed=1), randn(BATCH, TIME, ACTION, seed=2).exp()
    action, advantage, weight = batch["action"]["turn"][:, :-1], batch["advantage"], batch["weight"]
    policy, knobs = NormalPolicy(mean, stddev), {"entropy": 0.3, "advantage_stats": (0.2, 4.0)}
    terms = dreamer_v3_actor_terms(policy, action, advantage, weight, estimator=estimator, **knobs)
    for b in range(BATCH):
        for t in range(TIME):
            gain, entropy = (advantage[b, t].item() - 0.2) / 4, 0.0
            nats = 0.0
            for m, s, a in zip(mean[b, t].tolist(), stddev[b, t].tolist(), action[b, t].tolist(), strict=True):
                nats += -0.5 * ((a - m) / s) ** 2 - math.log(s) - 0.5 * math.log(2 * math.pi)
                entropy += math.log(s) + 0.5 * math.log(2 * math.pi * math.e)
            gain *= nats if estimator == "score" else 1.0
            assert_close(terms[b, t].item(), -weight[b, t].item() * (gain + 0.3 * entropy))


def test_losses_are_means_of_their_terms():
    params, slow, batch = parameters(1), parameters(2), make_batch()
    for loss, aux in (
        dreamer_v3_actor_loss(params, batch, actor=heads),
        dreamer_v3_value_loss(params, slow, batch, critic=critic),
        dreamer_v3_replay_value_loss(params, slow, make_replay(), critic=critic),
    ):
        assert loss.shape == ()
        assert all(x.shape == (BATCH, TIME - 1) for x in aux.values())
        assert not any(x.requires_grad for x in aux.values())
        assert_close(loss, aux["terms"].mean())


@pytest.mark.parametrize("empty", [False, True])
def test_reductions_of_the_value_losses(empty):
    params, slow = parameters(1), parameters(2)
    calls = ((dreamer_v3_value_loss, make_batch()), (dreamer_v3_replay_value_loss, make_replay()))
    for function, batch in calls:
        batch = tree_map(lambda x: x[:0], batch) if empty else batch
        losses = {r: function(params, slow, batch, critic=critic, reduction=r) for r in ("mean", "sum", "none")}
        terms = losses["none"][1]["terms"]
        assert torch.equal(losses["none"][0], terms)
        assert_close(losses["sum"][0], terms.sum())
        assert_close(losses["mean"][0], torch.tensor(0.0) if empty else terms.mean())
        match = rf"{function.__name__}: reduction must be one of 'mean', 'sum', 'none', got 'max'"
        with pytest.raises(ValueError, match=match):
            function(params, slow, batch, critic=critic, reduction="max")


@pytest.mark.parametrize("estimator", ["score", "pathwise"])
def test_any_mapping_is_a_policy_and_an_action(estimator):
    policy, action = {"turn": NORMAL, "steer": NORMAL}, {"turn": ACT, "steer": ACT + 1}
    expected = actor(policy, {"action": action}, estimator=estimator)
    assert_close(actor(MappingProxyType(policy), {"action": MappingProxyType(action)}, estimator=estimator), expected)
    now = {name: x[:, :-1] for name, x in action.items()}
    terms = dreamer_v3_actor_terms(MappingProxyType(policy), MappingProxyType(now), ADV, W, estimator=estimator)
    assert_close(terms, expected[1]["terms"])


def test_evaluated_policy_in_the_actor_loss():
    """By either estimator the loss is that of the distribution it came from, gradients too."""
    batch, params = make_batch(dtype=torch.float64, time=TIME + 1), randn(ACTION, 2, seed=1).requires_grad_()
    action, advantage, weight = batch["action"]["turn"][:, :-1], batch["advantage"], batch["weight"].clone()
    weight[0, 0] = 0.0

    def normal():
        return NormalPolicy(params[:, 0].expand_as(action), params[:, 1].exp().expand_as(action))

    for estimator in ("score", "pathwise"):
        results = []
        for evaluate in (False, True):
            policy = normal()
            if evaluate:
                policy = EvaluatedPolicy(policy_log_prob(policy, action), policy_entropy(policy))
                # Where a step weighs nothing, what its distribution said leaves no trace.
                policy = EvaluatedPolicy(policy.log_prob.masked_fill(weight == 0, float("nan")), policy.entropy)
            terms = dreamer_v3_actor_terms(policy, action, advantage, weight, entropy=0.1, estimator=estimator)
            results.append((terms.detach(), torch.autograd.grad(terms.sum(), params)[0]))
        assert_close(results[1], results[0])
    match = r"dreamer_v3_actor_terms: entropy of the policy must be of shape .* like the weight"
    with pytest.raises(ValueError, match=match):
        dreamer_v3_actor_terms(EvaluatedPolicy(weight, weight[0]), action, advantage, weight)
    with pytest.raises(TypeError, match=r"log_prob of the policy must be a tensor, got NoneType"):
        dreamer_v3_actor_terms(EvaluatedPolicy(None, weight), action, advantage, weight)
    with pytest.raises(TypeError, match="policy must be a NormalPolicy, a CategoricalPolicy or a mapping"):
        policy_sample(EvaluatedPolicy(weight, weight), weight)


def test_replay_loss_is_the_value_loss_of_replayed_returns():
    params, slow, batch = parameters(1), parameters(2), make_replay()
    loss, aux = dreamer_v3_replay_value_loss(params, slow, batch, critic=critic, discount=0.9, lmbda=0.7)
    go, last = ~batch["terminated"], batch["is_last"]
    returns = lambda_return(batch["reward"], batch["bootstrap"], go, last, discount=0.9, lmbda=0.7)
    entries = {"features": batch["features"], "returns": returns, "weight": (~last[:, :-1]).float()}
    expected, expected_aux = dreamer_v3_value_loss(params, slow, entries, critic=critic)
    assert_close((loss, aux["terms"], aux["value"]), (expected, expected_aux["terms"], expected_aux["value"]))
    assert_close(aux["returns"], returns)


def test_rollout_is_a_loop():
    params, (start, noise) = parameters(dtype=torch.float64), start_and_noise(torch.float64)
    rollout = rollout_of(params, start, noise)
    state, states, actions = start, [start], []
    for step in range(TIME):
        now = tree_map(lambda x, step=step: x[:, step], noise["policy"])
        actions.append(sampled(params, state, now))
        if step < TIME - 1:
            state = dynamics(params, state, actions[-1], noise["dynamics"][:, step])
            states.append(state)
    assert rollout.states["deter"].shape == (BATCH, TIME, WIDTH)
    assert rollout.actions["press"].shape == (BATCH, TIME, 1, CLASSES)
    assert_close(rollout.states, {key: torch.stack([s[key] for s in states], 1) for key in start})
    assert_close(rollout.actions, {key: torch.stack([a[key] for a in actions], 1) for key in actions[0]})


@pytest.mark.parametrize("lead", [(), (2,), (2, 3), (0,)])
def test_rollout_of_any_leading_dimensions(lead):
    params, dim = parameters(), len(lead)
    start, noise = start_and_noise(batch=math.prod(lead))
    start = tree_map(lambda x: x.reshape(*lead, *x.shape[1:]), start)
    noise = tree_map(lambda x: x.reshape(*lead, *x.shape[1:]), noise)
    rollout = rollout_of(params, start, noise, time_dim=dim)
    assert rollout.states["deter"].shape == (*lead, TIME, WIDTH)
    assert rollout.actions["turn"].shape == (*lead, TIME, ACTION)
    flat = rollout_of(params, *start_and_noise(batch=math.prod(lead)))
    assert_close(rollout.states["deter"].flatten(), flat.states["deter"].flatten())


def test_state_and_action_are_any_pytrees():
    def step(params, state, action, noise):
        assert noise is None
        return (state[0] + action, {"count": state[1]["count"] + 1})

    start = (torch.zeros(BATCH, 2), {"count": torch.zeros(BATCH, dtype=torch.int64)})
    rollout = imagine({}, start, {}, dynamics=step, policy=lambda params, state, noise: torch.ones(BATCH, 2), horizon=2)
    assert rollout.states[1]["count"].tolist() == [[0, 1, 2]] * BATCH
    assert rollout.states[0][0].tolist() == [[0, 0], [1, 1], [2, 2]]
    assert rollout.actions.shape == (BATCH, 3, 2)


@pytest.mark.parametrize("name", ["policy", "dynamics"])
def test_noise_may_be_left_out(name):
    params, (start, noise) = parameters(), start_and_noise()
    zeros = {**noise, name: tree_map(torch.zeros_like, noise[name])}

    def without(function, index):
        def call(*args):
            assert args[-1] is None
            filler = tree_map(lambda x: x[:, 0], zeros[name])
            return function(*args[:-1], filler)

        return call if index == name else function

    functions = {"policy": without(sampled, "policy") if name == "policy" else sampled}
    functions["dynamics"] = without(dynamics, "dynamics") if name == "dynamics" else dynamics
    left = {key: x for key, x in noise.items() if key != name}
    expected = rollout_of(params, start, zeros)
    for some in (left, {**left, name: None}):
        assert_close(imagine(params, start, some, **functions, horizon=TIME - 1), expected)


# ---- cases of the method ---------------------------------------------------------------------------------------------


def test_constant_continuation_weighs_its_powers():
    go, zeros = torch.full((1, 5), 332 / 333), torch.zeros(1, 5)
    targets, _ = dreamer_v3_returns(zeros, go, zeros, return_range_init())
    assert_close(targets.weight[0], torch.tensor([0.996997, 0.994003, 0.991018, 0.988042]))
    # Where the discount is a number, the first weight is the continuation alone.
    targets, _ = dreamer_v3_returns(zeros, torch.ones(1, 5), zeros, return_range_init(), discount=0.5)
    assert_close(targets.weight[0], torch.tensor([1.0, 0.5, 0.25, 0.125]))


def test_rollout_from_a_terminal_state_weighs_nothing():
    params, slow = parameters(1), parameters(2)
    go = torch.cat([torch.zeros(BATCH, 1), torch.ones(BATCH, TIME - 1)], 1)
    reward = randn(BATCH, TIME, dtype=torch.float32)
    targets, _ = dreamer_v3_returns(reward, go, reward, return_range_init())
    batch = {**make_batch(), **targets._asdict()}
    assert zero(targets.weight)
    for loss in (lambda p: actor_loss(p, batch), lambda p: value_loss(p, slow, batch)):
        gradients, value = grad_and_value(loss)(params)
        assert zero(value)
        assert all(zero(g) for g in gradients.values())


def test_terminal_steps_have_no_future():
    reward = torch.tensor([[9.0, 1.0, 2.0, 3.0, 4.0]])
    value = torch.tensor([[100.0, NAN, INF, -INF, NAN]])
    targets, _ = dreamer_v3_returns(reward, torch.zeros(1, 5, dtype=torch.bool), value, return_range_init())
    assert_close(targets.returns, torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    assert zero(targets.weight)


def test_first_reward_is_never_read():
    reward, go, value = randn(BATCH, TIME), torch.ones(BATCH, TIME), randn(BATCH, TIME, seed=1)
    other = torch.cat([torch.full((BATCH, 1), NAN), reward[:, 1:]], 1)
    results = [dreamer_v3_returns(x, go, value, return_range_init()) for x in (reward, other)]
    assert_close(*results, rtol=0, atol=0)


def test_range_is_updated_before_it_is_used_and_kept_by_a_rate_of_0():
    reward = torch.linspace(0, 1000, 1001)[:, None].expand(-1, 2)
    zeros, ones = torch.zeros(1001, 2), torch.ones(1001, 2)
    targets, state = dreamer_v3_returns(reward, ones, zeros, return_range_init())
    assert_close(return_range_scale(state), torch.tensor(9.0))
    assert_close(targets.advantage, targets.returns / 9.0)
    targets, state = dreamer_v3_returns(reward, ones, zeros, return_range_init(), rate=0.0)
    assert_close(state, return_range_init(), rtol=0, atol=0)
    assert_close(targets.advantage, targets.returns)


def test_score_is_the_gradient_of_the_expectation():
    # Over all actions of one state, weighted by their chance: the policy gradient theorem.
    worth, logits = torch.tensor([1.0, -2.0, 5.0]).double(), randn(CLASSES)

    def loss(logits, index):
        policy = CategoricalPolicy(logits.expand(1, 1, CLASSES))
        return dreamer_v3_actor_terms(
            policy, index.reshape(1, 1), worth[index].reshape(1), torch.ones(1).double(), entropy=0.0
        ).sum()

    chances = torch.softmax(logits, -1)
    gradient = sum(chances[i] * grad(loss)(logits, torch.tensor(i)) for i in range(CLASSES))
    assert_close(gradient, grad(lambda x: -(torch.softmax(x, -1) * worth).sum())(logits))


def test_pathwise_gradient_goes_through_the_model():
    # An open loop, so that the gradient is that of finite differences: states reach no policy.
    def step(params, state, action, noise):
        return 0.9 * state + torch.sin(action)

    def plan(params, state, noise):
        return policy_sample(NormalPolicy(params["mean"].expand_as(state), params["stddev"].expand_as(state)), noise)

    noise = {"policy": randn(2, 4, 1, seed=3)}

    def loss(mean, stddev):
        params = {"mean": mean, "stddev": stddev}
        rollout = imagine(params, torch.ones(2, 1).double(), noise, dynamics=step, policy=plan, horizon=3)
        reward = rollout.states.squeeze(-1).square()
        returns = lambda_return(reward, reward, torch.ones_like(reward), discount=0.9)
        batch = {"features": rollout.states, "advantage": returns, "weight": torch.ones_like(returns)}

        def actor(params, features):
            return NormalPolicy(params["mean"].expand_as(features), params["stddev"].expand_as(features))

        return dreamer_v3_actor_loss(params, batch, actor=actor, entropy=0.1, estimator="pathwise")[0]

    inputs = [torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in (0.3, 0.7)]
    assert torch.autograd.gradcheck(loss, inputs, check_forward_ad=True)


# ---- where gradients go ----------------------------------------------------------------------------------------------


def test_policy_sees_states_without_their_gradient():
    params, (start, noise) = parameters(dtype=torch.float64), start_and_noise(torch.float64)
    gradients = grad(lambda start: sum(x.sum() for x in rollout_of(params, start, noise).actions.values()))(start)
    assert all(zero(g) for g in gradients.values())
    gradients = grad(lambda start: rollout_of(params, start, noise).states["deter"].sum())(start)
    assert not zero(gradients["deter"])
    gradients = grad(lambda params: rollout_of(params, start, noise).states["deter"].sum())(params)
    assert not zero(gradients["actor"])
    assert not zero(gradients["turn"])


def test_targets_are_constants_of_the_networks():
    def total(reward, go, value):
        return sum(x.sum() for x in dreamer_v3_returns(reward, go, value, return_range_init())[0])

    args = (randn(BATCH, TIME), randn(BATCH, TIME, seed=1).sigmoid(), randn(BATCH, TIME, seed=2))
    assert all(zero(g) for g in grad(total, argnums=(0, 1, 2))(*args))


def test_actor_loss_reaches_neither_actions_nor_the_last_step():
    batch = make_batch(dtype=torch.float64)

    def loss(features, turn):
        action = {**batch["action"], "turn": turn}
        return actor_loss(parameters(dtype=torch.float64), {**batch, "features": features, "action": action})

    features, turn = grad(loss, argnums=(0, 1))(batch["features"], batch["action"]["turn"])
    assert zero(turn)
    for gradient in features.values():
        assert zero(gradient[:, -1])
        assert not zero(gradient[:, :-1])


@pytest.mark.parametrize("kind", ["two_hot", "symlog_mse"])
def test_value_losses_train_the_critic_and_its_features_only(kind):
    def predict(params, features):
        logits = critic(params, features)
        return logits if kind == "two_hot" else logits[..., 0]

    params, slow = parameters(1, torch.float64), parameters(2, torch.float64)
    replayed, imagined = make_replay(dtype=torch.float64), make_batch(dtype=torch.float64)

    def imagination(params, slow, features):
        batch = {**imagined, "features": features}
        return dreamer_v3_value_loss(params, slow, batch, critic=predict, value_loss=kind)[0]

    def replay(params, slow, features, reward, bootstrap):
        batch = {**replayed, "features": features, "reward": reward, "bootstrap": bootstrap}
        return dreamer_v3_replay_value_loss(params, slow, batch, critic=predict, value_loss=kind)[0]

    for loss, args in (
        (imagination, (params, slow, imagined["features"])),
        (replay, (params, slow, replayed["features"], replayed["reward"], replayed["bootstrap"])),
    ):
        by_params, by_slow, by_features, *others = grad(loss, argnums=tuple(range(len(args))))(*args)
        assert not zero(by_params["critic"])
        assert all(zero(g) for g in [*by_slow.values(), *others])
        assert all(zero(g[:, -1]) and not zero(g[:, :-1]) for g in by_features.values())


def test_last_steps_of_episodes_are_not_trained_on():
    params, slow, batch = parameters(1), parameters(2), make_replay()
    batch["is_last"] = torch.tensor([[False, True, False, False, False]]).expand(BATCH, -1)
    _, aux = dreamer_v3_replay_value_loss(params, slow, batch, critic=critic)
    assert zero(aux["terms"][:, 1])
    assert (aux["terms"][:, [0, 2, 3]] > 0).all()
    features = grad(lambda f: replay_loss(params, slow, {**batch, "features": f}))(batch["features"])
    assert zero(features["deter"][:, 1])


# ---- numbers that must not spread ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_what_weighs_nothing_leaves_no_trace(bad):
    params, slow, batch = parameters(1), parameters(2), make_batch()
    dead = torch.zeros(BATCH, TIME - 1, dtype=torch.bool)
    dead[1, 2:] = True
    batch["weight"] = torch.where(dead, 0.0, batch["weight"])
    longer = torch.cat([dead, torch.ones(BATCH, 1, dtype=torch.bool)], 1)

    def spoil(x):
        if not x.is_floating_point():
            return x
        mask = dead if x.shape[1] == TIME - 1 else longer
        return torch.where(mask.reshape(*mask.shape, *[1] * (x.ndim - 2)), bad, x)

    spoiled = {**tree_map(spoil, batch), "weight": batch["weight"]}
    for loss in (lambda p, b: actor_loss(p, b), lambda p, b: value_loss(p, slow, b)):
        gradients, value = grad_and_value(loss)(params, spoiled)
        expected = grad_and_value(loss)(params, batch)
        assert_close((gradients, value), expected)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_what_follows_an_episode_leaves_no_trace_in_the_replay_loss(bad):
    params, slow, batch = parameters(1), parameters(2), make_replay()
    is_last = torch.zeros(BATCH, TIME, dtype=torch.bool)
    is_last[:, 2] = True
    batch |= {"is_last": is_last, "terminated": is_last}
    spoiled = {**batch, "features": tree_map(torch.clone, batch["features"]), "reward": batch["reward"].clone()}
    spoiled["reward"][:, 3] = bad
    spoiled["features"]["deter"][:, 2] = bad
    results = [grad_and_value(replay_loss)(params, slow, x) for x in (batch, spoiled)]
    assert_close(*results)


def test_saturated_logits_and_huge_targets_stay_finite():
    logits = torch.tensor([[1e4, *[-1e4] * (BINS - 1)]]).expand(TIME, BINS)
    returns = torch.tensor([1e12, -1e12, INF, -INF, 0.0])

    def loss(logits):
        return dreamer_v3_value_terms(logits, -logits, returns, torch.ones(TIME)).sum()

    gradient, value = grad_and_value(loss)(logits)
    assert torch.isfinite(value)
    assert torch.isfinite(gradient).all()


# ---- eager, vmapped, compiled; derivatives ---------------------------------------------------------------------------


def everything(params, slow, start, noise, replayed):
    """All losses of one rollout."""
    rollout = rollout_of(params, start, noise, noise["dynamics"].shape[1])
    states = tree_map(torch.detach, rollout.states)
    reward, value = states["deter"].sum(-1), two_hot_decode(critic(params, states), symexp_bins(BINS)) / 1e6
    targets, state = dreamer_v3_returns(reward, torch.sigmoid(reward), value, return_range_init(), discount=0.9)
    batch = {"features": states, "action": rollout.actions, **targets._asdict()}
    losses = (
        dreamer_v3_actor_loss(params, batch, actor=heads),
        dreamer_v3_value_loss(params, slow, batch, critic=critic),
        dreamer_v3_replay_value_loss(params, slow, replayed, critic=critic),
    )
    return losses, rollout, targets, state


def arguments(seed=1, horizon=TIME - 1):
    return parameters(seed), parameters(seed + 1), *start_and_noise(horizon=horizon), make_replay(time=horizon + 1)


def test_everything_in_every_variant(variant):
    args = arguments(horizon=1)
    assert_close(variant(everything)(*args), everything(*args), rtol=1e-5, atol=1e-5)


def test_options_in_every_variant(variant):
    def compute(prediction, slow, batch, stats):
        value = dreamer_v3_value_terms(
            prediction, slow, batch["returns"], batch["weight"], value_loss="symlog_mse", value_stats=stats
        )
        policy = {"turn": NormalPolicy(batch["returns"].unsqueeze(-1), batch["weight"].unsqueeze(-1) + 1)}
        actor = dreamer_v3_actor_terms(
            policy, None, batch["advantage"], batch["weight"], estimator="pathwise", advantage_stats=stats
        )
        return value, actor

    batch = {name: x for name, x in make_batch().items() if isinstance(x, torch.Tensor)}
    shape = (BATCH, TIME - 1)
    args = (randn(*shape, dtype=torch.float32), randn(*shape, seed=1, dtype=torch.float32), batch)
    args = (*args, (torch.tensor(0.3), torch.tensor(2.0)))
    assert_close(variant(compute)(*args), compute(*args))


def test_gradients_in_every_variant(variant):
    def compute(params, slow, batch):
        def total(params):
            return actor_loss(params, batch) + value_loss(params, slow, batch)

        def norm(params):
            return sum(g.square().sum() for g in grad(total)(params).values())

        return grad_and_value(total)(params), grad(norm)(params)

    args = (parameters(1), parameters(2), make_batch())
    assert_close(variant(compute)(*args), compute(*args), rtol=1e-4, atol=1e-4)


def test_jvp_in_every_variant(variant):
    # Along the outputs of the networks: torch 2.13 cannot compile vmap of jvp of a matmul.
    def compute(args, direction, action):
        def terms(raw, slow, logits, advantage, weight):
            actor = dreamer_v3_actor_terms(CategoricalPolicy(raw), action, advantage, weight)
            return actor, dreamer_v3_value_terms(logits, slow, advantage, weight)

        return jvp(terms, args, direction)

    shape = (BATCH, TIME)
    shapes = ((*shape, 1, CLASSES), (*shape, BINS), (*shape, BINS), shape, shape)
    args = tuple(randn(*s, seed=i, dtype=torch.float32) for i, s in enumerate(shapes))
    direction = tuple(randn(*s, seed=i + 9, dtype=torch.float32) for i, s in enumerate(shapes))
    action = make_batch(time=TIME)["action"]["press"]
    assert_close(variant(compute)(args, direction, action), compute(args, direction, action))


def test_derivatives_are_those_of_finite_differences():
    batch, slow = make_batch(dtype=torch.float64, batch=2, time=3), parameters(2, torch.float64)
    replayed, base = make_replay(dtype=torch.float64, batch=2, time=3), parameters(1, torch.float64)

    def loss(actor, critic):
        params = {**base, "actor": actor, "critic": critic}
        value = value_loss(params, slow, batch, value_stats=(0.1, 2.0)) + 0.3 * replay_loss(params, slow, replayed)
        return actor_loss(params, batch, advantage_stats=(0.1, 2.0)) + value

    inputs = [base[name].clone().requires_grad_() for name in ("actor", "critic")]
    assert torch.autograd.gradcheck(loss, inputs, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(loss, inputs, check_fwd_over_rev=True, fast_mode=True)


KNOBS = {"discount": 0.9, "lmbda": 0.8, "entropy": 0.1, "slow_weight": 0.7, "value_offset": 0.1, "value_scale": 1.5}
KNOBS |= {"advantage_offset": 0.2, "advantage_scale": 0.6, "minimum": 1.3}


def knobs_of(values):
    return dict(zip(KNOBS, values, strict=True))


def loss_of_knobs(params, knobs, fixed):
    """Actor, value and replay losses, of targets that depend on the knobs."""
    slow, batch, replayed, (reward, go, value) = fixed
    value_stats = (knobs["value_offset"], knobs["value_scale"])
    # The range of returns is a constant: the old one is so wide that these returns do not move it.
    targets, _ = dreamer_v3_returns(
        reward,
        go,
        value,
        return_range_init(dtype=torch.float64),
        discount=knobs["discount"],
        lmbda=knobs["lmbda"],
        minimum=knobs["minimum"],
        value_stats=value_stats,
        rate=0.0,
    )
    batch = {**batch, **targets._asdict()}
    stats = (knobs["advantage_offset"], knobs["advantage_scale"])
    actor = actor_loss(params, batch, entropy=knobs["entropy"], advantage_stats=stats)
    weight = knobs["slow_weight"]
    critic = value_loss(params, slow, batch, slow_weight=weight, value_stats=value_stats)
    old = {"discount": knobs["discount"], "lmbda": knobs["lmbda"], "slow_weight": weight, "value_stats": value_stats}
    return actor, critic, replay_loss(params, slow, replayed, **old)


def fixed_inputs():
    steps = tuple(randn(2, 4, seed=i) for i in (11, 12, 13))
    steps = (steps[0], torch.sigmoid(steps[1]), steps[2])
    sizes = {"dtype": torch.float64, "batch": 2, "time": 4}
    return parameters(2, torch.float64), make_batch(**sizes), make_replay(**sizes), steps


def test_knobs_are_differentiable():
    fixed, params = fixed_inputs(), parameters(1, torch.float64)

    def losses(*values):
        return loss_of_knobs(params, knobs_of(values), fixed)

    inputs = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in KNOBS.values()]
    assert torch.autograd.gradcheck(losses, inputs, check_forward_ad=True)
    derivatives = torch.func.jacrev(losses, argnums=tuple(range(len(KNOBS))))(*(x.detach() for x in inputs))
    for i, name in enumerate(KNOBS):
        # Each knob moves those losses that have it.
        moved = [not zero(of_loss[i]) for of_loss in derivatives]
        expected = {"entropy": [1, 0, 0], "slow_weight": [0, 1, 1]}
        expected |= {f"advantage_{x}": [1, 0, 0] for x in ("offset", "scale")} | {"minimum": [1, 0, 0]}
        expected |= {f"value_{x}": [1, 1, 1] for x in ("offset", "scale")}
        assert moved == [bool(x) for x in expected.get(name, [1, 1, 1])], name


def test_knobs_are_differentiable_through_a_step_of_the_optimiser():
    fixed, params = fixed_inputs(), parameters(1, torch.float64)

    def loss(params, *values):
        return sum(loss_of_knobs(params, knobs_of(values), fixed))

    # After one step already: the first of all is the sign of the gradient, which has no derivative.
    values = [torch.tensor(x, dtype=torch.float64) for x in KNOBS.values()]
    before = {name: randn(*p.shape, seed=99 + i) for i, (name, p) in enumerate(params.items())}
    _, state = laprop_update(params, before, laprop_init(params), warmup=0)

    def after(*values):
        gradients = grad(loss)(params, *values)
        moved, _ = laprop_update(params, gradients, state, learning_rate=0.1, warmup=0)
        return value_loss(moved, *fixed[:2]) + actor_loss(moved, fixed[1])

    inputs = [x.clone().requires_grad_() for x in values]
    assert torch.autograd.gradcheck(after, inputs)
    gradients = dict(zip(KNOBS, torch.autograd.grad(after(*inputs), inputs), strict=True))
    assert all(not zero(gradients[name]) for name in ("discount", "lmbda", "entropy"))


def test_ensemble_is_a_loop():
    members = [arguments(10 * i)[:2] for i in range(3)]
    rest = arguments()[2:]
    params, slow = (tree_map(lambda *x: torch.stack(x), *group) for group in zip(*members, strict=True))
    together = vmap(everything, in_dims=(0, 0, None, None, None))(params, slow, *rest)
    for i, member in enumerate(members):
        one = tree_map(lambda x, i=i: x[i], together)
        assert_close(one, everything(*member, *rest), rtol=1e-4, atol=1e-4)


def test_second_call_does_not_recompile():
    torch.compiler.reset()

    def compute(knobs, *args):
        params, slow, batch, replayed = args
        losses = actor_loss(params, batch, entropy=knobs[0]), value_loss(params, slow, batch, slow_weight=knobs[1])
        return *losses, replay_loss(params, slow, replayed, discount=knobs[2], lmbda=knobs[3])

    compiled = torch.compile(compute, fullgraph=True, backend="aot_eager")
    first = (torch.tensor([0.1, 0.2, 0.3, 0.4]).unbind(), parameters(1), parameters(2), make_batch(), make_replay())
    compiled(*first)
    with torch.compiler.set_stance("fail_on_recompile"):
        for i in range(3):
            knobs = torch.full((4,), 0.2 * i).unbind()
            args = (knobs, parameters(i), parameters(i + 3), make_batch(i), make_replay(i))
            assert_close(compiled(*args), compute(*args))


# ---- dtypes, shapes, purity ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    narrow = [randn(BATCH, TIME, BINS, dtype=dtype), randn(BATCH, TIME, BINS, seed=1, dtype=dtype)]
    narrow += [randn(BATCH, TIME, seed=i, dtype=dtype) for i in (2, 3, 4)]

    narrow[3] = narrow[3].sigmoid()

    def compute(logits, slow, returns, weight, reward):
        policy = CategoricalPolicy(logits.unsqueeze(-2))
        index = torch.zeros(BATCH, TIME, 1, dtype=torch.int64)
        targets, state = dreamer_v3_returns(reward, weight, returns, return_range_init())
        actor = dreamer_v3_actor_terms(policy, index, returns, weight)
        value = dreamer_v3_value_terms(logits, slow, returns, weight)
        return actor, value, *targets, *state

    results = compute(*narrow)
    assert {x.dtype for x in results} == {torch.float32}
    assert_close(results, compute(*(x.float() for x in narrow)))


def test_float64_stays():
    losses, _, targets, _ = everything_in_float64()
    assert {x.dtype for x in tree_leaves((losses, targets))} == {torch.float64}


def everything_in_float64():
    return everything(*tree_map(lambda x: x.double() if x.is_floating_point() else x, arguments()))


@pytest.mark.parametrize(("batch", "time"), [(0, 3), (1, 2), (1, 5)])
def test_empty_and_single(batch, time):
    params, slow = parameters(1), parameters(2)
    imagined, replayed = make_batch(batch=batch, time=time), make_replay(batch=batch, time=time)
    rollout = rollout_of(params, *start_and_noise(batch=batch, horizon=time - 1), horizon=time - 1)
    assert rollout.states["deter"].shape == (batch, time, WIDTH)
    steps = [randn(batch, time, seed=i, dtype=torch.float32) for i in range(3)]
    targets, state = dreamer_v3_returns(*steps, return_range_init())
    assert targets.returns.shape == (batch, time - 1)
    assert (not batch) == (state == return_range_init())
    losses = actor_loss(params, imagined), value_loss(params, slow, imagined), replay_loss(params, slow, replayed)
    for loss in losses:
        assert loss.shape == ()
        assert torch.isfinite(loss)
        assert batch or loss == 0


def test_single_sequences_and_more_leading_dimensions():
    params, slow, batch = parameters(1), parameters(2), make_batch()
    expected = dreamer_v3_actor_loss(params, batch, actor=heads)[1]["terms"]
    for lead in ((), (1, BATCH), (BATCH, 1, 1)):
        reshaped = tree_map(lambda x, lead=lead: (x if lead else x[:1]).reshape(*lead, *x.shape[1:]), batch)
        _, aux = dreamer_v3_actor_loss(params, reshaped, actor=heads)
        assert aux["terms"].shape == (*lead, TIME - 1)
        assert_close(aux["terms"].flatten(), (expected if lead else expected[0]).flatten())
        assert value_loss(params, slow, reshaped).shape == ()


def test_tensordicts_are_batches_and_parameters():
    params, slow, batch, replayed = parameters(1), parameters(2), make_batch(), make_replay()
    as_td = TensorDict({**batch, "features": TensorDict(batch["features"], [BATCH, TIME])}, [BATCH])
    params_td, slow_td = TensorDict(params), TensorDict(slow)
    assert_close(actor_loss(params_td, as_td), actor_loss(params, batch))
    assert_close(value_loss(params_td, slow_td, as_td), value_loss(params, slow, batch))
    assert_close(
        replay_loss(params_td, slow_td, TensorDict(replayed, [BATCH, TIME])), replay_loss(params, slow, replayed)
    )
    start, noise = start_and_noise()

    def step(params, state, action, noise):
        return TensorDict(dynamics(params, state, action, noise), [BATCH])

    functions = {"dynamics": step, "policy": sampled, "horizon": TIME - 1}
    rollout = imagine(params_td, TensorDict(start, [BATCH]), TensorDict(noise, [BATCH]), **functions)
    assert_close(rollout.states.to_dict(), rollout_of(params, start, noise).states)


def test_slow_parameters_may_be_in_another_order():
    params, slow, batch = parameters(1), parameters(2), make_batch()
    backwards = dict(reversed(slow.items()))
    assert_close(value_loss(params, backwards, batch), value_loss(params, slow, batch))


def test_without_a_slow_critic():
    params, batch = parameters(1), make_batch()
    expected = value_loss(params, parameters(2), batch, slow_weight=0.0)
    assert_close(value_loss(params, None, batch, slow_weight=0.0), expected)
    assert_close(value_loss(params, parameters(2), batch, slow_weight=torch.tensor(0.0)), expected)


def test_arguments_unchanged_and_no_random_numbers_drawn():
    args = arguments()
    before, state = tree_map(torch.clone, args), torch.get_rng_state()
    everything(*args)
    assert_close(args, before, rtol=0, atol=0)
    assert torch.equal(state, torch.get_rng_state())


@given(st.floats(0, 1), st.floats(0, 1), st.integers(2, 6), st.integers(0, 10_000))
def test_weights_fall_and_returns_of_nothing_are_nothing(discount, lmbda, time, seed):
    go, zeros = randn(2, time, seed=seed).sigmoid(), torch.zeros(2, time).double()
    targets, _ = dreamer_v3_returns(zeros, go, zeros, return_range_init(), discount=discount, lmbda=lmbda)
    assert (targets.weight.diff(dim=-1) <= 0).all()
    assert (targets.weight[:, 0] == go[:, 0]).all()
    assert zero(targets.returns)
    assert zero(targets.advantage)


@given(st.floats(-100, 100), st.floats(0.1, 10), st.integers(0, 10_000))
def test_normalising_is_an_affine_change_of_the_target(offset, scale, seed):
    logits, returns = randn(4, BINS, seed=seed), 10 * randn(4, seed=seed + 1)
    ones = torch.ones(4).double()
    stats = dreamer_v3_value_terms(logits, None, returns, ones, slow_weight=0.0, value_stats=(offset, scale))
    moved = dreamer_v3_value_terms(logits, None, (returns - offset) / scale, ones, slow_weight=0.0)
    assert_close(stats, moved)


# ---- the whole objective ---------------------------------------------------------------------------------------------

MODEL = {"observe": (WIDTH, WIDTH), "prior": (WIDTH, 2 * CLASSES), "posterior": (WIDTH, 2 * CLASSES)}
MODEL |= {"decoder": (WIDTH, WIDTH), "reward": (WIDTH, BINS), "continue": (WIDTH, 1)}
PARTS = {"world_model": ("deter", "turn", "press", "stoch"), "actor": ("actor",), "critic": ("critic",)}


def world_model(params, batch):
    deter = torch.tanh(batch["observation"] @ params["observe"])
    state = {"deter": deter, "stoch": (deter @ params["stoch"]).sigmoid()}
    logits = {name: (deter @ params[name]).unflatten(-1, (2, CLASSES)) for name in ("prior", "posterior")}
    return {
        **{f"{name}_logits": x for name, x in logits.items()},
        "reconstruction": deter @ params["decoder"],
        "reward": deter @ params["reward"],
        "continue_logits": deter @ params["continue"],
        "state": state,
    }


AGENT = DreamerV3Agent(
    world_model=world_model,
    dynamics=dynamics,
    reward=lambda params, state: state["deter"] @ params["reward"],
    continuation=lambda params, state: state["deter"] @ params["continue"],
    actor=heads,
    critic=critic,
)


def whole(seed=1, dtype=torch.float32, horizon=2, rows=2, steps=3, starts=None):
    """``(params, state, batch, noise)`` of the whole objective."""
    all_params = parameters(seed, dtype)
    params = {part: {name: all_params[name] for name in names} for part, names in PARTS.items()}
    params["world_model"] |= {
        name: randn(*shape, seed=seed + 20 + i, dtype=dtype) for i, (name, shape) in enumerate(MODEL.items())
    }
    slow = {"critic": randn(WIDTH + 1, BINS, seed=seed + 40, dtype=dtype)}
    state = DreamerV3State(slow, ReturnRange(torch.tensor(-1.0).to(dtype), torch.tensor(5.0).to(dtype)))
    batch = {
        name: x for name, x in make_replay(seed, dtype, rows, steps).items() if name not in ("features", "bootstrap")
    }
    batch["observation"] = randn(rows, steps, WIDTH, seed=seed + 41, dtype=dtype)
    _, noise = start_and_noise(dtype, rows * (starts or steps), horizon, seed + 42)
    return params, state, batch, noise


KNOBS_OF_MODEL = {"num_reward_bins": BINS, "free_bits": 0.1}


def whole_loss(params, state, batch, noise, **knobs):
    knobs = {"horizon": 2, **KNOBS_OF_MODEL, **knobs}
    return dreamer_v3_loss(params, state, batch, noise, agent=AGENT, **knobs)


@pytest.mark.parametrize("starts", [None, 2])
def test_whole_objective_is_the_sum_of_its_losses_each_with_its_own_gradient(starts):
    params, state, batch, noise = whole(dtype=torch.float64, starts=starts)
    rows, steps = 2, starts or 3
    constant = tree_map(torch.detach, params)

    def infer(model):
        outputs = world_model(model, batch)["state"]
        return tree_map(lambda x: x[:, -steps:], outputs)

    start = tree_map(lambda x: x.flatten(0, 1), infer(constant["world_model"]))
    rollout = imagine(
        {name: x for part in constant.values() for name, x in part.items()},
        start,
        noise,
        dynamics=dynamics,
        policy=sampled,
        horizon=2,
    )
    bins, states = symexp_bins(BINS, dtype=torch.float64), rollout.states
    reward = two_hot_decode(AGENT.reward(constant["world_model"], states), bins)
    go = torch.sigmoid(AGENT.continuation(constant["world_model"], states)).squeeze(-1)
    value = two_hot_decode(critic(constant["critic"], states), bins)
    targets, new_range = dreamer_v3_returns(reward, go, value, state.return_range)
    imagined = {"features": states, "action": rollout.actions, **targets._asdict()}
    replayed = {name: batch[name][:, -steps:] for name in ("reward", "terminated", "is_last")}
    replayed["bootstrap"] = targets.returns[:, 0].reshape(rows, steps)

    def model(params):
        knobs = {**DREAMER_V3_OFFICIAL, **KNOBS_OF_MODEL}
        return dreamer_v3_model_loss(params["world_model"], batch, world_model=world_model, **knobs)[0]

    def replay(params):
        return replay_loss(params["critic"], state.slow_critic, {**replayed, "features": infer(params["world_model"])})

    parts = {
        "model": model,
        "actor": lambda params: actor_loss(params["actor"], imagined),
        "value": lambda params: value_loss(params["critic"], state.slow_critic, imagined),
        "replay": replay,
    }
    values = {name: grad_and_value(part)(params) for name, part in parts.items()}
    gradients = grad(lambda params: whole_loss(params, state, batch, noise, starts=starts)[0])(params)
    loss, aux, after = whole_loss(params, state, batch, noise, starts=starts)
    scales = {"model": 1.0, "actor": 1.0, "value": 1.0, "replay": 0.3}
    assert_close(loss, sum(scales[name] * value for name, (_, value) in values.items()))
    expected = tree_map(
        lambda *g: sum(s * x for s, x in zip(scales.values(), g, strict=True)), *(g for g, _ in values.values())
    )
    assert_close(gradients, expected)
    assert_close(after, DreamerV3State(state.slow_critic, new_range))
    assert_close(aux["targets"], targets)
    for name, key in (("actor", "actor"), ("value", "value"), ("replay", "replay_value")):
        assert_close(aux["losses"][key], values[name][1])
    # Imagination trains nobody but its own network; replay trains the world model too.
    touched = {
        name: {part for part, g in values[name][0].items() if any(not zero(x) for x in g.values())} for name in parts
    }
    assert touched == {
        "model": {"world_model"},
        "actor": {"actor"},
        "value": {"critic"},
        "replay": {"world_model", "critic"},
    }
    assert not any(x.requires_grad for x in tree_leaves(aux))


def test_replay_loss_of_detached_features_leaves_the_world_model_alone():
    params, state, batch, _ = whole(dtype=torch.float64)
    replayed = {name: batch[name] for name in ("reward", "terminated", "is_last")} | {"bootstrap": batch["reward"] + 1}

    def objective(params, weight, repval_grad):
        knobs = {**DREAMER_V3_OFFICIAL, **KNOBS_OF_MODEL}
        model, aux = dreamer_v3_model_loss(params["world_model"], batch, world_model=world_model, **knobs)
        states = aux["outputs"]["state"]
        features = states if repval_grad else tree_map(torch.detach, states)
        return model + weight * replay_loss(params["critic"], state.slow_critic, {**replayed, "features": features})

    alone = grad(objective)(params, 0.0, False)["world_model"]
    without, with_gradient = (grad(objective)(params, 0.3, repval_grad) for repval_grad in (False, True))
    assert all(torch.equal(x, alone[name]) for name, x in without["world_model"].items())
    assert any(not torch.equal(x, alone[name]) for name, x in with_gradient["world_model"].items())
    assert_close(without["critic"], with_gradient["critic"])
    assert not zero(without["critic"]["critic"])


def test_rollouts_may_be_made_by_the_agent():
    params, state, batch, noise = whole()
    given = []

    def rollout(*arguments):
        given.append(arguments)
        frozen, start, drawn, horizon = arguments
        same = imagine(
            frozen,
            start,
            drawn,
            dynamics=lambda params, *rest: dynamics(params["world_model"], *rest),
            policy=lambda params, state, noise: policy_sample(heads(params["actor"], state), noise),
            horizon=horizon,
        )
        return same._replace(states=tree_map(lambda x: x * scale, same.states))

    knobs, scale = {"horizon": 2, **KNOBS_OF_MODEL}, torch.tensor(1.0, requires_grad=True)
    expected = dreamer_v3_loss(params, state, batch, noise, agent=AGENT, **knobs)
    made = dreamer_v3_loss(params, state, batch, noise, agent=AGENT._replace(rollout=rollout), **knobs)
    assert_close(made, expected)
    assert not made[0].requires_grad, "rollouts are constants"
    ((frozen, start, drawn, horizon),) = given
    scale = torch.tensor(2.0)
    changed = dreamer_v3_loss(params, state, batch, noise, agent=AGENT._replace(rollout=rollout), **knobs)
    assert changed[0] != expected[0]
    assert drawn is noise
    assert horizon == 2
    assert not any(x.requires_grad for x in tree_leaves((frozen, start)))


def test_sizes_may_be_integers_of_numpy():
    params, state, batch, noise = whole(starts=2)
    expected = whole_loss(params, state, batch, noise, starts=2)
    assert_close(whole_loss(params, state, batch, noise, starts=np.int64(2), horizon=np.int64(2)), expected)


def test_whole_objective_without_a_slow_critic():
    params, state, batch, noise = whole()
    expected = whole_loss(params, state, batch, noise, slow_weight=0.0)
    loss, aux, after = whole_loss(params, state._replace(slow_critic=None), batch, noise, slow_weight=0.0)
    assert_close((loss, aux["losses"], after.return_range), (expected[0], expected[1]["losses"], expected[2][1]))
    assert after.slow_critic is None


def test_slow_critic_and_range_get_no_gradient():
    params, state, batch, noise = whole()
    gradients = grad(lambda slow: whole_loss(params, state._replace(slow_critic=slow), batch, noise)[0])(
        state.slow_critic
    )
    assert zero(gradients["critic"])


def test_weights_of_the_whole_objective():
    args = whole()
    off = {f"lambda_{name}": 0.0 for name in ("actor", "value", "replay_value")}
    base, aux, _ = whole_loss(*args, **off)
    for name in ("actor", "value", "replay_value"):
        loss, _, _ = whole_loss(*args, **{**off, f"lambda_{name}": 0.5})
        assert_close(loss, base + 0.5 * aux["losses"][name], rtol=1e-4, atol=1e-5)


def test_whole_objective_in_every_variant(variant):
    def compute(*args):
        return grad_and_value(lambda params: whole_loss(params, *args[1:], horizon=1)[0])(args[0])

    args = whole(horizon=1)
    assert_close(variant(compute)(*args), compute(*args), rtol=1e-4, atol=1e-4)


def test_whole_objective_takes_tensordicts_and_trailing_ones():
    params, state, batch, noise = whole()
    expected = whole_loss(params, state, batch, noise)
    wide = {name: x.unsqueeze(-1) if name != "observation" else x for name, x in batch.items()}
    agent = AGENT._replace(
        world_model=lambda params, batch: TensorDict(world_model(params, batch), [2, 3]),
        dynamics=lambda *inputs: TensorDict(dynamics(*inputs), [6]),
    )
    args = (TensorDict(params), state._replace(slow_critic=TensorDict(state.slow_critic)), TensorDict(wide, [2, 3]))
    loss, aux, after = dreamer_v3_loss(*args, TensorDict(noise, [6]), agent=agent, horizon=2, **KNOBS_OF_MODEL)
    assert_close(
        (loss, aux["losses"], after.return_range), (expected[0], expected[1]["losses"], expected[2].return_range)
    )


# ---- refusals --------------------------------------------------------------------------------------------------------

R = torch.zeros(2, 4)
W, ADV, FEATURES, ACT = torch.ones(2, 3), torch.ones(2, 3), torch.zeros(2, 4, 5), torch.zeros(2, 4, 1)
NORMAL = NormalPolicy(torch.zeros(2, 3, 1), torch.ones(2, 3, 1))
LOGITS = torch.zeros(2, 3, BINS)


def returns(reward=R, go=R, value=R, **knobs):
    return dreamer_v3_returns(reward, go, value, return_range_init(), **knobs)


def roll(noise=None, start=R, horizon=2, step=lambda params, state, action, noise: state, **knobs):
    def policy(params, state, noise):
        return state

    return imagine({}, start, {} if noise is None else noise, dynamics=step, policy=policy, horizon=horizon, **knobs)


def actor(policy=NORMAL, batch=None, **knobs):
    entries = {"features": FEATURES, "action": ACT, "advantage": ADV, "weight": W} | (batch or {})
    entries = {name: x for name, x in entries.items() if x is not None}
    return dreamer_v3_actor_loss({}, entries, actor=lambda params, features: policy, **knobs)


def objective(entry=None, value=None, drop=False, agent=AGENT, change=lambda state: state, **knobs):
    """The whole objective with one entry of one of its arguments exchanged or taken out."""
    params, state, batch, noise = whole()
    for mapping in (params, batch):
        if drop:
            mapping.pop(entry, None)
        elif entry in mapping or entry == "mask":
            mapping[entry] = value
    params.pop("mask", None)
    knobs = {"horizon": 2, **KNOBS_OF_MODEL, **knobs}
    return dreamer_v3_loss(params, change(state), batch, noise, agent=agent, **knobs)


def unused(*_):
    raise AssertionError("a network ran before the arguments were checked")


IDLE = DreamerV3Agent(*[unused] * len(AGENT))


def value(prediction=LOGITS, slow_params=None, batch=None, params=None, **knobs):
    params = params or {"w": R}
    slow_params = params if slow_params is None else slow_params
    entries = {"features": FEATURES, "returns": ADV, "weight": W} | (batch or {})
    return dreamer_v3_value_loss(params, slow_params, entries, critic=lambda params, features: prediction, **knobs)


def replayed_value(batch=None, **knobs):
    flags = torch.zeros(2, 4, dtype=torch.bool)
    entries = {"features": FEATURES, "reward": R, "bootstrap": R, "terminated": flags, "is_last": flags}
    entries = {name: x for name, x in (entries | (batch or {})).items() if x is not None}
    return dreamer_v3_replay_value_loss({}, {}, entries, critic=lambda params, features: LOGITS, **knobs)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        # imagine
        (lambda: roll(horizon=0), ValueError, r"imagine: horizon must be at least 1, got 0"),
        (lambda: roll(horizon=2.0), TypeError, r"imagine: horizon must be an int, got float 2.0"),
        (lambda: roll(horizon=True), TypeError, r"imagine: horizon must be an int"),
        (
            lambda: roll(noise=R),
            TypeError,
            r'imagine: noise must be a mapping with "policy" and "dynamics", got float32',
        ),
        (
            lambda: roll(noise={"policy": torch.zeros(2, 2)}),
            ValueError,
            r"noise\['policy'\] must be of 3 steps in dimension 1, got float32 \[2, 2\]. The last state gets an action",
        ),
        (
            lambda: roll(noise={"dynamics": {"x": torch.zeros(2, 3)}}),
            ValueError,
            r"noise\['dynamics'\] must be of 2 steps in dimension 1, got float32 \[2, 3\]",
        ),
        (lambda: roll(noise={"policy": torch.zeros(3)}), ValueError, r"of 3 steps in dimension 1, got float32 \[3\]"),
        (lambda: roll(noise={"policy": torch.zeros(2)}, time_dim=0), ValueError, r"of 3 steps in dimension 0, got"),
        (
            lambda: roll(step=lambda params, state, action, noise: {"x": state}),
            ValueError,
            r"imagine: the state of dynamics must be Tensor with entries \[''\] like start, got dict with entries",
        ),
        (
            lambda: roll(step=lambda params, state, action, noise: state[:1]),
            ValueError,
            r"the state of dynamics must be of shape \[2, 4\] like start, got float32 \[1, 4\]",
        ),
        # returns
        (
            lambda: returns(go=R[:, 1:]),
            ValueError,
            r"dreamer_v3_returns: continuation must be of shape \[2, 4\] like reward, got float32 \[2, 3\]. All",
        ),
        (
            lambda: returns(value=R[:, 1:]),
            ValueError,
            r"value must be of shape \[2, 4\] like reward, got float32 \[2, 3\]",
        ),
        (lambda: returns(reward=R[:, 1:]), ValueError, r"continuation must be of shape \[2, 3\] like reward"),
        (
            lambda: returns(R[..., None], R[..., None], R[..., None]),
            ValueError,
            r"reward must be of shape \[..., T >= 2\], got float32 \[2, 4, 1\]. A trailing dimension of 1\?",
        ),
        (
            lambda: returns(R[0, 0], R[0, 0], R[0, 0]),
            ValueError,
            r"reward must be of shape \[..., T >= 2\], got float32 \[\]",
        ),
        (lambda: returns(reward=R.bool()), TypeError, r"reward must be a tensor of numbers, got bool \[2, 4\]"),
        (lambda: returns(value=None), TypeError, r"value must be a tensor, got NoneType"),
        (lambda: returns(go=None), TypeError, r"continuation must be a tensor, got NoneType"),
        (lambda: returns(discount=1.5), ValueError, r"discount must be in \[0, 1\], got 1.5"),
        (lambda: returns(lmbda=-0.1), ValueError, r"lmbda must be in \[0, 1\], got -0.1"),
        (lambda: returns(rate=2.0), ValueError, r"rate must be in \[0, 1\], got 2.0"),
        (lambda: returns(minimum=-1.0), ValueError, r"minimum must be at least 0, got -1.0"),
        (
            lambda: returns(value_stats=(0.0, -1.0)),
            ValueError,
            r"dreamer_v3_returns: value_stats\[1\] must be at least 0",
        ),
        (
            lambda: returns(value_stats=(R, 1.0)),
            ValueError,
            r"value_stats\[0\] must be a number or a 0-d tensor, got float32",
        ),
        # actor
        (
            lambda: actor(batch={"weight": None}),
            KeyError,
            r"dreamer_v3_actor_loss: batch must be a mapping with 'weight'",
        ),
        (lambda: actor(batch={"action": None}), KeyError, r"batch must be a mapping with 'action', got keys"),
        (lambda: actor(batch={"features": None}), KeyError, r"batch must be a mapping with 'features', got keys"),
        (lambda: actor(batch={"advantage": None}), KeyError, r"batch must be a mapping with 'advantage', got keys"),
        (
            lambda: actor(batch={"features": FEATURES[:, 1:]}),
            ValueError,
            r"features must be of shape \[2, 4, ...\], a step more than the weight, got float32 \[2, 3, 5\]",
        ),
        (
            lambda: actor(batch={"features": FEATURES.transpose(0, 1)}),
            ValueError,
            r"a step more than the weight, got float32 \[4, 2, 5\]. Did you pass time first\?",
        ),
        (
            lambda: actor(batch={"action": ACT[:, 1:]}),
            ValueError,
            r"action must be of shape \[2, 4, ...\], a step more",
        ),
        (
            lambda: actor(batch={"weight": W.bool()}),
            TypeError,
            r"weight must be a floating-point tensor, got bool \[2, 3\]",
        ),
        (
            lambda: actor(batch={"weight": W[0, 0]}),
            ValueError,
            r"weight must be of shape \[..., T - 1\], got float32 \[\]",
        ),
        (
            lambda: actor(batch={"advantage": R}),
            ValueError,
            r"advantage must be of shape \[2, 3\] like weight, got float32 \[2, 4\]",
        ),
        (
            lambda: actor(estimator="scores"),
            ValueError,
            r"estimator must be one of 'score', 'pathwise', got 'scores'. Did",
        ),
        (lambda: actor(entropy="much"), TypeError, r"entropy must be a number or a 0-d tensor, got str 'much'"),
        (lambda: actor(advantage_stats=(0.0, -1.0)), ValueError, r"advantage_stats\[1\] must be at least 0, got -1.0"),
        (
            lambda: actor(policy=LOGITS),
            TypeError,
            r"the policy must be a NormalPolicy, a CategoricalPolicy or a mapping",
        ),
        (
            lambda: actor(policy={"turn": NORMAL, "press": LOGITS}),
            TypeError,
            r"the policy of 'press' must be a NormalPolicy, a CategoricalPolicy or a mapping of them, got float32",
        ),
        (
            lambda: actor(policy={"turn": NORMAL}, batch={"action": {"turn": ACT, "press": ACT}}),
            KeyError,
            r"dreamer_v3_actor_loss: the policy must be a mapping with \['press', 'turn'\] like action, got keys \['t",
        ),
        (
            lambda: actor(policy={"turn": NORMAL, "press": NORMAL}, batch={"action": {"turn": ACT}}),
            KeyError,
            r"actor_loss: the policy must be a mapping with \['turn'\] like action, got keys \['press', 'turn'\]",
        ),
        (
            lambda: dreamer_v3_actor_terms({"turn": NORMAL}, {"turm": ACT[:, 1:]}, ADV, W),
            KeyError,
            r"dreamer_v3_actor_terms: the policy must be a mapping with \['turm'\] like action, got keys \['turn'\]",
        ),
        (
            lambda: actor(policy={"turn": NORMAL}),
            TypeError,
            r"action must be a mapping with \['turn'\] like policy, got float32",
        ),
        (
            lambda: actor(policy=CategoricalPolicy(LOGITS)),
            ValueError,
            r"the policy must be of shape \[2, 3, groups, classes\] like the weight, got float32 \[2, 3, 11\]",
        ),
        (
            lambda: actor(policy={"turn": NormalPolicy(ACT, ACT)}),
            ValueError,
            r"the policy of 'turn' must be of shape \[2, 3, action_dim\] like the weight, got float32 \[2, 4, 1\]",
        ),
        (
            lambda: actor(policy=CategoricalPolicy(LOGITS.unsqueeze(2)), estimator="pathwise"),
            ValueError,
            r"the policy must be a NormalPolicy, got a CategoricalPolicy. A choice has no derivative",
        ),
        # value
        (
            lambda: value(slow_params={"v": R}),
            ValueError,
            r"slow_params must be of the structure of params, got \[2, 4\] where params have nothing at \['v'\]. Start",
        ),
        (
            lambda: value(slow_params={"w": R[:1]}),
            ValueError,
            r"of the structure of params, got \[1, 4\] where params have \[2, 4\] at \['w'\]",
        ),
        (
            lambda: value(slow_params={}),
            ValueError,
            r"got nothing where params have \[2, 4\] at \['w'\]. .*or set slow_weight=0",
        ),
        (lambda: value(slow_weight=-1.0), ValueError, r"slow_weight must be at least 0, got -1.0"),
        (lambda: value(value_loss="mse"), ValueError, r"value_loss must be one of 'two_hot', 'symlog_mse', got 'mse'"),
        (
            lambda: value(prediction=W),
            ValueError,
            r"the prediction must be of shape \[2, 3, num_bins >= 2\] like the weight, got float32 \[2, 3\]. A critic",
        ),
        (
            lambda: value(value_loss="symlog_mse"),
            ValueError,
            r"the prediction must be of shape \[2, 3\] like the weight, got float32 \[2, 3, 11\]. Logits go with",
        ),
        (
            lambda: value(bins=symexp_bins(5)),
            ValueError,
            r"logits must be of shape \[..., 5\], got float32 \[2, 3, 11\]",
        ),
        (
            lambda: value(batch={"returns": R}),
            ValueError,
            r"returns must be of shape \[2, 3\] like weight, got float32 \[2, 4\]",
        ),
        (
            lambda: value(value_stats=(0.0, "1")),
            TypeError,
            r"value_stats\[1\] must be a number or a 0-d tensor, got str '1'",
        ),
        (
            lambda: dreamer_v3_value_terms(LOGITS, None, ADV, W),
            TypeError,
            r"dreamer_v3_value_terms: the slow prediction must be a tensor, got NoneType",
        ),
        (
            lambda: dreamer_v3_value_terms(LOGITS.int(), LOGITS, ADV, W),
            TypeError,
            r"the prediction must be a floating-point tensor, got int32 \[2, 3, 11\]",
        ),
        # replay
        (
            lambda: replayed_value({"bootstrap": R[:, 1:]}),
            ValueError,
            r"dreamer_v3_replay_value_loss: bootstrap must be of shape \[2, 4\] like reward, got float32 \[2, 3\].",
        ),
        (
            lambda: replayed_value({"is_last": R[:, 1:].bool()}),
            ValueError,
            r"is_last must be of shape \[2, 4\] like reward, got bool \[2, 3\]",
        ),
        (
            lambda: replayed_value({"terminated": R}),
            TypeError,
            r"terminated must be a bool tensor, got float32 \[2, 4\]",
        ),
        (lambda: replayed_value({"reward": R.bool()}), TypeError, r"reward must be a tensor of numbers, got bool"),
        (lambda: replayed_value({"is_last": None}), KeyError, r"batch must be a mapping with 'is_last', got keys"),
        (lambda: replayed_value({"features": None}), KeyError, r"batch must be a mapping with 'features', got keys"),
        (
            lambda: replayed_value({"reward": R[:, :1]}),
            ValueError,
            r"reward must be of shape \[..., T >= 2\], got float32 \[2, 1\]",
        ),
        # the whole objective
        (
            lambda: objective("critic", drop=True),
            KeyError,
            r"dreamer_v3_loss: params must be a mapping with 'critic', got",
        ),
        (
            lambda: objective("is_last", drop=True),
            KeyError,
            r"dreamer_v3_loss: batch must be a mapping with 'is_last', got",
        ),
        (
            lambda: objective("mask", W.bool()),
            ValueError,
            r"dreamer_v3_loss: batch must be without a mask, got one. Each",
        ),
        (
            lambda: objective("reward", W[0]),
            ValueError,
            r"reward must be of shape \[B, T\] or \[B, T, 1\], got float32 \[3\]",
        ),
        (
            lambda: objective("is_last", torch.zeros(2, 2, dtype=torch.bool)),
            ValueError,
            r"dreamer_v3_loss: is_last must be of shape \[2, 3\] like the batch, got bool \[2, 2\]",
        ),
        (lambda: objective(starts=1), ValueError, r"dreamer_v3_loss: starts must be in \[2, 3\], got 1"),
        (lambda: objective(starts=4), ValueError, r"dreamer_v3_loss: starts must be in \[2, 3\], got 4"),
        (
            lambda: objective(starts=2.0),
            TypeError,
            r"dreamer_v3_loss: starts must be an int, or None for all T, got float 2.0",
        ),
        (lambda: objective(starts=True), TypeError, r"starts must be an int, or None for all T, got bool True"),
        (lambda: objective(horizon=True), TypeError, r"imagine: horizon must be an int, got bool True"),
        (
            lambda: objective(agent=IDLE, change=lambda state: None),
            TypeError,
            r"dreamer_v3_loss: state must be a DreamerV3State, got NoneType",
        ),
        (
            lambda: objective(agent=IDLE, change=lambda state: state._replace(return_range=None)),
            TypeError,
            r"dreamer_v3_loss: state.return_range must be a ReturnRange of tensors low, high, got NoneType",
        ),
        (
            lambda: objective(agent=IDLE, change=lambda state: state._replace(slow_critic={"v": R})),
            ValueError,
            r"dreamer_v3_loss: state.slow_critic must be of the structure of params\['critic'\], got nothing where "
            r"params\['critic'\] have \[5, 11\] at \['critic'\]. Start them as a copy",
        ),
        (
            lambda: objective(agent=IDLE, change=lambda state: state._replace(slow_critic=None)),
            ValueError,
            r"dreamer_v3_loss: state.slow_critic must be of the structure of .*or set slow_weight=0",
        ),
        (
            lambda: objective(agent=IDLE, lambda_continue=0.0),
            ValueError,
            r"dreamer_v3_loss: lambda_continue must be above 0, got 0.0. Rollouts go on as the continuation says",
        ),
        (lambda: objective(horizon=0), ValueError, r"imagine: horizon must be at least 1, got 0"),
        (lambda: objective(horizon=3), ValueError, r"noise\['policy'\] must be of 4 steps in dimension 1"),
        (lambda: objective(lambda_actor=-1.0), ValueError, r"lambda_actor must be at least 0, got -1.0"),
        (lambda: objective(slow_weight="1"), TypeError, r"dreamer_v3_loss: slow_weight must be a number or a 0-d"),
        (lambda: objective(lambda_kll=1.0), TypeError, r"each knob must be one of .*Did you mean 'lambda_kl'\?"),
        (
            lambda: objective(agent=AGENT._replace(world_model=lambda p, b: {**world_model(p, b), "state": None})),
            TypeError,
            r"dreamer_v3_loss: the state of the world model must be a pytree of tensors \[2, 3, ...\], got NoneType",
        ),
        (
            lambda: objective(
                agent=AGENT._replace(
                    world_model=lambda p, b: {k: x for k, x in world_model(p, b).items() if k != "state"}
                )
            ),
            KeyError,
            r"dreamer_v3_loss: world_model\(params, batch\) must be a mapping with 'state', got keys",
        ),
        (lambda: replayed_value(discount=2.0), ValueError, r"discount must be in \[0, 1\], got 2.0"),
    ],
)
def test_refusals(call, error, match):
    with pytest.raises(error, match=match):
        call()
