"""What the words of this library mean to a type checker; no logic."""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from torch import Tensor

#: What is differentiated: ``dict[str, Tensor]`` as ``torch.func.functional_call`` takes it, a TensorDict, or any other
#: pytree of tensors. A loss only hands it on to the apply function.
Params: TypeAlias = Any

#: A mapping (dict or TensorDict) of tensors. For RND: the observations themselves, one tensor or a pytree of them.
Batch: TypeAlias = Any

#: ``(params, inputs) -> outputs``, pure. Passed by keyword, static under ``vmap`` and ``torch.compile``.
ApplyFn: TypeAlias = Callable[[Params, Any], Any]

#: A weight or other real knob: a Python number, or a 0-d tensor where it is itself differentiated or batched over.
Scalar: TypeAlias = float | Tensor

#: Unreduced losses by name, [B, T] each, before weights.
Terms: TypeAlias = Mapping[str, Tensor]
