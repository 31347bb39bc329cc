"""One picture of several runs: the return of each over environment steps and over minutes, as a mean of 20 episodes.

python -m benchmarks.learning.curves runs/cartpole-*/metrics.csv --title CartPole-v1 --goal 475 --out curves.png
"""

import csv
from pathlib import Path

import matplotlib
import tyro

from benchmarks.learning.records import moving_mean

matplotlib.use("Agg")  # there may be no screen
from matplotlib import pyplot as plt


def main(files: tyro.conf.Positional[list[Path]], out: Path, title: str = "", goal: float | None = None) -> None:
    """Draws the runs.

    Args:
        files: the metrics.csv of each run.
        out: where the picture goes.
        title: above it.
        goal: a return to be reached, as a line.
    """
    figure, axes = plt.subplots(1, 2, figsize=(12, 4), sharey=True, layout="constrained")
    for seed, file in enumerate(files):
        with open(file, newline="") as lines:
            rows = list(csv.DictReader(lines))
        returns = [float(row["return"]) for row in rows]
        means = moving_mean(returns)
        for ax, name, unit in ((axes[0], "step", 1.0), (axes[1], "seconds", 60.0)):
            x = [float(row[name]) / unit for row in rows]
            ax.plot(x, returns, ".", color=f"C{seed}", alpha=0.2, markersize=4)
            ax.plot(x, means, color=f"C{seed}", label=f"seed {seed}, ends at {means[-1]:.0f}")
    for ax, label in zip(axes, ("environment steps", "minutes"), strict=True):
        ax.set_xlabel(label)
        if goal is not None:
            ax.axhline(goal, color="0.5", linestyle="--", linewidth=1)
    axes[0].set_ylabel("return (mean of 20 episodes)")
    axes[0].legend()
    figure.suptitle(title)
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    tyro.cli(main)
