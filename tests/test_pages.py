"""Large gradients ask for huge pages, lie where others lay that are gone, and nothing else is asked for or lost."""

import copy
import io
import mmap
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import rlloss
from rlloss import fused, pages
from rlloss.pages import HUGE, SMALLEST, STEP, advise_huge_pages, for_result, forget

pytestmark = pytest.mark.usefixtures("nothing_kept")


@pytest.fixture
def _switched_often():
    """Threads are, so that they meet."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.fixture
def advised(monkeypatch):
    """What the kernel is told: (start, length, advice)."""
    calls = []
    monkeypatch.setattr(pages, "_madvise", lambda: lambda *args: calls.append(args) or -1)
    return calls


def test_whole_pages_inside_the_memory_are_advised(advised):
    memory = torch.empty(HUGE + 100, dtype=torch.uint8)
    assert advise_huge_pages(memory) is memory
    ((start, length, advice),) = advised
    end = memory.data_ptr() + memory.nbytes
    assert advice == mmap.MADV_HUGEPAGE
    assert start % mmap.PAGESIZE == length % mmap.PAGESIZE == 0
    assert memory.data_ptr() <= start < memory.data_ptr() + mmap.PAGESIZE
    assert end - mmap.PAGESIZE < start + length <= end


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
def test_each_part_is_written_once_and_no_more(advised, dtype):
    numbers = HUGE // dtype.itemsize
    memory = torch.ones(64, numbers // 64, dtype=dtype).t()  # contiguous in another order
    advise_huge_pages(memory)
    assert len(advised) == 1
    step = STEP // dtype.itemsize
    written = (memory.t().reshape(-1) == 0).nonzero().squeeze(1)
    assert torch.equal(written, torch.arange(0, numbers, step))


def test_small_memory_and_other_devices_are_left_alone(advised):
    advise_huge_pages(torch.empty(HUGE - 1, dtype=torch.uint8))
    advise_huge_pages(torch.empty(0))
    advise_huge_pages(torch.empty(HUGE, dtype=torch.uint8, device="meta"))
    assert not advised


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_memory_in_a_graph_is_advised_when_it_runs(advised, dtype):
    like = torch.empty(64, HUGE // 64 // dtype.itemsize, dtype=dtype).t()

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
    memory = torch.ones(HUGE, dtype=torch.uint8)
    assert advise_huge_pages(memory) is memory
    assert memory.all()
    assert pages._madvise() is None
    assert pages.memory_like(memory) is None


def gradient_of(image, target):
    return fused.reduce(fused.ErrorSum(lambda x, y: ((x - y).square().sum(),), 1), image, target)[0]


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
    assert torch.equal(gradient(HUGE // 4), torch.full((1, 1, HUGE // 4), -2.0))
    assert len(advised) == 1
    gradient(HUGE // 4 - 1)
    assert len(advised) == 1


# ------------------------------------------------------------------------------------------------ memory kept


def result(rows=64, dtype=torch.float32, size=SMALLEST):
    """A large result, in columns."""
    return for_result(torch.empty(0, dtype=dtype), (rows, size // dtype.itemsize // rows), (1, rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_result_lies_where_one_lay_that_is_gone(advised, dtype):
    first = result(size=HUGE)
    address = first.data_ptr()
    del first
    second = result(32, dtype, HUGE)
    assert second.data_ptr() == address
    assert (second.shape, second.stride(), second.dtype) == ((32, HUGE // dtype.itemsize // 32), (1, 32), dtype)
    assert second.is_contiguous() is False
    assert second._base is None
    assert not second.requires_grad
    assert len(advised) == 1


HOLDERS = {
    "a reference": lambda x: x,
    "a view": lambda x: x[3:, ::2],
    "numpy": lambda x: x.numpy(),
    "dlpack": torch.from_dlpack,
    "a storage": lambda x: x.untyped_storage(),
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_no_result_lies_where_one_is_still_seen(holder):
    first = result().fill_(1.0)
    address, held = first.data_ptr(), HOLDERS[holder](first)
    del first
    second = result().fill_(2.0)
    assert second.data_ptr() != address
    seen = torch.empty(0).set_(held) if holder == "a storage" else held
    assert (seen == 1.0).all()
    del held, seen
    assert result().data_ptr() == address


def test_no_result_lies_where_one_is_saved_for_backward():
    factor = torch.ones((), requires_grad=True)
    product = result().fill_(1.0) * factor
    result().fill_(2.0)
    product.sum().backward()
    assert factor.grad == SMALLEST // 4


@pytest.mark.usefixtures("asked_anew")
@pytest.mark.parametrize("stride", [(0,), (2,)])
@pytest.mark.parametrize("kept", [0, 1])
def test_memory_with_gaps_or_used_twice_is_not_kept(monkeypatch, stride, kept):
    monkeypatch.setattr(pages, "_madvise", lambda: None)
    for _ in range(kept):
        result()
    memory = for_result(torch.empty(0), (SMALLEST // 4,), stride)
    assert memory.stride() == stride
    del memory
    assert sum(map(len, pages._IDLE.values())) == kept


def test_memory_is_kept_of_the_sizes_asked_for_last(monkeypatch):
    monkeypatch.setattr(pages, "SMALLEST", 2**16)
    monkeypatch.setattr(pages, "SIZES", 4)

    def sizes():
        return [size >> 16 for size, idle in pages._IDLE.items() if idle]

    several = [result(size=2**16) for _ in range(3)]
    del several
    assert len(pages._IDLE[2**16]) == 3
    for number in (2, 3, 4):
        result(size=number << 16)
    assert sizes() == [1, 2, 3, 4]
    result(size=2 << 16)
    assert sizes() == [1, 3, 4, 2]
    result(size=5 << 16)
    assert sizes() == [3, 4, 2, 5]
    held = result(size=3 << 16)
    assert sizes() == [4, 2, 5]
    del held
    assert sizes() == [4, 2, 5, 3]
    several = [result(size=number << 16) for number in range(1, 10)]
    assert sizes() == []
    del several
    assert sizes() == [6, 7, 8, 9]
    held = result(size=9 << 16)
    forget()
    del held
    assert not pages._IDLE


@pytest.mark.parametrize(("numbers", "kept"), [(2**18, True), (2**18 - 1, False)])
def test_a_result_of_a_mebibyte_is_kept(numbers, kept):
    for_result(torch.empty(0), (numbers,))
    assert [len(idle) for idle in pages._IDLE.values()] == [1] * kept


def test_small_results_and_other_devices_are_not_kept():
    assert for_result(torch.empty(0), (2, 3)).stride() == (3, 1)
    assert for_result(torch.empty(0), (2, 3), (1, 2)).stride() == (1, 2)
    assert for_result(torch.empty(0, device="meta"), (SMALLEST,)).is_meta
    assert not pages._IDLE


def test_a_result_is_not_made_where_there_is_memory():
    result()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        again = result()
    assert again.nbytes == SMALLEST
    assert all(abs(event.self_cpu_memory_usage) < SMALLEST for event in profile.events())


class Looks(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace")
@pytest.mark.parametrize("by", ["a mode", "a tracer"])
def test_who_looks_at_operations_sees_memory_being_made(by):
    def check(x):
        result()
        assert [len(idle) for idle in pages._IDLE.values()] == [1]
        return x

    held = result()
    result()
    if by == "a tracer":
        torch.jit.trace(check, torch.zeros(()), check_trace=False)
    else:
        with Looks():
            check(None)
    del held
    assert [len(idle) for idle in pages._IDLE.values()] == [2]


@pytest.mark.usefixtures("_switched_often")
def test_threads_do_not_share_memory(monkeypatch):
    monkeypatch.setattr(pages, "SMALLEST", 2**12)

    def work(number):
        mine = []
        for i in range(300):
            mine.append(result(size=2**12).fill_(number))
            if not all((x == number).all() for x in mine):
                return False
            if i % 3 == 2:
                mine.clear()
        return True

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(work, range(4)))


def test_gradients_of_a_loop_lie_in_the_same_memory():
    places = set()
    for _ in range(3):
        grad = gradient(SMALLEST // 4)
        assert torch.equal(grad, torch.full_like(grad, -2.0))
        places.add(grad.data_ptr())
        del grad
    assert len(places) == 1
    kept = [gradient(SMALLEST // 4) for _ in range(3)]
    assert len({grad.data_ptr() for grad in kept}) == 3


@pytest.mark.filterwarnings("ignore")  # where warnings are errors, a compiler gets the formula in place of what it gets
@pytest.mark.skipif(pages._madvise() is None, reason="this kernel gives no huge pages")
def test_gradients_of_a_compiled_loop_lie_in_the_same_memory():
    torch.compiler.reset()
    compiled, places = torch.compile(gradient_of, fullgraph=True, backend="aot_eager"), []
    image, target = torch.zeros(HUGE // 4, requires_grad=True), torch.ones(HUGE // 4)
    for _ in range(3):
        compiled(image, target).backward()
        image.grad = None
        places.append([memory.data_ptr() for idle in pages._IDLE.values() for memory in idle])
    assert places[0]
    assert places == [places[0]] * 3


def test_a_gradient_is_a_tensor_like_any_other():
    grad = gradient(SMALLEST // 4)
    assert torch.equal(copy.deepcopy(grad), grad)
    file = io.BytesIO()
    torch.save(grad, file)
    file.seek(0)
    assert torch.equal(torch.load(file), grad)
    grad.mul_(2).sub_(1)
    assert (grad == -5).all()
    shared = grad.share_memory_()
    assert shared.is_shared()
    assert (shared == -5).all()
    with pytest.raises(RuntimeError, match="not resizable"):
        gradient(SMALLEST // 4).resize_(SMALLEST)


@pytest.mark.skipif(pages._madvise() is None, reason="this kernel gives no huge pages")
def test_the_kernel_notes_the_advice():
    image = gradient(HUGE // 4)
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
