"""The fused reductions against the plain formulas: numbers, every transform, memory, and who takes which path."""

import contextlib
import itertools
import math
import mmap
import re
import warnings
from functools import partial

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from conftest import REDUCTIONS, take_path
from hypothesis import given
from hypothesis import strategies as st
from torch._inductor.utils import run_and_get_code
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlloss import categorical_kl_terms, dreamer_v3_model_terms, fused, pages, symexp_bins, two_hot_cross_entropy
from rlloss.categorical import _kl_pair
from rlloss.dreamer_v3 import _error_sum
from rlloss.two_hot import _cross_entropy, neighbours

BINS = torch.tensor([-5.0, -2.0, -0.5, 0.0, 1.0, 10.0], dtype=torch.float64)
TOLERANCE = {torch.float64: {"rtol": 1e-9, "atol": 1e-9}, torch.float32: {"rtol": 1e-4, "atol": 1e-5}}


def error_sum(dims=1, absolute=False, symlog_prediction=False, symlog_target=False):
    knobs = {"absolute": absolute, "symlog_prediction": symlog_prediction, "symlog_target": symlog_target}
    return fused.ErrorSum(partial(_error_sum, dims=dims, **knobs), dims, **knobs)


def divergence(dims, mix):
    return fused.Divergence(partial(_kl_pair, mix=mix, dims=dims), dims, mix)


def two_hot(*lead, dtype=torch.float64):
    """Logits, and what a target becomes."""
    target = 6 * torch.randn(*lead, dtype=torch.float64)
    return torch.randn(*lead, len(BINS), dtype=dtype), *neighbours(target.to(dtype), BINS.to(dtype))


def images(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype), torch.randint(0, 256, shape, dtype=torch.uint8)


def normal(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)


#: name -> (reduction, operands [3, 2, ...])
CASES = {
    f"error absolute={a:d} prediction={p:d} target={t:d}": (error_sum(2, a, p, t), lambda: normal(3, 2, 4, 3))
    for a, p, t in itertools.product((False, True), repeat=3)
}
CASES |= {
    f"image absolute={a:d} symlog={s:d}": (error_sum(2, a, s, s), lambda: images(3, 2, 4, 3))
    for a, s in itertools.product((False, True), repeat=2)
}
CASES |= {
    f"divergence dims={dims} mix={mix}": (divergence(dims, mix), lambda: normal(3, 2, 4, 3))
    for dims, mix in itertools.product((1, 2), (0.0, 0.01, 1.0))
}
CASES["two_hot"] = fused.TwoHotCrossEntropy(_cross_entropy), lambda: two_hot(3, 2)
every_case = pytest.mark.parametrize("name", CASES)


def both(reduction, constants):
    """The fused values and the plain ones as functions of the live operands."""
    return (lambda *live: fused.reduce(reduction, *live, *constants)), lambda *live: reduction.formula(
        *live, *constants
    )


def weighted(function, *weights):
    return lambda *live: sum((w * value).sum() for w, value in zip(weights, function(*live), strict=False))


def set_block(monkeypatch, elements):
    for reduction in REDUCTIONS:
        monkeypatch.setattr(reduction, "block", elements)


@pytest.fixture
def fast(monkeypatch):
    """Every size takes the fused path, in blocks of a few rows."""
    take_path(monkeypatch, "fused")
    set_block(monkeypatch, 30)


@contextlib.contextmanager
def counted(monkeypatch, method):
    """The blocks that go through a kernel."""
    calls = []
    for reduction in (fused.ErrorSum, fused.TwoHotCrossEntropy, fused.Divergence):
        kernel = getattr(reduction, method)
        monkeypatch.setattr(reduction, method, lambda *args, k=kernel: (calls.append(1), k(*args))[1])
    yield calls


# ---- every transform -------------------------------------------------------------------------------------------------


TRANSFORMS = {
    "value": lambda f, live, _: f(*live),
    "grad": lambda f, live, _: grad(weighted(f, 2.0, 3.0), tuple(range(len(live))))(*live),
    "jvp": lambda f, live, directions: jvp(f, live, directions),
    "jvp of grad": lambda f, live, directions: jvp(grad(weighted(f, 0.3, 0.7)), live, directions),
    "jacrev": lambda f, live, _: jacrev(f)(*live),
    "jacfwd": lambda f, live, _: jacfwd(f)(*live),
    "hessian": lambda f, live, _: hessian(weighted(f, 1.0, 2.0), tuple(range(len(live))))(*live),
    "grad of grad": lambda f, live, _: grad(lambda *x: grad(weighted(f, 1.0, 1.0))(*x).pow(3).sum())(*live),
    "grad of grad of grad": lambda f, live, _: grad(
        lambda *x: grad(lambda *y: grad(weighted(f, 1.0, 1.0))(*y).square().sum())(*x).pow(3).sum()
    )(*live),
    "jvp of jvp": lambda f, live, directions: jvp(lambda *x: jvp(f, x, directions)[1], live, directions),
    "jacfwd of jacfwd": lambda f, live, _: jacfwd(jacfwd(lambda x: f(x, *live[1:])))(live[0]),
    "jvp of grad of jvp": lambda f, live, directions: jvp(
        grad(lambda *x: sum(moved.pow(3).sum() for moved in jvp(f, x, directions)[1])), live, directions
    ),
    "jvp of jvp of grad": lambda f, live, directions: jvp(
        lambda *x: jvp(grad(weighted(f, 0.3, 0.7)), x, directions)[1], live, directions
    ),
    "jvp of jvp of a pullback": lambda f, live, directions: (
        lambda pull, scales: jvp(lambda *x: jvp(pull, (x,), (tuple(y.square() for y in x),))[1], scales, scales)
    )(vjp(f, *live)[1], f(*directions)),
    "vmap": lambda f, live, _: vmap(f, 1)(*[torch.stack([x, 2 * x], 1) for x in live]),
    "per-sample jvp of grad": lambda f, live, directions: vmap(
        lambda x, d: jvp(lambda *y: grad(weighted(f, 1.0, 2.0))(*y), x, d)
    )(tuple(torch.stack([x, 2 * x]) for x in live), tuple(torch.stack([d, -d]) for d in directions)),
    "vmap of vmap of grad": lambda f, live, _: vmap(
        vmap(grad(weighted(f, 1.0, 1.0)), (1, *[None] * (len(live) - 1))), (-1, *[0] * (len(live) - 1))
    )(torch.stack([torch.stack([live[0], -live[0]], 1)] * 2, -1), *[torch.stack([x, 3 * x]) for x in live[1:]]),
}
# In a graph torch 2.13 refuses a `jvp` of a `jvp` of a product with a constant, such as `symlog` has.
COMPILED = [name for name in TRANSFORMS if name.count("jvp") + name.count("jacfwd") < 2]


@pytest.mark.parametrize("transform", TRANSFORMS)
@every_case
@pytest.mark.usefixtures("fast")
def test_transforms_are_those_of_the_formula(name, transform):
    reduction, operands = CASES[name]
    operands = operands()
    live, constants = operands[: reduction.live], operands[reduction.live :]
    directions = tuple(torch.randn_like(x) for x in live)
    got, expected = (TRANSFORMS[transform](f, live, directions) for f in both(reduction, constants))
    assert_close(got, expected, rtol=1e-9, atol=1e-9)


