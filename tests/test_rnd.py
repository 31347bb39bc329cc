"""Random network distillation: the authors' numbers, the formula in loops, what stops where, and every refusal."""

import itertools
import math
import weakref
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from torch.func import functional_call, grad, grad_and_value, jvp, vmap
from torch.testing import assert_close
from torch.utils._pytree import tree_map

from rlloss import (
    DiscountedSum,
    RunningMeanStd,
    discounted_sum_init,
    pages,
    random,
    rnd_error,
    rnd_error_and_target_features,
    rnd_key_mask,
    rnd_loss,
    rnd_reward,
    rnd_reward_stats_update,
    running_mean_std_init,
    running_mean_std_normalize,
    running_mean_std_update,
)
from rlloss.rnd import rows_drawn

NAN, INF = float("nan"), float("inf")
BATCH, OBS, HIDDEN, FEATURES = 6, 4, 5, 3
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5}
REDUCTIONS = ("mean", "sum", "none")


def network(params, x):
    return torch.tanh(x @ params["first"] + params["bias"]) @ params["second"]


def identity(params, x):
    return x


def parameters(seed, dtype=torch.float32, obs=OBS):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"first": (obs, HIDDEN), "bias": (HIDDEN,), "second": (HIDDEN, FEATURES)}
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for name, shape in shapes.items()
    }


def observations(*shape, seed=7, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def statistics(dtype=torch.float32, obs=OBS):
    mean, var = torch.linspace(-0.5, 0.5, obs, dtype=dtype), torch.linspace(0.1, 2.0, obs, dtype=dtype)
    return RunningMeanStd(mean, var, torch.tensor(10.0, dtype=torch.float64))


MASK = torch.tensor([True, False, True, True, False, False])
ROWS = torch.tensor([3, 0, 5])


# ---- golden values ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", ["feat_p1", "feat_p0.25", "feat_p0.5", "feat_empty"])
@pytest.mark.parametrize("as_rows", [False, True])
def test_authors_loss_bonus_and_gradient(golden, case, dtype, as_rows):
    data = golden("09_rnd")
    arrays = {name: data[f"{case}.{name}"] for name in ("in.X_r", "in.X_r_hat", "in.uniform", "out.aux_loss")}
    mask = arrays["in.uniform"] < data.meta["cases"][case]["proportion"]
    assert torch.equal(mask, data[f"{case}.out.mask"])
    goal, prediction = arrays["in.X_r"].to(dtype), arrays["in.X_r_hat"].to(dtype)
    features = goal.shape[-1]

    def loss_of(pair, key_mask):
        def predictor(_, x):
            return x[:, features:]

        def target(_, x):
            return x[:, :features]

        error = rnd_error(None, None, pair, predictor=predictor, target=target)
        return rnd_loss(None, None, pair, key_mask, predictor=predictor, target=target), error

    key_mask = mask.nonzero().squeeze(-1) if as_rows else mask
    gradient, (loss, error) = grad_and_value(lambda pair: loss_of(pair, key_mask), has_aux=True)(
        torch.cat([goal, prediction], -1)
    )
    assert loss.dtype == error.dtype == dtype
    rtol = TOLERANCE[dtype]
    assert_close(loss.double(), arrays["out.aux_loss"], rtol=rtol, atol=0)
    assert_close(error.double(), data[f"{case}.out.int_rew"].reshape(-1), rtol=rtol, atol=0)
    assert_close(gradient[:, features:].double(), data[f"{case}.grad.aux_loss.X_r_hat"], rtol=rtol, atol=rtol * 1e-2)
    assert torch.equal(gradient[:, :features], torch.zeros_like(goal))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", ["update_default", "update_news"])
def test_authors_reward_scale_over_rollouts(golden, case, dtype):
    data = golden("09_rnd")
    config = data.meta["cases"][case]
    sums = discounted_sum_init((config["envs"],), dtype=dtype)
    stats = running_mean_std_init((), dtype=dtype)
    rtol = TOLERANCE[dtype]
    for rollout, bonus in enumerate(data[f"{case}.in.rews_int"].to(dtype)):
        sums, stats = rnd_reward_stats_update(sums, stats, bonus, discount=config["gamma"])
        assert_close(sums.value.double(), data[f"{case}.out.rewems"][rollout], rtol=rtol, atol=0)
        assert_close(stats.mean.double(), data[f"{case}.out.rms_mean"][rollout], rtol=rtol, atol=0)
        assert_close(stats.var.double(), data[f"{case}.out.rms_var"][rollout], rtol=rtol, atol=0)
        assert_close(stats.count, data[f"{case}.out.rms_count"][rollout], rtol=1e-6, atol=0)
        reward = rnd_reward(stats, bonus)
        assert reward.dtype == dtype
        assert_close(reward.double(), data[f"{case}.out.rews_int_normed"][rollout], rtol=rtol, atol=0)


TORCHRL_CASES = [
    (reduction, fraction, rms, draw)
    for reduction, fraction, rms, draw in itertools.product(
        REDUCTIONS, ("1", "0.25", "0.6"), (0, 1), ("std", "none_selected")
    )
    if not (fraction == "1" and draw == "none_selected")
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("reduction", "fraction", "rms", "draw"), TORCHRL_CASES)
def test_torchrl_loss_and_gradient(golden, reduction, fraction, rms, draw, dtype):
    data = golden("10c_torchrl_rnd")
    name = f"{reduction}_p{fraction}_rms{rms}_{draw}"
    networks = {
        which: {key: data[f"rnd.in.{which}.{key}"].to(dtype) for key in ("0.weight", "0.bias", "2.weight", "2.bias")}
        for which in ("predictor", "target")
    }
    module = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 8)).to(dtype)
    uniform = data["rnd.in.uniform"] if draw == "std" else torch.full((10,), 0.9)
    mean, var = (data[f"rnd.out.rms.{moment}"][-1].to(dtype) for moment in ("mean", "var"))
    gradients, loss = grad_and_value(
        lambda pred: rnd_loss(
            pred,
            networks["target"],
            data["rnd.in.obs"].to(dtype),
            None if fraction == "1" else uniform < float(fraction),
            predictor=lambda params, x: functional_call(module, params, x),
            obs_stats=SimpleNamespace(mean=mean, var=var) if rms else None,
            reduction=reduction,
        ).sum()
    )(networks["predictor"])
    expected = data[f"rnd.out.loss.{name}"]
    # The reference computed in float32 throughout.
    assert_close(loss.double(), expected.sum(), rtol=1e-5, atol=1e-7)
    if reduction != "none":
        for key, gradient in gradients.items():
            expected = data[f"rnd.grad.{name}.{key}"]
            assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_torchrl_errors_without_reduction(golden):
    data = golden("10c_torchrl_rnd")
    networks = {
        which: {key: data[f"rnd.in.{which}.{key}"] for key in ("0.weight", "0.bias", "2.weight", "2.bias")}
        for which in ("predictor", "target")
    }
    module = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 8)).double()

    def loss(key_mask):
        return rnd_loss(
            *networks.values(),
            data["rnd.in.obs"],
            key_mask,
            predictor=lambda params, x: functional_call(module, params, x),
            reduction="none",
        )

    for fraction in ("0.25", "0.6"):
        mask = data["rnd.in.uniform"] < float(fraction)
        expected = data[f"rnd.out.loss.none_p{fraction}_rms0_std"]
        assert_close(loss(mask), expected, rtol=1e-5, atol=1e-7)
        assert_close(loss(mask.nonzero().squeeze(-1)), expected, rtol=1e-5, atol=1e-7)
    assert_close(loss(None), data["rnd.out.loss.none_p1_rms0_std"], rtol=1e-5, atol=1e-7)


# ---- the formula, written as loops -----------------------------------------------------------------------------------


def oracle_errors(pred, target, obs, stats, clip):
    def features(params, z):
        first, bias, second = (params[name].tolist() for name in ("first", "bias", "second"))
        hidden = [math.tanh(sum(z[i] * first[i][j] for i in range(OBS)) + bias[j]) for j in range(HIDDEN)]
        return [sum(hidden[j] * second[j][k] for j in range(HIDDEN)) for k in range(FEATURES)]

    errors = []
    for x in obs.tolist():
        if stats is not None:
            scaled = [
                (value - mean) / math.sqrt(max(var, 1e-8))
                for value, mean, var in zip(x, stats.mean.tolist(), stats.var.tolist(), strict=True)
            ]
            x = [min(max(value, -clip), clip) for value in scaled]
        pairs = zip(features(pred, x), features(target, x), strict=True)
        errors.append(sum((a - b) ** 2 for a, b in pairs) / FEATURES)
    return errors


def oracle_loss(errors, weights, reduction):
    total, number = sum(w * e for w, e in zip(weights, errors, strict=True)), sum(weights)
    if reduction == "none":
        return torch.tensor([w * e for w, e in zip(weights, errors, strict=True)], dtype=torch.float64)
    return torch.tensor(total / max(1, number) if reduction == "mean" else total, dtype=torch.float64)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    "key_mask", [None, MASK, ROWS, torch.tensor([2, 2, 1])], ids=["all", "bool", "rows", "repeated"]
)
@pytest.mark.parametrize("normalised", [False, True])
def test_loss_is_the_formula(reduction, key_mask, normalised):
    pred, target, obs = (
        parameters(1, torch.float64),
        parameters(2, torch.float64),
        observations(BATCH, OBS, dtype=torch.float64),
    )
    stats = statistics(torch.float64) if normalised else None
    errors = oracle_errors(pred, target, obs, stats, clip=0.7)
    weights = [1] * BATCH
    if key_mask is not None:
        weights = (
            key_mask.int().tolist()
            if key_mask.dtype == torch.bool
            else torch.bincount(key_mask, minlength=BATCH).tolist()
        )
    options = {"predictor": network, "obs_stats": stats, "obs_clip": 0.7}
    error = rnd_error(pred, target, obs, **options)
    assert_close(error, torch.tensor(errors, dtype=torch.float64), rtol=1e-12, atol=0)
    loss = rnd_loss(pred, target, obs, key_mask, reduction=reduction, **options)
    assert_close(loss, oracle_loss(errors, weights, reduction), rtol=1e-12, atol=0)


