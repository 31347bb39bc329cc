"""Rules 1 and 2 of `rlloss`, read off the source: no hidden randomness, no state, no in-place write, no device sync."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import rlloss

PACKAGE = Path(rlloss.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

#: Functions that may write in place: kernels of fused.py, which see blocks of rows and write into scratch and output
#: that the caller has just made, never into the rows; the passes of a recurrence, into their own results; what readies
#: memory that nobody has written yet; and the selection of rows, into such memory.
#: tests/test_fused.py and tests/test_recurrence.py check that no argument changes.
KERNELS = {
    "fused.py": {"prepare", "value", "slope", "_bytes", "_log_ratio", "_softmax_slope", "_scale"},
    "recurrence.py": {"forward", "backward"},
    "pages.py": {"advise_huge_pages", "for_result"},
    "rnd.py": {"_rows"},
}

#: Functions that may ask where memory lies: on a CPU nothing has to be waited for.
ADDRESSES = {"pages.py": {"advise_huge_pages", "for_result"}}

#: Functions whose result in Python depends on values, for a branch.
BRANCHES = {"equal", "allclose"}

#: Functions that may branch on values: only how gradients on a CPU are computed, not what they are.
MAY_BRANCH = {"fused.py": {"_scale_mean"}}

#: Files that rlloss imports only when they are needed, with what they may then import.
LAZY = {"fused_triton.py": "import of triton"}

#: Methods ending in an underscore that write nothing in place. Empty: whoever adds one says why.
HARMLESS: frozenset[str] = frozenset()

#: torch functions that draw from, seed or read a generator.
RANDOM = ("rand", "seed", "manual_seed", "initial_seed", "get_rng_state", "set_rng_state", "bernoulli", "multinomial")
RANDOM += ("normal", "poisson", "dropout", "alpha_dropout", "gumbel_softmax", "rrelu")

#: Methods that wait for the device or leave torch.
SYNCS = {"item", "tolist", "numpy", "cpu", "synchronize", "__array__", "data_ptr"}

#: Functions whose result has a shape that depends on values.
DATA_DEPENDENT = {
    "nonzero",
    "masked_select",
    "unique",
    "unique_consecutive",
    "argwhere",
    "repeat_interleave",
    "bincount",
}

#: Modules of the standard library that bring in hidden inputs: the clock, the environment, another generator.
HIDDEN_INPUTS = {"os", "random", "secrets", "time", "datetime", "uuid", "socket", "platform", "getpass"}


def dotted(node):
    """`torch.nn.Module` of an attribute chain; an empty string for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return ""


def is_random(name):
    return name.startswith("rand") or name in RANDOM


def of_rlloss(name):
    """Our own functions of a key may be called `random.bernoulli` or `random.normal`."""
    return name.startswith(("random.", "rlloss.random."))


def looks_boolean(index):
    """An index that is, as far as can be seen, a bool tensor."""
    if isinstance(index, ast.Tuple):
        return any(looks_boolean(element) for element in index.elts)
    if isinstance(index, (ast.Compare, ast.BoolOp)):
        return True
    if isinstance(index, ast.UnaryOp):
        return isinstance(index.op, (ast.Invert, ast.Not))
    if isinstance(index, ast.BinOp):
        # `Sequence[Tensor | None]` is a type.
        is_type = isinstance(index.right, ast.Constant) and index.right.value is None
        return not is_type and isinstance(index.op, (ast.BitAnd, ast.BitOr, ast.BitXor))
    name = dotted(index.func if isinstance(index, ast.Call) else index).rsplit(".", 1)[-1]
    return "mask" in name or name.startswith(("is_", "isnan", "isfinite", "isinf"))


def written_subscripts(node):
    targets = node.targets if isinstance(node, (ast.Assign, ast.Delete)) else [getattr(node, "target", None)]
    for target in targets:
        for part in target.elts if isinstance(target, (ast.Tuple, ast.List)) else [target]:
            is_key = isinstance(part, ast.Subscript) and isinstance(getattr(part.slice, "value", None), str)
            if isinstance(part, ast.Subscript) and not is_key:
                yield part


