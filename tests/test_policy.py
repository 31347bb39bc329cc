"""Distributions over actions: golden numbers, the formula in loops, samples from noise, and every refusal."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from torch.func import grad, grad_and_value, jvp
from torch.testing import assert_close
from torch.utils._pytree import tree_map

import rlloss
from rlloss import (
    CategoricalPolicy,
    EvaluatedPolicy,
    NormalPolicy,
    bounded_normal,
    categorical_policy,
    policy_entropy,
    policy_log_prob,
    policy_sample,
)

NAN, INF = float("nan"), float("inf")
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5}


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def relative(actual, expected, rtol):
    assert_close(actual.double(), expected, rtol=rtol, atol=rtol * expected.abs().max().item())


def both(dtype=torch.float64, lead=(2, 3)):
    """Raw outputs of two heads, an action of each, and noise for another one."""
    raw = {
        "mean": randn(*lead, 4, seed=1, dtype=dtype),
        "stddev": randn(*lead, 4, seed=2, dtype=dtype),
        "logits": 2 * randn(*lead, 2, 5, seed=3, dtype=dtype),
    }
    index = torch.randint(0, 5, (*lead, 2), generator=torch.Generator().manual_seed(4))
    one_hot = torch.nn.functional.one_hot(index, 5).to(dtype)
    action = {"turn": randn(*lead, 4, seed=5, dtype=dtype), "press": one_hot}
    noise = {"turn": randn(*lead, 4, seed=6, dtype=dtype), "press": randn(*lead, 2, 5, seed=7, dtype=dtype)}
    return raw, action, noise


def policy_of(raw, unimix=0.01):
    return {
        "turn": bounded_normal(raw["mean"], raw["stddev"]),
        "press": categorical_policy(raw["logits"], unimix=unimix),
    }


# ---- golden values ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", ["bounded_normal", "normal_logstd"])
def test_authors_normal(golden, case, dtype):
    data = golden("04_outs")
    raw = {name: data[f"{case}.in.{name}"].to(dtype) for name in ("raw_mean", "raw_std")}
    action, wide = data[f"{case}.in.act"].to(dtype), TOLERANCE[dtype]

    def make(raw):
        if case == "bounded_normal":
            return bounded_normal(raw["raw_mean"], raw["raw_std"])
        return NormalPolicy(raw["raw_mean"], torch.exp(raw["raw_std"]))

    policy = make(raw)
    relative(policy.mean, data[f"{case}.out.mean"], wide)
    relative(policy.stddev, data[f"{case}.out.stddev"], wide)
    relative(policy_log_prob(policy, action), data[f"{case}.out.logp"], wide)
    relative(policy_entropy(policy), data[f"{case}.out.entropy"], wide)
    single = tree_map(lambda x: x.unsqueeze(-1), policy)
    relative(policy_log_prob(single, action.unsqueeze(-1)), data[f"{case}.out.logp_dims"], wide)
    log_prob = grad(lambda raw: policy_log_prob(make(raw), action).sum())(raw)
    for name, gradient in log_prob.items():
        relative(gradient, data[f"{case}.grad.logp.{name}"], 1e-5)
    entropy = grad(lambda raw: policy_entropy(make(raw)).sum())(raw)
    relative(entropy["raw_std"], data[f"{case}.grad.entropy.raw_std"], 1e-5)
    assert torch.equal(entropy["raw_mean"], torch.zeros_like(entropy["raw_mean"]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("mix", ["0", "0.01"])
def test_authors_categorical(golden, mix, dtype):
    data, case, wide = golden("04_outs"), f"onehot_u{mix}", TOLERANCE[dtype]
    logits, index = data[f"{case}.in.logits"].to(dtype), data[f"{case}.in.index"]
    one_hot = torch.nn.functional.one_hot(index.long(), logits.shape[-1]).to(dtype)
    policy = categorical_policy(logits, unimix=float(mix))
    relative(policy_entropy(policy), data[f"{case}.out.agg_entropy"], wide)
    soft = data[f"{case}.in.event"].to(dtype)
    relative(policy_log_prob(policy, soft), data[f"{case}.out.agg_logp"], wide)
    assert_close(policy_log_prob(policy, index), policy_log_prob(policy, one_hot))
    groups = tree_map(lambda x: x.unsqueeze(-2), policy)
    relative(policy_entropy(groups), data[f"{case}.out.entropy"], wide)
    relative(policy_log_prob(groups, soft.unsqueeze(-2)), data[f"{case}.out.logp"], wide)
    assert torch.equal(policy_sample(policy, torch.zeros_like(logits)), data[f"{case}.out.mode"].to(dtype))

    def make(logits):
        return categorical_policy(logits, unimix=float(mix))

    gradient = grad(lambda logits: policy_log_prob(make(logits), soft).sum())(logits)
    relative(gradient, data[f"{case}.grad.logp.logits"], 1e-5)
    gradient = grad(lambda logits: policy_entropy(make(logits)).sum())(logits)
    relative(gradient, data[f"{case}.grad.entropy.logits"], 1e-5)


@pytest.mark.parametrize(("raw", "entropy"), [(-1e4, -0.8836465), (1e4, 1.4189385)])
def test_entropy_of_a_bounded_normal_lies_between_two_limits(raw, entropy):
    policy = bounded_normal(torch.zeros(1), torch.tensor([raw]))
    assert_close(policy_entropy(policy), torch.tensor(entropy))


# ---- the formula, written as loops -----------------------------------------------------------------------------------


def normal_nats(mean, stddev, action):
    return -0.5 * ((action - mean) / stddev) ** 2 - math.log(stddev) - 0.5 * math.log(2 * math.pi)


def probabilities(logits, mix):
    weights = [math.exp(x - max(logits)) for x in logits]
    return [(1 - mix) * w / sum(weights) + mix / len(weights) for w in weights]


def test_everything_is_the_formula():
    raw, action, noise = both()
    policy = policy_of(raw)
    log_prob, entropy = policy_log_prob(policy, action), policy_entropy(policy)
    sample = policy_sample(policy, noise)
    for b in range(2):
        for t in range(3):
            nats = ent = 0.0
            for i in range(4):
                mean = math.tanh(raw["mean"][b, t, i])
                stddev = 0.9 / (1 + math.exp(-float(raw["stddev"][b, t, i]) - 2)) + 0.1
                nats += normal_nats(mean, stddev, float(action["turn"][b, t, i]))
                ent += math.log(stddev) + 0.5 * math.log(2 * math.pi * math.e)
                assert_close(sample["turn"][b, t, i].item(), mean + stddev * float(noise["turn"][b, t, i]))
            for g in range(2):
                p = probabilities(raw["logits"][b, t, g].tolist(), 0.01)
                taken = action["press"][b, t, g].argmax().item()
                nats += math.log(p[taken])
                ent -= sum(x * math.log(x) for x in p)
                scores = [math.log(x) + float(n) for x, n in zip(p, noise["press"][b, t, g], strict=True)]
                assert sample["press"][b, t, g].tolist() == [float(x == max(scores)) for x in scores]
            assert_close(log_prob[b, t].item(), nats, rtol=1e-12, atol=0)
            assert_close(entropy[b, t].item(), ent, rtol=1e-12, atol=0)


def test_samples_follow_the_distribution():
    key = rlloss.random.key(0)
    policy = categorical_policy(torch.tensor([[0.0, 1.0, 2.0]])).logits.expand(20_000, 1, 3)
    sample = policy_sample(CategoricalPolicy(policy), rlloss.random.gumbel(key, (20_000, 1, 3)))
    assert_close(sample.mean((0, 1)), torch.softmax(torch.tensor([0.0, 1.0, 2.0]), -1), rtol=0, atol=0.01)
    normal = NormalPolicy(torch.full((20_000, 1), 0.5), torch.full((20_000, 1), 0.2))
    sample = policy_sample(normal, rlloss.random.normal(key, (20_000, 1)))
    assert_close(sample.mean(), torch.tensor(0.5), rtol=0, atol=0.01)
    assert_close(sample.std(), torch.tensor(0.2), rtol=0, atol=0.01)


@given(st.floats(-30, 30), st.floats(-30, 30), st.floats(0, 0.5), st.floats(0.5, 3.0))
def test_deviation_stays_in_its_bounds(mean, stddev, minimum, maximum):
    mean, stddev = torch.tensor([mean]).double(), torch.tensor([stddev]).double()
    policy = bounded_normal(mean, stddev, minimum=minimum, maximum=maximum)
    assert minimum <= policy.stddev.item() <= maximum
    assert -1 <= policy.mean.item() <= 1


@given(st.lists(st.floats(-50, 50), min_size=2, max_size=6), st.floats(0, 1))
def test_probabilities_sum_to_one_and_entropy_is_bounded(logits, mix):
    policy = categorical_policy(torch.tensor([logits]).double(), unimix=mix)
    total = sum(policy_log_prob(policy, torch.tensor([i])).exp() for i in range(len(logits)))
    assert_close(total, torch.ones_like(total))
    assert -1e-9 <= policy_entropy(policy).item() <= math.log(len(logits)) + 1e-9


def test_score_has_the_mean_zero():
    logits = randn(1, 5)
    scores = [grad(lambda x, i=i: policy_log_prob(categorical_policy(x), torch.tensor([i])))(logits) for i in range(5)]
    p = torch.softmax(logits, -1)
    assert_close(sum(p[0, i] * scores[i] for i in range(5)), torch.zeros_like(logits), rtol=0, atol=1e-12)


# ---- eager, vmapped, compiled; derivatives ---------------------------------------------------------------------------


def test_everything_in_every_variant(variant):
    def compute(raw, action, noise):
        policy = policy_of(raw)
        return policy, policy_log_prob(policy, action), policy_entropy(policy), policy_sample(policy, noise)

    args = both(torch.float32)
    assert_close(variant(compute)(*args), compute(*args))


def test_first_and_second_gradient_in_every_variant(variant):
    def value(raw, action):
        policy = policy_of(raw)
        return (policy_log_prob(policy, action) + policy_entropy(policy)).square().mean()

    def compute(raw, action):
        def norm(raw):
            return sum(g.square().sum() for g in grad(value)(raw, action).values())

        return grad_and_value(value)(raw, action), grad(norm)(raw)

    args = both(torch.float32)[:2]
    assert_close(variant(compute)(*args), compute(*args), rtol=1e-4, atol=1e-5)


def test_jvp_in_every_variant(variant):
    def compute(raw, direction, action):
        return jvp(lambda raw: policy_log_prob(policy_of(raw), action), (raw,), (direction,))

    raw, action, _ = both(torch.float32)
    args = (raw, tree_map(lambda x: x.flip(0), raw), action)
    assert_close(variant(compute)(*args), compute(*args))


def test_derivatives_are_those_of_finite_differences():
    raw, action, noise = both(lead=(2,))
    names = list(raw)

    def value(*inputs):
        *values, mix, low, high = inputs
        at = dict(zip(names, values, strict=True))
        turn = bounded_normal(at["mean"], at["stddev"], minimum=low, maximum=high)
        policy = {"turn": turn, "press": categorical_policy(at["logits"], unimix=mix)}
        sample = policy_sample(turn, noise["turn"])
        return policy_log_prob(policy, action).sum() + 0.3 * policy_entropy(policy).sum() + sample.square().sum()

    knobs = [torch.tensor(x, dtype=torch.float64) for x in (0.1, 0.2, 1.5)]
    inputs = [x.clone().requires_grad_() for x in [*raw.values(), *knobs]]
    assert torch.autograd.gradcheck(value, inputs, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(value, inputs, fast_mode=True)


def test_second_call_does_not_recompile():
    torch.compiler.reset()

    def compute(raw, action, mix):
        policy = {
            "turn": bounded_normal(raw["mean"], raw["stddev"], minimum=mix),
            "press": categorical_policy(raw["logits"], unimix=mix),
        }
        return policy_log_prob(policy, action) + policy_entropy(policy)

    compiled = torch.compile(compute, fullgraph=True, backend="aot_eager")
    raw, action, _ = both(torch.float32)
    compiled(raw, action, torch.tensor(0.1))
    with torch.compiler.set_stance("fail_on_recompile"):
        for i in range(3):
            other = tree_map(lambda x, i=i: x + i, raw)
            mix = torch.tensor(0.1 * i)
            assert_close(compiled(other, action, mix), compute(other, action, mix))


# ---- where gradients go ----------------------------------------------------------------------------------------------


def test_samples_of_numbers_are_differentiable_and_choices_are_constants():
    raw, _, noise = both()
    gradients = grad(lambda raw: sum(x.square().sum() for x in policy_sample(policy_of(raw), noise).values()))(raw)
    assert torch.equal(gradients["logits"], torch.zeros_like(raw["logits"]))
    assert (gradients["mean"] != 0).all()
    assert (gradients["stddev"] != 0).all()


def test_evaluated_policy_is_what_its_evaluation_was(variant):
    """A family of its own, here a normal one, enters losses by its numbers and their gradients."""
    mean, stddev, action = randn(2, 3, 4), randn(2, 3, 4, seed=1).exp(), randn(2, 3, 4, seed=2)

    def evaluated(mean, stddev, action):
        normal = NormalPolicy(mean, stddev)
        policy = EvaluatedPolicy(policy_log_prob(normal, action), policy_entropy(normal))
        return policy_log_prob({"turn": policy, "push": policy}, {"turn": action, "push": action}) + policy_entropy(
            policy
        )

    def plain(mean, stddev, action):
        return 2 * policy_log_prob(NormalPolicy(mean, stddev), action) + policy_entropy(NormalPolicy(mean, stddev))

    def gradients(function):
        return lambda *x: grad_and_value(lambda *x: function(*x).square().sum(), argnums=(0, 1, 2))(*x)

    assert_close(variant(gradients(evaluated))(mean, stddev, action), gradients(plain)(mean, stddev, action))


def test_evaluated_policy_is_computed_in_float32():
    policy = EvaluatedPolicy(torch.ones(2, dtype=torch.bfloat16), torch.ones(2, dtype=torch.float64))
    assert policy_log_prob(policy, None).dtype == torch.float32
    assert policy_entropy(policy).dtype == torch.float64


def test_noise_of_zeros_is_the_most_likely_action():
    raw, _, noise = both()
    policy = policy_of(raw)
    mode = policy_sample(policy, tree_map(torch.zeros_like, noise))
    assert (policy_log_prob(policy, mode) >= policy_log_prob(policy, policy_sample(policy, noise))).all()


def test_choice_that_is_ruled_out_adds_nothing():
    logits = torch.tensor([[0.0, -INF, 1.0]])
    value = policy_log_prob(CategoricalPolicy(logits), torch.tensor([[1.0, 0.0, 0.0]]))
    assert_close(value, torch.log_softmax(torch.tensor([0.0, 1.0]), -1)[0])
    entropy = policy_entropy(CategoricalPolicy(logits))
    assert_close(entropy, policy_entropy(CategoricalPolicy(torch.tensor([[0.0, 1.0]]))))


# ---- dtypes, shapes, purity ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    raw, action, noise = both(dtype)
    wide = tree_map(torch.Tensor.float, (raw, action, noise))
    for narrow_args, wide_args in (((raw, action, noise), wide),):
        policy, reference = policy_of(narrow_args[0]), policy_of(wide_args[0])
        assert policy_log_prob(policy, narrow_args[1]).dtype == torch.float32
        assert_close(policy_log_prob(policy, narrow_args[1]), policy_log_prob(reference, wide_args[1]))
        assert_close(policy_sample(policy, narrow_args[2]), policy_sample(reference, wide_args[2]))


def test_float64_stays():
    raw, action, noise = both()
    policy = policy_of(raw)
    results = (policy_log_prob(policy, action), policy_entropy(policy), *policy_sample(policy, noise).values())
    assert {x.dtype for x in results} == {torch.float64}


@pytest.mark.parametrize("lead", [(), (0,), (1, 1), (2, 0, 3)])
def test_any_leading_dimensions(lead):
    raw, action, noise = both(torch.float32, lead)
    policy = policy_of(raw)
    assert policy_log_prob(policy, action).shape == lead
    assert policy_entropy(policy).shape == lead
    assert tree_map(torch.Tensor.size, policy_sample(policy, noise)) == tree_map(torch.Tensor.size, action)


def test_tensordict_is_a_mapping():
    raw, action, noise = both(torch.float32)
    policy = policy_of(raw)
    as_td = [TensorDict(x, [2, 3]) for x in (action, noise)]
    assert_close(policy_log_prob(policy, as_td[0]), policy_log_prob(policy, action))
    assert_close(policy_sample(policy, as_td[1]), policy_sample(policy, noise))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8])
def test_indices_of_any_integer_dtype(dtype):
    logits = randn(3, 2, 5)
    index = torch.tensor([[0, 4], [1, 1], [3, 0]])
    one_hot = torch.nn.functional.one_hot(index, 5)
    expected = policy_log_prob(CategoricalPolicy(logits), one_hot.double())
    assert_close(policy_log_prob(CategoricalPolicy(logits), index.to(dtype)), expected)
    assert_close(policy_log_prob(CategoricalPolicy(logits), one_hot.bool()), expected)


def test_arguments_unchanged_and_no_random_numbers_drawn():
    args = both()
    before, state = tree_map(torch.clone, args), torch.get_rng_state()
    policy = policy_of(args[0])
    policy_log_prob(policy, args[1]), policy_entropy(policy), policy_sample(policy, args[2])
    assert_close(args, before, rtol=0, atol=0)
    assert torch.equal(state, torch.get_rng_state())


def test_policies_are_pytrees():
    policy = policy_of(both()[0])
    again = tree_map(lambda x: x, policy)
    assert isinstance(again["turn"], NormalPolicy)
    assert isinstance(again["press"], CategoricalPolicy)


# ---- refusals --------------------------------------------------------------------------------------------------------

X, LOGITS = torch.zeros(3, 2), torch.zeros(3, 2, 5)
NORMAL, CATEGORICAL = NormalPolicy(X, X + 1), CategoricalPolicy(LOGITS)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (
            lambda: bounded_normal(X.int(), X),
            TypeError,
            r"bounded_normal: mean must be a floating-point tensor, got int32",
        ),
        (lambda: bounded_normal(X, 1.0), TypeError, r"bounded_normal: stddev must be a tensor, got float 1.0"),
        (
            lambda: bounded_normal(X, X[:1]),
            ValueError,
            r"stddev must be of shape \[3, 2\] like mean, got float32 \[1, 2\]",
        ),
        (lambda: bounded_normal(X[0, 0], X[0, 0]), ValueError, r"mean must be of shape \[..., action_dim\]"),
        (lambda: bounded_normal(X, X, minimum=-1.0), ValueError, r"minimum must be at least 0, got -1.0"),
        (
            lambda: bounded_normal(X, X, maximum="1"),
            TypeError,
            r"maximum must be a number or a 0-d tensor, got str '1'",
        ),
        (lambda: bounded_normal(X, X, minimum=2.0), ValueError, r"minimum must be at most maximum=1.0, got 2.0"),
        (lambda: bounded_normal(X, X, minimum=X), ValueError, r"minimum must be a number or a 0-d tensor, got float32"),
        (lambda: categorical_policy(LOGITS.int()), TypeError, r"categorical_policy: logits must be a floating-point"),
        (
            lambda: categorical_policy(torch.zeros(5)),
            ValueError,
            r"logits must be of shape \[..., groups, classes >= 1\], got float32 \[5\]. One choice is one group: "
            r"logits.unsqueeze\(-2\)",
        ),
        (lambda: categorical_policy(torch.zeros(5, 0)), ValueError, r"classes >= 1\], got float32 \[5, 0\]"),
        (lambda: categorical_policy(LOGITS, unimix=2.0), ValueError, r"unimix must be in \[0, 1\], got 2.0"),
        (lambda: policy_sample(NORMAL, X.int()), TypeError, r"policy_sample: noise must be a floating-point tensor"),
        (lambda: policy_sample(NORMAL, X[:1]), ValueError, r"noise must be of shape \[3, 2\] like the mean"),
        (lambda: policy_sample(CATEGORICAL, X), ValueError, r"noise must be of shape \[3, 2, 5\] like the logits"),
        (
            lambda: policy_log_prob(NORMAL, X[:1]),
            ValueError,
            r"policy_log_prob: action must be of shape \[3, 2\] like the mean",
        ),
        (
            lambda: policy_log_prob(NORMAL, X.bool()),
            TypeError,
            r"action must be a tensor of numbers, got bool \[3, 2\]",
        ),
        (lambda: policy_log_prob(NORMAL, None), TypeError, r"action must be a tensor, got NoneType"),
        (
            lambda: policy_log_prob(CATEGORICAL, X),
            ValueError,
            r"like the logits, got float32 \[3, 2\]. Indices are integers",
        ),
        (
            lambda: policy_log_prob(CATEGORICAL, X[:, 0].long()),
            ValueError,
            r"action must be of shape \[3, 2\] like the logits without classes, got int64 \[3\]. One choice is",
        ),
        (
            lambda: policy_log_prob({"turn": NORMAL}, {"turm": X}),
            KeyError,
            r"policy_log_prob: action must be a mapping with \['turn'\] like policy, got keys \['turm'\]",
        ),
        (
            lambda: policy_sample({"turn": NORMAL}, {}),
            KeyError,
            r"policy_sample: noise must be a mapping with \['turn'\]",
        ),
        (
            lambda: policy_log_prob({"turn": NORMAL}, X),
            TypeError,
            r"action must be a mapping with \['turn'\] like policy",
        ),
        (
            lambda: policy_entropy({}),
            ValueError,
            r"policy_entropy: policy must be a mapping of at least one distribution",
        ),
        (
            lambda: policy_entropy(LOGITS),
            TypeError,
            r"policy_entropy: policy must be a NormalPolicy, a CategoricalPolicy or a mapping of them, got float32 "
            r"\[3, 2, 5\]. bounded_normal and categorical_policy make them",
        ),
        (lambda: policy_sample(X, X), TypeError, r"policy_sample: policy must be a NormalPolicy"),
        (lambda: policy_log_prob((X, X), X), TypeError, r"policy_log_prob: policy must be a NormalPolicy"),
        (lambda: policy_log_prob(NormalPolicy(X, X[:1]), X), ValueError, r"stddev must be of shape \[3, 2\] like mean"),
    ],
)
def test_refusals(call, error, match):
    with pytest.raises(error, match=match):
        call()
