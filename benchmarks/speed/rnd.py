"""RNDLoss beside torchrl's, forward and backward, on the same Nature CNN in the same process.

torchrl runs both networks on the whole batch and masks the errors; here both run on the drawn rows only. The last line
is the limit: the two networks alone on as many rows, without a loss.
"""

import argparse
import importlib.metadata
from collections.abc import Callable

import torch
from tensordict import TensorDict
from torch import nn
from torchrl.objectives import RNDLoss as TorchRLLoss

from benchmarks.speed.harness import compare, machine, table
from rlloss_nn import RNDLoss
from rlloss_nn.networks import RNDConvNetwork


def step(network: nn.Module, loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
    """Forward and backward, gradients into fresh memory as in a training step after `zero_grad()`."""

    def run() -> None:
        network.zero_grad()
        loss().backward()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.rnd", description=__doc__)
    parser.add_argument("--batch", type=int, default=1024, help="observations [B, 4, 84, 84] (default: 1024)")
    parser.add_argument("--fraction", type=float, default=0.25, help="update_fraction (default: 0.25)")
    parser.add_argument("--repetitions", type=int, default=21, help="timed rounds (default: 21)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    options = parser.parse_args()

    torch.manual_seed(0)
    predictor = RNDConvNetwork(predictor=True).to(options.device)
    target = RNDConvNetwork().to(options.device)
    batch = TensorDict({"next": {"observation": torch.randn(options.batch, 4, 84, 84)}}, [options.batch])
    batch = batch.to(options.device)
    ours = RNDLoss(predictor, target, update_fraction=options.fraction)
    theirs = TorchRLLoss(predictor, target, update_fraction=options.fraction)
    rows = batch["next", "observation"][: int(options.fraction * options.batch)].clone()

    def networks_alone() -> torch.Tensor:
        with torch.no_grad():
            target(rows)
        return predictor(rows).sum()

    peer = f"torchrl {importlib.metadata.version('torchrl')}"
    timings = compare(
        {
            peer: step(predictor, lambda: theirs(batch)["loss_predictor"]),
            "rlloss_nn.RNDLoss": step(predictor, lambda: ours(batch)["loss_predictor"]),
            "limit: the networks alone on the drawn rows": step(predictor, networks_alone),
        },
        options.repetitions,
    )
    print(
        f"RND, Nature CNN, B {options.batch}, update_fraction {options.fraction}, forward and backward\n{machine()}\n"
    )
    print(table(timings, against=peer))


if __name__ == "__main__":
    main()
