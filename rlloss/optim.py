r"""DreamerV3's optimiser as functions of states: gradient clipping, then LaProp; and the slow copy of a critic.

LaProp normalises the gradient before it is averaged, Adam after; a momentum of normalised gradients cannot be blown
up by one large step.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import keystr, tree_flatten, tree_flatten_with_path, tree_map, tree_structure, tree_unflatten

from rlloss import checks
from rlloss.types import Params, Scalar

#: The smallest divisor: smaller ones are not normal numbers in float32.
TINY = torch.finfo(torch.float32).tiny

#: ``(operation, tensors, operand) -> tensors``: one operation on each tensor of a list.
_Each: TypeAlias = Callable[..., list[Tensor]]


class LaPropState(NamedTuple):
    """Moving averages of what the gradients were."""

    step: Tensor  # [], int64: updates made
    square: Params  # like params, float32 at least: of the squared gradient
    momentum: Params  # like params, float32 at least: of the normalised gradient


def laprop_init(params: Params) -> LaPropState:
    """The state before the first update: zeros, in float32 at least.

    Source: danijar/dreamerv3@e3f0224 embodied/jax/opt.py ``scale_by_rms``, ``scale_by_momentum``.

    Args:
        params: any pytree of floating-point tensors.

    Returns:
        The state.

    Raises:
        TypeError: if a leaf is not a floating-point tensor.
        ValueError: if there is no leaf.

    Example:
        >>> laprop_init({"weight": torch.ones(2)}).momentum
        {'weight': tensor([0., 0.])}
    """
    leaves = _leaves("laprop_init", "params", params)
    square, momentum = (tree_map(lambda p: torch.zeros_like(p, dtype=checks.compute_dtype(p)), params) for _ in "12")
    return LaPropState(torch.zeros((), dtype=torch.int64, device=leaves[0].device), square, momentum)


def laprop_update(
    params: Params,
    grads: Params,
    state: LaPropState,
    *,
    learning_rate: Scalar = 4e-5,
    clip: Scalar = 0.3,
    floor: Scalar = 1e-3,
    beta1: Scalar = 0.9,
    beta2: Scalar = 0.999,
    eps: Scalar = 1e-20,
    warmup: int = 1000,
    nesterov: bool = False,
    weight_decay: Scalar | Params = 0.0,
) -> tuple[Params, LaPropState]:
    r"""One step of the optimiser of DreamerV3: clipped, normalised, averaged, scaled.

    .. math:: g_t &= \mathrm{adaptive\_clip}(p_{t-1}, \nabla) \\
              v_t &= \beta_2 v_{t-1} + (1 - \beta_2) g_t^2, \quad
              u_t = g_t \, / \, \left(\sqrt{v_t / (1 - \beta_2^t)} + \epsilon\right) \\
              m_t &= \beta_1 m_{t-1} + (1 - \beta_1) u_t \\
              p_t &= p_{t-1} - \eta \min(1, \tfrac{t - 1}{n})
                     \left(m_t / (1 - \beta_1^t) + w \, p_{t-1}\right)

    The first update with a warm-up changes no parameter. A gradient of zero makes an update of zero. A NaN in a
    gradient makes the whole parameter NaN, through the norm, and no other parameter.

    Differentiable in every tensor argument and knob. Nothing is detached: run it under ``torch.no_grad()``, or with
    detached tensors, unless it is itself to be differentiated.

    Source: Ziyin et al. 2020 (arXiv:2002.04839), algorithm 1; danijar/dreamerv3@e3f0224 dreamerv3/agent.py
    ``Agent._make_opt`` (schedule "const").

    Args:
        params: any pytree of floating-point tensors on one device; computed in float32 at least.
        grads: the same structure and shapes.
        state: from :func:`laprop_init` or an earlier update.
        learning_rate: eta, after the warm-up.
        clip: largest gradient as a share of the norm of what it changes; see :func:`adaptive_clip`.
        floor: norm that a parameter counts with at least.
        beta1: decay of the momentum, in [0, 1).
        beta2: decay of the squared gradient, in [0, 1).
        eps: keeps the quotient finite where gradients vanish.
        warmup: n, updates until the learning rate is whole; 0 for none.
        nesterov: looks one step of the momentum ahead.
        weight_decay: w, for all parameters, or a pytree like ``params`` with one for each.

    Returns:
        ``(params, state)``, with the dtypes of the old.

    Raises:
        TypeError: if a leaf is not a floating-point tensor, or ``state`` not a :class:`LaPropState`.
        ValueError: if structures or shapes differ, or a knob is out of range.

    Example:
        >>> params = {"weight": torch.ones(2)}
        >>> state = laprop_init(params)
        >>> grads = {"weight": torch.tensor([0.1, -0.2])}
        >>> params, state = laprop_update(params, grads, state, learning_rate=0.01, warmup=0)
        >>> params, state.step
        ({'weight': tensor([0.9900, 1.0100])}, tensor(1))
    """
    _check_knobs(learning_rate, beta1, beta2, eps, nesterov)
    _check_clip("laprop_update", clip, floor)
    _check_steps("laprop_update", "warmup", warmup)
    if not isinstance(state, LaPropState):
        raise TypeError(checks.text("laprop_update", "state", "a LaPropState", checks.describe(state)))
    old, spec = _leaves("laprop_update", "params", params), tree_structure(params)
    g = _like("laprop_update", "grads", grads, "params", params)
    square = _like("laprop_update", "state.square", state.square, "params", params)
    momentum = _like("laprop_update", "state.momentum", state.momentum, "params", params)
    one = _one(old)
    step, beta1, beta2 = state.step.to(one.dtype), _scalar(one, beta1), _scalar(one, beta2)
    decays = _decays(weight_decay, params, one)
    knobs = [learning_rate, clip, floor, beta1, beta2, eps, *(decays or [])]
    p = [x.to(checks.compute_dtype(x)) for x in old]
    each = _fastest([*p, *g, *square, *momentum], knobs)
    g = _clip(each, p, g, clip, floor)
    square = _average(each, square, each("mul", g, g), beta2)
    root = each("sqrt", each("div", square, _seen(beta2, step + 1)))
    u = each("div", g, each("add", root, _scalar(one, eps)))
    momentum = _average(each, momentum, u, beta1)
    ahead = _average(each, momentum, u, beta1) if nesterov else momentum
    update = each("div", ahead, _seen(beta1, step + 1))
    update = each("add", update, each("mul", p, decays)) if decays is not None else update
    rate = _scalar(one, learning_rate) * linear_warmup(step, steps=warmup)
    new = [x.to(y.dtype) for x, y in zip(each("sub", p, each("mul", update, rate)), old, strict=True)]
    state = LaPropState(state.step + 1, tree_unflatten(square, spec), tree_unflatten(momentum, spec))
    return tree_unflatten(new, spec), state


def adaptive_clip(params: Params, grads: Params, *, clip: Scalar = 0.3, floor: Scalar = 1e-3) -> Params:
    r"""Gradients no larger than a share of what they change, tensor by tensor.

    .. math:: g \, / \, \max\left(1, \frac{\|g\|}{c \, \max(f, \|p\|)}\right)

    Source: Brock et al. 2021 (arXiv:2102.06171), eq. 3; danijar/dreamerv3@e3f0224 embodied/jax/opt.py ``clip_by_agc``
    (whole tensors, not their rows).

    Args:
        params: pytree of floating-point tensors; computed in float32 at least.
        grads: the same structure and shapes.
        clip: c, share of the parameter's norm; the number 0 does not clip, a tensor of 0 leaves nothing.
        floor: f, norm that a parameter counts with at least, so that zero-initialised ones can move.

    Returns:
        Like ``grads``, in float32 at least.

    Raises:
        TypeError: if a leaf is not a floating-point tensor.
        ValueError: if the structures or shapes differ, ``clip`` is negative or ``floor`` not positive.

    Example:
        >>> adaptive_clip({"weight": torch.ones(4)}, {"weight": torch.full((4,), 3.0)})
        {'weight': tensor([0.3000, 0.3000, 0.3000, 0.3000])}
    """
    _check_clip("adaptive_clip", clip, floor)
    p, g = _leaves("adaptive_clip", "params", params), _like("adaptive_clip", "grads", grads, "params", params)
    p = [x.to(checks.compute_dtype(x)) for x in p]
    each = _fastest([*p, *g], [clip, floor])
    return tree_unflatten(_clip(each, p, g, clip, floor), tree_structure(params))


def linear_warmup(step: Tensor, *, steps: int = 1000) -> Tensor:
    r"""Factor of the learning rate of the update after ``step`` others: 0 for the first.

    .. math:: \min(1, t / n)

    Source: danijar/dreamerv3@e3f0224 dreamerv3/agent.py ``Agent._make_opt``.

    Args:
        step: [...], updates made so far.
        steps: n, length of the ramp; 0 for none.

    Returns:
        [...], float32 at least, in [0, 1].

    Raises:
        TypeError: if ``step`` is not a tensor of numbers, or ``steps`` not an int.
        ValueError: if ``steps`` is negative.

    Example:
        >>> linear_warmup(torch.tensor(250))
        tensor(0.2500)
    """
    step = checks.real("linear_warmup", "step", step)
    _check_steps("linear_warmup", "steps", steps)
    return (step / steps).clamp(max=1) if steps else torch.ones_like(step)


def ema_update(slow_params: Params, params: Params, *, rate: Scalar = 0.02) -> Params:
    r"""Parameters that follow others slowly: an exponential moving average, as of the slow critic.

    .. math:: s' = (1 - r) \, s + r \, p

    It starts as a copy of the parameters and moves after each step of the optimiser. Nothing is detached: run it under
    ``torch.no_grad()``, or with detached parameters, unless it is itself to be differentiated.

    Source: Hafner et al. 2023 (arXiv:2301.04104), section "Critic learning"; danijar/dreamerv3@e3f0224
    embodied/jax/utils.py ``SlowModel.update``.

    Args:
        slow_params: any pytree of floating-point tensors; computed in float32 at least.
        params: the same structure and shapes.
        rate: r, in [0, 1]: 1 copies.

    Returns:
        Like ``slow_params``.

    Raises:
        TypeError: if a leaf is not a floating-point tensor.
        ValueError: if structures or shapes differ, or ``rate`` is outside [0, 1].

    Example:
        >>> ema_update({"weight": torch.zeros(2)}, {"weight": torch.ones(2)})
        {'weight': tensor([0.0200, 0.0200])}
    """
    checks.knob("ema_update", "rate", rate, 0.0, 1.0)
    old = _leaves("ema_update", "slow_params", slow_params)
    new = _like("ema_update", "params", params, "slow_params", slow_params)
    wide = [x.to(checks.compute_dtype(x)) for x in old]
    each = _fastest([*wide, *new], [rate])
    moved = _average(each, wide, new, 1 - _scalar(_one(old), rate))
    return tree_unflatten([x.to(y.dtype) for x, y in zip(moved, old, strict=True)], tree_structure(slow_params))


def _clip(each: _Each, params: list[Tensor], grads: list[Tensor], clip: Scalar, floor: Scalar) -> list[Tensor]:
    if not isinstance(clip, Tensor) and clip == 0:
        return grads
    size, change = torch.stack(each("norm", params)), torch.stack(each("norm", grads))
    upper = _scalar(size, clip) * torch.maximum(size, checks.scalar_like(size, floor))
    # Where nothing may change and nothing does: not 0 / 0.
    upper = torch.where((upper == 0) & (change == 0), 1.0, upper)
    factor = 1 / (change / upper).clamp(min=1)
    return each("mul", grads, list(factor.unbind()))


def _average(each: _Each, old: list[Tensor], new: list[Tensor], decay: Scalar) -> list[Tensor]:
    return each("add", each("mul", old, decay), each("mul", new, 1 - decay))


def _seen(decay: Scalar, steps: Tensor) -> Tensor:
    """``1 - decay ** steps``: what the weights of a moving average add up to that started at 0."""
    # Through 1 - decay: in float32 a decay of 0.999 would cost the first updates three of their digits.
    return -torch.expm1(steps * torch.log1p(-checks.scalar_like(steps, 1 - decay)))


def _fastest(tensors: list[Tensor], knobs: Iterable[object]) -> _Each:
    """All tensors in one call of ``torch._foreach`` where it works, one by one elsewhere.

    A compiler fuses the single operations better, transforms have no rules for the others, and a derivative needs the
    root that has one at 0.
    """
    kinds = {(type(x), x.dtype, x.device) for x in tensors}
    plain = {(kind, tensors[0].dtype, tensors[0].device) for kind in (Tensor, torch.nn.Parameter)}
    if not kinds <= plain or torch.compiler.is_compiling() or forward_ad._current_level >= 0:
        return _one_by_one
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return _one_by_one
    tracked = any(isinstance(x, Tensor) and x.requires_grad for x in [*tensors, *knobs])
    return _one_by_one if tracked and torch.is_grad_enabled() else _together


def _together(operation: str, xs: list[Tensor], *ys: Any) -> list[Tensor]:
    return list(getattr(torch, f"_foreach_{operation}")(xs, *ys))


def _one_by_one(operation: str, xs: list[Tensor], *ys: Any) -> list[Tensor]:
    if operation == "sqrt":
        return [_root(x) for x in xs]
    if operation == "norm":
        return [_root(x.square().sum()) for x in xs]
    y = ys[0]
    each = y if isinstance(y, list) else [y] * len(xs)
    function = getattr(torch, operation)
    # Cast: two tensors without dimensions would otherwise take the wider dtype of the two.
    return [function(x, y.to(x.dtype) if isinstance(y, Tensor) else y) for x, y in zip(xs, each, strict=True)]


def _root(x: Tensor) -> Tensor:
    """The square root, with a derivative of 0 at 0 instead of an infinite one, which 0 would make a NaN."""
    positive = x != 0
    return torch.where(positive, torch.where(positive, x, 1.0).sqrt(), 0.0)


def _scalar(one: Tensor, knob: Scalar) -> Scalar:
    """A knob fit to meet tensors like ``one``; a number stays, for it has digits that float32 has not."""
    return checks.scalar_like(one, knob) if isinstance(knob, Tensor) else knob


def _one(tensors: list[Tensor]) -> Tensor:
    """A scalar of the dtype that all of ``tensors`` are computed in."""
    return tensors[0].new_ones((), dtype=checks.compute_dtype(*tensors))


def _decays(weight_decay: Scalar | Params, params: Params, one: Tensor) -> list[Any] | None:
    """The weight decay of each leaf; None where there is none."""
    if isinstance(weight_decay, (int, float, Tensor)):
        checks.knob("laprop_update", "weight_decay", weight_decay, 0.0)
        number = len(tree_flatten(params)[0])
        return [_scalar(one, weight_decay)] * number if isinstance(weight_decay, Tensor) or weight_decay else None
    decays = _same_structure("laprop_update", "weight_decay", weight_decay, "params", params)
    for i, decay in enumerate(decays):
        checks.knob("laprop_update", _name("weight_decay", weight_decay, i), decay, 0.0)
    some_tensor = any(isinstance(decay, Tensor) for decay in decays)
    return [checks.scalar_like(one, decay) for decay in decays] if some_tensor else decays


def _check_knobs(learning_rate: Scalar, beta1: Scalar, beta2: Scalar, eps: Scalar, nesterov: bool) -> None:
    checks.knob("laprop_update", "learning_rate", learning_rate, 0.0)
    for argument, beta in (("beta1", beta1), ("beta2", beta2)):
        checks.knob("laprop_update", argument, beta, 0.0, 1.0)
        if not isinstance(beta, Tensor) and beta == 1:
            raise ValueError(checks.text("laprop_update", argument, "less than 1", repr(beta)))
    checks.knob("laprop_update", "eps", eps, TINY)
    if not isinstance(nesterov, bool):
        raise TypeError(checks.text("laprop_update", "nesterov", "True or False", checks.describe(nesterov)))


def _check_steps(function: str, argument: str, steps: int) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int):
        raise TypeError(checks.text(function, argument, "an int", checks.describe(steps)))
    checks.within(function, argument, steps, 0)


def _check_clip(function: str, clip: Scalar, floor: Scalar) -> None:
    checks.knob(function, "clip", clip, 0.0)
    checks.knob(function, "floor", floor, TINY)


def _leaves(function: str, argument: str, tree: Params) -> list[Tensor]:
    leaves = tree_flatten(tree)[0]
    if not leaves:
        raise ValueError(checks.text(function, argument, "a pytree of at least one tensor", checks.describe(tree)))
    return [_floating(function, argument, tree, i, x) for i, x in enumerate(leaves)]


def _like(function: str, argument: str, tree: Params, other: str, params: Params) -> list[Tensor]:
    """The leaves of ``tree`` in the order of those of ``params``, in float32 at least."""
    leaves = _same_structure(function, argument, tree, other, params)
    for i, (x, p) in enumerate(zip(leaves, tree_flatten(params)[0], strict=True)):
        if _floating(function, argument, params, i, x).shape != p.shape:
            checks.same_shape(function, _name(argument, params, i), x, _name(other, params, i), p.shape)
    return [x.to(checks.compute_dtype(x)) for x in leaves]


def _floating(function: str, argument: str, tree: Params, i: int, x: object) -> Tensor:
    if isinstance(x, Tensor) and x.is_floating_point():
        return x
    return checks.floating(function, _name(argument, tree, i), x)


def _same_structure(function: str, argument: str, tree: Params, other: str, params: Params) -> list[Any]:
    try:
        leaves = tree_structure(params).flatten_up_to(tree)
    except ValueError as error:
        raise ValueError(_difference(function, argument, tree, other, params)) from error
    return leaves


def _difference(function: str, argument: str, tree: Params, other: str, params: Params) -> str:
    got, wanted = ([keystr(path) for path, _ in tree_flatten_with_path(x)[0]] for x in (tree, params))
    missing, unexpected = [p for p in wanted if p not in got], [p for p in got if p not in wanted]
    what = f"missing {missing}, unexpected {unexpected}" if missing or unexpected else "another type or order of keys"
    return checks.text(function, argument, f"of the structure of {other}", f"{type(tree).__name__} with {what}")


def _name(argument: str, tree: Params, i: int) -> str:
    return argument + keystr(tree_flatten_with_path(tree)[0][i][0])
