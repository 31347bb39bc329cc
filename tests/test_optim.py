"""The optimiser against the author's runs, its formulas in float64, and what its edges must do."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from torch.func import grad, jvp, vmap
from torch.testing import assert_close
from torch.utils._pytree import tree_map

from rlloss import LaPropState, adaptive_clip, ema_update, laprop_init, laprop_update, linear_warmup, optim

CASES = ["warm20", "warm6", "default", "nesterov", "wd"]
STEPS = 20
# Of each array: its largest entry times the last. Entries near 0 are differences of larger ones.
TOLERANCE = {torch.float64: (1e-6, 1e-7), torch.float32: (1e-5, 1e-6)}

both = pytest.mark.parametrize("dtype", TOLERANCE)


class Run:
    """One of the author's runs of 20 steps."""

    def __init__(self, file, case, dtype):
        knobs = file.meta["cases"][case]
        self.learning_rate, self.warmup = knobs.get("lr", 4e-5), knobs.get("warmup", 1000)
        self.get = lambda key: file[f"{case}.{key}"]
        self.names = sorted(key.removeprefix(f"{case}.in.param0.") for key in file if f"{case}.in.param0." in key)
        self.params = {name: self.get(f"in.param0.{name}").to(dtype) for name in self.names}
        self.grads = [
            {name: self.get(f"in.grads.{name}")[step].to(dtype) for name in self.names} for step in range(STEPS)
        ]
        decay = {name: knobs["wd"] if name.endswith("/kernel") else 0.0 for name in self.names} if "wd" in knobs else 0
        self.knobs = {"nesterov": knobs.get("nesterov", False), "weight_decay": decay}
        self.rtol, self.share = TOLERANCE[dtype]

    def author_rate(self, step):
        """The author's ramp: float32, as a difference, which loses up to 1e-5 of the first rates."""
        one, rate = torch.tensor(1.0), torch.tensor(self.learning_rate, dtype=torch.float32)
        left = one - torch.tensor(step, dtype=torch.float32) / self.warmup
        return (rate - rate * left).item() if step < self.warmup else self.learning_rate

    def check(self, tree, key, step=None):
        for name, value in tree.items():
            expected = self.get(f"{key}.{name}") if step is None else self.get(f"{key}.{name}")[step]
            atol = self.share * expected.abs().max().item()
            assert_close(value.double(), expected, rtol=self.rtol, atol=atol)


@pytest.mark.parametrize("case", CASES)
@both
def test_golden(golden, case, dtype):
    run = Run(golden("11_optim"), case, dtype)
    params, state = run.params, laprop_init(run.params)
    for step, grads in enumerate(run.grads):
        run.check(adaptive_clip(params, grads), "out.agc", step)
        rate = run.author_rate(step)
        after, state = laprop_update(params, grads, state, learning_rate=rate, warmup=0, **run.knobs)
        if dtype == torch.float64:
            run.check({name: after[name] - params[name] for name in params}, "out.update", step)
        run.check(after, "out.param", step)
        params = after
    run.check(state.square, "out.nu")
    run.check(state.momentum, "out.mu")
    assert state.step == run.get("out.step")[0]


@pytest.mark.parametrize("case", CASES)
def test_golden_warmup(golden, case):
    # The exact ramp: the author's updates are off by what his float32 ramp is off, and by nothing else.
    run = Run(golden("11_optim"), case, torch.float64)
    params, state = run.params, laprop_init(run.params)
    for step, grads in enumerate(run.grads):
        ramp = linear_warmup(state.step, steps=run.warmup).item()
        assert ramp * run.learning_rate == pytest.approx(run.author_rate(step), rel=3e-5)
        after, state = laprop_update(
            params, grads, state, learning_rate=run.learning_rate, warmup=run.warmup, **run.knobs
        )
        exact = min(1.0, step / run.warmup) * run.learning_rate
        off = run.author_rate(step) / exact if exact else 1.0
        run.check({name: (after[name] - params[name]) * off for name in params}, "out.update", step)
        params = {name: params[name] + (after[name] - params[name]) * off for name in params}


