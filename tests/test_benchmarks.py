"""The speed benchmarks count, compare and write what they should; how fast anything is, no test asks."""

# ruff: noqa: E402, where the extra is missing the imports would fail

import importlib
import math
import re
import time
import warnings
from pathlib import Path

import pytest
import torch

for needed in ("matplotlib", "tqdm", "torchrl"):
    pytest.importorskip(needed, reason='the extra "benchmarks" is not installed')

from benchmarks.speed import command, ensembles, goals, harness, model_loss, paths, report, returns
from benchmarks.speed.harness import MOST, Case, Row, Settings, compare, first_call, kernels, measure, peak_memory

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of torchrl, about itself
    from benchmarks.speed import loops, update

NOTHING = float("nan")


def row(contender: str, median: float, case: str = "one", size: str = "B 1", scale: float = 1.0, note: str = "") -> Row:
    figures = (median, 0.9 * median, 1.1 * median, 10 / median, NOTHING, 2 * median, 0.5)
    return Row("suite", case, size, scale, contender, *figures, 1, 0, 0, 0, note)


def test_contenders_take_turns() -> None:
    order = []
    timings = compare({name: lambda name=name: order.append(name) for name in "abc"}, repetitions=19, warmup=1)
    rounds = ["".join(order[i : i + 3]) for i in range(0, 60, 3)]
    assert {"".join(sorted(turn)) for turn in rounds} == {"abc"}
    assert len(order) == 60
    assert len(set(rounds)) == 6
    assert all(timing.low <= timing.median <= timing.high for timing in timings.values())


def test_quartiles_are_those_of_the_clock() -> None:
    ticks = iter([0, 9, 10, 11, 20, 22, 30, 33])  # in seconds; the first pair is the warm-up
    timing = compare({"a": lambda: None}, repetitions=3, warmup=1, clock=lambda: next(ticks))["a"]
    assert timing == (2000, 1000, 3000)


@pytest.mark.parametrize(("seconds", "rounds"), [(0.0, 4), (3.0, 4), (10.0, 9), (3600.0, MOST)])
def test_short_rounds_are_repeated(monkeypatch, seconds, rounds):
    calls = []
    # The clock that the harness reads goes on by a second a call, the warm-up's included.
    monkeypatch.setattr("time.perf_counter", lambda: len(calls))
    compare(
        {"a": lambda: calls.append(None)}, repetitions=4, warmup=1, seconds=seconds, clock=iter(range(999)).__next__
    )
    assert len(calls) == 1 + rounds


@pytest.mark.parametrize(("wanted", "of_case", "expected"), [(0.0, 9.0, 0.0), (3.0, 9.0, 9.0), (3.0, 0.0, 3.0)])
def test_a_case_may_take_longer_where_rounds_go_on(monkeypatch, wanted, of_case, expected):
    given = []

    def compare_once(contenders, *settings):
        given.append(settings[-1])
        return dict.fromkeys(contenders, harness.Timing(1, 1, 1))

    monkeypatch.setattr(harness, "compare", compare_once)
    measure("suite", Case("", "", 1, lambda: 1, {"a": lambda data: data}, seconds=of_case), Settings(seconds=wanted))
    assert given == [expected]


def test_memory_is_counted_above_what_was_there() -> None:
    there = torch.ones(1000)
    numbers = 64  # bytes, for the scalars
    assert 4000 <= peak_memory(lambda: there * 2) <= 4000 + numbers
    # The first is gone before the third is made.
    assert 8000 <= peak_memory(lambda: (there * 2 + 1) * 3) <= 8000 + numbers
    assert peak_memory(lambda: there.add_(1)) <= numbers


def test_no_kernel_is_launched_on_a_cpu() -> None:
    assert kernels(lambda: torch.ones(3) + 1) == 0


def test_first_call_notes_what_goes_wrong() -> None:
    def fail() -> None:
        raise RuntimeError("no such thing\nand more")

    assert first_call(lambda: None, 10).note == ""
    assert first_call(fail, 10).note == "fails: RuntimeError: no such thing"
    late = first_call(lambda: time.sleep(5), 0.05)
    assert late.note == "not ready after 0 s"


