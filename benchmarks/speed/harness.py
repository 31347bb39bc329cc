"""Honest timing: contenders take turns, so that a drifting machine hits all of them; medians and quartiles."""

import platform
import random
import re
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from rlloss.pages import STATE, forget

LIMIT = "limit"  # the contender that only does what has to be done, in fresh memory
MOST = 101  # rounds at most


class Timing(NamedTuple):
    """Milliseconds of one call."""

    median: float
    low: float  # first quartile
    high: float  # third quartile


class Case(NamedTuple):
    """One piece of work, and all who do it; the first contender is what the others are compared with."""

    name: str
    size: str
    scale: float  # what grows with the size
    draw: Callable[[], Any]  # new data of that size
    contenders: Mapping[str, Callable[[Any], object]]  # each does the work on the data, and leaves nothing behind
    results: Callable[[Any], int] = lambda data: 0  # bytes that a call writes because they are its result
    seconds: float = 0.0  # where rounds go on beyond the repetitions, they do for so long at least


class Settings(NamedTuple):
    """How to measure."""

    device: str = "cpu"
    repetitions: int = 21
    seconds: float = 0.0  # rounds go on beyond the repetitions until so many have passed, or not at all
    limit: float = 300.0  # seconds for a first call
    clock: Callable[[], float] = time.perf_counter


class First(NamedTuple):
    """What a contender's first call, which compiles, has shown."""

    seconds: float
    graphs: int
    breaks: int
    note: str = ""  # why there is no second call


class Row(NamedTuple):
    """One contender of one case; NaN where nothing could be measured."""

    suite: str
    case: str
    size: str
    scale: float
    contender: str
    median_ms: float
    first_quartile_ms: float
    third_quartile_ms: float
    times_faster_than_first: float
    percent_of_limit: float  # 100: as fast as the limit, which on CUDA is a copy at full bandwidth
    extra_memory_mib: float  # at the worst moment, above inputs and results
    first_call_s: float
    graphs: int
    graph_breaks: int
    recompilations: int  # at a second call, with other data of the same shapes
    kernels: int  # launched on the GPU by one call
    note: str