@pytest.mark.parametrize("case", ["wd"])
def test_golden_in_every_variant(variant, golden, case):
    run = Run(golden("11_optim"), case, torch.float64)
    update = variant(partial(laprop_update, warmup=0, **run.knobs, learning_rate=run.learning_rate))
    params, state = run.params, laprop_init(run.params)
    first = next(step for step in range(STEPS) if run.author_rate(step) == run.learning_rate)
    for step, grads in enumerate(run.grads[: first + 2]):
        if step < first:
            rate = run.author_rate(step)
            params, state = laprop_update(params, grads, state, learning_rate=rate, warmup=0, **run.knobs)
        else:
            params, state = update(params, grads, state)
            run.check(params, "out.param", step)


# The formula


def tree(dtype=torch.float32, scale=1.0):
    return {
        "weight": torch.randn(3, 2, dtype=dtype) * scale,
        "head": {"bias": torch.randn(4, dtype=dtype) * scale, "scale": torch.randn((), dtype=dtype) * scale},
        "empty": torch.zeros(0, dtype=dtype),
    }


def warm(dtype=torch.float32, steps=2):
    """Parameters and a state that has seen gradients."""
    params = tree(dtype)
    state = laprop_init(params)
    for _ in range(steps):
        params, state = laprop_update(params, tree(dtype), state, warmup=0, learning_rate=0.1)
    return params, state


def oracle(p, g, step, square, momentum, k):
    """The formula for one tensor, as lists of Python numbers; `step` counts this one."""
    norm = [math.sqrt(sum(x * x for x in xs)) for xs in (p, g)]
    g = [x / max(1.0, norm[1] / (k["clip"] * max(k["floor"], norm[0]))) for x in g]
    square = [k["beta2"] * v + (1 - k["beta2"]) * x * x for v, x in zip(square, g, strict=True)]
    u = [x / (math.sqrt(v / (1 - k["beta2"] ** step)) + k["eps"]) for x, v in zip(g, square, strict=True)]
    momentum = [k["beta1"] * m + (1 - k["beta1"]) * x for m, x in zip(momentum, u, strict=True)]
    ahead = momentum
    if k["nesterov"]:
        ahead = [k["beta1"] * m + (1 - k["beta1"]) * x for m, x in zip(momentum, u, strict=True)]
    rate = k["learning_rate"] * (min(1.0, (step - 1) / k["warmup"]) if k["warmup"] else 1.0)
    new = [x - rate * (m / (1 - k["beta1"] ** step) + k["weight_decay"] * x) for x, m in zip(p, ahead, strict=True)]
    return new, square, momentum


KNOBS = {"learning_rate": 0.1, "clip": 0.2, "floor": 0.01, "beta1": 0.8, "beta2": 0.95, "eps": 1e-3, "warmup": 4}


@pytest.mark.parametrize(("nesterov", "weight_decay"), [(False, 0.0), (True, 0.3)])
@both
def test_update_is_the_formula(variant, dtype, nesterov, weight_decay):
    knobs = {**KNOBS, "nesterov": nesterov, "weight_decay": weight_decay}
    params = {"weight": torch.randn(3, 2, dtype=dtype), "scale": torch.randn((), dtype=dtype)}
    update, state = variant(partial(laprop_update, **knobs)), laprop_init(params)
    expected = {name: (p.flatten().tolist(), [0.0] * p.numel(), [0.0] * p.numel()) for name, p in params.items()}
    for step in range(1, 4):
        grads = {name: torch.randn_like(p) for name, p in params.items()}
        params, state = update(params, grads, state)
        assert state.step == step
        for name in params:
            old, square, momentum = expected[name]
            expected[name] = oracle(old, grads[name].flatten().tolist(), step, square, momentum, knobs)
            for got, wanted in zip((params, state.square, state.momentum), expected[name], strict=True):
                wanted = torch.tensor(wanted, dtype=dtype).reshape(params[name].shape)
                assert_close(got[name], wanted, rtol=TOLERANCE[dtype][0], atol=TOLERANCE[dtype][0])


