"""Two-hot regression against loops over the formula, the author's numbers and finite differences."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing import assert_close

from rlloss import symexp, symexp_bins, symlog, two_hot_cross_entropy, two_hot_decode, two_hot_encode
from rlloss.two_hot import bins_for

TOLERANCE = {torch.float64: {"rtol": 1e-6, "atol": 1e-9}, torch.float32: {"rtol": 1e-5, "atol": 1e-6}}
GRID = [-5.0, -2.0, -0.5, 0.0, 1.0, 10.0]
TARGETS = [-5.0, 10.0, 0.0, -0.0, 1.0, -1.25, 3.0, -1e9, 1e9, math.inf, -math.inf, 9.999]

both = pytest.mark.parametrize("dtype", TOLERANCE)


def encode_oracle(x: float, bins: list[float]) -> list[float]:
    row, x = [0.0] * len(bins), min(max(x, bins[0]), bins[-1])
    k = max(k for k in range(len(bins) - 1) if bins[k] <= x)
    row[k] = (bins[k + 1] - x) / (bins[k + 1] - bins[k])
    row[k + 1] = (x - bins[k]) / (bins[k + 1] - bins[k])
    return row


def log_softmax_oracle(logits: list[float]) -> list[float]:
    top = max(logits)
    normalizer = top + math.log(math.fsum(math.exp(v - top) for v in logits))
    return [v - normalizer for v in logits]


def decode_oracle(logits: list[float], bins: list[float]) -> float:
    return math.fsum(math.exp(v) * b for v, b in zip(log_softmax_oracle(logits), bins, strict=True))


def cross_entropy_oracle(logits: list[float], target: float, bins: list[float]) -> float:
    pairs = zip(encode_oracle(target, bins), log_softmax_oracle(logits), strict=True)
    return -math.fsum(w * v for w, v in pairs if w > 0)


def cross_entropy_gradient_oracle(logits: list[float], target: float, bins: list[float]) -> list[float]:
    pairs = zip(log_softmax_oracle(logits), encode_oracle(target, bins), strict=True)
    return [math.exp(v) - w for v, w in pairs]


def decode_gradient_oracle(logits: list[float], bins: list[float]) -> list[float]:
    mean = decode_oracle(logits, bins)
    return [math.exp(v) * (b - mean) for v, b in zip(log_softmax_oracle(logits), bins, strict=True)]


def summed(function, argnums=0):
    return torch.func.grad(lambda *args: function(*args).sum(), argnums)


# Bins


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_bins_increase_and_mirror_for_any_number(dtype):
    for num_bins in range(2, 400):
        bins = symexp_bins(num_bins, dtype=dtype)
        assert bins.dtype == dtype
        assert bins.shape == (num_bins,)
        assert (bins[1:] > bins[:-1]).all()
        assert torch.equal(bins, -bins.flip(0))
        assert (bins == 0).sum() == num_bins % 2
        assert not torch.signbit(bins[num_bins // 2])


@both
def test_bins_are_the_formula(dtype):
    for num_bins, low, high in [(7, -20.0, 20.0), (8, -20.0, 20.0), (255, -20.0, 20.0), (5, -1.0, 3.0), (6, 0.0, 2.0)]:
        expected = []
        for k in range(num_bins):
            place = low + k * (high - low) / (num_bins - 1)
            expected.append(math.copysign(math.expm1(abs(place)), place))
        tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 4e-6, "atol": 1e-6}
        assert_close(symexp_bins(num_bins, low, high, dtype=dtype), torch.tensor(expected, dtype=dtype), **tolerance)


def test_bins_of_the_paper():
    bins = symexp_bins()
    assert bins.dtype == torch.float32
    assert bins[[0, 127, 254]].tolist() == [-485165184.0, 0.0, 485165184.0]
    assert_close(bins[[1, 128]], torch.tensor([-414473568.0, 0.17055759]), rtol=4e-6, atol=0.0)
    assert_close(symexp_bins(5)[3:], torch.tensor([22025.465, 4.8516518e8]), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("num_bins", [255, 41])
def test_golden_bins_of_an_odd_number(golden, num_bins):
    file = golden("02_twohot")
    assert_close(symexp_bins(num_bins, dtype=torch.float64), file[f"b{num_bins}.bins_f64"], rtol=1e-12, atol=0.0)
    assert_close(symexp_bins(num_bins), file[f"b{num_bins}.bins"].float(), rtol=4e-6, atol=0.0)


@pytest.mark.parametrize("num_bins", [255, 41, 16])
def test_golden_bins_of_torchrl(golden, num_bins):
    expected = golden("10b_torchrl_functions")[f"twohot_b{num_bins}.bins"]
    assert_close(symexp_bins(num_bins), expected.float(), rtol=1e-5, atol=0.0)


def test_bins_of_an_even_number_have_no_zero_where_the_authors_have_two(golden):
    official = golden("02_twohot")["b16.bins"]
    assert (official == 0).sum() == 2
    assert (symexp_bins(16) != 0).all()


def test_bins_work_inside_every_variant(variant):
    assert_close(variant(lambda x: x * symexp_bins(9))(torch.ones(9)), symexp_bins(9), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"num_bins": 1}, ValueError, "num_bins must be at least 2, got 1"),
        ({"num_bins": 0}, ValueError, "num_bins must be at least 2, got 0"),
        ({"low": 20.0}, ValueError, "low must be below high=20.0, got 20.0"),
        ({"low": math.nan}, ValueError, "low must be a finite number, got nan"),
        ({"dtype": torch.int64}, TypeError, "dtype must be a floating-point dtype, got int64"),
        ({"dtype": torch.float16}, ValueError, r"low and high must be within 11\.09 of 0, .* got -20\.0 and 20\.0"),
        ({"high": 89.0}, ValueError, r"low and high must be within 88\.72 of 0, .* got -20\.0 and 89\.0"),
        ({"low": -math.inf}, ValueError, "low must be a finite number, got -inf"),
        ({"high": math.inf}, ValueError, "high must be a finite number, got inf"),
        ({"low": "a"}, TypeError, "low must be a number, got str 'a'"),
        ({"low": torch.tensor(-3.0)}, TypeError, r"low must be a number, got float32 \[\]"),
        ({"num_bins": 2.5}, TypeError, r"num_bins must be an int, got float 2\.5"),
    ],
)
def test_bins_errors(arguments, error, text):
    with pytest.raises(error, match=f"^symexp_bins: {text}"):
        symexp_bins(**arguments)


def test_bins_in_float16_where_they_are_finite():
    assert symexp_bins(41, -11.0, 11.0, dtype=torch.float16).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_bins", [2, 16, 255])
def test_bins_for_logits_are_the_same_bins(variant, num_bins, dtype):
    logits = torch.zeros(3, num_bins, dtype=dtype)
    expected = symexp_bins(num_bins, dtype=dtype).expand(3, -1)
    assert_close(variant(lambda x: x + bins_for(x))(logits), expected, rtol=0, atol=0)


def test_bins_for_logits_are_nobody_elses():
    bins_for(torch.zeros(9)).fill_(0.0)
    assert torch.equal(bins_for(torch.zeros(9)), symexp_bins(9))


def test_bins_for_logits_of_every_kind():
    parameter, meta = torch.nn.Parameter(torch.zeros(9)), torch.zeros(9, device="meta")
    assert torch.equal(bins_for(parameter), symexp_bins(9))
    assert bins_for(meta).device.type == "meta"
    with FakeTensorMode() as mode:
        assert isinstance(bins_for(mode.from_tensor(torch.zeros(9))), FakeTensor)
    with pytest.raises(ValueError, match=r"^symexp_bins: num_bins must be at least 2, got 1"):
        bins_for(torch.zeros(3, 1))


# Encode


@both
def test_encode_is_the_formula(variant, dtype):
    x, bins = torch.tensor(TARGETS, dtype=dtype).reshape(3, 4), torch.tensor(GRID, dtype=dtype)
    rows = [encode_oracle(v, GRID) for v in x.flatten().tolist()]
    weights = variant(two_hot_encode)(x, bins)
    assert weights.dtype == dtype
    assert_close(weights, torch.tensor(rows, dtype=dtype).reshape(3, 4, 6), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("num_bins", [255, 41, 16])
@both
def test_golden_encode(golden, num_bins, dtype):
    file, case = golden("10b_torchrl_functions"), f"twohot_b{num_bins}"
    bins, target = file[f"{case}.bins"].to(dtype), file[f"{case}.in.target"].to(dtype)
    assert_close(two_hot_encode(target, bins), file[f"{case}.out.encode"].to(dtype), **TOLERANCE[dtype])


def test_encode_on_a_bin_is_one_hot():
    bins = symexp_bins(255)
    for k in (0, 127, 200, 254):
        assert torch.equal(two_hot_encode(bins[k], bins), torch.eye(255)[k])
    assert torch.equal(two_hot_encode(torch.tensor(-0.0), bins), torch.eye(255)[127])


def test_encode_interpolates_between_the_bins_themselves():
    bins = symexp_bins(255)
    one, small = two_hot_encode(torch.tensor([1.0, 0.05]), bins)
    assert_close(one[131:133], torch.tensor([0.61732686, 0.38267311]), rtol=1e-5, atol=0.0)
    assert_close(small[127:129], torch.tensor([0.70684391, 0.29315612]), rtol=1e-5, atol=0.0)
    middle = two_hot_encode((bins[200] + bins[201]) / 2, bins)
    assert_close(middle[200:202], torch.tensor([0.5, 0.5]), rtol=1e-5, atol=0.0)


def test_encode_saturates_and_keeps_nan():
    bins = symexp_bins(255)
    weights = two_hot_encode(torch.tensor([1e9, math.inf, -1e9, -math.inf, math.nan]), bins)
    assert torch.equal(weights[:4], torch.eye(255)[[254, 254, 0, 0]])
    assert weights[4].isnan().any()


@given(st.floats(-4e8, 4e8), st.integers(2, 60))
def test_encode_rows_are_weights_with_the_mean_of_x(x, num_bins):
    bins = symexp_bins(num_bins, dtype=torch.float64)
    weights = two_hot_encode(torch.tensor(x, dtype=torch.float64), bins)
    assert (weights >= 0).all()
    assert (weights > 0).sum() <= 2
    assert weights.sum().item() == pytest.approx(1.0, rel=1e-12)
    assert (weights * bins).sum().item() == pytest.approx(x, rel=1e-9, abs=1e-6)


@given(st.floats(-6, 11))
def test_encode_of_the_mirrored_value_on_mirrored_bins_is_mirrored(x):
    x, bins = torch.tensor(x, dtype=torch.float64), torch.tensor(GRID, dtype=torch.float64)
    assert_close(two_hot_encode(-x, -bins.flip(0)), two_hot_encode(x, bins).flip(-1), rtol=1e-12, atol=1e-12)


@given(st.floats(-4e8, 4e8), st.integers(2, 60))
def test_decode_inverts_encode(x, num_bins):
    x, bins = torch.tensor(x, dtype=torch.float64), symexp_bins(num_bins, dtype=torch.float64)
    assert_close(two_hot_decode(two_hot_encode(x, bins).log(), bins), x, rtol=1e-9, atol=1e-6)


def test_a_support_that_holds_a_value_twice(golden):
    # The author's even grids do; a target of 0 belongs to the upper of the two zeros.
    bins = golden("02_twohot")["b16.bins"].float()
    weights = two_hot_encode(torch.tensor([0.0, 1.0, -1.0]), bins)
    assert weights.isfinite().all()
    assert weights[0, 8] == 1
    assert (weights[1, :8] == 0).all()
    assert (weights[2, 8:] == 0).all()


# Decode


@both
def test_decode_is_the_formula(variant, dtype):
    logits, bins = torch.randn(3, 2, 6, dtype=dtype) * 3, torch.tensor(GRID, dtype=dtype)
    expected = [decode_oracle(row, GRID) for row in logits.reshape(6, 6).tolist()]
    assert_close(
        variant(two_hot_decode)(logits, bins), torch.tensor(expected, dtype=dtype).reshape(3, 2), **TOLERANCE[dtype]
    )


@both
def test_decode_gradient_is_the_formula(variant, dtype):
    logits, bins = torch.randn(4, 6, dtype=dtype), torch.tensor(GRID, dtype=dtype)
    expected = torch.tensor([decode_gradient_oracle(row, GRID) for row in logits.tolist()], dtype=dtype)
    assert_close(variant(summed(two_hot_decode))(logits, bins), expected, **TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("name", "case"),
    [("02_twohot", f"b{n}") for n in (255, 41, 16)]
    + [("10b_torchrl_functions", f"twohot_b{n}") for n in (255, 41, 16)],
)
@both
def test_golden_decode_and_cross_entropy(golden, name, case, dtype):
    file, bins = golden(name), golden(name)[f"{case}.bins"].to(dtype)
    logits, target = file[f"{case}.in.logits"].to(dtype), file[f"{case}.in.target"].to(dtype)
    assert_close(two_hot_cross_entropy(logits, target, bins), file[f"{case}.out.loss"].to(dtype), **TOLERANCE[dtype])
    gradient = summed(two_hot_cross_entropy)(logits, target, bins)
    assert_close(gradient, file[f"{case}.grad.loss.logits"].to(dtype), rtol=1e-5, atol=1e-6)
    # The sum over huge bins cancels: errors are relative to what is added, not to what is left.
    scale = file[f"{case}.out.pred_scale"].to(dtype)
    relative = 1e-6 if dtype == torch.float64 else 1e-5
    assert ((two_hot_decode(logits, bins) - file[f"{case}.out.pred"].to(dtype)).abs() <= relative * scale).all()
    gradient = summed(two_hot_decode)(logits, bins)
    assert ((gradient - file[f"{case}.grad.pred.logits"].to(dtype)).abs() <= 1e-5 * scale[:, None]).all()


@both
def test_golden_bins_in_symlog_space(golden, dtype):
    # The author's older parametrisation is a composition: symlog of the target, even bins, symexp of the mean.
    file = golden("02_twohot")
    bins, logits = file["squash.bins"].to(dtype), file["squash.in.logits"].to(dtype)
    target = symlog(file["squash.in.target"].to(dtype))
    loss = two_hot_cross_entropy(logits, target, bins)
    assert_close(loss, file["squash.out.loss"].to(dtype), rtol=TOLERANCE[dtype]["rtol"], atol=2e-6)
    gradient = summed(two_hot_cross_entropy)(logits, target, bins)
    assert_close(gradient, file["squash.grad.loss.logits"].to(dtype), rtol=1e-5, atol=1e-6)
    prediction = symexp(two_hot_decode(logits, bins))
    assert_close(prediction, file["squash.out.pred"].to(dtype), rtol=TOLERANCE[dtype]["rtol"] * 10, atol=1e-5)


@both
def test_uniform_logits_decode_to_exactly_zero(variant, dtype):
    height, supports = torch.tensor([[0.0], [3.3], [-1e4]], dtype=dtype), [2, 16, 41, 83, 255]
    logits, bins = [height.expand(3, n) for n in supports], [symexp_bins(n, dtype=dtype) for n in supports]
    values = variant(lambda logits, bins: [two_hot_decode(*pair) for pair in zip(logits, bins, strict=True)])(
        logits, bins
    )
    assert all(torch.equal(value, torch.zeros(3, dtype=dtype)) for value in values)


def test_extreme_logits():
    bins = symexp_bins(255)
    peak = torch.zeros(255).index_fill(0, torch.tensor(127), 1e4)
    nats = two_hot_cross_entropy(peak, torch.tensor(0.0), bins)
    assert nats == 0
    assert not nats.signbit()
    assert two_hot_cross_entropy(peak, torch.tensor(1.0), bins) == 1e4
    assert two_hot_decode(peak, bins) == 0
    last = torch.full((255,), -1e30).index_fill(0, torch.tensor(254), 0.0)
    assert two_hot_decode(last, bins) == 485165184
    assert summed(two_hot_decode)(last, bins).isfinite().all()
    assert summed(two_hot_cross_entropy)(last, torch.tensor(0.0), bins).isfinite().all()


@given(st.lists(st.floats(-30, 30), min_size=6, max_size=6), st.floats(-100, 100), st.floats(-6, 11))
def test_a_shift_of_the_logits_changes_nothing(logits, shift, target):
    logits, bins = torch.tensor(logits, dtype=torch.float64), torch.tensor(GRID, dtype=torch.float64)
    target = torch.tensor(target, dtype=torch.float64)
    assert_close(two_hot_decode(logits + shift, bins), two_hot_decode(logits, bins), rtol=1e-9, atol=1e-9)
    loss = two_hot_cross_entropy(logits, target, bins)
    assert_close(two_hot_cross_entropy(logits + shift, target, bins), loss, rtol=1e-9, atol=1e-9)


@given(st.lists(st.floats(-30, 30), min_size=5, max_size=5), st.floats(-1e4, 1e4))
def test_mirrored_logits_decode_to_the_negative(logits, target):
    logits, bins = torch.tensor(logits, dtype=torch.float64), symexp_bins(5, dtype=torch.float64)
    value = two_hot_decode(logits, bins)
    assert_close(two_hot_decode(logits.flip(0), bins), -value, rtol=1e-12, atol=1e-6)
    assert bins[0] <= value <= bins[-1]
    target = torch.tensor(target, dtype=torch.float64)
    mirrored = two_hot_cross_entropy(logits.flip(0), -target, bins)
    assert_close(mirrored, two_hot_cross_entropy(logits, target, bins), rtol=1e-9, atol=1e-9)


# Cross-entropy


@both
def test_cross_entropy_is_the_formula(variant, dtype):
    logits, bins = torch.randn(3, 4, 6, dtype=dtype) * 3, torch.tensor(GRID, dtype=dtype)
    target = torch.tensor(TARGETS, dtype=dtype).reshape(3, 4)
    rows = zip(logits.reshape(12, 6).tolist(), target.flatten().tolist(), strict=True)
    expected = torch.tensor([cross_entropy_oracle(row, t, GRID) for row, t in rows], dtype=dtype).reshape(3, 4)
    assert_close(variant(two_hot_cross_entropy)(logits, target, bins), expected, **TOLERANCE[dtype])


@both
def test_cross_entropy_gradient_is_the_formula(variant, dtype):
    logits, bins = torch.randn(12, 6, dtype=dtype), torch.tensor(GRID, dtype=dtype)
    target = torch.tensor(TARGETS, dtype=dtype)
    rows = zip(logits.tolist(), target.tolist(), strict=True)
    expected = torch.tensor([cross_entropy_gradient_oracle(row, t, GRID) for row, t in rows], dtype=dtype)
    assert_close(variant(summed(two_hot_cross_entropy))(logits, target, bins), expected, **TOLERANCE[dtype])


@given(st.lists(st.floats(-30, 30), min_size=6, max_size=6), st.floats(-6, 11))
def test_cross_entropy_is_that_of_the_dense_encoding(logits, target):
    logits, bins = torch.tensor(logits, dtype=torch.float64), torch.tensor(GRID, dtype=torch.float64)
    target = torch.tensor(target, dtype=torch.float64)
    weights = two_hot_encode(target, bins)
    loss = two_hot_cross_entropy(logits, target, bins)
    assert_close(loss, -(weights * torch.log_softmax(logits, -1)).sum(), rtol=1e-12, atol=1e-12)
    assert loss >= torch.special.entr(weights).sum() - 1e-12


def test_cross_entropy_outside_the_bins():
    bins, logits = symexp_bins(255), torch.zeros(4, 255)
    loss = two_hot_cross_entropy(logits, torch.tensor([1e9, -1e9, math.inf, -math.inf]), bins)
    assert_close(loss, torch.full((4,), 5.5412636))


def test_a_nan_target_is_a_nan_loss_in_its_row_only(variant):
    logits, bins, target = torch.randn(3, 6), torch.tensor(GRID), torch.tensor([0.3, math.nan, 2.0])
    loss = variant(two_hot_cross_entropy)(logits, target, bins)
    assert loss.isnan().tolist() == [False, True, False]
    assert summed(two_hot_cross_entropy)(logits, target, bins)[[0, 2]].isfinite().all()


def test_a_bin_that_is_ruled_out_and_not_asked_for_adds_nothing(variant):
    logits = torch.tensor([-math.inf, 0.0, 1.0, 2.0, 0.5, -math.inf]).expand(3, 6)
    target, bins = torch.tensor([0.5, -2.0, 1.0]), torch.tensor(GRID)
    expected = [cross_entropy_oracle([-1e9, 0.0, 1.0, 2.0, 0.5, -1e9], t, GRID) for t in target.tolist()]
    assert_close(variant(two_hot_cross_entropy)(logits, target, bins), torch.tensor(expected))
    assert variant(summed(two_hot_cross_entropy))(logits, target, bins).isfinite().all()
    asked = two_hot_cross_entropy(logits[0], torch.tensor(5.5), bins)
    assert asked == math.inf


def test_no_gradient_reaches_what_is_constant(variant):
    logits, target, bins = torch.randn(2, 6), torch.tensor([0.3, 2.0]), torch.tensor(GRID)

    def gradients(logits, target, bins):
        cross_entropy = summed(two_hot_cross_entropy, (1, 2))(logits, target, bins)
        decode = summed(two_hot_decode, 1)(logits, bins)
        # Squared, for the plain sum of the weights is constant anyway.
        encode = summed(lambda x, bins: two_hot_encode(x, bins).square(), (0, 1))(target, bins)
        return *cross_entropy, decode, *encode

    assert not any(gradient.any() for gradient in variant(gradients)(logits, target, bins))
    assert not two_hot_encode(target.requires_grad_(), bins).requires_grad


def test_no_tangent_leaves_what_is_constant(variant):
    logits, target, bins = torch.randn(2, 6), torch.tensor([0.3, 2.0]), torch.tensor(GRID)

    def tangents(logits, target, bins, direction, shift):
        encode = torch.func.jvp(two_hot_encode, (target, bins), (shift, bins))[1]
        decode = torch.func.jvp(lambda bins: two_hot_decode(logits, bins), (bins,), (bins,))[1]
        loss = torch.func.jvp(lambda t, b: two_hot_cross_entropy(logits, t, b), (target, bins), (shift, bins))[1]
        live = torch.func.jvp(lambda v: two_hot_cross_entropy(v, target, bins), (logits,), (direction,))[1]
        return encode, decode, loss, live

    direction = torch.randn(2, 6)
    *stopped, live = variant(tangents)(logits, target, bins, direction, torch.ones(2))
    assert not any(tangent.any() for tangent in stopped)
    gradient = summed(two_hot_cross_entropy)(logits, target, bins)
    assert_close(live, (gradient * direction).sum(-1))


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("name", ["cross_entropy", "decode"])
def test_derivatives_against_finite_differences(name):
    bins, target = torch.tensor(GRID, dtype=torch.float64), torch.tensor([0.7, 30.0], dtype=torch.float64)
    logits = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    function = {
        "cross_entropy": lambda logits: two_hot_cross_entropy(logits, target, bins),
        "decode": lambda logits: two_hot_decode(logits, bins),
    }[name]
    assert torch.autograd.gradcheck(function, logits, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, logits, check_fwd_over_rev=True)


# Types, shapes, errors, purity, for all three


def all_three(logits, target, bins):
    loss, value = two_hot_cross_entropy(logits, target, bins), two_hot_decode(logits, bins)
    return loss, value, two_hot_encode(target, bins)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(variant, dtype):
    logits, target, bins = torch.randn(4, 255).mul(5).to(dtype), torch.randn(4).to(dtype), symexp_bins(255)
    loss, value, weights = variant(all_three)(logits, target, bins)
    for result, expected in [
        (loss, two_hot_cross_entropy(logits.float(), target.float(), bins)),
        (value, two_hot_decode(logits.float(), bins)),
        (weights, two_hot_encode(target.float(), bins)),
    ]:
        assert result.dtype == torch.float32
        assert result.isfinite().all()
        assert torch.equal(result, expected)


def test_extreme_half_precision_logits_are_finite():
    logits = torch.full((255,), -65504.0, dtype=torch.float16).index_fill(0, torch.tensor(3), 65504.0)
    bins = symexp_bins(255)
    assert two_hot_cross_entropy(logits, torch.tensor(0.5), bins).isfinite()
    assert two_hot_decode(logits, bins).isfinite()


def test_dtypes_of_results_follow_the_first_argument():
    bins = torch.tensor(GRID)
    for dtype, result in [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.int32, torch.float32)]:
        assert two_hot_encode(torch.ones(2, dtype=dtype), bins.double()).dtype == result
        target = torch.ones(2, dtype=dtype)
        assert two_hot_cross_entropy(torch.zeros(2, 6), target, bins.double()).dtype == torch.float32
        assert two_hot_cross_entropy(torch.zeros(2, 6).double(), target, bins).dtype == torch.float64
    assert two_hot_decode(torch.zeros(6).double(), bins).dtype == torch.float64
    assert torch.equal(two_hot_encode(torch.tensor([1, 3]), bins), two_hot_encode(torch.tensor([1.0, 3.0]), bins))


@pytest.mark.parametrize("shape", [(), (1,), (0, 3)])
def test_shapes(variant, shape):
    logits, target, bins = torch.zeros(*shape, 6), torch.ones(shape), torch.tensor(GRID)
    loss, value, weights = variant(all_three)(logits, target, bins)
    assert loss.shape == value.shape == shape
    assert weights.shape == (*shape, 6)


def test_two_bins(variant):
    bins = torch.tensor([0.0, 1.0])
    assert_close(variant(two_hot_encode)(torch.tensor([0.25, 1.0, 7.0]), bins)[:, 1], torch.tensor([0.25, 1.0, 1.0]))


def test_strides_do_not_matter():
    bins = torch.tensor(GRID)
    strided = torch.stack([bins, bins], -1)[:, 0]
    target, logits = torch.randn(3, 2).T, torch.randn(3, 2, 6).transpose(0, 1)
    assert not strided.is_contiguous()
    assert torch.equal(two_hot_encode(target, strided), two_hot_encode(target.contiguous(), bins))
    loss = two_hot_cross_entropy(logits, target, strided)
    assert_close(loss, two_hot_cross_entropy(logits.contiguous(), target.contiguous(), bins))


@pytest.mark.parametrize(
    ("function", "arguments", "error", "text"),
    [
        (
            two_hot_encode,
            (torch.tensor(True), torch.ones(3)),
            TypeError,
            r"x must be a tensor of numbers, got bool \[\]",
        ),
        (two_hot_encode, (0.5, torch.ones(3)), TypeError, "x must be a tensor, got float 0.5"),
        (
            two_hot_encode,
            (torch.ones(2), torch.arange(3)),
            TypeError,
            r"bins must be a floating-point tensor, got int64 \[3\]",
        ),
        (
            two_hot_encode,
            (torch.ones(2), torch.ones(2, 3)),
            ValueError,
            r"bins .*\[num_bins >= 2\], got float32 \[2, 3\]",
        ),
        (two_hot_encode, (torch.ones(2), torch.ones(1)), ValueError, r"bins .*\[num_bins >= 2\], got float32 \[1\]"),
        (two_hot_encode, (torch.ones(2), torch.ones(())), ValueError, r"bins .*\[num_bins >= 2\], got float32 \[\]"),
        (
            two_hot_decode,
            (torch.ones(2, 3).int(), torch.ones(3)),
            TypeError,
            r"logits must be a floating-point tensor, got int32 \[2, 3\]",
        ),
        (
            two_hot_decode,
            (torch.ones(2, 4), torch.ones(3)),
            ValueError,
            r"logits must be of shape \[\.\.\., 3\], got float32 \[2, 4\]\. One logit for each bin\.",
        ),
        (
            two_hot_decode,
            (torch.ones(()), torch.ones(3)),
            ValueError,
            r"logits must be of shape \[\.\.\., 3\], got float32 \[\]",
        ),
        (two_hot_decode, (torch.ones(3), None), TypeError, "bins must be a tensor, got NoneType"),
        (
            two_hot_cross_entropy,
            (torch.ones(2, 4), torch.ones(2), torch.ones(3)),
            ValueError,
            r"logits must be of shape \[\.\.\., 3\], got float32 \[2, 4\]",
        ),
        (
            two_hot_cross_entropy,
            (torch.ones(2, 3), torch.ones(2, 1), torch.ones(3)),
            ValueError,
            r"target must be of shape \[2\] like logits without the bins, got float32 \[2, 1\]\. .*squeeze\(-1\)",
        ),
        (
            two_hot_cross_entropy,
            (torch.ones(2, 5, 3), torch.ones(5, 2), torch.ones(3)),
            ValueError,
            r"target must be of shape \[2, 5\] .* got float32 \[5, 2\]\. Did you pass time first\?",
        ),
        (
            two_hot_cross_entropy,
            (torch.ones(2, 3), torch.ones(2).bool(), torch.ones(3)),
            TypeError,
            r"target must be a tensor of numbers, got bool \[2\]",
        ),
    ],
)
def test_errors(function, arguments, error, text):
    with pytest.raises(error, match=f"^{function.__name__}: {text}"):
        function(*arguments)


CALLS = {
    two_hot_encode: lambda **k: (torch.randn(4, 3, **k), torch.linspace(-2, 3, 7, **k)),
    two_hot_decode: lambda **k: (torch.randn(4, 3, 7, **k), torch.linspace(-2, 3, 7, **k)),
    two_hot_cross_entropy: lambda **k: (
        torch.randn(4, 3, 7, **k),
        torch.randn(4, 3, **k),
        torch.linspace(-2, 3, 7, **k),
    ),
}
every = pytest.mark.parametrize("function", CALLS)


@every
def test_pure(function):
    arguments = CALLS[function]()
    before, generator = [x.clone() for x in arguments], torch.get_rng_state()
    assert torch.equal(function(*arguments), function(*arguments))
    assert all(torch.equal(x, y) for x, y in zip(arguments, before, strict=True))
    assert torch.equal(torch.get_rng_state(), generator)


@every
def test_vmap_equals_a_loop(function):
    *first, bins = CALLS[function]()
    for dims in ([0] * len(first) + [None], [1] * len(first) + [None]):
        batched = torch.func.vmap(function, in_dims=tuple(dims))(*first, bins)
        rows = zip(*[x.unbind(dims[0]) for x in first], strict=True)
        assert_close(batched, torch.stack([function(*row, bins) for row in rows]))
    supports = torch.stack([bins, bins * 2, bins + 1])
    batched = torch.func.vmap(function, in_dims=(*[None] * len(first), 0))(*first, supports)
    assert_close(batched, torch.stack([function(*first, support) for support in supports]))


@every
def test_reads_no_value(function):
    # Tensors on the meta device have none.
    assert function(*CALLS[function](device="meta")).shape[:2] == (4, 3)
    *first, bins = CALLS[function](device="meta")
    assert function(*[x[0, 0] for x in first], bins).shape in [(), (7,)]


def test_bins_on_another_device():
    assert symexp_bins(8, device="meta").device.type == "meta"


@every
def test_second_call_does_not_recompile(function):
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for step in range(3):
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            compiled(*CALLS[function]())
