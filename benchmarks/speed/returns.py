"""lambda_return beside torchrl's vectorised TD(lambda) estimator, forward and with the gradient by rewards and values.

Both have sequences [B, T] in the layout of their own: torchrl [B, T, 1], rlloss with one step more, which came before
the first return. The limit reads the inputs once and writes returns and gradients.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torchrl.objectives.value.functional import vec_td_lambda_return_estimate

import rlloss
from benchmarks.speed.command import main
from benchmarks.speed.harness import Case

TITLE = "lambda_return, discount 0.997, lambda 0.95, float32"
AXIS = "T"
QUICK = "eager,limit"
DISCOUNT, LMBDA, BATCH = 0.997, 0.95, 1024


class Sequences(NamedTuple):
    """In one layout; rewards and values are leaves where a gradient is wanted."""

    reward: Tensor
    value: Tensor
    terminated: Tensor
    direction: Tensor  # the gradient that comes from behind


class Data(NamedTuple):
    torchrl: Sequences
    rlloss: Sequences


def cases(quick: bool, device: str) -> Iterator[Case]:
    """Forward alone, with backward, and with episodes that end."""
    for length in (16,) if quick else (16, 64):
        yield case("forward and backward", length, device, grad=True)
        if not quick:
            yield case("forward and backward, episodes end", length, device, grad=True, ends=0.02)
            yield case("forward", length, device, grad=False)


def case(name: str, length: int, device: str, *, grad: bool, ends: float = 0.0) -> Case:
    """All contenders on one kind of data."""
    contenders = {
        "torchrl eager": on("torchrl", torchrl),
        "torchrl compiled": on("torchrl", torch.compile(torchrl)),
        "rlloss eager": on("rlloss", ours),
        "rlloss compiled": on("rlloss", torch.compile(ours, fullgraph=True)),
        "limit: a copy": lambda data: copy(data.torchrl),
    }

    def results(data: Data) -> int:
        return data.torchrl.reward.nbytes * (3 if grad else 1)

    size = f"B {BATCH}, T {length}"
    return Case(name, size, length, lambda: draw(length, device, grad, ends), contenders, results)


def on(side: str, estimate: Callable[[Sequences], Tensor]) -> Callable[[Data], Tensor]:
    """An estimate of the sequences in the layout of one side."""
    return lambda data: run(estimate, getattr(data, side))


def torchrl(x: Sequences) -> Tensor:
    return vec_td_lambda_return_estimate(DISCOUNT, LMBDA, x.value, x.reward, x.terminated, x.terminated)


def ours(x: Sequences) -> Tensor:
    return rlloss.lambda_return(x.reward, x.value, ~x.terminated, x.terminated, discount=DISCOUNT, lmbda=LMBDA)


def run(estimate: Callable[[Sequences], Tensor], x: Sequences) -> Tensor:
    """The returns, and the gradients where they are wanted, into fresh memory."""
    returns = estimate(x)
    if returns.requires_grad:
        returns.backward(x.direction)
        x.reward.grad = x.value.grad = None
    return returns.detach()


def copy(x: Sequences) -> None:
    """Every input read, every result written."""
    results = [x.reward.detach() + x.value.detach()]
    if x.reward.requires_grad:
        results += [x.direction.clone(), x.direction.clone()]


def draw(length: int, device: str, grad: bool, ends: float) -> Data:
    """Normal rewards and values."""
    reward, value, direction = torch.randn(3, BATCH, length, 1, device=device)
    terminated = torch.rand(BATCH, length, 1, device=device) < ends

    def leaf(x: Tensor) -> Tensor:
        return x.clone().requires_grad_(grad)

    def later(x: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(x[:, :1]), x], 1).squeeze(-1)

    return Data(
        Sequences(leaf(reward), leaf(value), terminated, direction.clone()),
        Sequences(leaf(later(reward)), leaf(later(value)), later(terminated), direction.squeeze(-1).clone()),
    )


if __name__ == "__main__":
    main(suite="returns")
