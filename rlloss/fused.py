r"""The hot reductions in one pass over memory; how fast paths are chosen, and nothing else.

A loss does almost no arithmetic. Its time is the memory it touches, most of all the fresh pages of full-size
temporaries; so a fast path has none: each element of a gradient is written once, and once more where it is scaled.
Gradients of errors are scaled in advance for the mean over all rows, and once more only where the loss is something
else. Large ones lie where others lay that are gone, in huge pages where the kernel has them (pages.py).

=============================================  ========  ============================================================
where                                          path      why
=============================================  ========  ============================================================
under ``torch.compile`` and ``torch.export``   plain     the compiler fuses the formula itself, and better
errors there, outside of transforms, and not   traced    it would read the operands twice, and take logarithms anew in
for export                                               backward: one loop makes the value and the slope, which is
                                                         the gradient but for a scale, in memory that pages.py gives
divergences of mixtures there, both operands   blocked   inductor makes nine loops over memory of full size: the
learning, on a CPU, one float dtype, enough              pass that makes value and slopes is one operator to it
elements (``smallest_operator``)
CPU, one float dtype (float32 or float64),     blocked   some rows at a time go through the whole formula while they
enough elements (``pays``)                               are in the cache; gradients in a second pass, in backward
the same, a backward pass to follow, outside   blocked   value and gradients in one pass, which reads the operands
of all transforms                              once      and computes what both need once; backward scales at most
CUDA, float32, enough elements,                Triton    one kernel reads each element once; never run on a GPU so
Triton installed                                         far, its kernels only in Triton's interpreter
fewer elements                                 plain     calling a Function costs more than the temporaries
anything else: other devices, mixed dtypes,    plain     no fast path was written
subclasses of Tensor, inference tensors
``jvp`` of ``jvp``, with whatever between      plain     a Function has no derivative there
=============================================  ========  ============================================================

Every path gives the same numbers, up to rounding. Under ``vmap`` a batch is more rows of the same pass, and the size
that counts is that of one sample. Derivatives beyond the first are those of the plain formula; of a compiled graph they
are to be taken inside of it, by transforms, for from outside torch has one alone.
"""

import functools
import importlib.util
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import vjp

from rlloss import checks, pages
from rlloss.transforms import symlog

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Reduction:
    """A function of rows: leading dimensions of the operands stay, the trailing ones are summed over.

    The first ``live`` operands are differentiated. There is a value for each of them, all equal, and the gradient of
    the i-th value reaches the i-th operand alone.
    """

    formula: Callable[..., Tensors]  # operands -> ``live`` tensors [...]; its derivatives define those of any order
    live = 1
    smallest = 2**16  # elements of the first operand from which on the fast path pays
    integers: ClassVar[tuple[torch.dtype, ...]] = ()  # dtypes it reads, besides one of floats
    any_layout = False  # whether its kernels are right for a gradient that is not contiguous
    expects_mean = False  # whether users mostly take the mean of its values, and :meth:`slope` can scale for that

    def trailing(self) -> tuple[int, ...]:
        """How many dimensions of each operand are one row."""
        raise NotImplementedError

    @property
    def scratch(self) -> int:
        """How many tensors like a block of the first operand it writes into, at least ``live``."""
        raise NotImplementedError

    @property
    def block(self) -> int:
        """Elements of the first operand in a block: with the scratch, it stays in the cache."""
        return 2**18

    def pays(self, operand: Tensor) -> bool:
        """Whether the fast path takes less time than the formula where the first operand is of that size."""
        return operand.numel() >= max(self.smallest, 1)

    def traced(self, *operands: Tensor) -> Tensors:
        """The formula as a compiler is to see it."""
        return self.formula(*operands)

    def prepare(self, rows: Tensors, scratch: Tensors) -> None:
        """Write into ``scratch`` what value and gradients share.

        The i-th tensor of scratch may be the memory of the i-th live operand's gradient.
        """
        raise NotImplementedError

    def value(self, rows: Tensors, scratch: Tensors, out: Tensor) -> None:
        """Write the value of each row into ``out`` [rows], and leave what :meth:`slope` reads as it is."""
        raise NotImplementedError

    def factors(self) -> tuple[float, ...]:
        """By what each live operand's slope is to be multiplied, for a kernel to have less to do."""
        return (1.0,) * self.live

    def slope(self, rows: Tensors, scratch: Tensors, out: Sequence[Tensor | None], by: float = 1.0) -> None:
        """Write each live operand's gradient, but for its factor, where ``out`` has a tensor for it.

        One that ``expects_mean`` has one live operand, and multiplies by ``by``; for all others that is 1.
        """
        raise NotImplementedError


