"""What an import brings with it, in a fresh interpreter."""

import subprocess
import sys


def imported_by(statement, after):
    """The packages outside the standard library that ``statement`` imports once ``after`` is there, and all modules."""
    code = f"""
import sys
{after}
before = set(sys.modules)
{statement}
print(*(name for name in sys.modules if name not in before))
print(*sys.modules)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    new, modules = (line.split() for line in done.stdout.splitlines())
    return {name.partition(".")[0] for name in new} - set(sys.stdlib_module_names), modules


def test_the_pure_package_imports_torch_only():
    packages, modules = imported_by("import rlloss", after="import torch")
    assert packages == {"rlloss"}
    assert "torch" in modules
    assert "tensordict" not in modules


def test_the_modules_import_tensordict_and_no_more():
    packages, modules = imported_by("import rlloss_nn", after="import torch, tensordict")
    assert packages == {"rlloss", "rlloss_nn"}
    assert "torchrl" not in modules
    assert "rlloss_nn.networks" not in modules
