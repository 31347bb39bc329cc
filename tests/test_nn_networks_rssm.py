"""The RSSM against the author's own numbers, and what it promises beyond them."""

import copy
import pickle
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import functional_call, stack_module_state
from torch.nn.functional import one_hot

from rlloss.categorical import categorical_kl_terms
from rlloss_nn.networks import RSSM, RSSMState

# Names of the reference's layers: the linear layer and its norm here.
LAYERS = {
    "dynin0": ("deter_in.linears.0", "deter_in.norms.0"),
    "dynin1": ("stoch_in.linears.0", "stoch_in.norms.0"),
    "dynin2": ("action_in.linears.0", "action_in.norms.0"),
    "dynhid0": ("core_layers.0", "core_norms.0"),
    "dyngru": ("core_gates", None),
    "obs0": ("posterior_in", "posterior_norm"),
    "obslogit": ("posterior_logits", None),
    "prior0": ("prior_mlp.linears.0", "prior_mlp.norms.0"),
    "prior1": ("prior_mlp.linears.1", "prior_mlp.norms.1"),
    "priorlogit": ("prior_logits", None),
}
OBJECTIVES = {"dyn": (1.0, 0.0, 0.0), "rep": (0.0, 1.0, 0.0), "total": (1.0, 0.1, 1.0)}
FORCED = 1e9


def ours(reference, prefix):
    """Arrays `prefix + name` of the reference under the names and in the layout of the torch module."""
    params = {}
    for name, (layer, norm) in LAYERS.items():
        for key, mine in (("kernel", f"{layer}.weight"), ("bias", f"{layer}.bias"), (None, None)):
            if key and f"{prefix}dyn/{name}/{key}" in reference:
                x = reference[f"{prefix}dyn/{name}/{key}"]
                # A dense kernel is [in, out] there and [out, in] here; a block kernel is the same in both.
                params[mine] = x.T if key == "kernel" and x.ndim == 2 else x
        if norm and f"{prefix}dyn/{name}norm/scale" in reference:
            params[f"{norm}.scale"] = reference[f"{prefix}dyn/{name}norm/scale"]
    return params


def concatenated(discrete, continuous):
    """Actions as the reference concatenates them: keys in sorted order, integers one-hot."""
    return torch.cat([one_hot(discrete.long(), 5).to(continuous.dtype), continuous], -1)


@pytest.fixture(scope="module")
def case(golden):
    """Module, parameters and inputs of the golden case, in float64."""
    arrays = {k.removeprefix("c0."): v for k, v in golden("08_rssm").items()}
    rssm = RSSM(7, 10, deter=32, hidden=16, stoch=4, classes=4, blocks=4).double()
    params = ours(arrays, "param.")
    assert {k: v.shape for k, v in params.items()} == {k: v.shape for k, v in rssm.named_parameters()}
    inputs = {
        "tokens": arrays["in.tokens"],
        "action": concatenated(arrays["in.act.action"], arrays["in.act.cont"]),
        "noise": arrays["out.stoch"] * FORCED,
        "deter": arrays["in.carry.deter"],
        "stoch": arrays["in.carry.stoch"],
    }
    return rssm, params, inputs, arrays


def cast(tree, dtype):
    return {k: v.to(dtype) for k, v in tree.items()}


def observe(rssm, is_first, params, inputs):
    state = RSSMState(inputs["deter"], inputs["stoch"])
    return functional_call(rssm, params, (inputs["tokens"], inputs["action"], is_first, inputs["noise"], state))


def objective(rssm, arrays, weights, params, inputs):
    """The objective of the reference: weighted sums of dyn, rep and of given cotangents on deter and stoch."""
    dtype = inputs["tokens"].dtype
    outputs = observe(rssm, arrays["in.reset"], params, inputs)
    dynamics, representation = categorical_kl_terms(outputs.posterior_logits, outputs.prior_logits)
    features = (arrays["in.ct.deter"].to(dtype) * outputs.deter).sum()
    features = features + (arrays["in.ct.stoch"].to(dtype) * outputs.stoch).sum()
    return weights[0] * dynamics.sum() + weights[1] * representation.sum() + weights[2] * features


def assert_near(actual, expected, tolerance):
    """Relative to each value, or to a tenth of the largest where a value is small."""
    expected = expected.to(actual.dtype)
    atol = 0.1 * tolerance * expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=atol)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5)])
