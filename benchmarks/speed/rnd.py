"""RNDLoss beside torchrl's, forward and backward, on the same networks.

torchrl runs both networks on the whole batch and masks the errors; here both run on the drawn rows only. The limit is
the two networks alone on as many rows, without a loss, eager and compiled. With the target's features reused, those
that the reward of the same batch needed anyway, only the predictor runs, and the limit can be beaten.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torchrl.objectives import RNDLoss as TorchRLLoss

from benchmarks.speed.command import main
from benchmarks.speed.harness import Case
from rlloss_nn import RNDLoss
from rlloss_nn.networks import RNDConvNetwork, RNDVectorNetwork

TITLE = "RND, update_fraction 0.25, forward and backward"
AXIS = "B"
QUICK = "eager,limit: the networks"
FRACTION, IMAGE, FEATURES = 0.25, (4, 84, 84), 64
SECONDS = 120  # loss and limit are a few percent apart, and calls of each as much


class Data(NamedTuple):
    tensordict: TensorDict
    rows: Tensor  # as many observations as are drawn


class Networks(NamedTuple):
    predictor: nn.Module
    target: nn.Module


def cases(quick: bool, device: str) -> Iterator[Case]:
    """The network for images in three forms, and the one for vectors in two sizes."""
    for batch in (1024,) if quick else (1024, 8192):
        yield case("MLP of 64", batch, networks(RNDVectorNetwork, FEATURES, 64, 64, device=device), (FEATURES,), device)
    if quick:
        return
    for name, last, half in (
        ("Nature CNN", False, False),
        ("Nature CNN, channels_last", True, False),
        ("Nature CNN, channels_last, bf16", True, True),
    ):
        memory_format = torch.channels_last if last else torch.contiguous_format
        made = networks(RNDConvNetwork, IMAGE, device=device, memory_format=memory_format)
        yield case(name, 1024, made, IMAGE, device, memory_format, half)


def networks(
    kind: Callable[..., nn.Module],
    *sizes: Any,
    device: str,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Networks:
    predictor, target = kind(*sizes, predictor=True), kind(*sizes)
    return Networks(*(network.to(device, memory_format=memory_format) for network in (predictor, target)))


def case(
    name: str,
    batch: int,
    made: Networks,
    observation: tuple[int, ...],
    device: str,
    memory_format: torch.memory_format = torch.contiguous_format,
    half: bool = False,
) -> Case:
    """Both losses on the same networks; with `half` their layers run in bf16."""
    ours, theirs = (kind(*made, update_fraction=FRACTION) for kind in (RNDLoss, TorchRLLoss))
    reusing = RNDLoss(*made, update_fraction=FRACTION, target_features_key="target_features")

    def autocast() -> contextlib.AbstractContextManager[object]:
        return torch.autocast(device, torch.bfloat16) if half else contextlib.nullcontext()

    def of(loss: nn.Module) -> Callable[[Data], Tensor]:
        def run(data: Data) -> Tensor:
            with autocast():
                return loss(data.tensordict)["loss_predictor"]

        return run

    def alone(data: Data) -> Tensor:
        with autocast():
            with torch.no_grad():
                goal = made.target(data.rows)
            return made.predictor(data.rows).sum() + goal.sum()  # or a compiler would leave the target out

    def backward(loss: Callable[[Data], Tensor]) -> Callable[[Data], Tensor]:
        def run(data: Data) -> Tensor:
            value = loss(data)
            value.backward()
            made.predictor.zero_grad()
            return value.detach()

        return run

    def draw() -> Data:
        seen = torch.randn(batch, *observation, device=device).contiguous(memory_format=memory_format)
        rows = seen[: int(FRACTION * batch)].clone()
        with torch.no_grad(), autocast():
            features = made.target(seen)
        return Data(TensorDict({"next": {"observation": seen}, "target_features": features}, [batch]), rows)

    contenders = {
        "torchrl eager": backward(of(theirs)),
        "torchrl compiled": backward(torch.compile(of(theirs))),
        "rlloss_nn eager": backward(of(ours)),
        "rlloss_nn compiled": backward(torch.compile(of(ours))),
        "rlloss_nn eager, target features reused": backward(of(reusing)),
        "limit: the networks alone": backward(alone),
        "limit: compiled networks alone": backward(torch.compile(alone)),
    }
    size = sum(p.nbytes for p in made.predictor.parameters())
    return Case(name, f"B {batch}", batch, draw, contenders, lambda data: size, SECONDS)


if __name__ == "__main__":
    main(suite="rnd")
