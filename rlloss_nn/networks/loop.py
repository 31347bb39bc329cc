r"""A loop over time that a compiler takes for one operation.

A compiler that sees a loop unrolls it: 64 steps of a recurrent network take it minutes. It does not look into the
operation here, which runs a step that was compiled once, forwards and, for the gradient, backwards, where each step is
computed again from the state before it: only states are kept. What is around the loop can so be compiled as one graph
(``fullgraph``). There are first derivatives only, and no rule for ``vmap``: none of that is asked of a compiled update.

At the first call of what is compiled, torch checks operations in a way that makes it seem other than later calls, and
the step is compiled again at the second; not so with ``torch._functorch.config.check_custom_op_aliasing = False``.
"""

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate, count, pairwise
from typing import Any, TypeAlias
from weakref import WeakValueDictionary

import torch
from torch import Tensor

#: ``(weights, carry, inputs, constants) -> (carry, outputs)``: one step, on lists of tensors.
Step: TypeAlias = Callable[
    [list[Tensor], list[Tensor], list[Tensor], list[Tensor]], tuple[Sequence[Tensor], Sequence[Tensor]]
]


class Loop:
    """A step, compiled at its first call, for all steps of all calls.

    Args:
        step: a pure function of lists of tensors [B, ...]; of all but the constants there is a gradient.
        backend: as ``torch.compile`` takes it.
    """

    def __init__(self, step: Step, backend: str):
        self.step = step
        # The same loop has the same name in another process: compiled code may be kept on disk.
        self.name = next(name for name in map(str, count()) if name not in _LOOPS)
        _LOOPS[self.name] = self
        knobs: dict[str, Any] = {"fullgraph": True, "dynamic": False, "backend": backend}
        # All loops are the same lines of code, which may be compiled but a few times in all: isolated, where torch can.
        if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
            knobs["isolate_recompiles"] = True
        self.forwards = torch.compile(self._forwards, **knobs)
        self.backwards = torch.compile(self._backwards, **knobs)

    def __call__(
        self, weights: list[Tensor], carry: list[Tensor], inputs: list[Tensor], constants: list[Tensor]
    ) -> list[Tensor]:
        """All steps.

        Args:
            weights: the same for all steps.
            carry: what the first step starts from, [B, ...] each.
            inputs: [B, T, ...] each.
            constants: [B, T, ...] each, of any dtype.

        Returns:
            The carries after each step and the outputs of each, [B, T, ...] each.
        """
        kind = weights[0].device.type
        cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        done: list[Tensor] = _loop(self.name, cast, weights, carry, inputs, constants)
        return done

    def _forwards(
        self,
        cast: torch.dtype | None,
        weights: list[Tensor],
        carry: list[Tensor],
        inputs: list[Tensor],
        constants: list[Tensor],
    ) -> tuple[list[Tensor], list[Tensor]]:
        with _casting(cast, weights[0]):
            carry_after, outputs = self.step(weights, carry, inputs, constants)
        return list(carry_after), list(outputs)

    def _backwards(
        self,
        cast: torch.dtype | None,
        weights: list[Tensor],
        carry: list[Tensor],
        inputs: list[Tensor],
        constants: list[Tensor],
        grads: tuple[list[Tensor], list[Tensor]],
        totals: list[Tensor],
    ) -> Any:
        """Gradients of one step, those of the weights added to their totals."""

        def run(weights: list[Tensor], carry: list[Tensor], inputs: list[Tensor]) -> Any:
            return self._forwards(cast, weights, carry, inputs, constants)

        _, pull, *_ = torch.func.vjp(run, weights, carry, inputs)
        of_weights, of_carry, of_inputs = pull(grads)
        return [total + grad for total, grad in zip(totals, of_weights, strict=True)], of_carry, of_inputs


#: Those there are: an operation takes no function, but a name. A number would not do: once it has changed, as from one
#: agent to the next, the compiler takes it for a symbol.
_LOOPS: WeakValueDictionary[str, Loop] = WeakValueDictionary()


def _casting(cast: torch.dtype | None, like: Tensor) -> AbstractContextManager[Any]:
    """Autocast as it was where the loop was called: in the operation it is not."""
    return nullcontext() if cast is None else torch.autocast(like.device.type, cast)