def of_call(node):
    name = dotted(node.func)
    last = node.func.attr if isinstance(node.func, ast.Attribute) else name
    if isinstance(node.func, ast.Attribute):
        if last in SYNCS:
            yield f".{last}() waits for the device"
        if last.endswith("_") and not last.endswith("__") and last not in HARMLESS:
            yield f".{last}() writes in place"
        if is_random(last) and not of_rlloss(name):
            yield f"{name or '.' + last} draws from a hidden generator"
        if last in BRANCHES:
            yield f".{last}() makes a branch on values"
        if last in DATA_DEPENDENT:
            yield f".{last}() has a shape that depends on values"
    if name == "torch.where" and len(node.args) + len(node.keywords) == 1:
        yield "torch.where(condition) has a shape that depends on values"
    if last in ("print", "open", "input", "setattr", "delattr"):
        yield f"{last}() has an effect"
    for keyword in node.keywords:
        is_true = isinstance(keyword.value, ast.Constant) and keyword.value.value is True
        if keyword.arg in ("out", "generator") or (keyword.arg == "inplace" and is_true):
            yield f"{keyword.arg}= is hidden state or an in-place write"


def of_import(node, at_module_level):
    modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
    for module in modules:
        root = module.split(".")[0]
        if root in HIDDEN_INPUTS:
            yield f"import of {module}: a hidden input"
        if root == "rlloss_nn":
            yield "rlloss never imports rlloss_nn"
        if at_module_level and root not in {"torch", "rlloss", *sys.stdlib_module_names}:
            yield f"import of {module}: only torch and the standard library at import time"
    if isinstance(node, ast.ImportFrom):
        for alias in node.names:
            yield from of_name(f"{node.module}.{alias.name}")
        if node.level:
            yield "relative import"


def of_name(name):
    if name.startswith(("torch.nn.Module", "nn.Module", "torch.nn.modules")):
        yield "nn.Module holds state"
    if name.rsplit(".", 1)[-1] in ("Generator", "default_generator", "fork_rng"):
        yield "a torch.Generator is hidden state"
    if name.endswith((".environ", ".getenv")):
        yield "reads the environment"


def violations(source):
    """`(line, what)` of everything in ``source`` that rules 1 and 2 forbid."""
    tree = ast.parse(source)
    found = []
    for node in ast.walk(tree):
        texts = []
        if isinstance(node, ast.Call):
            texts += of_call(node)
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            texts += of_import(node, at_module_level=node in tree.body)
        if isinstance(node, (ast.Attribute, ast.Name)):
            texts += of_name(dotted(node))
        if isinstance(node, (ast.Global, ast.Nonlocal)):
            texts.append("state outside the function")
        if isinstance(node, ast.AugAssign):
            texts.append("an augmented assignment writes a tensor in place")
        if isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Delete, ast.For)):
            texts += ["a write into a subscript" for _ in written_subscripts(node)]
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load) and looks_boolean(node.slice):
            texts.append("boolean indexing")
        found += [(getattr(node, "lineno", 0), text) for text in texts]
    return found


def lines_of(functions, source):
    """Line numbers inside the functions of those names."""
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    spans = [range(node.lineno, node.end_lineno + 1) for node in nodes if node.name in functions]
    return {line for span in spans for line in span}