def test_closed_form_has_no_half():
    def loss(prediction, goal, **options):
        return rnd_loss(prediction, goal, torch.zeros(3, 1), predictor=lambda p, x: p.expand(3, 4), **options)

    assert loss(torch.zeros(4), torch.full((4,), 3.0)) == 9.0
    assert loss(torch.zeros(4), torch.full((4,), 3.0), reduction="sum") == 27.0
    assert torch.equal(loss(torch.zeros(4), torch.full((4,), 3.0), reduction="none"), torch.full((3,), 9.0))


def test_target_may_have_its_own_function():
    pred, batch = parameters(1), observations(BATCH, OBS)
    error = rnd_error(
        pred, torch.tensor(2.0), batch, predictor=network, target=lambda scale, x: scale * x[:, :FEATURES]
    )
    assert_close(error, (network(pred, batch) - 2 * batch[:, :FEATURES]).square().mean(-1))


# ---- eager, vmapped, compiled; derivatives ---------------------------------------------------------------------------


def test_error_and_losses_in_every_variant(variant):
    def compute(pred, target, obs, mask, rows, stats):
        options = {"predictor": network, "obs_stats": stats, "obs_clip": 1.0}
        cases = [(None, "mean"), (mask, "mean"), (mask, "none"), (rows, "sum"), (rows, "none")]
        losses = [rnd_loss(pred, target, obs, which, reduction=reduction, **options) for which, reduction in cases]
        return rnd_error(pred, target, obs, predictor=network), losses

    args = (parameters(1), parameters(2), observations(BATCH, OBS), MASK, ROWS, statistics())
    assert_close(variant(compute)(*args), compute(*args))


def test_gradients_in_every_variant(variant):
    def compute(pred, target, obs, mask, rows):
        def loss(pred, key_mask):
            return rnd_loss(pred, target, obs, key_mask, predictor=network)

        def norm(pred):
            return sum(g.square().sum() for g in grad(loss)(pred, rows).values())

        return grad_and_value(loss)(pred, mask), grad(norm)(pred)

    args = (parameters(1), parameters(2), observations(BATCH, OBS), MASK, ROWS)
    assert_close(variant(compute)(*args), compute(*args))


def test_jvp_in_every_variant(variant):
    # Elementwise: torch 2.13 cannot compile vmap of jvp of a matmul, with or without a loss.
    def network(params, x):
        return torch.tanh((x.unsqueeze(-1) * params["first"]).sum(-2))

    def compute(pred, target, obs, mask, rows, direction):
        def loss(pred):
            losses = [rnd_loss(pred, target, obs, key_mask, predictor=network) for key_mask in (mask, rows)]
            return torch.stack(losses)

        return jvp(loss, (pred,), (direction,))

    args = (parameters(1), parameters(2), observations(BATCH, OBS), MASK, ROWS, parameters(3))
    assert_close(variant(compute)(*args), compute(*args))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_negative_rows_count_from_the_end(variant, reduction):
    pred, target, obs = parameters(1), parameters(2), observations(BATCH, OBS)

    def compute(pred, rows):
        return grad_and_value(
            lambda pred: rnd_loss(pred, target, obs, rows, predictor=network, reduction=reduction).sum()
        )(pred)

    negative = torch.tensor([-1, 0, -BATCH, 2, -3])
    assert_close(variant(compute)(pred, negative), compute(pred, negative % BATCH), rtol=1e-6, atol=1e-7)


def test_error_speaks_in_its_own_name():
    target, obs = parameters(2), observations(BATCH, OBS)
    with pytest.raises(ValueError, match=r"^rnd_error: obs_stats must be statistics of the last dimensions of"):
        rnd_error(target, target, obs, predictor=network, obs_stats=running_mean_std_init((3,)))
    with pytest.raises(TypeError, match=r"^rnd_error: predictor must be a function .*, got NoneType"):
        rnd_error(target, target, obs, predictor=None)
    with pytest.raises(TypeError, match=r"^rnd_error: target_params must be parameters of the target network, got Non"):
        rnd_error(target, None, obs, predictor=network)
    with pytest.raises(ValueError, match=r"^rnd_error_and_target_features: obs_clip must be at least 0"):
        rnd_error_and_target_features(target, target, obs, predictor=network, obs_clip=-1)


def test_clip_may_be_infinite():
    target, obs = parameters(2), observations(BATCH, OBS)
    losses = [
        rnd_loss(parameters(1), target, obs, predictor=network, obs_stats=statistics(), obs_clip=clip)
        for clip in (INF, 1e30)
    ]
    assert torch.equal(*losses)


def test_key_mask_in_every_variant(variant):
    def compute(key):
        return rnd_key_mask(key, 8, 0.3), rnd_key_mask(key, 8, 0.3, exact=False)

    rows, mask = variant(compute)(random.key(3))
    assert torch.equal(rows, compute(random.key(3))[0])
    assert torch.equal(mask, compute(random.key(3))[1])


def test_reward_scale_in_every_variant(variant):
    def compute(error, sums, stats):
        sums, stats = rnd_reward_stats_update(sums, stats, error, discount=0.9)
        return sums, stats, rnd_reward(stats, error)

    args = (observations(2, 5).abs(), discounted_sum_init((2,)), running_mean_std_init())
    assert_close(variant(compute)(*args), compute(*args))


