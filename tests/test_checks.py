"""Every sentence that a check can say, and that no check reads a value."""

import math
import re
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch.testing import assert_close

from rlloss import checks


def says(error, sentence):
    return pytest.raises(error, match=f"^{re.escape(sentence)}$")


def test_text():
    assert checks.text("f", "x", "a tensor", "int 3") == "f: x must be a tensor, got int 3."
    assert checks.text("f", "x", "a tensor", "int 3", "Wrap it.") == "f: x must be a tensor, got int 3. Wrap it."


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (torch.zeros(2, 3), "float32 [2, 3]"),
        (torch.tensor(True), "bool []"),
        (torch.zeros(0, dtype=torch.bfloat16), "bfloat16 [0]"),
        ("l3", "str 'l3'"),
        (0.5, "float 0.5"),
        (True, "bool True"),
        (np.float32(0.5), f"float32 {np.float32(0.5)!r}"),
        ((1, 2), "tuple (1, 2)"),
        ([0.5], "list [0.5]"),
        (None, "NoneType"),
        ({"a": 1}, "dict"),
    ],
)
def test_describe(x, words):
    assert checks.describe(x) == words


def test_tensor():
    x = torch.zeros(2)
    assert checks.tensor("f", "x", x) is x
    with says(TypeError, "f: x must be a tensor, got NoneType."):
        checks.tensor("f", "x", None)
    with says(TypeError, "f: x must be a tensor, got ndarray."):
        checks.tensor("f", "x", np.zeros(2))


@pytest.mark.parametrize(
    ("dtype", "floating", "real"),
    [
        (torch.float64, torch.float64, torch.float64),
        (torch.float32, torch.float32, torch.float32),
        (torch.float16, torch.float32, torch.float32),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.uint8, None, torch.float32),
        (torch.int64, None, torch.float32),
        (torch.bool, None, None),
        (torch.complex64, None, None),
    ],
)
def test_floating_and_real(variant, dtype, floating, real):
    x, got = torch.ones(2, 3).to(dtype), str(dtype).removeprefix("torch.")
    for check, result, wanted in [
        (checks.floating, floating, "a floating-point tensor"),
        (checks.real, real, "a tensor of numbers"),
    ]:
        if result is None:
            with says(TypeError, f"f: x must be {wanted}, got {got} [2, 3]. Guess."):
                check("f", "x", x, "Guess.")
        else:
            assert_close(check("f", "x", x), torch.ones(2, 3, dtype=result), rtol=0, atol=0)
        with says(TypeError, "f: x must be a tensor, got float 1.0."):
            check("f", "x", 1.0)
    y = variant(lambda x: checks.real("f", "x", x) if real else x)(x)
    assert y.dtype == (real or dtype)


def test_boolean():
    mask = torch.tensor([True])
    assert checks.boolean("f", "mask", mask) is mask
    with says(TypeError, "f: mask must be a bool tensor, got uint8 [1]. Guess."):
        checks.boolean("f", "mask", mask.byte(), "Guess.")


def test_compute_dtype():
    half, single, double = (torch.zeros(1, dtype=d) for d in (torch.float16, torch.float32, torch.float64))
    assert checks.compute_dtype(half) == checks.compute_dtype(half, single) == torch.float32
    assert checks.compute_dtype(half, double) == checks.compute_dtype(double, single) == torch.float64
    assert checks.compute_dtype(torch.zeros(1, dtype=torch.int64)) == torch.float32


def test_same_shape():
    checks.same_shape("f", "x", torch.zeros(2, 3), "y", (2, 3))
    checks.same_shape("f", "x", torch.zeros(()), "y", torch.Size([]))
    with says(ValueError, "f: x must be of shape [2, 3] like y, got float32 [2, 4]."):
        checks.same_shape("f", "x", torch.zeros(2, 4), "y", (2, 3))
    with says(ValueError, "f: x must be of shape [2, 3] like y, got float32 [2, 4]. Guess."):
        checks.same_shape("f", "x", torch.zeros(2, 4), "y", (2, 3), "Guess.")
    with says(
        ValueError,
        "f: x must be of shape [2, 3] like y, got float32 [3, 2]. Did you pass time first? Batches are [B, T, ...].",
    ):
        checks.same_shape("f", "x", torch.zeros(3, 2), "y", (2, 3))


def test_leading_shape():
    checks.leading_shape("f", "x", torch.zeros(2, 3, 5), "y", (2, 3))
    with says(ValueError, "f: x must be of shape [2, 3, ...] like y, got float32 [2, 4, 5]."):
        checks.leading_shape("f", "x", torch.zeros(2, 4, 5), "y", (2, 3))
    with says(ValueError, "f: x must be of shape [2, 3, ...] like y, got float32 [2]."):
        checks.leading_shape("f", "x", torch.zeros(2), "y", (2, 3))
    with pytest.raises(ValueError, match=r"Did you pass time first\?"):
        checks.leading_shape("f", "x", torch.zeros(3, 2, 5), "y", (2, 3))


