"""Honest timing: contenders take turns, so that a drifting machine hits all of them; medians and quartiles."""

import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm


class Timing(NamedTuple):
    """Milliseconds of one call."""

    median: float
    low: float  # first quartile
    high: float  # third quartile


def compare(
    contenders: Mapping[str, Callable[[], object]],
    repetitions: int = 21,
    warmup: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time every contender `repetitions` times, A B C A B C ..., after `warmup` rounds that do not count.

    With one thread, `time.process_time` as the clock measures on a busy machine what others cannot disturb much.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for repetition in tqdm(range(-warmup, repetitions), unit="round", leave=False):
        for name, contender in contenders.items():
            start = clock()
            contender()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if repetition >= 0:
                times[name].append(1e3 * (clock() - start))
    quartiles = {name: statistics.quantiles(values, n=4) for name, values in times.items()}
    return {name: Timing(q[1], q[0], q[2]) for name, q in quartiles.items()}


def table(timings: Mapping[str, Timing], against: str) -> str:
    """A row for each contender: median, quartiles, and how many times faster than `against` it is."""
    rows = [f"{'':<44} {'median ms':>10} {'quartiles':>19} {'x faster':>9}"]
    for name, t in timings.items():
        quartiles = f"{t.low:.2f} - {t.high:.2f}"
        rows.append(f"{name:<44} {t.median:>10.2f} {quartiles:>19} {timings[against].median / t.median:>9.2f}")
    return "\n".join(rows)


def peak_memory(contender: Callable[[], object], device: str = "cpu") -> int:
    """Bytes that one call has allocated at its worst moment, above what was there before it."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        contender()
        return torch.cuda.max_memory_allocated() - before
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
    return f"{name}, {threads}, torch {torch.__version__}, Python {platform.python_version()}"