@torch.library.custom_op("rlloss_nn::loop", mutates_args=())
def _loop(
    name: str,
    cast: torch.dtype | None,
    weights: Sequence[Tensor],
    carry: Sequence[Tensor],
    inputs: Sequence[Tensor],
    constants: Sequence[Tensor],
) -> list[Tensor]:
    run, states, outputs = _LOOPS[name].forwards, [], []
    state = list(carry)
    for inputs_t, constants_t in _steps(inputs, constants):
        state, outputs_t = run(cast, list(weights), state, inputs_t, constants_t)
        states.append(state)
        outputs.append(outputs_t)
    return _stack(states) + _stack(outputs)


@_loop.register_fake
def _(name: str, cast: torch.dtype | None, *parts: Sequence[Tensor]) -> list[Tensor]:
    weights, carry, inputs, constants = parts
    length = (*inputs, *constants)[0].shape[1]
    first = next(_steps(inputs, constants))
    state, outputs = _LOOPS[name]._forwards(cast, list(weights), list(carry), *first)
    return [x.new_empty(x.shape[0], length, *x.shape[1:]) for x in [*state, *outputs]]


@torch.library.custom_op("rlloss_nn::loop_backward", mutates_args=())
def _loop_backward(
    name: str,
    cast: torch.dtype | None,
    weights: Sequence[Tensor],
    carry: Sequence[Tensor],
    inputs: Sequence[Tensor],
    constants: Sequence[Tensor],
    done: Sequence[Tensor],
    grads: Sequence[Tensor],
) -> list[Tensor]:
    run, size = _LOOPS[name].backwards, len(carry)
    of_weights, of_carry = [torch.zeros_like(x) for x in weights], [torch.zeros_like(x) for x in carry]
    of_inputs: list[list[Tensor]] = []
    steps = list(_steps(inputs, constants))
    # In one tensor, or the first state would have other strides than the others and be compiled for on its own.
    before = [torch.cat([x.unsqueeze(1), y[:, :-1]], 1).unbind(1) for x, y in zip(carry, done[:size], strict=True)]
    from_outside = list(zip(*(x.unbind(1) for x in grads), strict=True))
    states = list(zip(*before, strict=True))
    for state, (inputs_t, constants_t), grads_t in zip(states[::-1], steps[::-1], from_outside[::-1], strict=True):
        of_after = [a + b for a, b in zip(of_carry, grads_t[:size], strict=True)]
        of_outputs = list(grads_t[size:])
        of_weights, of_carry, of_inputs_t = run(
            cast, list(weights), list(state), inputs_t, constants_t, (of_after, of_outputs), of_weights
        )
        of_inputs.append(of_inputs_t)
    # Laid out as the compiler has been told.
    return [x.contiguous() for x in [*of_weights, *of_carry]] + _stack(of_inputs[::-1])


@_loop_backward.register_fake
def _(name: str, cast: torch.dtype | None, *parts: Sequence[Tensor]) -> list[Tensor]:
    weights, carry, inputs, *_ = parts
    return [x.new_empty(x.shape) for x in [*weights, *carry, *inputs]]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.name, ctx.cast, *tensors = inputs
    ctx.sizes = [len(x) for x in tensors]
    ctx.save_for_backward(*(x for part in tensors for x in part), *output)


def _differentiate(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    *parts, done = _split(ctx.saved_tensors, ctx.sizes)
    full = [torch.zeros_like(x) if grad is None else grad for grad, x in zip(grads, done, strict=True)]
    *gradients, _ = _split(_loop_backward(ctx.name, ctx.cast, *parts, done, full), ctx.sizes[:3])
    return None, None, *gradients, [None] * ctx.sizes[3]


_loop.register_autograd(_differentiate, setup_context=_keep)


def _split(tensors: Sequence[Tensor], sizes: Sequence[int]) -> list[list[Tensor]]:
    """Parts of those sizes, and what is left."""
    ends = [0, *accumulate(sizes), len(tensors)]
    return [list(tensors[start:end]) for start, end in pairwise(ends)]


def _steps(inputs: Sequence[Tensor], constants: Sequence[Tensor]) -> Any:
    """The tensors of each step, [B, ...] each."""
    for step in zip(*(x.unbind(1) for x in [*inputs, *constants]), strict=True):
        yield list(step[: len(inputs)]), list(step[len(inputs) :])


def _stack(steps: list[list[Tensor]]) -> list[Tensor]:
    return [torch.stack(x, 1) for x in zip(*steps, strict=True)]