@pytest.mark.parametrize("key_mask", [None, MASK, ROWS], ids=["all", "bool", "rows"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_derivatives_are_those_of_finite_differences(key_mask, reduction):
    target, obs = parameters(2, torch.float64), observations(BATCH, OBS, dtype=torch.float64)

    def loss(first, bias, second, clip):
        params = {"first": first, "bias": bias, "second": second}
        return rnd_loss(
            params,
            target,
            obs,
            key_mask,
            predictor=network,
            obs_stats=statistics(torch.float64),
            obs_clip=clip,
            reduction=reduction,
        )

    clip = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    inputs = [value.requires_grad_() for value in parameters(1, torch.float64).values()]
    assert torch.autograd.gradcheck(lambda *p: loss(*p, 0.7), inputs, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(
        lambda *p: loss(*p, clip.detach()), inputs, check_fwd_over_rev=True, fast_mode=True
    )


def test_jvp_is_the_gradient_along_the_direction():
    pred, target, obs = (
        parameters(1, torch.float64),
        parameters(2, torch.float64),
        observations(BATCH, OBS, dtype=torch.float64),
    )
    direction = parameters(3, torch.float64)

    def loss(pred):
        return rnd_loss(pred, target, obs, MASK, predictor=network)

    _, tangent = jvp(loss, (pred,), (direction,))
    gradients = grad(loss)(pred)
    assert_close(tangent, sum((gradients[name] * direction[name]).sum() for name in pred))


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_ensemble_is_a_loop(exact, shared):
    members = [(parameters(i), parameters(10 + i)) for i in range(3)]
    preds, targets = (tree_map(lambda *x: torch.stack(x), *nets) for nets in zip(*members, strict=True))
    keys = random.split(random.key(5), 3)
    obs = observations(BATCH, OBS) if shared else observations(3, BATCH, OBS)

    def member(pred, target, key, obs):
        mask = rnd_key_mask(key, BATCH, 0.5, exact=exact)
        both = [rnd_loss(pred, target, obs, mask, predictor=network, reduction=r) for r in ("mean", "none")]
        return both[0], both[1]

    vmapped = vmap(grad_and_value(member, has_aux=True), in_dims=(0, 0, 0, None if shared else 0))
    gradients, (losses, errors) = vmapped(preds, targets, keys, obs)
    for i, (pred, target) in enumerate(members):
        expected = grad_and_value(member, has_aux=True)(pred, target, keys[i], obs if shared else obs[i])
        actual = (tree_map(lambda x, i=i: x[i], gradients), (losses[i], errors[i]))
        assert_close(actual, expected)
    assert not torch.equal(losses[0], losses[1])


def test_second_call_does_not_recompile(counting_backend):
    torch.compiler.reset()
    backend, graphs = counting_backend

    def step(pred, target, obs, key, clip):
        def loss(pred):
            mask = rnd_key_mask(key, BATCH, 0.5)
            return rnd_loss(pred, target, obs, mask, predictor=network, obs_stats=statistics(), obs_clip=clip)

        return grad_and_value(loss)(pred)

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for i in range(3):
        args = (
            parameters(i),
            parameters(10 + i),
            observations(BATCH, OBS, seed=i),
            random.key(i),
            torch.tensor(0.5 + i),
        )
        assert_close(compiled(*args), step(*args))
    assert len(graphs) == 1


def test_clip_may_be_a_tensor():
    pred, target, obs = parameters(1), parameters(2), observations(BATCH, OBS)

    def loss(clip):
        return rnd_loss(pred, target, obs, predictor=network, obs_stats=statistics(), obs_clip=clip)

    clips = torch.tensor([0.3, 1.0, 5.0])
    assert_close(vmap(loss)(clips), torch.stack([loss(clip) for clip in clips.tolist()]))
    assert grad(loss)(clips[0]) != 0


# ---- what stops where ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key_mask", [None, MASK, ROWS], ids=["all", "bool", "rows"])
def test_target_gets_exactly_no_gradient(key_mask):
    gradients = grad(
        lambda pred, target: rnd_loss(pred, target, observations(BATCH, OBS), key_mask, predictor=network),
        argnums=(0, 1),
    )
    of_pred, of_target = gradients(parameters(1), parameters(2))
    assert all(torch.equal(g, torch.zeros_like(g)) for g in of_target.values())
    assert all(g.abs().sum() > 0 for g in of_pred.values())


def test_target_gets_no_tangent():
    pred, target = parameters(1), parameters(2)
    _, tangent = jvp(
        lambda t: rnd_error(pred, t, observations(BATCH, OBS), predictor=network), (target,), (parameters(3),)
    )
    assert torch.equal(tangent, torch.zeros(BATCH))


def test_tensor_shared_by_both_networks_is_trained_by_the_predictor_alone():
    shared, second = parameters(1), parameters(2)["second"]
    obs = observations(BATCH, OBS)

    def loss(shared):
        return rnd_loss(shared, {**shared, "second": second}, obs, predictor=network)

    def loss_with_constant(pred):
        return rnd_loss(pred, {**shared, "second": second}, obs, predictor=network)

    assert_close(grad(loss)(shared), grad(loss_with_constant)(shared), rtol=0, atol=0)


def test_observation_gradient_comes_through_the_predictor_alone():
    pred, target, obs = parameters(1), parameters(2), observations(BATCH, OBS)
    goal = network(target, obs)
    expected = grad(lambda x: (network(pred, x) - goal).square().mean())(obs)
    assert_close(grad(lambda x: rnd_loss(pred, target, x, predictor=network))(obs), expected)


def test_target_that_holds_its_own_parameters_is_not_trained_either():
    weight = observations(OBS, FEATURES).requires_grad_()
    pred = {name: value.requires_grad_() for name, value in parameters(1).items()}
    loss = rnd_loss(pred, None, observations(BATCH, OBS), predictor=network, target=lambda _, x: x @ weight)
    loss.backward()
    assert weight.grad is None
    assert pred["first"].grad.abs().sum() > 0


def test_target_is_evaluated_without_a_graph():
    nets = [{name: value.requires_grad_() for name, value in parameters(seed).items()} for seed in (1, 2)]
    seen = []

    def target(params, x):
        seen.extend([*params.values(), x])
        return network(params, x)

    rnd_loss(*nets, observations(BATCH, OBS).requires_grad_(), predictor=network, target=target)
    assert len(seen) == 4
    assert not any(x.requires_grad for x in seen)


def test_statistics_are_constants():
    pred, target, obs = parameters(1), parameters(2), observations(BATCH, OBS)

    def loss(mean, var):
        stats = RunningMeanStd(mean, var, torch.tensor(1.0))
        return rnd_loss(pred, target, obs, predictor=network, obs_stats=stats)

    for gradient in grad(loss, argnums=(0, 1))(statistics().mean, statistics().var):
        assert torch.equal(gradient, torch.zeros(OBS))


def test_equal_networks_have_no_loss_and_no_gradient():
    params = parameters(1)
    for reduction in REDUCTIONS:
        gradients, loss = grad_and_value(
            lambda pred, reduction=reduction: rnd_loss(
                pred, params, observations(BATCH, OBS), predictor=network, reduction=reduction
            ).sum()
        )(params)
        assert loss == 0
        assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients.values())


def test_intrinsic_reward_is_a_constant():
    error = observations(2, 3).abs().requires_grad_()
    sums, stats = rnd_reward_stats_update(discounted_sum_init((2,)), running_mean_std_init(), error)
    assert not any(x.requires_grad for x in (*sums, *stats, rnd_reward(stats, error)))


# ---- features of the target, known already ---------------------------------------------------------------------------


def never(params, x):
    raise AssertionError("the target network ran")


def features_of(target, obs, **options):
    return rnd_error_and_target_features(parameters(9), target, obs, predictor=network, **options)[1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", ["feat_p1", "feat_p0.25", "feat_p0.5", "feat_empty"])
def test_authors_loss_of_known_features(golden, case, dtype):
    data = golden("09_rnd")
    mask = data[f"{case}.in.uniform"] < data.meta["cases"][case]["proportion"]
    goal, prediction = (data[f"{case}.in.{name}"].to(dtype) for name in ("X_r", "X_r_hat"))
    rtol = TOLERANCE[dtype]
    for key_mask in (mask, mask.nonzero().squeeze(-1)):
        gradient, loss = grad_and_value(
            lambda x, rows=key_mask: rnd_loss(None, None, x, rows, predictor=identity, target_features=goal)
        )(prediction)
        assert_close(loss.double(), data[f"{case}.out.aux_loss"], rtol=rtol, atol=0)
        assert_close(gradient.double(), data[f"{case}.grad.aux_loss.X_r_hat"], rtol=rtol, atol=rtol * 1e-2)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("key_mask", [None, MASK, ROWS, torch.tensor([-1, 2, 2])], ids=["all", "bool", "rows", "again"])
def test_known_features_change_no_loss_and_no_gradient(reduction, normalised, key_mask):
    pred, target, obs = parameters(1), parameters(2), observations(BATCH, OBS)
    options = {"obs_stats": statistics() if normalised else None, "obs_clip": 1.0}
    features = features_of(target, obs, **options)

    def compute(target_params, **known):
        def loss(pred):
            return rnd_loss(
                pred, target_params, obs, key_mask, predictor=network, reduction=reduction, **options, **known
            ).sum()

        return grad_and_value(loss)(pred)

    expected = compute(target)
    assert_close(compute(None, target_features=features, target=never), expected, rtol=0, atol=0)
    assert_close(compute(target, target_features=features), expected, rtol=0, atol=0)


def test_features_come_with_the_error_they_belong_to():
    pred, target, stats = parameters(1), parameters(2), statistics()
    for shape in ((OBS,), (BATCH, OBS), (2, 3, OBS), (0, OBS)):
        obs = observations(*shape).requires_grad_()
        options = {"predictor": network, "obs_stats": stats, "obs_clip": 0.7}
        error, features = rnd_error_and_target_features(pred, target, obs, **options)
        assert torch.equal(error, rnd_error(pred, target, obs, **options))
        assert torch.equal(features, network(target, running_mean_std_normalize(stats, obs, 0.7)).detach())
        assert error.requires_grad
        assert not features.requires_grad


def test_known_features_in_every_variant(variant):
    def compute(pred, target, obs, mask, rows, stats):
        options = {"predictor": network, "obs_stats": stats, "obs_clip": 1.0}
        error, features = rnd_error_and_target_features(pred, target, obs, **options)

        def loss(pred, key_mask):
            return rnd_loss(pred, None, obs, key_mask, target_features=features, **options)

        return error, features, loss(pred, mask), grad_and_value(loss)(pred, rows)

    args = (parameters(1), parameters(2), observations(BATCH, OBS), MASK, ROWS, statistics())
    assert_close(variant(compute)(*args), compute(*args))


def test_jvp_with_known_features_in_every_variant(variant):
    # Elementwise: torch 2.13 cannot compile vmap of jvp of a matmul, with or without a loss.
    def network(params, x):
        return torch.tanh((x.unsqueeze(-1) * params["first"]).sum(-2))

    def compute(pred, obs, mask, rows, features, direction):
        def loss(pred, features):
            known = {"predictor": network, "target_features": features}
            return torch.stack([rnd_loss(pred, None, obs, key_mask, **known) for key_mask in (mask, rows)])

        return jvp(loss, (pred, features), (direction, torch.ones_like(features)))

    features = observations(BATCH, HIDDEN, seed=8)
    args = (parameters(1), observations(BATCH, OBS), MASK, ROWS, features, parameters(3))
    assert_close(variant(compute)(*args), compute(*args))
    _, tangent = compute(*args)
    assert_close(compute(*args[:4], features, parameters(3))[1], tangent)


@pytest.mark.parametrize("key_mask", [None, MASK, ROWS], ids=["all", "bool", "rows"])
def test_known_features_are_constants(key_mask):
    pred, obs, features = parameters(1), observations(BATCH, OBS), observations(BATCH, FEATURES, seed=8)

    def loss(features):
        return rnd_loss(pred, None, obs, key_mask, predictor=network, target_features=features)

    assert torch.equal(grad(loss)(features), torch.zeros_like(features))
    assert torch.equal(jvp(loss, (features,), (torch.ones_like(features),))[1], torch.zeros(()))
    leaf = features.clone().requires_grad_()
    assert not loss(leaf).requires_grad


def test_known_features_of_older_statistics_are_taken_as_they_are():
    pred, target, obs = parameters(1), parameters(2), observations(BATCH, OBS)
    old, new = statistics(), running_mean_std_update(statistics(), 3 + observations(40, OBS))
    features = features_of(target, obs, obs_stats=old)
    known = {"predictor": network, "target_features": features}
    assert torch.equal(
        rnd_loss(pred, None, obs, ROWS, obs_stats=old, **known),
        rnd_loss(pred, target, obs, ROWS, obs_stats=old, predictor=network),
    )
    prediction, goal = (
        network(params, running_mean_std_normalize(stats, obs, 5.0)) for params, stats in ((pred, new), (target, old))
    )
    mixed = rnd_loss(pred, None, obs, ROWS, obs_stats=new, **known)
    assert_close(mixed, (prediction - goal)[ROWS].square().mean())
    assert not torch.equal(mixed, rnd_loss(pred, target, obs, ROWS, obs_stats=new, predictor=network))


@pytest.mark.parametrize("poison", [NAN, INF])
@pytest.mark.parametrize("as_rows", [False, True])
def test_known_features_of_a_masked_sample_change_nothing(poison, as_rows):
    pred, obs, features = parameters(1), observations(BATCH, OBS), observations(BATCH, FEATURES, seed=8)
    key_mask = MASK.nonzero().squeeze(-1) if as_rows else MASK

    def compute(features):
        def loss(pred):
            return rnd_loss(pred, None, obs, key_mask, predictor=network, target_features=features)

        return grad_and_value(loss)(pred), jvp(grad(loss), (pred,), (parameters(3),))

    poisoned = torch.where(MASK[:, None], features, poison)
    assert_close(compute(poisoned), compute(features), rtol=0, atol=0)
    assert compute(torch.where(MASK[:, None], poison, features))[0][1].isnan() or poison == INF


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_known_features_of_any_leading_shape_and_of_nothing(reduction):
    pred, target, obs = parameters(1), parameters(2), observations(2, 3, OBS)
    mask = torch.tensor([[True, False, True], [False, True, True]])
    for key_mask in (None, mask, torch.tensor([1])):
        known = rnd_loss(
            pred, None, obs, key_mask, predictor=network, reduction=reduction, target_features=network(target, obs)
        )
        assert_close(known, rnd_loss(pred, target, obs, key_mask, predictor=network, reduction=reduction))
    for size, key_mask in ((0, None), (0, MASK[:0]), (0, ROWS[:0]), (3, ROWS[:0]), (3, torch.zeros(3).bool())):
        nothing, features = observations(size, OBS), observations(size, FEATURES)
        loss = rnd_loss(pred, None, nothing, key_mask, predictor=network, reduction=reduction, target_features=features)
        assert torch.equal(loss, torch.zeros((size,) if reduction == "none" else ()))


def test_known_features_of_a_mapping():
    batch = {"position": observations(BATCH, 1), "velocity": observations(BATCH, 3, seed=8)}

    def predictor(params, x):
        return network(params, torch.cat([x["position"], x["velocity"]], -1))

    for given_batch in (batch, TensorDict(batch, [BATCH])):
        error, features = rnd_error_and_target_features(parameters(1), parameters(2), given_batch, predictor=predictor)
        for key_mask in (None, MASK, ROWS):
            loss = rnd_loss(parameters(1), None, given_batch, key_mask, predictor=predictor, target_features=features)
            assert_close(loss, error.mean() if key_mask is None else error[key_mask].mean())


def test_ensemble_shares_the_features_of_one_target(counting_backend):
    torch.compiler.reset()
    backend, graphs = counting_backend
    target, obs = parameters(2), observations(BATCH, OBS)
    features = network(target, obs)

    def member(pred, obs, features, rows):
        return rnd_loss(pred, None, obs, rows, predictor=network, target_features=features)

    step = vmap(grad_and_value(member), in_dims=(0, None, None, 0))
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for seed in range(3):
        preds = tree_map(lambda *x: torch.stack(x), *(parameters(20 + 3 * seed + i) for i in range(3)))
        rows = vmap(lambda key: rnd_key_mask(key, BATCH, 0.5))(random.split(random.key(seed), 3))
        gradients, losses = compiled(preds, obs, features, rows)
        assert_close((gradients, losses), step(preds, obs, features, rows))
        for i in range(3):
            pred = tree_map(lambda x, i=i: x[i], preds)
            assert_close(losses[i], rnd_loss(pred, target, obs, rows[i], predictor=network))
    assert len(graphs) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_known_features_of_every_dtype(dtype):
    features = observations(BATCH, FEATURES, dtype=dtype)
    loss = rnd_loss(parameters(1), None, observations(BATCH, OBS), ROWS, predictor=network, target_features=features)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(
        loss, (network(parameters(1), observations(BATCH, OBS)) - features)[ROWS].square().mean().to(loss.dtype)
    )


def test_activations_of_the_target_are_gone_before_the_predictor_runs():
    weight, alive = observations(OBS, FEATURES).requires_grad_(), []

    def target(params, x):
        hidden = torch.tanh(x @ weight)
        alive.append(weakref.ref(hidden))
        return hidden.square()

    def predictor(params, x):
        assert alive[0]() is None
        return x @ params

    pred = observations(OBS, FEATURES, seed=8).requires_grad_()
    rnd_loss(pred, {}, observations(BATCH, OBS), ROWS, predictor=predictor, target=target).backward()
    assert pred.grad.abs().sum() > 0
    assert weight.grad is None


# ---- layouts in memory -----------------------------------------------------------------------------------------------


LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "reversed": lambda x: x.permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1),
    "slice": lambda x: torch.cat([x, x], -1)[..., ::2],
    "expanded": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
@pytest.mark.parametrize("channels", [1, 3])
def test_samples_keep_their_layout_in_memory(layout, normalised, dtype, channels):
    images = LAYOUTS[layout]((40 * observations(BATCH, channels, 4, 5)).abs().to(dtype))
    stats = running_mean_std_init((channels, 4, 5)) if normalised else None
    seen = []

    def spy(params, x):
        seen.append(x)
        return x.flatten(1)

    for key_mask in (None, MASK, ROWS, ROWS - BATCH):
        loss = rnd_loss(None, None, images, key_mask, predictor=spy, target=lambda _, x: 2 * spy(_, x), obs_stats=stats)
        plain = {"predictor": lambda _, x: x.flatten(1), "target": lambda _, x: 2 * x.flatten(1), "obs_stats": stats}
        assert_close(loss, rnd_loss(None, None, images.contiguous(), key_mask, **plain))
    if layout == "channels_last":
        assert all(x.is_contiguous(memory_format=torch.channels_last) for x in seen)
    if layout == "contiguous":
        assert all(x.is_contiguous() for x in seen)


def test_compiled_for_any_size_and_layout(counting_backend):
    torch.compiler.reset()
    backend, graphs = counting_backend

    def loss(images, rows):
        return rnd_loss(
            None, None, images, rows, predictor=lambda _, x: x.flatten(1), target=lambda _, x: 2 * x.flatten(1)
        )

    compiled = torch.compile(loss, fullgraph=True, backend=backend, dynamic=True)
    for size in (4, 6, 7):
        for layout in ("contiguous", "channels_last"):
            images, rows = LAYOUTS[layout](observations(size, 3, size, size + 1)), torch.arange(0, size, 2)
            assert_close(compiled(images, rows), loss(images, rows))
    assert len(graphs) == 2


@pytest.mark.parametrize("layout", ["channels_last", "reversed"])
def test_rows_of_any_layout_in_every_variant(variant, layout):
    images = LAYOUTS[layout](observations(BATCH, 2, 4, 5))

    def convolution(weight, x):
        return torch.nn.functional.conv2d(x, weight).flatten(1)

    def compute(pred, target, images, rows):
        def loss(pred, images):
            return rnd_loss(pred, target, images, rows, predictor=convolution)

        return grad_and_value(loss, argnums=(0, 1))(pred, images)

    args = (observations(3, 2, 2, 2), observations(3, 2, 2, 2, seed=8), images, ROWS)
    assert_close(variant(compute)(*args), compute(*args[:2], images.contiguous(), ROWS))


@pytest.mark.usefixtures("nothing_kept")
@pytest.mark.parametrize("wanted", ["nothing", "parameters", "images"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_lie_where_others_lay(monkeypatch, layout, wanted):
    monkeypatch.setattr(pages, "SMALLEST", 1)
    places, weight = set(), observations(3, 2, 2, 2).requires_grad_(wanted == "parameters")

    def convolution(weight, x):
        return torch.nn.functional.conv2d(x, weight).flatten(1)

    def noting(weight, x):
        places.add(x.data_ptr())
        return convolution(weight, x)

    for seed in range(3):
        images = LAYOUTS[layout](observations(BATCH, 2, 4, 5, seed=seed)).requires_grad_(wanted == "images")
        results = []
        for selected, rows, predictor in ((images, ROWS, noting), (images[ROWS], None, convolution)):
            loss = rnd_loss(weight, 2 * weight.detach(), selected, rows, predictor=predictor)
            of = {"nothing": [], "parameters": [weight], "images": [images]}[wanted]
            results.append((loss.detach(), torch.autograd.grad(loss, of) if of else ()))
            del loss
        assert_close(*results)
    assert wanted == "images" or len(places) == 1


# ---- samples that do not count ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [NAN, INF, -INF, 1e38])
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("as_rows", [False, True])
def test_masked_sample_changes_nothing(poison, normalised, reduction, as_rows):
    pred, target, obs = parameters(1), parameters(2), observations(BATCH, OBS)
    key_mask = MASK.nonzero().squeeze(-1) if as_rows else MASK

    def compute(obs):
        return grad_and_value(
            lambda pred, obs: rnd_loss(
                pred,
                target,
                obs,
                key_mask,
                predictor=network,
                obs_stats=statistics() if normalised else None,
                reduction=reduction,
            ).sum(),
            argnums=(0, 1),
        )(pred, obs)

    poisoned = torch.where(MASK[:, None], obs, poison)
    (of_pred, of_obs), loss = compute(poisoned)
    (expected_of_pred, expected_of_obs), expected = compute(obs)
    assert loss == expected
    assert_close(of_pred, expected_of_pred, rtol=0, atol=0)
    assert_close(of_obs, expected_of_obs, rtol=0, atol=0)
    assert torch.equal(of_obs[~MASK], torch.zeros_like(of_obs[~MASK]))


def test_masked_sample_changes_no_second_derivative():
    pred, target, obs = parameters(1), parameters(2), observations(BATCH, OBS)

    def curvature(obs, key_mask):
        def loss(pred):
            return rnd_loss(pred, target, obs, key_mask, predictor=network)

        return jvp(grad(loss), (pred,), (parameters(3),))

    for key_mask in (MASK, MASK.nonzero().squeeze(-1)):
        poisoned = torch.where(MASK[:, None], obs, NAN)
        assert_close(curvature(poisoned, key_mask), curvature(obs, key_mask), rtol=0, atol=0)


def test_masked_sample_of_a_pytree_changes_nothing():
    pred, target = parameters(1), parameters(2)
    batch = {"image": torch.randint(0, 255, (BATCH, 2), dtype=torch.uint8), "vector": observations(BATCH, 2)}

    def predictor(params, x):
        return network(params, torch.cat([x["image"], x["vector"]], -1))

    def loss(batch):
        return grad_and_value(lambda pred: rnd_loss(pred, target, batch, MASK, predictor=predictor))(pred)

    poisoned = {**batch, "vector": torch.where(MASK[:, None], batch["vector"], NAN)}
    assert_close(loss(poisoned), loss(batch), rtol=0, atol=0)


def normalised(params, x):
    features = x @ params["first"]
    return features / features.norm(dim=-1, keepdim=True)


def test_masked_sample_brings_in_no_nan_of_its_own():
    # Features of a zero observation would be 0 / 0: nothing but samples of the batch may be put through the networks.
    pred, target, obs = parameters(1), parameters(2), observations(BATCH, OBS)
    obs[~MASK] = NAN

    def compute(key_mask):
        return grad_and_value(lambda pred: rnd_loss(pred, target, obs, key_mask, predictor=normalised))(pred)

    assert_close(compute(MASK), compute(MASK.nonzero().squeeze(-1)))


def test_loss_of_nothing_is_zero_even_where_the_errors_are_not_numbers():
    obs, nothing = torch.zeros(3, OBS), torch.zeros(3, dtype=torch.bool)
    assert rnd_error(parameters(1), parameters(2), obs, predictor=normalised).isnan().all()
    for reduction in REDUCTIONS:
        loss = rnd_loss(parameters(1), parameters(2), obs, nothing, predictor=normalised, reduction=reduction)
        assert torch.equal(loss, torch.zeros_like(loss))


def test_masked_sample_does_not_count_even_where_the_stand_in_is_bad():
    obs = torch.full((3, OBS), INF)
    gradients, loss = grad_and_value(
        lambda pred: rnd_loss(pred, parameters(2), obs, torch.zeros(3, dtype=torch.bool), predictor=network)
    )(parameters(1))
    assert loss == 0
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients.values())


def test_nan_that_counts_is_seen():
    obs = observations(BATCH, OBS)
    obs[0, 0] = NAN
    for key_mask in (None, MASK, ROWS):
        assert rnd_loss(parameters(1), parameters(2), obs, key_mask, predictor=network).isnan()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    ("batch_size", "key_mask"),
    [
        (3, torch.zeros(3, dtype=torch.bool)),
        (3, torch.zeros(0, dtype=torch.int64)),
        (1, torch.tensor([False])),
        (0, None),
        (0, torch.zeros(0, dtype=torch.bool)),
        (0, torch.zeros(0, dtype=torch.int64)),
    ],
)
def test_nothing_selected_gives_zero(reduction, batch_size, key_mask):
    gradients, loss = grad_and_value(
        lambda pred: rnd_loss(
            pred, parameters(2), observations(batch_size, OBS), key_mask, predictor=network, reduction=reduction
        ).sum()
    )(parameters(1))
    assert loss == 0
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients.values())
    shape = rnd_loss(
        parameters(1), parameters(2), observations(batch_size, OBS), key_mask, predictor=network, reduction=reduction
    ).shape
    assert shape == ((batch_size,) if reduction == "none" else ())


# ---- properties ------------------------------------------------------------------------------------------------------

masks = st.lists(st.booleans(), min_size=1, max_size=8).map(torch.tensor)
seeds = st.integers(0, 2**16)


@given(mask=masks, seed=seeds)
def test_reductions_agree(mask, seed):
    obs = observations(len(mask), OBS, seed=seed, dtype=torch.float64)
    rows = mask.nonzero().squeeze(-1)
    pred, target = parameters(1, torch.float64), parameters(2, torch.float64)
    by_mask = {r: rnd_loss(pred, target, obs, mask, predictor=network, reduction=r) for r in REDUCTIONS}
    by_rows = {r: rnd_loss(pred, target, obs, rows, predictor=network, reduction=r) for r in REDUCTIONS}
    chosen = {r: rnd_loss(pred, target, obs[rows], predictor=network, reduction=r) for r in REDUCTIONS}
    assert_close(by_mask["none"].sum(), by_mask["sum"])
    assert_close(by_mask["none"].sum() / max(1, int(mask.sum())), by_mask["mean"])
    assert torch.equal(by_mask["none"][~mask], torch.zeros(int((~mask).sum()), dtype=torch.float64))
    assert_close(by_rows, by_mask)
    assert_close((chosen["mean"], chosen["sum"]), (by_mask["mean"], by_mask["sum"]))
    assert_close(chosen["none"], by_mask["none"][mask])


@given(mask=masks, seed=seeds)
def test_order_of_the_batch_does_not_matter(mask, seed):
    obs = observations(len(mask), OBS, seed=seed, dtype=torch.float64)
    order = torch.randperm(len(mask), generator=torch.Generator().manual_seed(seed))
    pred, target = parameters(1, torch.float64), parameters(2, torch.float64)

    def compute(obs, mask):
        return grad_and_value(lambda pred: rnd_loss(pred, target, obs, mask, predictor=network))(pred)

    assert_close(compute(obs[order], mask[order]), compute(obs, mask))


@given(size=st.integers(1, 8), seed=seeds, reduction=st.sampled_from(REDUCTIONS))
def test_everything_selected_is_no_mask(size, seed, reduction):
    obs = observations(size, OBS, seed=seed)

    def loss(key_mask):
        return rnd_loss(parameters(1), parameters(2), obs, key_mask, predictor=network, reduction=reduction)

    assert_close(loss(torch.ones(size, dtype=torch.bool)), loss(None))
    assert_close(loss(torch.arange(size)), loss(None))


@given(seed=seeds, scale=st.floats(0.1, 10.0))
def test_error_is_quadratic_in_the_features(seed, scale):
    obs = observations(3, OBS, seed=seed, dtype=torch.float64)
    pred, target = parameters(1, torch.float64), parameters(2, torch.float64)
    scaled = [{**params, "second": scale * params["second"]} for params in (pred, target)]
    assert_close(rnd_error(*scaled, obs, predictor=network), scale**2 * rnd_error(pred, target, obs, predictor=network))


def test_mean_over_all_subsets_is_the_full_mean():
    obs, pred, target = (
        observations(5, OBS, dtype=torch.float64),
        parameters(1, torch.float64),
        parameters(2, torch.float64),
    )
    subsets = torch.tensor(list(itertools.combinations(range(5), 2)))
    losses = vmap(lambda rows: rnd_loss(pred, target, obs, rows, predictor=network))(subsets)
    assert_close(losses.mean(), rnd_loss(pred, target, obs, predictor=network))


def test_leading_shapes_agree_with_the_flat_batch():
    pred, target, obs = parameters(1), parameters(2), observations(2, 3, OBS)
    mask = torch.tensor([[True, False, True], [False, True, True]])
    flat = rnd_error(pred, target, obs.flatten(0, 1), predictor=network)
    assert_close(rnd_error(pred, target, obs, predictor=network), flat.reshape(2, 3))
    assert_close(rnd_error(pred, target, obs[1, 2], predictor=network), flat[5])
    for reduction in REDUCTIONS:
        deep = rnd_loss(pred, target, obs, mask, predictor=network, reduction=reduction)
        expected = rnd_loss(pred, target, obs.flatten(0, 1), mask.flatten(), predictor=network, reduction=reduction)
        assert_close(deep.flatten(), expected.flatten())
    late = torch.tensor([[False, False, False], [False, True, True]])
    poisoned = torch.where(late.unsqueeze(-1), obs, NAN)
    assert_close(rnd_loss(pred, target, poisoned, late, predictor=network), flat[4:].mean())
    rows = torch.tensor([1])
    assert_close(rnd_loss(pred, target, obs, rows, predictor=network), flat[3:].mean())
    spread = rnd_loss(pred, target, obs, rows, predictor=network, reduction="none")
    assert_close(spread, torch.stack([torch.zeros(3), flat[3:]]))


# ---- key masks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch_size", "fraction", "rows"),
    [(32, 0.25, 8), (10, 0.25, 3), (100, 0.07, 7), (3, 0.0, 0), (3, 1.0, 3), (0, 0.5, 0), (1, 0.25, 1), (4, 1e-11, 1)],
)
def test_rows_are_exactly_the_rounded_up_share(batch_size, fraction, rows):
    drawn = rnd_key_mask(random.key(0), batch_size, fraction)
    assert drawn.dtype == torch.int64
    assert drawn.shape == (rows,)
    assert rows_drawn(batch_size, fraction) == rows
    assert len(set(drawn.tolist())) == rows
    assert set(drawn.tolist()) <= set(range(batch_size))


