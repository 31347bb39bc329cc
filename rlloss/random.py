r"""Random numbers as pure functions of a key: equal bits eager, under vmap and compiled, on every device.

A key is data, an int64 tensor [2] of two unsigned 32-bit words; the same key always gives the same numbers, so use each
key once: ``split`` it into as many keys as there are draws, or ``fold_in`` the number of the step, and draw from those.
Bits are those of ``jax.random`` (threefry-2x32, partitionable), so that a JAX experiment can be replayed.

    >>> noise_key, mask_key = split(key(0))
    >>> normal(noise_key, (2,)), bernoulli(mask_key, 0.5, (3,))
    (tensor([ 1.0040, -0.9063]), tensor([ True,  True, False]))
    >>> torch.vmap(lambda k: bits(k, (2,)))(split(key(0), 3)).shape
    torch.Size([3, 2])
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rlloss import checks
from rlloss.types import Scalar

# Constants of threefry-2x32 with 20 rounds.
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA

_WORD = 2**32 - 1

# Giles' polynomials for the inverse error function in float32, highest power first: |x| below 0.9966, and beyond.
_CENTRAL = (
    *(2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 0.00021858087),
    *(-0.00125372503, -0.00417768164, 0.246640727, 1.50140941),
)
_TAIL = (
    *(-0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773),
    *(-0.0076224613, 0.00943887047, 1.00167406, 2.83297682),
)


def key(seed: int, *, device: torch.device | str | None = None) -> Tensor:
    r"""The key that belongs to a seed.

    .. math:: (\lfloor s / 2^{32} \rfloor \bmod 2^{32}, \; s \bmod 2^{32})

    A negative seed stands for its 64-bit two's complement. This is what JAX does with x64 enabled; without x64 it drops
    the first word, so that keys of seeds outside [0, 2**32) differ from ours.

    Source: jax-ml/jax 0.10.2 jax/_src/random/threefry2x32.py ``threefry_seed``.

    Args:
        seed: an int in [-2**63, 2**63).
        device: where the key, and so all that is drawn from it, lives.

    Returns:
        [2], int64.

    Raises:
        TypeError: if ``seed`` is not an int.
        ValueError: if ``seed`` does not fit into 64 bits.

    Example:
        >>> key(42), key(-1)
        (tensor([ 0, 42]), tensor([4294967295, 4294967295]))
    """
    seed = checks.integer("key", "seed", seed, low=-(2**63))
    # Filled on the device: a copy from the host would wait for it.
    words = [torch.full((), word, dtype=torch.int64, device=device) for word in (seed >> 32 & _WORD, seed & _WORD)]
    return torch.stack(words)


def split(key: Tensor, num: int = 2) -> Tensor:
    """As many new keys as there are draws to make; the old one is used up.

    Source: jax-ml/jax 0.10.2 jax/_src/random/threefry2x32.py ``_threefry_split_foldlike``.

    Args:
        key: [2], int64.
        num: how many.

    Returns:
        [num, 2]: ``unbind()`` it, or ``vmap`` over its first dimension.

    Raises:
        TypeError: if ``key`` is not an int64 tensor or ``num`` not an int.
        ValueError: if ``key`` is not of shape [2] or ``num`` is negative.

    Example:
        >>> first, second, third = split(key(0), 3)
        >>> first
        tensor([1797259609, 2579123966])
    """
    key, num = _checked_key("split", key), checks.integer("split", "num", num)
    return torch.stack(_words(key, (num,)), -1)


def fold_in(key: Tensor, data: int | Tensor) -> Tensor:
    """A new key for each pair of a key and a number, such as the number of a step or of an ensemble's member.

    Source: jax-ml/jax 0.10.2 jax/_src/random/threefry2x32.py ``threefry_fold_in``.

    Args:
        key: [2], int64.
        data: an int in [0, 2**32), or an integer tensor [], of which the lower 32 bits count. In a compiled function,
            pass what changes from call to call as a tensor: an int recompiles.

    Returns:
        [2], int64.

    Raises:
        TypeError: if ``key`` is not an int64 tensor or ``data`` neither an int nor an integer tensor.
        ValueError: if ``key`` is not of shape [2], or ``data`` not of shape [] or outside [0, 2**32).

    Example:
        >>> fold_in(key(0), 7)
        tensor([2716826189,  292468403])
    """
    key = _checked_key("fold_in", key)
    if not isinstance(data, Tensor):
        data = checks.integer("fold_in", "data", data, high=_WORD, wanted="an int or an integer tensor")
        return torch.stack(_threefry(key, data))
    if data.dtype == torch.bool or data.is_floating_point() or data.is_complex():
        raise TypeError(checks.text("fold_in", "data", "an int or an integer tensor", checks.describe(data)))
    if data.ndim != 0:
        guess = "vmap over several numbers."
        raise ValueError(checks.text("fold_in", "data", "an int or of shape []", checks.describe(data), guess))
    return torch.stack(_threefry(key, data.to(torch.int64) & _WORD))


def bits(key: Tensor, shape: Sequence[int]) -> Tensor:
    r"""Uniform 32-bit numbers.

    .. math:: b_i = a_i \oplus c_i, \quad (a_i, c_i) = \mathrm{threefry}(key, (\lfloor i / 2^{32} \rfloor,
              i \bmod 2^{32}))

    Source: Salmon et al. 2011 (doi:10.1145/2063384.2063405); jax-ml/jax 0.10.2 jax/_src/random/threefry2x32.py
    ``_threefry_random_bits_partitionable``.

    Args:
        key: [2], int64.
        shape: of the result.

    Returns:
        ``shape``, int64, each in [0, 2**32).

    Raises:
        TypeError: if ``key`` is not an int64 tensor or ``shape`` not a tuple of ints.
        ValueError: if ``key`` is not of shape [2] or a size is negative.

    Example:
        >>> bits(key(0), (3,))
        tensor([4070199207, 4202968722, 1427181096])
    """
    return _bits(_checked_key("bits", key), checks.shape("bits", "shape", shape))


def uniform(
    key: Tensor, shape: Sequence[int], low: Scalar = 0.0, high: Scalar = 1.0, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    r"""Uniform in [low, high).

    .. math:: \max(l, \; l + (h - l) \lfloor b / 2^{9} \rfloor \, 2^{-23})

    In float64 the upper 52 of 64 bits take the place of the upper 23 of 32. Where the interval is narrow for the
    magnitude of its ends, rounding can give ``high`` itself, as in JAX. Bit-equal to JAX on [0, 1) in both dtypes; on
    other intervals in float32 where XLA fuses product and sum, as it does on CPU, and in float64 to one rounding.

    Source: jax-ml/jax 0.10.2 jax/_src/random/core.py ``_uniform``.

    Args:
        key: [2], int64.
        shape: of the result.
        low: a number, or a tensor that broadcasts to ``shape``.
        high: likewise; not below ``low``.
        dtype: torch.float32 or torch.float64; other bits, not other digits of the same numbers.

    Returns:
        ``shape``, of ``dtype``.

    Raises:
        TypeError: if ``key`` is not an int64 tensor, ``shape`` not a tuple of ints or an end not a number.
        ValueError: if ``key`` is not of shape [2], a size is negative, ``dtype`` another one, an end is not finite or
            does not broadcast to ``shape``, or ``high`` is below ``low``.

    Example:
        >>> uniform(key(0), (3,), -1.0, 1.0)
        tensor([ 0.8953,  0.9572, -0.3354])
    """
    key, shape = _checked_key("uniform", key), checks.shape("uniform", "shape", shape)
    unit = _unit(key, shape, _checked_dtype("uniform", dtype))
    _check_end("low", low, shape, dtype)
    _check_end("high", high, shape, dtype)
    if not isinstance(low, Tensor) and not isinstance(high, Tensor):
        checks.within("uniform", "high", high, low)
        if low == 0 and high == 1:
            return unit
    start, end = (x.to(dtype) if isinstance(x, Tensor) else unit.new_full((), x) for x in (low, high))
    # Exact in float64, the product of two float32 numbers gives the same bits whether or not a compiler fuses the sum.
    scaled = unit.double() * (end - start).double() + start.double()
    return torch.maximum(start, scaled.to(dtype))


def normal(key: Tensor, shape: Sequence[int], *, dtype: torch.dtype = torch.float32) -> Tensor:
    r"""Standard normal.

    .. math:: \sqrt 2 \, \mathrm{erf}^{-1}(u), \quad u \sim U[-1 + \epsilon / 2, 1)

    Source: jax-ml/jax 0.10.2 jax/_src/random/core.py ``_normal_real``.

    Args:
        key: [2], int64.
        shape: of the result.
        dtype: torch.float32 or torch.float64.

    Returns:
        ``shape``, of ``dtype``: JAX's numbers up to rounding, which compilers and devices do in their own ways.

    Raises:
        TypeError: if ``key`` is not an int64 tensor or ``shape`` not a tuple of ints.
        ValueError: if ``key`` is not of shape [2], a size is negative or ``dtype`` another one.

    Example:
        >>> normal(key(0), (3,))
        tensor([ 1.6226,  2.0253, -0.4336])
    """
    key, shape = _checked_key("normal", key), checks.shape("normal", "shape", shape)
    unit = _unit(key, shape, _checked_dtype("normal", dtype))
    x = unit * 2 + (torch.finfo(dtype).eps / 2 - 1)
    return math.sqrt(2) * (torch.erfinv(x) if dtype == torch.float64 else _inverse_error_function(x))


def gumbel(key: Tensor, shape: Sequence[int], *, dtype: torch.dtype = torch.float32) -> Tensor:
    r"""Standard Gumbel: the noise that makes an argmax of logits a sample of their categorical distribution.

    .. math:: -\log(-\log u), \quad u \sim U[\mathrm{tiny}, 1)

    Source: jax-ml/jax 0.10.2 jax/_src/random/core.py ``_gumbel``, mode "low".

    Args:
        key: [2], int64.
        shape: of the result: that of the logits, for :func:`rlloss.categorical.straight_through_one_hot`.
        dtype: torch.float32 or torch.float64.

    Returns:
        ``shape``, of ``dtype``, finite: JAX's numbers up to rounding, which compilers and devices do in their own ways.

    Raises:
        TypeError: if ``key`` is not an int64 tensor or ``shape`` not a tuple of ints.
        ValueError: if ``key`` is not of shape [2], a size is negative or ``dtype`` another one.

    Example:
        >>> logits = torch.tensor([0.0, 2.0, 1.0])
        >>> torch.argmax(logits + gumbel(key(0), logits.shape))
        tensor(1)
    """
    key, shape = _checked_key("gumbel", key), checks.shape("gumbel", "shape", shape)
    unit = _unit(key, shape, _checked_dtype("gumbel", dtype))
    return -torch.log(-torch.log(unit.clamp(min=torch.finfo(dtype).tiny)))


def bernoulli(key: Tensor, p: Scalar, shape: Sequence[int]) -> Tensor:
    r"""True with probability p.

    .. math:: u < p, \quad u \sim U[0, 1)

    Source: jax-ml/jax 0.10.2 jax/_src/random/core.py ``_bernoulli``, mode "low".

    Args:
        key: [2], int64.
        p: a number in [0, 1], or a floating-point tensor that broadcasts to ``shape``. Compared in float32, or in
            float64 where it is a float64 tensor.
        shape: of the result.

    Returns:
        ``shape``, bool.

    Raises:
        TypeError: if ``key`` is not an int64 tensor, ``shape`` not a tuple of ints or ``p`` not a number or floating.
        ValueError: if ``key`` is not of shape [2], a size is negative, ``p`` is a number outside [0, 1] or does not
            broadcast to ``shape``.

    Example:
        >>> bernoulli(key(0), 0.5, (4,))
        tensor([False, False,  True,  True])
    """
    key, shape = _checked_key("bernoulli", key), checks.shape("bernoulli", "shape", shape)
    checks.within("bernoulli", "p", p, 0.0, 1.0)
    if not isinstance(p, Tensor):
        return _unit(key, shape, torch.float32) < p
    p = checks.floating("bernoulli", "p", p)
    _broadcasts("bernoulli", "p", p, shape)
    return _unit(key, shape, p.dtype) < p


def permutation(key: Tensor, n_or_tensor: int | Tensor) -> Tensor:
    """The numbers below n, or the rows of a tensor, in random order.

    Source: jax-ml/jax 0.10.2 jax/_src/random/core.py ``_shuffle``.

    Args:
        key: [2], int64.
        n_or_tensor: how many numbers, or a tensor [n, ...] whose rows are permuted together.

    Returns:
        [n], int64; or the shape and dtype of the tensor.

    Raises:
        TypeError: if ``key`` is not an int64 tensor or ``n_or_tensor`` neither an int nor a tensor.
        ValueError: if ``key`` is not of shape [2], n is negative or the tensor has no dimension.

    Example:
        >>> permutation(key(0), 5)
        tensor([0, 1, 4, 3, 2])
    """
    key, n = _checked_key("permutation", key), _rows("permutation", n_or_tensor)
    order = _shuffled(key, n)
    return n_or_tensor.index_select(0, order) if isinstance(n_or_tensor, Tensor) else order


def choice(key: Tensor, n_or_tensor: int | Tensor, shape: Sequence[int], *, replace: bool = False) -> Tensor:
    """Random numbers below n, or random rows of a tensor.

    Without replacement: the first entries of :func:`permutation`. With replacement: 64 bits modulo n, as JAX draws
    them without x64; biased by less than n / 2**32.

    Source: jax-ml/jax 0.10.2 jax/_src/random/core.py ``choice`` and ``_randint`` (of int32).

    Args:
        key: [2], int64.
        n_or_tensor: how many numbers there are, or a tensor [n, ...] whose rows are drawn.
        shape: of the draws.
        replace: whether the same number can be drawn again.

    Returns:
        ``shape``, int64; or [*shape, ...] of the tensor's dtype.

    Raises:
        TypeError: if ``key`` is not an int64 tensor, ``n_or_tensor`` neither an int nor a tensor, ``shape`` not a tuple
            of ints or ``replace`` not a bool.
        ValueError: if ``key`` is not of shape [2], n or a size is negative, the tensor has no dimension, there are too
            few to draw from, or more than 2**31 - 1 with replacement.

    Example:
        >>> choice(key(0), 100, (3,)), choice(key(0), 2, (2, 3), replace=True).shape
        (tensor([ 0, 36,  1]), torch.Size([2, 3]))
    """
    key, n, shape = _checked_key("choice", key), _rows("choice", n_or_tensor), checks.shape("choice", "shape", shape)
    checks.flag("choice", "replace", replace)
    if replace:
        checks.integer("choice", "n_or_tensor", n, high=2**31 - 1)
    draws = math.prod(shape)
    if draws > n and (n == 0 or not replace):
        guess = "" if replace else "Did you mean replace=True?"
        raise ValueError(checks.text("choice", "shape", f"of no more than the {n} there are", f"{draws} draws", guess))
    index = _integers_below(key, n, shape) if replace else _shuffled(key, n)[:draws].reshape(shape)
    if not isinstance(n_or_tensor, Tensor):
        return index
    return n_or_tensor.index_select(0, index.reshape(-1)).reshape(*shape, *n_or_tensor.shape[1:])


def _threefry(key: Tensor, counter: Tensor | int) -> tuple[Tensor, Tensor]:
    """Both words of threefry-2x32 for each counter, a number below 2**62.

    Words live in the lower half of int64. Sums may grow above it, because only the right shift would bring the upper
    half back down: one mask per round is enough, and nothing reaches the sign bit. Words of a key that were read as
    signed count modulo 2**32.
    """
    first_key, second_key = key.unbind()
    schedule = (first_key, second_key, first_key ^ second_key ^ _PARITY)
    first, second = (counter >> 32) + first_key, counter + second_key
    for block in range(5):
        for rotation in _ROTATIONS[block % 2]:
            second = second & _WORD
            first = first + second
            # The two halves of a rotated word share no bit, so their sum is their union, and takes one pass less.
            second = torch.add(second >> (32 - rotation), second, alpha=2**rotation) ^ first
        first = first + schedule[(block + 1) % 3]
        second = second + (schedule[(block + 2) % 3] + (block + 1))
    return first & _WORD, second & _WORD


def _words(key: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    counter = torch.arange(math.prod(shape), dtype=torch.int64, device=key.device)
    return _threefry(key, counter.reshape(shape))


def _bits(key: Tensor, shape: tuple[int, ...]) -> Tensor:
    first, second = _words(key, shape)
    return first ^ second


def _unit(key: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Uniform in [0, 1): as many bits as the mantissa stores, so that conversion and scaling are exact."""
    if dtype == torch.float64:
        first, second = _words(key, shape)
        return (first << 20 | second >> 12).to(dtype) * 2.0**-52
    return (_bits(key, shape) >> 9).to(dtype) * 2.0**-23


