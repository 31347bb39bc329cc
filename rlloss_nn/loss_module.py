"""What the loss modules share: names of tensordict entries, and the way back to the pure function."""

from dataclasses import fields
from typing import Any, ClassVar, TypeAlias

from tensordict import TensorDictBase, is_tensor_collection
from tensordict.nn import dispatch
from torch import nn

from rlloss import checks

#: A name in a TensorDict: ``"reward"``, or ``("next", "reward")`` for a nested one.
NestedKey: TypeAlias = str | tuple[str, ...]


def is_key(key: object) -> bool:
    """Whether ``key`` can name an entry of a TensorDict."""
    return isinstance(key, str) or (
        isinstance(key, tuple) and len(key) > 0 and all(isinstance(part, str) for part in key)
    )


class LossModule(nn.Module):
    """A loss that reads a TensorDict: names in ``tensor_keys``, changed by ``set_keys``.

    A loss holds its networks and knobs, names the entries and calls the pure function of ``rlloss``; the mathematics is
    there. ``functional()`` gives that function back with the parameters taken out.
    """

    default_keys: ClassVar[type[Any]]
    """A dataclass with one field for each entry that can be renamed."""

    out_keys: list[str]
    """Names of the losses, for keyword calls."""

    def __init__(self) -> None:
        super().__init__()
        self.tensor_keys = self.default_keys()
        self._in_keys: list[NestedKey] | None = None

    @property
    def in_keys(self) -> list[NestedKey]:
        """Entries that are read, in the order of positional calls; assign a list to replace it."""
        return self._read_keys() if self._in_keys is None else self._in_keys

    @in_keys.setter
    def in_keys(self, keys: list[NestedKey]) -> None:
        self._in_keys = keys

    def forward(self, tensordict: Any = None, *entries: Any, **named: Any) -> Any:
        """The losses of a TensorDict, or of its entries in the order of ``in_keys`` or as keywords, joined by ``_``.

        Entries give the loss itself, or the tuple of losses in the order of ``out_keys``.
        """
        if is_tensor_collection(tensordict):
            return self._of_tensordict(tensordict, *entries, **named)
        return self._of_entries(*(() if tensordict is None else (tensordict, *entries)), **named)

    def set_keys(self, **keys: NestedKey | list[NestedKey] | None) -> None:
        """Rename entries; None restores the default.

        Args:
            **keys: name in ``tensor_keys`` -> key of the TensorDict.

        Raises:
            ValueError: if a name is not one of ``tensor_keys``, listing those.
            TypeError: if a key is neither a string, nor a tuple of strings, nor a list of such keys.
        """
        accepted = [field.name for field in fields(self.tensor_keys)]
        function = f"{type(self).__name__}.set_keys"
        for name, key in keys.items():
            if name not in accepted:
                guess = checks.did_you_mean(name, accepted)
                raise ValueError(checks.text(function, "each name", f"one of {accepted}", repr(name), guess))
            if key is not None and not all(map(is_key, key if isinstance(key, list) else [key])):
                raise TypeError(checks.text(function, name, "a string or a tuple of strings", checks.describe(key)))
        for name, key in keys.items():
            setattr(self.tensor_keys, name, getattr(self.default_keys(), name) if key is None else key)

    def functional(self) -> tuple[Any, ...]:
        """The pure loss function of this module's configuration, and the parameters it takes."""
        raise NotImplementedError

    def reset_parameters_recursive(self) -> None:
        """Draw new parameters in every submodule that knows how to."""
        for module in self.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()

    def _of_tensordict(self, tensordict: TensorDictBase) -> Any:
        raise NotImplementedError

    @dispatch(auto_batch_size=False)  # type: ignore[untyped-decorator]
    def _of_entries(self, tensordict: TensorDictBase) -> TensorDictBase:
        losses: TensorDictBase = self._of_tensordict(tensordict)
        return losses

    def _read_keys(self) -> list[NestedKey]:
        raise NotImplementedError

    def _get(self, tensordict: TensorDictBase, name: str, key: NestedKey, why: str = "") -> Any:
        """The entry under ``key``, or a KeyError that says what is there and how to rename it."""
        value = tensordict.get(key, None)
        if value is None:
            there = sorted(map(str, tensordict.keys(True, True)))
            guess = f"{why} Another name is set by set_keys({name}=...).".strip()
            function = type(self).__name__
            raise KeyError(checks.text(function, "tensordict", f"one with {key!r}", f"keys {there}", guess))
        return value
