"""The README says what is true: its examples run, its commands exist, its table names everything public."""

import importlib
import re
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch

import rlloss
import rlloss_nn

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_example_runs(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = []

    # In the place of the default backend, which takes long for a few calls and needs a C++ compiler.
    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    script = tmp_path / "example.py"
    script.write_text(EXAMPLES[number])
    names = runpy.run_path(str(script))
    assert "loss" in names
    assert len(graphs) == EXAMPLES[number].count("torch.compile("), "what is compiled is compiled once"


def test_there_are_three_examples() -> None:
    assert len(EXAMPLES) == 3


@pytest.mark.parametrize("package", [rlloss, rlloss_nn])
def test_every_public_name_is_in_the_readme(package: object) -> None:
    missing = [name for name in package.__all__ if f"`{name}`" not in README]  # type: ignore[attr-defined]
    assert not missing


def test_both_commands_use_files_that_exist() -> None:
    commands = re.findall(r"```sh\n(.*?)\n```", README, re.DOTALL)
    assert [command.split()[-1] for command in commands] == ["benchmarks.learning.quickstart", "pytest"]
    for command in commands:
        assert "\n" not in command
        constraints = re.search(r"-c (\S+)", command)
        assert constraints is not None
        assert (ROOT / constraints[1]).is_file()


@pytest.mark.parametrize("interrupted", [False, True])
def test_quickstart_draws(tmp_path: Path, interrupted: bool) -> None:
    for module in ("gymnasium", "matplotlib", "tqdm"):
        pytest.importorskip(module, reason=f"the quickstart needs {module}, of the extra `learning`")
    picture, updates = tmp_path / "picture.png", "1000000" if interrupted else "3"
    command = [sys.executable, "-m", "benchmarks.learning.quickstart", "--steps", "400", "--updates", updates]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # A shell's background job ignores interrupts, and so would all that it starts.
    options["preexec_fn"] = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen([*command, "--picture", str(picture)], cwd=ROOT, **options) as process:  # type: ignore[call-overload]
        if interrupted:
            # The bar shows the loss terms from the first update on.
            shown = ""
            while "reco=" not in shown:
                shown += process.stderr.read(1)
                assert process.poll() is None, shown
            process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "open-loop error" in out
    assert picture.stat().st_size > 10_000


@pytest.fixture
def quickstart() -> ModuleType:
    for module in ("gymnasium", "matplotlib", "tqdm"):
        pytest.importorskip(module, reason=f"the quickstart needs {module}, of the extra `learning`")
    return importlib.import_module("benchmarks.learning.quickstart")


@pytest.mark.parametrize(
    ("picture", "text"),
    [
        ("missing/picture.png", "--picture must be in a folder that exists"),
        ("picture.foo", r"--picture must end with one of .*\.png.*, got .*picture\.foo"),
        ("picture", "--picture must end with one of"),
    ],
)
def test_quickstart_refuses_a_picture_it_cannot_draw(quickstart, tmp_path, capsys, picture, text) -> None:
    with pytest.raises(SystemExit):
        quickstart.parse(["--picture", str(tmp_path / picture)])
    assert re.search(text, capsys.readouterr().err)
    assert quickstart.parse(["--picture", str(tmp_path / "picture.png")]).picture == tmp_path / "picture.png"


@pytest.mark.parametrize(
    ("name", "text"),
    [("Nope-v0", "cannot make --env Nope-v0"), ("no_module:x-v0", "cannot make"), ("FrozenLake-v1", "vector observ")],
)
def test_quickstart_refuses_an_environment_it_cannot_use(quickstart, name, text) -> None:
    with pytest.raises(SystemExit, match=f"^quickstart: .*{text}"):
        quickstart.collect(name, 1, 0)


def test_quickstart_collects_and_measures_even_where_few_steps_are_asked_for(quickstart) -> None:
    steps = quickstart.collect("CartPole-v1", 1, 0)
    assert steps.is_first.sum() == quickstart.EPISODES
    train, test = quickstart.split(steps)
    assert train.is_first.sum() == quickstart.EPISODES - 1
    probe = quickstart.make_probe(test, train, 0)
    assert len(probe.episodes["reward"]) == 1
    assert torch.cdist(probe.unvisited, train.observation).amin() > 1


def test_quickstart_says_where_there_is_nothing_to_measure(quickstart) -> None:
    def steps(episodes: int, length: int) -> NamedTuple:
        is_first = torch.arange(episodes * length) % length == 0
        observation = torch.linspace(-2, 2, len(is_first))[:, None]
        return quickstart.Steps(observation, observation, observation[:, 0], is_first, is_first)

    with pytest.raises(SystemExit, match="no held-out episode is 7 steps long"):
        quickstart.make_probe(steps(2, 3), steps(8, 3), 0)
    still = steps(8, 20)._replace(observation=torch.zeros(160, 1))
    with pytest.raises(SystemExit, match="no novelty to measure"):
        quickstart.make_probe(steps(2, 20), still, 0)


def test_quickstart_interrupted_before_training_says_so_in_one_line(quickstart, monkeypatch) -> None:
    def interrupt(_: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gymnasium.make", interrupt)
    monkeypatch.setattr("sys.argv", ["quickstart"])
    with pytest.raises(SystemExit, match="quickstart: interrupted before the picture was drawn"):
        runpy.run_path(quickstart.__file__, run_name="__main__")
