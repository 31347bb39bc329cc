"""symlog and symexp against their formulas, the author's numbers and finite differences."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from rlloss import symexp, symlog

FUNCTIONS = {"symlog": symlog, "symexp": symexp}
ORACLES = {
    "symlog": lambda x: math.copysign(math.log1p(abs(x)), x),
    "symexp": lambda x: math.copysign(math.expm1(abs(x)), x),
}
SLOPES = {"symlog": lambda x: 1 / (1 + abs(x)), "symexp": lambda x: math.exp(abs(x))}
POINTS = [-30.0, -2.5, -1.0, -1e-3, -1e-8, 0.0, 1e-8, 1e-3, 0.5, 1.0, 7.0, 20.0]
TOLERANCE = {torch.float64: {"rtol": 1e-12, "atol": 0.0}, torch.float32: {"rtol": 1e-5, "atol": 0.0}}

both = pytest.mark.parametrize("name", FUNCTIONS)


@both
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_value_is_the_formula(variant, name, dtype):
    x = torch.tensor(POINTS, dtype=dtype).reshape(3, 4)
    expected = torch.tensor([ORACLES[name](v) for v in x.flatten().tolist()], dtype=dtype).reshape(3, 4)
    assert_close(variant(FUNCTIONS[name])(x), expected, **TOLERANCE[dtype])


@both
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_gradient_is_the_formula(variant, name, dtype):
    x = torch.tensor(POINTS, dtype=dtype)
    expected = torch.tensor([SLOPES[name](v) for v in x.tolist()], dtype=dtype)
    gradient = variant(torch.func.grad(lambda x: FUNCTIONS[name](x).sum()))(x)
    assert_close(gradient, expected, **TOLERANCE[dtype])


@both
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_golden(golden, name, dtype):
    file, argument = golden("01_symlog"), {"symlog": "x", "symexp": "y"}[name]
    tolerance = {"rtol": 1e-6 if dtype == torch.float64 else 1e-5, "atol": 0.0}
    x = file[f"random.in.{argument}"].to(dtype)
    assert_close(FUNCTIONS[name](x), file[f"random.out.{name}"].to(dtype), **tolerance)
    gradient = torch.func.grad(lambda x: FUNCTIONS[name](x).sum())(x)
    assert_close(gradient, file[f"random.grad.{name}"].to(dtype), rtol=1e-5, atol=0.0)


@both
def test_golden_at_zero_but_for_the_gradient(golden, name):
    # The author's composition of sign and abs has gradient 0 at 0; ours has the mathematical 1 (and so has torchrl's).
    file, argument = golden("01_symlog"), {"symlog": "x", "symexp": "y"}[name]
    zero = file[f"zero.in.{argument}"]
    assert_close(FUNCTIONS[name](zero), file[f"zero.out.{name}"], rtol=0, atol=0)
    assert not file[f"zero.grad.{name}"].any()
    assert_close(torch.func.grad(lambda x: FUNCTIONS[name](x).sum())(zero), torch.ones_like(zero), rtol=0, atol=0)


@pytest.mark.parametrize("case", ["symlog_mse_vec", "symlog_mse_mat", "symlog_mse_scalar"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_golden_squared_error_in_symlog_space(golden, case, dtype):
    file = golden("04_outs")
    mean, target = file[f"{case}.in.mean"].to(dtype), file[f"{case}.in.target"].to(dtype)

    def loss(mean):
        return (mean - symlog(target)).square().reshape(3, 4, -1).sum(-1)

    expected = file[f"{case}.out.loss"].to(dtype)
    assert_close(loss(mean), expected, rtol=1e-6 if dtype == torch.float64 else 1e-5, atol=0.0)
    gradient = torch.func.grad(lambda mean: loss(mean).sum())(mean)
    assert_close(gradient, file[f"{case}.grad.loss.mean"].to(dtype), rtol=1e-5, atol=1e-6)


def test_edges_of_the_numbers():
    inf, nan = math.inf, math.nan
    assert symlog(torch.tensor(1e-8)).item() == pytest.approx(1e-8, rel=1e-6)
    assert symexp(torch.tensor(1e-8)).item() == pytest.approx(1e-8, rel=1e-6)
    assert symexp(torch.tensor(88.0)).item() == pytest.approx(1.6516363e38, rel=1e-5)
    assert symexp(torch.tensor([89.0, -89.0])).tolist() == [inf, -inf]
    assert symlog(torch.tensor([inf, -inf])).tolist() == [inf, -inf]
    assert symlog(torch.tensor([nan])).isnan().all()
    assert symexp(torch.tensor([nan])).isnan().all()
    assert symlog(torch.tensor(torch.finfo(torch.float32).max)).isfinite()


@both
def test_the_sign_of_zero_stays(name):
    assert torch.signbit(FUNCTIONS[name](torch.tensor([-0.0, 0.0]))).tolist() == [True, False]


@both
def test_the_second_derivative_at_zero_is_zero(name):
    """Halfway between -1 and 1 (or 1 and -1), to which it tends from the left and from the right."""
    second = torch.func.grad(torch.func.grad(FUNCTIONS[name]))
    assert second(torch.tensor(0.0)) == second(torch.tensor(-0.0)) == 0


def test_a_zero_initialised_head_gets_a_gradient():
    features, target = torch.tensor([1.0, -2.0]), torch.tensor(3.0)
    gradient = torch.func.grad(lambda w: (symlog(features @ w) - symlog(target)).square())(torch.zeros(2))
    assert_close(gradient, -2 * symlog(target) * features)


@given(st.floats(-1e12, 1e12))
def test_symexp_inverts_symlog(x):
    x = torch.tensor(x, dtype=torch.float64)
    assert_close(symexp(symlog(x)), x, rtol=1e-12, atol=0.0)


@given(st.floats(-700, 700))
def test_symlog_inverts_symexp(x):
    x = torch.tensor(x, dtype=torch.float64)
    assert_close(symlog(symexp(x)), x, rtol=1e-12, atol=0.0)


@both
@given(x=st.floats(-80, 80, width=32), y=st.floats(-80, 80, width=32))
def test_odd_and_monotone(name, x, y):
    at_x, at_y = FUNCTIONS[name](torch.tensor([x, y]))
    assert (at_x <= at_y) == (x <= y) or at_x == at_y
    assert FUNCTIONS[name](torch.tensor(-x)) == -at_x


@both
def test_derivatives_against_finite_differences(name):
    x = torch.tensor([-3.0, -0.7, 0.2, 2.5], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(FUNCTIONS[name], x, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(FUNCTIONS[name], x, check_fwd_over_rev=True)


@both
def test_derivatives_at_zero(name):
    function, zero = FUNCTIONS[name], torch.zeros((), dtype=torch.float64)
    assert torch.func.jvp(function, (zero,), (torch.ones_like(zero),))[1] == 1
    assert torch.func.grad(function)(zero) == 1
    assert torch.func.grad(torch.func.grad(function))(zero).isfinite()


@both
@pytest.mark.parametrize(
    ("dtype", "result"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.int64, torch.float32),
        (torch.uint8, torch.float32),
    ],
)
def test_dtypes(name, dtype, result):
    x = torch.tensor([0, 1, 3], dtype=dtype)
    y = FUNCTIONS[name](x)
    assert y.dtype == result
    assert_close(y, FUNCTIONS[name](x.to(result)), rtol=0, atol=0)


@both
@pytest.mark.parametrize("shape", [(), (1,), (2, 0, 3)])
def test_shapes(variant, name, shape):
    assert variant(FUNCTIONS[name])(torch.ones(shape)).shape == shape


@both
@pytest.mark.parametrize(
    ("x", "got"),
    [
        (torch.tensor([True]), r"a tensor of numbers, got bool \[1\]"),
        (torch.tensor([1j]), r"a tensor of numbers, got complex64 \[1\]"),
        (1.0, r"a tensor, got float 1.0"),
        ([1.0], r"a tensor, got list \[1.0\]"),
        (None, r"a tensor, got NoneType"),
    ],
)
def test_errors(name, x, got):
    with pytest.raises(TypeError, match=rf"^{name}: x must be {got}\.$"):
        FUNCTIONS[name](x)


@both
def test_pure(name):
    x = torch.randn(5, 3)
    before, generator = x.clone(), torch.get_rng_state()
    first, second = FUNCTIONS[name](x), FUNCTIONS[name](x)
    assert torch.equal(first, second)
    assert torch.equal(x, before)
    assert torch.equal(torch.get_rng_state(), generator)


@both
def test_reads_no_value(name):
    assert FUNCTIONS[name](torch.ones(2, 3, device="meta")).shape == (2, 3)


@both
def test_second_call_does_not_recompile(name):
    torch.compiler.reset()
    compiled = torch.compile(FUNCTIONS[name], fullgraph=True, backend="aot_eager")
    for step in range(3):
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            compiled(torch.randn(4, 3))