def test_measures_a_case_and_leaves_out_who_fails() -> None:
    def fail(x: torch.Tensor) -> None:
        raise ValueError("not today")

    contenders = {
        "first": lambda x: (x + 1) + 1,
        "compiled": torch.compile(lambda x: x * 2, backend="eager"),
        "failing": fail,
        "limit: a copy": torch.clone,
    }
    case = Case("addition", "1000", 1000, lambda: torch.ones(1000), contenders, lambda x: x.nbytes)
    first, compiled, failing, limit = measure("suite", case, Settings(repetitions=2))
    assert first[:5] == ("suite", "addition", "1000", 1000, "first")
    assert (first.times_faster_than_first, limit.percent_of_limit) == (1, 100)
    assert first.percent_of_limit == pytest.approx(100 * limit.median_ms / first.median_ms)
    assert first.extra_memory_mib == pytest.approx(4000 / 2**20, rel=0.02)
    assert limit.extra_memory_mib == 0
    assert (compiled.graphs, compiled.graph_breaks, compiled.recompilations) == (1, 0, 0)
    assert failing.note == "fails: ValueError: not today"
    assert math.isnan(failing.median_ms)


def test_shares_are_of_the_first_limit_of_a_kind() -> None:
    contenders = {
        "compiled": abs,
        "limit: one": abs,
        "limit: another": lambda _: time.sleep(0.01),
        "limit: compiled": abs,
    }
    rows = measure("suite", Case("", "", 1, lambda: 1, contenders, lambda _: 0), Settings(repetitions=2))
    one, another, compiled = rows[1:]
    assert (one.percent_of_limit, compiled.percent_of_limit) == (100, 100)
    assert another.percent_of_limit == pytest.approx(100 * one.median_ms / another.median_ms)
    assert rows[0].percent_of_limit == pytest.approx(100 * compiled.median_ms / rows[0].median_ms)


def test_recompilation_is_counted() -> None:
    contenders = {"compiled": torch.compile(lambda x: x + 1, backend="eager", dynamic=False)}
    sizes = iter((2, 3))
    case = Case("growing", "", 1, lambda: torch.ones(next(sizes)), contenders)
    assert measure("suite", case, Settings(repetitions=2))[0].recompilations == 1


def test_csv_round_trip(tmp_path: Path) -> None:
    rows = [row("a, with a comma", 1.25), row("b", NOTHING, note='fails: "why"')]
    report.write_csv(rows, "a machine, a day", tmp_path / "rows.csv")
    for got, wanted in zip(report.read_csv(tmp_path / "rows.csv"), rows, strict=True):
        assert [str(x) for x in got] == [str(x) for x in wanted]


def test_table_has_a_cell_for_everybody() -> None:
    rows = [row("a", 2), row("b", 1), row("a", 4, size="B 2", scale=2), row("b", NOTHING, "one", "B 2", 2, "too late")]
    title, times, remark, details = report.markdown("title", rows, ["remark"]).split("\n\n")
    assert (title, remark) == ("title", "remark")
    assert times.splitlines()[2:] == [
        "| one | B 1 | 2 (1.8 - 2.2) | 1 (0.9 - 1.1) |",
        "| one | B 2 | 4 (3.6 - 4.4) | - |",
    ]
    assert "| one, B 2 | b | too late | - | - | - | 0.5 | 1 (0) | 0 | - |" in details
    assert len({line.count("|") for line in details.strip().splitlines()}) == 1


def test_picture_is_drawn(tmp_path: Path) -> None:
    names = ("torchrl", "rlloss", "limit")
    rows = [row(name, size, "growing", f"B {size}", size) for size in (1, 2, 4) for name in names]
    report.picture(
        "title",
        "conditions",
        "B",
        [*rows, row("rlloss", 3, "alone"), row("b", NOTHING, note="late")],
        tmp_path / "a.png",
    )
    assert (tmp_path / "a.png").stat().st_size > 5_000