def reduce(reduction: Reduction, *operands: Tensor) -> Tensors:
    """``reduction.formula(*operands)``, by the fastest path there is."""
    if torch.compiler.is_compiling():
        return reduction.traced(*operands)
    if not has_fast_path(reduction, operands):
        return reduction.formula(*operands)
    values: Tensors = _apply(_Both if _backward_follows(reduction, operands) else _Value, reduction, *operands)
    return values


def has_fast_path(reduction: Reduction, operands: Tensors) -> bool:
    """The table at the head of this file."""
    paid = reduction.pays(operands[0]) and not cannot_be_saved(operands) and _has_kernel(reduction, operands)
    return paid and not _pushed_forward_twice()


def _has_kernel(reduction: Reduction, operands: Tensors) -> bool:
    """Whether there is one for tensors of such kinds, of any size."""
    first = operands[0]
    for x in operands:
        if type(x) not in (Tensor, torch.nn.Parameter) or x.device != first.device:
            return False
        if x.dtype != first.dtype and x.dtype not in reduction.integers:
            return False
    if first.is_cuda:
        return first.dtype == torch.float32 and has_triton()
    return first.is_cpu and first.dtype in (torch.float32, torch.float64)


def _backward_follows(reduction: Reduction, operands: Tensors) -> bool:
    """Whether gradients computed now will most likely be asked for, and by plain autograd."""
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in operands[: reduction.live])
    # Hooks that move or forget what is saved, as of checkpointing, do not see gradients made in advance.
    hooked = torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
    return wanted and not hooked and not operands[0].is_cuda and not in_transform()


def cannot_be_saved(operands: Tensors) -> bool:
    """Whether a backward pass might follow, for which a tensor made in inference mode cannot be kept."""
    return torch.is_grad_enabled() and any(x.is_inference() for x in operands)