def _inverse_error_function(x: Tensor) -> Tensor:
    """In float32, as XLA computes it.

    Squaring x costs up to 5e-6 in the tails, which ``torch.erfinv`` does not lose; JAX's numbers contain that error.
    """
    w = -torch.log1p(-x * x)
    return x * torch.where(w < 5, _polynomial(_CENTRAL, w - 2.5), _polynomial(_TAIL, torch.sqrt(w) - 3))


def _polynomial(coefficients: Sequence[float], x: Tensor) -> Tensor:
    value = torch.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        value = value * x + coefficient
    return value


def _pair(key: Tensor) -> tuple[Tensor, Tensor]:
    first, second = torch.stack(_words(key, (2,)), -1).unbind()
    return first, second


def _shuffled(key: Tensor, n: int) -> Tensor:
    """[n]: the numbers below n, sorted by random bits as often as makes a repeated tie unlikely."""
    order = torch.arange(n, dtype=torch.int64, device=key.device)
    for _ in range(math.ceil(3 * math.log(max(1, n)) / math.log(_WORD))):
        key, subkey = _pair(key)
        order = order.index_select(0, torch.sort(_bits(subkey, (n,)), stable=True).indices)
    return order


def _integers_below(key: Tensor, n: int, shape: tuple[int, ...]) -> Tensor:
    """``shape``: 64 random bits modulo n, or 32 where n is above 2**16 and the multiplier wraps around to 0.

    No other product or sum exceeds 32 bits, so that none needs a mask.
    """
    higher_key, lower_key = _pair(key)
    n = max(n, 1)
    multiplier = (2**16 % n) ** 2 % 2**32 % n
    return (_bits(higher_key, shape) % n * multiplier + _bits(lower_key, shape) % n) % n


