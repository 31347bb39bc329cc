r"""Returns of sequences: what a step was worth, by what followed and by what a critic expects."""

import torch
from torch import Tensor

from rlloss import checks
from rlloss.recurrence import chained
from rlloss.types import Scalar


def lambda_return(
    reward: Tensor,
    bootstrap: Tensor,
    continuation: Tensor,
    last: Tensor | None = None,
    *,
    discount: Scalar,
    lmbda: Scalar = 0.95,
) -> Tensor:
    r"""Exponentially weighted mean of all n-step returns, computed backwards in time.

    .. math:: R_t = r_{t+1} + \gamma c_{t+1} \left((1 - \lambda_{t+1}) v_{t+1} + \lambda_{t+1} R_{t+1}\right), \quad
              R_{T-1} = v_{T-1}, \quad \lambda_t = \lambda (1 - \mathrm{last}_t)

    A step that terminates an episode (continuation 0) has no future: nothing follows its reward, not even a NaN. A step
    that is merely the last one recorded bootstraps, and does not chain to the next, which belongs to another episode.
    Entries at index 0 are never read: they came before the first return. Gradients flow into every argument; whoever
    wants constant targets detaches them.

    Source: Hafner et al. 2023 (arXiv:2301.04104), eq. 7; danijar/dreamerv3@e3f0224 dreamerv3/agent.py
    ``lambda_return``.

    Args:
        reward: [..., T], any numeric dtype; computed in float32 at least.
        bootstrap: [..., T], the critic's values.
        continuation: [..., T], 1 where the episode goes on and 0 where the step is terminal: bool, or a probability.
        last: bool [..., T], where a recorded sequence ends or is cut; None: nowhere.
        discount: gamma.
        lmbda: 0 looks one step ahead, 1 to the end.

    Returns:
        [..., T - 1]: returns of steps 0 to T - 2; empty for T = 1.

    Raises:
        TypeError: if a dtype is wrong.
        ValueError: if shapes differ, T is 0, or ``discount`` or ``lmbda`` is outside [0, 1].

    Example:
        >>> lambda_return(torch.tensor([9.0, 1.0, 2.0]), torch.zeros(3), torch.ones(3), discount=0.5, lmbda=1.0)
        tensor([2., 2.])
    """
    given = continuation
    reward, bootstrap, continuation = _sequences(reward, bootstrap, continuation)
    checks.knob("lambda_return", "discount", discount, 0.0, 1.0)
    checks.knob("lambda_return", "lmbda", lmbda, 0.0, 1.0)
    if last is not None:
        last = checks.boolean("lambda_return", "last", last)
        checks.same_shape("lambda_return", "last", last, "reward", reward.shape)
    if reward.shape[-1] == 1:
        return reward[..., 1:]
    ahead = checks.scalar_like(reward, discount) * continuation[..., 1:]
    chain = checks.scalar_like(reward, lmbda) * ahead
    if last is not None:
        chain = torch.where(last[..., 1:], 0.0, chain)
    # The value of a tensor is not looked at, for that would wait for the device.
    sure = given.dtype == torch.bool and not isinstance(discount, Tensor) and not isinstance(lmbda, Tensor)
    return chained(reward, bootstrap, ahead - chain, chain, probabilities=sure)


def _sequences(reward: Tensor, bootstrap: Tensor, continuation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All three in one dtype, of one shape [..., T]."""
    reward = checks.real("lambda_return", "reward", reward)
    checks.rank_at_least("lambda_return", "reward", reward, ("T",))
    if reward.shape[-1] == 0:
        raise ValueError(checks.text("lambda_return", "reward", "of at least one step", checks.describe(reward)))
    bootstrap = checks.real("lambda_return", "bootstrap", bootstrap)
    continuation = checks.tensor("lambda_return", "continuation", continuation)
    if continuation.dtype == torch.bool:
        continuation = continuation.to(reward.dtype)
    continuation = checks.real("lambda_return", "continuation", continuation)
    for argument, x in (("bootstrap", bootstrap), ("continuation", continuation)):
        checks.same_shape("lambda_return", argument, x, "reward", reward.shape)
    dtype = checks.compute_dtype(reward, bootstrap, continuation)
    return reward.to(dtype), bootstrap.to(dtype), continuation.to(dtype)