def in_transform() -> bool:
    """Whether anything but plain autograd looks on: a transform of torch.func, or forward-mode derivatives."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def _pushed_forward_twice() -> bool:
    """Whether a ``jvp`` is inside of another: of a torch.autograd.Function, torch 2.13 takes the outer one to be 0."""
    levels = torch._C._functorch.get_interpreter_stack() or ()
    return sum(level.key() == torch._C._functorch.TransformType.Jvp for level in levels) > 1


def watched(*tensors: Tensor) -> bool:
    """Whether a compiler looks on too, or a subclass of Tensor that may: what is done is then to be seen by them."""
    return torch.compiler.is_compiling() or in_transform() or any(type(x) is not Tensor for x in tensors)


def _function_is_traced() -> bool:
    """Whether the compiler that traces now takes a Function with its backward: not for export, nor in transforms."""
    # torch 2.13 warns itself, unseen, while it traces one, and fails where warnings are errors.
    fails = any(_may_be_error(category) for category in (UserWarning, DeprecationWarning))
    return not fails and not torch.compiler.is_exporting() and not in_transform()


def _may_be_error(category: type[Warning]) -> bool:
    """Whether some warnings of a category are errors; asked without a warning, for that would touch global state."""
    for action, message, kind, module, _ in warnings.filters:
        if action == "error" and issubclass(category, kind):
            return True
        if message is None and module is None and issubclass(category, kind):
            return False
    return False


# What `torch.compiler.assume_constant_result` sets, which would import the compiler with rlloss: the function is called
# while a graph is traced, which guards transforms.
_function_is_traced._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


class _Value(torch.autograd.Function):
    """``(reduction, *operands) -> values``."""

    @staticmethod
    def forward(reduction: Reduction, *operands: Tensor) -> Tensors:
        if operands[0].is_cuda:
            out = _kernels().value(reduction, operands)
        else:
            out = operands[0].new_empty(_leading(reduction, operands))
            for (*rows, part), scratch in _blocks(reduction, (*operands, out), (*reduction.trailing(), 0)):
                reduction.prepare(tuple(rows), scratch)
                reduction.value(tuple(rows), scratch, part)
        return _for_each(reduction, out)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.reduction, operands = inputs[0], inputs[1:]
        ctx.save_for_backward(*operands)
        ctx.save_for_forward(*operands)

    @staticmethod
    def backward(ctx: Any, *scales: Tensor) -> Any:
        return None, *_slopes(ctx.reduction, _wanted(ctx, ctx.reduction), scales, ctx.saved_tensors)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> Any:
        reduction, operands = ctx.reduction, ctx.saved_tensors
        one = operands[0].new_ones(_leading(reduction, operands))
        wanted = tuple(i for i in range(reduction.live) if tangents[i] is not None)
        slopes = _apply(_Slope, reduction, wanted, *[one] * reduction.live, *operands)
        moved = _at(
            wanted, [_sum_to(one, s * tangents[i]) for i, s in zip(wanted, slopes, strict=True)], reduction.live
        )
        return tuple(torch.zeros_like(one) if tangent is None else tangent for tangent in moved)

    @staticmethod
    def vmap(info: Any, dims: Any, reduction: Reduction, *operands: Tensor) -> Any:
        return _apply(_Value, reduction, *_fold(info, dims[1:], operands)), (0,) * reduction.live


class _Both(torch.autograd.Function):
    """As :class:`_Value`, with the gradients in the same pass."""

    @staticmethod
    def forward(ctx: Any, reduction: Reduction, *operands: Tensor) -> Tensors:
        ctx.reduction, wanted = reduction, _wanted(ctx, reduction)
        ctx.save_for_backward(*operands)
        out, ctx.slopes = _value_and_slopes(reduction, wanted, operands)
        ctx.set_materialize_grads(False)
        values = _for_each(reduction, out)
        ctx.mark_non_differentiable(*[value for i, value in enumerate(values) if i not in wanted])
        return values

    @staticmethod
    def backward(ctx: Any, *scales: Tensor | None) -> Any:
        reduction, wanted = ctx.reduction, _wanted(ctx, ctx.reduction)
        slopes, ctx.slopes = ctx.slopes, None
        used = tuple(i for i in wanted if scales[i] is not None)
        known = [scale for scale in scales if scale is not None]
        if not known:
            return (None,) * len(ctx.needs_input_grad)
        # Whatever stands in for the scales of values that nobody used.
        full = [known[0] if scale is None else scale for scale in scales]
        # A second walk through the graph, or one that is recorded or batched, computes them anew.
        if slopes is None or torch.is_grad_enabled() or in_transform() or any(map(legacy_batched, known)):
            return None, *_slopes(reduction, used, full, ctx.saved_tensors)
        kept = _at(wanted, slopes, len(ctx.needs_input_grad) - 1)
        for i in used:
            if reduction.expects_mean:
                _scale_mean(kept[i], full[i])
            else:
                _scale(kept[i], full[i], reduction.factors()[i])
        return None, *[slope if i in used else None for i, slope in enumerate(kept)]


class _Slope(torch.autograd.Function):
    """``(reduction, wanted, *scales, *operands) -> gradients`` of the wanted operands, each row times its scale."""

    @staticmethod
    def forward(reduction: Reduction, wanted: tuple[int, ...], *tensors: Tensor) -> Tensors:
        live, trailing = reduction.live, reduction.trailing()
        if tensors[live].is_cuda:
            slopes: Tensors = _kernels().slopes(reduction, wanted, tensors[:live], tensors[live:])
            return slopes
        outs = [_fresh(reduction, tensors[live + i], trailing[i]) for i in wanted]
        counts = (*[0] * live, *trailing, *[trailing[i] for i in wanted])
        for tensor, scratch in _blocks(reduction, (*tensors, *outs), counts, wanted, first=live):
            rows, parts = tensor[live : len(tensors)], tensor[len(tensors) :]
            reduction.prepare(rows, scratch)
            reduction.slope(rows, scratch, _at(wanted, parts, live))
            for i, part in zip(wanted, parts, strict=True):
                _scale(part, tensor[i], reduction.factors()[i])
        return tuple(outs)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.reduction, ctx.wanted, tensors = inputs[0], inputs[1], inputs[2:]
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *directions: Tensor) -> Any:
        live, tensors = ctx.reduction.live, ctx.saved_tensors
        pulled = []
        for i, direction in zip(ctx.wanted, directions, strict=True):
            slope = _plain_slope(ctx.reduction, i, tensors[live:])
            pulled.append(vjp(slope, tensors[i], tensors[live + i])[1](direction))
        of_scales = _at(ctx.wanted, [of_scale for of_scale, _ in pulled], live)
        of_operands = _at(ctx.wanted, [of_operand for _, of_operand in pulled], len(tensors) - live)
        return None, None, *of_scales, *of_operands

    @staticmethod
    def jvp(ctx: Any, _: None, __: Any, *tangents: Tensor | None) -> Any:
        live, tensors = ctx.reduction.live, ctx.saved_tensors
        moved = []
        for i in ctx.wanted:
            slope, scale, operand = _plain_slope(ctx.reduction, i, tensors[live:]), tensors[i], tensors[live + i]
            total = torch.zeros_like(operand)
            if tangents[i] is not None:
                total = total + slope(tangents[i], operand)
            if tangents[live + i] is not None:
                # A row's second derivative is symmetric: pulling a direction back is pushing it forward.
                total = (
                    total + vjp(lambda x, slope=slope, scale=scale: slope(scale, x), operand)[1](tangents[live + i])[0]
                )
            moved.append(total)
        return tuple(moved)

    @staticmethod
    def vmap(info: Any, dims: Any, reduction: Reduction, wanted: tuple[int, ...], *tensors: Tensor) -> Any:
        return _apply(_Slope, reduction, wanted, *_fold(info, dims[2:], tensors)), (0,) * len(wanted)


def _value_and_slopes(reduction: Reduction, wanted: tuple[int, ...], operands: Tensors) -> tuple[Tensor, list[Tensor]]:
    """Value and slopes in one pass; if the reduction ``expects_mean`` the gradient of that, else without factors."""
    trailing, number = reduction.trailing(), len(operands)
    # A view of what requires gradients takes longer.
    operands = tuple(x.detach() for x in operands)
    out = operands[0].new_empty(_leading(reduction, operands))
    slopes = [_fresh(reduction, operands[i], trailing[i]) for i in wanted]
    by = reduction.factors()[0] / out.numel() if reduction.expects_mean else 1.0
    counts = (*trailing, 0, *[trailing[i] for i in wanted])
    for tensors, scratch in _blocks(reduction, (*operands, out, *slopes), counts, wanted):
        rows, (part, *parts) = tensors[:number], tensors[number:]
        reduction.prepare(rows, scratch)
        reduction.value(rows, scratch, part)
        reduction.slope(rows, scratch, _at(wanted, parts, reduction.live), by)
    return out, slopes


@dataclass(frozen=True)
class ErrorSum(Reduction):
    """Sum of squared or absolute errors: (prediction [..., *row], target [..., *row])."""

    dims: int  # of a row, at least 1
    absolute: bool = False
    symlog_prediction: bool = False
    symlog_target: bool = False
    smallest = 2**18
    integers = (torch.uint8,)
    any_layout = True
    expects_mean = True

    def flags(self) -> tuple[bool, bool, bool]:
        """What a kernel is chosen by."""
        return self.absolute, self.symlog_prediction, self.symlog_target

    def trailing(self) -> tuple[int, ...]:
        """As for every :class:`Reduction`."""
        return self.dims, self.dims

    @property
    def scratch(self) -> int:
        """As for every :class:`Reduction`."""
        if self.symlog_prediction:
            return 4
        return 3 if self.symlog_target else 2

    @property
    def block(self) -> int:
        """As for every :class:`Reduction`."""
        return 2**17 if self.symlog_prediction else 2**19

    def pays(self, operand: Tensor) -> bool:
        """As for every :class:`Reduction`; on a CPU sooner for symlogs of predictions, with slope a dozen operators.

        Not in transforms, which take value and gradients in two passes, each a Function of theirs.
        """
        sooner = self.symlog_prediction and operand.device.type == "cpu" and not in_transform()
        return operand.numel() >= max(self.smallest // 16 if sooner else self.smallest, 1)

    def traced(self, *operands: Tensor) -> Tensors:
        """As for every :class:`Reduction`."""
        if not _function_is_traced():
            return self.formula(*operands)
        prediction, target = operands
        own = prediction.requires_grad and torch.promote_types(prediction.dtype, target.dtype) == prediction.dtype
        memory = pages.memory_like(prediction) if own and torch.is_grad_enabled() else None
        value, slope = _traced_errors(self, prediction.detach(), target.detach(), memory)
        factor = checks.scalar_like(value, self.factors()[0])
        # The formula's own backward reads a prediction for its symlog alone.
        return (_apply(_KnownSlope, prediction, value, slope, factor, self.symlog_prediction),)

    def prepare(self, rows: Tensors, scratch: Tensors) -> None:
        """As for every :class:`Reduction`."""
        (prediction, target), (error, other) = rows, scratch[:2]
        if self.symlog_prediction:
            sign, magnitude = scratch[2:]
            torch.abs(prediction, out=magnitude)
            # A product with the sign takes less time than `copysign`.
            prediction = torch.log1p(magnitude, out=error).mul_(torch.sign(prediction, out=sign))
        if self.symlog_target and target.dtype != torch.uint8:
            torch.abs(target, out=other).log1p_()
            torch.addcmul(prediction, other, torch.sign(target, out=scratch[2]), value=-1, out=error)
        else:
            torch.sub(prediction, self._bytes(target, other), out=error)

    def value(self, rows: Tensors, scratch: Tensors, out: Tensor) -> None:
        """As for every :class:`Reduction`."""
        dims = tuple(range(1, 1 + self.dims))
        torch.linalg.vector_norm(scratch[0], 1 if self.absolute else 2, dim=dims, out=out)
        if not self.absolute:
            out.square_()

    def factors(self) -> tuple[float, ...]:
        """As for every :class:`Reduction`."""
        return (1.0 if self.absolute else 2.0,)

    def slope(self, rows: Tensors, scratch: Tensors, out: Sequence[Tensor | None], by: float = 1.0) -> None:
        """As for every :class:`Reduction`."""
        error = scratch[0]
        if out[0] is None:
            return
        if self.absolute:
            error.sgn_()
        if self.symlog_prediction:
            magnitude = scratch[3]
            divisor = torch.add(error.new_full((), 1 / by), magnitude, alpha=1 / by, out=magnitude)
            torch.div(error, divisor, out=out[0])
        elif by != 1 or out[0] is not error:
            torch.mul(error, by, out=out[0])

    def _bytes(self, target: Tensor, out: Tensor) -> Tensor:
        """Bytes as floats in [0, 1], or the symlogs of those, in ``out``; all else as it is."""
        if target.dtype != torch.uint8:
            return target
        out.copy_(target).div_(255)
        return out.log1p_() if self.symlog_target else out


class _KnownSlope(torch.autograd.Function):
    """``value``, a function of ``x`` whose ``factor * slope`` is known, in a compiled graph.

    It can be differentiated once, as compiled graphs in general. From outside of the graph, torch 2.13 takes a second
    derivative for 0 without an error, unless backward reads an input that needs gradients: then it refuses. So backward
    reads ``x``, which then is kept and must not be changed, where ``reads`` says so.
    """

    @staticmethod
    def forward(x: Tensor, value: Tensor, slope: Tensor, factor: Tensor, reads: bool) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, _, slope, factor, reads = inputs
        ctx.save_for_backward(slope, factor, *[x] * reads)

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> Any:
        slope, factor, *x = ctx.saved_tensors
        scale = torch.ops.rlloss.reads(scale, *x, slope) if x else scale
        return checks.align(factor * scale, slope) * slope, None, None, None, None


def _copy(scale: Tensor, x: Tensor, slope: Tensor) -> Tensor:
    """A copy of the scale in a compiled graph, which seems to be made of ``x`` and ``slope``, and reads neither.

    As inductor has ``x`` for backward then, it might make the slope of it again, and does not where an operator reads
    the slope.
    """
    return scale.clone()


# Not by `torch.library.custom_op`, of which a call takes as long as a small loss.
_LIBRARY: Any = torch.library.Library("rlloss", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("reads(Tensor scale, Tensor x, Tensor slope) -> Tensor")
_LIBRARY.impl("reads", _copy, "CompositeExplicitAutograd")
_LIBRARY.impl("reads", lambda scale, x, slope: torch.empty_like(scale), "Meta")


def _traced_errors(reduction: ErrorSum, prediction: Tensor, target: Tensor, memory: Tensor | None) -> Tensors:
    """Value and slope of an :class:`ErrorSum` in a compiled graph.

    inductor makes one loop of it, which reads both operands once; of the formula it makes two, one for the value and
    one for what backward needs. The value is made of the slope, and not both of the error, or there would be two again.
    """
    symlogs = reduction.symlog_prediction, reduction.symlog_target
    if all(symlogs):
        error = _symlog_difference(prediction, pixels(target, prediction.dtype))
    else:
        error = errors(prediction, target, *symlogs)
    slope = error.sgn() if reduction.absolute else error
    if reduction.symlog_prediction:
        # Finite, so that the error of an infinite prediction stays infinite.
        divisor = (1 + prediction.abs()).clamp_max(torch.finfo(prediction.dtype).max)
        slope = _row_by_row(slope / divisor, prediction, reduction.dims, memory)
        size = slope * divisor * error
    else:
        slope = _row_by_row(slope, prediction, reduction.dims, memory)
        size = slope * error
    return size.sum(tuple(range(-reduction.dims, 0))), slope


def _row_by_row(x: Tensor, rows: Tensor, dims: int, memory: Tensor | None) -> Tensor:
    """``x``, chosen by a condition that is computed for each row of ``rows`` and never fails.

    So inductor keeps a loop over rows around one over what is in them. It would make one of both, and could not join
    that with the sum over a row. Where there is ``memory``, that is what is not chosen, and where it writes ``x``.
    """
    index: tuple[Any, ...] = (..., *[slice(1)] * dims)
    first = rows[index]
    never = (first != first) & (first == first)
    return x + never if memory is None else torch.where(never, memory, x)


def errors(prediction: Tensor, target: Tensor, symlog_prediction: bool, symlog_target: bool) -> Tensor:
    """The difference, of symlogs where these are asked for; bytes as targets are pixels."""
    target = pixels(target, prediction.dtype)
    target = symlog(target) if symlog_target else target
    return (symlog(prediction) if symlog_prediction else prediction) - target


def pixels(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes as floats in [0, 1], all else as it is."""
    return x.to(dtype) / 255 if x.dtype == torch.uint8 else x


