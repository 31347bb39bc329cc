r"""The recurrence of returns, from the end of a sequence to its beginning.

Step by step, each of T short operations waits for the one before. In plain eager PyTorch they are few and long instead:
in each round an entry comes to know twice as many of those behind it. The compiler and the transforms of
``torch.func`` get steps, in blocks: about twice the square root of T, for the compiler's own time grows with them.
"""

from typing import Any

import torch
from torch import Tensor
from torch.func import vjp
from torch.nn.functional import pad

from rlloss.fused import cannot_be_saved, in_transform, legacy_batched, watched


def chained(reward: Tensor, bootstrap: Tensor, known: Tensor, chain: Tensor, *, probabilities: bool = False) -> Tensor:
    r"""Values that each consist of a reward, of what is known of the future, and of the next value.

    .. math:: y_i = r_{i+1} + k_i v_{i+1} + c_i y_{i+1}, \quad y_n = v_n

    What weighs 0 adds nothing, not even a NaN. Entries 0 of rewards and bootstraps are never read.

    Args:
        reward: r [..., n + 1], n at least 1.
        bootstrap: v, of the same shape.
        known: k [..., n], the weight of the bootstrap.
        chain: c [..., n], the weight of the next value.
        probabilities: whether the weights are sure to lie in [0, 1], which saves a third of the passes.

    Returns:
        y [..., n].
    """
    operands = reward, bootstrap, known, chain
    if watched(*operands) or cannot_be_saved(operands):
        return _in_blocks(*operands)
    y: Tensor = _Chained.apply(*operands, probabilities)  # type: ignore[no-untyped-call]
    return y


def _in_blocks(reward: Tensor, bootstrap: Tensor, known: Tensor, chain: Tensor) -> Tensor:
    steps = reward[..., 1:] + _weighed(known, bootstrap[..., 1:])
    size = 1
    while size**2 < steps.shape[-1]:  # math.isqrt cannot be compiled for a length that varies
        size = size + 1
    before = -steps.shape[-1] % size
    steps, chain = (torch.unflatten(pad(x, (before, 0)), -1, (-1, size)) for x in (steps, chain))
    # In all blocks at once: values as if nothing came after a block, and what that will weigh in them.
    values, weights = [steps[..., -1]], [chain[..., -1]]
    for i in reversed(range(size - 1)):
        values.append(steps[..., i] + _weighed(chain[..., i], values[-1]))
        weights.append(_weighed(chain[..., i], weights[-1]))
    value, weight = (torch.stack(x[::-1], -1) for x in (values, weights))
    # From block to block, the value that comes after each.
    after = [bootstrap[..., -1]]
    for i in reversed(range(1, value.shape[-2])):
        after.append(value[..., i, 0] + _weighed(weight[..., i, 0], after[-1]))
    return (value + _weighed(weight, torch.stack(after[::-1], -1).unsqueeze(-1))).flatten(-2)[..., before:]


def _weighed(weight: Tensor, x: Tensor) -> Tensor:
    return weight * _finite_where_silent(weight, x)


def _finite_where_silent(weight: Tensor, x: Tensor) -> Tensor:
    """``x``, but for a NaN or infinity that weighs nothing.

    A finite entry stays, so that the derivative by a weight is right at 0 too.
    """
    return torch.where((weight == 0) & ~torch.isfinite(x), 0.0, x)


class _Chained(torch.autograd.Function):
    """``_in_blocks`` for plain autograd."""

    @staticmethod
    def forward(
        ctx: Any, reward: Tensor, bootstrap: Tensor, known: Tensor, chain: Tensor, probabilities: bool
    ) -> Tensor:
        gate = (lambda weight: weight) if probabilities else torch.abs
        y = reward.new_empty(chain.shape)
        torch.addcmul(reward[..., 1:], known, _gated(bootstrap[..., 1:], gate(known)), out=y)
        end, at_end = bootstrap[..., -1], chain[..., -1]
        y[..., -1].addcmul_(at_end, _gated(end, gate(at_end)))
        reach, weight, weights = 1, chain[..., :-1], []
        while reach < y.shape[-1]:
            size = gate(weight)
            y[..., :-reach].addcmul_(weight, _gated(y[..., reach:], size))
            weights.append(weight)
            # A product of weights is gated too: behind an end there may be anything.
            following = weight[..., reach:]
            weight = weight[..., :-reach] * (following if probabilities else _gated(following, size[..., :-reach]))
            reach *= 2
        # A copy of what is saved is put out, for the caller may write into it.
        kept = y.clone() if ctx.needs_input_grad[3] else None
        ctx.save_for_backward(reward, bootstrap, known, chain, kept, *weights)
        return y

    @staticmethod
    def backward(ctx: Any, direction: Tensor) -> Any:
        reward, bootstrap, known, chain, y, *weights = ctx.saved_tensors
        if torch.is_grad_enabled() or in_transform() or legacy_batched(direction):
            return *vjp(_in_blocks, reward, bootstrap, known, chain)[1](direction), None
        # Each round of the forward pass, transposed; they commute.
        of_reward = pad(direction, (1, 0))
        of_y = of_reward[..., 1:]
        for k, weight in enumerate(weights):
            of_y[..., 2**k :].add_(weight * of_y[..., : -(2**k)])
        of_bootstrap = of_known = of_chain = None
        if ctx.needs_input_grad[1]:
            of_bootstrap = pad(known * of_y, (1, 0))
            of_bootstrap[..., -1].addcmul_(chain[..., -1], of_y[..., -1])
        if ctx.needs_input_grad[2]:
            of_known = of_y * _finite_where_silent(known, bootstrap[..., 1:])
        if ctx.needs_input_grad[3]:
            following = torch.cat([y[..., 1:], bootstrap[..., -1:]], -1)
            of_chain = of_y * _finite_where_silent(chain, following)
        return of_reward, of_bootstrap, of_known, of_chain, None


def _gated(x: Tensor, gate: Tensor) -> Tensor:
    """``torch.where(gate > 0, x, 0)``, or x where the gate is NaN.

    Five times as fast on a CPU, where comparing to bool is slow.
    """
    gated: Tensor = torch.ops.aten.threshold_backward(x, gate, 0)
    return gated