@every_case
@pytest.mark.usefixtures("fast")
def test_steps_are_rows(name):
    reduction, operands = CASES[name]
    operands = operands()
    expected = reduction.formula(*operands)
    assert_close(vmap(partial(fused.reduce, reduction))(*operands), expected)
    assert_close(vmap(vmap(partial(fused.reduce, reduction)), 1, 1)(*operands), expected)


@every_case
@pytest.mark.usefixtures("fast")
def test_derivatives_against_finite_differences(name):
    reduction, operands = CASES[name]
    operands = [x[:2, :1] for x in operands()]
    for i in range(reduction.live):
        # The i-th value as a function of the i-th operand: the others are held, as finite differences hold them.
        def value(x, i=i):
            return fused.reduce(reduction, *operands[:i], x, *operands[i + 1 :])[i]

        x = operands[i].clone().requires_grad_()
        checks = {"check_forward_ad": True, "check_batched_grad": True, "check_batched_forward_grad": True}
        assert torch.autograd.gradcheck(value, x, **checks)
        assert torch.autograd.gradgradcheck(value, x, check_fwd_over_rev=True, check_batched_grad=True)


@every_case
@pytest.mark.usefixtures("fast")
def test_members_of_an_ensemble_are_rows_of_one_pass(name, monkeypatch):
    set_block(monkeypatch, 2**18)
    reduction, operands = CASES[name]
    operands = operands()
    live, constants = operands[: reduction.live], operands[reduction.live :]
    members = torch.stack([live[0], -live[0], 3 * live[0]], 1)
    function, formula = both(reduction, constants)
    derivative, expected = (
        vmap(grad(weighted(f, 1.0, 1.0)), (1, *[None] * (len(live) - 1))) for f in (function, formula)
    )
    with counted(monkeypatch, "value") as values, counted(monkeypatch, "slope") as slopes:
        got = derivative(members, *live[1:])
    assert_close(got, expected(members, *live[1:]))
    assert len(values) == len(slopes) == 1


# ---- any layout and dtype --------------------------------------------------------------------------------------------


@st.composite
def tensors(draw, shape, dtype):
    """A tensor of any layout: dimensions permuted, reversed in memory, strided, expanded, or with an offset."""
    kind = draw(st.sampled_from(["contiguous", "permuted", "strided", "expanded", "offset"]))
    order = draw(st.permutations(range(len(shape))))
    if kind == "expanded" and shape:
        dim = draw(st.integers(0, len(shape) - 1))
        return fill(draw, [1 if i == dim else size for i, size in enumerate(shape)], dtype).expand(shape)
    if kind == "permuted":
        return fill(draw, [shape[i] for i in order], dtype).permute([order.index(i) for i in range(len(shape))])
    if kind == "strided":
        return fill(draw, [2 * size for size in shape], dtype)[tuple(slice(None, None, 2) for _ in shape)]
    if kind == "offset":
        return fill(draw, [size + 1 for size in shape], dtype)[tuple(slice(1, None) for _ in shape)]
    return fill(draw, shape, dtype)


def fill(draw, shape, dtype):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    if not dtype.is_floating_point:
        return torch.randint(0, 256, shape, generator=generator).to(dtype)
    return (3 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


shapes = st.lists(st.integers(0, 4), max_size=3)
floats = st.sampled_from([torch.float32, torch.float64])


def gradients(function, operands, weights):
    leaves = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in operands]
    # Cloned once more, for a leaf must not be expanded.
    values = function(*[leaf.expand_as(x) for leaf, x in zip(leaves, operands, strict=True)])
    loss = sum((w * value).sum() for w, value in zip(weights, values, strict=True))
    return values, torch.autograd.grad(loss, leaves, materialize_grads=True)


@given(st.data())
@pytest.mark.parametrize("kind", ["error", "divergence", "two_hot"])
def test_any_shape_layout_and_dtype(kind, data):
    lead, dtype = data.draw(shapes), data.draw(floats)
    event = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=3))
    if kind == "error":
        flags = data.draw(st.tuples(st.booleans(), st.booleans(), st.booleans()))
        reduction, live = error_sum(len(event), *flags), [data.draw(tensors([*lead, *event], dtype))]
        target = st.sampled_from([dtype, torch.uint8, torch.float32, torch.float16, torch.int32])
        constants = [data.draw(tensors([*lead, *event], data.draw(target)))]
    elif kind == "divergence":
        event = [max(size, 1) for size in event[:2]]
        reduction = divergence(len(event), data.draw(st.sampled_from([0.0, 0.01, 0.5, 1.0])))
        live, constants = [data.draw(tensors([*lead, *event], dtype)) for _ in range(2)], []
    else:
        reduction, live = fused.TwoHotCrossEntropy(_cross_entropy), [data.draw(tensors([*lead, len(BINS)], dtype))]
        constants = neighbours(data.draw(tensors(lead, dtype)), BINS.to(dtype))
    weights = [torch.randn(lead, dtype=dtype) for _ in live]
    function, formula = both(reduction, constants)
    with pytest.MonkeyPatch.context() as patch:
        take_path(patch, "fused")
        set_block(patch, data.draw(st.sampled_from([1, 8, 50, 2**18])))
        got = *function(*live), *gradients(function, live, weights)
    assert_close(got, (*formula(*live), *gradients(formula, live, weights)), **TOLERANCE[dtype])


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (2, 0), (1, 1)])
def test_shapes_of_steps(path, shape):
    knobs = {"num_reward_bins": 5, "reco_transform": "auto"}
    for observation in (
        torch.randint(0, 256, (*shape, 3, 4), dtype=torch.uint8),
        torch.randn(*shape, 6),
        torch.randn(shape),
    ):
        logits = torch.randn(*shape, 2, 3)
        outputs = {"prior_logits": logits, "posterior_logits": -logits, "reward": torch.randn(*shape, 5)}
        outputs["reconstruction"] = torch.rand(observation.shape)
        terms = dreamer_v3_model_terms(outputs, {"observation": observation, "reward": torch.randn(shape)}, **knobs)
        assert {term.shape for term in terms.values()} == {torch.Size(shape)}


@pytest.mark.usefixtures("fast")
def test_a_gradient_lies_in_memory_as_its_operand_does():
    prediction = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last).unflatten(0, (2, 1))
    gradient = grad(lambda x: fused.reduce(error_sum(3), x, torch.zeros_like(x))[0].sum())(prediction)
    assert gradient.stride() == prediction.stride()
    assert_close(gradient, 2 * prediction)
    transposed = torch.randn(3, 2, 4).transpose(0, 1)
    assert_close(
        grad(lambda x: fused.reduce(error_sum(1), x, torch.zeros_like(x))[0].sum())(transposed), 2 * transposed
    )