def _symlog_difference(x: Tensor, y: Tensor) -> Tensor:
    """``symlog(x) - symlog(y)`` with one logarithm: of (1 + |x|) / (1 + |y|), or of their product if signs differ.

    Where signs differ and the product overflows, as of two values beyond 1e19 in float32, the difference comes out too
    small, at worst half of what it should be, or infinite.
    """
    distance = (x - y).abs()
    product = x.abs() * y.abs()
    product = product.clamp_max(torch.finfo(product.dtype).max / 4)
    growth = torch.where(x * y < 0, distance + product, distance / (1 + torch.minimum(x.abs(), y.abs())))
    return torch.copysign(torch.log1p(growth), x - y)


@dataclass(frozen=True)
class TwoHotCrossEntropy(Reduction):
    """Cross-entropy of a two-hot target: (logits [..., bins], indices of two bins [..., 2], their weights [..., 2]).

    A bin that weighs 0 adds nothing.
    """

    scratch = 1
    smallest = 2**21  # the plain formula has no dense target either
    integers = (torch.int64,)

    def trailing(self) -> tuple[int, ...]:
        """As for every :class:`Reduction`."""
        return 1, 1, 1

    def prepare(self, rows: Tensors, scratch: Tensors) -> None:
        """As for every :class:`Reduction`."""
        torch.log_softmax(rows[0], -1, out=scratch[0])

    def value(self, rows: Tensors, scratch: Tensors, out: Tensor) -> None:
        """As for every :class:`Reduction`."""
        _, pair, weights = rows
        nats = torch.gather(scratch[0], 1, pair).neg_()
        torch.sum(torch.where(weights == 0, 0.0, weights * nats), 1, out=out)

    def slope(self, rows: Tensors, scratch: Tensors, out: Sequence[Tensor | None], by: float = 1.0) -> None:
        """As for every :class:`Reduction`."""
        _, pair, weights = rows
        if out[0] is not None:
            torch.exp(scratch[0], out=out[0]).mul_(weights.sum(1, keepdim=True)).scatter_add_(1, pair, -weights)


