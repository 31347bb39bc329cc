"""The `variant` fixture, golden files, and settings that hold for every test."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from torch.utils._pytree import tree_map

from rlloss import fused, pages

GOLDEN = Path(__file__).parent / "golden"
VARIANTS = ("eager", "vmap", "compile", "compiled_vmap", "fused", "fused_vmap")
REDUCTIONS = (fused.Reduction, fused.ErrorSum, fused.TwoHotCrossEntropy, fused.Divergence)

# Tensors here are small, and several processes share the cores.
torch.set_num_threads(1)

# Derandomized: a run of the suite is a fact about the code, not about the day.
settings.register_profile("rlloss", deadline=None, max_examples=25, derandomize=True, database=None)
settings.load_profile("rlloss")


class Golden(dict[str, Any]):
    """Arrays of one golden file as float64 tensors (integers and bools as they are), and its `meta`."""

    def __init__(self, name: str):
        with np.load(GOLDEN / f"{name}.npz") as file:
            arrays = {k: file[k] for k in file.files}
        self.meta = json.loads(str(arrays.pop("meta"))) if "meta" in arrays else {}
        tensors = {k: torch.from_numpy(np.array(v)) for k, v in arrays.items()}
        super().__init__({k: v.double() if v.is_floating_point() else v for k, v in tensors.items()})


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Golden]:
    """`golden("03_kl")`: the arrays of tests/golden/03_kl.npz."""
    cache: dict[str, Golden] = {}

    def load(name: str) -> Golden:
        return cache.setdefault(name, Golden(name) if name not in cache else cache[name])

    return load


@pytest.fixture
def nothing_kept() -> Iterator[None]:
    """No memory of large results is left from another test, nor for one."""
    pages.forget()
    yield
    pages.forget()


def _vmapped(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of two stacked copies of the arguments, first result taken: equal to one call if vmap is right."""

    def call(*args: Any) -> Any:
        stacked = tree_map(lambda x: torch.stack([x, x]) if isinstance(x, torch.Tensor) else x, args)
        dims = tree_map(lambda x: 0 if isinstance(x, torch.Tensor) else None, args)
        result = torch.func.vmap(function, in_dims=dims)(*stacked)
        return tree_map(lambda x: x[0], result)

    return call


def take_path(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Whatever their size, reductions take the "fused" path where there is one, or the "plain" formula."""
    for reduction in REDUCTIONS:
        monkeypatch.setattr(reduction, "smallest", 0 if name == "fused" else 2**62)


@pytest.fixture(params=("plain", "fused"))
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a test on the plain formulas and on the fused reductions."""
    take_path(monkeypatch, request.param)


@pytest.fixture(params=VARIANTS)
def variant(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Callable[..., Any]]]:
    """Run a function of tensors eager, vmapped, compiled (fullgraph) and compiled after vmap, and the first two fused.

    `variant(f)(*args)` must equal `f(*args)`. Positional arguments are pytrees of tensors; bind everything static
    (apply functions, knobs, None) with a lambda or functools.partial. A test that takes the fixture and never calls
    what it gave back fails.
    """
    take_path(monkeypatch, "fused" if "fused" in request.param else "plain")
    calls = []

    def wrap(function: Callable[..., Any], backend: str = "aot_eager") -> Callable[..., Any]:
        wrapped = _vmapped(function) if "vmap" in request.param else function
        if "compile" in request.param:
            torch.compiler.reset()
            wrapped = torch.compile(wrapped, fullgraph=True, backend=backend)

        def call(*args: Any) -> Any:
            calls.append(request.param)
            return wrapped(*args)

        return call

    yield wrap
    assert calls, "the test takes `variant` but never calls what it gave back"


@pytest.fixture
def counting_backend() -> tuple[Callable[..., Any], list[torch.fx.GraphModule]]:
    """A compiler that runs graphs as they are, and all that it was given."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    return backend, graphs


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