@given(
    learning_rate=st.floats(1e-6, 1.0),
    clip=st.floats(0, 2),
    floor=st.floats(1e-6, 1),
    beta1=st.floats(0, 0.99),
    beta2=st.floats(0, 0.9999),
    eps=st.floats(1e-20, 1),
    warmup=st.integers(0, 5),
    nesterov=st.booleans(),
    weight_decay=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_any_knobs(seed, **knobs):
    torch.manual_seed(seed)
    params, state = warm(torch.float64)
    grads = tree(torch.float64)
    after, new = laprop_update(params, grads, state, **knobs)
    p, g, old = params["head"]["bias"], grads["head"]["bias"], (state.square["head"], state.momentum["head"])
    flat = [x["bias"].tolist() for x in old]
    limit = {**knobs, "clip": knobs["clip"] or math.inf}
    expected = oracle(p.tolist(), g.tolist(), 3, *flat, limit)
    got = (after["head"]["bias"], new.square["head"]["bias"], new.momentum["head"]["bias"])
    for x, y in zip(got, expected, strict=True):
        assert_close(x, torch.tensor(y, dtype=torch.float64), rtol=1e-9, atol=1e-12)
    # No entry moves further than the learning rate allows: momentum is of normalised gradients.
    if not knobs["weight_decay"] and not knobs["nesterov"]:
        most = knobs["learning_rate"] / math.sqrt(1 - knobs["beta2"]) * 1.01
        assert (after["weight"] - params["weight"]).abs().max() <= most


@given(st.floats(0.01, 10), st.floats(1e-3, 100), st.integers(0, 99))
def test_clipped_gradients_keep_their_direction(clip, scale, seed):
    torch.manual_seed(seed)
    params, grads = tree(torch.float64), tree(torch.float64, scale)
    clipped = adaptive_clip(params, grads, clip=clip)
    for p, g, c in zip(*(torch.utils._pytree.tree_leaves(t) for t in (params, grads, clipped)), strict=True):
        limit = clip * max(1e-3, p.norm())
        assert c.norm() <= limit * (1 + 1e-9) or torch.equal(c, g)
        assert_close(c * g.norm(), g * c.norm())
        assert torch.equal(c, g) == (g.norm() <= limit) or g.norm() == pytest.approx(limit)


def test_clip_of_0_does_not_clip():
    params, grads = tree(), tree(scale=1e3)
    assert_close(adaptive_clip(params, grads, clip=0), grads, rtol=0, atol=0)


# Edges


def one(parameter, gradient, **knobs):
    params = {"x": torch.tensor(parameter)}
    new, state = laprop_update(params, {"x": torch.tensor(gradient)}, laprop_init(params), **{"warmup": 0, **knobs})
    return new["x"], state


def test_a_zero_parameter_can_move():
    clipped = adaptive_clip({"x": torch.zeros(2)}, {"x": torch.tensor([3.0, 4.0])})["x"]
    assert clipped.norm().item() == pytest.approx(3e-4, rel=1e-6)


def test_a_clip_of_0_leaves_nothing(variant):
    params, grads = {"x": torch.ones(2), "y": torch.ones(2)}, {"x": torch.zeros(2), "y": torch.tensor([3.0, 4.0])}
    clipped = variant(lambda *args: adaptive_clip(*args[:2], clip=args[2]))(params, grads, torch.tensor(0.0))
    assert_close(clipped, {"x": torch.zeros(2), "y": torch.zeros(2)}, rtol=0, atol=0)


def test_no_gradient_moves_nothing(variant):
    params = {"x": torch.tensor([1.0, 0.0])}
    state = laprop_init(params)
    new, state = variant(partial(laprop_update, warmup=0))(params, {"x": torch.zeros(2)}, state)
    assert torch.equal(new["x"], params["x"])
    assert not state.momentum["x"].any()


def test_a_gradient_too_small_to_be_squared_is_divided_by_eps():
    _, state = one([0.0], [1e-25], beta1=0.0)
    assert_close(state.momentum["x"], torch.tensor([1e-5]), rtol=1e-5, atol=0.0)


def test_a_gradient_that_is_not_finite_spoils_its_own_parameter_only(variant):
    update, (params, state) = variant(laprop_update), warm()
    for bad in (math.nan, math.inf):
        grads = tree()
        grads["weight"][1, 0] = bad
        new, after = update(params, grads, state)
        assert new["weight"].isnan().any()
        # The norm is that of the whole tensor; one that is infinite makes the other entries 0.
        assert new["weight"].isnan().all() == math.isnan(bad)
        assert new["head"]["bias"].isfinite().all()
        assert after.momentum["head"]["scale"].isfinite()


@pytest.mark.parametrize(("step", "rate"), [(0, 0.0), (1, 4e-8), (999, 3.996e-5), (1000, 4e-5), (10**9, 4e-5)])
def test_learning_rate_of_the_warmup(variant, step, rate):
    assert (4e-5 * variant(linear_warmup)(torch.tensor(step))).item() == pytest.approx(rate, rel=1e-6)


def test_warmup_of_other_kinds():
    assert linear_warmup(torch.tensor([0, 3]), steps=0).tolist() == [1.0, 1.0]
    assert linear_warmup(torch.tensor([0, 3, 9]), steps=6).tolist() == [0.0, 0.5, 1.0]
    assert linear_warmup(torch.tensor(1.0, dtype=torch.float64), steps=3).item() == 1 / 3


def test_the_first_update_of_a_warmup_changes_no_parameter():
    params = tree()
    after, state = laprop_update(params, tree(), laprop_init(params))
    assert_close(after, params, rtol=0, atol=0)
    assert state.step == 1
    assert state.momentum["weight"].any()


def test_corrections_of_the_first_updates_are_exact_in_float32():
    # 1 - 0.999 in float32 would be off by 5e-5.
    new, _ = one([1.0], [1e-3], learning_rate=0.5)
    assert_close(new, torch.tensor([0.5]), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_parameters_have_wide_averages(dtype):
    params, grads = tree(dtype), tree(dtype)
    new, state = laprop_update(params, grads, laprop_init(params), warmup=0, learning_rate=0.1)
    wide = [tree_map(torch.Tensor.float, x) for x in (params, grads)]
    expected, wide_state = laprop_update(*wide, laprop_init(wide[0]), warmup=0, learning_rate=0.1)
    assert_close(new, tree_map(lambda x: x.to(dtype), expected), rtol=0, atol=0)
    assert_close(state, wide_state, rtol=0, atol=0)
    assert state.square["weight"].dtype == torch.float32
    slow = ema_update(params, grads, rate=0.5)
    assert slow["weight"].dtype == dtype
    assert_close(slow["weight"].float(), (wide[0]["weight"] + wide[1]["weight"]) / 2, rtol=1e-2, atol=1e-3)


def test_dtypes_may_differ_between_parameters():
    params = {"a": torch.randn(3), "b": torch.randn(2, dtype=torch.float64), "c": torch.randn(2, dtype=torch.bfloat16)}
    grads = tree_map(torch.randn_like, params)
    new, state = laprop_update(params, grads, laprop_init(params), warmup=0, weight_decay=0.1)
    for name in params:
        alone, _ = laprop_update(params[name], grads[name], laprop_init(params[name]), warmup=0, weight_decay=0.1)
        assert_close(new[name], alone)
    assert state.square["b"].dtype == torch.float64


# Pytrees


@pytest.mark.parametrize("form", [TensorDict, dict, lambda x: [x["weight"], (x["head"],)], lambda x: x["weight"]])
def test_any_pytree(form):
    params, state = warm()
    grads = tree()
    for x in (params, grads, state.square, state.momentum):
        del x["empty"]
    expected, expected_state = laprop_update(params, grads, state)
    formed = LaPropState(state.step, form(state.square), form(state.momentum))
    new, new_state = laprop_update(form(params), form(grads), formed)
    assert type(new) is type(form(params))
    leaves = torch.utils._pytree.tree_leaves
    assert_close(leaves(new), leaves(form(expected)))
    assert_close(leaves(new_state.momentum), leaves(form(expected_state.momentum)))
    assert_close(leaves(laprop_init(form(params)).square), leaves(tree_map(torch.zeros_like, form(params))))
    assert_close(leaves(ema_update(form(params), form(grads))), leaves(form(ema_update(params, grads))))


@pytest.mark.parametrize("compiled", [False, True])
def test_an_ensemble_in_a_tensordict(compiled):
    members = [TensorDict({"weight": torch.randn(2), "head": {"bias": torch.randn(())}}) for _ in range(3)]

    def updates(params):
        return vmap(lambda p: laprop_update(p, p, laprop_init(p), warmup=0, learning_rate=0.1))(params)

    update = torch.compile(updates, fullgraph=True, backend="aot_eager") if compiled else updates
    new, state = update(torch.stack(members))
    for i, p in enumerate(members):
        alone, alone_state = laprop_update(p, p, laprop_init(p), warmup=0, learning_rate=0.1)
        assert_close(new[i]["weight"], alone["weight"])
        assert_close(state.square[i]["head", "bias"], alone_state.square["head", "bias"])


def test_the_order_of_keys_does_not_matter():
    params, state = warm()
    grads = tree()
    shuffled = {name: grads[name] for name in reversed(grads)}
    assert_close(laprop_update(params, shuffled, state), laprop_update(params, grads, state), rtol=0, atol=0)


def test_weight_decay_of_some():
    params, state = warm()
    grads, half = tree(), torch.tensor(0.5)
    everywhere = laprop_update(params, grads, state, weight_decay=0.5, warmup=0)[0]
    nowhere = laprop_update(params, grads, state, warmup=0)[0]
    some = {"weight": 0.5, "head": {"bias": 0.0, "scale": half}, "empty": 0}
    mixed = laprop_update(params, grads, state, weight_decay=some, warmup=0)[0]
    assert torch.equal(mixed["weight"], everywhere["weight"])
    assert torch.equal(mixed["head"]["scale"], everywhere["head"]["scale"])
    assert torch.equal(mixed["head"]["bias"], nowhere["head"]["bias"])
    assert_close(laprop_update(params, grads, state, weight_decay=half, warmup=0)[0], everywhere, rtol=0, atol=0)


# The two ways through


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"nesterov": True, "warmup": 3},
        {"clip": 0.0, "weight_decay": 0.1},
        {"weight_decay": {"weight": 0.1, "head": {"bias": 0.0, "scale": 0.2}, "empty": 0.0}},
        {"weight_decay": {"weight": 0.1, "head": {"bias": 0.0, "scale": torch.tensor(0.2)}, "empty": 0.0}},
        {"learning_rate": torch.tensor(0.1), "beta1": torch.tensor(0.5), "beta2": torch.tensor(0.9)},
        {"clip": torch.tensor(0.1), "floor": torch.tensor(0.1), "eps": torch.tensor(1e-3), "beta1": 0.0, "beta2": 0.0},
    ],
)
@both
def test_together_equals_one_by_one(monkeypatch, dtype, knobs):
    params, state = warm(dtype)
    grads = tree(dtype)
    used = []
    operation = optim._together
    monkeypatch.setattr(optim, "_together", lambda *args: used.append(args[0]) or operation(*args))
    together = laprop_update(params, grads, state, **knobs)
    slow = ema_update(params, grads)
    assert {"sqrt", "mul", "div"} <= set(used)
    monkeypatch.setattr(optim, "_fastest", lambda *args: optim._one_by_one)
    rtol = 1e-12 if dtype == torch.float64 else 1e-6
    assert_close(laprop_update(params, grads, state, **knobs), together, rtol=rtol, atol=rtol / 10)
    assert_close(ema_update(params, grads), slow, rtol=rtol, atol=rtol / 10)


