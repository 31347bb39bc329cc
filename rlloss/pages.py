"""Memory for large results: in huge pages, where the kernel has them, and again when the result is gone."""

import ctypes
import functools
import math
import mmap
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SMALLEST = 2**20  # bytes, from which on memory is kept; below, malloc mostly has that of the last result still
HUGE = 2**24  # bytes, from which on huge pages are asked for
STEP = 256  # bytes; a write in each is enough work for torch to give every thread a part of the memory
SIZES = 8  # of which memory is kept; a step may have as many kinds of large results
STATE = Path("/sys/kernel/mm/transparent_hugepage/enabled")

#: Memory of results that are gone, by its bytes. No number in it means anything: a cache, and no state.
_IDLE: dict[int, list[Tensor]] = {}


def for_result(like: Tensor, size: Sequence[int], stride: Sequence[int] = ()) -> Tensor:
    """Memory for a result; where it is large, that of one as large which is gone.

    malloc hands large memory back to the kernel. A loop that makes such a result in each step has all of it cleared by
    the kernel in each step, which takes as long as the loss. Here it is kept for the next result of exactly that many
    bytes, as CUDA's memory is by torch: for the few sizes asked for last, as much of each as was in use at once.
    :func:`forget` lets go of it.

    A result is gone when nothing refers to its storage, which is like any other, but cannot be resized.

    Args:
        like: has the dtype and the device.
        size: of the result.
        stride: of the result, by which it is contiguous in some order of its dimensions; in theirs if not given.
    """
    size, stride, numbers = tuple(size), tuple(stride), math.prod(size)
    nbytes, fits = numbers * like.element_size(), not stride or _reach(size, stride) == numbers
    # Who looks at each operation, as compilers and tracers do, is to see where memory comes from.
    observed = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
    observed = observed or torch._C._get_tracing_state() is not None
    if nbytes < SMALLEST or like.device.type != "cpu" or observed or not fits:
        return _advised_empty(like, size, stride)
    # Threads may meet here: each takes what no other can take any more, and at worst some memory is not kept.
    idle = _IDLE.pop(nbytes, [])
    _IDLE[nbytes] = idle
    for longest_ago in list(_IDLE)[:-SIZES]:
        _IDLE.pop(longest_ago, None)
    try:
        kept = idle.pop()
    except IndexError:
        kept = _advised_empty(like, size, stride)
    # A storage tells nobody when it is gone, but lets go of the buffer that it was made of.
    lent = (ctypes.c_char * nbytes).from_address(kept.data_ptr())
    weakref.finalize(lent, _keep, nbytes, kept).atexit = False
    storage = torch.frombuffer(lent, dtype=like.dtype).untyped_storage()
    return like.new_empty(0).set_(storage, 0, size, stride)


def forget() -> None:
    """Give memory that lies idle back; that of results that are still there is not kept either."""
    _IDLE.clear()


def _keep(nbytes: int, memory: Tensor) -> None:
    idle = _IDLE.get(nbytes)
    if idle is not None:
        idle.append(memory)


def _reach(size: Sequence[int], stride: Sequence[int]) -> int:
    """How many numbers there are from the first to the last: more with gaps, fewer where some have one place."""
    return 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))


def _advised_empty(like: Tensor, size: Sequence[int], stride: Sequence[int]) -> Tensor:
    return advise_huge_pages(like.new_empty_strided(size, stride) if stride else like.new_empty(size))


def advise_huge_pages(memory: Tensor) -> Tensor:
    """``memory``, for which Linux is asked to hand out pages of 2 MiB in place of 4 KiB, where it is large.

    Of the time that a first write into 48 MiB takes, three quarters are the 12 000 page faults.

    The pages are handed out at once, by a write here and there. Each thread touches a part of the memory that is its
    own, while those that write block by block would touch the same page at the same time: each has the kernel clear
    2 MiB then, and all but one of them for nothing.

    Nothing happens where the kernel has no such pages, or does not give them to those who ask
    (/sys/kernel/mm/transparent_hugepage/enabled says ``never``), for tensors that are small or not on a CPU.

    Args:
        memory: just allocated, contiguous in some order of its dimensions, and not yet written.
    """
    if memory.nbytes < HUGE or memory.device.type != "cpu" or torch.compiler.is_compiling():
        return memory
    madvise = _madvise()
    if madvise is not None:
        start = -(-memory.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (memory.data_ptr() + memory.nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
        madvise(start, length, mmap.MADV_HUGEPAGE)  # an error would change nothing: it was advice
        step = STEP // memory.element_size()
        memory.as_strided((memory.numel() // step,), (step,)).zero_()
    return memory


def memory_like(x: Tensor) -> Tensor | None:
    """Memory in a compiled graph for a result like ``x``, None where there are no huge pages or it is small.

    What a compiler allocates by itself cannot be advised. inductor writes a pointwise result into this instead, if that
    seems to read it, and nobody does later: ``torch.where(never, memory, result)``. No number in it means anything.
    """
    if x.device.type != "cpu" or type(x) not in (Tensor, torch.nn.Parameter) or not _offered():
        return None
    if surely_below(x.numel() * x.element_size(), HUGE):
        return None
    # A number of x, or a compiler would take two calls of the same size for one.
    one = x.detach()[(slice(1),) * x.ndim]
    memory: Tensor = _advised(one, x.shape, torch.empty_like(x, device="meta").stride())
    return memory


def surely_below(size: int, bound: int) -> bool:
    """Whether a compiler knows a size to be less. Not where it varies: a comparison compiles a graph for each side."""
    # Brings in a library that only compilers need.
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(size < bound)


@torch.library.custom_op("rlloss::advised_memory", mutates_args=())
def _advised(like: Tensor, size: Sequence[int], stride: Sequence[int]) -> Tensor:
    return for_result(like, size, stride)


@_advised.register_fake
def _(like: Tensor, size: Sequence[int], stride: Sequence[int]) -> Tensor:
    return like.new_empty_strided(size, stride)


def _offered() -> bool:
    """Whether there are huge pages to be had."""
    return _madvise() is not None


# What `torch.compiler.assume_constant_result` sets, which would import the compiler with rlloss: the function is called
# while a graph is traced.
_offered._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _madvise() -> Any:
    """The C library's function, or None where there is none or no huge pages are to be had."""
    if sys.platform != "linux" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    if not STATE.exists() or "[never]" in STATE.read_text():
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return function