def measure(suite: str, case: Case, settings: Settings) -> list[Row]:
    """A row for each contender; one that fails, or is not ready in time, has a note in place of figures."""
    torch._dynamo.reset()  # or the second size would be compiled for all sizes
    torch.manual_seed(0)
    data, more = case.draw(), case.draw()
    first, again = {}, {}
    for name, contender in case.contenders.items():
        first[name] = first_call(partial(contender, data), settings.limit)
        again[name] = 0 if first[name].note else recompilations(partial(contender, more))
    del more
    ready = {name: partial(run, data) for name, run in case.contenders.items() if not first[name].note}
    warmup = min(3, settings.repetitions // 4)
    seconds = max(settings.seconds, case.seconds) if settings.seconds else 0.0
    timings = compare(ready, settings.repetitions, warmup, settings.clock, seconds)
    nothing = float("nan")
    reference = timings.get(next(iter(case.contenders)))
    limits: dict[bool, Timing] = {}
    for name, timing in timings.items():
        if name.startswith(LIMIT):
            limits.setdefault("compiled" in name, timing)
    rows = []
    for name in case.contenders:
        label = (suite, case.name, case.size, case.scale, name)
        if name not in ready:
            cost = (*[nothing] * 6, *first[name][:3], 0, 0, first[name].note)
            rows.append(Row(*label, *cost))
            continue
        timing, run = timings[name], ready[name]
        faster = reference.median / timing.median if reference else nothing
        limit = limits.get("compiled" in name) or limits.get(False)  # the first of its kind
        share = 100 * limit.median / timing.median if limit else nothing
        extra = (peak_memory(run, settings.device) - case.results(data)) / 2**20
        counts = (again[name], kernels(run, settings.device), "")
        rows.append(Row(*label, *timing, faster, share, max(extra, 0.0), *first[name][:3], *counts))
    return rows


def first_call(call: Callable[[], object], limit: float) -> First:
    """Calls it once; what it raises, or that it took too long, is noted."""

    def stop(*_: object) -> None:
        raise TimeoutError

    note, start = "", time.perf_counter()
    counters = torch._dynamo.utils.counters
    counters.clear()
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        call()
        synchronize()
    except Exception as error:
        late = time.perf_counter() - start >= limit
        note = f"not ready after {limit:.0f} s" if late else f"fails: {type(error).__name__}: {error}".split("\n")[0]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    breaks = sum(counters["graph_break"].values())
    return First(time.perf_counter() - start, counters["stats"]["unique_graphs"], breaks, note)


def recompilations(call: Callable[[], object]) -> int:
    """How many graphs a call compiles."""
    counters = torch._dynamo.utils.counters
    counters.clear()
    call()
    return int(counters["stats"]["unique_graphs"])


def kernels(call: Callable[[], object], device: str = "cpu") -> int:
    """How many kernels a call launches on the GPU: none on a CPU."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        call()
        synchronize()
    events = profile.profiler.kineto_results.events()
    launched = [e.name() for e in events if e.device_type() == torch.autograd.DeviceType.CUDA]
    return sum(not name.startswith(("Memcpy", "Memset")) for name in launched)


def synchronize() -> None:
    """Wait until the GPU, if there is one, has done all it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def compare(
    contenders: Mapping[str, Callable[[], object]],
    repetitions: int = 21,
    warmup: int = 3,
    clock: Callable[[], float] = time.perf_counter,
    seconds: float = 0.0,
) -> dict[str, Timing]:
    """Time every contender `repetitions` times, once a round, after `warmup` rounds that do not count.

    Short rounds go on until so many `seconds` have passed since the first, or there are `MOST` that count.

    The order is drawn anew for each round: what one leaves in caches and allocators meets all others alike.

    With one thread, `time.process_time` as the clock measures on a busy machine what others cannot disturb much.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    draws, names = random.Random(0), list(contenders)
    rounds = _rounds(-warmup, repetitions, seconds)
    for repetition in tqdm(rounds, total=warmup + repetitions, unit="round", leave=False, disable=None):
        for name in draws.sample(names, len(names)):
            start = clock()
            contenders[name]()
            synchronize()
            elapsed = clock() - start
            if repetition >= 0:
                times[name].append(1e3 * elapsed)
    quartiles = {name: statistics.quantiles(values, n=4) for name, values in times.items()}
    return {name: Timing(q[1], q[0], q[2]) for name, q in quartiles.items()}


def _rounds(first: int, repetitions: int, seconds: float) -> Iterator[int]:
    end = time.perf_counter() + seconds
    yield from range(first, repetitions)
    for repetition in range(repetitions, MOST):
        if time.perf_counter() >= end:
            return
        yield repetition


def peak_memory(contender: Callable[[], object], device: str = "cpu") -> int:
    """Bytes that one call has allocated at its worst moment, above what was there before it.

    Memory that our losses have kept is given back first, or a call that uses it again would seem to need none.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        contender()
        return torch.cuda.max_memory_allocated() - before
    forget()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        contender()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now, peak = 0, 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def machine(device: str = "") -> str:
    """What the figures were measured on."""
    if device != "cpu" and torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    else:
        lines = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        model = re.search(r"model name\s*: (.*)", lines)
        name = model[1] if model else platform.processor() or platform.machine()
    count = torch.get_num_threads()
    threads = f"{count} thread{'s' * (count > 1)}"
    if device == "cpu" and STATE.exists():
        chosen = STATE.read_text().partition("[")[2].partition("]")[0]
        threads += f", huge pages {chosen!r}"
    return f"{name}, {threads}, torch {torch.__version__}, Python {platform.python_version()}"