def test_targets_are_constants(path):
    logits = torch.randn(2, 3, 4, 5)
    outputs = {"prior_logits": logits, "posterior_logits": logits + 1, "reward": torch.randn(2, 3, 7)}
    observation, reward = torch.randn(2, 3, 5, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    outputs["reconstruction"] = torch.randn(2, 3, 5, requires_grad=True)
    batch = {"observation": observation, "reward": reward}
    terms = dreamer_v3_model_terms(outputs, batch, num_reward_bins=7)
    assert not terms["reward"].requires_grad
    assert torch.autograd.grad(terms["reco"].sum(), observation, allow_unused=True) == (None,)


@pytest.mark.usefixtures("fast")
def test_what_is_not_finite_stays_in_its_row():
    prediction = torch.tensor([[1.0, 2.0], [math.nan, 0.0], [math.inf, 0.0], [3.0, 4.0]])
    for flags in itertools.product((False, True), repeat=3):
        function, formula = both(error_sum(1, *flags), (torch.zeros(4, 2),))
        assert_close(function(prediction), formula(prediction), equal_nan=True)
        slopes = [grad(weighted(f, 1.0))(prediction) for f in (function, formula)]
        assert_close(*slopes, equal_nan=True)
        assert slopes[0][[0, 3]].isfinite().all()


@pytest.mark.usefixtures("fast")
def test_errors_of_what_is_not_finite_or_zero():
    prediction = torch.tensor([[0.0, math.inf, -math.inf, 1.0, math.nan, -0.0, math.inf, -0.0]]).T
    target = torch.tensor([[math.inf, 0.0, 3.0, -math.inf, 1.0, math.nan, math.inf, 0.0]]).T
    for flags in itertools.product((False, True), repeat=3):
        leaves = prediction.clone().requires_grad_(), prediction.clone().requires_grad_()
        pairs = zip(both(error_sum(1, *flags), (target,)), leaves, strict=True)
        values = [function(leaf)[0] for function, leaf in pairs]
        assert_close(*values, equal_nan=True)
        gradients = [torch.autograd.grad(v.sum(), x)[0] for v, x in zip(values, leaves, strict=True)]
        assert_close(*gradients, equal_nan=True)


@pytest.mark.parametrize("mix", [0.0, 0.01])
@pytest.mark.usefixtures("fast")
def test_classes_that_are_ruled_out(mix):
    inf = math.inf
    p = torch.tensor([[0.3, -inf, 1.0], [0.3, 0.1, 1.0], [0.3, -inf, 1.0], [1e4, -1e4, 0.0], [math.nan, 0.0, 0.0]])
    q = torch.tensor([[1.0, -inf, 0.2], [1.0, -inf, 0.2], [1.0, 0.5, 0.2], [-1e4, 1e4, 0.0], [0.0, 0.0, 0.0]])
    function, formula = both(divergence(1, mix), ())
    assert_close(function(p, q), formula(p, q), equal_nan=True)
    rows = torch.tensor([0, 2, 3] if mix == 0 else [0, 1, 2, 3])
    for got, expected in zip(
        *[grad(weighted(f, 1.0, 1.0), (0, 1))(p[rows], q[rows]) for f in (function, formula)], strict=True
    ):
        assert_close(got, expected)


@pytest.mark.parametrize("classes", [32, 256])
@pytest.mark.parametrize("mix", [1e-6, 1e-5, 1e-4, 1 - 1e-6])
@pytest.mark.usefixtures("fast")
def test_shares_that_nearly_vanish(mix, classes):
    p, q = torch.zeros(2, 4, 1, classes).unbind()
    p[..., 0], q[..., 1] = 50.0, 50.0

    def value_and_gradients(*logits):
        logits = [x.requires_grad_() for x in logits]
        terms = categorical_kl_terms(*logits, free_nats=0.0, unimix=mix)
        return *terms, *torch.autograd.grad(terms[0].sum() + terms[1].sum(), logits)

    got, expected = value_and_gradients(p, q), value_and_gradients(p.double(), q.double())
    assert_close([x.double() for x in got], list(expected), rtol=0.05 if mix > 0.9 else 1e-4, atol=1e-6)


# ---- who takes which path --------------------------------------------------------------------------------------------


class Labelled(torch.Tensor):
    """A tensor that could do anything."""


@pytest.mark.parametrize(
    ("prediction", "target", "fast"),
    [
        (torch.zeros(3), torch.zeros(3), True),
        (torch.zeros(3).double(), torch.zeros(3).double(), True),
        (torch.nn.Parameter(torch.zeros(3)), torch.zeros(3), True),
        (torch.zeros(3), torch.zeros(3, dtype=torch.uint8), True),
        (torch.zeros(3), torch.zeros(3).double(), False),
        (torch.zeros(3), torch.zeros(3, dtype=torch.int32), False),
        (torch.zeros(3, dtype=torch.uint8), torch.zeros(3), False),
        (torch.zeros(3).half(), torch.zeros(3).half(), False),
        (torch.zeros(3).bfloat16(), torch.zeros(3), False),
        (torch.zeros(3, device="meta"), torch.zeros(3, device="meta"), False),
        (torch.zeros(3).as_subclass(Labelled), torch.zeros(3), False),
        (torch.zeros(3), torch.zeros(3).as_subclass(Labelled), False),
        (torch.zeros(0), torch.zeros(0), False),
    ],
)
def test_who_takes_the_fast_path(monkeypatch, prediction, target, fast):
    reduction = error_sum()
    assert not fused.has_fast_path(reduction, (prediction, target))
    take_path(monkeypatch, "fused")
    assert fused.has_fast_path(reduction, (prediction, target)) == fast
    expected = reduction.formula(prediction, target)
    assert_close(fused.reduce(reduction, prediction, target), expected, check_device=False)


def test_large_reductions_take_the_fast_path(monkeypatch):
    prediction, target = torch.zeros(2**9, 2**9), torch.zeros(2**9, 2**9)
    assert fused.has_fast_path(error_sum(), (prediction, target))
    with counted(monkeypatch, "value") as values:
        fused.reduce(error_sum(), prediction, target)
        categorical_kl_terms(prediction.view(-1, 8, 8), target.view(-1, 8, 8))
    assert len(values) == 2


@pytest.mark.parametrize(("symlog", "smallest"), [(True, 2**14), (False, 2**18)])
def test_errors_of_symlogs_take_it_sooner(symlog, smallest):
    reduction = error_sum(symlog_prediction=symlog, symlog_target=symlog)
    for elements in (smallest - 1, smallest):
        assert fused.has_fast_path(reduction, (torch.zeros(elements),) * 2) == (elements == smallest)
    taken = []
    grad(lambda x: taken.append(fused.has_fast_path(reduction, (x, x))) or x.sum())(torch.zeros(2**14))
    assert taken == [False], "two passes pay later"


@pytest.mark.usefixtures("fast")
def test_the_compiler_gets_the_formulas(monkeypatch):
    torch.compiler.reset()
    compiled = torch.compile(lambda *args: fused.reduce(error_sum(), *args), fullgraph=True, backend="aot_eager")
    with counted(monkeypatch, "value") as values:
        compiled(torch.zeros(2, 3, requires_grad=True), torch.ones(2, 3))[0].sum().backward()
    assert not values


def test_a_share_that_is_a_tensor_can_be_differentiated(path):
    post, prior = torch.randn(4, 3, 5), torch.randn(4, 3, 5)

    def total(mix):
        return sum(term.sum() for term in categorical_kl_terms(post, prior, free_nats=0.0, unimix=mix))

    assert grad(total)(torch.tensor(0.1)) < 0
    assert_close(total(torch.tensor(0.1)), total(0.1))


# ---- errors in a compiled graph --------------------------------------------------------------------------------------


def nodes(backend="aot_eager"):
    """A backend, and the operators of the graphs that it is given."""
    seen = []

    def compile_graph(graph, inputs):
        parts = [module for module in graph.modules() if isinstance(module, torch.fx.GraphModule)]
        seen.extend(str(node.target) for part in parts for node in part.graph.nodes)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    return compile_graph, seen


#: As for users, and not as in this suite, warnings are no errors.
as_users = pytest.mark.filterwarnings("ignore")


@as_users
@pytest.mark.parametrize(
    ("backend", "operands"), [("aot_eager", images), ("aot_eager", normal), ("inductor", images), ("inductor", normal)]
)
@pytest.mark.parametrize("flags", list(itertools.product([False, True], repeat=3)))
def test_a_compiled_graph_keeps_the_slope(backend, operands, flags):
    torch.compiler.reset()
    backend, seen = nodes(backend)
    reduction, (prediction, target) = error_sum(2, *flags), operands(3, 2, 4, 3)
    prediction[0, 0, 0, 0] = 0
    function, formula = both(reduction, (target,))
    compiled = torch.compile(lambda x: function(x)[0].sin(), fullgraph=True, backend=backend)
    leaf = prediction.requires_grad_()
    got, expected = compiled(leaf), formula(leaf)[0].sin()
    assert_close(got, expected)
    assert_close(*[torch.autograd.grad(x.sum(), leaf)[0] for x in (got, expected)])
    assert "autograd_function_apply" in seen


@as_users
@pytest.mark.parametrize("symlog", [False, True])
def test_inductor_makes_value_and_slope_in_one_loop(symlog):
    torch.compiler.reset()
    prediction, target = torch.randn(4, 3, 16, 16, requires_grad=True), torch.randn(4, 3, 16, 16)
    reduction = error_sum(3, symlog_prediction=symlog, symlog_target=symlog)
    compiled = torch.compile(lambda *operands: fused.reduce(reduction, *operands)[0], fullgraph=True)
    _, (forward, *_) = run_and_get_code(compiled, prediction, target)
    assert forward.count("for(int64_t") == 2, "over rows, and over what is in one"


def test_the_operator_of_known_slopes_is_one_like_any_other():
    operands = torch.randn(2, 1).expand(2, 3), torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    torch.library.opcheck(torch.ops.rlloss.reads.default, operands, test_utils=("test_schema", "test_faketensor"))


def assert_derived_once(compiled, operand):
    """From outside, by a leaf and by what is made of one: torch says so, and does not take the rest for 0."""
    leaf = operand.detach().requires_grad_()
    for x in (leaf, leaf * 1):
        (first,) = torch.autograd.grad(compiled(x).sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="double backward"):
            torch.autograd.grad(first.square().sum(), leaf)


@as_users
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize(("absolute", "symlog_target"), list(itertools.product([False, True], repeat=2)))
def test_compiled_symlogs_have_one_derivative_from_outside(backend, absolute, symlog_target):
    torch.compiler.reset()
    prediction, target = images(3, 2, 4, 3)
    function, _ = both(error_sum(2, absolute, True, symlog_target), (target,))
    assert_derived_once(torch.compile(lambda x: function(x)[0], fullgraph=True, backend=backend), prediction)


@pytest.fixture
def advised(monkeypatch, nothing_kept):
    """Pages are advised from 64 KiB on, or would be: the number of bytes, each time."""
    sizes = []
    monkeypatch.setattr(pages, "HUGE", 2**16)
    monkeypatch.setattr(pages, "_madvise", lambda: lambda start, length, advice: sizes.append(length) or -1)
    return sizes


def large(*, last=False):
    """Images of 96 KiB, and as many others."""
    memory_format = torch.channels_last if last else torch.contiguous_format
    return [x.to(memory_format=memory_format) for x in (torch.randn(2, 3, 64, 64), torch.rand(2, 3, 64, 64))]


@as_users
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("flags", list(itertools.product([False, True], repeat=3)))
def test_inductor_writes_the_slope_into_advised_memory(advised, flags, last):
    torch.compiler.reset()
    reduction, (prediction, target) = error_sum(3, *flags), large(last=last)
    function, formula = both(reduction, (target,))
    compiled = torch.compile(lambda x: (function(x)[0] / 2**12).sin(), fullgraph=True)
    leaf = prediction.requires_grad_()
    got, (forward, *_) = run_and_get_code(compiled, leaf)
    expected = (formula(leaf)[0] / 2**12).sin()
    assert_close(got, expected)
    size = f"({', '.join(map(str, prediction.shape))})"
    allocated = re.findall(rf"empty_strided_cpu\({re.escape(size)}", forward)
    assert not allocated, "the memory of the slope is the advised one"
    assert len(advised) == 1
    assert prediction.nbytes - 2 * mmap.PAGESIZE < advised[0] <= prediction.nbytes
    assert_close(*[torch.autograd.grad(x.sum(), leaf)[0] for x in (got, expected)])
    assert len(advised) == 1, "backward scales the slope where it lies"


@as_users
@pytest.mark.usefixtures("advised")
@pytest.mark.parametrize(("absolute", "symlog"), list(itertools.product([False, True], repeat=2)))
def test_backward_of_compiled_errors_has_the_slope_alone(absolute, symlog):
    torch.compiler.reset()
    weight, target = large()
    function, _ = both(error_sum(3, absolute, symlog_target=symlog), (target,))
    compiled, saved = torch.compile(lambda x: function(x.cumsum(0))[0], fullgraph=True, backend="aot_eager"), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.shape) or x, lambda x: x):
        compiled(weight.requires_grad_())
    assert saved.count(weight.shape) == 1