def test_golden_values(case, dtype, tolerance):
    rssm, params, inputs, arrays = case
    outputs = observe(rssm, arrays["in.reset"], cast(params, dtype), cast(inputs, dtype))
    assert outputs.deter.dtype == dtype
    assert_near(outputs.posterior_logits, arrays["out.post_logits"], tolerance)
    assert_near(outputs.prior_logits, arrays["out.prior_logits"], tolerance)
    assert_near(outputs.deter, arrays["out.deter"], tolerance)
    assert torch.equal(outputs.stoch, arrays["out.stoch"].to(dtype))
    assert_near(outputs.state.deter, arrays["out.carry.deter"], tolerance)
    assert torch.equal(outputs.state.stoch, outputs.stoch[:, -1])
    terms = categorical_kl_terms(outputs.posterior_logits, outputs.prior_logits)
    assert_near(terms[0], arrays["out.dyn"], tolerance)
    assert_near(terms[1], arrays["out.rep"], tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_golden_gradients(case, name, dtype):
    rssm, params, inputs, arrays = case
    function = partial(objective, rssm, arrays, OBJECTIVES[name])
    gradient = torch.func.grad_and_value(function, argnums=(0, 1))
    (params_grad, inputs_grad), value = gradient(cast(params, dtype), cast(inputs, dtype))
    assert_near(value, arrays[f"out.obj.{name}"], 1e-6 if dtype == torch.float64 else 1e-5)
    check_gradients(params_grad, inputs_grad, arrays, name)


def check_gradients(params_grad, inputs_grad, arrays, name):
    expected = ours(arrays, f"grad.{name}.param.")
    for key, value in params_grad.items():
        if key in expected:
            assert_near(value, expected[key], 1e-5)
        else:
            assert name == "rep"
            assert key.startswith("prior_")
            assert not value.any()
    assert_near(inputs_grad["tokens"], arrays[f"grad.{name}.tokens"], 1e-5)
    assert_near(inputs_grad["action"][..., 5:], arrays[f"grad.{name}.act.cont"], 1e-5)
    assert_near(inputs_grad["deter"], arrays[f"grad.{name}.carry.deter"], 1e-5)
    assert_near(inputs_grad["stoch"], arrays[f"grad.{name}.carry.stoch"], 1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5)])
def test_golden_imagination(case, dtype, tolerance):
    rssm, params, _, arrays = case
    rssm = RSSM(7, 10, deter=32, hidden=16, stoch=4, classes=4, blocks=4).to(dtype)
    rssm.load_state_dict(cast(params, dtype))
    start = RSSMState(arrays["out.img.start_deter"], arrays["out.stoch"].flatten(0, 1))
    action = concatenated(arrays["in.img.action"], arrays["in.img.cont"])
    outputs = rssm.imagine(start, action, arrays["out.img.stoch"] * FORCED)
    assert_near(outputs.deter, arrays["out.img.deter"], tolerance)
    assert_near(outputs.prior_logits, arrays["out.img.logits"], tolerance)
    assert torch.equal(outputs.stoch, arrays["out.img.stoch"].to(dtype))
    assert torch.equal(outputs.state.deter, outputs.deter[:, -1])
    assert torch.equal(outputs.state.stoch, outputs.stoch[:, -1])


SIZES = {"deter": 16, "hidden": 8, "stoch": 3, "classes": 4, "blocks": 4}


def small(**knobs):
    return RSSM(2, 5, **{**SIZES, **knobs}).double()


def sequences(batch=3, steps=4):
    """Tokens, action, is_first and noise."""
    is_first = torch.zeros(batch, steps, dtype=torch.bool)
    noise = -torch.log(-torch.log(torch.rand(batch, steps, 3, 4).double()))
    return torch.randn(batch, steps, 5).double(), torch.randn(batch, steps, 2).double(), is_first, noise


def random_state(batch=3):
    stoch = one_hot(torch.randint(4, (batch, 3)), 4).double()
    return RSSMState(torch.randn(batch, 16).double(), stoch)


def test_values_and_gradients_in_every_variant(variant):
    rssm, inputs, state = small(), sequences(steps=2), random_state()
    inputs[2][1, 1] = True

    def loss(params, deter, stoch, *inputs):
        outputs = functional_call(rssm, params, (*inputs, RSSMState(deter, stoch)))
        terms = categorical_kl_terms(outputs.posterior_logits, outputs.prior_logits, free_nats=0.0)
        return terms[0].sum() + terms[1].sum() + outputs.deter.square().sum(), outputs

    function = torch.func.grad(loss, argnums=(0, 1), has_aux=True)
    arguments = ({k: v.detach() for k, v in rssm.named_parameters()}, *state, *inputs)
    torch.testing.assert_close(variant(function)(*arguments), function(*arguments))