@dataclass(frozen=True)
class Divergence(Reduction):
    """KL divergence of categoricals mixed with the uniform one: (posterior, prior [..., (groups,) classes]).

    The first value trains the posterior, the second the prior.
    """

    dims: int  # 1: a value for each categorical; 2: for their sum over groups
    mix: float = 0.0
    live = 2
    scratch = 5
    smallest = 2**17
    smallest_operator = 2**20  # elements, from which on a compiled graph has the blocked pass as one operator

    def trailing(self) -> tuple[int, ...]:
        """As for every :class:`Reduction`."""
        return self.dims, self.dims

    def factors(self) -> tuple[float, ...]:
        """As for every :class:`Reduction`."""
        return 1 - self.mix, self.mix - 1 if self.mix else 1.0

    def traced(self, *operands: Tensor) -> Tensors:
        """As for every :class:`Reduction`."""
        if not (torch.is_grad_enabled() and _function_is_traced() and self._is_operator(*operands)):
            return self.formula(*operands)
        # As a number it would be one of the graph's constants, and each new one compiled anew.
        mix = operands[0].new_ones((), dtype=torch.float64) * self.mix
        known = _divergence(*(x.detach() for x in operands), mix, self.dims)
        factors = [checks.scalar_like(known[0], factor) for factor in self.factors()]
        each = zip(operands, known[: self.live], known[self.live :], factors, strict=True)
        return tuple(_apply(_KnownSlope, *tensors, True) for tensors in each)

    def _is_operator(self, *operands: Tensor) -> bool:
        if not self.mix or pages.surely_below(operands[0].numel(), self.smallest_operator):
            return False
        return operands[0].is_cpu and all(x.requires_grad for x in operands) and _has_kernel(self, operands)

    def prepare(self, rows: Tensors, scratch: Tensors) -> None:
        """As for every :class:`Reduction`."""
        p, q, ratio, log_ratio, mixed = scratch
        if self.mix:
            uniform = p.new_full((), 1 / p.shape[-1])
            torch.lerp(torch.softmax(rows[0], -1, out=p), uniform, self.mix, out=mixed)
            torch.lerp(torch.softmax(rows[1], -1, out=q), uniform, self.mix, out=ratio)
            torch.log(torch.div(mixed, ratio, out=ratio), out=log_ratio)
        else:
            self._log_ratio(rows, p, ratio, log_ratio)

    def value(self, rows: Tensors, scratch: Tensors, out: Tensor) -> None:
        """As for every :class:`Reduction`."""
        p, _, _, log_ratio, mixed = scratch
        torch.mul(mixed if self.mix else p, log_ratio, out=mixed)
        torch.sum(mixed.flatten(1), 1, out=out)

    def slope(self, rows: Tensors, scratch: Tensors, out: Sequence[Tensor | None], by: float = 1.0) -> None:
        """As for every :class:`Reduction`."""
        p, q, ratio, log_ratio, _ = scratch
        if out[1] is not None and self.mix:
            _softmax_slope(ratio, q, out[1])
        elif out[1] is not None:
            log_q = ratio
            torch.exp(log_q, out=out[1]).sub_(p)
        if out[0] is not None:  # last, for this may be the memory of p
            _softmax_slope(log_ratio, p, out[0])

    def _log_ratio(self, rows: Tensors, p: Tensor, log_q: Tensor, out: Tensor) -> None:
        """Write the probabilities p, the logarithms of q, and log(p / q), which is 0 where p is: 0 log 0 is 0."""
        torch.log_softmax(rows[0], -1, out=p)
        torch.log_softmax(rows[1], -1, out=log_q)
        torch.sub(p, log_q, out=out)
        torch.ops.aten.threshold_backward.grad_input(out, p.exp_(), 0, grad_input=out)


