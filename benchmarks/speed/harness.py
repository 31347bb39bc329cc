"""Honest timing: contenders take turns, so that a drifting machine hits all of them; medians and quartiles."""

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from tqdm import tqdm


class Timing(NamedTuple):
    """Milliseconds of one call."""

    median: float
    low: float  # first quartile
    high: float  # third quartile


def compare(
    contenders: Mapping[str, Callable[[], object]], repetitions: int = 21, warmup: int = 3
) -> dict[str, Timing]:
    """Time every contender `repetitions` times, A B C A B C ..., after `warmup` rounds that do not count."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for repetition in tqdm(range(-warmup, repetitions), unit="round", leave=False):
        for name, contender in contenders.items():
            start = time.perf_counter()
            contender()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if repetition >= 0:
                times[name].append(1e3 * (time.perf_counter() - start))
    quartiles = {name: statistics.quantiles(values, n=4) for name, values in times.items()}
    return {name: Timing(q[1], q[0], q[2]) for name, q in quartiles.items()}


def table(timings: Mapping[str, Timing], against: str) -> str:
    """A row for each contender: median, quartiles, and how many times faster than `against` it is."""
    rows = [f"{'':<44} {'median ms':>10} {'quartiles':>19} {'x faster':>9}"]
    for name, t in timings.items():
        quartiles = f"{t.low:.2f} - {t.high:.2f}"
        rows.append(f"{name:<44} {t.median:>10.2f} {quartiles:>19} {timings[against].median / t.median:>9.2f}")
    return "\n".join(rows)


def machine() -> str:
    """What the figures were measured on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}"