@as_users
def test_two_heads_of_one_size_have_memory_of_their_own(advised):
    torch.compiler.reset()
    first, second = large(), large()
    function = error_sum(3, False, True, True)
    compiled = torch.compile(
        lambda x, y: fused.reduce(function, x, first[1])[0].mean() + fused.reduce(function, y, second[1])[0].mean(),
        fullgraph=True,
    )
    leaves = first[0].requires_grad_(), second[0].requires_grad_()
    got, (forward, *_) = run_and_get_code(compiled, *leaves)
    expected = [function.formula(*operands)[0].mean() for operands in (first, second)]
    assert_close(got, sum(expected))
    assert_close(torch.autograd.grad(got, leaves), torch.autograd.grad(sum(expected), leaves))
    assert len(advised) == 2
    assert "empty_strided_cpu((2, 3, 64, 64)" not in forward


@as_users
def test_an_error_of_a_tensor_beside_itself_is_compiled():
    torch.compiler.reset()
    backend, seen = nodes()
    x = torch.randn(3, 4, requires_grad=True)
    compiled = torch.compile(lambda x: fused.reduce(error_sum(1), x, x)[0], fullgraph=True, backend=backend)
    value = compiled(x)
    assert_close(value, torch.zeros(3))
    assert_close(torch.autograd.grad(value.sum(), x)[0], torch.zeros(3, 4))
    assert "autograd_function_apply" in seen


