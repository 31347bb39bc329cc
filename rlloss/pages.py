"""Huge pages for large results: advice to the kernel, which may take it or not, and memory that it was given for."""

import ctypes
import functools
import mmap
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SMALLEST = 2**25  # bytes; beyond, glibc's malloc asks the kernel anew each time, and each page is a fault to serve
STEP = 256  # bytes; a write in each is enough work for torch to give every thread a part of the memory
STATE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


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
    if memory.nbytes < SMALLEST or memory.device.type != "cpu":
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
    """Memory in a compiled graph for a result like ``x``, None where :func:`advise_huge_pages` would do nothing.

    What a compiler allocates by itself cannot be advised. inductor writes a pointwise result into this instead, if that
    seems to read it, and nobody does later: ``torch.where(never, memory, result)``. No number in it means anything.
    """
    # Brings in a library that only compilers need.
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    if x.device.type != "cpu" or type(x) not in (Tensor, torch.nn.Parameter) or not _offered():
        return None
    # Found out when it runs where sizes vary, for a comparison would compile a graph for each side of it.
    if statically_known_true(x.numel() * x.element_size() < SMALLEST):
        return None
    # A number of x, or a compiler would take two calls of the same size for one.
    one = x.detach()[(slice(1),) * x.ndim]
    memory: Tensor = _advised(one, x.shape, torch.empty_like(x, device="meta").stride())
    return memory


@torch.library.custom_op("rlloss::advised_memory", mutates_args=())
def _advised(like: Tensor, size: Sequence[int], stride: Sequence[int]) -> Tensor:
    return advise_huge_pages(like.new_empty_strided(size, stride))


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