def test_one_by_one_where_together_does_not_work(monkeypatch):
    monkeypatch.setattr(optim, "_together", None)
    params, state = warm_of_one()
    grads, rate = {"x": torch.randn(3)}, torch.tensor(0.1)

    def update(params, rate):
        return laprop_update(params, grads, state, learning_rate=rate, warmup=0)[0]["x"]

    grad(lambda p: update(p, rate).sum())(params)
    vmap(partial(update, params))(torch.rand(2))
    jvp(partial(update, params), (rate,), (rate,))
    update(params, rate.clone().requires_grad_()).sum().backward()
    with torch.autograd.forward_ad.dual_level():
        update({"x": torch.autograd.forward_ad.make_dual(params["x"], grads["x"])}, rate)
    with pytest.raises(TypeError, match="NoneType"):
        update(params, rate)
    with torch.no_grad(), pytest.raises(TypeError, match="NoneType"):
        update(params, rate.clone().requires_grad_())


def warm_of_one():
    params = {"x": torch.randn(3)}
    return params, LaPropState(torch.tensor(2), {"x": torch.rand(3)}, {"x": torch.randn(3)})


# Transforms


def test_an_ensemble(variant):
    members = [warm() for _ in range(3)]
    grads = [tree() for _ in range(3)]
    expected = [laprop_update(*member[:1], g, member[1]) for member, g in zip(members, grads, strict=True)]
    stack = partial(tree_map, lambda *xs: torch.stack(xs))
    params, state = stack(*(m[0] for m in members)), stack(*(m[1] for m in members))
    batched = variant(lambda *args: vmap(laprop_update)(*args))(params, stack(*grads), state)
    assert_close(batched, stack(*expected))
    # The clipping is each member's own, and so can be the knobs.
    rates = torch.tensor([0.0, 0.1, 1.0])
    swept = vmap(lambda rate: laprop_update(*members[0][:1], grads[0], members[0][1], learning_rate=rate, warmup=0))
    for i, rate in enumerate(rates.tolist()):
        alone = laprop_update(members[0][0], grads[0], members[0][1], learning_rate=rate, warmup=0)
        assert_close(tree_map(lambda x, i=i: x[i], swept(rates)), alone)
    begun = vmap(laprop_init)(params)
    assert_close(begun, stack(*(laprop_init(m[0]) for m in members)))


