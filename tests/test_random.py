"""Keys and draws: the bits of jax.random in every variant, an oracle in Python integers, properties, errors."""

import math
from contextlib import ExitStack
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from rlloss import random
from rlloss.categorical import straight_through_one_hot

WORD = 2**32 - 1
SHAPES = {"scalar": (), "4": (4,), "3x5": (3, 5), "1000": (1000,)}
DRAWS = {
    "bits": random.bits,
    "uniform": random.uniform,
    "normal": random.normal,
    "gumbel": random.gumbel,
    "bernoulli025": lambda key, shape: random.bernoulli(key, 0.25, shape),
}
ROWS = torch.arange(12).reshape(6, 2)
# One small call of everything that takes another path: what the variants compile.
FUNCTIONS = {
    **{name: partial(draw, shape=(3, 5)) for name, draw in DRAWS.items()},
    "split5": lambda key: random.split(key, 5),
    "fold_in7": lambda key: random.fold_in(key, 7),
    "permutation_17": lambda key: random.permutation(key, 17),
    "uniform_interval": lambda key: random.uniform(key, (50,), 3.1, 17.7),
    "uniform_float64": lambda key: random.uniform(key, (50,), dtype=torch.float64),
    "choice_rows": lambda key: random.choice(key, ROWS, (2, 2)),
    "choice_replace": lambda key: random.choice(key, ROWS, (2, 7), replace=True),
    "key_inside": lambda key: random.fold_in(random.key(-3), key[1]),
}
MORE = {
    "permutation_3000": lambda key: random.permutation(key, 3000),
    "permutation_rows": lambda key: random.permutation(key, ROWS),
    "choice_40_of_100": lambda key: random.choice(key, 100, (40,)),
    "normal_float64": lambda key: random.normal(key, (50,), dtype=torch.float64),
    "gumbel_float64": lambda key: random.gumbel(key, (50,), dtype=torch.float64),
    "bernoulli_tensor": lambda key: random.bernoulli(key, torch.linspace(0, 1, 50), (50,)),
}

keys = st.integers(-(2**63), 2**63 - 1).map(random.key)


def each_path(key):
    return {name: function(key) for name, function in FUNCTIONS.items()}


def everything(key):
    return {name: function(key) for name, function in (FUNCTIONS | MORE).items()}


def assert_same(name, got, expected):
    """Bit for bit; normal and gumbel to 1e-6 of max(|x|, 1), because logarithms round as they like."""
    if name.startswith(("normal", "gumbel")):
        error = (got.double() - expected.double()).abs() / expected.double().abs().clamp(min=1)
        assert error.max() <= 1e-6, name
    else:
        assert got.shape == expected.shape, name
        assert torch.equal(got.to(expected.dtype), expected), name


# The formula once more, in Python integers.


def threefry(key, counter):
    rotate = lambda x, by: (x << by | x >> (32 - by)) & WORD  # noqa: E731
    schedule = [*key, key[0] ^ key[1] ^ 0x1BD11BDA]
    x, y = (counter[0] + key[0]) & WORD, (counter[1] + key[1]) & WORD
    for i in range(20):
        x = (x + y) & WORD
        y = rotate(y, (13, 15, 26, 6, 17, 29, 16, 24)[i % 8]) ^ x
        if i % 4 == 3:
            block = i // 4 + 1
            x, y = (x + schedule[block % 3]) & WORD, (y + schedule[(block + 1) % 3] + block) & WORD
    return x, y


def words(key, count):
    return [threefry(key.tolist(), (i >> 32, i & WORD)) for i in range(count)]


def oracle_bits(key, count):
    return [x ^ y for x, y in words(key, count)]


def oracle_permutation(key, n):
    order = list(range(n))
    for _ in range(math.ceil(3 * math.log(max(n, 1)) / math.log(WORD))):
        key, subkey = torch.tensor(words(key, 2))
        order = [x for _, x in sorted(zip(oracle_bits(subkey, n), order, strict=True), key=lambda pair: pair[0])]
    return order