def test_steps_equal_the_loop():
    rssm, (tokens, action, is_first, noise) = small(obs_layers=2, dyn_layers=2), sequences()
    is_first[1, 2] = True
    outputs = rssm.observe(tokens, action, is_first, noise)
    state = rssm.initial(3)
    for t in range(4):
        state, logits = rssm.observe_step(state, tokens[:, t], action[:, t], is_first[:, t], noise[:, t])
        torch.testing.assert_close(logits, outputs.posterior_logits[:, t])
        torch.testing.assert_close(state.deter, outputs.deter[:, t])
        assert torch.equal(state.stoch, outputs.stoch[:, t])
        torch.testing.assert_close(rssm.prior(state.deter), outputs.prior_logits[:, t])
    torch.testing.assert_close(state.deter, outputs.state.deter)

    start, imagined = state, rssm.imagine(state, action, noise)
    torch.testing.assert_close(rssm.core(start, action[:, 0]), imagined.deter[:, 0])
    for t in range(4):
        state, logits = rssm.imagine_step(state, action[:, t], noise[:, t])
        torch.testing.assert_close(logits, imagined.prior_logits[:, t])
        torch.testing.assert_close(state.deter, imagined.deter[:, t])
        assert torch.equal(state.stoch, imagined.stoch[:, t])


def test_the_last_state_continues_a_sequence():
    rssm, (tokens, action, is_first, noise) = small(), sequences()
    whole = rssm.observe(tokens, action, is_first, noise)
    head = rssm.observe(tokens[:, :2], action[:, :2], is_first[:, :2], noise[:, :2])
    tail = rssm.observe(tokens[:, 2:], action[:, 2:], is_first[:, 2:], noise[:, 2:], head.state)
    torch.testing.assert_close(torch.cat([head.deter, tail.deter], 1), whole.deter)


def test_is_first_begins_afresh():
    rssm, (tokens, action, is_first, noise) = small(), sequences()
    is_first[:, 2] = True
    whole = rssm.observe(tokens, action, is_first, noise, random_state())
    action = action.clone()
    action[:, 2] = 0
    fresh = rssm.observe(tokens[:, 2:], action[:, 2:], torch.zeros(3, 2, dtype=torch.bool), noise[:, 2:])
    torch.testing.assert_close(whole.posterior_logits[:, 2:], fresh.posterior_logits)
    torch.testing.assert_close(whole.deter[:, 2:], fresh.deter)


@pytest.mark.parametrize("stale", [float("nan"), float("inf")])
def test_what_is_first_hides_reaches_neither_value_nor_gradient(stale):
    rssm, (tokens, action, is_first, noise) = small(), sequences()
    is_first[0, 0] = is_first[1, 2] = True
    state = random_state()
    clean = rssm.observe(tokens, action, is_first, noise, state)
    state.deter[0], state.stoch[0], action[0, 0], action[1, 2] = stale, stale, stale, stale

    def loss(params, tokens, action, deter, stoch):
        outputs = functional_call(rssm, params, (tokens, action, is_first, noise, RSSMState(deter, stoch)))
        terms = categorical_kl_terms(outputs.posterior_logits, outputs.prior_logits, free_nats=0.0)
        return terms[0].sum() + terms[1].sum() + outputs.stoch.square().sum(), outputs.deter

    params = {k: v.detach() for k, v in rssm.named_parameters()}
    gradient = torch.func.grad(loss, argnums=(0, 1, 2, 3, 4), has_aux=True)
    grads, deter = gradient(params, tokens, action, *state)
    torch.testing.assert_close(deter, clean.deter)
    params_grad, tokens_grad, action_grad, deter_grad, stoch_grad = grads
    assert all(g.isfinite().all() for g in [*params_grad.values(), tokens_grad, action_grad, deter_grad, stoch_grad])
    assert not action_grad[is_first].any()
    assert not deter_grad[0].any()
    assert not stoch_grad[0].any()
    assert action_grad[~is_first].all()
    assert deter_grad[1:].all()


