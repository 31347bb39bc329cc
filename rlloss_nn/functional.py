"""The bridge: a module as a pure function and its parameters. The one place that calls ``functional_call``."""

from typing import Any

from tensordict import TensorDictBase
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from rlloss import checks
from rlloss.types import ApplyFn, Params


def functionalize(module: nn.Module) -> tuple[ApplyFn, dict[str, Tensor]]:
    r"""A module as ``apply(params, inputs)`` and the parameters and buffers it now has.

    .. math:: \mathrm{apply}(\mathrm{params}, x) = \mathrm{module}(x)

    Nothing is copied: the dict holds the module's own tensors, so that ``backward`` still fills their ``grad``. To
    ``torch.func`` transforms hand in detached ones, ``{name: p.detach() for name, p in params.items()}``, or autograd
    records the transform's own backward pass, too.

    Source: PyTorch, ``torch.func.functional_call``.

    Args:
        module: any module that writes no buffer in its forward.

    Returns:
        ``(apply, params)``. ``apply`` takes one or several inputs after the parameters, and the parameters as a dict or
        a (nested) TensorDict; each one must be there, and no other.

    Raises:
        ValueError: if the module (or, at a later call, a submodule back in train mode) writes buffers in its forward,
            as BatchNorm does, or still has uninitialised lazy parameters or buffers.
        KeyError: from ``apply``, if a parameter is missing or one too many.

    Example:
        >>> import torch
        >>> apply, params = functionalize(nn.Linear(2, 1, bias=False))
        >>> apply({"weight": torch.ones(1, 2)}, torch.tensor([1.0, 2.0])), list(params)
        (tensor([3.]), ['weight'])
    """
    writers = [(name, m, writer) for name, m in module.named_modules() for writer in _writers(m)]
    _refuse(module, writers)
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    lazy = [name for name, tensor in own.items() if is_lazy(tensor)]
    if lazy:
        got = f"uninitialised {lazy}"
        guess = "Call the module once on example data first."
        raise ValueError(checks.text("functionalize", "module", "initialised", got, guess))
    # A tensor that two names share may be given under both.
    tied = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    accepted = {name for name, _ in tied}

    def apply(params: Params, *inputs: Any) -> Any:
        _refuse(module, writers)
        if isinstance(params, TensorDictBase):
            params = dict(params.flatten_keys(".").items())
        missing, unexpected = [name for name in own if name not in params], sorted(set(params) - accepted)
        if missing or unexpected:
            wanted, got = f"all of {type(module).__name__} and no other", f"missing {missing}, unexpected {unexpected}"
            raise KeyError(checks.text("functionalize", "params", wanted, got))
        return functional_call(module, params, inputs, strict=True)

    return apply, own


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
