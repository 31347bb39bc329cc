"""Large gradients ask for huge pages, and nothing else is asked for or lost."""

import mmap
import sys
from pathlib import Path

import pytest
import torch

import rlloss
from rlloss import pages
from rlloss.pages import SMALLEST, STEP, advise_huge_pages


@pytest.fixture
def advised(monkeypatch):
    """What the kernel is told: (start, length, advice)."""
    calls = []
    monkeypatch.setattr(pages, "_madvise", lambda: lambda *args: calls.append(args) or -1)
    return calls


def test_whole_pages_inside_the_memory_are_advised(advised):
    memory = torch.empty(SMALLEST + 100, dtype=torch.uint8)
    assert advise_huge_pages(memory) is memory
    ((start, length, advice),) = advised
    end = memory.data_ptr() + memory.nbytes
    assert advice == mmap.MADV_HUGEPAGE
    assert start % mmap.PAGESIZE == length % mmap.PAGESIZE == 0
    assert memory.data_ptr() <= start < memory.data_ptr() + mmap.PAGESIZE
    assert end - mmap.PAGESIZE < start + length <= end


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
def test_each_part_is_written_once_and_no_more(advised, dtype):
    numbers = SMALLEST // dtype.itemsize
    memory = torch.ones(64, numbers // 64, dtype=dtype).t()  # contiguous in another order
    advise_huge_pages(memory)
    assert len(advised) == 1
    step = STEP // dtype.itemsize
    written = (memory.t().reshape(-1) == 0).nonzero().squeeze(1)
    assert torch.equal(written, torch.arange(0, numbers, step))


def test_small_memory_and_other_devices_are_left_alone(advised):
    advise_huge_pages(torch.empty(SMALLEST - 1, dtype=torch.uint8))
    advise_huge_pages(torch.empty(0))
    advise_huge_pages(torch.empty(SMALLEST, dtype=torch.uint8, device="meta"))
    assert not advised


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_memory_in_a_graph_is_advised_when_it_runs(advised, dtype):
    like = torch.empty(64, SMALLEST // 64 // dtype.itemsize, dtype=dtype).t()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def shaped(x):
        return pages.memory_like(x)

    for calls in (1, 2):
        memory = shaped(like)
        assert (memory.shape, memory.stride(), memory.dtype) == (like.shape, like.stride(), dtype)
        assert len(advised) == calls
    assert pages.memory_like(like[:-1]) is None
    assert pages.memory_like(like.to("meta")) is None


def test_memory_in_a_graph_is_an_operator_like_any_other():
    # The other checks compare what is in the memory.
    torch.library.opcheck(
        pages._advised, (torch.zeros(1), [4, 3], [1, 4]), test_utils=("test_schema", "test_faketensor")
    )


@pytest.fixture
def asked_anew():
    """Whether there are such pages is found out again, in the test and after it."""
    pages._madvise.cache_clear()
    yield
    pages._madvise.cache_clear()


@pytest.mark.usefixtures("asked_anew")
@pytest.mark.parametrize("without", ["Linux", "the advice", "pages in the kernel", "pages for anybody"])
def test_nothing_happens_where_there_are_no_such_pages(without, monkeypatch, tmp_path):
    state = tmp_path / "enabled"
    monkeypatch.setattr(pages, "STATE", state)
    if without != "pages in the kernel":
        state.write_text("always madvise [never]\n" if without == "pages for anybody" else "always [madvise] never\n")
    if without == "Linux":
        monkeypatch.setattr(sys, "platform", "win32")
    elif without == "the advice":
        monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    memory = torch.ones(SMALLEST, dtype=torch.uint8)
    assert advise_huge_pages(memory) is memory
    assert memory.all()
    assert pages._madvise() is None
    assert pages.memory_like(memory) is None


def gradient(numbers):
    """Of the squared error of an image of so many numbers."""
    logits = torch.zeros(1, 1, 1, 1)
    image = torch.zeros(1, 1, numbers, requires_grad=True)
    outputs = {"prior_logits": logits, "posterior_logits": logits, "reconstruction": image, "reward": logits[..., 0, 0]}
    batch = {"observation": torch.ones(1, 1, numbers), "reward": logits[..., 0, 0]}
    terms = rlloss.dreamer_v3_model_terms(
        outputs, batch, reward_two_hot=False, lambda_continue=0, reco_transform="none"
    )
    terms["reco"].sum().backward()
    return image.grad


def test_large_gradients_are_advised(advised):
    assert torch.equal(gradient(SMALLEST // 4), torch.full((1, 1, SMALLEST // 4), -2.0))
    assert len(advised) == 1
    gradient(SMALLEST // 4 - 1)
    assert len(advised) == 1


@pytest.mark.skipif(pages._madvise() is None, reason="this kernel gives no huge pages")
def test_the_kernel_notes_the_advice():
    image = gradient(SMALLEST // 4)
    middle, inside = image.data_ptr() + image.nbytes // 2, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        fields = line.split()
        if not fields[0].endswith(":"):
            low, high = (int(x, 16) for x in fields[0].split("-"))
            inside = low <= middle < high
        elif inside and fields[0] == "VmFlags:":
            assert "hg" in fields
            return
    raise AssertionError("no mapping holds the gradient")
