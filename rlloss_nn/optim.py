"""DreamerV3's optimiser as a ``torch.optim.Optimizer``, and its slow networks: ``rlloss.optim`` on modules."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from rlloss import checks
from rlloss.optim import LaPropState, laprop_init, laprop_update
from rlloss.types import Scalar

#: What is kept for each parameter, beside its number of steps.
AVERAGES = ("square", "momentum")


class LaProp(torch.optim.Optimizer):
    r"""Adaptive gradient clipping, then LaProp, with a linear warm-up.

    The formula is that of :func:`rlloss.laprop_update`. The learning rate of a group, which schedulers may change, is
    the one after the warm-up. Weight decay of some parameters only is a group of its own. Averages are float32 at
    least, whatever the parameters are.

    Source: Ziyin et al. 2020 (arXiv:2002.04839); danijar/dreamerv3@e3f0224 dreamerv3/agent.py ``Agent._make_opt``.

    Args:
        params: parameters, or dicts with ``params`` and knobs of their own.
        lr: learning rate after the warm-up.
        betas: decays of the momentum and of the squared gradient, in [0, 1).
        eps: keeps the quotient finite where gradients vanish.
        weight_decay: share of a parameter that is subtracted, times ``lr``.
        clip: largest gradient as a share of the norm of its parameter; 0 does not clip.
        floor: norm that a parameter counts with at least.
        warmup: updates until the learning rate is whole; the first one changes nothing. 0 for none.
        nesterov: looks one step of the momentum ahead.

    Raises:
        TypeError, ValueError: if a knob is out of range.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = LaProp([weight], lr=0.01, warmup=0)
        >>> weight.sum().backward()
        >>> optimizer.step()
        >>> weight.data
        tensor([0.9900, 0.9900])
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 4e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-20,
        weight_decay: float = 0.0,
        *,
        clip: float = 0.3,
        floor: float = 1e-3,
        warmup: int = 1000,
        nesterov: bool = False,
    ) -> None:
        knobs = {"clip": clip, "floor": floor, "warmup": warmup, "nesterov": nesterov}
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, **knobs})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters with knobs of their own; those left out are the optimiser's."""
        nothing = torch.zeros(1)
        laprop_update(nothing, nothing, laprop_init(nothing), **_knobs({**self.defaults, **param_group}))
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Moves every parameter that has a gradient; returns what ``closure``, run first, returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for (device, _, step), params in self._alike(group["params"]).items():
                self._move(params, torch.full((), step, device=device), _knobs(group))
        return loss

    def _alike(self, params: Iterable[Tensor]) -> dict[tuple[torch.device, torch.dtype, int], list[Tensor]]:
        """Those with a gradient, in lists that one update can move together."""
        alike: dict[tuple[torch.device, torch.dtype, int], list[Tensor]] = {}
        for p in params:
            if p.grad is None:
                continue
            if p.grad.layout != torch.strided:
                raise ValueError(checks.text("LaProp.step", "each gradient", "dense", str(p.grad.layout)))
            if not self.state[p]:
                _, square, momentum = laprop_init(p.detach())
                self.state[p] = {"step": torch.tensor(0), "square": square, "momentum": momentum}
            alike.setdefault((p.device, p.dtype, int(self.state[p]["step"])), []).append(p)
        return alike

    def _move(self, params: list[Tensor], step: Tensor, knobs: Mapping[str, Any]) -> None:
        states = [self.state[p] for p in params]
        state = LaPropState(step, *([s[name] for s in states] for name in AVERAGES))
        new, state = laprop_update(params, [p.grad for p in params], state, **knobs)
        torch._foreach_copy_(params, new)
        for p, old, square, momentum in zip(params, states, state.square, state.momentum, strict=True):
            # New ones, so that a saved state stays as it was. The count is on the CPU, where reading it never waits.
            self.state[p] = {"step": old["step"] + 1, "square": square, "momentum": momentum}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over what :meth:`state_dict` gave; averages of another shape are refused before anything changes."""
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        found = [
            (i, p, state_dict["state"][i]) for i, p in zip(saved, params, strict=False) if i in state_dict["state"]
        ]
        for i, p, state in found:
            for name in AVERAGES:
                average = checks.take("LaProp.load_state_dict", f"state {i}", state, name)
                checks.same_shape("LaProp.load_state_dict", f"state {i} {name!r}", average, "its parameter", p.shape)
        super().load_state_dict(state_dict)
        for _, p, state in found:
            # The base class gives them the dtype of the parameter, which may be narrower.
            self.state[p].update({name: state[name].to(p.device, copy=True) for name in AVERAGES})


class SoftUpdate:
    r"""Moves the slow networks that a loss holds, once for each step of the optimiser.

    .. math:: s' = (1 - \tau) \, s + \tau \, p

    The function is :func:`rlloss.ema_update`. Unlike torchrl's it leaves the slow networks as they are when it is made,
    so that those of a loaded checkpoint survive.

    Source: Hafner et al. 2023 (arXiv:2301.04104), section "Critic learning"; name and arguments as torchrl 0.14.1
    ``SoftUpdate``.

    Args:
        loss_module: a loss with ``update_target``, such as :class:`~rlloss_nn.dreamer_v3_value.DreamerV3ValueLoss`.
        eps: 1 - tau; give one of the two.
        tau: share of the parameters, in [0, 1]; the author's is 0.02.

    Raises:
        TypeError: if the loss has nothing to update.
        ValueError: if not exactly one of ``eps`` and ``tau`` is given, or it is out of range.

    Example:
        >>> from rlloss_nn import DreamerV3ValueLoss
        >>> from tensordict.nn import TensorDictModule
        >>> critic = TensorDictModule(torch.nn.Linear(4, 1), in_keys=["state"], out_keys=["state_value"])
        >>> updater = SoftUpdate(DreamerV3ValueLoss(critic, slow_critic_regularization=1.0), tau=0.02)
        >>> updater.step()
    """

    def __init__(self, loss_module: Any, *, eps: Scalar | None = None, tau: Scalar | None = None) -> None:
        if not callable(getattr(loss_module, "update_target", None)):
            wanted = "a loss with update_target"
            raise TypeError(checks.text("SoftUpdate", "loss_module", wanted, checks.describe(loss_module)))
        if (eps is None) == (tau is None):
            got = "neither" if eps is None else "both"
            raise ValueError(checks.text("SoftUpdate", "one of eps and tau", "given", got))
        for name, value in (("eps", eps), ("tau", tau)):
            if value is not None:
                checks.knob("SoftUpdate", name, value, 0.0, 1.0)
        self.loss_module = loss_module
        self.tau: Scalar = 1 - eps if tau is None else tau  # type: ignore[operator]

    def step(self) -> None:
        """Moves them once."""
        self.loss_module.update_target(self.tau)


def _knobs(group: Mapping[str, Any]) -> dict[str, Any]:
    """The knobs of a group under the names of the pure function."""
    same = {name: group[name] for name in ("eps", "weight_decay", "clip", "floor", "warmup", "nesterov")}
    return {"learning_rate": group["lr"], "beta1": group["betas"][0], "beta2": group["betas"][1], **same}
