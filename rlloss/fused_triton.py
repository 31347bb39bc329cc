"""The fused reductions as Triton kernels: one read of each operand, one write of each gradient.

Imported by fused.py when it first meets a CUDA tensor, and only where Triton is installed. Everything is computed in
float32, on contiguous operands (others are copied).
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from rlloss.fused import Divergence, ErrorSum, Reduction, Tensors

CHUNK = 1024  # elements that one program holds at a time


def value(reduction: Reduction, operands: Tensors) -> Tensor:
    """The value of each row, [...]."""
    first, *rest = (x.contiguous() for x in operands)
    lead = first.shape[: first.ndim - reduction.trailing()[0]]
    if isinstance(reduction, ErrorSum):
        out: Tensor = error_value(first.reshape(math.prod(lead), -1), rest[0], *reduction.flags())
        return out.reshape(lead)
    if isinstance(reduction, Divergence):
        each: Tensor = divergence_value(first, rest[0], reduction.mix)
        return each.sum(-1) if reduction.dims == 2 else each
    nats: Tensor = two_hot_value(first, *rest)
    return nats


def slopes(reduction: Reduction, wanted: tuple[int, ...], scales: Tensors, operands: Tensors) -> Tensors:
    """The gradients of the wanted operands, each row times its scale."""
    first, *rest = (x.contiguous() for x in operands)
    if isinstance(reduction, ErrorSum):
        lead = first.shape[: first.ndim - reduction.dims]
        flags, scale = reduction.flags(), scales[0].contiguous()
        slope = error_slope(first.reshape(math.prod(lead), -1), rest[0], scale, *flags)
        return (slope.reshape(first.shape),)
    if isinstance(reduction, Divergence):
        if reduction.dims == 2:
            scales = tuple(scale[..., None].expand(first.shape[:-1]) for scale in scales)
        both = divergence_slopes(first, rest[0], *[scale.contiguous() for scale in scales], reduction.mix)
        return tuple(both[i] for i in wanted)
    return (two_hot_slope(first, *rest, scales[0].contiguous()),)


def _launch(kernel: Any) -> Any:
    # Triton's interpreter, which tests run on a CPU, makes functions that torch cannot wrap.
    return wrap_triton(kernel) if isinstance(kernel, triton.JITFunction) else kernel


@triton_op("rlloss::error_value", mutates_args={})
def error_value(
    prediction: Tensor, target: Tensor, absolute: bool, symlog_prediction: bool, symlog_target: bool
) -> Tensor:
    """Prediction [rows, size], target of as many elements -> [rows]."""
    rows, size = prediction.shape
    out = prediction.new_empty(rows)
    flags = absolute, symlog_prediction, symlog_target, target.dtype == torch.uint8
    _launch(_error_value)[(rows,)](prediction, target, out, size, *flags, CHUNK)
    return out


@triton_op("rlloss::error_slope", mutates_args={})
def error_slope(
    prediction: Tensor, target: Tensor, scale: Tensor, absolute: bool, symlog_prediction: bool, symlog_target: bool
) -> Tensor:
    """As ``error_value``, with scale [rows] -> [rows, size]."""
    rows, size = prediction.shape
    out = torch.empty_like(prediction)
    flags = absolute, symlog_prediction, symlog_target, target.dtype == torch.uint8
    _launch(_error_slope)[(rows, triton.cdiv(size, CHUNK))](prediction, target, scale, out, size, *flags, CHUNK)
    return out


@triton_op("rlloss::divergence_value", mutates_args={})
def divergence_value(posterior: Tensor, prior: Tensor, mix: float) -> Tensor:
    """Logits [..., classes] twice -> [...]."""
    out = posterior.new_empty(posterior.shape[:-1])
    grid, tile = _tiles(posterior)
    _launch(_divergence_value)[grid](posterior, prior, out, out.numel(), posterior.shape[-1], mix, mix > 0, *tile)
    return out


@triton_op("rlloss::divergence_slopes", mutates_args={})
def divergence_slopes(
    posterior: Tensor, prior: Tensor, of_posterior: Tensor, of_prior: Tensor, mix: float
) -> tuple[Tensor, Tensor]:
    """As ``divergence_value``, with scales [...] -> two of [..., classes]."""
    outs = torch.empty_like(posterior), torch.empty_like(prior)
    grid, tile = _tiles(posterior)
    rows, classes = of_posterior.numel(), posterior.shape[-1]
    scales = of_posterior, of_prior
    _launch(_divergence_slopes)[grid](posterior, prior, *scales, *outs, rows, classes, mix, mix > 0, *tile)
    return outs


@triton_op("rlloss::two_hot_value", mutates_args={})
def two_hot_value(logits: Tensor, pair: Tensor, weights: Tensor) -> Tensor:
    """Logits [..., bins], two indices and their weights [..., 2] -> [...]."""
    out, bins = logits.new_empty(logits.shape[:-1]), logits.shape[-1]
    rest = pair, weights, out, bins
    _launch(_two_hot_value)[(out.numel(),)](logits, *rest, triton.next_power_of_2(bins))
    return out


@triton_op("rlloss::two_hot_slope", mutates_args={})
def two_hot_slope(logits: Tensor, pair: Tensor, weights: Tensor, scale: Tensor) -> Tensor:
    """As ``two_hot_value``, with scale [...] -> [..., bins]."""
    out, bins = torch.empty_like(logits), logits.shape[-1]
    rest = pair, weights, scale, out, bins
    _launch(_two_hot_slope)[(scale.numel(),)](logits, *rest, triton.next_power_of_2(bins))
    return out


def _tiles(logits: Tensor) -> tuple[tuple[int], tuple[int, int]]:
    """The grid, and how many categoricals and classes, a power of two each, one program holds."""
    columns = triton.next_power_of_2(logits.shape[-1])
    rows = max(1, 2 * CHUNK // columns)
    return (triton.cdiv(math.prod(logits.shape[:-1]), rows),), (rows, columns)


@triton.jit
def _symlog(x):
    size = tl.abs(x)
    one_more = 1.0 + size
    rounded = one_more - 1.0
    # log(1 + size), corrected for what the addition rounds off.
    log = tl.where(rounded == size, tl.log(one_more), tl.log(one_more) * (size / tl.where(rounded == 0, 1.0, rounded)))
    log = tl.where(rounded == 0, size, log)
    return tl.where(x < 0, -log, log)


@triton.jit
def _load_error(
    predictions, targets, at, inside, symlog_p: tl.constexpr, symlog_t: tl.constexpr, is_bytes: tl.constexpr
):
    prediction = tl.load(predictions + at, inside, other=0.0)
    target = tl.load(targets + at, inside, other=0).to(tl.float32)
    if is_bytes:
        target = target / 255.0
    if symlog_t:
        target = _symlog(target)
    error = (_symlog(prediction) if symlog_p else prediction) - target
    return prediction, error


@triton.jit
def _error_value(
    predictions,
    targets,
    out,
    size,
    absolute: tl.constexpr,
    symlog_p: tl.constexpr,
    symlog_t: tl.constexpr,
    is_bytes: tl.constexpr,
    block: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros([block], tl.float32)
    for start in range(0, size, block):
        column = start + tl.arange(0, block)
        _, error = _load_error(predictions, targets, row * size + column, column < size, symlog_p, symlog_t, is_bytes)
        error = tl.abs(error) if absolute else error * error
        total = total + tl.where(column < size, error, 0.0)
    tl.store(out + row, tl.sum(total, 0))


@triton.jit
def _error_slope(
    predictions,
    targets,
    scales,
    out,
    size,
    absolute: tl.constexpr,
    symlog_p: tl.constexpr,
    symlog_t: tl.constexpr,
    is_bytes: tl.constexpr,
    block: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    at = row * size + column
    prediction, error = _load_error(predictions, targets, at, column < size, symlog_p, symlog_t, is_bytes)
    slope = tl.where(error > 0, 1.0, tl.where(error < 0, -1.0, error)) if absolute else 2.0 * error
    if symlog_p:
        slope = slope / (1.0 + tl.abs(prediction))
    tl.store(out + at, slope * tl.load(scales + row), column < size)


@triton.jit
def _softmax(logits):
    shifted = logits - tl.max(logits, 1)[:, None]
    exponential = tl.exp(shifted)
    total = tl.sum(exponential, 1)[:, None]
    return exponential / total, shifted - tl.log(total)


@triton.jit
def _load_pair(posterior, prior, rows, classes, mix, mixed: tl.constexpr, tile: tl.constexpr, columns: tl.constexpr):
    """Where a tile lies, both softmaxes, both mixtures, and log(p / q)."""
    row = tl.program_id(0).to(tl.int64) * tile + tl.arange(0, tile)
    column = tl.arange(0, columns)
    at = row[:, None] * classes + column[None, :]
    inside = (row < rows)[:, None] & (column < classes)[None, :]
    # Rows beyond the last are zeros, so that their softmax is one; classes beyond the last have probability 0.
    beyond = tl.where((column < classes)[None, :], 0.0, float("-inf"))
    p, log_p = _softmax(tl.load(posterior + at, inside, other=0.0) + beyond)
    q, log_q = _softmax(tl.load(prior + at, inside, other=0.0) + beyond)
    if mixed:
        p_mixed, q_mixed = (1.0 - mix) * p + mix / classes, (1.0 - mix) * q + mix / classes
        log_ratio = tl.where((column < classes)[None, :], tl.log(p_mixed / q_mixed), 0.0)
    else:
        p_mixed, q_mixed = p, q
        log_ratio = tl.where(p == 0, 0.0, log_p - log_q)
    return row, at, inside, p, q, p_mixed, q_mixed, log_ratio


@triton.jit
def _divergence_value(
    posterior,
    prior,
    out,
    rows,
    classes,
    mix,
    mixed: tl.constexpr,
    tile: tl.constexpr,
    columns: tl.constexpr,
):
    row, _, _, _, _, p_mixed, _, log_ratio = _load_pair(posterior, prior, rows, classes, mix, mixed, tile, columns)
    tl.store(out + row, tl.sum(p_mixed * log_ratio, 1), row < rows)


@triton.jit
def _divergence_slopes(
    posterior,
    prior,
    of_posterior,
    of_prior,
    posterior_out,
    prior_out,
    rows,
    classes,
    mix,
    mixed: tl.constexpr,
    tile: tl.constexpr,
    columns: tl.constexpr,
):
    row, at, inside, p, q, p_mixed, q_mixed, log_ratio = _load_pair(
        posterior, prior, rows, classes, mix, mixed, tile, columns
    )
    share = 1.0 - mix
    scale = share * tl.load(of_posterior + row, row < rows, other=0.0)[:, None]
    tl.store(posterior_out + at, scale * p * (log_ratio - tl.sum(p * log_ratio, 1)[:, None]), inside)
    if mixed:
        ratio = tl.where(inside, p_mixed / q_mixed, 0.0)
        slope = q * (tl.sum(q * ratio, 1)[:, None] - ratio)
    else:
        slope = q - p
    tl.store(prior_out + at, share * tl.load(of_prior + row, row < rows, other=0.0)[:, None] * slope, inside)


@triton.jit
def _load_two_hot(logits, pair, weights, bins, columns: tl.constexpr):
    """Softmax and its logarithm [1, columns], and what each bin of the row weighs."""
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, columns)
    values = tl.load(logits + row * bins + column, column < bins, other=float("-inf"))
    p, log_p = _softmax(values[None, :])
    of_first = tl.where(column == tl.load(pair + 2 * row), tl.load(weights + 2 * row), 0.0)
    of_second = tl.where(column == tl.load(pair + 2 * row + 1), tl.load(weights + 2 * row + 1), 0.0)
    return p, log_p, (of_first + of_second)[None, :]


@triton.jit
def _two_hot_value(logits, pair, weights, out, bins, columns: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    _, log_p, weight = _load_two_hot(logits, pair, weights, bins, columns)
    total = tl.sum(tl.where(weight == 0, 0.0, -weight * log_p), 1)
    tl.store(out + row + tl.arange(0, 1), total)


@triton.jit
def _two_hot_slope(logits, pair, weights, scales, out, bins, columns: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, columns)
    p, _, weight = _load_two_hot(logits, pair, weights, bins, columns)
    slope = tl.load(scales + row) * (tl.sum(weight, 1)[:, None] * p - weight)
    tl.store(out + row * bins + column[None, :], slope, (column < bins)[None, :])