@given(batch_size=st.integers(0, 300), percent=st.integers(0, 100))
def test_number_of_rows_is_exact_for_whole_percents(batch_size, percent):
    assert rows_drawn(batch_size, percent / 100) == -(-batch_size * percent // 100)


def test_rows_are_evenly_drawn():
    draws, batch_size, fraction = 3000, 8, 0.25
    drawn = vmap(lambda key: rnd_key_mask(key, batch_size, fraction))(random.split(random.key(1), draws))
    counts = torch.bincount(drawn.flatten(), minlength=batch_size).double()
    deviation = math.sqrt(draws * fraction * (1 - fraction))
    assert (counts - draws * fraction).abs().max() < 4.5 * deviation


def test_bernoulli_mask_is_uniform_below_the_fraction():
    key = random.key(2)
    for fraction in (0.0, 0.25, 0.6, 1.0):
        mask = rnd_key_mask(key, 1000, fraction, exact=False)
        assert mask.dtype == torch.bool
        assert torch.equal(mask, random.uniform(key, (1000,)) < fraction)
        assert abs(mask.double().mean() - fraction) < 0.05
    assert not rnd_key_mask(key, 1000, 0.0, exact=False).any()
    assert rnd_key_mask(key, 1000, 1.0, exact=False).all()


def test_bernoulli_fraction_may_be_a_tensor():
    key = random.key(2)
    masks = vmap(lambda fraction: rnd_key_mask(key, 50, fraction, exact=False))(torch.tensor([0.0, 0.5, 1.0]))
    assert torch.equal(masks[1], rnd_key_mask(key, 50, 0.5, exact=False))
    assert not masks[0].any()
    assert masks[2].all()


def test_rows_are_the_first_of_the_permutation():
    assert torch.equal(rnd_key_mask(random.key(4), 16, 0.3), random.permutation(random.key(4), 16)[:5])


def test_default_is_a_quarter_of_exact_rows():
    assert torch.equal(rnd_key_mask(random.key(4), 16), rnd_key_mask(random.key(4), 16, 0.25, exact=True))


# ---- observations ----------------------------------------------------------------------------------------------------


def test_uint8_becomes_a_fraction_without_statistics_and_stays_raw_with_them():
    images = torch.tensor([[0, 51, 255]], dtype=torch.uint8)
    seen = []

    def spy(params, x):
        seen.append(x)
        return x

    rnd_error(None, None, images, predictor=spy)
    assert_close(seen[0], torch.tensor([[0.0, 0.2, 1.0]]))
    stats = RunningMeanStd(torch.tensor([0.0, 50.0, 250.0]), torch.tensor([1.0, 1.0, 4.0]), torch.tensor(1.0))
    rnd_error(None, None, images, predictor=spy, obs_stats=stats)
    assert_close(seen[2], torch.tensor([[0.0, 1.0, 2.5]]))


def test_integers_are_promoted():
    counts = torch.tensor([[1, 2, 3, 4], [0, -1, 5, 2]])
    assert_close(
        rnd_error(parameters(1), parameters(2), counts, predictor=network),
        rnd_error(parameters(1), parameters(2), counts.float(), predictor=network),
    )


def test_both_networks_see_the_same_normalised_observations():
    seen = []

    def spy(params, x):
        seen.append(x)
        return x

    stats, obs = statistics(), observations(BATCH, OBS) * 10
    rnd_error(None, None, obs, predictor=spy, obs_stats=stats, obs_clip=2.0)
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], running_mean_std_normalize(stats, obs, 2.0))
    assert seen[0].abs().max() == 2.0


