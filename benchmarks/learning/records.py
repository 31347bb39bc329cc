"""What a run leaves behind: a CSV and TensorBoard events, checkpoints, a picture."""

import csv
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

matplotlib.use("Agg")  # there may be no screen
from matplotlib import pyplot as plt

Row = Mapping[str, float]


class Log:
    """metrics.csv and TensorBoard events, one row for each episode.

    After an interruption both go on from the rows of the checkpoint; what was written after it is written anew.
    """

    def __init__(self, folder: Path, fields: Sequence[str], rows: Sequence[Row]):
        self.file = open(folder / "metrics.csv", "w", newline="")  # noqa: SIM115, closed on exit
        self.csv = csv.DictWriter(self.file, fields)
        self.csv.writeheader()
        self.csv.writerows(rows)
        self.events = SummaryWriter(str(folder), purge_step=int(rows[-1]["step"]) + 1 if rows else 0)

    def write(self, row: Row) -> None:
        self.csv.writerow(row)
        self.file.flush()
        for name in row.keys() - {"step"}:
            self.events.add_scalar(name, row[name], int(row["step"]))
        self.events.flush()  # or a sudden end would take with it what no checkpoint brings back

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        self.events.close()


def write_checkpoint(folder: Path, checkpoint: Mapping[str, Any]) -> None:
    """Writes checkpoint.pt, which is a whole one at every moment; the one before it stays as previous.pt."""
    path, previous = folder / "checkpoint.pt", folder / "previous.pt"
    with open(path.with_suffix(".tmp"), "wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    if path.exists():
        previous.unlink(missing_ok=True)
        os.link(path, previous)
    os.replace(path.with_suffix(".tmp"), path)


def read_checkpoint(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The last whole checkpoint, if it was made with the same settings."""
    for path in (folder / "checkpoint.pt", folder / "previous.pt"):
        if not path.exists():
            continue
        if not is_whole(path):
            # Aside with it, or the next save would put it in the place of the whole one.
            os.replace(path, path.with_suffix(".damaged"))
            print(f"{path} is not a whole checkpoint; the one before it is used.")
            continue
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        saved = checkpoint["settings"]
        other = [f"{name} {saved.get(name)!r}, not {x!r}" for name, x in settings.items() if saved.get(name) != x]
        if other:
            raise SystemExit(f"--resume with other settings than those of {path}: it has {'; '.join(other)}.")
        print(f"Going on from {path}.")
        return checkpoint
    raise SystemExit(f"--resume, but there is no whole checkpoint in {folder}.")


def is_whole(path: Path) -> bool:
    """Whether a file has all that was written: its directory, at the end, and the checksum of every part."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as file:
        return file.testzip() is None


def refuse_used(folder: Path) -> None:
    """Stops where a new run would overwrite another."""
    used = [name for name in ("checkpoint.pt", "previous.pt", "metrics.csv") if (folder / name).exists()]
    if used:
        raise SystemExit(f"{folder} has {used[0]} of a run in it: choose another --logdir, or go on by --resume.")


def draw_run(folder: Path, title: str, rows: Sequence[Row], open_loop: tuple[Tensor, Tensor, int] | None) -> None:
    """picture.png: the learning curve and, where there is one, an open-loop prediction."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 5), layout="constrained")
    draw_curve(left, rows)
    if open_loop is not None:
        draw_open_loop(right, *open_loop)
    figure.suptitle(title)
    figure.savefig(folder / "picture.png", dpi=110)
    plt.close(figure)


def moving_mean(returns: Sequence[float]) -> list[float]:
    """At each episode, the mean of the last 20."""
    return [float(np.mean(returns[max(0, i - 19) : i + 1])) for i in range(len(returns))]


def draw_curve(axes: Any, rows: Sequence[Row]) -> None:
    """Return of each episode, and the mean of the last 20."""
    steps, returns = [row["step"] for row in rows], [row["return"] for row in rows]
    axes.plot(steps, returns, ".", alpha=0.3, label="episode")
    axes.plot(steps, moving_mean(returns), label="mean of 20")
    axes.set(title="Return", xlabel="environment steps")
    axes.legend()


def draw_open_loop(axes: Any, real: Tensor, predicted: Tensor, seen: int) -> None:
    """A sequence [T, *obs] and what was predicted after ``seen`` steps: lines for vectors, strips for images."""
    axes.set_title(f"The newest steps: {seen} seen, the others imagined")
    if real.ndim == 2:
        for i in range(min(4, real.shape[1])):
            axes.plot(real[:, i], color=f"C{i}", label=f"observation {i}")
            axes.plot(predicted[:, i], color=f"C{i}", linestyle="--")
        axes.axvspan(-0.5, seen - 0.5, color="0.9", zorder=0)
        axes.set_xlabel("step (real solid, predicted dashed)")
        axes.legend(fontsize=8)
        return
    every = max(1, len(real) // 10)
    strips = [torch.cat(list(x[::every]), -1) for x in (real, predicted, (real - predicted).abs())]
    axes.imshow(torch.cat(strips, -2)[:3].permute(1, 2, 0).clamp(0, 1).numpy())
    axes.set(xlabel=f"every {every} steps", xticks=[], yticks=[real.shape[-2] * (i + 0.5) for i in range(3)])
    axes.set_yticklabels(["real", "predicted", "difference"])