TUNED = {"learning_rate": 0.1, "clip": 0.3, "floor": 0.5, "beta1": 0.8, "beta2": 0.9, "eps": 1e-2, "weight_decay": 0.2}


@pytest.mark.parametrize("nesterov", [False, True])
def test_meta_gradients_are_those_of_finite_differences(nesterov):
    params, state = warm(torch.float64)
    features, targets = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    weight, (_, square, momentum) = params["weight"], state
    square, momentum = square["weight"], momentum["weight"]

    def loss(weight, scale=1.0):
        return (scale * features @ weight - targets).square().mean()

    def after(weight, square, momentum, scale, *knobs):
        gradient = grad(loss)(weight, scale)
        old = LaPropState(state.step, square, momentum)
        named = dict(zip(TUNED, knobs, strict=True))
        new, _ = laprop_update(weight, gradient, old, warmup=10, nesterov=nesterov, **named)
        return loss(new, scale)

    knobs = [torch.tensor(k, dtype=torch.float64) for k in TUNED.values()]
    inputs = (weight, square, momentum, torch.tensor(1.5, dtype=torch.float64), *knobs)
    slopes = grad(after, tuple(range(len(inputs))))(*inputs)
    for i, slope in enumerate(slopes):
        direction = torch.ones_like(inputs[i])
        low, high = (after(*inputs[:i], inputs[i] + e * direction, *inputs[i + 1 :]) for e in (-1e-6, 1e-6))
        assert_close(slope.sum(), (high - low) / 2e-6, rtol=1e-5, atol=1e-7)
        moved = jvp(lambda x, i=i: after(*inputs[:i], x, *inputs[i + 1 :]), (inputs[i],), (direction,))[1]
        assert_close(moved, slope.sum(), rtol=1e-7, atol=1e-10)
    inputs = [x.requires_grad_() for x in inputs[3:]]
    assert torch.autograd.gradgradcheck(lambda *k: after(weight, square, momentum, *k), inputs, atol=1e-4)