def test_feature_that_was_constant_saturates_at_the_clip_when_it_moves():
    stats = running_mean_std_update(running_mean_std_init((2,)), torch.full((1000, 2), 3.0))
    seen = []

    def spy(params, x):
        seen.append(x)
        return x

    rnd_error(None, None, torch.tensor([[3.0, 9.0], [3.0, -9.0]]), predictor=spy, obs_stats=stats)
    assert seen[0][:, 0].abs().max() < 0.05
    assert seen[0][:, 1].tolist() == [5.0, -5.0]


def test_clip_without_statistics_does_nothing():
    obs = observations(BATCH, OBS) * 100
    plain = rnd_error(parameters(1), parameters(2), obs, predictor=network)
    assert torch.equal(rnd_error(parameters(1), parameters(2), obs, predictor=network, obs_clip=0.1), plain)


def test_clip_defaults_to_five():
    obs, options = observations(BATCH, OBS) * 100, {"predictor": network, "obs_stats": statistics()}
    default = rnd_error(parameters(1), parameters(2), obs, **options)
    assert torch.equal(rnd_error(parameters(1), parameters(2), obs, obs_clip=5.0, **options), default)


@pytest.mark.parametrize("as_tensordict", [False, True])
def test_mapping_of_observations(as_tensordict):
    pred, target = parameters(1), parameters(2)
    batch = {"position": observations(BATCH, 1), "inner": {"velocity": observations(BATCH, 3, seed=8)}}
    flat = torch.cat([batch["position"], batch["inner"]["velocity"]], -1)

    def predictor(params, x):
        return network(params, torch.cat([x["position"], x["inner"]["velocity"]], -1))

    given_batch = TensorDict(batch, [BATCH]) if as_tensordict else batch
    stats = statistics()
    split = {
        "position": RunningMeanStd(stats.mean[:1], stats.var[:1], stats.count),
        "inner": {"velocity": SimpleNamespace(mean=stats.mean[1:], var=stats.var[1:])},
    }
    for key_mask in (None, MASK, ROWS):
        assert_close(
            rnd_loss(pred, target, given_batch, key_mask, predictor=predictor),
            rnd_loss(pred, target, flat, key_mask, predictor=network),
        )
        assert_close(
            rnd_loss(pred, target, given_batch, key_mask, predictor=predictor, obs_stats=split, obs_clip=1.0),
            rnd_loss(pred, target, flat, key_mask, predictor=network, obs_stats=stats, obs_clip=1.0),
        )


