"""Running statistics as a module: the state of ``rlloss.statistics`` in buffers."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from rlloss import checks, statistics


class RunningMeanStd(nn.Module):
    r"""Mean and population variance of everything seen so far, kept in buffers.

    The formula, and what becomes of empty and non-finite batches, is that of
    :func:`rlloss.running_mean_std_update`.

    Source: Burda et al. 2018 (arXiv:1810.12894), section 2.4; openai/random-network-distillation@f75c0f1 mpi_util.py
    ``RunningMeanStd``.

    Args:
        shape: of one sample.
        epsilon: weight of the prior (mean 0, variance 1), in samples.
        dtype: of mean and variance; the count is float64.

    Example:
        >>> rms = RunningMeanStd(shape=(4,))
        >>> rms.update(torch.randn(32, 4))
        >>> rms.normalize(torch.randn(8, 4)).shape
        torch.Size([8, 4])
    """

    mean: Tensor
    var: Tensor
    count: Tensor

    def __init__(self, shape: Sequence[int] = (), epsilon: float = 1e-4, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        for name, value in statistics.running_mean_std_init(shape, epsilon=epsilon, dtype=dtype)._asdict().items():
            self.register_buffer(name, value)

    @property
    def state(self) -> statistics.RunningMeanStd:
        """The buffers as the state that the functions of ``rlloss.statistics`` take."""
        return statistics.RunningMeanStd(self.mean, self.var, self.count)

    def update(self, x: Tensor) -> None:
        """Take the samples ``x`` [..., *shape] into the statistics."""
        self.load_state(statistics.running_mean_std_update(self.state, x))

    def normalize(self, x: Tensor, clip: float | None = None) -> Tensor:
        """``x`` [..., *shape] in standard deviations from the mean, clipped to [-clip, clip]."""
        return statistics.running_mean_std_normalize(self.state, x, clip)

    def load_state(self, state: statistics.RunningMeanStd) -> None:
        """Copy ``state`` into the buffers, which others may hold."""
        for name, value in state._asdict().items():
            checks.same_shape(
                "RunningMeanStd.load_state", f"state.{name}", value, "the buffer", getattr(self, name).shape
            )
        self.mean.copy_(state.mean)
        self.var.copy_(state.var)
        self.count.copy_(state.count)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RunningMeanStd":
        """Moves follow; of casts, no half precision reaches the statistics: there they would stop, or overflow."""
        before = self.state
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before._asdict().items():
            new = getattr(self, name)
            dtype = old.dtype if name == "count" else checks.compute_dtype(new)
            if new.dtype != dtype:
                setattr(self, name, old.to(new.device, dtype))
        return self

    def extra_repr(self) -> str:
        """Shown between the parentheses when printed."""
        return f"shape={tuple(self.mean.shape)}"
