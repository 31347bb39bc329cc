"""Static checks of shapes, dtypes, keys and options: one voice for every error text.

A check looks only at what is known without reading a value, so it costs nothing under ``vmap`` or ``torch.compile``
and never waits for a device. Each text reads ``function: argument must be <wanted>, got <got>. <guess>``.
"""

import math
import numbers
import sys
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor

from rlloss.types import Scalar

LARGEST = sys.float_info.max
LARGEST_INTEGER = 2**63 - 1  # of int64


class MissingKeyError(KeyError):
    """A KeyError that prints its sentence; KeyError itself prints the sentence's repr, quoted and escaped."""

    __str__ = Exception.__str__


def text(function: str, argument: str, wanted: str, got: str, guess: str = "") -> str:
    """The sentence every error of this library says."""
    return f"{function}: {argument} must be {wanted}, got {got}." + (f" {guess}" if guess else "")


def describe(x: object) -> str:
    """What ``x`` is, in words: ``float32 [2, 3]`` for a tensor, otherwise its type and value."""
    if isinstance(x, Tensor):
        return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"
    shown = isinstance(x, (str, tuple, list, numbers.Number))
    return f"{type(x).__name__} {x!r}" if shown else type(x).__name__


def tensor(function: str, argument: str, x: object) -> Tensor:
    """``x`` itself, if it is a tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(text(function, argument, "a tensor", describe(x)))
    return x


def floating(function: str, argument: str, x: object, guess: str = "") -> Tensor:
    """``x`` in the dtype that losses compute in: float32 at least, float64 stays; integers and bool are refused."""
    x = tensor(function, argument, x)
    if not x.is_floating_point():
        raise TypeError(text(function, argument, "a floating-point tensor", describe(x), guess))
    return _computed(x)


def real(function: str, argument: str, x: object, guess: str = "") -> Tensor:
    """As :func:`floating`, but integers are promoted to float32; bool and complex are refused."""
    x = tensor(function, argument, x)
    if x.dtype == torch.bool or x.is_complex():
        raise TypeError(text(function, argument, "a tensor of numbers", describe(x), guess))
    return _computed(x)


def boolean(function: str, argument: str, x: object, guess: str = "") -> Tensor:
    """``x`` itself, if it is a bool tensor."""
    x = tensor(function, argument, x)
    if x.dtype != torch.bool:
        raise TypeError(text(function, argument, "a bool tensor", describe(x), guess))
    return x


def _computed(x: Tensor) -> Tensor:
    dtype = compute_dtype(x)
    # A conversion to the dtype that a tensor has already takes as long as the rest of a check.
    return x if x.dtype == dtype else x.to(dtype)


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any of ``tensors`` is, else float32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def same_shape(function: str, argument: str, x: Tensor, other: str, shape: Sequence[int], guess: str = "") -> None:
    """``x`` has exactly ``shape``, the shape of what ``other`` names."""
    if tuple(x.shape) != tuple(shape):
        guess = guess or time_first(x.shape, shape)
        raise ValueError(text(function, argument, f"of shape {list(shape)} like {other}", describe(x), guess))


def leading_shape(function: str, argument: str, x: Tensor, other: str, shape: Sequence[int]) -> None:
    """The first dimensions of ``x`` are ``shape``, those of what ``other`` names."""
    if tuple(x.shape[: len(shape)]) != tuple(shape):
        wanted = f"of shape [{', '.join(map(str, [*shape, '...']))}] like {other}"
        raise ValueError(text(function, argument, wanted, describe(x), time_first(x.shape, shape)))


def time_first(got: Sequence[int], wanted: Sequence[int]) -> str:
    """A guess for the commonest mistake with batches of sequences, or nothing."""
    if len(wanted) >= 2 and len(got) >= 2 and (got[1], got[0]) == (wanted[0], wanted[1]) and got[0] != got[1]:
        return "Did you pass time first? Batches are [B, T, ...]."
    return ""


def last_dimension(function: str, argument: str, x: Tensor, size: int, guess: str = "") -> None:
    """The last dimension of ``x`` is ``size``."""
    if x.ndim == 0 or x.shape[-1] != size:
        raise ValueError(text(function, argument, f"of shape [..., {size}]", describe(x), guess))


def rank_at_least(function: str, argument: str, x: Tensor, names: Sequence[str]) -> None:
    """``x`` has at least the dimensions ``names``."""
    if x.ndim < len(names):
        raise ValueError(text(function, argument, f"of shape [..., {', '.join(names)}]", describe(x)))


def option(function: str, argument: str, value: object, options: Iterable[str]) -> None:
    """``value`` is one of ``options``."""
    options = list(options)
    if value not in options:
        wanted = "one of " + ", ".join(map(repr, options))
        raise ValueError(text(function, argument, wanted, repr(value), did_you_mean(value, options)))


def within(function: str, argument: str, value: object, low: float, high: float = LARGEST) -> None:
    """A Python or numpy number lies in [low, high]; without ``high`` it is finite.

    A tensor passes: reading it would wait for its device (rule 2).
    """
    if isinstance(value, Tensor):
        return
    if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real)):
        raise TypeError(text(function, argument, "a number or a 0-d tensor", describe(value)))
    # Numpy compares in the precision of its number, in which LARGEST may be infinite.
    number, low, high = (x if isinstance(x, (int, float)) else float(x) for x in (value, low, high))
    if not max(low, -LARGEST) <= number <= high:
        raise ValueError(text(function, argument, _range(value, low, high), repr(value)))


def knob(function: str, argument: str, value: object, low: float, high: float = LARGEST) -> None:
    """As :func:`within`, for what must be one number: a tensor has no dimensions."""
    if isinstance(value, Tensor) and value.ndim > 0:
        raise ValueError(text(function, argument, "a number or a 0-d tensor", describe(value)))
    within(function, argument, value, low, high)


def _range(value: Any, low: float, high: float) -> str:
    if high < LARGEST:
        return f"in [{low:g}, {high:g}]"
    return "a finite number" if low <= -LARGEST or value > low else f"at least {low:g}"


def integer(
    function: str, argument: str, x: object, low: int = 0, high: int = LARGEST_INTEGER, *, wanted: str = "an int"
) -> int:
    """``x`` as an int in [low, high]; the size of a traced tensor stays what it is."""
    if not is_integer(x):
        raise TypeError(text(function, argument, wanted, describe(x)))
    number: int = x if isinstance(x, (int, torch.SymInt)) else int(x)  # type: ignore[assignment, call-overload]
    if not low <= number <= high:
        span = f"in [{low}, {high}]" if high < LARGEST_INTEGER or low < 0 else f"at least {low}"
        raise ValueError(text(function, argument, span, repr(x)))
    return number


def is_integer(x: object) -> bool:
    """Whether ``x`` can count: an int of Python, of numpy or of a traced tensor's shape."""
    # bool is a subclass of int, and torch.SymInt is none.
    return isinstance(x, (int, torch.SymInt, numbers.Integral)) and not isinstance(x, bool)