def test_one_of_several_observations_may_have_no_statistics():
    batch = {"image": torch.full((2, 3), 51, dtype=torch.uint8), "vector": torch.full((2, 1), 4.0)}
    seen = []

    def spy(params, x):
        seen.append(x)
        return x["vector"]

    stats = {"vector": RunningMeanStd(torch.tensor([2.0]), torch.tensor([4.0]), torch.tensor(1.0)), "image": None}
    rnd_error(None, None, batch, predictor=spy, obs_stats=stats)
    assert_close(seen[0]["image"], torch.full((2, 3), 0.2))
    assert_close(seen[0]["vector"], torch.full((2, 1), 1.0))


def test_batch_may_be_a_tuple():
    batch = (observations(BATCH, 1), observations(BATCH, 3, seed=8))

    def predictor(params, x):
        return network(params, torch.cat(x, -1))

    for key_mask in (None, MASK, ROWS):
        assert_close(
            rnd_loss(parameters(1), parameters(2), batch, key_mask, predictor=predictor),
            rnd_loss(parameters(1), parameters(2), torch.cat(batch, -1), key_mask, predictor=network),
        )


def test_unselected_rows_never_reach_the_networks():
    sizes = []

    def spy(params, x):
        sizes.append(x.shape[0])
        return x @ params["weight"]

    nets = {"weight": torch.ones(OBS, 2)}, {"weight": torch.zeros(OBS, 2)}
    rnd_loss(*nets, observations(BATCH, OBS), ROWS, predictor=spy)
    rnd_loss(*nets, TensorDict({"x": observations(BATCH, OBS)}, [BATCH]), ROWS, predictor=lambda p, x: spy(p, x["x"]))
    assert sizes == [3, 3, 3, 3]


def test_params_may_be_a_tensordict():
    pred, target, obs = parameters(1), parameters(2), observations(BATCH, OBS)
    expected = grad_and_value(lambda pred: rnd_loss(pred, target, obs, MASK, predictor=network))(pred)
    of_tensordict = grad_and_value(lambda pred: rnd_loss(pred, TensorDict(target), obs, MASK, predictor=network))(
        TensorDict(pred)
    )
    assert_close((of_tensordict[0].to_dict(), of_tensordict[1]), expected)


# ---- dtypes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_error_is_computed_in_float32_at_least(dtype):
    pred, target, obs = parameters(1, dtype), parameters(2, dtype), observations(BATCH, OBS, dtype=dtype)

    def in_dtype(params, x):
        return network(params, x.to(dtype))

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    error = rnd_error(pred, target, obs, predictor=in_dtype)
    assert error.dtype == wide
    features = [in_dtype(params, obs).to(wide) for params in (pred, target)]
    assert torch.equal(error, (features[0] - features[1]).square().mean(-1))
    gradients, loss = grad_and_value(lambda pred: rnd_loss(pred, target, obs, MASK, predictor=in_dtype))(pred)
    assert loss.dtype == wide
    assert all(g.dtype == dtype and g.isfinite().all() for g in gradients.values())


def test_half_features_do_not_overflow():
    big = torch.full((2, 4), 300.0, dtype=torch.float16)
    assert rnd_loss(None, None, big, predictor=lambda _, x: x.half(), target=lambda _, x: -x.half()) == 360000.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64])
def test_reward_is_float32_at_least(dtype):
    error = torch.tensor([[1, 2, 3]]).to(dtype)
    sums, stats = rnd_reward_stats_update(discounted_sum_init((1,)), running_mean_std_init(), error)
    assert rnd_reward(stats, error).dtype == sums.value.dtype == stats.var.dtype == torch.float32
    assert_close(sums.value, torch.tensor([3 + 2 * 0.99 + 0.99**2]))


# ---- the scale of the intrinsic reward -------------------------------------------------------------------------------


def forward_filter(rewards, start, discount):
    filtered, values = [], list(start)
    for t in range(len(rewards[0])):
        values = [discount * value + row[t] for value, row in zip(values, rewards, strict=True)]
        filtered.append(list(values))
    return values, filtered


@pytest.mark.parametrize("discount", [0.0, 0.9, 1.0])
def test_sums_run_forward_in_time_for_each_environment(discount):
    # As many steps as environments would let a swapped axis pass.
    bonus = observations(2, 5, dtype=torch.float64).abs()
    start = DiscountedSum(torch.tensor([0.5, 2.0], dtype=torch.float64))
    empty = running_mean_std_init((), epsilon=0.0, dtype=torch.float64)
    sums, stats = rnd_reward_stats_update(start, empty, bonus, discount=discount)
    values, filtered = forward_filter(bonus.tolist(), start.value.tolist(), discount)
    everything = torch.tensor(filtered, dtype=torch.float64)
    assert_close(sums.value, torch.tensor(values, dtype=torch.float64))
    assert_close(stats.mean, everything.mean())
    assert_close(stats.var, everything.var(correction=0))
    assert stats.count == 10
    if discount == 1.0:
        assert_close(sums.value, start.value + bonus.sum(-1))


def test_two_calls_are_one_longer_call():
    bonus = observations(3, 7, dtype=torch.float64).abs()
    start = discounted_sum_init((3,), dtype=torch.float64), running_mean_std_init((), dtype=torch.float64)
    once = rnd_reward_stats_update(*start, bonus)
    twice = rnd_reward_stats_update(*rnd_reward_stats_update(*start, bonus[:, :3]), bonus[:, 3:])
    assert_close(twice, once)


def test_order_of_environments_does_not_matter():
    bonus, start = observations(4, 3).abs(), (discounted_sum_init((4,)), running_mean_std_init())
    order = torch.tensor([2, 0, 3, 1])
    sums, stats = rnd_reward_stats_update(*start, bonus)
    other_sums, other_stats = rnd_reward_stats_update(*start, bonus[order])
    assert torch.equal(other_sums.value, sums.value[order])
    assert_close(other_stats, stats)


