"""The README says what is true: its examples run, its commands exist, its table names everything public."""

import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import rlloss
import rlloss_nn

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_example_runs(number: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "example.py"
    script.write_text(EXAMPLES[number])
    names = runpy.run_path(str(script))
    assert "loss" in names


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
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*command, "--picture", str(picture)], cwd=ROOT, **pipes) as process:  # type: ignore[call-overload]
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