@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((WORD, WORD), (WORD, WORD), (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_oracle_gives_the_published_test_vectors(key, counter, expected):
    assert threefry(key, counter) == expected


@given(keys, st.integers(0, WORD))
def test_words_equal_the_oracle(key, data):
    assert random.split(key, 3).tolist() == [list(pair) for pair in words(key, 3)]
    assert random.bits(key, (2, 3)).flatten().tolist() == oracle_bits(key, 6)
    assert random.fold_in(key, data).tolist() == list(threefry(key.tolist(), (0, data)))


# 1625 is the most that one sort is enough for, 1626 takes two.
@pytest.mark.parametrize("n", [0, 1, 2, 3, 100, 1625, 1626])
def test_permutation_equals_the_oracle(n):
    key = random.key(7)
    assert random.permutation(key, n).tolist() == oracle_permutation(key, n)


@given(keys, st.integers(1, 2**31 - 1) | st.sampled_from([1, 2, 3, 65535, 65536, 65537, 2**31 - 1]))
def test_choice_with_replacement_equals_the_oracle(key, n):
    higher, lower = (oracle_bits(torch.tensor(pair), 5) for pair in words(key, 2))
    multiplier = (2**16 % n) * (2**16 % n) % 2**32 % n
    expected = [(h % n * multiplier % 2**32 + x % n) % 2**32 % n for h, x in zip(higher, lower, strict=True)]
    assert random.choice(key, n, (5,), replace=True).tolist() == expected


@given(keys)
def test_floats_equal_the_oracle(key):
    pairs = words(key, 20)
    single = torch.tensor([((x ^ y) >> 9) / 2**23 for x, y in pairs], dtype=torch.float64)
    double = torch.tensor([((x << 32 | y) >> 12) / 2**52 for x, y in pairs], dtype=torch.float64)
    for dtype, unit in ((torch.float32, single), (torch.float64, double)):
        assert torch.equal(random.uniform(key, (20,), dtype=dtype).double(), unit)
        u = unit.clamp(min=torch.finfo(dtype).tiny)
        assert_same("gumbel", random.gumbel(key, (20,), dtype=dtype), -torch.log(-torch.log(u)))
        u = torch.maximum(unit * 2 - 1 + torch.finfo(dtype).eps / 2, unit.new_tensor(-1 + torch.finfo(dtype).eps / 2))
        # The polynomials that JAX evaluates in float32 are good to 5e-6 in the tails; golden values hold to 1e-6.
        got, tolerance = random.normal(key, (20,), dtype=dtype), 5e-6 if dtype == torch.float32 else 1e-12
        torch.testing.assert_close(got.double(), math.sqrt(2) * torch.erfinv(u), rtol=tolerance, atol=tolerance)


# Values that jax computed.


def test_golden_in_every_variant_without_recompiling(variant, golden):
    expected, draw, compared = golden("12_random"), variant(each_path), 0
    with ExitStack() as stack:
        for seed in (0, 1, 42):
            for name, got in draw(random.key(seed)).items():
                assert_same(name, got, FUNCTIONS[name](random.key(seed)))
                full_name = f"seed{seed}_{name}_3x5" if name in DRAWS else f"seed{seed}_{name}"
                if full_name in expected:
                    assert_same(name, got, expected[full_name])
                    compared += 1
            stack.enter_context(torch.compiler.set_stance("fail_on_recompile"))
    assert compared == 3 * 8


@pytest.mark.parametrize("seed", [0, 1, 42])
def test_golden_in_every_shape(golden, seed):
    expected, key, compared = golden("12_random"), random.key(seed), 1
    assert torch.equal(key, expected[f"seed{seed}_key"])
    got = {f"{name}_{s}": draw(key, shape) for name, draw in DRAWS.items() for s, shape in SHAPES.items()}
    got |= {f"split{n}": random.split(key, n) for n in (2, 5)}
    got |= {f"permutation_{n}": random.permutation(key, n) for n in (1, 2, 17, 1024, 3000)}
    got |= {f"fold_in{data}": random.fold_in(key, data) for data in (0, 1, 7, 2**31, WORD)}
    got["choice_40_of_100"] = random.choice(key, 100, (40,))
    for name, x in got.items():
        assert_same(name, x, expected[f"seed{seed}_{name}"])
        compared += 1
    assert compared == sum(name.startswith(f"seed{seed}_") for name in expected)


@pytest.mark.parametrize(
    ("seed", "expected"),
    [
        (0, [0, 0]),
        (WORD, [0, WORD]),
        (2**32 + 7, [1, 7]),
        (2**40 + 3, [256, 3]),
        (2**63 - 1, [2147483647, WORD]),
        (-1, [WORD, WORD]),
        (-5, [WORD, 4294967291]),
        (-(2**63), [2147483648, 0]),
    ],
)
def test_key_is_jax_with_x64(seed, expected):
    assert random.key(seed).tolist() == expected
    assert random.key(seed).dtype == torch.int64
    signed = random.key(seed).to(torch.int32).to(torch.int64)
    assert torch.equal(random.bits(signed, (9,)), random.bits(random.key(seed), (9,)))
    assert torch.equal(random.split(signed), random.split(random.key(seed)))


def test_what_the_golden_file_lacks_is_jax_too():
    key = random.key(42)
    rows = [[8, 9], [4, 5], [10, 11], [6, 7], [0, 1], [2, 3]]
    assert random.permutation(key, ROWS).tolist() == rows
    assert random.choice(key, ROWS, (3,)).tolist() == rows[:3]
    assert random.choice(key, ROWS, (3,), replace=True).tolist() == [[0, 1], [0, 1], [6, 7]]
    for n, expected in {
        3: [[0, 0, 0, 1], [2, 0, 2, 0]],
        100: [[44, 14, 71, 69], [9, 19, 77, 7]],
        65536: [[13508, 45074, 33975, 48321], [49805, 40299, 2433, 43303]],
        65537: [[31357, 58978, 22068, 31110], [42549, 27020, 47150, 36385]],
        2**31 - 1: [[977810629, 1236381715, 780371127, 1127988417], [475579021, 870292843, 1364461953, 453421351]],
    }.items():
        assert random.choice(key, n, (2, 4), replace=True).tolist() == expected
    expected = [10.235159873962402, 13.025038719177246, 12.097563743591309, 11.2908353805542, 9.679411888122559]
    assert random.uniform(key, (5,), 3.1, 17.7).tolist() == expected
    for bound in (float, torch.tensor, lambda x: torch.tensor([x] * 5, dtype=torch.float64)):
        assert random.uniform(key, (5,), bound(3.1), bound(17.7)).tolist() == expected
    p = [0.1, 0.5, 0.9, 0.3, 0.7]
    assert random.bernoulli(key, torch.tensor(p), (5,)).tolist() == [False, False, True, False, True]
    assert random.bernoulli(key, torch.tensor(p).double(), (5,)).tolist() == [False, True, True, False, True]
    bits64 = [0.4267275666499091, 0.015010069515314584, 0.5741444178995352]
    assert random.uniform(key, (3,), dtype=torch.float64).tolist() == bits64
    normal64 = [-0.18471174528191162, -2.169824560397754, 0.18693555179382582]
    assert random.normal(key, (3,), dtype=torch.float64).tolist() == pytest.approx(normal64, rel=1e-12)
    gumbel64 = [0.16062720630382138, -1.4348544993307841, 0.5890136500161952]
    assert random.gumbel(key, (3,), dtype=torch.float64).tolist() == pytest.approx(gumbel64, rel=1e-12)


# Purity.


def test_vmap_over_keys_equals_a_loop():
    batch = random.split(random.key(1), 4)
    got = torch.vmap(everything)(batch)
    for i, key in enumerate(batch):
        for name, expected in everything(key).items():
            assert_same(name, got[name][i], expected)


def test_vmap_over_the_other_arguments_equals_a_loop():
    key, batch, x = random.key(1), random.split(random.key(2), 3), torch.randn(3, 6, 2)
    for function, other in [
        (random.fold_in, torch.arange(3)),
        (random.permutation, x),
        (lambda key, x: random.choice(key, x, (2, 2)), x),
        (lambda key, x: random.choice(key, x, (4,), replace=True), x),
        (lambda key, p: random.bernoulli(key, p, (9,)), torch.tensor([0.0, 0.5, 1.0])),
        (lambda key, low: random.uniform(key, (9,), low, 3), torch.tensor([0.0, -1.0, 2.0])),
    ]:
        for in_dims, several in ((None, key.expand(3, 2)), 0), ((0, batch), 0):
            dim, used = (None, several) if in_dims is None else in_dims
            got = torch.vmap(function, in_dims=(dim, 0))(key if dim is None else used, other)
            assert torch.equal(got, torch.stack([function(k, o) for k, o in zip(used, other, strict=True)]))


def test_a_number_in_a_tensor_does_not_recompile_and_another_size_does_not_fail():
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(random.fold_in, fullgraph=True, backend=counter)
    for step in range(3):
        assert torch.equal(compiled(random.key(0), torch.tensor(step)), random.fold_in(random.key(0), step))
    assert counter.frame_count == 1
    compiled = torch.compile(random.permutation, fullgraph=True, backend="aot_eager")
    for n in (5, 7):
        assert torch.equal(compiled(random.key(0), torch.arange(n)), random.permutation(random.key(0), n))


def test_arguments_and_global_generator_stay_as_they_were():
    key, before = random.key(3), torch.get_rng_state()
    rows = ROWS.clone()
    assert str(everything(key)) == str(everything(key))
    assert torch.equal(key, random.key(3))
    assert torch.equal(rows, ROWS)
    assert torch.equal(torch.get_rng_state(), before)


def test_nothing_is_read_copied_from_the_host_or_written_in_place():
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.add(func.overloadpacket.__name__)
            assert not func._schema.is_mutable, func
            return func(*args, **(kwargs or {}))

    seen = set()
    rows, p = ROWS.to("meta"), torch.rand(50, device="meta")
    with Watch():
        key = random.key(1, device="meta")
        results = [
            *(draw(key, (3, 5)) for draw in DRAWS.values()),
            random.split(key),
            random.fold_in(key, key[0]),
            random.uniform(key, (50,), -1, p),
            random.bernoulli(key, p, (50,)),
            random.permutation(key, 17),
            random.permutation(key, rows),
            random.choice(key, rows, (2, 2)),
            random.choice(key, 3, (2, 2), replace=True),
        ]
    assert {x.device.type for x in results} == {"meta"}
    assert not seen & {"_local_scalar_dense", "lift_fresh", "lift_fresh_copy", "nonzero", "equal"}


@pytest.mark.cuda
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_same_bits_without_waiting():
    rows, table = ROWS, FUNCTIONS | MORE
    table["permutation_rows"] = lambda key: random.permutation(key, rows.to(key.device))
    table["choice_rows"] = lambda key: random.choice(key, rows.to(key.device), (2, 2))
    table["choice_replace"] = lambda key: random.choice(key, rows.to(key.device), (2, 7), replace=True)
    table["bernoulli_tensor"] = lambda key: random.bernoulli(key, torch.linspace(0, 1, 50).to(key.device), (50,))
    del table["key_inside"]
    key = random.key(5)
    for name, function in table.items():
        assert_same(name, function(random.key(5, device="cuda")).cpu(), function(key))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for function in DRAWS.values():
            function(random.fold_in(random.key(5, device="cuda"), 1), (3, 5))
        random.choice(random.key(5, device="cuda"), 1000, (7,))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_default_dtype_changes_nothing():
    expected = everything(random.key(0))
    torch.set_default_dtype(torch.float64)
    try:
        got = everything(random.key(0))
    finally:
        torch.set_default_dtype(torch.float32)
    for name in expected.keys() - {"bernoulli_tensor"}:
        assert got[name].dtype == expected[name].dtype
        assert torch.equal(got[name], expected[name])


# Properties.


@given(keys, st.integers(0, 200))
def test_permutation_is_a_permutation(key, n):
    order = random.permutation(key, n)
    assert order.dtype == torch.int64
    assert sorted(order.tolist()) == list(range(n))
    x = torch.arange(3 * n).reshape(n, 3)
    assert torch.equal(random.permutation(key, x), x[order])
    assert torch.equal(random.choice(key, n, (n // 2,)), order[: n // 2])


@given(keys, st.integers(1, 20))
def test_keys_made_from_a_key_differ(key, num):
    new = random.split(key, num)
    assert new.shape == (num, 2)
    folded = [random.fold_in(key, i).tolist() for i in range(num)]
    for several in ([*new.tolist(), key.tolist()], [*folded, key.tolist()]):
        assert len({tuple(words) for words in several}) == num + 1
    assert new.min() >= 0
    assert new.max() <= WORD


@given(keys)
def test_ranges(key):
    bits = random.bits(key, (64,))
    assert bits.dtype == torch.int64
    assert bits.min() >= 0
    assert bits.max() < 2**32
    for dtype in (torch.float32, torch.float64):
        unit = random.uniform(key, (64,), dtype=dtype)
        assert unit.min() >= 0
        assert unit.max() < 1
        for draw in (random.normal, random.gumbel):
            assert draw(key, (64,), dtype=dtype).isfinite().all()
    drawn = random.choice(key, 3, (64,), replace=True)
    assert set(drawn.tolist()) <= {0, 1, 2}
    assert not random.bernoulli(key, 0, (64,)).any()
    assert random.bernoulli(key, 1.0, (64,)).all()


@given(keys, st.floats(-1e3, 1e3), st.floats(1e-3, 1e3))
def test_uniform_stays_within_its_interval(key, low, width):
    for dtype in (torch.float32, torch.float64):
        start, end = torch.tensor([low, low + width], dtype=dtype)
        x = random.uniform(key, (20,), low, low + width, dtype=dtype)
        assert (start <= x).all()
        # Rounding can reach the upper end of an interval that is narrow for its place, but not of one that starts at 0.
        assert (x <= end).all()
        assert (random.uniform(key, (20,), 0, width, dtype=dtype) < torch.tensor(width, dtype=dtype)).all()


def test_the_smallest_and_largest_draw_are_finite(monkeypatch):
    for unit in (torch.tensor(0.0), torch.tensor(1 - 2.0**-23), torch.tensor(1 - 2.0**-52, dtype=torch.float64)):
        monkeypatch.setattr(random, "_unit", lambda key, shape, dtype, unit=unit: unit)
        for draw in (random.normal, random.gumbel):
            assert draw(random.key(0), (), dtype=unit.dtype).isfinite()


def test_moments():
    key, n = random.key(11), 20_000
    euler, cases = 0.5772156649015329, {}
    cases["uniform"] = (random.uniform(key, (n,)), 1 / 2, 1 / 12)
    cases["normal"] = (random.normal(key, (n,)), 0, 1)
    cases["gumbel"] = (random.gumbel(key, (n,)), euler, math.pi**2 / 6)
    cases["bernoulli"] = (random.bernoulli(key, 0.3, (n,)), 0.3, 0.21)
    cases["choice"] = (random.choice(key, 7, (n,), replace=True), 3, 4)
    for name, (x, mean, variance) in cases.items():
        assert x.double().mean().item() == pytest.approx(mean, abs=5 * math.sqrt(variance / n)), name
        assert x.double().var().item() == pytest.approx(variance, rel=0.06), name


def test_every_order_is_equally_likely():
    orders = torch.vmap(lambda key: random.permutation(key, 3))(random.split(random.key(0), 6000))
    _, counts = orders.unique(dim=0, return_counts=True)
    assert len(counts) == 6
    assert (counts - 1000).abs().max() < 5 * math.sqrt(1000)


def test_gumbel_noise_samples_the_categorical():
    logits = torch.tensor([0.0, 2.0, 1.0])
    sample = straight_through_one_hot(logits.expand(10_000, 3), random.gumbel(random.key(0), (10_000, 3)))
    torch.testing.assert_close(sample.mean(0), torch.softmax(logits, -1), rtol=0, atol=0.02)


def test_gradients_pass_to_rows_and_ends():
    key, x = random.key(0), torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.arange(12.0).reshape(6, 2).double()
    (random.permutation(key, x) * weight).sum().backward()
    assert torch.equal(x.grad[random.permutation(key, 6)], weight)
    low, high = torch.tensor(1.0, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    random.uniform(key, (9,), low, high).sum().backward()
    torch.testing.assert_close(high.grad, random.uniform(key, (9,)).sum())
    torch.testing.assert_close(low.grad, (1 - random.uniform(key, (9,))).sum())


def test_empty_and_single():
    key = random.key(0)
    assert random.split(key, 0).shape == (0, 2)
    assert random.split(key, 1).shape == (1, 2)
    for draw in DRAWS.values():
        assert draw(key, (3, 0)).shape == (3, 0)
        assert draw(key, [1]).shape == (1,)
        assert draw(key, torch.Size([])).shape == ()
    assert random.permutation(key, 0).shape == (0,)
    assert random.permutation(key, torch.zeros(0, 3)).shape == (0, 3)
    for replace in (False, True):
        assert random.choice(key, 0, (0, 2), replace=replace).shape == (0, 2)
        assert random.choice(key, torch.zeros(5, 3), (0,), replace=replace).shape == (0, 3)
        assert random.choice(key, 1, (), replace=replace).tolist() == 0
        assert random.choice(key, torch.ones(4, 3), (), replace=replace).shape == (3,)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_probabilities_and_ends_of_any_dtype(dtype):
    key, p = random.key(0), torch.tensor([0.25, 0.5, 1.0], dtype=dtype)
    assert torch.equal(random.bernoulli(key, p, (3,)), random.uniform(key, (3,), dtype=random_dtype(dtype)) < p)
    assert torch.equal(random.uniform(key, (3,), p, 2), random.uniform(key, (3,), p.float(), torch.tensor(2)))
    assert random.permutation(key, p).dtype == dtype


def random_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


# Bad input.

ANY = {
    "split": random.split,
    "fold_in": lambda key: random.fold_in(key, 1),
    "bits": lambda key: random.bits(key, (2,)),
    "uniform": lambda key: random.uniform(key, (2,)),
    "normal": lambda key: random.normal(key, (2,)),
    "gumbel": lambda key: random.gumbel(key, (2,)),
    "bernoulli": lambda key: random.bernoulli(key, 0.5, (2,)),
    "permutation": lambda key: random.permutation(key, 3),
    "choice": lambda key: random.choice(key, 3, (2,)),
}


@pytest.mark.parametrize("name", ANY)
def test_a_bad_key_is_refused(name):
    wanted = rf"^{name}: key must be a key, int64 \[2\], got "
    for bad, error, got in [
        (0, TypeError, r"int 0\. random\.key\(seed\) makes one"),
        (None, TypeError, r"NoneType\. random\.key"),
        (torch.zeros(2), TypeError, r"float32 \[2\]\. random\.key"),
        (torch.zeros(2, dtype=torch.uint32), TypeError, r"uint32 \[2\]\. Did you mean key\.to\(torch\.int64\)\?"),
        (torch.zeros(3, dtype=torch.int64), ValueError, r"int64 \[3\]\. random\.key"),
        (torch.tensor(0), ValueError, r"int64 \[\]\. random\.key"),
        (random.split(random.key(0), 4), ValueError, r"int64 \[4, 2\]\. Did you split without unbinding\?"),
    ]:
        with pytest.raises(error, match=wanted + got):
            ANY[name](bad)


@pytest.mark.parametrize("name", [*DRAWS, "choice"])
def test_a_bad_shape_is_refused(name):
    draw = DRAWS.get(name, lambda key, shape: random.choice(key, 3, shape))
    wanted = rf"^{name.removesuffix('025')}: shape must be a tuple of "
    for bad, error, got in [
        (3, TypeError, r"ints, got int 3\. Did you mean \(3,\)\?"),
        (True, TypeError, r"ints, got bool True\.$"),
        ((2, 1.5), TypeError, r"ints, got tuple \(2, 1\.5\)\."),
        ((True,), TypeError, r"ints, got tuple \(True,\)\."),
        (torch.tensor([3]), TypeError, r"ints, got int64 \[1\]\."),
        ((3, -1), ValueError, r"sizes of at least 0, got tuple \(3, -1\)\."),
    ]:
        with pytest.raises(error, match=wanted + got):
            draw(random.key(0), bad)


@pytest.mark.parametrize("draw", [random.uniform, random.normal, random.gumbel])
def test_another_dtype_is_refused(draw):
    wanted = rf"^{draw.__name__}: dtype must be torch\.float32 or torch\.float64, got "
    for half in (torch.bfloat16, torch.float16):
        guess = rf"{half}\. Draw in float32 and cast the result: {draw.__name__}\(\.\.\.\)\.to\({half}\)\."
        with pytest.raises(ValueError, match=wanted + guess):
            draw(random.key(0), (2,), dtype=half)
    for other, got in ((torch.int64, r"torch\.int64\."), (None, r"None\."), ("float32", r"float32\.")):
        with pytest.raises(ValueError, match=wanted + got):
            draw(random.key(0), (2,), dtype=other)


KEY = random.key(0)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: random.key(1.0), TypeError, r"^key: seed must be an int, got float 1\.0\."),
        (lambda: random.key(True), TypeError, r"^key: seed must be an int, got bool True\."),
        (lambda: random.key(torch.tensor(1)), TypeError, r"^key: seed must be an int, got int64 \[\]\."),
        (lambda: random.key(2**63), ValueError, r"^key: seed must be in \[-9223372036854775808, 9.*7\], got 9.*8\."),
        (lambda: random.key(-(2**63) - 1), ValueError, r"^key: seed must be in \[-9.*, got -9223372036854775809\."),
        (lambda: random.split(KEY, -1), ValueError, r"^split: num must be at least 0, got -1\."),
        (lambda: random.split(KEY, 2.0), TypeError, r"^split: num must be an int, got float 2\.0\."),
        (lambda: random.split(KEY, (2, 3)), TypeError, r"^split: num must be an int, got tuple \(2, 3\)\."),
        (lambda: random.fold_in(KEY, -1), ValueError, r"^fold_in: data must be in \[0, 4294967295\], got -1\."),
        (lambda: random.fold_in(KEY, 2**32), ValueError, r"^fold_in: data must be in .*, got 4294967296\."),
        (lambda: random.fold_in(KEY, 1.0), TypeError, r"^fold_in: data must be an int or an integer tensor, got float"),
        (lambda: random.fold_in(KEY, torch.tensor(1.0)), TypeError, r"^fold_in: data must .*, got float32 \[\]\."),
        (lambda: random.fold_in(KEY, torch.tensor(True)), TypeError, r"^fold_in: data must .*, got bool \[\]\."),
        (
            lambda: random.fold_in(KEY, torch.arange(3)),
            ValueError,
            r"^fold_in: data must be an int or of shape \[\], got int64 \[3\]\. vmap over several",
        ),
        (lambda: random.bernoulli(KEY, 1.5, (2,)), ValueError, r"^bernoulli: p must be in \[0, 1\], got 1\.5\."),
        (lambda: random.bernoulli(KEY, -0.1, (2,)), ValueError, r"^bernoulli: p must be in \[0, 1\], got -0\.1\."),
        (lambda: random.bernoulli(KEY, math.nan, (2,)), ValueError, r"^bernoulli: p must be in \[0, 1\], got nan\."),
        (lambda: random.bernoulli(KEY, True, (2,)), TypeError, r"^bernoulli: p must be a number .*, got bool True\."),
        (lambda: random.bernoulli(KEY, torch.tensor(1), (2,)), TypeError, r"^bernoulli: p must be a floating-point"),
        (
            lambda: random.bernoulli(KEY, torch.zeros(3), (3, 2)),
            ValueError,
            r"^bernoulli: p must be of a shape that broadcasts to \[3, 2\], got float32 \[3\]\.",
        ),
        (lambda: random.bernoulli(KEY, torch.zeros(2, 3), (3,)), ValueError, r"^bernoulli: p must .* to \[3\], got"),
        (lambda: random.uniform(KEY, (2,), 1, 0), ValueError, r"^uniform: high must be at least 1, got 0\."),
        (lambda: random.uniform(KEY, (2,), -math.inf), ValueError, r"^uniform: low must be in \[-3\.40.*, got -inf\."),
        (lambda: random.uniform(KEY, (2,), 0, 1e300), ValueError, r"^uniform: high must be in \[-3\.40.*, got 1e\+300"),
        (lambda: random.uniform(KEY, (2,), 0, math.nan), ValueError, r"^uniform: high must be in .*, got nan\."),
        (lambda: random.uniform(KEY, (2,), False), TypeError, r"^uniform: low must be a number .*, got bool False\."),
        (lambda: random.uniform(KEY, (2,), torch.zeros(3)), ValueError, r"^uniform: low must be of a shape .*\[3\]\."),
        (
            lambda: random.uniform(KEY, (2,), torch.tensor(True)),
            TypeError,
            r"^uniform: low must be a tensor of numbers, got bool \[\]\.",
        ),
        (lambda: random.permutation(KEY, -1), ValueError, r"^permutation: n_or_tensor must be at least 0, got -1\."),
        (lambda: random.permutation(KEY, 2.0), TypeError, r"^permutation: n_or_tensor must be a tensor or an int, got"),
        (lambda: random.permutation(KEY, True), TypeError, r"^permutation: n_or_tensor must .*, got bool True\."),
        (
            lambda: random.permutation(KEY, torch.tensor(5)),
            ValueError,
            r"^permutation: n_or_tensor must be an int or of shape \[n, \.\.\.\], got int64 \[\]\. Pass a number as",
        ),
        (
            lambda: random.choice(KEY, 5, (2, 3)),
            ValueError,
            r"^choice: shape must be of no more than the 5 there are, got 6 draws\. Did you mean replace=True\?",
        ),
        (
            lambda: random.choice(KEY, torch.zeros(0, 2), (1,), replace=True),
            ValueError,
            r"^choice: shape must be of no more than the 0 there are, got 1 draws\.$",
        ),
        (lambda: random.choice(KEY, 5, (2,), replace=1), TypeError, r"^choice: replace must be True or False, got int"),
        (
            lambda: random.choice(KEY, 2**31, (2,), replace=True),
            ValueError,
            r"^choice: n_or_tensor must be in \[0, 2147483647\], got 2147483648\.",
        ),
    ],
)
def test_bad_input_is_refused(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_numpy_numbers_count_as_numbers():
    assert torch.equal(random.key(np.int64(-3)), random.key(-3))
    key = random.key(np.uint8(3))
    assert torch.equal(random.fold_in(key, np.uint32(7)), random.fold_in(key, 7))
    assert torch.equal(random.split(key, np.int32(3)), random.split(key, 3))
    assert torch.equal(random.bits(key, (np.int64(3),)), random.bits(key, (3,)))
    assert torch.equal(random.permutation(key, np.int64(5)), random.permutation(key, 5))
    assert torch.equal(random.uniform(key, (3,), np.float32(-1), np.float32(1)), random.uniform(key, (3,), -1.0, 1.0))
    with pytest.raises(TypeError, match=r"key: seed must be an int, got float64 np\.float64\(3\.0\)"):
        random.key(np.float64(3))