def test_environments_may_have_any_shape_and_time_no_length():
    bonus = observations(2, 3, 4).abs()
    sums, stats = rnd_reward_stats_update(discounted_sum_init((2, 3)), running_mean_std_init(), bonus)
    flat, flat_stats = rnd_reward_stats_update(discounted_sum_init((6,)), running_mean_std_init(), bonus.flatten(0, 1))
    assert_close((sums.value.flatten(), stats), (flat.value, flat_stats))
    one, _ = rnd_reward_stats_update(discounted_sum_init(()), running_mean_std_init(), bonus[0, 0])
    assert_close(one.value, sums.value[0, 0])
    unchanged = rnd_reward_stats_update(sums, stats, bonus[..., :0])
    assert_close(unchanged, (sums, stats), rtol=0, atol=0)
    nobody = rnd_reward_stats_update(discounted_sum_init((0,)), stats, torch.zeros(0, 4))
    assert_close(nobody[1], stats, rtol=0, atol=0)


@pytest.mark.parametrize("bad", [NAN, INF])
def test_bonus_that_is_not_finite_does_not_stay(bad):
    bonus = observations(2, 4).abs()
    bonus[0, 1] = bad
    sums, stats = rnd_reward_stats_update(discounted_sum_init((2,)), running_mean_std_init(), bonus)
    assert all(x.isfinite().all() for x in (*sums, *stats))
    without = torch.stack([bonus[0, [0, 2, 3]]])
    assert_close(sums.value[:1], rnd_reward_stats_update(discounted_sum_init((1,)), stats, without)[0].value)


def test_reward_is_the_bonus_over_the_deviation_of_its_sum():
    stats = RunningMeanStd(torch.tensor(100.0), torch.tensor(4.0), torch.tensor(10.0))
    assert torch.equal(
        rnd_reward(stats, torch.tensor([[0.0, 1.0], [6.0, 2.0]])), torch.tensor([[0.0, 0.5], [3.0, 1.0]])
    )


def test_reward_is_finite_where_nothing_varies():
    stats = RunningMeanStd(torch.tensor(0.0), torch.tensor(0.0), torch.tensor(10.0))
    assert_close(rnd_reward(stats, torch.tensor(1e-3)), torch.tensor(10.0))


@given(scale=st.floats(1e-3, 1e3), seed=seeds)
def test_scale_of_the_features_cancels(scale, seed):
    bonus = observations(3, 6, seed=seed, dtype=torch.float64).abs()

    def reward(bonus):
        start = running_mean_std_init((), epsilon=0.0, dtype=torch.float64)
        _, stats = rnd_reward_stats_update(discounted_sum_init((3,), dtype=torch.float64), start, bonus)
        return rnd_reward(stats, bonus)

    assert_close(reward(scale * bonus), reward(bonus))
    assert (reward(bonus) >= 0).all()
    assert torch.equal(reward(bonus).flatten().argsort(), bonus.flatten().argsort())


def test_asking_for_the_reward_twice_gives_the_same():
    pred, target, obs = parameters(1), parameters(2), observations(2, 5, OBS)
    stats, scale = statistics(), running_mean_std_init()

    def reward():
        return rnd_reward(scale, rnd_error(pred, target, obs, predictor=network, obs_stats=stats))

    assert torch.equal(reward(), reward())


# ---- learning --------------------------------------------------------------------------------------------------------


def test_error_falls_where_it_was_trained_and_stays_where_it_was_not():
    generator = torch.Generator().manual_seed(0)

    def relu_network(params, x):
        return torch.relu(x @ params["first"]) @ params["second"]

    def initial():
        return {
            "first": torch.randn(4, 64, generator=generator) / 2,
            "second": torch.randn(64, 16, generator=generator) / 8,
        }

    pred, target = initial(), initial()
    near, far = torch.randn(64, 4, generator=generator), 10 + torch.randn(64, 4, generator=generator)
    before = rnd_error(pred, target, near, predictor=relu_network).mean()
    leaves = {name: value.requires_grad_() for name, value in pred.items()}
    optimizer = torch.optim.Adam(leaves.values(), lr=3e-3)
    for _ in range(300):
        optimizer.zero_grad()
        rnd_loss(leaves, target, near, predictor=relu_network).backward()
        optimizer.step()
    after = rnd_error(leaves, target, near, predictor=relu_network).mean()
    assert after < before / 10
    assert rnd_error(leaves, target, far, predictor=relu_network).mean() > 100 * after


# ---- nothing outside changes -----------------------------------------------------------------------------------------


def test_arguments_and_generator_stay_as_they_are():
    bonus = observations(2, 5).abs()
    args = [parameters(1), parameters(2), observations(BATCH, OBS), MASK.clone(), ROWS.clone(), statistics()]
    args += [random.key(0), bonus, discounted_sum_init((2,)), running_mean_std_init()]
    before = tree_map(torch.clone, args)
    generator = torch.get_rng_state()

    def run():
        pred, target, obs, mask, rows, stats, key, bonus, sums, scale = args
        results = [rnd_error(pred, target, obs, predictor=network, obs_stats=stats)]
        for key_mask in (None, mask, rows):
            for reduction in REDUCTIONS:
                loss = rnd_loss(pred, target, obs, key_mask, predictor=network, obs_stats=stats, reduction=reduction)
                results.append(loss)
        results += [rnd_key_mask(key, BATCH), rnd_key_mask(key, BATCH, exact=False)]
        sums, scale = rnd_reward_stats_update(sums, scale, bonus)
        return [*results, *sums, *scale, rnd_reward(scale, bonus)]

    assert_close(run(), run(), rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), generator)
    assert_close(args, before, rtol=0, atol=0)
    assert all(not x.requires_grad and x._version == 0 for x in torch.utils._pytree.tree_leaves(args))


# ---- refusals --------------------------------------------------------------------------------------------------------


def call_loss(**changes):
    arguments = {
        "pred_params": parameters(1),
        "target_params": parameters(2),
        "batch": observations(BATCH, OBS),
        "key_mask": None,
        "predictor": network,
    }
    return rnd_loss(**{**arguments, **changes})


