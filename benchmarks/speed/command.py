"""Options of the speed benchmarks, and what becomes of them: suites are measured, shown and written."""

import argparse
import datetime
import importlib
import importlib.metadata
import itertools
import logging
import multiprocessing
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from benchmarks.speed import goals, paths, report
from benchmarks.speed.harness import MOST, Case, Row, Settings, machine, measure

SUITES = ("model_loss", "returns", "rnd", "ensembles", "loops", "update")
RESULTS = Path(__file__).parent / "results"


def main(arguments: Sequence[str] | None = None, suite: str = "") -> None:
    """Measure the suites that were asked for, one after another."""
    options = parse(arguments, suite)
    prepare(options)
    rows = []
    for name in options.suites:
        rows += run(name, options)
    summary = f"{paths.listing(options.device)}\n\n{goals.listing(rows, options.device)}\n"
    print(summary, end="")
    if options.output is not None and set(options.suites) == set(SUITES) and not options.contenders:
        (options.output / "summary.md").write_text(summary)


def parse(arguments: Sequence[str] | None = None, suite: str = "") -> argparse.Namespace:
    """The options, checked; of one suite, `--only` names contenders in place of suites."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.speed.{suite}" if suite else "python -m benchmarks.speed",
        description="Losses beside torchrl's and the hardware's limit: time, memory, compilation.",
    )
    if not suite:
        parser.add_argument("--only", dest="suites", default=",".join(SUITES), help="suites (default: %(default)s)")
    parser.add_argument(
        "--only" if suite else "--contenders",
        dest="contenders",
        help="those with one of these in the name, such as eager,limit (default: all, fewer with --quick)",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--quick", action="store_true", help="a few small cases in one process, five rounds")
    parser.add_argument("--repetitions", type=int, help="timed rounds (default: 21 to 101, 5 with --quick)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU (default: as torch)")
    parser.add_argument("--busy", action="store_true", help="one thread, its processor time: on a CPU with other work")
    parser.add_argument("--limit", type=float, default=300, help="seconds for a first call (default: 300)")
    parser.add_argument(
        "--output",
        type=Path,
        help="folder for tables and pictures (default: results, results/cuda; --quick: none)",
    )
    options = parser.parse_args(arguments)
    options.suites = [suite] if suite else options.suites.split(",")
    unknown = [name for name in options.suites if name not in SUITES]
    if unknown:
        parser.error(f"--only must name suites of {', '.join(SUITES)}, got {', '.join(unknown)}.")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no CUDA device here.")
    if options.busy and options.device == "cuda":
        parser.error("--busy is for the CPU.")
    # A median of a few short calls is of little worth on a machine that others share.
    options.seconds = 5.0 if options.repetitions is None and not options.quick else 0.0
    if options.repetitions is None:
        options.repetitions = 5 if options.quick else 21
    if options.repetitions < 2:
        parser.error(f"--repetitions must be at least 2, for there are quartiles, got {options.repetitions}.")
    if options.threads < 1:
        parser.error(f"--threads must be at least 1, got {options.threads}.")
    options.threads = 1 if options.busy else options.threads
    if options.output is None and not options.quick:
        options.output = RESULTS / "cuda" if options.device == "cuda" else RESULTS
    return options


def chosen(name: str, options: argparse.Namespace) -> Iterator[Case]:
    """The cases of a suite, with the contenders that are wanted."""
    suite = importlib.import_module(f"benchmarks.speed.{name}")
    wanted = (options.contenders or (suite.QUICK if options.quick else "")).split(",")
    for case in suite.cases(options.quick, options.device):
        contenders = {k: v for k, v in case.contenders.items() if any(w in k for w in wanted)}
        if contenders:
            yield case._replace(contenders=contenders)


def prepare(options: argparse.Namespace) -> None:
    """Settings of a whole process."""
    torch.set_num_threads(options.threads)
    # A compiler that breaks the graph logs pages of it; the count is in the table.
    torch._logging.set_logs(dynamo=logging.ERROR)
    warnings.filterwarnings("ignore", module="torchrl|tensordict")
    # What compiling takes is measured, not what it takes when it was done before.
    torch._inductor.config.force_disable_caches = not options.quick
    warnings.filterwarnings("ignore", message="dynamo_pgo force disabled")


def here(name: str, case: Case, options: argparse.Namespace) -> list[Row]:
    """One case of a suite, measured in this process."""
    clock = time.process_time if options.busy else time.perf_counter
    return measure(name, case, Settings(options.device, options.repetitions, options.seconds, options.limit, clock))


def alone(name: str, index: int, options: argparse.Namespace) -> list[Row]:
    """One case of a suite, measured in a new process.

    What a case leaves behind in the allocator decides whether the next one finds memory or has to ask for pages, which
    is often most of its time.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(_there, name, index, options).result()


def _there(name: str, index: int, options: argparse.Namespace) -> list[Row]:
    # By its number, for what a case does cannot be sent to another process.
    prepare(options)
    case = next(itertools.islice(chosen(name, options), index, None))
    if any("compiled" in contender for contender in case.contenders):
        # The compiler's own start, in which it tries out the processor, is not of whoever compiles first.
        torch.compile(torch.sin)(torch.ones(2))
    return here(name, case, options)


def run(name: str, options: argparse.Namespace) -> list[Row]:
    """One suite: measured, printed and, where there is a folder for it, written."""
    suite = importlib.import_module(f"benchmarks.speed.{name}")
    rows: list[Row] = []
    for index, case in enumerate(chosen(name, options)):
        print(f"{name}: {case.name}, {case.size}", flush=True)
        rows += here(name, case, options) if options.quick else alone(name, index, options)
    if not rows:
        raise SystemExit(f"benchmarks.speed: no contender of {name} has {options.contenders} in its name.")
    calls = f"{options.repetitions} to {MOST}" if options.seconds else options.repetitions
    conditions = (
        f"{'Processor time' if options.busy else 'Wall time'} of {calls} calls in turn. "
        f"{machine(options.device)}, torchrl {importlib.metadata.version('torchrl')}, "
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}; load average {os.getloadavg()[0]:.1f} at the end."
    )
    remarks = suite.remarks(rows) if hasattr(suite, "remarks") else ()
    table = report.markdown(f"{suite.TITLE}. {conditions}", rows, remarks)
    print(f"\n{table}", flush=True)
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / f"{name}.md").write_text(table)
        report.write_csv(rows, conditions, options.output / f"{name}.csv")
        report.picture(suite.TITLE, conditions, suite.AXIS, rows, options.output / f"{name}.png")
    return rows
