"""Running statistics as a module: the state of ``rlloss.statistics`` in buffers."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from rlloss import checks, statistics
from rlloss_nn.loss_module import CheckedState


class _Statistics(CheckedState):
    """The tensors of a NamedTuple of ``rlloss.statistics`` as buffers."""

    kind: ClassVar[Callable[..., Any]]
    """The NamedTuple."""

    fixed: ClassVar[tuple[str, ...]] = ()
    """Buffers whose dtype no cast changes."""

    def __init__(self, state: Any) -> None:
        super().__init__()
        for name, value in state._asdict().items():
            self.register_buffer(name, value)

    @property
    def state(self) -> Any:
        """The buffers as the state that the functions of ``rlloss.statistics`` take."""
        return self.kind(**dict(self.named_buffers()))

    def load_state(self, state: Any) -> None:
        """Copy ``state`` into the buffers, which others may hold."""
        function = f"{type(self).__name__}.load_state"
        for name, value in state._asdict().items():
            checks.same_shape(function, f"state.{name}", value, "the buffer", getattr(self, name).shape)
        for name, value in state._asdict().items():
            getattr(self, name).copy_(value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves follow; of casts, no half precision reaches the statistics: there they would stop, or overflow."""
        before = self.state
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before._asdict().items():
            new = getattr(self, name)
            dtype = old.dtype if name in self.fixed else checks.compute_dtype(new)
            if new.dtype != dtype:
                setattr(self, name, old.to(new.device, dtype))
        return self


class ReturnRange(_Statistics):
    r"""Moving averages of a low and a high percentile of the returns, kept in buffers.

    The formula is that of :func:`rlloss.return_range_update`.

    Source: Hafner et al. 2023 (arXiv:2301.04104), section "Actor learning".

    Args:
        dtype: of both.

    Example:
        >>> import torch
        >>> ReturnRange().state
        ReturnRange(low=tensor(0.), high=tensor(0.))
    """

    kind = statistics.ReturnRange
    low: Tensor
    high: Tensor

    def __init__(self, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(statistics.return_range_init(dtype=dtype))


class RunningMeanStd(_Statistics):
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

    kind = statistics.RunningMeanStd
    fixed = ("count",)
    mean: Tensor
    var: Tensor
    count: Tensor

    def __init__(self, shape: Sequence[int] = (), epsilon: float = 1e-4, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(statistics.running_mean_std_init(shape, epsilon=epsilon, dtype=dtype))

    def update(self, x: Tensor) -> None:
        """Take the samples ``x`` [..., *shape] into the statistics."""
        self.load_state(statistics.running_mean_std_update(self.state, x))

    def normalize(self, x: Tensor, clip: float | None = None) -> Tensor:
        """``x`` [..., *shape] in standard deviations from the mean, clipped to [-clip, clip]."""
        return statistics.running_mean_std_normalize(self.state, x, clip)

    def extra_repr(self) -> str:
        """Shown between the parentheses when printed."""
        return f"shape={tuple(self.mean.shape)}"
