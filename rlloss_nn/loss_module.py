"""What the loss modules share: names of tensordict entries, and the way back to the pure function."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, ClassVar, TypeAlias

from tensordict import TensorDictBase, is_tensor_collection
from tensordict.nn import dispatch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from rlloss import checks
from rlloss.types import Params

#: A name in a TensorDict: ``"reward"``, or ``("next", "reward")`` for a nested one.
NestedKey: TypeAlias = str | tuple[str, ...]


def is_key(key: object) -> bool:
    """Whether ``key`` can name an entry of a TensorDict."""
    return isinstance(key, str) or (
        isinstance(key, tuple) and len(key) > 0 and all(isinstance(part, str) for part in key)
    )


def check_network(function: str, argument: str, network: object) -> None:
    """``network`` is a module, not its class nor a function, whose parameters nobody would find."""
    if not isinstance(network, nn.Module):
        guess = f"Did you mean {network.__name__}(...)?" if isinstance(network, type) else ""
        raise TypeError(checks.text(function, argument, "an nn.Module", checks.describe(network), guess))


def check_entries(function: str, keys: list[NestedKey], entries: tuple[Any, ...], named: Mapping[str, Any]) -> None:
    """A call without a TensorDict has tensors, and names that ``keys`` give, each entry once."""
    names = ["_".join([key] if isinstance(key, str) else key) for key in keys]
    if entries and not isinstance(entries[0], Tensor):
        guess = "Did you mean TensorDict(...)?" if isinstance(entries[0], Mapping) else ""
        wanted = f"a TensorDict, or the tensors {names}"
        raise TypeError(checks.text(function, "the first argument", wanted, checks.describe(entries[0]), guess))
    if len(entries) > len(names):
        raise TypeError(checks.text(function, "the arguments", f"at most {names}", f"{len(entries)} tensors"))
    for name in named:
        if name not in names[len(entries) :]:
            wanted, guess = f"one of {names[len(entries) :]}", checks.did_you_mean(name, names)
            raise TypeError(checks.text(function, "each keyword", wanted, repr(name), guess))


def next_key(key: NestedKey) -> NestedKey:
    """The key under "next", where it is not there already."""
    parts = (key,) if isinstance(key, str) else tuple(key)
    return parts if parts[0] == "next" else ("next", *parts)


def one_number(function: str, name: str, x: Tensor, steps: tuple[int, ...]) -> Tensor:
    """[*steps] or [*steps, 1] as [*steps]."""
    if tuple(x.shape) == (*steps, 1):
        return x.squeeze(-1)
    checks.same_shape(function, name, x, "the states", steps)
    return x


def by_name(params: Params) -> dict[str, Tensor]:
    """Parameters as a flat dict, from that or a (nested) TensorDict."""
    return dict(params.flatten_keys(".").items()) if is_tensor_collection(params) else dict(params)


def refuse_other_shapes(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before anything is loaded into ``module``: what has another shape than its own is refused by name.

    torch itself notices while it loads, when the entries before are already overwritten, and takes the first number of
    a vector where a scalar is wanted.
    """
    own = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    for name, tensor in own:
        saved = state_dict.get(f"{prefix}{name}")
        if isinstance(saved, Tensor) and not is_lazy(tensor) and not is_lazy(saved):
            function = f"{type(module).__name__}.load_state_dict"
            checks.same_shape(function, repr(f"{prefix}{name}"), saved, "the module's own", tensor.shape)


def refuse_other_names(module: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Before anything is loaded into ``module``: an entry that is missing, or that it has not, is refused by name."""
    own = module.state_dict().keys()
    missing, unexpected = [name for name in own if name not in state_dict], sorted(set(state_dict) - set(own))
    if missing or unexpected:
        wanted, got = "one with the module's own names", f"missing {missing}, unexpected {unexpected}"
        function = f"{type(module).__name__}.load_state_dict"
        raise checks.MissingKeyError(checks.text(function, "state_dict", wanted, got))


class CheckedState(nn.Module):
    """A module that a state dict is loaded into whole, or not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_pre_hook(refuse_other_shapes)  # type: ignore[no-untyped-call]

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As torch's, but all names and shapes are checked before anything is overwritten.

        Raises:
            KeyError: if ``strict`` and a name is missing or one too many.
            ValueError: if a shape differs.
        """
        if strict:
            refuse_other_names(self, state_dict)
        return super().load_state_dict(state_dict, strict, assign)


def entry(function: str, tensordict: TensorDictBase, key: NestedKey, guess: str = "") -> Any:
    """The entry under ``key``, or a KeyError that says what is there."""
    value = tensordict.get(key, None)
    if value is None:
        there = f"keys {sorted(map(str, tensordict.keys(True, True)))}"
        raise checks.MissingKeyError(checks.text(function, "tensordict", f"one with {key!r}", there, guess))
    return value


class LossModule(CheckedState):
    """A loss that reads a TensorDict: names in ``tensor_keys``, changed by ``set_keys``.

    A loss holds its networks and knobs, names the entries and calls the pure function of ``rlloss``; the mathematics is
    there. ``functional()`` gives that function back with the parameters taken out.

    A state dict that ``load_state_dict`` refuses overwrites nothing. Where the loss is part of another module, whose
    ``load_state_dict`` is called, torch's own rules hold: what is missing is noticed after the rest is loaded.
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

        Raises:
            TypeError: if the first argument is neither a TensorDict nor a tensor, or a keyword names no entry.
        """
        name = type(self).__name__
        if is_tensor_collection(tensordict):
            if entries or named:
                got = f"{len(entries) + len(named)} more"
                raise TypeError(checks.text(name, "a TensorDict", "the only argument", got))
            return self._of_tensordict(tensordict)
        entries = () if tensordict is None else (tensordict, *entries)
        check_entries(name, self.in_keys, entries, named)
        return self._of_entries(*entries, **named)

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
        guess = f"{why} Another name is set by set_keys({name}=...).".strip()
        return entry(type(self).__name__, tensordict, key, guess)