def test_there_is_something_to_look_at():
    assert {"checks.py", "dreamer_v3.py", "random.py", "rnd.py", "two_hot.py"} <= {file.name for file in FILES}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_source_is_pure(file):
    source = file.read_text()
    kernels = lines_of(KERNELS.get(file.name, ()), source)
    addresses = lines_of(ADDRESSES.get(file.name, ()), source)
    branches = lines_of(MAY_BRANCH.get(file.name, ()), source)
    found = [
        f"{file.name}:{line}: {text}"
        for line, text in violations(source)
        if not (line in kernels and any(kind in text for kind in ("in place", "in-place", "subscript")))
        and not (line in addresses and text.startswith(".data_ptr()"))
        and not (line in branches and text.endswith("branch on values"))
        and not text.startswith(LAZY.get(file.name, "nothing"))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("torch.rand(2)", "hidden generator"),
        ("torch.randn_like(x)", "hidden generator"),
        ("torch.randint(0, 2, (3,))", "hidden generator"),
        ("torch.randperm(3)", "hidden generator"),
        ("torch.manual_seed(0)", "hidden generator"),
        ("torch.cuda.manual_seed(0)", "hidden generator"),
        ("torch.bernoulli(p)", "hidden generator"),
        ("torch.nn.functional.dropout(x)", "hidden generator"),
        ("x.normal_()", "writes in place"),
        ("x.copy_(y)", "writes in place"),
        ("torch.nn.init.zeros_(x)", "writes in place"),
        ("torch.add(x, y, out=x)", "in-place write"),
        ("functional.relu(x, inplace=True)", "in-place write"),
        ("torch.empty(3).exponential(generator=g)", "hidden state"),
        ("x.item()", "waits for the device"),
        ("x.sum().tolist()", "waits for the device"),
        ("x.numpy()", "waits for the device"),
        ("x.cpu()", "waits for the device"),
        ("torch.cuda.synchronize()", "waits for the device"),
        ("x.equal(y)", "branch on values"),
        ("torch.allclose(x, y)", "branch on values"),
        ("x.nonzero()", "depends on values"),
        ("torch.masked_select(x, m)", "depends on values"),
        ("torch.where(m)", "depends on values"),
        ("x[0] = 1", "write into a subscript"),
        ("x[:, i] = y", "write into a subscript"),
        ("a, x[i] = 1, 2", "write into a subscript"),
        ("x[0] += 1", "write into a subscript"),
        ("del x[0]", "write into a subscript"),
        ("for x[0] in y: pass", "write into a subscript"),
        ("x += 1", "augmented assignment"),
        ("x[x > 0]", "boolean indexing"),
        ("x[~done]", "boolean indexing"),
        ("x[a & b]", "boolean indexing"),
        ("x[mask]", "boolean indexing"),
        ("x[:, key_mask]", "boolean indexing"),
        ("x[torch.isnan(x)]", "boolean indexing"),
        ("x[batch.is_first]", "boolean indexing"),
        ("def f():\n    global state", "state outside the function"),
        ("class A(torch.nn.Module): pass", "nn.Module"),
        ("class A(nn.Module): pass", "nn.Module"),
        ("from torch.nn import Module", "nn.Module"),
        ("torch.Generator()", "Generator"),
        ("from torch import Generator", "Generator"),
        ("import os", "hidden input"),
        ("def f():\n    import time", "hidden input"),
        ("import random", "hidden input"),
        ("sys.modules['os'].environ['FLAG']", "environment"),
        ("import numpy as np", "only torch and the standard library"),
        ("from tensordict import TensorDict", "only torch and the standard library"),
        ("def f():\n    from rlloss_nn import RNDLoss", "never imports rlloss_nn"),
        ("from .checks import text", "relative import"),
        ("print(x)", "has an effect"),
    ],
)
def test_each_kind_of_impurity_is_seen(source, text):
    assert any(text in found for _, found in violations(source))


@pytest.mark.parametrize(
    "source",
    [
        "random.bernoulli(key, 0.5, (3,))",
        "random.normal(key, (3,))",
        "terms['reco'] = x",
        "x = values[0]",
        "x[..., None]",
        "x[lower]",
        "batch['mask']",
        "torch.where(mask, x, 0)",
        "def f(x: list[Tensor | None]): pass",
        "x.new_zeros(3).index_add(0, rows, x)",
        "from rlloss.random import bits",
        "def f():\n    import triton",
        "import math\nimport torch",
        "self.__class__()",
    ],
)
def test_what_is_pure_passes(source):
    assert violations(source) == []


def test_importing_rlloss_brings_in_nothing_but_torch_and_itself():
    code = (
        "import sys, torch; before = set(sys.modules); import rlloss; new = set(sys.modules) - before;"
        "print(*sorted({name.split('.')[0] for name in new} - set(sys.stdlib_module_names)));"
        "print(*sorted({'tensordict', 'torchrl', 'rlloss_nn'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert [line.split() for line in result.stdout.splitlines()] == [["rlloss"], []]
