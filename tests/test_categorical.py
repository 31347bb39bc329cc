"""Vectors of categoricals against loops over the formula, the author's numbers and finite differences."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from rlloss import (
    categorical_entropy,
    categorical_kl,
    categorical_kl_balanced,
    categorical_kl_terms,
    straight_through_one_hot,
    unimix,
)

TOLERANCE = {torch.float64: {"rtol": 1e-6, "atol": 1e-9}, torch.float32: {"rtol": 1e-5, "atol": 1e-6}}
KL_CASES = [f"{s}_{x}_u{u}_f{f}" for s in "ab" for x in ("x1", "x100", "mixed") for u in ("0.01", "0") for f in (1, 0)]

both = pytest.mark.parametrize("dtype", TOLERANCE)
rows = st.lists(st.floats(-30, 30), min_size=5, max_size=5)


def probabilities_oracle(logits: list[float], mix: float = 0.0) -> list[float]:
    top = max(logits)
    exponentials = [math.exp(v - top) for v in logits]
    return [(1 - mix) * e / math.fsum(exponentials) + mix / len(logits) for e in exponentials]


def kl_oracle(p_logits: list[float], q_logits: list[float], mix: float = 0.0) -> float:
    pairs = zip(probabilities_oracle(p_logits, mix), probabilities_oracle(q_logits, mix), strict=True)
    return math.fsum(p * math.log(p / q) for p, q in pairs if p > 0)


def entropy_oracle(logits: list[float]) -> float:
    return -math.fsum(p * math.log(p) for p in probabilities_oracle(logits) if p > 0)


def kl_gradients_oracle(p_logits: list[float], q_logits: list[float]) -> tuple[list[float], list[float]]:
    """With respect to both logits, each with the other held."""
    p, q, kl = probabilities_oracle(p_logits), probabilities_oracle(q_logits), kl_oracle(p_logits, q_logits)
    of_p = [a * (math.log(a / b) - kl) for a, b in zip(p, q, strict=True)]
    return of_p, [b - a for a, b in zip(p, q, strict=True)]


def summed(function, argnums=0):
    return torch.func.grad(lambda *args: function(*args).sum(), argnums)


def total(*args, **knobs):
    dynamics, representation = categorical_kl_terms(*args, **knobs)
    return dynamics + representation


def pair(*shape, **kwargs):
    return torch.randn(*shape, **kwargs) * 3, torch.randn(*shape, **kwargs) * 3


def double(*rows):
    return (torch.tensor(row, dtype=torch.float64) for row in rows)


# Unimix


@both
def test_unimix_is_the_formula(variant, dtype):
    logits, mixes = torch.randn(3, 2, 5, dtype=dtype) * 3, (0.01, 0.5, 1.0)
    of_numbers, of_tensors = variant(
        lambda logits, tensors: ([unimix(logits, mix) for mix in mixes], [unimix(logits, mix) for mix in tensors])
    )(logits, [torch.tensor(mix, dtype=dtype) for mix in mixes])
    for mix, of_number, of_tensor in zip(mixes, of_numbers, of_tensors, strict=True):
        expected = [[math.log(p) for p in probabilities_oracle(row, mix)] for row in logits.reshape(6, 5).tolist()]
        expected = torch.tensor(expected, dtype=dtype).reshape(3, 2, 5)
        assert_close(of_number, expected, **TOLERANCE[dtype])
        assert_close(of_tensor, expected, **TOLERANCE[dtype])


@pytest.mark.parametrize("mix", ["0", "0.01"])
@both
def test_golden_unimix(golden, mix, dtype):
    file = golden("04_outs")
    logits = file[f"onehot_u{mix}.in.logits"].to(dtype)
    expected = file[f"onehot_u{mix}.out.dist_logits"].to(dtype)
    assert_close(torch.log_softmax(unimix(logits, float(mix)), -1), torch.log_softmax(expected, -1), **TOLERANCE[dtype])


@given(rows, rows, st.floats(1e-4, 1))
def test_unimix_bounds_probabilities_and_divergences(p, q, mix):
    p, q = (unimix(logits, mix) for logits in double(p, q))
    assert p.exp().sum().item() == pytest.approx(1.0, rel=1e-12)
    assert (p.exp() >= mix / 5 * (1 - 1e-12)).all()
    assert categorical_kl(p, q) <= math.log(5 / mix) + 1e-12


def test_unimix_of_nothing_gives_the_logits_back():
    logits = torch.randn(3, 4)
    assert torch.equal(unimix(logits, 0.0), logits)
    assert torch.equal(unimix(logits, 0), logits)
    assert_close(unimix(logits, torch.tensor(0.0)), torch.log_softmax(logits, -1))


def test_unimix_of_a_tensor_that_is_zero_is_finite(variant):
    logits, mix = torch.tensor([1e4, 0.0, -1e4]), torch.tensor(0.0)
    assert_close(variant(unimix)(logits, mix), torch.tensor([0.0, -1e4, -2e4]))
    gradient = variant(summed(unimix))(logits, mix)
    assert_close(gradient, summed(torch.log_softmax)(logits, -1))


def test_unimix_gradient_of_the_mix():
    logits, uniform = torch.randn(4, dtype=torch.float64), 1 / 4
    for mix in (0.0, 0.2, 1.0):
        gradient = summed(unimix, 1)(logits, torch.tensor(mix, dtype=torch.float64))
        p = torch.softmax(logits, -1)
        assert_close(gradient, ((uniform - p) / ((1 - mix) * p + mix * uniform)).sum())


# KL divergence


@both
def test_kl_is_the_formula(variant, dtype):
    p, q = pair(3, 2, 5, dtype=dtype)
    pairs = zip(p.reshape(6, 5).tolist(), q.reshape(6, 5).tolist(), strict=True)
    expected = torch.tensor([kl_oracle(*both) for both in pairs], dtype=dtype).reshape(3, 2)
    assert_close(variant(categorical_kl)(p, q), expected, **TOLERANCE[dtype])


@both
def test_kl_gradients_are_the_formula(variant, dtype):
    p, q = pair(4, 5, dtype=dtype)
    pairs = zip(p.tolist(), q.tolist(), strict=True)
    expected = [torch.tensor(g, dtype=dtype) for g in zip(*[kl_gradients_oracle(*both) for both in pairs], strict=True)]
    assert_close(variant(summed(categorical_kl, (0, 1)))(p, q), tuple(expected), **TOLERANCE[dtype])


@given(rows, rows)
def test_kl_is_not_negative_and_zero_at_equality(p, q):
    p, q = double(p, q)
    assert categorical_kl(p, q) >= -1e-12
    assert categorical_kl(p, p) == 0
    assert categorical_kl(p, p + 7.0).item() == pytest.approx(0.0, abs=1e-12)


@given(rows, rows, st.floats(-100, 100), st.permutations(range(5)))
def test_shifts_and_permutations_change_nothing(p, q, shift, order):
    p, q = double(p, q)
    kl, entropy = categorical_kl(p, q), categorical_entropy(p)
    assert_close(categorical_kl(p + shift, q - shift), kl, rtol=1e-9, atol=1e-9)
    assert_close(categorical_kl(p[order], q[order]), kl, rtol=1e-9, atol=1e-9)
    assert_close(categorical_entropy(p + shift), entropy, rtol=1e-9, atol=1e-9)
    assert_close(categorical_entropy(p[order]), entropy, rtol=1e-9, atol=1e-9)
    assert_close(unimix(p + shift, 0.1)[order], unimix(p[order], 0.1), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("classes", "expected"), [(4, 5.924097), (32, 7.980561)])
def test_opposite_saturated_logits(variant, classes, expected):
    post, prior = (torch.full((1, classes), -1e4) for _ in range(2))
    post, prior = post.index_fill(1, torch.tensor(0), 1e4), prior.index_fill(1, torch.tensor(1), 1e4)
    dynamics, representation = variant(categorical_kl_terms)(post, prior)
    assert dynamics.item() == pytest.approx(expected, rel=1e-6)
    assert representation.item() == pytest.approx(expected, rel=1e-6)
    assert all(g.isfinite().all() for g in summed(total, (0, 1))(post, prior))
    # Without the mixture too: the log-probabilities are exact, where those of clamped probabilities are not.
    unmixed, _ = categorical_kl_terms(post, prior, unimix=0.0)
    assert unmixed == 2e4
    assert all(g.isfinite().all() for g in summed(partial(total, unimix=0.0), (0, 1))(post, prior))
    assert categorical_kl_balanced(post, prior) == 2e4
    assert all(g.isfinite().all() for g in summed(categorical_kl_balanced, (0, 1))(post, prior))
    second = torch.func.grad(lambda p: summed(categorical_kl_balanced)(p, prior).square().sum())(post)
    assert second.isfinite().all()


def test_classes_that_both_rule_out_add_nothing(variant):
    p, q = torch.tensor([0.3, -math.inf, 1.0]), torch.tensor([1.0, -math.inf, 0.2])
    kl, entropy, gradients = variant(
        lambda p, q: (categorical_kl(p, q), categorical_entropy(p), summed(categorical_kl, (0, 1))(p, q))
    )(p, q)
    allowed = torch.tensor([0, 2])
    assert_close(kl, categorical_kl(p[allowed], q[allowed]))
    assert_close(entropy, categorical_entropy(p[allowed]))
    assert_close(summed(categorical_entropy)(p)[allowed], summed(categorical_entropy)(p[allowed]))
    for whole, part in zip(gradients, summed(categorical_kl, (0, 1))(p[allowed], q[allowed]), strict=True):
        assert whole[1] == 0
        assert_close(whole[allowed], part)
    assert categorical_kl(torch.zeros(3), q) == math.inf


# Balanced KL


@both
def test_balanced_is_the_formula(variant, dtype):
    post, prior = pair(2, 3, 5, dtype=dtype)
    knobs = [(0.8, 1.0), (0.3, 0.1), (1.0, 0.0), (0.0, 2.0)]
    losses = variant(lambda post, prior: [categorical_kl_balanced(post, prior, *pair) for pair in knobs])(post, prior)
    for (_, free_bits), loss in zip(knobs, losses, strict=True):
        pairs = zip(post.reshape(6, 5).tolist(), prior.reshape(6, 5).tolist(), strict=True)
        expected = math.fsum(max(kl_oracle(*both), free_bits) for both in pairs) / 6
        assert_close(loss, torch.tensor(expected, dtype=dtype), **TOLERANCE[dtype])


@both
def test_balanced_gradients_are_the_formula(variant, dtype):
    post, prior = pair(4, 1, 5, dtype=dtype)
    of_post, of_prior = [], []
    for p, q in zip(post.reshape(4, 5).tolist(), prior.reshape(4, 5).tolist(), strict=True):
        live = kl_oracle(p, q) > 1.0
        of_p, of_q = kl_gradients_oracle(p, q)
        of_post.append([0.2 / 4 * live * g for g in of_p])
        of_prior.append([0.8 / 4 * live * g for g in of_q])
    expected = tuple(torch.tensor(g, dtype=dtype).reshape(4, 1, 5) for g in (of_post, of_prior))
    assert_close(variant(torch.func.grad(categorical_kl_balanced, (0, 1)))(post, prior), expected, **TOLERANCE[dtype])


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("alpha", ["0.8", "0.5", "1", "0"])
@pytest.mark.parametrize("free_bits", ["1", "0.1", "0"])
@both
def test_golden_balanced(golden, alpha, free_bits, dtype):
    file, case = golden("10b_torchrl_functions"), f"kl_balanced_a{alpha}_f{free_bits}"
    post, prior = file["kl.in.post"].to(dtype), file["kl.in.prior"].to(dtype)
    loss = partial(categorical_kl_balanced, alpha=float(alpha), free_bits=float(free_bits))
    assert_close(loss(post, prior), file[f"{case}.out.loss"].to(dtype), **TOLERANCE[dtype])
    of_post, of_prior = torch.func.grad(loss, (0, 1))(post, prior)
    assert_close(of_post, file[f"{case}.grad.post"].to(dtype), rtol=1e-5, atol=1e-7)
    assert_close(of_prior, file[f"{case}.grad.prior"].to(dtype), rtol=1e-5, atol=1e-7)


@given(rows, rows, st.floats(0, 1), st.floats(0, 3))
def test_free_bits_are_the_least_a_categorical_costs(p, q, alpha, free_bits):
    post, prior = (x.unsqueeze(0) for x in double(p, q))
    assert categorical_kl_balanced(post, prior, alpha, free_bits) >= free_bits * (1 - 1e-12)
    assert all((x >= free_bits).all() for x in categorical_kl_terms(post, prior, free_nats=free_bits))


@pytest.mark.usefixtures("path")
def test_balanced_clamps_each_categorical_and_terms_clamp_the_sum():
    # 32 small divergences: below the threshold each, above it together.
    post, prior = torch.randn(32, 32) * 0.2, torch.randn(32, 32) * 0.2
    sum_of_groups = categorical_kl(post, prior).sum()
    assert categorical_kl(post, prior).max() < 1 < sum_of_groups
    assert categorical_kl_balanced(post, prior) == 1
    assert not any(g.any() for g in torch.func.grad(categorical_kl_balanced, (0, 1))(post, prior))
    dynamics, representation = categorical_kl_terms(post, prior, unimix=0.0)
    assert_close(dynamics, sum_of_groups)
    assert_close(representation, sum_of_groups)
    assert all(g.any() for g in torch.func.grad(partial(total, unimix=0.0), (0, 1))(post, prior))


# KL terms


@both
def test_terms_are_the_formula(variant, dtype):
    (post, prior), knobs = pair(3, 2, 5, dtype=dtype), [(1.0, 0.01), (0.0, 0.0), (4.0, 0.1)]
    results = variant(lambda post, prior: [categorical_kl_terms(post, prior, free_nats=f, unimix=u) for f, u in knobs])(
        post, prior
    )
    for (free_nats, mix), terms in zip(knobs, results, strict=True):
        expected = []
        for groups in zip(post.tolist(), prior.tolist(), strict=True):
            expected.append(max(free_nats, math.fsum(kl_oracle(p, q, mix) for p, q in zip(*groups, strict=True))))
        assert_close(terms, (torch.tensor(expected, dtype=dtype),) * 2, **TOLERANCE[dtype])


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("case", KL_CASES)
@both
def test_golden_terms(golden, case, dtype):
    file, (inputs, mix, free_nats) = golden("03_kl"), (case[: case.index("_u")], *case.split("_")[-2:])
    post, prior = file[f"{inputs}.in.post"].to(dtype), file[f"{inputs}.in.prior"].to(dtype)
    terms = partial(categorical_kl_terms, free_nats=float(free_nats[1:]), unimix=float(mix[1:]))
    dynamics, representation = terms(post, prior)
    tolerance = {"rtol": 1e-6, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-6}
    assert_close(dynamics, file[f"{case}.out.dyn"].to(dtype), **tolerance)
    assert_close(representation, file[f"{case}.out.rep"].to(dtype), **tolerance)
    # Saturated logits cancel: in float32 the reference itself is only good to 1e-5 of its largest gradient.
    of_post, of_prior = torch.func.grad(lambda *x: terms(*x)[0].sum(), (0, 1))(post, prior)
    expected = file[f"{case}.grad.dyn.prior"].to(dtype)
    assert_close(
        of_prior, expected, rtol=1e-5, atol=1e-6 + 1e-5 * expected.abs().max().item() * (dtype == torch.float32)
    )
    assert not of_post.any()
    of_post, of_prior = torch.func.grad(lambda *x: terms(*x)[1].sum(), (0, 1))(post, prior)
    expected = file[f"{case}.grad.rep.post"].to(dtype)
    assert_close(
        of_post, expected, rtol=1e-5, atol=1e-6 + 1e-5 * expected.abs().max().item() * (dtype == torch.float32)
    )
    assert not of_prior.any()
    for logits, name in [(prior, "dyn"), (post, "rep")]:
        entropy = categorical_entropy(unimix(logits, float(mix[1:]))).sum(-1).mean()
        assert_close(entropy, file[f"{case}.out.met.{name}_ent"].to(dtype), **tolerance)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("mix", ["0", "0.01"])
@pytest.mark.parametrize("free_nats", ["1", "0"])
@both
def test_golden_terms_of_torchrl(golden, mix, free_nats, dtype):
    file, case = golden("10b_torchrl_functions"), f"kl_terms_u{mix}_f{free_nats}"
    post, prior = file["kl.in.post"].to(dtype), file["kl.in.prior"].to(dtype)
    terms = partial(categorical_kl_terms, free_nats=float(free_nats), unimix=float(mix))
    for which, (name, argnum) in enumerate([("dyn", 1), ("rep", 0)]):

        def mean(post, prior, which=which):
            return terms(post, prior)[which].mean()

        assert_close(mean(post, prior), file[f"{case}.out.{name}"].to(dtype), **TOLERANCE[dtype])
        gradient = torch.func.grad(mean, argnum)(post, prior)
        assert_close(gradient, file[f"{case}.grad.{name}"].to(dtype), rtol=1e-5, atol=1e-7)


def test_equal_distributions_cost_the_free_nats_and_have_no_gradient(variant):
    post = torch.randn(2, 3, 4)
    dynamics, representation, gradients = variant(
        lambda p, q: (*categorical_kl_terms(p, q), summed(total, (0, 1))(p, q))
    )(post, post.clone())
    assert (dynamics == 1).all()
    assert (representation == 1).all()
    assert not any(g.any() for g in gradients)
    assert not any(x.any() for x in categorical_kl_terms(post, post, free_nats=0.0))
    assert categorical_kl_balanced(post, post, free_bits=0.25) == 0.25


def test_half_the_gradient_passes_where_the_clamp_begins():
    post, prior = pair(1, 4, dtype=torch.float64)
    sum_of_groups = categorical_kl_terms(post, prior, free_nats=0.0)[0]
    full = summed(partial(total, free_nats=0.0), (0, 1))(post, prior)
    half = summed(partial(total, free_nats=sum_of_groups.item()), (0, 1))(post, prior)
    assert_close(half, tuple(g / 2 for g in full))


@given(st.permutations(range(3)))
def test_groups_and_steps_in_any_order(order):
    post, prior = torch.arange(60.0).reshape(4, 3, 5).sin() * 3, torch.arange(60.0).reshape(4, 3, 5).cos() * 3
    for permuted, straight in zip(
        categorical_kl_terms(post[:, order], prior[:, order]), categorical_kl_terms(post, prior), strict=True
    ):
        assert_close(permuted, straight)
    assert_close(categorical_kl_balanced(post[:, order], prior[:, order]), categorical_kl_balanced(post, prior))
    assert_close(categorical_kl(post[order], prior[order]), categorical_kl(post, prior)[order])


# Entropy


@both
def test_entropy_is_the_formula(variant, dtype):
    logits = torch.randn(3, 2, 5, dtype=dtype) * 3
    expected = torch.tensor([entropy_oracle(row) for row in logits.reshape(6, 5).tolist()], dtype=dtype)
    assert_close(variant(categorical_entropy)(logits), expected.reshape(3, 2), **TOLERANCE[dtype])


@pytest.mark.parametrize("mix", ["0", "0.01"])
@both
def test_golden_entropy(golden, mix, dtype):
    file, case = golden("04_outs"), f"onehot_u{mix}"
    logits = file[f"{case}.in.logits"].to(dtype)

    def entropy(logits):
        return categorical_entropy(unimix(logits, float(mix)))

    assert_close(entropy(logits), file[f"{case}.out.entropy"].to(dtype), **TOLERANCE[dtype])
    assert_close(entropy(logits).sum(-1), file[f"{case}.out.agg_entropy"].to(dtype), **TOLERANCE[dtype])
    assert_close(summed(entropy)(logits), file[f"{case}.grad.entropy.logits"].to(dtype), rtol=1e-5, atol=1e-6)


@given(rows)
def test_entropy_lies_between_nothing_and_uniform(logits):
    (logits,) = double(logits)
    assert -1e-12 <= categorical_entropy(logits) <= math.log(5) + 1e-12
    assert_close(categorical_entropy(logits), math.log(5) - categorical_kl(logits, torch.zeros_like(logits)))


def test_entropy_at_the_extremes():
    saturated = torch.tensor([1e30, 0.0, -1e30])
    assert categorical_entropy(saturated) == 0
    assert summed(categorical_entropy)(saturated).isfinite().all()
    assert_close(categorical_entropy(torch.full((8,), -1e30)), torch.tensor(math.log(8)))


# Straight-through samples


@both
def test_sample_is_one_hot_with_the_gradient_of_its_probabilities(variant, dtype):
    logits, noise, weight = (torch.randn(4, 3, 5, dtype=dtype) for _ in range(3))
    samples = variant(straight_through_one_hot)(logits, noise)
    rows = (logits + noise).reshape(12, 5).tolist()
    expected = [[float(k == row.index(max(row))) for k in range(5)] for row in rows]
    assert torch.equal(samples, torch.tensor(expected, dtype=dtype).reshape(4, 3, 5))
    gradient = variant(summed(lambda logits: straight_through_one_hot(logits, noise[0, 0].expand(4, 3, 5)) * weight))(
        logits
    )
    p = torch.softmax(logits, -1)
    assert_close(gradient, p * (weight - (p * weight).sum(-1, keepdim=True)), **TOLERANCE[dtype])


@pytest.mark.parametrize("mix", ["0", "0.01"])
@both
def test_golden_sample(golden, mix, dtype):
    file, case = golden("04_outs"), f"onehot_u{mix}"
    logits, weight = file[f"{case}.in.logits"].to(dtype), file[f"{case}.in.ct"].to(dtype)
    index = file[f"{case}.in.index"].long()
    # Noise that makes the author's sample win.
    noise = torch.nn.functional.one_hot(index, 6).to(dtype) * 1e3

    def sample(logits, noise):
        return straight_through_one_hot(unimix(logits, float(mix)), noise)

    assert torch.equal(sample(logits, noise).argmax(-1), index)
    assert torch.equal(sample(logits, torch.zeros_like(noise)), file[f"{case}.out.mode"].to(dtype))
    gradient = summed(lambda logits: sample(logits, noise) * weight)(logits)
    assert_close(gradient, file[f"{case}.grad.straight_through.logits"].to(dtype), rtol=1e-5, atol=1e-6)


@given(rows, rows)
def test_sample_is_exactly_one_hot(logits, noise):
    sample = straight_through_one_hot(torch.tensor(logits), torch.tensor(noise))
    assert sorted(sample.tolist()) == [0.0, 0.0, 0.0, 0.0, 1.0]


def test_gumbel_noise_samples_the_distribution():
    logits = torch.tensor([0.0, 1.0, 2.0]).expand(20_000, 3)
    noise = -torch.rand(20_000, 3).log().neg().log()
    frequencies = straight_through_one_hot(logits, noise).mean(0)
    assert_close(frequencies, torch.softmax(logits[0], -1), rtol=0.0, atol=0.015)


# Derivatives


def test_gradients_stop(variant):
    post, prior, noise = torch.randn(2, 3, 4) * 3, torch.randn(2, 3, 4) * 3, torch.randn(2, 3, 4)

    def gradients(post, prior, noise):
        terms = partial(categorical_kl_terms, free_nats=0.0)
        stopped = (
            summed(lambda *x: terms(*x)[0], 0)(post, prior),
            summed(lambda *x: terms(*x)[1], 1)(post, prior),
            torch.func.grad(partial(categorical_kl_balanced, alpha=1.0), 0)(post, prior),
            torch.func.grad(partial(categorical_kl_balanced, alpha=0.0), 1)(post, prior),
            summed(lambda *x: straight_through_one_hot(*x).square(), 1)(post, noise),
        )
        live = (
            summed(lambda *x: terms(*x)[0], 1)(post, prior),
            summed(lambda *x: terms(*x)[1], 0)(post, prior),
            torch.func.grad(partial(categorical_kl_balanced, alpha=1.0), 1)(post, prior),
            torch.func.grad(partial(categorical_kl_balanced, alpha=0.0), 0)(post, prior),
        )
        return stopped, live

    stopped, live = variant(gradients)(post, prior, noise)
    assert not any(g.any() for g in stopped)
    assert all(g.any() for g in live)


def test_tangents_stop(variant):
    post, prior, noise = torch.randn(2, 3, 4) * 3, torch.randn(2, 3, 4) * 3, torch.randn(2, 3, 4)

    def tangents(post, prior, noise, direction):
        def along(function, *primals):
            return torch.func.jvp(function, primals, (direction,))[1]

        terms = partial(categorical_kl_terms, free_nats=0.0)
        stopped = (
            along(lambda p: terms(p, prior)[0], post),
            along(lambda q: terms(post, q)[1], prior),
            along(lambda p: categorical_kl_balanced(p, prior, alpha=1.0), post),
            along(lambda q: categorical_kl_balanced(post, q, alpha=0.0), prior),
            along(lambda n: straight_through_one_hot(post, n), noise),
        )
        live = (
            along(lambda q: terms(post, q)[0], prior),
            along(lambda p: terms(p, prior)[1], post),
            along(lambda p: straight_through_one_hot(p, noise), post),
        )
        return stopped, live

    direction = torch.randn(2, 3, 4)
    stopped, (dynamics, representation, sample) = variant(tangents)(post, prior, noise, direction)
    assert not any(t.any() for t in stopped)
    gradient = summed(lambda q: categorical_kl_terms(post, q, free_nats=0.0)[0])(prior)
    assert_close(dynamics, (gradient * direction).sum((-2, -1)))
    gradient = summed(lambda p: categorical_kl_terms(p, prior, free_nats=0.0)[1])(post)
    assert_close(representation, (gradient * direction).sum((-2, -1)))
    assert_close(sample, torch.func.jvp(lambda p: torch.softmax(p, -1), (post,), (direction,))[1])


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("name", ["kl", "entropy", "unimix", "dynamics", "representation"])
def test_derivatives_against_finite_differences(name):
    held = torch.randn(2, 3, dtype=torch.float64)
    logits = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    function = {
        "kl": lambda x: (categorical_kl(x, held), categorical_kl(held, x)),
        "entropy": categorical_entropy,
        "unimix": partial(unimix, mix=0.1),
        "dynamics": lambda x: categorical_kl_terms(held, x, free_nats=0.1)[0],
        "representation": lambda x: categorical_kl_terms(x, held, free_nats=0.1)[1],
    }[name]
    assert torch.autograd.gradcheck(function, logits, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, logits, check_fwd_over_rev=True)


@pytest.mark.usefixtures("path")
def test_balanced_derivatives_against_finite_differences():
    # Each half with the other side held, which finite differences do not do on their own.
    held = torch.randn(1, 2, 3, dtype=torch.float64)
    logits = torch.randn(1, 2, 3, dtype=torch.float64, requires_grad=True)
    for function in (
        lambda x: categorical_kl_balanced(held, x, alpha=1.0, free_bits=0.0),
        lambda x: categorical_kl_balanced(x, held, alpha=0.0, free_bits=0.0),
    ):
        assert torch.autograd.gradcheck(function, logits, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(function, logits)


# Knobs as tensors, types, shapes, errors, purity


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_knobs_may_be_tensors(variant, dtype):
    post, prior = pair(2, 3, 4)
    loss, dynamics, representation = variant(
        lambda p, q, a, b, u: (
            categorical_kl_balanced(p, q, a, b),
            *categorical_kl_terms(p, q, free_nats=b, unimix=u),
        )
    )(post, prior, *(torch.tensor(x, dtype=dtype) for x in (0.3, 1.5, 0.02)))
    assert loss.dtype == dynamics.dtype == representation.dtype == torch.float32
    assert_close(loss, categorical_kl_balanced(post, prior, 0.3, 1.5))
    assert_close((dynamics, representation), categorical_kl_terms(post, prior, free_nats=1.5, unimix=0.02))


def test_knobs_are_differentiable():
    post, prior = pair(2, 3, 4)
    dynamics, representation = categorical_kl(post, prior).clamp_min(1.0), categorical_kl(post, prior).clamp_min(1.0)
    gradient = torch.func.grad(categorical_kl_balanced, 2)(post, prior, torch.tensor(0.8))
    assert_close(gradient, (dynamics - representation).mean())
    gradient = torch.func.grad(lambda f: categorical_kl_terms(post, post, free_nats=f)[0].mean())(torch.tensor(1.0))
    assert gradient == 1


CALLS = {
    unimix: lambda **k: pair(2, 3, 4, **k)[:1],
    categorical_kl: partial(pair, 2, 3, 4),
    categorical_kl_balanced: partial(pair, 2, 3, 4),
    categorical_kl_terms: partial(pair, 2, 3, 4),
    categorical_entropy: lambda **k: pair(2, 3, 4, **k)[:1],
    straight_through_one_hot: partial(pair, 2, 3, 4),
}
every = pytest.mark.parametrize("function", CALLS)


def results(function, *arguments):
    result = function(*arguments)
    return result if isinstance(result, tuple) else (result,)


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(function, dtype):
    arguments = [x.to(dtype) for x in CALLS[function]()]
    computed = torch.float64 if dtype == torch.float64 else torch.float32
    expected = results(function, *[x.to(computed) for x in arguments])
    for result, wanted in zip(results(function, *arguments), expected, strict=True):
        assert result.dtype == computed
        assert torch.equal(result, wanted)


@pytest.mark.usefixtures("path")
@every
def test_extreme_half_precision_is_finite(function):
    arguments = [torch.tensor([[65504.0, -65504.0, 0.0]], dtype=torch.float16) for _ in CALLS[function]()]
    assert all(x.isfinite().all() for x in results(function, *arguments))


@pytest.mark.parametrize("leading", [(), (1,), (0,), (2, 0), (2, 1, 3)])
def test_shapes(leading):
    logits = torch.randn(*leading, 3, 4)
    assert unimix(logits).shape == logits.shape
    assert categorical_kl(logits, logits).shape == (*leading, 3)
    assert categorical_entropy(logits).shape == (*leading, 3)
    assert straight_through_one_hot(logits, logits).shape == logits.shape
    assert categorical_kl_balanced(logits, logits).shape == ()
    assert [x.shape for x in categorical_kl_terms(logits, logits)] == [leading, leading]


def test_an_empty_batch_costs_nothing(variant):
    loss, gradient = variant(
        lambda p, q: (categorical_kl_balanced(p, q), torch.func.grad(categorical_kl_balanced)(p, q))
    )(torch.zeros(0, 3, 4), torch.zeros(0, 3, 4))
    assert loss == 0
    assert gradient.shape == (0, 3, 4)


def test_one_class_is_certain():
    logits = torch.randn(3, 1)
    assert not categorical_entropy(logits).any()
    assert not categorical_kl(logits, -logits).any()
    assert (straight_through_one_hot(logits, logits) == 1).all()


ERRORS = [
    (
        lambda: unimix(torch.zeros(3).int()),
        TypeError,
        r"unimix: logits must be a floating-point tensor, got int32 \[3\]",
    ),
    (lambda: unimix([0.0]), TypeError, r"unimix: logits must be a tensor, got list \[0\.0\]"),
    (
        lambda: unimix(torch.zeros(())),
        ValueError,
        r"unimix: logits must be of shape \[\.\.\., classes\], got float32 \[\]",
    ),
    (
        lambda: unimix(torch.zeros(3, 0)),
        ValueError,
        r"unimix: logits must be of shape \[\.\.\., classes >= 1\], got float32 \[3, 0\]",
    ),
    (lambda: unimix(torch.zeros(3), 1.5), ValueError, r"unimix: mix must be in \[0, 1\], got 1\.5"),
    (lambda: unimix(torch.zeros(3), -0.1), ValueError, r"unimix: mix must be in \[0, 1\], got -0\.1"),
    (lambda: unimix(torch.zeros(3), math.nan), ValueError, r"unimix: mix must be in \[0, 1\], got nan"),
    (lambda: unimix(torch.zeros(3), "1"), TypeError, "unimix: mix must be a number or a 0-d tensor, got str '1'"),
    (lambda: unimix(torch.zeros(3), True), TypeError, "unimix: mix must be a number or a 0-d tensor, got bool True"),
    (
        lambda: unimix(torch.zeros(3), torch.zeros(3)),
        ValueError,
        r"unimix: mix must be a number or a 0-d tensor, got float32 \[3\]",
    ),
    (
        lambda: categorical_kl(torch.zeros(3).bool(), torch.zeros(3)),
        TypeError,
        r"categorical_kl: p_logits must be a floating-point tensor, got bool \[3\]",
    ),
    (
        lambda: categorical_kl(torch.zeros(3), torch.zeros(3).long()),
        TypeError,
        r"categorical_kl: q_logits must be a floating-point tensor, got int64 \[3\]",
    ),
    (
        lambda: categorical_kl(torch.zeros(2, 3), torch.zeros(2, 4)),
        ValueError,
        r"categorical_kl: q_logits must be of shape \[2, 3\] like p_logits, got float32 \[2, 4\]",
    ),
    (
        lambda: categorical_kl_balanced(torch.zeros(4), torch.zeros(4)),
        ValueError,
        r"categorical_kl_balanced: posterior_logits must be of shape \[\.\.\., groups, classes\], got float32 \[4\]",
    ),
    (
        lambda: categorical_kl_balanced(torch.zeros(2, 3, 4), torch.zeros(2, 1, 4)),
        ValueError,
        r"prior_logits must be of shape \[2, 3, 4\] like posterior_logits, got float32 \[2, 1, 4\]",
    ),
    (
        lambda: categorical_kl_balanced(torch.zeros(2, 5, 3, 4), torch.zeros(5, 2, 3, 4)),
        ValueError,
        r"prior_logits must be .* Did you pass time first\?",
    ),
    (
        lambda: categorical_kl_balanced(torch.zeros(3, 4), torch.zeros(3, 4), alpha=1.1),
        ValueError,
        r"categorical_kl_balanced: alpha must be in \[0, 1\], got 1\.1",
    ),
    (
        lambda: categorical_kl_balanced(torch.zeros(3, 4), torch.zeros(3, 4), alpha=torch.ones(3)),
        ValueError,
        r"categorical_kl_balanced: alpha must be a number or a 0-d tensor, got float32 \[3\]",
    ),
    (
        lambda: categorical_kl_balanced(torch.zeros(3, 4), torch.zeros(3, 4), free_bits=-1.0),
        ValueError,
        r"categorical_kl_balanced: free_bits must be at least 0, got -1\.0",
    ),
    (
        lambda: categorical_kl_balanced(torch.zeros(3, 0), torch.zeros(3, 0)),
        ValueError,
        r"posterior_logits must be of shape \[\.\.\., classes >= 1\], got float32 \[3, 0\]",
    ),
    (
        lambda: categorical_kl_terms(torch.zeros(3, 4), torch.zeros(3, 4).int()),
        TypeError,
        r"categorical_kl_terms: prior_logits must be a floating-point tensor, got int32 \[3, 4\]",
    ),
    (
        lambda: categorical_kl_terms(torch.zeros(3, 4), torch.zeros(3, 4), free_nats=-0.5),
        ValueError,
        r"categorical_kl_terms: free_nats must be at least 0, got -0\.5",
    ),
    (
        lambda: categorical_kl_terms(torch.zeros(3, 4), torch.zeros(3, 4), unimix=2),
        ValueError,
        r"categorical_kl_terms: unimix must be in \[0, 1\], got 2",
    ),
    (
        lambda: categorical_kl_terms(torch.zeros(3, 4), torch.zeros(4, 3)),
        ValueError,
        r"categorical_kl_terms: prior_logits must be of shape \[3, 4\] like posterior_logits, got float32 \[4, 3\]",
    ),
    (
        lambda: categorical_entropy(torch.zeros(())),
        ValueError,
        r"categorical_entropy: logits must be of shape \[\.\.\., classes\], got float32 \[\]",
    ),
    (
        lambda: categorical_entropy(torch.zeros(2).long()),
        TypeError,
        r"categorical_entropy: logits must be a floating-point tensor, got int64 \[2\]",
    ),
    (
        lambda: straight_through_one_hot(torch.zeros(2, 3), torch.zeros(3)),
        ValueError,
        r"straight_through_one_hot: noise must be of shape \[2, 3\] like logits, got float32 \[3\]",
    ),
    (
        lambda: straight_through_one_hot(torch.zeros(2, 3), None),
        TypeError,
        r"straight_through_one_hot: noise must be a tensor, got NoneType",
    ),
    (
        lambda: straight_through_one_hot(torch.zeros(2, 3).int(), torch.zeros(2, 3)),
        TypeError,
        r"straight_through_one_hot: logits must be a floating-point tensor, got int32 \[2, 3\]",
    ),
]


@pytest.mark.parametrize(("call", "error", "text"), ERRORS, ids=range(len(ERRORS)))
def test_errors(call, error, text):
    with pytest.raises(error, match=text):
        call()


@every
def test_pure(function):
    arguments = CALLS[function]()
    before, generator = [x.clone() for x in arguments], torch.get_rng_state()
    first, second = results(function, *arguments), results(function, *arguments)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(arguments, before, strict=True))
    assert torch.equal(torch.get_rng_state(), generator)


@every
@pytest.mark.parametrize("dim", [0, 1])
def test_vmap_equals_a_loop(function, dim):
    arguments = CALLS[function]()
    function = partial(results, function)
    if len(arguments) == 2:
        one_held = torch.func.vmap(function, in_dims=(None, 0))(arguments[0][0], arguments[1])
        expected = [torch.stack(x) for x in zip(*[function(arguments[0][0], y) for y in arguments[1]], strict=True)]
        assert_close(list(one_held), expected)
    arguments = [torch.stack([x, x * 2, x + 1], dim) for x in arguments]
    batched = torch.func.vmap(function, in_dims=dim)(*arguments)
    rows = zip(*[x.unbind(dim) for x in arguments], strict=True)
    expected = [torch.stack(x) for x in zip(*[function(*row) for row in rows], strict=True)]
    assert_close(list(batched), expected)


@every
def test_reads_no_value(function):
    # Tensors on the meta device have none.
    assert all(x.device.type == "meta" for x in results(function, *CALLS[function](device="meta")))


def compile_once(function, *calls, warmup=1):
    """Calls the compiled function, which after the first `warmup` calls may not be compiled again."""
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for step, arguments in enumerate(calls):
        with torch._dynamo.config.patch(error_on_recompile=step >= warmup):
            compiled(*arguments)


@every
def test_second_call_does_not_recompile(function):
    compile_once(function, *[CALLS[function]() for _ in range(3)])


def test_a_knob_that_changes_its_value_recompiles_never_as_a_tensor_and_once_as_a_number():
    logits = pair(2, 3, 4)
    tensors = [(*logits, torch.tensor(a), torch.tensor(b)) for a, b in [(0.8, 1.0), (0.3, 0.0), (0.5, 2.0)]]
    compile_once(categorical_kl_balanced, *tensors)
    compile_once(unimix, *[(logits[0], torch.tensor(u)) for u in (0.01, 0.0, 0.5)])
    numbers = [(*logits, a, b) for a, b in [(0.8, 1.0), (0.3, 0.5), (0.5, 2.0), (0.6, 1.5)]]
    compile_once(categorical_kl_balanced, *numbers, warmup=2)
    compile_once(unimix, *[(logits[0], u) for u in (0.01, 0.2, 0.5, 0.7)], warmup=2)


def test_free_nats_beyond_float32_are_infinite():
    dynamics, _ = categorical_kl_terms(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), free_nats=1e300)
    assert dynamics.isinf().all()
