"""The rounds and blocks of a recurrence against its steps: values, derivatives, what weighs nothing, who gets which."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import grad, jvp, vmap
from torch.testing import assert_close

from rlloss import recurrence, returns
from rlloss.recurrence import _in_blocks, chained


def draw(*leading, steps, dtype=torch.float64):
    """Rewards, bootstraps and their weights, some of them 0."""
    sequences = torch.randn(2, *leading, steps + 1, dtype=dtype)
    weights = torch.randn(2, *leading, steps, dtype=dtype)
    return *sequences, *torch.where(torch.rand(weights.shape) < 0.2, 0.0, weights)


def step_by_step(reward, bootstrap, known, chain):
    """The formula as it is written."""

    def weighed(weight, x):
        return weight * torch.where((weight == 0) & ~x.isfinite(), 0.0, x)

    value, values = bootstrap[..., -1], []
    for i in reversed(range(chain.shape[-1])):
        value = reward[..., i + 1] + weighed(known[..., i], bootstrap[..., i + 1]) + weighed(chain[..., i], value)
        values.append(value)
    return torch.stack(values[::-1], -1)


def gradients(function, operands, direction):
    leaves = [x.detach().clone().requires_grad_() for x in operands]
    y = function(*leaves)
    return y, *torch.autograd.grad(y, leaves, direction)


@given(st.integers(1, 40), st.lists(st.integers(0, 3), max_size=2), st.booleans(), st.integers(0, 99))
def test_rounds_are_steps(steps, leading, transposed, seed):
    torch.manual_seed(seed)
    operands = draw(*leading, steps=steps)
    if transposed and leading:
        operands = tuple(x.mT.contiguous().mT for x in operands)
    copies, direction = [x.clone() for x in operands], torch.randn(*leading, steps).double()
    got, expected = (gradients(function, operands, direction) for function in (chained, step_by_step))
    assert_close(got, expected)
    assert got[0].grad_fn.name() == "_ChainedBackward"
    assert_close(list(operands), copies, rtol=0, atol=0)


@given(st.integers(1, 40), st.lists(st.integers(0, 3), max_size=2), st.integers(0, 99))
def test_blocks_are_steps(steps, leading, seed):
    torch.manual_seed(seed)
    operands, direction = draw(*leading, steps=steps), torch.randn(*leading, steps).double()
    assert_close(*[gradients(function, operands, direction) for function in (_in_blocks, step_by_step)])


def test_blocks_of_a_length_that_the_compiler_does_not_know():
    torch.compiler.reset()
    compiled = torch.compile(chained, fullgraph=True, backend="aot_eager")
    for steps in (5, 9, 10, 30):
        operands = draw(2, steps=steps)
        assert_close(compiled(*operands), step_by_step(*operands))


both = pytest.mark.parametrize("chained", [chained, _in_blocks], ids=["rounds", "blocks"])


def test_variants(variant):
    operands = draw(3, steps=6)
    assert_close(variant(chained)(*operands), step_by_step(*operands))
    derivative = variant(lambda *x: grad(lambda *y: chained(*y).square().sum(), (0, 1, 2, 3))(*x))(*operands)
    assert_close(derivative, grad(lambda *y: step_by_step(*y).square().sum(), (0, 1, 2, 3))(*operands))


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
@pytest.mark.parametrize("steps", [1, 2, 13])
def test_probabilities_take_a_shorter_way(steps, bad):
    reward, bootstrap, known, chain = draw(3, steps=steps)
    known, chain = known.abs().clamp_max(1), chain.abs().clamp_max(1)
    reward[0, steps // 2], bootstrap[1, steps // 2] = bad, bad
    operands = reward, bootstrap, known, chain
    expected = gradients(step_by_step, operands, torch.ones_like(chain))
    got = gradients(lambda *x: chained(*x, probabilities=True), operands, torch.ones_like(chain))
    assert_close(got, expected, equal_nan=True)


@pytest.mark.parametrize("knobs", [{}, {"discount": torch.tensor(0.5)}, {"lmbda": torch.tensor(0.5)}])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float64])
def test_only_what_is_sure_counts_as_probabilities(knobs, dtype, monkeypatch):
    seen = []
    whole = returns.chained
    monkeypatch.setattr(returns, "chained", lambda *x, **how: (seen.append(how), whole(*x, **how))[1])
    returns.lambda_return(*draw(2, steps=4)[:2], torch.ones(2, 5, dtype=dtype), **{"discount": 0.9, **knobs})
    assert seen == [{"probabilities": dtype == torch.bool and not knobs}]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["reward", "bootstrap"])
@both
def test_what_weighs_nothing_adds_nothing(chained, bad, where):
    reward, bootstrap, known, chain = draw(steps=9)
    chain[4], known[5] = 0.0, 0.0
    (reward if where == "reward" else bootstrap)[6] = bad
    operands = reward, bootstrap, known, chain
    y = chained(*operands)
    assert_close(y, step_by_step(*operands), equal_nan=True)
    assert y[:5].isfinite().all()
    rows = torch.where(y.isfinite(), 1.0, 0.0).double()
    got, expected = gradients(chained, operands, rows), gradients(step_by_step, operands, rows)
    if chained is _in_blocks:
        # The weight 0 of a future that is not finite has no derivative; in blocks there may be one of its finite part.
        assert got[4].isfinite().all()
        got, expected = got[:4], expected[:4]
    assert_close(got, expected, equal_nan=True)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e300])
@both
def test_what_is_behind_an_end_may_weigh_anything(chained, bad):
    reward, bootstrap, known, chain = draw(steps=9)
    chain[4], known[4], chain[5:], known[5:] = 0.0, 0.0, bad, bad
    y = chained(reward, bootstrap, known, chain)
    assert_close(y[:5], step_by_step(reward, bootstrap, known, chain)[:5])
    assert y[:5].isfinite().all()


@pytest.mark.parametrize("wanted", [(), (0,), (1,), (3,), (0, 1, 2, 3)])
@pytest.mark.parametrize("steps", [1, 5])
def test_the_result_is_as_any_other(wanted, steps):
    operands = draw(2, 3, steps=steps)
    for i in wanted:
        operands[i].requires_grad_()
    y = chained(*(x.mT.contiguous().mT for x in operands))
    expected = y.detach().clone()
    assert_close(y.view(-1), expected.flatten())
    doubled = y.mul_(2).add_(torch.ones_like(y).requires_grad_())
    assert_close(doubled, 2 * expected + 1)
    if wanted:
        got = torch.autograd.grad(doubled.sum(), [operands[i] for i in wanted])
        plain = torch.autograd.grad(2 * step_by_step(*operands).sum(), [operands[i] for i in wanted])
        assert_close(got, plain)


def test_constants_of_inference_mode():
    reward, bootstrap, known, chain = draw(2, steps=4)
    with torch.inference_mode():
        made_there = reward.clone()
    (got,) = torch.autograd.grad(chained(made_there, bootstrap.requires_grad_(), known, chain).sum(), bootstrap)
    assert_close(got, torch.autograd.grad(chained(reward, bootstrap, known, chain).sum(), bootstrap)[0])


@both
def test_entries_0_are_never_read(chained):
    reward, bootstrap, known, chain = draw(2, steps=4)
    expected = chained(reward, bootstrap, known, chain)
    reward[:, 0], bootstrap[:, 0] = math.nan, math.nan
    assert_close(chained(reward, bootstrap, known, chain), expected)


@both
def test_derivatives_of_all_orders(chained):
    operands = [x.requires_grad_() for x in draw(2, steps=3)]
    options = {"check_batched_grad": True}
    assert gradcheck(chained, operands, **options, check_forward_ad=True, check_batched_forward_grad=True)
    assert gradgradcheck(chained, operands, **options, check_fwd_over_rev=True)


@both
def test_derivative_by_weights_of_zero(chained):
    reward, bootstrap = torch.tensor([9.0, 1, 2]), torch.tensor([9.0, 3, 4])
    zeros = torch.zeros(2)
    _, _, _, by_known, by_chain = gradients(chained, (reward, bootstrap, zeros, zeros), torch.ones(2))
    assert_close(by_known, bootstrap[1:])
    assert_close(by_chain, torch.tensor([2.0, 4.0]))


def test_transforms_and_forward_mode_get_blocks(monkeypatch):
    operands, calls = draw(2, steps=3), []
    monkeypatch.setattr(recurrence, "_in_blocks", lambda *x: (calls.append(1), _in_blocks(*x))[1])
    vmap(chained)(*operands)
    jvp(chained, operands, operands)
    grad(lambda *x: chained(*x).sum())(*operands)
    with forward_ad.dual_level():
        chained(forward_ad.make_dual(operands[0], operands[0]), *operands[1:])
    assert len(calls) == 4
    chained(*operands)
    gradients(chained, operands, torch.ones(2, 3).double())
    assert len(calls) == 4


def test_a_graph_can_be_walked_twice():
    leaves = [x.requires_grad_() for x in draw(3, steps=5)]
    y = chained(*leaves)
    first, second = (torch.autograd.grad(y.sum(), leaves, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
