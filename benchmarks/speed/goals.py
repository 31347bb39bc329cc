"""Ratios that the library is held to, from the rows of one run."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from benchmarks.speed.harness import LIMIT, Row
from benchmarks.speed.report import number


class Goal(NamedTuple):
    """`over` / `under`, each a (suite, case, size, contender), and what is wanted of it."""

    over: tuple[str, str, str, str]
    under: tuple[str, str, str, str]
    wanted: str  # ">= 5", "<= 0.85"
    of: str = "median_ms"


def within(suite: str, case: str, size: str, over: str, under: str, wanted: str, of: str = "median_ms") -> Goal:
    """Two contenders of one case."""
    return Goal((suite, case, size, over), (suite, case, size, under), wanted, of)


def model_loss(case: str, *wanted: str) -> list[Goal]:
    """The three ratios of one case, as many as are wanted."""
    pairs = (("torchrl eager", "rlloss eager"), ("rlloss eager", "torchrl compiled"), ("rlloss compiled", LIMIT))
    ratios = zip(pairs, wanted, strict=False)
    return [within("model_loss", case, "B 16, T 64", *pair, text) for pair, text in ratios]


CPU = [
    *model_loss("official, pixels", ">= 5", "<= 0.85", "<= 1.6"),
    *model_loss("default knobs, pixels", ">= 10", "<= 0.85", "<= 2"),
    *model_loss("official, vectors", ">= 2", "<= 1"),
    *model_loss("KL terms", ">= 2", "<= 1"),
    within("returns", "forward and backward", "B 1024, T 64", "torchrl eager", "rlloss eager", ">= 5"),
    within("rnd", "Nature CNN", "B 1024", "torchrl eager", "rlloss_nn eager", ">= 4.5"),
    Goal(
        ("rnd", "Nature CNN", "B 1024", "torchrl eager"),
        ("rnd", "Nature CNN, channels_last", "B 1024", "rlloss_nn eager"),
        ">= 6",
    ),
    # Each held against networks of its kind.
    within("rnd", "Nature CNN", "B 1024", "rlloss_nn eager", LIMIT, "<= 1.05"),
    within("rnd", "Nature CNN", "B 1024", "rlloss_nn compiled", "limit: compiled networks alone", "<= 1.05"),
    within("ensembles", "B 256", "N 10", "Python loop", "vmap compiled", ">= 3.5"),
    within(
        "model_loss", "official, pixels", "B 16, T 64", "torchrl eager", "rlloss eager", ">= 20", "extra_memory_mib"
    ),
]

CUDA = [
    *[goal._replace(wanted=">= 3") for goal in CPU if goal.over[3] == "torchrl eager" and goal.of == "median_ms"],
    *[goal for goal in CPU if goal.over[3] == "Python loop" or goal.of == "extra_memory_mib"],
    *[
        within("model_loss", case, "B 16, T 64", LIMIT, "rlloss compiled", ">= 0.7")
        for case in ("official, pixels", "default knobs, pixels")
    ],
]


def ratio(goal: Goal, rows: Sequence[Row]) -> float:
    """The ratio that was measured; NaN where it was not."""
    figures = []
    for *place, contender in (goal.over, goal.under):
        found = [
            getattr(row, goal.of)
            for row in rows
            if [row.suite, row.case, row.size] == place
            and (row.contender == contender or (contender == LIMIT and row.contender.startswith(LIMIT)))
        ]
        figures.append(found[0] if found else float("nan"))
    over, under = figures
    return over / under if under else float("inf") * over


def reached(wanted: str, got: float) -> bool:
    """Whether a ratio is what is wanted of it, such as ">= 5"."""
    sides: dict[str, Callable[[float, float], bool]] = {">=": float.__ge__, "<=": float.__le__}
    sign, bound = wanted.split()
    return sides[sign](float(got), float(bound))


def listing(rows: Sequence[Row], device: str) -> str:
    """A line for each ratio."""
    lines = ["| | ratio | wanted | got | |", "|---|---|---|---|---|"]
    for goal in CUDA if device == "cuda" else CPU:
        over, under = goal.over, goal.under
        got = ratio(goal, rows)
        what = f"{over[3]} / {under[3]}" if over[1] == under[1] else f"{over[3]} ({over[1]}) / {under[3]}"
        what += ", extra memory" if goal.of == "extra_memory_mib" else ""
        verdict = "not measured" if got != got else "yes" if reached(goal.wanted, got) else "NO"
        lines.append(f"| {under[0]}: {under[1]}, {under[2]} | {what} | {goal.wanted} | {number(got)} | {verdict} |")
    return "\n".join(lines)