LAYOUTS = {
    "expanded": lambda x: x[:1].expand_as(x),
    "transposed": lambda x: x.transpose(0, 1),
    "transposed rows": lambda x: x.transpose(0, 2),
    "in steps": lambda x: torch.cat([x, x], -1)[..., ::2],
    "empty": lambda x: x[:0],
}


@as_users
@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_of_any_layout_in_a_compiled_graph(advised, layout):
    torch.compiler.reset()
    operands = [LAYOUTS[layout](x) for x in large()]
    leaf, target = operands[0].detach().requires_grad_(), operands[1].requires_grad_()
    function, formula = both(error_sum(2, False, True, True), (target.detach(),))
    compiled = torch.compile(lambda x: function(x)[0].mean(-1).sum(), fullgraph=True)
    got, expected = compiled(leaf), formula(leaf)[0].mean(-1).sum()
    assert_close(got, expected)
    assert_close(*[torch.autograd.grad(x, leaf)[0] for x in (got, expected)])


@as_users
@pytest.mark.parametrize("without", ["gradients", "a gradient", "size", "pages", "the dtype"])
def test_memory_that_would_not_help_is_not_taken(advised, without, monkeypatch):
    torch.compiler.reset()
    backend, seen = nodes()
    prediction, target = large()
    if without == "pages":
        monkeypatch.setattr(pages, "_madvise", lambda: None)
    if without == "the dtype":
        target = target.double()
    if without == "size":
        prediction, target = prediction[:, :1, ::2], target[:, :1, ::2]
    prediction.requires_grad_(without != "a gradient")
    compiled = torch.compile(lambda *x: fused.reduce(error_sum(3), *x), fullgraph=True, backend=backend)
    with torch.set_grad_enabled(without != "gradients"):
        assert_close(compiled(prediction, target)[0], error_sum(3).formula(prediction, target)[0])
    assert seen
    assert not any("advised_memory" in node for node in seen)
    assert not advised


@as_users
def test_advised_memory_of_a_size_that_varies(advised):
    torch.compiler.reset()
    compiled = torch.compile(lambda *x: fused.reduce(error_sum(3), *x)[0], fullgraph=True, dynamic=True)
    for rows in (2, 3, 5):
        prediction, target = (x[:1].expand(rows, -1, -1, -1).contiguous() for x in large())
        prediction.requires_grad_()
        got, expected = compiled(prediction, target), error_sum(3).formula(prediction, target)[0]
        assert_close(got, expected)
        assert_close(*[torch.autograd.grad(x.sum(), prediction)[0] for x in (got, expected)])
    assert len(advised) == 3


@as_users
@pytest.mark.parametrize("transform", COMPILED)
def test_a_compiled_transform_is_of_the_formula(transform):
    torch.compiler.reset()
    backend, seen = nodes()
    prediction, target = normal(3, 2, 4)
    function, formula = both(error_sum(1, False, True, True), (target,))
    live, directions = (prediction.requires_grad_(),), (torch.randn_like(prediction),)
    compiled = torch.compile(lambda *x: TRANSFORMS[transform](function, x, directions), fullgraph=True, backend=backend)
    assert_close(compiled(*live), TRANSFORMS[transform](formula, live, directions))
    assert ("autograd_function_apply" in seen) == (transform == "value")


@as_users
@pytest.mark.parametrize("strict", [False, True])
def test_the_formula_is_exported(strict):
    class Squares(torch.nn.Module):
        def forward(self, prediction, target):
            return fused.reduce(reduction, prediction, target)[0]

    reduction, (prediction, target) = error_sum(1, False, True, True), normal(3, 4)
    leaf = prediction.requires_grad_()
    exported = torch.export.export(Squares(), (leaf, target), strict=strict).module()
    got, expected = exported(leaf, target), reduction.formula(leaf, target)[0]
    assert_close(got, expected)
    assert_close(*[torch.autograd.grad(x.sum(), leaf)[0] for x in (got, expected)])


@pytest.mark.parametrize("module", ["", "torch"])
def test_the_formula_is_compiled_where_warnings_are_errors(module):
    warnings.simplefilter("ignore")
    warnings.filterwarnings("error", module=module)
    torch.compiler.reset()
    backend, seen = nodes()
    prediction, target = normal(3, 4)
    function, formula = both(error_sum(1, False, True, True), (target,))
    prediction.requires_grad_()
    assert_close(torch.compile(function, fullgraph=True, backend=backend)(prediction), formula(prediction))
    assert seen
    assert "autograd_function_apply" not in seen


@as_users
@pytest.mark.parametrize(("absolute", "symlog"), list(itertools.product([False, True], repeat=2)))
def test_what_is_not_finite_has_the_error_of_the_formula_in_a_compiled_graph(absolute, symlog):
    torch.compiler.reset()
    inf = math.inf
    backend, seen = nodes("inductor")
    prediction = torch.tensor([[0.0], [inf], [-inf], [1.0], [math.nan], [1e38], [-0.0]], requires_grad=True)
    target = torch.tensor([inf, 0.0, 3.0, -inf, 1.0, 1e38, 0.0])[:, None]
    function, formula = both(error_sum(1, absolute, symlog, symlog), (target,))
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    assert_close(compiled(prediction), formula(prediction), equal_nan=True)
    assert "autograd_function_apply" in seen
    rows = torch.tensor([0, 3, 5, 6])
    assert_close(*[torch.autograd.grad(f(prediction)[0][rows].sum(), prediction)[0][rows] for f in (compiled, formula)])


@as_users
@pytest.mark.parametrize("dtypes", list(itertools.permutations([torch.float32, torch.float64])))
@pytest.mark.parametrize("symlog", [False, True])
def test_squares_of_two_dtypes_in_a_compiled_graph(dtypes, symlog):
    torch.compiler.reset()
    prediction, target = (x.to(dtype) for x, dtype in zip(normal(3, 4), dtypes, strict=True))
    prediction[0, 0], target[0, 0] = -1e25, 1e25
    function, formula = both(error_sum(1, False, symlog, symlog), (target,))
    leaf = prediction.requires_grad_()
    got, expected = torch.compile(function, fullgraph=True, backend="aot_eager")(leaf)[0], formula(leaf)[0]
    assert_close(got, expected)
    assert_close(*[torch.autograd.grad(x.sum(), leaf)[0] for x in (got, expected)])


@given(st.data())
def test_a_difference_of_symlogs_is_exact_to_rounding(data):
    """Also where the two symlogs would cancel, and where their product, but not their difference, overflows."""
    exponents, signs = st.floats(-12, 18), st.sampled_from([-1.0, 1.0])
    x = data.draw(signs) * 10 ** data.draw(exponents)
    y = data.draw(st.sampled_from([x * (1 + 1e-4), x, 0.0, data.draw(signs) * 10 ** data.draw(exponents)]))
    x, y = torch.tensor(x), torch.tensor(y)
    difference = fused._symlog_difference(x, y)
    assert difference.dtype == torch.float32
    large, small = (z.double().sign() * z.double().abs().log1p() for z in (x, y))
    exact = fused._symlog_difference(x.double(), y.double())
    assert_close(exact, large - small, rtol=1e-9, atol=1e-15)
    assert_close(difference.double(), exact, rtol=1e-6, atol=0.0)


