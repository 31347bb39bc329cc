"""The bridge: a module as a pure function and its parameters. The one place that calls ``functional_call``."""

from collections.abc import Callable
from typing import Any

from tensordict import TensorDictBase
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from rlloss import checks
from rlloss.types import Params


def functionalize(module: nn.Module, *, method: str = "forward") -> tuple[Callable[..., Any], dict[str, Tensor]]:
    r"""A module as ``apply(params, inputs)`` and the parameters and buffers it now has.

    .. math:: \mathrm{apply}(\mathrm{params}, x) = \mathrm{module}(x)

    Nothing is copied: the dict holds the module's own tensors, so that ``backward`` still fills their ``grad``. To
    ``torch.func`` transforms hand in detached ones, ``{name: p.detach() for name, p in params.items()}``, or autograd
    records the transform's own backward pass, too.

    Source: PyTorch, ``torch.func.functional_call``.

    Args:
        module: any module that writes no buffer in its forward.
        method: name of the method that ``apply`` calls.

    Returns:
        ``(apply, params)``. ``apply`` takes one or several inputs after the parameters, and the parameters as a dict or
        a (nested) TensorDict; each one must be there, and no other.

    Raises:
        ValueError: if the module (or, at a later call, a submodule back in train mode) writes buffers in its forward,
            as BatchNorm does, or still has uninitialised lazy parameters or buffers; if it has no such method.
        KeyError: from ``apply``, if a parameter is missing or one too many.

    Example:
        >>> import torch
        >>> apply, params = functionalize(nn.Linear(2, 1, bias=False))
        >>> apply({"weight": torch.ones(1, 2)}, torch.tensor([1.0, 2.0])), list(params)
        (tensor([3.]), ['weight'])
    """
    if not callable(getattr(module, method, None)):
        wanted = f"the name of a method of {type(module).__name__}"
        raise ValueError(checks.text("functionalize", "method", wanted, repr(method)))
    called = module if method == "forward" else _Method(module, method)
    prefix = "" if called is module else "module."
    writers = [(name, m, writer) for name, m in module.named_modules() for writer in _writers(m)]
    _refuse(module, writers)
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    # Not `is_lazy`, which the compiler cannot trace.
    lazy = [name for name, tensor in own.items() if isinstance(tensor, (UninitializedParameter, UninitializedBuffer))]
    if lazy:
        got = f"uninitialised {lazy}"
        guess = "Call the module once on example data first."
        raise ValueError(checks.text("functionalize", "module", "initialised", got, guess))
    # A tensor that two names share may be given under both.
    tied = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    accepted = {name for name, _ in tied}
    some_tied = len(accepted) > len(own)

    def apply(params: Params, *inputs: Any) -> Any:
        _refuse(module, writers)
        if isinstance(params, TensorDictBase):
            params = dict(params.flatten_keys(".").items())
        missing, unexpected = [name for name in own if name not in params], sorted(set(params) - accepted)
        if missing or unexpected:
            wanted, got = f"all of {type(module).__name__} and no other", f"missing {missing}, unexpected {unexpected}"
            raise checks.MissingKeyError(checks.text("functionalize", "params", wanted, got))
        given = {prefix + name: p for name, p in params.items()} if prefix else params
        # Names are checked above, and to look for tied tensors at each call takes longer than a small network.
        return functional_call(called, given, inputs, tie_weights=some_tied)

    return apply, own


class _Method(nn.Module):
    """A module whose forward is another method: ``functional_call`` knows no other way to one."""

    def __init__(self, module: nn.Module, method: str):
        super().__init__()
        self.module, self.method = module, method

    def forward(self, *inputs: Any) -> Any:
        return getattr(self.module, self.method)(*inputs)


def _writers(module: nn.Module) -> list[str]:
    """What in ``module`` itself writes buffers during its forward, in train mode."""
    spectral = [
        x for x in (module, *module._forward_pre_hooks.values()) if isinstance(x, (_SpectralNorm, SpectralNorm))
    ]
    norm = [module] if isinstance(module, _NormBase) and module.track_running_stats else []
    return [type(x).__name__.lstrip("_") for x in [*norm, *spectral]]


def _refuse(module: nn.Module, writers: list[tuple[str, nn.Module, str]]) -> None:
    for name, part, writer in writers:
        if part.training:
            wanted = "a module whose forward writes no buffer"
            got = f"{type(module).__name__} with a {writer} at {name!r} in train mode"
            guess = "It would change the buffers it is given. Call .eval(), or use LayerNorm, RMSNorm or GroupNorm."
            raise ValueError(checks.text("functionalize", "module", wanted, got, guess))