def test_ratios_and_verdicts() -> None:
    goal = goals.Goal(("suite", "one", "B 1", "slow"), ("suite", "one", "B 1", "limit"), ">= 3")
    rows = [row("slow", 8), row("limit: a copy", 2), row("slow", 99, size="B 2"), row("limit: another", 1)]
    assert goals.ratio(goal, rows) == 4
    assert goals.ratio(goal._replace(of="extra_memory_mib"), rows) == 4
    assert math.isnan(goals.ratio(goal, rows[:1]))
    assert goals.reached(">= 3", 4)
    assert not goals.reached("<= 0.85", 0.9)
    assert not goals.reached(">= 3", NOTHING)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_goals_are_listed(device: str) -> None:
    wanted = goals.CUDA if device == "cuda" else goals.CPU
    rows = [
        Row(*place, 0.0, *row(name, 1.0)[4:])._replace(suite=place[0], case=place[1], size=place[2])
        for goal in wanted
        for *place, name in (goal.over, goal.under)
    ]
    assert goals.listing([], device).count("not measured") == len(wanted)
    lines = goals.listing(rows, device).splitlines()[2:]
    # All ratios are 1 here.
    verdicts = ["yes |" if goals.reached(goal.wanted, 1.0) else "NO |" for goal in wanted]
    assert [line.split(" | ")[-1] for line in lines] == verdicts
    assert len(set(verdicts)) == 2


def test_goals_name_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.nn.init.orthogonal_", lambda weight, gain: weight)  # slow, and nothing runs here
    named = {place for goal in (*goals.CPU, *goals.CUDA) for place in (goal.over, goal.under)}
    there = {
        (suite, case.name, case.size, name)
        for suite in {place[0] for place in named}
        for case in importlib.import_module(f"benchmarks.speed.{suite}").cases(False, "cpu")
        for contender in case.contenders
        for name in {contender, "limit" if contender.startswith("limit") else contender}
    }
    assert not named - there


def test_remarks_say_from_where_on_a_vmap_wins() -> None:
    times = {"Python loop": (1, 5, 10), "vmap eager": (2, 5, 8), "vmap compiled": (1, 4, 4)}
    rows = [
        row(name, time, "B 256", f"N {members}", members)
        for name in times
        for members, time in zip((1, 5, 10), times[name], strict=True)
    ]
    (text,) = ensembles.remarks(rows)
    assert text.splitlines() == [
        "- B 256: vmap eager wins from N = 10 on.",
        "- B 256: vmap compiled wins from N = 5 on.",
    ]
    slow = [
        r._replace(median_ms=99, first_quartile_ms=99, third_quartile_ms=99) for r in rows if "loop" not in r.contender
    ]
    assert "vmap eager does not win up to N = 10." in ensembles.remarks(rows[:3] + slow)[0]
    assert ensembles.remarks(rows[3:]) == [""]


def test_all_sides_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_loss, "SIZES", ((2, 3), (2, 3), (2, 3)))
    monkeypatch.setattr(returns, "BATCH", 4)
    torch.manual_seed(0)
    cases = [*model_loss.cases(False, "cpu"), *returns.cases(False, "cpu"), *ensembles.cases(True, "cpu")]
    for case in cases:
        data = case.draw()
        runs = {name: run for name, run in case.contenders.items() if "compiled" not in name and "limit" not in name}
        assert len(runs) >= 2
        values = [run(data).flatten() for run in runs.values()]
        for value in values[1:]:
            torch.testing.assert_close(value, values[0], rtol=1e-4, atol=1e-5, msg=f"{case.name}, {list(runs)}")


def test_dtypes_without_a_fast_path_are_found() -> None:
    assert paths.takes_fast_path(paths.squared_error, torch.float32, torch.uint8, "cpu")
    assert not paths.takes_fast_path(paths.squared_error, torch.float32, torch.float64, "cpu")
    assert "- squared error: float32 and float64, " in paths.listing("cpu")