@pytest.mark.parametrize(
    ("got", "wanted", "guesses"),
    [
        ((3, 2), (2, 3), True),
        ((3, 2, 7), (2, 3), True),
        ((3, 2), (2, 3, 7), True),
        ((2, 2), (2, 2), False),
        ((2, 3), (2, 3), False),
        ((4, 2), (2, 3), False),
        ((3,), (2, 3), False),
        ((3, 2), (2,), False),
    ],
)
def test_time_first(got, wanted, guesses):
    assert bool(checks.time_first(got, wanted)) == guesses


def test_last_dimension():
    checks.last_dimension("f", "x", torch.zeros(2, 3), 3)
    for shape in [(2, 4), (3, 2), ()]:
        with says(ValueError, f"f: x must be of shape [..., 3], got float32 {list(shape)}. Guess."):
            checks.last_dimension("f", "x", torch.zeros(shape), 3, "Guess.")


def test_rank_at_least():
    checks.rank_at_least("f", "x", torch.zeros(2, 3, 4), ("groups", "classes"))
    with says(ValueError, "f: x must be of shape [..., groups, classes], got float32 [4]."):
        checks.rank_at_least("f", "x", torch.zeros(4), ("groups", "classes"))


def test_option():
    checks.option("f", "mode", "mean", ("mean", "sum"))
    with says(ValueError, "f: mode must be one of 'mean', 'sum', got 'maen'. Did you mean 'mean'?"):
        checks.option("f", "mode", "maen", (name for name in ("mean", "sum")))
    with says(ValueError, "f: mode must be one of 'mean', 'sum', got None."):
        checks.option("f", "mode", None, ("mean", "sum"))


@pytest.mark.parametrize("check", [checks.within, checks.knob])
def test_numbers_in_a_range(check):
    for value in (0, 1, 0.5, np.float64(0.5), np.float32(0.5), np.int64(1), torch.tensor(7.0)):
        check("f", "x", value, 0.0, 1.0)
    check("f", "x", 1e30, 0.0)
    for value in (-0.1, 1.1, float("nan"), float("inf")):
        with says(ValueError, f"f: x must be in [0, 1], got {value!r}."):
            check("f", "x", value, 0.0, 1.0)
    with says(ValueError, "f: x must be at least 0, got -2."):
        check("f", "x", -2, 0.0)
    for value in (math.inf, np.float32(math.inf)):
        with says(ValueError, f"f: x must be a finite number, got {value!r}."):
            check("f", "x", value, 0.0)
    check("f", "x", math.inf, 0.0, math.inf)
    check("f", "x", -1e30, -math.inf)
    for value in (-math.inf, math.nan):
        with says(ValueError, f"f: x must be a finite number, got {value}."):
            check("f", "x", value, -math.inf)
    for value, words in [(True, "bool True"), ("1", "str '1'"), (None, "NoneType"), (np.ones(1), "ndarray")]:
        with says(TypeError, f"f: x must be a number or a 0-d tensor, got {words}."):
            check("f", "x", value, 0.0)


def test_a_knob_is_one_number():
    checks.within("f", "x", torch.zeros(3), 0.0)
    with says(ValueError, "f: x must be a number or a 0-d tensor, got float32 [3]."):
        checks.knob("f", "x", torch.zeros(3), 0.0)


def test_integer():
    assert checks.integer("f", "n", 3) == 3
    assert type(checks.integer("f", "n", np.int64(3))) is int
    assert checks.integer("f", "n", -3, low=-(2**63)) == -3
    for x, words in [(True, "bool True"), (2.0, "float 2.0"), ("2", "str '2'"), (torch.tensor(2), "int64 []")]:
        with says(TypeError, f"f: n must be an int, got {words}."):
            checks.integer("f", "n", x)
        with says(TypeError, f"f: n must be an int or more, got {words}."):
            checks.integer("f", "n", x, wanted="an int or more")
    with says(ValueError, "f: n must be at least 2, got 1."):
        checks.integer("f", "n", 1, low=2)
    with says(ValueError, "f: n must be in [0, 7], got 8."):
        checks.integer("f", "n", 8, high=7)


def test_shape():
    assert checks.shape("f", "shape", [2, np.int64(3)]) == (2, 3)
    assert checks.shape("f", "shape", torch.Size([])) == ()
    with says(TypeError, "f: shape must be a tuple of ints, got int 2. Did you mean (2,)?"):
        checks.shape("f", "shape", 2)
    for x, words in [("ab", "str 'ab'"), ((2.0,), "tuple (2.0,)"), ((True,), "tuple (True,)"), (None, "NoneType")]:
        with says(TypeError, f"f: shape must be a tuple of ints, got {words}."):
            checks.shape("f", "shape", x)
    with says(ValueError, "f: shape must be a tuple of sizes of at least 0, got list [2, -1]."):
        checks.shape("f", "shape", [2, -1])