def _checked_key(function: str, key: Tensor) -> Tensor:
    wanted, guess = "a key, int64 [2]", "random.key(seed) makes one."
    if not isinstance(key, Tensor) or key.dtype != torch.int64:
        if isinstance(key, Tensor) and key.dtype in (torch.uint32, torch.int32) and key.shape[-1:] == (2,):
            guess = "Did you mean key.to(torch.int64)?"
        raise TypeError(checks.text(function, "key", wanted, checks.describe(key), guess))
    if tuple(key.shape) != (2,):
        if key.ndim >= 2 and key.shape[-1] == 2:
            guess = "Did you split without unbinding? Take one key, or vmap over them."
        raise ValueError(checks.text(function, "key", wanted, checks.describe(key), guess))
    return key


def _checked_dtype(function: str, dtype: torch.dtype) -> torch.dtype:
    if dtype not in (torch.float32, torch.float64):
        half = dtype in (torch.bfloat16, torch.float16)
        guess = f"Draw in float32 and cast the result: {function}(...).to({dtype})." if half else ""
        raise ValueError(checks.text(function, "dtype", "torch.float32 or torch.float64", str(dtype), guess))
    return dtype


def _rows(function: str, n_or_tensor: int | Tensor) -> int:
    if not isinstance(n_or_tensor, Tensor):
        return checks.integer(function, "n_or_tensor", n_or_tensor, wanted="a tensor or an int")
    if n_or_tensor.ndim == 0:
        got, guess = checks.describe(n_or_tensor), "Pass a number as an int: shapes cannot depend on values."
        raise ValueError(checks.text(function, "n_or_tensor", "an int or of shape [n, ...]", got, guess))
    return n_or_tensor.shape[0]


def _check_end(argument: str, x: Scalar, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if isinstance(x, Tensor):
        _broadcasts("uniform", argument, checks.real("uniform", argument, x), shape)
    checks.within("uniform", argument, x, -torch.finfo(dtype).max, torch.finfo(dtype).max)


def _broadcasts(function: str, argument: str, x: Tensor, shape: tuple[int, ...]) -> None:
    pairs = zip(reversed(x.shape), reversed(shape), strict=False)
    if x.ndim > len(shape) or any(size not in (1, wanted) for size, wanted in pairs):
        wanted = f"of a shape that broadcasts to {list(shape)}"
        raise ValueError(checks.text(function, argument, wanted, checks.describe(x)))