def test_meta_gradients_where_a_gradient_is_zero(variant):
    # A dead unit: its weights get no gradient, now or before, and the root of its squares is that of 0.
    weight, dead = torch.randn(3, 2), torch.tensor([1.0, 0.0])

    def after(weight, scale):
        gradient = grad(lambda w: (scale * w * dead).square().sum())(weight)
        new, _ = laprop_update(weight, gradient, laprop_init(weight), warmup=0, learning_rate=0.1)
        return new.square().sum() + adaptive_clip(weight[:, 1], gradient[:, 1]).sum()

    slopes = variant(grad(after, (0, 1)))(weight, torch.tensor(2.0))
    assert all(slope.isfinite().all() for slope in slopes)
    assert jvp(partial(after, weight), (torch.tensor(2.0),), (torch.tensor(1.0),))[1].isfinite()
    assert grad(grad(partial(after, weight)))(torch.tensor(2.0)).isfinite()


@pytest.mark.parametrize(("kind", "warmup"), [(torch.tensor, 1), (float, 2)])
def test_knobs_that_change_recompile_never_as_tensors_and_once_as_numbers(kind, warmup):
    params, state = warm_of_one()
    torch.compiler.reset()
    compiled = torch.compile(laprop_update, fullgraph=True, backend="aot_eager")
    for step, value in enumerate((1e-3, 0.2, 0.3, 0.4)):
        knobs = {name: kind(value * (1 + i / 10)) for i, name in enumerate(TUNED)}
        with torch._dynamo.config.patch(error_on_recompile=step >= warmup):
            got = compiled(params, params, state, **knobs)
        assert_close(got, laprop_update(params, params, state, **knobs), rtol=1e-5, atol=1e-6)