def shape(function: str, argument: str, x: object) -> tuple[int, ...]:
    """``x`` as the shape of a tensor."""
    if not isinstance(x, (tuple, list)) or not all(is_integer(size) for size in x):
        guess = f"Did you mean ({x},)?" if is_integer(x) else ""
        raise TypeError(text(function, argument, "a tuple of ints", describe(x), guess))
    if any(size < 0 for size in x):
        raise ValueError(text(function, argument, "a tuple of sizes of at least 0", describe(x)))
    return tuple(x)


def flag(function: str, argument: str, x: object) -> None:
    """``x`` is True or False."""
    if not isinstance(x, bool):
        raise TypeError(text(function, argument, "True or False", describe(x)))


def function_of(function: str, argument: str, x: object, signature: str) -> None:
    """``x`` can be called, as ``signature`` says."""
    if not callable(x):
        raise TypeError(text(function, argument, f"a function {signature}", describe(x)))


def state(function: str, argument: str, x: object, kind: Any) -> None:
    """``x`` has the tensors of the NamedTuple ``kind``."""
    if not has_tensors(x, *kind._fields):
        wanted = f"a {kind.__name__} of tensors {', '.join(kind._fields)}"
        raise TypeError(text(function, argument, wanted, describe(x)))


def has_tensors(x: object, *names: str) -> bool:
    """Whether ``x`` has tensors as its attributes ``names``."""
    return all(isinstance(getattr(x, name, None), Tensor) for name in names)


def floating_dtype(function: str, dtype: torch.dtype) -> None:
    """``dtype`` is one of the floating-point dtypes."""
    if not dtype.is_floating_point:
        raise TypeError(text(function, "dtype", "a floating-point dtype", str(dtype).removeprefix("torch.")))


def scalar_like(x: Tensor, value: Scalar) -> Tensor:
    """``value`` as a 0-d tensor with the dtype and device of ``x``."""
    if isinstance(value, Tensor) or torch.compiler.is_compiling():
        # A compiled graph that fills in a Python number is compiled again for each new one.
        return (x.new_ones(()) * value).to(x.dtype)
    number = float(value)
    # What is beyond the dtype cannot be filled in either.
    return x.new_full((), number if abs(number) <= torch.finfo(x.dtype).max else number * math.inf)


def align(mask: Tensor, x: Tensor) -> Tensor:
    """``mask`` [*leading] as [*leading, 1, ..., 1], to select from ``x`` [*leading, ...]."""
    return mask.reshape([*mask.shape, *[1] * (x.ndim - mask.ndim)])


def take(function: str, argument: str, mapping: Any, key: str, why: str = "") -> Any:
    """``mapping[key]``, with an error that lists what is there."""
    if not hasattr(mapping, "keys"):
        raise TypeError(text(function, argument, "a mapping of tensors (dict or TensorDict)", describe(mapping)))
    keys = [str(k) for k in mapping.keys()]
    if key not in keys:
        guess = " ".join(s for s in (why, did_you_mean(key, keys)) if s)
        raise MissingKeyError(text(function, argument, f"a mapping with {key!r}", f"keys {sorted(keys)}", guess))
    return mapping[key]


def has(mapping: Any, key: str) -> bool:
    """Whether ``mapping`` (dict or TensorDict) holds ``key``."""
    return key in list(mapping.keys())


def did_you_mean(value: object, options: Iterable[str]) -> str:
    """The nearest option, as a question, or nothing."""
    close = get_close_matches(str(value), list(options), n=1)
    return f"Did you mean {close[0]!r}?" if close else ""