def test_samples_are_exactly_one_hot_and_forced_by_noise():
    rssm, (tokens, action, is_first, noise) = small(), sequences()
    outputs = rssm.observe(tokens, action, is_first, noise)
    assert ((outputs.stoch == 0) | (outputs.stoch == 1)).all()
    assert (outputs.stoch.sum(-1) == 1).all()
    forced = one_hot(torch.randint(4, (3, 4, 3)), 4).double()
    assert torch.equal(rssm.observe(tokens, action, is_first, forced * FORCED).stoch, forced)
    assert torch.equal(rssm.imagine(random_state(), action, forced * FORCED).stoch, forced)


def test_without_noise_the_mode_is_taken():
    rssm, (tokens, action, is_first, noise) = small(), sequences()
    outputs = rssm.observe(tokens, action, is_first, torch.zeros_like(noise))
    assert torch.equal(outputs.stoch.argmax(-1), outputs.posterior_logits.argmax(-1))


def test_unimix_reaches_classes_the_network_rules_out():
    rssm, (tokens, action, is_first, noise) = small(), sequences()
    with torch.no_grad():
        rssm.posterior_logits.bias.copy_(torch.tensor([1e6, 0, 0, 0] * 3))
    # log(0.01 / 4) is about -6: noise of 7 against 0 picks the class, which at 1e6 : 0 nothing would.
    noise = torch.zeros_like(noise)
    noise[..., 2] = 7
    assert (rssm.observe(tokens, action, is_first, noise).stoch.argmax(-1) == 2).all()
    rssm.unimix = 0.0
    assert (rssm.observe(tokens, action, is_first, noise).stoch.argmax(-1) == 0).all()


def test_large_actions_enter_as_one_but_keep_a_gradient():
    rssm, state = small(), random_state()
    action = torch.tensor([[3.0, -7.0]] * 3).double().requires_grad_()
    bounded = torch.tensor([[1.0, -1.0]] * 3).double()
    deter = rssm.core(state, action)
    torch.testing.assert_close(deter, rssm.core(state, bounded))
    deter.square().sum().backward()
    assert action.grad.all()


def test_absolute_posterior_does_not_see_the_state():
    rssm, tokens = small(absolute=True), torch.randn(3, 5).double()
    states = random_state().deter, random_state().deter
    assert torch.equal(rssm.posterior(states[0], tokens), rssm.posterior(states[1], tokens))
    rssm = small()
    assert not torch.equal(rssm.posterior(states[0], tokens), rssm.posterior(states[1], tokens))
    rssm = small(absolute=True)
    assert rssm.observe(*sequences()).deter.isfinite().all()


@pytest.mark.parametrize(("batch", "steps"), [(1, 1), (3, 1), (1, 2), (0, 2)])
def test_small_batches(batch, steps):
    rssm = small()
    outputs = rssm.observe(*sequences(batch, steps))
    assert outputs.deter.shape == (batch, steps, 16)
    assert outputs.prior_logits.shape == outputs.posterior_logits.shape == (batch, steps, 3, 4)
    imagined = rssm.imagine(outputs.state, torch.zeros(batch, 2, 2), torch.zeros(batch, 2, 3, 4))
    assert imagined.stoch.shape == (batch, 2, 3, 4)


@pytest.mark.parametrize("knobs", [{"dyn_layers": 0}, {"dyn_layers": 2}, {"img_layers": 0}, {"act": "gelu"}])
def test_other_shapes_of_the_network(knobs):
    outputs = small(**knobs).observe(*sequences())
    assert outputs.deter.isfinite().all()
    assert outputs.prior_logits.isfinite().all()


@settings(max_examples=8)
@given(step=st.integers(0, 3), row=st.integers(0, 2), seed=st.integers(0, 99))
def test_only_later_steps_of_the_same_row_feel_a_change(step, row, seed):
    torch.manual_seed(seed)
    rssm, (tokens, action, is_first, noise) = small(), sequences()
    before = rssm.observe(tokens, action, is_first, noise)
    tokens[row, step] += 1
    after = rssm.observe(tokens, action, is_first, noise)
    same = torch.ones(3, 4, dtype=torch.bool)
    same[row, step:] = False
    assert torch.equal(before.posterior_logits[same], after.posterior_logits[same])
    assert torch.equal(before.deter[row, step], after.deter[row, step])
    assert not torch.equal(before.posterior_logits[row, step], after.posterior_logits[row, step])


@settings(max_examples=8)
@given(seed=st.integers(0, 99))
def test_rows_of_a_batch_are_independent_and_may_be_permuted(seed):
    torch.manual_seed(seed)
    rssm, inputs, order = small(), sequences(), torch.randperm(3)
    outputs, permuted = rssm.observe(*inputs), rssm.observe(*(x[order] for x in inputs))
    torch.testing.assert_close(outputs.deter[order], permuted.deter)
    torch.testing.assert_close(outputs.prior_logits[order], permuted.prior_logits)