def test_second_call_does_not_recompile():
    torch.compiler.reset()
    compiled = torch.compile(laprop_update, fullgraph=True, backend="aot_eager")
    params = tree()
    state = laprop_init(params)
    for step in range(4):
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            params, state = compiled(params, tree(), state)
    assert state.step == 4


def test_pure():
    params, state = warm()
    arguments = (params, tree(), state)
    before, generator = tree_map(torch.clone, arguments), torch.get_rng_state()
    first, second = (laprop_update(*arguments, warmup=0) for _ in range(2))
    assert_close(first, second, rtol=0, atol=0)
    ema_update(*arguments[:2])
    adaptive_clip(*arguments[:2])
    assert_close(before, arguments, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), generator)
    begun = laprop_init(params)
    assert begun.square["weight"] is not begun.momentum["weight"]


def test_reads_no_value():
    params = tree_map(lambda x: x.to("meta"), tree())
    new, state = laprop_update(params, params, laprop_init(params))
    assert new["weight"].device.type == state.step.device.type == "meta"


# The slow copy


@both
def test_ema_is_the_formula(variant, dtype):
    slow, params = tree(dtype), tree(dtype)
    moved = variant(partial(ema_update, rate=0.3))(slow, params)
    assert_close(moved, tree_map(lambda s, p: 0.7 * s + 0.3 * p, slow, params))
    assert_close(ema_update(slow, params, rate=torch.tensor(1.0)), params, rtol=0, atol=0)
    assert_close(ema_update(slow, params, rate=0), slow, rtol=0, atol=0)


def test_ema_forgets_geometrically():
    slow = {"x": torch.zeros(2, dtype=torch.float64)}
    for _ in range(50):
        slow = ema_update(slow, {"x": torch.ones(2, dtype=torch.float64)})
    assert_close(slow["x"], torch.full((2,), 1 - 0.98**50, dtype=torch.float64))