@torch.library.custom_op("rlloss::divergence", mutates_args=())
def _divergence(posterior: Tensor, prior: Tensor, mix: Tensor, dims: int) -> list[Tensor]:
    """The divergence of mixtures, twice, and both slopes, in a compiled graph.

    Twice, for of two copies inductor makes one, and torch 2.13 then takes two results of a graph for the same.

    Of the formula inductor makes five loops over memory of full size, as each softmax takes two, and four more in
    backward.
    """
    reduction = Divergence(_no_formula, dims, float(mix))
    value, slopes = _value_and_slopes(reduction, (0, 1), (posterior, prior))
    return [*_for_each(reduction, value), *slopes]


@_divergence.register_fake
def _(posterior: Tensor, prior: Tensor, mix: Tensor, dims: int) -> list[Tensor]:
    values = [x.new_empty(x.shape[: x.ndim - dims]) for x in (posterior, prior)]
    return [*values, *[x.new_empty(x.shape) for x in (posterior, prior)]]


def _no_formula(*_: Tensor) -> Tensors:
    raise NotImplementedError


def _softmax_slope(slope: Tensor, probabilities: Tensor, out: Tensor) -> Tensor:
    """``slope`` by the probabilities as one by the logits."""
    return torch._softmax_backward_data(slope, probabilities, -1, slope.dtype, grad_input=out)