TWO = {"a": observations(BATCH, 2), "b": observations(BATCH, 2)}


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        (
            {"reduction": "means"},
            ValueError,
            r"rnd_loss: reduction must be one of .*got 'means'\. Did you mean 'mean'\?",
        ),
        (
            {"key_mask": torch.ones(5, dtype=torch.bool)},
            ValueError,
            r"key_mask must be bool \[6\] like the batch, got bool \[5\]",
        ),
        (
            {"key_mask": torch.ones(6, 1, dtype=torch.bool)},
            ValueError,
            r"key_mask must be bool \[6\].*got bool \[6, 1\]",
        ),
        ({"key_mask": torch.tensor(True)}, ValueError, r"key_mask must be bool \[B\], got bool \[\]"),
        ({"key_mask": torch.tensor(3)}, ValueError, r"key_mask must be rows of shape \[k\], got int64 \[\]"),
        ({"key_mask": torch.zeros(2, 2, dtype=torch.int64)}, ValueError, r"rows of shape \[k\], got int64 \[2, 2\]"),
        ({"key_mask": torch.ones(6)}, TypeError, r"key_mask must be bool \[B\] or int64 rows \[k\], got float32 \[6\]"),
        ({"key_mask": torch.ones(6, dtype=torch.int32)}, TypeError, r"int64 rows \[k\], got int32 \[6\]"),
        ({"key_mask": torch.ones(6, dtype=torch.uint8)}, TypeError, r"int64 rows \[k\], got uint8 \[6\]"),
        ({"key_mask": [0, 1]}, TypeError, r"key_mask must be a tensor, got list \[0, 1\]"),
        (
            {"batch": observations(2, 3, OBS), "key_mask": torch.ones(2, dtype=torch.bool)},
            ValueError,
            r"key_mask must be of shape \[2, 3\] like the errors, got bool \[2\]",
        ),
        (
            {"batch": (observations(4, 2), observations(5, 2)), "key_mask": torch.tensor([0])},
            ValueError,
            r"batch must be tensors \[B, \.\.\.\] where there is a key_mask, got float32 \[4, 2\], float32 \[5, 2\]",
        ),
        (
            {"batch": torch.tensor(1.0), "key_mask": torch.tensor([0])},
            ValueError,
            r"batch must be tensors \[B.*got float32 \[\]",
        ),
        ({"batch": {}, "key_mask": torch.tensor([0])}, ValueError, r"batch must be tensors \[B.*got no tensor"),
        ({"batch": "obs", "key_mask": torch.tensor([0])}, TypeError, r"batch must be a tensor, got str 'obs'"),
        (
            {
                "batch": observations(2, 3, OBS),
                "key_mask": torch.tensor([0]),
                "reduction": "none",
                "predictor": lambda p, x: network(p, x.flatten(0, 1)),
            },
            ValueError,
            r"rnd_loss: the errors must be of shape \[1, \.\.\.\] like key_mask, got float32 \[3\]",
        ),
        (
            {"batch": torch.ones(6, 4, dtype=torch.bool)},
            TypeError,
            r"rnd_loss: batch must be a tensor of numbers, got bool \[6, 4\]",
        ),
        (
            {"batch": torch.ones(6, 4, dtype=torch.bool), "key_mask": MASK},
            TypeError,
            r"rnd_loss: batch must be a tensor of numbers, got bool \[6, 4\]",
        ),
        ({"batch": "obs"}, TypeError, r"rnd_loss: batch must be a tensor, got str 'obs'"),
        (
            {"predictor": lambda p, x: x.long()},
            TypeError,
            r"predictor\(params, batch\) must be a floating-point tensor, got int64",
        ),
        ({"predictor": lambda p, x: {"x": x}}, TypeError, r"predictor\(params, batch\) must be a tensor, got dict"),
        (
            {"predictor": lambda p, x: x.sum()},
            ValueError,
            r"predictor\(params, batch\) must be of shape \[\.\.\., features\]",
        ),
        (
            {"target": lambda p, x: x > 0},
            TypeError,
            r"target\(params, batch\) must be a floating-point tensor, got bool",
        ),
        (
            {"target": identity},
            ValueError,
            r"target\(params, batch\) must be of shape \[6, 3\] like the predictor's features, got float32 \[6, 4\]",
        ),
        ({"obs_clip": -1.0}, ValueError, r"rnd_loss: obs_clip must be at least 0, got -1\.0"),
        ({"obs_clip": torch.ones(4)}, ValueError, r"obs_clip must be a number or a 0-d tensor, got float32 \[4\]"),
        ({"obs_clip": "5"}, TypeError, r"rnd_loss: obs_clip must be a number or a 0-d tensor, got str '5'"),
        (
            {"obs_stats": running_mean_std_init((3,))},
            ValueError,
            r"rnd_loss: obs_stats must be statistics of the last .* observations \[6, 4\], got mean float32 \[3\]",
        ),
        (
            {"obs_stats": {"mean": 0}},
            TypeError,
            r"rnd_loss: obs_stats must be an object with tensors mean and var, got dict",
        ),
        ({"obs_stats": SimpleNamespace(mean=0.0, var=1.0)}, TypeError, r"tensors mean and var, got SimpleNamespace"),
        (
            {"batch": TWO, "obs_stats": statistics()},
            TypeError,
            r"obs_stats must be a mapping like the observations, got RunningMeanStd for a dict",
        ),
        (
            {"batch": tuple(TWO.values()), "obs_stats": statistics()},
            TypeError,
            r"obs_stats must be a mapping like the observations, got RunningMeanStd for a tuple",
        ),
        (
            {"obs_stats": running_mean_std_init((3,)), "key_mask": ROWS},
            ValueError,
            r"rnd_loss: obs_stats must be statistics of the last .* observations \[\d, 4\], got mean float32",
        ),
        (
            {"obs_stats": SimpleNamespace(mean=torch.zeros(4), var=torch.ones(4, 1))},
            ValueError,
            r"rnd_loss: obs_stats must be statistics of .*, got var float32 \[4, 1\]",
        ),
        ({"obs_stats": running_mean_std_init((2, 6, 4))}, ValueError, r"got mean float32 \[2, 6, 4\]"),
        (
            {"batch": TWO, "obs_stats": {"a": None, "b": running_mean_std_init((9,))}},
            ValueError,
            r"obs_stats\['b'\] must be statistics of the last dimensions of observations \[6, .*got mean float32 \[9\]",
        ),
        (
            {"batch": TWO, "obs_stats": {"a": None, "b": 3}},
            TypeError,
            r"obs_stats\['b'\] must be an object with tensors mean and var, got int 3",
        ),
        (
            {"batch": torch.ones(6, 4, dtype=torch.bool), "obs_stats": statistics()},
            TypeError,
            r"rnd_loss: batch must be a tensor of numbers, got bool \[6, 4\]",
        ),
        (
            {"predictor": None},
            TypeError,
            r"rnd_loss: predictor must be a function \(params, observations\) -> features, got NoneType",
        ),
        (
            {"target_params": None},
            TypeError,
            r"rnd_loss: target_params must be parameters of the target network, got None\. Only rnd_loss with target_f",
        ),
        (
            {"target_features": torch.ones(3, FEATURES), "key_mask": ROWS},
            ValueError,
            r"rnd_loss: target_features must be of shape \[6, \.\.\., K\] like the whole batch, got float32 \[3, 3\]\. "
            r"Did you select rows\? key_mask selects from target_features, too\.",
        ),
        (
            {"target_features": torch.ones(4, FEATURES), "key_mask": MASK},
            ValueError,
            r"target_features must be of shape \[6, \.\.\., K\] like the whole batch, got float32 \[4, 3\]",
        ),
        (
            {"target_features": torch.tensor(1.0), "key_mask": MASK},
            ValueError,
            r"target_features must be of shape \[6, \.\.\., K\] like the whole batch, got float32 \[\]",
        ),
        (
            {"target_features": torch.ones(4, FEATURES)},
            ValueError,
            r"target_features must be of shape \[6, 3\] like the predictor's features, got float32 \[4, 3\]",
        ),
        (
            {"target_features": torch.ones(6, 5), "key_mask": ROWS},
            ValueError,
            r"target_features must be of shape \[3, 3\] like the predictor's features, got float32 \[3, 5\]",
        ),
        (
            {"target_features": torch.ones(6), "key_mask": MASK},
            ValueError,
            r"target_features must be of shape \[6, 3\] like the predictor's features, got float32 \[6\]",
        ),
        (
            {"target_features": torch.ones(6, FEATURES, dtype=torch.int64)},
            TypeError,
            r"rnd_loss: target_features must be a floating-point tensor, got int64 \[6, 3\]",
        ),
        (
            {"target_features": torch.ones(6, FEATURES, dtype=torch.bool), "key_mask": MASK},
            TypeError,
            r"target_features must be a floating-point tensor, got bool \[6, 3\]",
        ),
        ({"target_features": [1.0]}, TypeError, r"rnd_loss: target_features must be a tensor, got list"),
        (
            {"target_features": torch.ones(6, FEATURES), "target": 3},
            TypeError,
            r"rnd_loss: target must be a function",
        ),
        ({"target": 3}, TypeError, r"rnd_loss: target must be a function \(params, .*, got int 3"),
        ({"batch": TWO, "obs_stats": {"a": None}}, KeyError, r"obs_stats must be a mapping with 'b', got keys \['a'\]"),
    ],
)
def test_loss_refuses(changes, error, text):
    with pytest.raises(error, match=text):
        call_loss(**changes)


@pytest.mark.parametrize(
    ("args", "options", "error", "text"),
    [
        ((random.key(0), 4, 1.5), {}, ValueError, r"rnd_key_mask: fraction must be in \[0, 1\], got 1\.5"),
        ((random.key(0), 4, -0.1), {}, ValueError, r"rnd_key_mask: fraction must be in \[0, 1\], got -0\.1"),
        (
            (random.key(0), 4, "all"),
            {},
            TypeError,
            r"rnd_key_mask: fraction must be a number or a 0-d tensor, got str 'all'",
        ),
        (
            (random.key(0), 4, torch.tensor(0.5)),
            {},
            TypeError,
            r"fraction must be a number, got float32 \[\]\. Only exact=False",
        ),
        ((random.key(0), -1), {}, ValueError, r"rnd_key_mask: batch_size must be at least 0, got -1"),
        ((random.key(0), 4.0), {}, TypeError, r"rnd_key_mask: batch_size must be an int, got float 4\.0"),
        ((random.key(0), True), {}, TypeError, r"rnd_key_mask: batch_size must be an int, got bool True"),
        ((random.key(0), 4), {"exact": "no"}, TypeError, r"rnd_key_mask: exact must be True or False, got str 'no'"),
        (
            (random.key(0), torch.zeros(4, 2)),
            {},
            TypeError,
            r"batch_size must be an int, got float32 \[4, 2\]\. Did you pass the batch\?",
        ),
        ((torch.zeros(3, dtype=torch.int64), 4), {}, ValueError, r"key must be a key, int64 \[2\], got int64 \[3\]"),
        ((torch.zeros(3, dtype=torch.int64), 4), {"exact": False}, ValueError, r"key must be a key, int64 \[2\]"),
        ((0, 4), {}, TypeError, r"key must be a key, int64 \[2\], got int 0"),
    ],
)
def test_key_mask_refuses(args, options, error, text):
    with pytest.raises(error, match=text):
        rnd_key_mask(*args, **options)


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"error": torch.tensor(1.0)}, ValueError, r"rnd_reward_stats_update: error must be of shape \[\.\.\., T\]"),
        (
            {"error": torch.ones(2, 3, dtype=torch.bool)},
            TypeError,
            r"error must be a tensor of numbers, got bool \[2, 3\]",
        ),
        ({"error": [1.0]}, TypeError, r"error must be a tensor, got list"),
        ({"error": torch.ones(3, 2)}, ValueError, r"reward must be of shape \[2\] like the sums, got float32 \[3\]"),
        (
            {"stats": running_mean_std_init((3,))},
            ValueError,
            r"stats\.mean must be of shape \[\] like a scalar's, got float32 \[3\]",
        ),
        ({"discount": 1.5}, ValueError, r"discount must be in \[0, 1\], got 1\.5"),
        ({"sums": torch.zeros(2)}, TypeError, r"sums must be a DiscountedSum of tensors value, got float32 \[2\]"),
        (
            {"stats": discounted_sum_init()},
            TypeError,
            r"stats must be a RunningMeanStd of tensors mean, var, count, got",
        ),
    ],
)
def test_reward_scale_refuses(changes, error, text):
    arguments = {"sums": discounted_sum_init((2,)), "stats": running_mean_std_init(), "error": torch.ones(2, 3)}
    with pytest.raises(error, match=text):
        rnd_reward_stats_update(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("args", "error", "text"),
    [
        (
            (running_mean_std_init(), torch.ones(2, dtype=torch.bool)),
            TypeError,
            r"rnd_reward: error must be a tensor of numbers",
        ),
        ((running_mean_std_init(), 1.0), TypeError, r"rnd_reward: error must be a tensor, got float 1\.0"),
        (
            (torch.ones(2), running_mean_std_init()),
            TypeError,
            r"rnd_reward: stats must be a RunningMeanStd of tensors mean, var, count, got float32 \[2\]",
        ),
        (
            (running_mean_std_init((2,)), torch.ones(2)),
            ValueError,
            r"rnd_reward: stats\.var must be of shape \[\] like a scalar's, got float32 \[2\]",
        ),
    ],
)
def test_reward_refuses(args, error, text):
    with pytest.raises(error, match=text):
        rnd_reward(*args)


def test_refusal_under_vmap_speaks_of_one_member():
    target, obs, short = parameters(2), observations(BATCH, OBS), torch.ones(3, 5, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"key_mask must be bool \[6\] like the batch, got bool \[5\]"):
        vmap(lambda mask: rnd_loss(target, target, obs, mask, predictor=network))(short)