def test_an_ensemble_equals_a_loop():
    members, inputs = [small() for _ in range(3)], sequences()
    params, _ = stack_module_state(members)

    def loss(params):
        outputs = functional_call(members[0], params, inputs)
        return sum(x.sum() for x in categorical_kl_terms(outputs.posterior_logits, outputs.prior_logits, free_nats=0.0))

    grads = torch.func.vmap(torch.func.grad(loss))(params)
    for i, member in enumerate(members):
        member_grads = torch.func.grad(loss)({k: v.detach() for k, v in member.named_parameters()})
        for name, grad in member_grads.items():
            torch.testing.assert_close(grads[name][i], grad)


def test_jvp_agrees_with_the_gradient():
    rssm, inputs = small(), sequences()
    params = {k: v.detach() for k, v in rssm.named_parameters()}
    tangents = {k: torch.randn_like(v) for k, v in params.items()}

    def loss(params):
        outputs = functional_call(rssm, params, inputs)
        return outputs.prior_logits.square().sum() + outputs.deter.sum()

    _, slope = torch.func.jvp(loss, (params,), (tangents,))
    grads = torch.func.grad(loss)(params)
    torch.testing.assert_close(slope, sum((grads[k] * tangents[k]).sum() for k in params))


def test_a_second_call_does_not_recompile():
    rssm, inputs = small(), sequences(steps=2)
    torch.compiler.reset()
    compiled = torch.compile(rssm.observe, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs), rssm.observe(*inputs))
        with torch.compiler.set_stance("fail_on_recompile"):
            compiled(*sequences(steps=2))


def test_compiled_steps_are_the_same_steps():
    rssm, inputs, state = small(), sequences(), random_state()
    inputs[2][1, 2] = True
    compiled = copy.deepcopy(rssm)
    compiled.compile_steps(backend="aot_eager")

    def outputs(rssm, state):
        observed = rssm.observe(*inputs, state)
        imagined = rssm.imagine(observed.state, inputs[1], inputs[3])
        step = rssm.imagine_step(observed.state, inputs[1][:, 0], inputs[3][:, 0])
        return observed, imagined, step

    def run(function, rssm):
        start = RSSMState(*(x.clone().requires_grad_() for x in state))
        observed, imagined, step = function(rssm, start)
        loss = observed.deter.square().sum() + imagined.prior_logits.square().sum() + step[1].square().sum()
        leaves = [*rssm.parameters(), start.deter]
        return observed, imagined, step, torch.autograd.grad(loss, leaves)

    torch.compiler.reset()
    whole = torch.compile(outputs, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(whole, compiled), run(outputs, rssm))
    # Where no compiler is around them, they are as they were.
    torch.testing.assert_close(run(outputs, compiled), run(outputs, rssm), rtol=0, atol=0)

    params = {k: v.detach() for k, v in rssm.named_parameters()}

    def loss(rssm, params):
        return functional_call(rssm, params, (*inputs, state)).deter.square().sum()

    wanted = torch.func.grad(partial(loss, rssm))(params)
    torch.testing.assert_close(torch.func.grad(partial(loss, compiled))(params), wanted)