def test_options_are_checked(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, text in (
        (["--only", "rnd,no_such_suite"], "--only must name suites of model_loss, returns, .*, got no_such_suite"),
        (["--repetitions", "1"], "--repetitions must be at least 2"),
        (["--repetitions", "0"], "--repetitions must be at least 2"),
        (["--threads", "0"], "--threads must be at least 1"),
    ):
        with pytest.raises(SystemExit):
            command.parse(arguments)
        assert re.search(text, capsys.readouterr().err)
    quick = command.parse(["--quick", "--only", "rnd,returns", "--busy"])
    assert (quick.suites, quick.repetitions, quick.threads, quick.output) == (["rnd", "returns"], 5, 1, None)
    one = command.parse(["--only", "eager"], suite="update")
    assert (one.suites, one.contenders, one.output) == (["update"], "eager", command.RESULTS)


def test_a_suite_is_measured_printed_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command.main(["--quick", "--only", "returns", "--contenders", "eager", "--threads", "1", "--output", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {"returns.csv", "returns.md", "returns.png"}
    assert [row.contender for row in report.read_csv(tmp_path / "returns.csv")] == ["torchrl eager", "rlloss eager"]
    out = capsys.readouterr().out
    assert (tmp_path / "returns.md").read_text() in out
    assert out.splitlines()[-1].endswith("| not measured |")
    with pytest.raises(SystemExit, match="no contender of returns has nobody in its name"):
        command.main(["--quick", "--only", "returns", "--contenders", "nobody"])


def test_a_case_alone_is_the_one_of_that_number() -> None:
    arguments = ["--contenders", "limit", "--repetitions", "2", "--threads", "1"]
    options = command.parse(["--only", "returns", *arguments])
    case = list(command.chosen("returns", options))[1]
    (row,) = command.alone("returns", 1, options)
    assert (row.case, row.size, row.contender) == (case.name, case.size, "limit: a copy")
    assert row.median_ms > 0
    assert not row.note


@pytest.mark.parametrize(("quick", "agents"), [(False, ["1M agent", "12M agent"]), (True, ["1M agent"])])
def test_updates_with_cuda_are_those_that_the_table_wants(
    quick: bool, agents: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    for name in ("ours", "torchrl"):
        monkeypatch.setattr(update, name, lambda *given, name=name, **knobs: made.append((name, given[2], knobs)))
    cases = list(update.cases(quick, "cuda"))
    assert [case.name for case in cases] == agents
    assert all(len(case.contenders) == 8 for case in cases)
    assert {device for _, device, _ in made} == {"cuda"}
    assert sum(knobs.get("cuda_graph", False) for _, _, knobs in made) == 3 * len(agents)
    assert len(next(update.cases(quick, "cpu")).contenders) == 5


def test_a_scan_takes_the_steps_of_the_recurrent_model() -> None:
    sizes = update.Sizes(deter=16, hidden=8, stoch=3, classes=4, units=8)
    results = []
    for scanned in (False, True):
        torch.manual_seed(0)
        rssm = loops.RSSM(loops.ACTION, 8, deter=16, hidden=8, stoch=3, classes=4).double()
        data = {k: x.double() if x.is_floating_point() else x for k, x in loops.draw(sizes, 2, 5, "cpu")[0].items()}
        observe = rssm.observe
        if scanned:
            rssm.compiled = loops.Scan(rssm), None
            observe = torch.compile(observe, fullgraph=True, backend="aot_eager")
        done = observe(**data)
        loops.squares(done.deter, done.stoch, done.prior_logits, done.posterior_logits).backward()
        results.append((done, [p.grad for p in rssm.parameters()]))
    torch.testing.assert_close(*results)


def test_loops_run_and_leave_no_gradient() -> None:
    case = next(loops.cases(True, "cpu"))
    data = case.draw()
    values = {name: run(data) for name, run in case.contenders.items() if "eager" in name}
    assert list(values) == ["torchrl eager", "rlloss_nn eager"]
    assert all(value.isfinite() and value > 0 for value in values.values())
    assert all(run(data).isfinite() for name, run in case.contenders.items() if "eager" in name)


def test_goals_on_cuda() -> None:
    wanted = {(goal.under[0], goal.under[1], goal.wanted) for goal in goals.CUDA}
    assert ("model_loss", "official, pixels", ">= 0.7") in wanted
    assert ("returns", "forward and backward", ">= 3") in wanted
    assert ("rnd", "Nature CNN, channels_last", ">= 3") in wanted
    assert ("ensembles", "B 256", ">= 3.5") in wanted
