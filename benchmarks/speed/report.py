"""What was measured, as CSV, as a table and as one picture for each suite."""

import csv
import math
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib

from benchmarks.speed.harness import LIMIT, Row

matplotlib.use("Agg")  # there may be no screen
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter


def write_csv(rows: Sequence[Row], conditions: str, path: Path) -> None:
    """One line for each row, with what it was measured under; :func:`read_csv` reads the rows back."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*Row._fields, "conditions"])
        writer.writerows([*[f"{x:.6g}" if isinstance(x, float) else x for x in row], conditions] for row in rows)


def read_csv(path: Path) -> list[Row]:
    """The rows of a file that :func:`write_csv` wrote."""
    kinds = Row.__annotations__
    with path.open(newline="") as file:
        return [Row(**{name: kinds[name](line[name]) for name in kinds}) for line in csv.DictReader(file)]


def markdown(title: str, rows: Sequence[Row], remarks: Iterable[str] = ()) -> str:
    """The times side by side, one line for each case; then all there is to say of each contender."""
    cases = by_case(rows)
    parts = [title] if len(cases) == 1 else [title, _times(cases)]
    return "\n\n".join([*parts, *remarks, _details(rows)]) + "\n"


def by_case(rows: Sequence[Row]) -> dict[tuple[str, str], dict[str, Row]]:
    """(case, size) -> contender -> row."""
    cases: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        cases.setdefault((row.case, row.size), {})[row.contender] = row
    return cases


def _times(cases: dict[tuple[str, str], dict[str, Row]]) -> str:
    contenders = list(dict.fromkeys(name for rows in cases.values() for name in rows))
    lines = [["median ms (quartiles)", "", *contenders], ["---"] * (2 + len(contenders))]
    for (case, size), rows in cases.items():
        lines.append([case, size, *[_time(rows[name]) if name in rows else "-" for name in contenders]])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _details(rows: Sequence[Row]) -> str:
    heads = ["", "", "median ms (quartiles)", f"x {rows[0].contender}", "% of the limit", "extra memory, MiB"]
    heads += ["first call, s", "graphs (breaks)", "recompiled", "kernels"]
    lines = [heads, ["---"] * len(heads)]
    for row in rows:
        figures = [row.note, *["-"] * 3] if row.note else [_time(row)]
        if not row.note:
            figures += [number(x) for x in (row.times_faster_than_first, row.percent_of_limit, row.extra_memory_mib)]
        graphs = [f"{row.graphs} ({row.graph_breaks})", str(row.recompilations)] if row.graphs else ["-", "-"]
        case = f"{row.case}, {row.size}"
        lines.append([case, row.contender, *figures, number(row.first_call_s), *graphs, str(row.kernels or "-")])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _time(row: Row) -> str:
    median, low, high = (number(x) for x in row[5:8])
    return "-" if row.note else f"{median} ({low} - {high})"


def number(x: float) -> str:
    """Three digits, or - for what is not a number."""
    if math.isnan(x):
        return "-"
    return f"{x:.0f}" if abs(x) >= 99.5 else f"{x:.3g}"


def picture(title: str, conditions: str, axis: str, rows: Sequence[Row], path: Path) -> None:
    """A panel for each case: time over size where there are several, else one line for each contender."""
    rows = [row for row in rows if not row.note]
    cases = list(dict.fromkeys(row.case for row in rows))
    contenders = list(dict.fromkeys(row.contender for row in rows))
    columns = 2 if len(cases) == 4 else min(3, len(cases))
    lines = math.ceil(len(cases) / columns)
    size = (max(7, 4.4 * columns), 0.8 + 3.4 * lines)
    figure, grid = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    for panel, case in zip(grid.flat, cases, strict=False):
        chosen = [row for row in rows if row.case == case]
        grows = len({row.scale for row in chosen}) > 1
        (_curves if grows else _dots)(panel, chosen, contenders)
        panel.set_title(case if grows else f"{case}\n{chosen[0].size}", fontsize=10)
        panel.set_xlabel(axis if grows else "ms (log)", fontsize=9)
        panel.tick_params(labelsize=9)
    for panel in grid.flat[len(cases) :]:
        panel.set_axis_off()
    under = textwrap.wrap(conditions, int(14 * size[0]))
    figure.suptitle("\n".join([title, *under]), fontsize=10)
    named = {label: line for panel in grid.flat for line, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    if named:
        figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=3, fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _curves(panel: plt.Axes, rows: Sequence[Row], contenders: Sequence[str]) -> None:
    for name in contenders:
        chosen = sorted((row for row in rows if row.contender == name), key=lambda row: row.scale)
        if not chosen:
            continue
        x, y = [row.scale for row in chosen], [row.median_ms for row in chosen]
        panel.plot(x, y, label=name, **_look(name, contenders))
        low, high = [row.first_quartile_ms for row in chosen], [row.third_quartile_ms for row in chosen]
        panel.fill_between(x, low, high, color=_look(name, contenders)["color"], alpha=0.15, linewidth=0)
    panel.set_xscale("log")
    panel.set_yscale("log")
    scales = sorted({row.scale for row in rows})
    panel.set_xticks(scales, [f"{x:g}" for x in scales])
    panel.minorticks_off()
    panel.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    panel.set_ylabel("ms", fontsize=9)
    panel.grid(alpha=0.3)


def _dots(panel: plt.Axes, rows: Sequence[Row], contenders: Sequence[str]) -> None:
    for line, row in enumerate(rows):
        look = _look(row.contender, contenders)
        panel.hlines(line, row.first_quartile_ms, row.third_quartile_ms, color=look["color"], linewidth=3, alpha=0.4)
        panel.plot(row.median_ms, line, marker="o", markersize=7, color=look["color"])
        place = {"xytext": (0, 7), "textcoords": "offset points", "ha": "center", "fontsize": 9}
        panel.annotate(number(row.median_ms), (row.median_ms, line), **place)
    panel.set_xscale("log")
    panel.set_xlim(min(row.first_quartile_ms for row in rows) / 1.6, max(row.third_quartile_ms for row in rows) * 1.6)
    panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.set_yticks(range(len(rows)), [row.contender.replace(", ", ",\n") for row in rows])
    panel.set_ylim(len(rows) - 0.5, -0.7)
    panel.grid(axis="x", alpha=0.3)


def _look(name: str, contenders: Sequence[str]) -> dict[str, object]:
    """The limit in grey, dashed, a second one dotted; torchrl in warm colours, all others in cold ones.

    What is compiled has a full marker.
    """
    limits = [other for other in contenders if other.startswith(LIMIT)]
    if name in limits:
        return {"color": "0.35", "linestyle": ":" if limits.index(name) else "--"}
    theirs = name.startswith(("torchrl", "Python loop"))
    group = [other for other in contenders if other not in limits]
    group = [other for other in group if other.startswith(("torchrl", "Python loop")) == theirs]
    warm, cold = ("#d95f02", "#a6266e", "#e6ab02"), ("#1b6ca8", "#1b9e77", "#66a61e")
    color = (warm if theirs else cold)[group.index(name) % 3]
    return {"color": color, "marker": "o", "markerfacecolor": color if "compiled" in name else "white"}