def test_a_copy_is_not_compiled():
    rssm, inputs = small(), sequences()
    expected = rssm.observe(*inputs)
    rssm.compile_steps(backend="aot_eager")
    for other in (copy.deepcopy(rssm), pickle.loads(pickle.dumps(rssm))):
        assert rssm.compiled is not None
        assert other.compiled is None
        torch.testing.assert_close(other.observe(*inputs), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dtype_is_that_of_the_parameters(dtype):
    reference, inputs = small(), sequences()
    expected = reference.observe(*inputs)
    rssm = reference.to(dtype)
    inputs = (*inputs[:3], expected.stoch * FORCED)
    outputs = rssm.observe(*inputs)
    assert {x.dtype for x in (*outputs[:4], *outputs.state)} == {dtype}
    assert rssm.initial(2).deter.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(outputs.deter.double(), expected.deter, rtol=tolerance, atol=tolerance)
    assert ((outputs.stoch == 0) | (outputs.stoch == 1)).all()


def test_nothing_is_drawn_and_no_argument_changes():
    rssm, inputs, state = small(), sequences(), random_state()
    copies, generator = [x.clone() for x in (*inputs, *state)], torch.get_rng_state()
    first = rssm.observe(*inputs, state)
    second = rssm.observe(*inputs, state)
    rssm.imagine(state, inputs[1], inputs[3])
    assert torch.equal(first.deter, second.deter)
    assert torch.equal(generator, torch.get_rng_state())
    assert all(torch.equal(x, copy) for x, copy in zip((*inputs, *state), copies, strict=True))


def replaced(index, value):
    inputs = list(sequences())
    inputs[index] = value
    return inputs


@pytest.mark.parametrize(
    ("index", "value", "error", "match"),
    [
        (0, torch.zeros(4, 3, 5), ValueError, r"observe: tokens must be of shape \[3, 4, 5\], got .*time first\?"),
        (0, torch.zeros(3, 4, 6), ValueError, r"tokens must be of shape \[3, 4, 5\], got float32 \[3, 4, 6\]"),
        (1, torch.zeros(3, 4), ValueError, r"action must be of shape \[3, 4, 2\], got float32 \[3, 4\]"),
        (1, torch.zeros(3, 4, 2).long(), TypeError, r"action must be a floating-point tensor.*one-hot, as floats"),
        (2, torch.zeros(3, 4), TypeError, r"is_first must be a bool tensor, got float32 \[3, 4\]"),
        (2, torch.zeros(3, 4, 1).bool(), ValueError, r"is_first must be of shape \[B, T\].*is_first.squeeze\(-1\)"),
        (3, torch.zeros(3, 4, 4, 3), ValueError, r"noise must be of shape \[3, 4, 3, 4\], got float32 \[3, 4, 4, 3\]"),
    ],
)
def test_bad_sequences(index, value, error, match):
    with pytest.raises(error, match=match):
        small().observe(*replaced(index, value))


def test_bad_calls():
    rssm, state = small(), random_state()
    with pytest.raises(ValueError, match=r"RSSM.observe: action must be of at least one step, got float64 \[3, 0, 2\]"):
        rssm.observe(*sequences(3, 0))
    with pytest.raises(TypeError, match=r"RSSM.observe: state must be an RSSMState\(deter, stoch\), got float64"):
        rssm.observe(*sequences(), state.deter)
    with pytest.raises(ValueError, match=r"state.deter must be of shape \[3, 16\], got float64 \[2, 16\]"):
        rssm.observe(*sequences(), random_state(2))
    with pytest.raises(ValueError, match=r"state.stoch must be of shape \[3, 3, 4\], got float64 \[3, 12\]"):
        rssm.observe(*sequences(), RSSMState(state.deter, state.stoch.flatten(1)))
    with pytest.raises(ValueError, match=r"RSSM.observe_step: is_first must be of shape \[B\], got bool \[3, 4\]"):
        rssm.observe_step(state, *sequences())
    with pytest.raises(ValueError, match=r"RSSM.imagine: action must be of shape \[B, L, 2\], got float32 \[3, 2\]"):
        rssm.imagine(state, torch.zeros(3, 2), torch.zeros(3, 3, 4))
    with pytest.raises(ValueError, match=r"RSSM.imagine_step: noise must be of shape \[3, 3, 4\]"):
        rssm.imagine_step(state, torch.zeros(3, 2), torch.zeros(3, 4, 3))
    with pytest.raises(ValueError, match=r"RSSM.prior: deter must be of shape \[..., 16\]"):
        rssm.prior(torch.zeros(3, 8))
    with pytest.raises(ValueError, match=r"RSSM.posterior: tokens must be of shape \[..., 5\]"):
        rssm.posterior(state.deter, torch.zeros(3, 8))


@pytest.mark.parametrize(
    ("knobs", "match"),
    [
        ({"deter": 18}, "RSSM: deter must be a multiple of blocks=4, got 18"),
        ({"obs_layers": 0}, "RSSM: obs_layers must be at least 1, got 0"),
        ({"stoch": 0}, "RSSM: stoch must be at least 1, got 0"),
        ({"unimix": 1.5}, r"RSSM: unimix must be in \[0, 1\], got 1.5"),
        ({"act": "sillu"}, "RSSM: act must be one of .*Did you mean 'silu'"),
        ({"dyn_layers": -1}, "RSSM: dyn_layers must be at least 0, got -1"),
    ],
)
def test_bad_sizes(knobs, match):
    with pytest.raises(ValueError, match=match):
        small(**knobs)