def test_a_difference_of_symlogs_whose_product_overflows_is_at_worst_half():
    x, y = torch.tensor([1e20, -1e30, 1e38]), torch.tensor([-1e20, 1e25, -1e38])
    exact = fused._symlog_difference(x.double(), y.double()).float()
    share = fused._symlog_difference(x, y) / exact
    assert (share > 0.49).all()
    assert (share < 1.001).all()


# ---- divergences in a compiled graph ---------------------------------------------------------------------------------


@pytest.fixture
def one_operator(monkeypatch):
    """Divergences of any size are one operator in a compiled graph."""
    monkeypatch.setattr(fused.Divergence, "smallest_operator", 0)
    set_block(monkeypatch, 30)


def is_operator(seen):
    return any("rlloss.divergence" in node for node in seen)


LEARNERS = {"both": (True, True), "the posterior": (True, False), "the prior": (False, True)}


@as_users
@pytest.mark.usefixtures("one_operator")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("learns", LEARNERS)
@pytest.mark.parametrize(("dims", "mix"), list(itertools.product([1, 2], [0.0, 0.01, 1.0])))
def test_a_compiled_divergence_is_one_operator(backend, learns, dims, mix):
    torch.compiler.reset()
    backend, seen = nodes(backend)
    reduction = divergence(dims, mix)
    live = [x.requires_grad_(wants) for x, wants in zip(normal(3, 2, 4, 5), LEARNERS[learns], strict=True)]
    compiled = torch.compile(lambda *x: fused.reduce(reduction, *x), fullgraph=True, backend=backend)
    values, expected = compiled(*live), reduction.formula(*live)
    assert_close(values, expected)
    leaves = [x for x in live if x.requires_grad]
    # The first value is for the posterior alone, the second for the prior alone.
    totals = [
        sum((k + 2) * x.sin().sum() for k, x in enumerate(pair) if live[k].requires_grad) for pair in (values, expected)
    ]
    assert_close(*[torch.autograd.grad(total, leaves) for total in totals])
    assert [x.requires_grad for x in values] == [x.requires_grad for x in expected]
    # Where one does not learn, or there is no mixture, the compiler has less to do than the operator.
    assert is_operator(seen) == (learns == "both" and mix > 0)


@as_users
@pytest.mark.parametrize(("rows", "expected"), [(1024, True), (1023, False)])
def test_the_operator_is_for_a_million_numbers(rows, expected):
    torch.compiler.reset()
    backend, seen = nodes()
    live = [torch.zeros(rows, 32, 32, requires_grad=True) for _ in range(2)]
    torch.compile(categorical_kl_terms, fullgraph=True, backend=backend)(*live)
    assert seen
    assert is_operator(seen) == expected


@as_users
@pytest.mark.usefixtures("one_operator")
@pytest.mark.parametrize("size", ["operator", "formula"])
@pytest.mark.parametrize("again", [lambda x: x, lambda x: x.contiguous(), lambda x: x.view_as(x), lambda x: x.flip(0)])
def test_a_tensor_beside_itself_is_compiled(size, again, monkeypatch):
    torch.compiler.reset()
    backend, seen = nodes()
    if size == "formula":
        monkeypatch.setattr(fused.Divergence, "smallest_operator", 2**62)
    x = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    function = partial(categorical_kl_terms, free_nats=0.0)
    compiled = torch.compile(lambda x: function(x, again(x)), fullgraph=True, backend=backend)
    pairs = compiled(x), function(x, again(x))
    assert_close(*pairs)
    assert_close(*[torch.autograd.grad(pair[0].sum() + pair[1].sin().sum(), x) for pair in pairs])
    assert is_operator(seen) == (size == "operator")


@as_users
@pytest.mark.usefixtures("one_operator")
@pytest.mark.parametrize("size", ["operator", "formula"])
def test_a_share_that_varies_is_not_compiled_anew(size, monkeypatch):
    torch.compiler.reset()
    if size == "formula":
        monkeypatch.setattr(fused.Divergence, "smallest_operator", 2**62)
    backend, seen = nodes()
    function = partial(categorical_kl_terms, free_nats=0.0)
    compiled = torch.compile(lambda *x, mix: function(*x, unimix=mix), fullgraph=True, backend=backend)
    live = [x.requires_grad_() for x in normal(3, 4, 5)]
    for number, mix in enumerate((0.01, 0.02, 0.03, 0.5)):
        with torch.compiler.set_stance("default" if number < 2 else "fail_on_recompile"):
            pairs = compiled(*live, mix=mix), function(*live, unimix=mix)
        assert_close(*pairs, rtol=1e-12, atol=0)
        assert_close(*[torch.autograd.grad(pair[0].sum() + pair[1].sum(), live) for pair in pairs])
    assert is_operator(seen) == (size == "operator")


@as_users
@pytest.mark.usefixtures("one_operator")
def test_a_share_of_numpy_in_a_compiled_graph():
    torch.compiler.reset()
    live = [x.requires_grad_() for x in normal(3, 4, 5)]
    compiled = torch.compile(lambda *x: categorical_kl_terms(*x, unimix=np.float64(0.01)), backend="aot_eager")
    pairs = compiled(*live), categorical_kl_terms(*live, unimix=0.01)
    assert_close(*pairs)
    assert_close(*[torch.autograd.grad(pair[0].sum() + pair[1].sum(), live) for pair in pairs])


@as_users
@pytest.mark.usefixtures("one_operator")
@pytest.mark.parametrize("used", [0, 1])
def test_a_compiled_divergence_nobody_uses_gives_no_gradient(used):
    torch.compiler.reset()
    live = [x.requires_grad_() for x in normal(3, 4, 5)]
    compiled = torch.compile(
        lambda *x: fused.reduce(divergence(2, 0.01), *x)[used], fullgraph=True, backend="aot_eager"
    )
    compiled(*live).sum().backward()
    assert [x.grad is None for x in live] == [used == 1, used == 0]


@as_users
@pytest.mark.usefixtures("one_operator", "nothing_kept")
def test_a_compiled_divergence_in_a_transform_from_outside(monkeypatch):
    torch.compiler.reset()
    set_block(monkeypatch, 2**18)
    live, tangents = [[torch.randn(2**8, 32, 32) for _ in range(2)] for _ in range(2)]
    live = tuple(x.requires_grad_() for x in live)
    function = partial(categorical_kl_terms, free_nats=0.0)
    compiled = torch.compile(lambda *x: function(*x), backend="aot_eager")
    compiled(*live)
    assert_close(jvp(compiled, live, tuple(tangents)), jvp(function, live, tuple(tangents)), rtol=1e-4, atol=1e-5)