def test_flag():
    checks.flag("f", "exact", False)
    with says(TypeError, "f: exact must be True or False, got int 0."):
        checks.flag("f", "exact", 0)


def test_function_of():
    checks.function_of("f", "apply", len, "(x) -> y")
    with says(TypeError, "f: apply must be a function (x) -> y, got NoneType."):
        checks.function_of("f", "apply", None, "(x) -> y")


def test_state():
    class Pair(NamedTuple):
        low: torch.Tensor
        high: torch.Tensor

    checks.state("f", "state", Pair(torch.ones(()), torch.ones(())), Pair)
    checks.state("f", "state", SimpleNamespace(low=torch.ones(()), high=torch.ones(())), Pair)
    for x, words in [
        ((0.0, 1.0), "tuple (0.0, 1.0)"),
        (None, "NoneType"),
        (Pair(0.0, 1.0), "Pair Pair(low=0.0, high=1.0)"),
    ]:
        with says(TypeError, f"f: state must be a Pair of tensors low, high, got {words}."):
            checks.state("f", "state", x, Pair)


def test_floating_dtype():
    checks.floating_dtype("f", torch.bfloat16)
    with says(TypeError, "f: dtype must be a floating-point dtype, got int64."):
        checks.floating_dtype("f", torch.int64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scalar_like(variant, dtype):
    x, value = torch.zeros(3, dtype=dtype), torch.tensor(0.3, dtype=torch.float64)
    of_number, of_tensor = variant(lambda x, v: (checks.scalar_like(x, 0.3), checks.scalar_like(x, v)))(x, value)
    assert of_number.dtype == of_tensor.dtype == dtype
    assert of_number == of_tensor == value.to(dtype)


@pytest.mark.parametrize("value", [2, -1e300, 1e5, math.inf, math.nan, np.float32(0.1), np.float64(0.1), np.int64(3)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_any_number_is_a_scalar(value, dtype):
    wanted = torch.tensor(float(value), dtype=torch.float64).to(dtype)
    assert_close(checks.scalar_like(torch.zeros(3, dtype=dtype), value), wanted, rtol=0, atol=0, equal_nan=True)


def test_align(variant):
    mask, x = torch.tensor([True, False]), torch.ones(2, 3, 4)
    selected = variant(lambda mask, x: torch.where(checks.align(mask, x), x, 0.0))(mask, x)
    assert selected.sum((1, 2)).tolist() == [12.0, 0.0]
    assert checks.align(mask, torch.ones(2)).shape == (2,)


@pytest.mark.parametrize("mapping", [dict, TensorDict])
def test_take_and_has(mapping):
    batch = mapping({"reward": torch.ones(2), "observation": torch.zeros(2)})
    assert checks.take("f", "batch", batch, "reward").sum() == 2
    assert checks.has(batch, "reward")
    assert not checks.has(batch, "rewards")
    with pytest.raises(KeyError) as raised:
        checks.take("f", "batch", batch, "rewards")
    sentence = "f: batch must be a mapping with 'rewards', got keys ['observation', 'reward']. Did you mean 'reward'?"
    assert raised.value.args == (sentence,)
    assert str(raised.value) == sentence, "a plain KeyError shows a repr"
    with pytest.raises(KeyError, match=r"got keys \['observation', 'reward'\]\. Because\."):
        checks.take("f", "batch", batch, "x", "Because.")


def test_take_from_what_is_no_mapping():
    with says(TypeError, "f: batch must be a mapping of tensors (dict or TensorDict), got float32 [2]."):
        checks.take("f", "batch", torch.ones(2), "reward")


def test_did_you_mean():
    assert checks.did_you_mean("observatoin", ["reward", "observation"]) == "Did you mean 'observation'?"
    assert checks.did_you_mean("zzz", ["reward", "observation"]) == ""
    assert checks.did_you_mean(None, ["reward"]) == ""


def test_no_check_reads_a_value():
    # Tensors on the meta device have none.
    x, mask = torch.ones(2, 3, device="meta"), torch.ones(2, dtype=torch.bool, device="meta")
    checks.floating("f", "x", x)
    checks.real("f", "x", x.int())
    checks.boolean("f", "x", mask)
    checks.same_shape("f", "x", x, "y", (2, 3))
    checks.leading_shape("f", "x", x, "y", (2,))
    checks.last_dimension("f", "x", x, 3)
    checks.rank_at_least("f", "x", x, ("a",))
    checks.within("f", "x", x[0, 0], 0.0, 1.0)
    checks.knob("f", "x", x[0, 0], 0.0, 1.0)
    checks.scalar_like(x, x[0, 0])
    assert checks.align(mask, x).shape == (2, 1)
    assert checks.describe(x) == "float32 [2, 3]"
