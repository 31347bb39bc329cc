"""Lambda returns against a float64 loop, the author's numbers, and what must not leak past the end of an episode."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad, jvp, vmap
from torch.testing import assert_close

from rlloss import lambda_return

TOLERANCE = {torch.float64: {"rtol": 1e-6, "atol": 1e-7}, torch.float32: {"rtol": 1e-5, "atol": 1e-5}}
CASES = ["t2", "t3", "t5", "t16", "t65", "lam0", "lam1", "disc1_soft", "noflags"]
DISCOUNT = 332 / 333

both = pytest.mark.parametrize("dtype", TOLERANCE)


def oracle(reward, bootstrap, continuation, last, discount, lmbda):
    """The recursion, written for one sequence of Python numbers."""
    value, values = bootstrap[-1], []
    for t in range(len(reward) - 2, -1, -1):
        chain = 0.0 if last[t + 1] else lmbda
        value = reward[t + 1] + discount * continuation[t + 1] * ((1 - chain) * bootstrap[t + 1] + chain * value)
        values.insert(0, value)
    return values


def draw(*shape, dtype=torch.float64):
    continuation = torch.where(torch.rand(shape) < 0.3, 0.0, torch.rand(shape)).to(dtype)
    return torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype), continuation, torch.rand(shape) < 0.3


def loops(sequences, discount, lmbda):
    rows = zip(*(x.reshape(-1, x.shape[-1]).tolist() for x in sequences), strict=True)
    values = torch.tensor([oracle(*row, discount, lmbda) for row in rows], dtype=torch.float64)
    return values.reshape(*sequences[0].shape[:-1], sequences[0].shape[-1] - 1)


@both
@pytest.mark.parametrize("shape", [(2,), (6,), (3, 5), (2, 3, 4), (0, 4), (1, 2)])
def test_value_is_the_recursion(dtype, shape):
    sequences = draw(*shape, dtype=dtype)
    values = lambda_return(*sequences, discount=0.9, lmbda=0.7)
    assert values.dtype == dtype
    assert values.shape == (*shape[:-1], shape[-1] - 1)
    assert_close(values, loops(sequences, 0.9, 0.7).to(dtype), **TOLERANCE[dtype])


@both
def test_variants(variant, dtype):
    *sequences, last = draw(3, 6, dtype=dtype)

    def both_ways(reward, bootstrap, continuation, last, discount):
        call = partial(lambda_return, reward, bootstrap, discount=discount)
        return call(continuation, last, lmbda=0.8), call(continuation > 0.5)

    cut, whole = variant(both_ways)(*sequences, last, torch.tensor(0.9, dtype=dtype))
    assert_close(cut, loops((*sequences, last), 0.9, 0.8).to(dtype), **TOLERANCE[dtype])
    hard = (*sequences[:2], (sequences[2] > 0.5).to(dtype), torch.zeros_like(last))
    assert_close(whole, loops(hard, 0.9, 0.95).to(dtype), **TOLERANCE[dtype])


@pytest.mark.parametrize("case", CASES)
@both
def test_golden(golden, case, dtype, variant):
    file, knobs = golden("05_lambda_return"), golden("05_lambda_return").meta["cases"][case]
    reward, bootstrap, cotangent = (file[f"{case}.in.{name}"].to(dtype) for name in ("rew", "boot", "ct"))
    continuation, last = 1 - file[f"{case}.in.term"].to(dtype), file[f"{case}.in.last"].bool()

    def returns(reward, bootstrap):
        return lambda_return(reward, bootstrap, continuation, last, discount=knobs["disc"], lmbda=knobs["lam"])

    def both(reward, bootstrap):
        values, pull = torch.func.vjp(returns, reward, bootstrap)
        return values, *pull(cotangent)

    values, *gradients = variant(both)(reward, bootstrap)
    assert_close(values, file[f"{case}.out.ret"].to(dtype), **TOLERANCE[dtype])
    for gradient, name in zip(gradients, ("rew", "boot"), strict=True):
        assert_close(gradient, file[f"{case}.grad.{name}"].to(dtype), rtol=1e-5, atol=1e-6)


REWARD, BOOTSTRAP = torch.tensor([9.0, 1, 2, 3, 4]), torch.tensor([100.0, 10, 20, 30, 40])
NO, YES = torch.zeros(5, dtype=torch.bool), torch.ones(5, dtype=torch.bool)
ONLY_2 = torch.arange(5) == 2


@pytest.mark.parametrize(
    ("terminated", "last", "lmbda", "expected"),
    [
        (NO, NO, 0.95, [45.65354, 46.61899, 46.0562, 43.87988]),
        (NO, None, 0.95, [45.65354, 46.61899, 46.0562, 43.87988]),
        (NO, NO, 0.0, [10.96997, 21.93994, 32.909912, 43.87988]),
        (NO, NO, 1.0, [49.461754, 48.607723, 46.748108, 43.87988]),
        (YES, NO, 0.95, [1.0, 2.0, 3.0, 4.0]),
        (NO, YES, 0.95, [10.96997, 21.93994, 32.909912, 43.87988]),
        (ONLY_2, NO, 0.95, [3.392793, 2.0, 46.0562, 43.87988]),
        (NO, ONLY_2, 0.95, [22.27885, 21.93994, 46.0562, 43.87988]),
    ],
)
def test_known_values(terminated, last, lmbda, expected):
    values = lambda_return(REWARD, BOOTSTRAP, ~terminated, last, discount=DISCOUNT, lmbda=lmbda)
    assert_close(values, torch.tensor(expected), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("lmbda", [0.0, 0.5, 1.0])
def test_two_steps_give_one_value(lmbda):
    reward, bootstrap, continuation, last = draw(4, 2)
    values = lambda_return(reward, bootstrap, continuation, last, discount=0.9, lmbda=lmbda)
    assert_close(values, (reward + 0.9 * continuation * bootstrap)[:, 1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_step_gives_no_value(variant, dtype):
    values = variant(partial(lambda_return, discount=0.9))(*(x.to(dtype) for x in draw(3, 1)[:3]))
    assert values.shape == (3, 0)
    assert values.dtype == torch.float32


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nothing_follows_a_terminal_step_not_even_in_a_gradient(variant, bad):
    reward, bootstrap, gone = torch.randn(2, 5), torch.full((2, 5), bad), torch.zeros(2, 5)

    def returns(reward, bootstrap, continuation, discount):
        return lambda_return(reward, bootstrap, continuation, discount=discount)

    def loss(*args):
        values = returns(*args)
        return values.sum(), values

    arguments = (reward, bootstrap, gone, torch.tensor(0.9))
    gradients, values = variant(grad(loss, (0, 1, 2, 3), has_aux=True))(*arguments)
    assert torch.equal(values, reward[:, 1:])
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert gradients[0].tolist() == [[0.0, 1.0, 1.0, 1.0, 1.0]] * 2
    assert not gradients[1].any()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_comes_after_an_end_reaches_nothing_before_it(bad):
    reward, bootstrap, continuation = torch.randn(6), torch.randn(6), torch.ones(6)
    ends = {"terminated": (torch.arange(6) != 3, None), "cut": (continuation, torch.arange(6) == 3)}
    for name, (going_on, last) in ends.items():
        clean = lambda_return(reward, bootstrap, going_on, last, discount=0.9)
        after = torch.arange(6) > 3
        poisoned = (torch.where(after, bad, reward), torch.where(after, bad, bootstrap))

        def first(reward, bootstrap, going_on=going_on, last=last):
            return lambda_return(reward, bootstrap, going_on, last, discount=0.9)[:3]

        assert torch.equal(first(*poisoned), clean[:3]), name
        gradients = grad(lambda *args: first(*args).sum(), (0, 1))(*poisoned)
        expected = grad(lambda *args: first(*args).sum(), (0, 1))(reward, bootstrap)
        assert_close(gradients, expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_index_0_is_never_read(bad):
    reward, bootstrap, continuation, last = draw(3, 5)
    first = torch.arange(5) == 0

    def loss(reward, bootstrap, continuation, last):
        values = lambda_return(reward, bootstrap, continuation, last, discount=0.9)
        return values.sum(), values

    poisoned = [torch.where(first, bad, x) for x in (reward, bootstrap, continuation)]
    gradients, values = grad(loss, (0, 1, 2), has_aux=True)(*poisoned, last ^ first)
    expected = grad(loss, (0, 1, 2), has_aux=True)(reward, bootstrap, continuation, last)
    assert_close((gradients, values), expected)
    assert not any(gradient[:, 0].any() for gradient in gradients)


def test_bootstrap_that_weighs_nothing_is_not_read():
    bootstrap = torch.tensor([math.nan, math.nan, math.inf, 2.0])
    values = lambda_return(torch.ones(4), bootstrap, torch.ones(4), discount=0.5, lmbda=1.0)
    assert_close(values, torch.tensor([2.0, 2.0, 2.0]))
    assert torch.equal(lambda_return(torch.ones(4), bootstrap, torch.ones(4), discount=0.0), torch.ones(3))


def test_a_bootstrap_that_counts_is_not_hidden():
    values = lambda_return(torch.ones(4), torch.tensor([0.0, 0, math.nan, 0]), torch.ones(4), discount=0.5)
    assert values.isnan().tolist() == [True, True, False]


@pytest.mark.parametrize(("discount", "lmbda"), [(0.9, 0.6), (0.0, 0.5), (0.9, 0.0), (0.9, 1.0), (1.0, 1.0)])
def test_derivatives_are_those_of_finite_differences(discount, lmbda):
    reward, bootstrap, continuation, last = draw(2, 4)
    knobs = [torch.tensor(k, dtype=torch.float64) for k in (discount, lmbda)]
    inputs = [x.requires_grad_() for x in (reward, bootstrap, continuation, *knobs)]

    def returns(reward, bootstrap, continuation, discount, lmbda):
        return lambda_return(reward, bootstrap, continuation, last, discount=discount, lmbda=lmbda)

    # Continuation is 0 in places, discount and lambda at the ends of their ranges: derivatives exist there.
    assert (continuation == 0).any()
    assert torch.autograd.gradcheck(returns, inputs, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(returns, inputs)


def test_knobs_batch(variant):
    reward, bootstrap, continuation, last = draw(3, 5)
    discounts, lmbdas = torch.tensor([0.0, 0.5, 0.99]), torch.tensor([1.0, 0.0, 0.9])
    several = variant(
        lambda d, k: vmap(lambda d, k: lambda_return(reward, bootstrap, continuation, last, discount=d, lmbda=k))(d, k)
    )(discounts, lmbdas)
    for value, d, k in zip(several, discounts.double(), lmbdas.double(), strict=True):
        assert_close(
            value, lambda_return(reward, bootstrap, continuation, last, discount=d, lmbda=k), **TOLERANCE[torch.float32]
        )


def test_transforms_compose(variant):
    reward, bootstrap, continuation, last = draw(2, 4)

    def curvature(reward, bootstrap, continuation, last):
        def slope(bootstrap):
            return grad(lambda b: lambda_return(reward, b, continuation, last, discount=0.9).square().sum())(bootstrap)

        return jvp(slope, (bootstrap,), (torch.ones_like(bootstrap),))[1]

    def linear(bootstrap):
        return lambda_return(torch.zeros_like(reward), bootstrap, continuation, last, discount=0.9)

    # Returns are linear in the bootstrap, R = M b + ..., so that the Hessian of their squares is 2 M^T M.
    (expected,) = torch.func.vjp(linear, bootstrap)[1](2 * linear(torch.ones_like(bootstrap)))
    assert_close(variant(curvature)(reward, bootstrap, continuation, last), expected)


@given(st.integers(2, 8), st.floats(0, 1), st.floats(0, 1), st.integers(0, 99))
def test_any_sequence(steps, discount, lmbda, seed):
    torch.manual_seed(seed)
    reward, bootstrap, continuation, last = draw(2, steps)
    call = partial(lambda_return, continuation=continuation, last=last, discount=discount, lmbda=lmbda)
    values = call(reward, bootstrap)
    assert_close(values, loops((reward, bootstrap, continuation, last), discount, lmbda))
    # Linear in rewards and values, and no larger than the geometric sum allows.
    assert_close(call(3 * reward, 3 * bootstrap), 3 * values)
    assert_close(call(reward, torch.zeros_like(bootstrap)) + call(torch.zeros_like(reward), bootstrap), values)
    assert (values.abs() <= steps * reward.abs().max() + bootstrap.abs().max() + 1e-9).all()
    # A longer sequence has the same first returns once an episode has ended between.
    last = last.clone()
    last[:, -1] = True
    longer = [torch.cat([x, torch.randn_like(x)], -1) for x in (reward, bootstrap)]
    flags = (torch.cat([continuation, torch.ones_like(continuation)], -1), torch.cat([last, last], -1))
    values = lambda_return(reward, bootstrap, continuation, last, discount=discount, lmbda=lmbda)
    assert_close(lambda_return(*longer, *flags, discount=discount, lmbda=lmbda)[:, : steps - 1], values)


@given(st.floats(-5, 5), st.floats(0, 0.99), st.floats(0, 1))
def test_a_true_value_is_its_own_return(reward, discount, lmbda):
    value = torch.full((6,), reward / (1 - discount), dtype=torch.float64)
    rewards = torch.full((6,), reward, dtype=torch.float64)
    values = lambda_return(rewards, value, torch.ones(6), discount=discount, lmbda=lmbda)
    assert_close(values, value[1:], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64])
def test_narrow_inputs_are_computed_in_float32(dtype):
    reward, bootstrap = (torch.randn(3, 5) * 3).to(dtype), (torch.randn(3, 5) * 3).to(dtype)
    continuation = torch.randint(0, 2, (3, 5)).to(dtype)
    values = lambda_return(reward, bootstrap, continuation, discount=0.9)
    assert values.dtype == torch.float32
    assert torch.equal(values, lambda_return(reward.float(), bootstrap.float(), continuation.float(), discount=0.9))
    assert torch.equal(values, lambda_return(reward, bootstrap, continuation.bool(), discount=0.9))
    assert lambda_return(reward, bootstrap.double(), continuation, discount=0.9).dtype == torch.float64


def test_pure():
    arguments = draw(3, 4)
    before, generator = [x.clone() for x in arguments], torch.get_rng_state()
    first, second = (lambda_return(*arguments, discount=0.9) for _ in range(2))
    assert torch.equal(first, second)
    assert all(torch.equal(x, y) for x, y in zip(before, arguments, strict=True))
    assert torch.equal(torch.get_rng_state(), generator)


def test_reads_no_value():
    reward, bootstrap, continuation, last = (x.to("meta") for x in draw(3, 4))
    assert lambda_return(reward, bootstrap, continuation, last, discount=0.9).shape == (3, 3)


def test_second_call_does_not_recompile():
    torch.compiler.reset()
    compiled = torch.compile(lambda_return, fullgraph=True, backend="aot_eager")
    for step, discount in enumerate((0.9, 0.5, 0.0)):
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            compiled(*draw(3, 4), discount=torch.tensor(discount), lmbda=torch.tensor(1 - discount))


X = torch.ones(2, 3)
call = partial(lambda_return, discount=0.9)
ERRORS = [
    (lambda: call([1.0], X, X), TypeError, r"^lambda_return: reward must be a tensor, got list"),
    (lambda: call(X > 0, X, X), TypeError, r"^lambda_return: reward must be a tensor of numbers, got bool \[2, 3\]"),
    (lambda: call(X, X > 0, X), TypeError, r"^lambda_return: bootstrap must be a tensor of numbers, got bool \[2, 3\]"),
    (lambda: call(X, X, None), TypeError, "^lambda_return: continuation must be a tensor, got NoneType"),
    (
        lambda: call(X, X, X.cfloat()),
        TypeError,
        "^lambda_return: continuation must be a tensor of numbers, got complex64",
    ),
    (lambda: call(X, X, X, X), TypeError, r"^lambda_return: last must be a bool tensor, got float32 \[2, 3\]"),
    (lambda: call(torch.tensor(1.0), X, X), ValueError, r"reward must be of shape \[\.\.\., T\], got float32 \[\]"),
    (
        lambda: call(torch.ones(2, 0), torch.ones(2, 0), torch.ones(2, 0)),
        ValueError,
        r"^lambda_return: reward must be of at least one step, got float32 \[2, 0\]",
    ),
    (
        lambda: call(X, torch.ones(2, 4), X),
        ValueError,
        r"^lambda_return: bootstrap must be of shape \[2, 3\] like reward, got float32 \[2, 4\]",
    ),
    (
        lambda: call(X, X, torch.ones(3, 2)),
        ValueError,
        r"^lambda_return: continuation must be of shape \[2, 3\] like reward, .* Did you pass time first\?",
    ),
    (
        lambda: call(X, X, X, torch.ones(2) > 0),
        ValueError,
        r"^lambda_return: last must be of shape \[2, 3\] like reward, got bool \[2\]",
    ),
    (
        lambda: lambda_return(X, X, X, discount=1.1),
        ValueError,
        r"^lambda_return: discount must be in \[0, 1\], got 1\.1",
    ),
    (
        lambda: lambda_return(X, X, X, discount=torch.ones(2)),
        ValueError,
        r"^lambda_return: discount must be a number or a 0-d tensor, got float32 \[2\]",
    ),
    (lambda: call(X, X, X, lmbda=-0.1), ValueError, r"^lambda_return: lmbda must be in \[0, 1\], got -0\.1"),
    (lambda: call(X, X, X, lmbda="1"), TypeError, r"^lambda_return: lmbda must be a number or a 0-d tensor, got str"),
]


@pytest.mark.parametrize(("call", "error", "text"), ERRORS, ids=range(len(ERRORS)))
def test_errors(call, error, text):
    with pytest.raises(error, match=text):
        call()