@as_users
@pytest.mark.parametrize(
    "without", ["gradients", "a gradient", "size", "one dtype", "float32 or more", "a CPU", "warnings"]
)
def test_other_divergences_are_compiled_of_the_formula(without, monkeypatch):
    torch.compiler.reset()
    backend, seen = nodes()
    reduction, live = divergence(2, 0.01), normal(2, 8, 8, dtype=torch.float32)
    monkeypatch.setattr(fused.Divergence, "smallest_operator", live[0].numel() + (without == "size"))
    if without == "warnings":
        warnings.simplefilter("error")
    elif without == "one dtype":
        live = live[0].double(), live[1]
    elif without == "float32 or more":
        live = tuple(x.bfloat16() for x in live)
    elif without == "a CPU":
        live = tuple(x.to("meta") for x in live)
    live = [x.requires_grad_(without != "a gradient") for x in live]
    compiled = torch.compile(lambda *x: fused.reduce(reduction, *x), fullgraph=True, backend=backend)
    with torch.set_grad_enabled(without != "gradients"):
        values, expected = compiled(*live), reduction.formula(*live)
    if without == "a CPU":
        assert [x.shape for x in values] == [x.shape for x in expected]
    else:
        assert_close(values, expected)
    assert seen
    assert not is_operator(seen)


@as_users
@pytest.mark.usefixtures("one_operator")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_of_any_layout_in_a_compiled_graph(layout):
    torch.compiler.reset()
    backend, seen = nodes("inductor")
    live = [LAYOUTS[layout](x).detach().requires_grad_() for x in normal(3, 2, 4, 5)]
    reduction = divergence(2, 0.01)
    compiled = torch.compile(lambda *x: fused.reduce(reduction, *x), fullgraph=True, backend=backend)
    values, expected = compiled(*live), reduction.formula(*live)
    assert_close(values, expected)
    assert_close(*[torch.autograd.grad(pair[0].sin().sum() + pair[1].sum(), live) for pair in (values, expected)])
    assert is_operator(seen)


@as_users
@pytest.mark.usefixtures("one_operator")
def test_a_compiled_divergence_of_a_size_that_varies():
    torch.compiler.reset()
    backend, seen = nodes("inductor")
    reduction = divergence(2, 0.01)
    compiled = torch.compile(lambda *x: fused.reduce(reduction, *x), fullgraph=True, dynamic=True, backend=backend)
    for rows in (2, 3, 7):
        live = [x.requires_grad_() for x in normal(rows, 4, 5)]
        with torch.compiler.set_stance("default" if rows == 2 else "fail_on_recompile"):
            values, expected = compiled(*live), reduction.formula(*live)
        assert_close(values, expected)
        assert_close(*[torch.autograd.grad(sum(x.sum() for x in pair), live) for pair in (values, expected)])
    assert is_operator(seen)


@as_users
@pytest.mark.usefixtures("one_operator")
@pytest.mark.parametrize("transform", COMPILED)
def test_a_compiled_transform_of_a_divergence_is_of_the_formula(transform):
    torch.compiler.reset()
    backend, seen = nodes()
    live, directions = tuple(x.requires_grad_() for x in normal(3, 2, 4)), normal(3, 2, 4)
    function, formula = both(divergence(1, 0.01), ())
    compiled = torch.compile(lambda *x: TRANSFORMS[transform](function, x, directions), fullgraph=True, backend=backend)
    assert_close(compiled(*live), TRANSFORMS[transform](formula, live, directions))
    assert is_operator(seen) == (transform == "value")


@as_users
@pytest.mark.usefixtures("one_operator")
def test_a_compiled_graph_of_a_divergence_can_be_walked_twice():
    torch.compiler.reset()
    reduction, live = divergence(2, 0.01), [x.requires_grad_() for x in normal(3, 4, 5)]
    compiled = torch.compile(lambda *x: fused.reduce(reduction, *x), fullgraph=True, backend="aot_eager")
    total = compiled(*live)[0].sum()
    first = torch.autograd.grad(total, live[0], retain_graph=True)
    assert_close(torch.autograd.grad(total, live[0]), first, rtol=0, atol=0)


@as_users
@pytest.mark.usefixtures("one_operator")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("learner", [0, 1])
def test_a_compiled_divergence_has_one_derivative_from_outside(backend, learner):
    torch.compiler.reset()
    operands = [torch.randn(5, 3, 4, requires_grad=True) for _ in range(2)]

    def value(x):
        return fused.reduce(divergence(1, 0.01), *operands[:learner], x, *operands[learner + 1 :])[learner]

    assert_derived_once(torch.compile(value, fullgraph=True, backend=backend), operands[learner])


@pytest.mark.parametrize("dims", [1, 2])
def test_the_operator_is_one_like_any_other(dims):
    operands = (*normal(3, 4, 5), torch.tensor(0.01, dtype=torch.float64), dims)
    torch.library.opcheck(fused._divergence, operands, test_utils=("test_schema", "test_faketensor"))


@as_users
@pytest.mark.usefixtures("nothing_kept", "one_operator")
def test_slopes_of_a_compiled_loop_lie_in_the_same_memory(monkeypatch):
    torch.compiler.reset()
    monkeypatch.setattr(pages, "SMALLEST", 1)
    compiled = torch.compile(lambda *x: fused.reduce(divergence(2, 0.01), *x), fullgraph=True, backend="aot_eager")
    live, places = [x.requires_grad_() for x in normal(3, 4, 5)], []
    for _ in range(3):
        sum(x.sum() for x in compiled(*live)).backward()
        for x in live:
            x.grad = None
        places.append({memory.data_ptr() for idle in pages._IDLE.values() for memory in idle})
    assert len(places[0]) == 2
    assert places == [places[0]] * 3


# ---- purity and memory -----------------------------------------------------------------------------------------------


@every_case
@pytest.mark.usefixtures("fast")
def test_no_argument_changes_and_a_graph_can_be_walked_twice(name):
    reduction, operands = CASES[name]
    operands = operands()
    before, generator = [x.clone() for x in operands], torch.get_rng_state()
    leaves = [x.requires_grad_() for x in operands[: reduction.live]]
    values = fused.reduce(reduction, *operands)
    loss = sum((k + 1) * value.square().sum() for k, value in enumerate(values))
    first, second = (torch.autograd.grad(loss, leaves, retain_graph=True) for _ in range(2))
    assert_close(first, second)
    assert all(torch.equal(x.detach(), y) for x, y in zip(operands, before, strict=True))
    assert torch.equal(torch.get_rng_state(), generator)


@every_case
@pytest.mark.usefixtures("fast")
def test_only_what_is_asked_for_is_differentiated(name):
    reduction, operands = CASES[name]
    operands = operands()
    for wanted in range(reduction.live):
        leaf = operands[wanted].detach().requires_grad_()
        values = fused.reduce(reduction, *operands[:wanted], leaf, *operands[wanted + 1 :])
        (got,) = torch.autograd.grad(sum(value.sum() for value in values), leaf)
        plain = reduction.formula(*operands[:wanted], leaf, *operands[wanted + 1 :])
        assert_close(got, torch.autograd.grad(plain[wanted].sum(), leaf)[0])


class Memory(TorchDispatchMode):
    """Where the results of operators lie, and how many bytes are there."""

    def __init__(self):
        self.sizes = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not function.is_view:
            tensors = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor) and not x.is_meta]
            storages = [x.untyped_storage() for x in tensors]
            self.sizes |= {storage.data_ptr(): storage.nbytes() for storage in storages}
        return result


#: What is made of the errors of 4095 rows, and how many passes over the gradient that takes in backward.
TOTALS = {
    "mean": (torch.mean, 0),
    "weight 1": (lambda x: torch.tensor(1.0) * (x.sum() / 4095), 0),
    "weight 2": (lambda x: 2 * x.mean(), 1),
    "sum": (torch.sum, 1),
    "mask": (lambda x: torch.where(torch.arange(4095) < 3, x, 0).sum() / 3, 1),
    "nothing": (lambda x: 0 * x.sum(), 1),
    "curved": (lambda x: x.square().mean(), 1),
}