def _kernels() -> Any:
    """What only a CUDA tensor needs, for it imports Triton."""
    from rlloss import fused_triton

    return fused_triton


def _apply(function: Any, *args: Any) -> Any:
    return function.apply(*args)


def legacy_batched(x: Tensor) -> bool:
    """Whether ``torch.autograd.grad(..., is_grads_batched=True)`` made it: it asks no Function how to batch."""
    return torch._C._functorch.is_legacy_batchedtensor(x)


def _wanted(ctx: Any, reduction: Reduction) -> tuple[int, ...]:
    """The live operands that need a gradient."""
    return tuple(i for i in range(reduction.live) if ctx.needs_input_grad[1 + i])


def _for_each(reduction: Reduction, value: Tensor) -> Tensors:
    """One copy of the value for each live operand."""
    return value, *[value.clone() for _ in range(reduction.live - 1)]


def _slopes(
    reduction: Reduction, wanted: tuple[int, ...], scales: Sequence[Tensor], operands: Tensors
) -> Sequence[Tensor | None]:
    """The gradient of each wanted operand, None for all others."""
    if _pushed_forward_twice():
        slopes: Sequence[Tensor] = [_plain_slope(reduction, i, operands)(scales[i], operands[i]) for i in wanted]
    elif any(map(legacy_batched, scales)):
        # Batched values cannot be written into unbatched memory; the slope is linear in its scale.
        ones = [operands[0].new_ones(scale.shape) for scale in scales]
        slopes = _apply(_Slope, reduction, wanted, *ones, *operands)
        slopes = [checks.align(scales[i], slope) * slope for i, slope in zip(wanted, slopes, strict=True)]
    else:
        slopes = _apply(_Slope, reduction, wanted, *scales, *operands)
    return _at(wanted, slopes, len(operands))


def _scale(slope: Tensor, scale: Tensor, factor: float) -> None:
    """Times each row's scale, in the memory of ``slope``, which nobody else has seen."""
    slope.mul_(checks.align(scale if factor == 1 else factor * scale, slope))


def _scale_mean(slope: Tensor, scale: Tensor) -> None:
    """Times each row's scale, in the memory of ``slope``, which already has that of a mean, factor and all.

    If the mean was asked for, nothing is left to do, and a pass over memory is saved. A look at the scale costs nothing
    on a CPU, where no device has to be waited for; a tracer cannot look.
    """
    expected = scale.new_ones(()) / scale.numel()
    tracer = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY)
    traced = torch.compiler.is_compiling() or tracer is not None
    if traced or not torch.equal(scale, expected.expand_as(scale)):
        _scale(slope, scale / expected, 1.0)


