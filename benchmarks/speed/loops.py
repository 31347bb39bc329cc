"""DreamerV3's recurrent model over T steps, forward and backward: how to compile a loop over time.

A compiler unrolls a loop, which takes it minutes. `rlloss_nn` compiles one step and has an operation run it for all,
and torch has `scan`, here with the same step. torchrl's rollout has both ways too, here compiled by itself and with no
step of a scan unrolled, as it is by default; it draws in each step, the prior's state too, and hands on all it has.
Ours is given its noise, and is one graph with what is around it, the losses of all outputs here.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch._functorch import config as functorch_config
from torch._higher_order_ops import scan

from benchmarks.speed.command import main
from benchmarks.speed.harness import Case
from benchmarks.speed.update import ACTION, AGENTS, Sizes, torchrl_loss
from rlloss_nn.networks.rssm import RSSM, RSSMState

TITLE = "Recurrent model of DreamerV3 over time, forward and backward, float32"
AXIS = "T"
QUICK = "eager"


def cases(quick: bool, device: str) -> Iterator[Case]:
    """The 1M agent's."""
    batch, length = (4, 8) if quick else (16, 64)
    sizes = AGENTS[1e6]
    contenders = {
        "torchrl eager": torchrl(sizes, device),
        "torchrl compiled, step": torchrl(sizes, device, "step"),
        "torchrl compiled, scan": torchrl(sizes, device, "scan"),
        "rlloss_nn eager": ours(sizes, device),
        "rlloss_nn compiled": ours(sizes, device, "step"),
        "rlloss_nn compiled, torch's scan": ours(sizes, device, "scan"),
    }
    yield Case("1M agent", f"B {batch}, T {length}", length, partial(draw, sizes, batch, length, device), contenders)


class Data(NamedTuple):
    """The same sequences, without an end, as each side takes them."""

    tensors: dict[str, Tensor]
    tensordict: TensorDict


def draw(sizes: Sizes, batch: int, length: int, device: str) -> Data:
    data = {
        "tokens": torch.randn(batch, length, sizes.units),
        "action": torch.rand(batch, length, ACTION) * 2 - 1,
        "is_first": torch.zeros(batch, length, dtype=torch.bool),
        "noise": -torch.empty(batch, length, sizes.stoch, sizes.classes).exponential_().log(),  # Gumbel distributed
    }
    data = {name: x.to(device) for name, x in data.items()}
    zeros = {"state": sizes.latent, "belief": sizes.deter}
    given = {
        **{name: torch.zeros(batch, length, size, device=device) for name, size in zeros.items()},
        "action": data["action"],
        "is_init": data["is_first"].unsqueeze(-1),
        "next": {"encoded_latents": data["tokens"]},
    }
    return Data(data, TensorDict(given, (batch, length)))


def backward(network: nn.Module, loss: Callable[[Data], Tensor]) -> Callable[[Data], Tensor]:
    def run(data: Data) -> Tensor:
        # A check of operations at their first call would have our steps compiled twice.
        with functorch_config.patch(check_custom_op_aliasing=False):
            value = loss(data)
            value.backward()
        network.zero_grad()
        return value.detach()

    return run


def squares(*outputs: Tensor) -> Tensor:
    return torch.stack([x.square().mean() for x in outputs]).sum()


class Scan:
    """`rlloss_nn.networks.loop.Loop` for the recurrent model, by torch's `scan`."""

    def __init__(self, rssm: RSSM):
        self.rssm = rssm

    def __call__(
        self, weights: list[Tensor], carry: list[Tensor], inputs: Sequence[Tensor], constants: Sequence[Tensor]
    ) -> list[Tensor]:
        def step(carry: list[Tensor], now: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
            state, logits = self.rssm._observe(RSSMState(*carry), *now, weights[-1])
            return [*state], [x.clone() for x in (*state, logits)]  # no output may be the memory of another

        done: list[Tensor] = scan(step, carry, [*inputs, *constants], dim=1)[1]
        return done


def ours(sizes: Sizes, device: str, compiled: str = "") -> Callable[[Data], Tensor]:
    torch.manual_seed(0)
    rssm = RSSM(ACTION, sizes.units, **{k: v for k, v in sizes._asdict().items() if k != "units"}).to(device)

    def loss(data: Data) -> Tensor:
        done = rssm.observe(**data.tensors)
        return squares(done.deter, done.stoch, done.prior_logits, done.posterior_logits)

    if compiled:
        rssm.compile_steps()
    if compiled == "scan":
        rssm.compiled = Scan(rssm), rssm.compiled[1]
    return backward(rssm, torch.compile(loss, fullgraph=True) if compiled else loss)


def torchrl(sizes: Sizes, device: str, compiled: str = "") -> Callable[[Data], Tensor]:
    torch.manual_seed(0)
    _, rollout = torchrl_loss(sizes, device)
    if compiled:
        rollout.compile_rollout(compiled)

    def loss(data: Data) -> Tensor:
        done = rollout(data.tensordict)["next"]
        return squares(done["belief"], done["state"], done["prior_logits"], done["posterior_logits"])

    return backward(rollout, loss)


if __name__ == "__main__":
    main(suite="loops")