def test_ema_derivatives():
    inputs = [torch.randn(2, dtype=torch.float64) for _ in range(2)] + [torch.tensor(0.3, dtype=torch.float64)]
    inputs = [x.requires_grad_() for x in inputs]
    moved = lambda slow, params, rate: ema_update(slow, params, rate=rate)  # noqa: E731
    assert torch.autograd.gradcheck(moved, inputs, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(moved, inputs)


# Errors

P, G = {"a": torch.ones(2), "b": {"c": torch.ones(())}}, {"a": torch.ones(2), "b": {"c": torch.ones(())}}
STATE = laprop_init(P)
INT = {"a": torch.ones(2), "b": {"c": torch.tensor(1)}}
ERRORS = [
    (lambda: laprop_init({}), ValueError, "^laprop_init: params must be a pytree of at least one tensor, got dict"),
    (
        lambda: laprop_init(INT),
        TypeError,
        r"^laprop_init: params\['b'\]\['c'\] must be a floating-point tensor, got int64 \[\]",
    ),
    (lambda: laprop_init({"a": None}), TypeError, r"^laprop_init: params\['a'\] must be a tensor, got NoneType"),
    (
        lambda: laprop_update(P, {"a": torch.ones(2)}, STATE),
        ValueError,
        r"^laprop_update: grads must be of the structure of params, got dict with missing \[\"\['b'\]\['c'\]\"\]",
    ),
    (
        lambda: laprop_update(P, [torch.ones(2), torch.ones(())], STATE),
        ValueError,
        "^laprop_update: grads must be of the structure of params, got list with missing",
    ),
    (
        lambda: laprop_update(P, TensorDict(P), STATE),
        ValueError,
        "^laprop_update: grads must be of the structure of params, got TensorDict with another type or order of keys",
    ),
    (
        lambda: laprop_update(P, {"a": torch.ones(3), "b": G["b"]}, STATE),
        ValueError,
        r"^laprop_update: grads\['a'\] must be of shape \[2\] like params\['a'\], got float32 \[3\]",
    ),
    (lambda: laprop_update(P, INT, STATE), TypeError, r"^laprop_update: grads\['b'\]\['c'\] must be a floating-point"),
    (lambda: laprop_update(P, STATE, G), TypeError, "^laprop_update: state must be a LaPropState, got dict"),
    (
        lambda: laprop_update(P, G, laprop_init({"a": torch.ones(2)})),
        ValueError,
        r"^laprop_update: state\.square must be of the structure of params",
    ),
    (
        lambda: laprop_update(P, G, STATE._replace(momentum={"a": torch.ones(2), "b": {"c": torch.ones(1)}})),
        ValueError,
        r"^laprop_update: state\.momentum\['b'\]\['c'\] must be of shape \[\] like params\['b'\]\['c'\]",
    ),
    (lambda: laprop_update(P, G, STATE, learning_rate=-1), ValueError, "learning_rate must be at least 0, got -1"),
    (
        lambda: laprop_update(P, G, STATE, learning_rate=torch.ones(2)),
        ValueError,
        r"learning_rate must be a number or a 0-d tensor, got float32 \[2\]",
    ),
    (lambda: laprop_update(P, G, STATE, beta1=1.0), ValueError, "^laprop_update: beta1 must be less than 1, got 1.0"),
    (
        lambda: laprop_update(P, G, STATE, beta2=-0.1),
        ValueError,
        r"^laprop_update: beta2 must be in \[0, 1\], got -0.1",
    ),
    (
        lambda: laprop_update(P, G, STATE, eps=0.0),
        ValueError,
        "^laprop_update: eps must be at least 1.17549e-38, got 0.0",
    ),
    (lambda: laprop_update(P, G, STATE, clip=-0.3), ValueError, "^laprop_update: clip must be at least 0, got -0.3"),
    (lambda: laprop_update(P, G, STATE, floor=0.0), ValueError, "^laprop_update: floor must be at least 1.17549e-38"),
    (lambda: laprop_update(P, G, STATE, warmup=-1), ValueError, "^laprop_update: warmup must be at least 0, got -1"),
    (
        lambda: laprop_update(P, G, STATE, warmup=1e3),
        TypeError,
        "^laprop_update: warmup must be an int, got float 1000.0",
    ),
    (
        lambda: laprop_update(P, G, STATE, nesterov=1),
        TypeError,
        "^laprop_update: nesterov must be True or False, got int 1",
    ),
    (lambda: laprop_update(P, G, STATE, weight_decay=-1.0), ValueError, "weight_decay must be at least 0, got -1.0"),
    (
        lambda: laprop_update(P, G, STATE, weight_decay={"a": 0.1}),
        ValueError,
        "^laprop_update: weight_decay must be of the structure of params, got dict with missing",
    ),
    (
        lambda: laprop_update(P, G, STATE, weight_decay={"a": -1.0, "b": {"c": 0.0}}),
        ValueError,
        r"^laprop_update: weight_decay\['a'\] must be at least 0, got -1.0",
    ),
    (lambda: adaptive_clip(P, {"a": torch.ones(2)}), ValueError, "^adaptive_clip: grads must be of the structure of"),
    (lambda: adaptive_clip(P, G, clip="0.3"), TypeError, "^adaptive_clip: clip must be a number or a 0-d tensor"),
    (lambda: adaptive_clip(INT, G), TypeError, r"^adaptive_clip: params\['b'\]\['c'\] must be a floating-point tensor"),
    (lambda: linear_warmup(3), TypeError, "^linear_warmup: step must be a tensor, got int 3"),
    (lambda: linear_warmup(torch.tensor(3), steps=-1), ValueError, "^linear_warmup: steps must be at least 0, got -1"),
    (lambda: linear_warmup(torch.tensor(3), steps=True), TypeError, "^linear_warmup: steps must be an int, got bool"),
    (lambda: ema_update(P, G, rate=1.5), ValueError, r"^ema_update: rate must be in \[0, 1\], got 1.5"),
    (lambda: ema_update(P, {"a": G["a"]}), ValueError, "^ema_update: params must be of the structure of slow_params"),
    (
        lambda: ema_update(P, {"a": torch.ones(1), "b": G["b"]}),
        ValueError,
        r"^ema_update: params\['a'\] must be of shape \[2\] like slow_params\['a'\], got float32 \[1\]",
    ),
    (lambda: ema_update(INT, G), TypeError, r"^ema_update: slow_params\['b'\]\['c'\] must be a floating-point tensor"),
]


@pytest.mark.parametrize(("call", "error", "text"), ERRORS, ids=range(len(ERRORS)))
def test_errors(call, error, text):
    with pytest.raises(error, match=text):
        call()