def _at(places: Sequence[int], values: Sequence[Any], number: int) -> list[Any]:
    """``number`` entries: the values at their places, None elsewhere."""
    by_place = dict(zip(places, values, strict=True))
    return [by_place.get(i) for i in range(number)]


def _plain_slope(reduction: Reduction, i: int, operands: Tensors) -> Callable[[Tensor, Tensor], Tensor]:
    """``(scale, operand) -> scale * gradient`` of the formula by its i-th operand, the others held."""

    def slope(scale: Tensor, operand: Tensor) -> Tensor:
        def value(x: Tensor) -> Tensor:
            return reduction.formula(*operands[:i], x, *operands[i + 1 :])[i]

        gradient: Tensor = vjp(value, operand)[1](scale)[0]
        return gradient

    return slope


def _sum_to(like: Tensor, x: Tensor) -> Tensor:
    """The sum over all dimensions of ``x`` behind those of ``like``."""
    return x.sum(tuple(range(like.ndim, x.ndim)))


def _leading(reduction: Reduction, operands: Tensors) -> torch.Size:
    return operands[0].shape[: operands[0].ndim - reduction.trailing()[0]]


def _fold(info: Any, dims: Sequence[int | None], tensors: Tensors) -> list[Tensor]:
    """The batch as one more leading dimension, shared tensors expanded."""
    pairs = zip(tensors, dims, strict=True)
    return [x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0) for x, dim in pairs]


def _fresh(reduction: Reduction, like: Tensor, trailing: int) -> Tensor:
    """Memory for a gradient, in the order of ``like`` if the kernel can write and its rows can be counted there."""
    if reduction.any_layout and _viewable(laid_out := torch.empty_like(like, device="meta"), trailing):
        return pages.for_result(like, like.shape, laid_out.stride())
    return pages.for_result(like, like.shape)


def _blocks(
    reduction: Reduction, tensors: Tensors, trailing: tuple[int, ...], wanted: tuple[int, ...] = (), first: int = 0
) -> Iterator[tuple[Tensors, Tensors]]:
    """Blocks of rows ``[rows, *row]`` of all tensors, and scratch like that of the first operand.

    The last tensors are the gradients of the ``wanted`` operands, and serve as scratch in their places.
    """
    gradients = _at(wanted, range(len(tensors) - len(wanted), len(tensors)), reduction.scratch)
    layout = torch.preserve_format if reduction.any_layout else torch.contiguous_format
    spare: dict[int, Tensor] = {}
    for group in _rows(tensors, trailing, first, reduction.block):
        count, elements = group[first].shape[0], math.prod(group[first].shape[1:])
        if count == 0:
            return
        step = max(1, min(count, reduction.block // max(1, elements)))
        parts = [x.split(step) for x in group]  # type: ignore[no-untyped-call]
        if not spare:
            places = [i for i, k in enumerate(gradients) if k is None]
            spare = {i: torch.empty_like(parts[first][0], memory_format=layout) for i in places}
        whole, rest = divmod(count, step)
        own = {i: [x] * whole + [x[:rest]] * bool(rest) for i, x in spare.items()}
        scratch = [own[i] if k is None else parts[k] for i, k in enumerate(gradients)]
        yield from zip(zip(*parts, strict=True), zip(*scratch, strict=True), strict=True)


def _rows(tensors: Tensors, trailing: tuple[int, ...], first: int, block: int) -> Iterator[Tensors]:
    """All tensors with one leading dimension, as views, in parts if there is no other way.

    Where parts would be small, what cannot be viewed is copied instead.
    """
    pairs = list(zip(tensors, trailing, strict=True))
    leading = tensors[0].ndim - trailing[0]
    part = math.prod(tensors[first].shape[1:])
    if leading > 1 and 8 * part >= block and not all(_viewable(x, dims) for x, dims in pairs):
        for index in range(tensors[0].shape[0]):
            yield from _rows(tuple(x[index] for x in tensors), trailing, first, block)
    else:
        rows = math.prod(tensors[0].shape[:leading])
        yield tuple(x.reshape(rows, *x.shape[leading:]) for x in tensors)


def _viewable(x: Tensor, trailing: int) -> bool:
    """Whether the leading dimensions can be counted as one without a copy."""
    if x.is_contiguous():
        return True
    leading = x.ndim - trailing
    steps = [(size, stride) for size, stride in zip(x.shape[:leading], x.stride()[:leading], strict=True) if size != 1]
    return all(stride == size * inner for (_, stride), (size, inner) in pairwise(steps))