class Passes(TorchDispatchMode):
    """The operators that compute as many numbers as there are in a gradient."""

    def __init__(self, numbers):
        self.numbers, self.seen = numbers, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not function.is_view and isinstance(result, torch.Tensor) and result.numel() == self.numbers:
            self.seen.append(str(function))
        return result


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("total", TOTALS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("flags", list(itertools.product([False, True], repeat=3)))
def test_the_gradient_of_a_mean_is_written_once(flags, total, dtype, monkeypatch):
    set_block(monkeypatch, 3000)
    total, number = TOTALS[total]
    prediction, target = normal(4095, 6, dtype=dtype)
    function, formula = both(error_sum(1, *flags), (target,))
    prediction.requires_grad_()
    loss, expected = total(function(prediction)[0]), total(formula(prediction)[0])
    with Passes(prediction.numel()) as passes:
        got = torch.autograd.grad(loss, prediction)[0]
    assert_close(got, torch.autograd.grad(expected, prediction)[0])
    assert len(passes.seen) == number, passes.seen


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("total", [torch.mean, torch.sum])
def test_a_tracer_of_operators_sees_all_there_is_to_do(total):
    prediction, target = normal(5, 6)
    function, formula = both(error_sum(1, False, True, True), (target,))

    def gradient(x):
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(total(function(leaf)[0]), leaf)[0]

    graph = make_fx(gradient)(torch.zeros(5, 6, dtype=torch.float64))
    leaf = prediction.requires_grad_()
    assert_close(graph(prediction), torch.autograd.grad(total(formula(leaf)[0]), leaf)[0])


@pytest.mark.usefixtures("fast")
@every_case
def test_a_batch_of_nothing(name):
    reduction, draw = CASES[name]
    operands = draw()
    live, constants = operands[: reduction.live], operands[reduction.live :]
    function, formula = both(reduction, constants)
    none = tuple(x.new_empty(0, *x.shape) for x in live)
    assert_close(vmap(function)(*none), vmap(formula)(*none))
    sums = [lambda *x, f=f: torch.stack(f(*x)).sum() for f in (function, formula)]
    assert_close(*[vmap(grad(f))(*none) for f in sums])


@pytest.mark.parametrize(
    ("reduction", "operands"),
    [
        (error_sum(), lambda: normal(2**9, 2**7)),
        (error_sum(1, False, True, True), lambda: images(2**9, 2**7)),
        (divergence(2, 0.01), lambda: normal(2**9, 2**4, 2**3)),
        (divergence(1, 0.0), lambda: normal(2**9, 2**4, 2**3)),
        (fused.TwoHotCrossEntropy(_cross_entropy), lambda: two_hot(2**13)),
    ],
)
def test_nothing_of_full_size_but_the_gradient_exists(monkeypatch, reduction, operands):
    take_path(monkeypatch, "fused")
    set_block(monkeypatch, 2**11)
    operands = operands()
    leaves = [x.requires_grad_() for x in operands[: reduction.live]]
    whole = leaves[0].untyped_storage().nbytes()
    with Memory() as made:
        values = fused.reduce(reduction, *operands)
        kept = torch.autograd.grad(values, leaves, [torch.ones_like(value) for value in values])
    gradients, given = ({x.untyped_storage().data_ptr() for x in tensors} for tensors in (kept, operands))
    assert {place for place, size in made.sizes.items() if size >= whole / 4} - given == gradients


@pytest.mark.usefixtures("fast")
def test_shared_work_is_done_once_where_a_backward_pass_follows(monkeypatch):
    set_block(monkeypatch, 2**18)
    prediction, target = normal(3, 4)

    def prepared(function, *args):
        with counted(monkeypatch, "prepare") as blocks:
            function(*args)
        return len(blocks)

    def backward(reduction, **options):
        leaf = prediction.clone().requires_grad_()
        torch.autograd.grad(fused.reduce(reduction, leaf, target)[0].sum(), leaf, **options)

    once = error_sum(1, False, True, True)
    assert prepared(backward, once) == prepared(backward, error_sum()) == 1
    assert prepared(partial(backward, once, create_graph=True)) == 2
    assert prepared(grad(lambda x: fused.reduce(once, x, target)[0].sum()), prediction) == 2
    assert prepared(partial(fused.reduce, once), prediction, target) == 1
    with torch.no_grad():
        assert prepared(partial(fused.reduce, once), prediction.clone().requires_grad_(), target) == 1


@pytest.mark.usefixtures("fast")
def test_gradients_are_not_made_in_advance_where_hooks_watch_what_is_saved(monkeypatch):
    leaf, target = normal(3, 4)
    leaf.requires_grad_()

    def value(x):
        return fused.reduce(error_sum(1, False, True, True), x, target)[0].sum()

    with counted(monkeypatch, "slope") as slopes:
        kept = torch.utils.checkpoint.checkpoint(value, leaf, use_reentrant=False)
        assert not slopes
    assert_close(torch.autograd.grad(kept, leaf), torch.autograd.grad(value(leaf), leaf))


def test_constants_of_inference_mode(path):
    with torch.inference_mode():
        target = torch.randn(3, 4)
    leaf = torch.randn(3, 4, requires_grad=True)
    (got,) = torch.autograd.grad(fused.reduce(error_sum(), leaf, target)[0].sum(), leaf)
    assert_close(got, 2 * (leaf - target).detach())


def test_a_value_nobody_uses_gives_no_gradient(path):
    posterior, prior = (x.requires_grad_() for x in normal(3, 4, 5))
    pair = fused.reduce(divergence(2, 0.01), posterior, prior)
    assert torch.autograd.grad(pair[0].sum(), [posterior, prior], allow_unused=True)[1] is None
    of_prior = fused.reduce(divergence(2, 0.01), posterior.detach(), prior)
    assert [value.requires_grad for value in of_prior] == [False, True]


@pytest.mark.usefixtures("fast")
def test_a_graph_made_outside_of_a_transform_is_walked_inside():
    leaf = normal(3, 4)[0].requires_grad_()
    (value,) = fused.reduce(error_sum(1, False, True, True), leaf, torch.zeros(3, 4, dtype=torch.float64))
    rows = vmap(lambda scale: torch.autograd.grad(value, leaf, scale, retain_graph=True)[0])(torch.eye(3).double())
    expected = torch.autograd.grad(value.sum(), leaf)[0]
    assert_close(rows, torch.diag_embed(expected.T).movedim(0, -1))


def test_public_functions_are_the_same_on_both_paths(monkeypatch):
    logits, bins = torch.randn(5, 4, 255), symexp_bins(255)
    target, results = 30 * torch.randn(5, 4), []
    for name in ("plain", "fused"):
        take_path(monkeypatch, name)
        post, prior = logits.unflatten(-1, (51, 5)), logits.flip(0).unflatten(-1, (51, 5))
        results.append((two_hot_cross_entropy(logits, target, bins), *categorical_kl_terms(post, prior)))
    assert_close(*results)
