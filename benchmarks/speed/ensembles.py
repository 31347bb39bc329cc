"""An ensemble of RND predictors, forward and backward: a Python loop over modules, or one `vmap(grad_and_value)`.

Each member has parameters of its own, and rows of its own: a quarter of the B observations. The target network is one
for all. The loop is what has to be written where a loss is a module, as torchrl's are.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import grad_and_value, vmap

import rlloss
from benchmarks.speed.command import main
from benchmarks.speed.harness import Case, Row
from rlloss_nn import functionalize
from rlloss_nn.networks import RNDVectorNetwork

TITLE = "Ensembles of RND predictors, five layers of 64, forward and backward, float32"
AXIS = "N, members"
QUICK = "Python,eager"
FEATURES, FRACTION = 64, 0.25
LOOP, EAGER, COMPILED = "Python loop", "vmap eager", "vmap compiled"


class Data(NamedTuple):
    observations: Tensor  # [B, FEATURES]
    rows: Tensor  # [N, FRACTION * B]


def cases(quick: bool, device: str) -> Iterator[Case]:
    """A few and many members, small and large batches."""
    for batch in (256,) if quick else (256, 1024):
        for members in (5,) if quick else (1, 5, 10, 50):
            yield case(members, batch, device)


def case(members: int, batch: int, device: str) -> Case:
    """All three ways, with equal parameters."""
    modules = [network(device, predictor=True) for _ in range(members)]
    goal = network(device).requires_grad_(False)
    pairs = [functionalize(module) for module in modules]
    predictor, (target, target_params) = pairs[0][0], functionalize(goal)
    params = {name: torch.stack([p[name].detach() for _, p in pairs]) for name in pairs[0][1]}

    def loss(params: dict[str, Tensor], target_params: dict[str, Tensor], observations: Tensor, rows: Tensor) -> Tensor:
        return rlloss.rnd_loss(params, target_params, observations, rows, predictor=predictor, target=target)

    ensemble = vmap(grad_and_value(loss), in_dims=(0, None, None, 0))
    compiled = torch.compile(ensemble, fullgraph=True)

    def together(function: Callable[..., tuple[object, Tensor]]) -> Callable[[Data], Tensor]:
        return lambda data: function(params, target_params, data.observations, data.rows)[1]

    def loop(data: Data) -> Tensor:
        losses = []
        for module, rows in zip(modules, data.rows, strict=True):
            observations = data.observations.index_select(0, rows)
            value = (module(observations) - goal(observations)).square().mean()
            value.backward()
            losses.append(value.detach())
        for module in modules:
            module.zero_grad()
        return torch.stack(losses)

    def draw() -> Data:
        count = int(FRACTION * batch)
        rows = torch.stack([torch.randperm(batch, device=device)[:count] for _ in range(members)])
        return Data(torch.randn(batch, FEATURES, device=device), rows)

    size = sum(p.nbytes for p in params.values())
    contenders = {LOOP: loop, EAGER: together(ensemble), COMPILED: together(compiled)}
    return Case(f"B {batch}", f"N {members}", members, draw, contenders, lambda data: size)


def network(device: str, *, predictor: bool = False) -> nn.Module:
    return RNDVectorNetwork(FEATURES, hidden=64, out_features=64, predictor=predictor).to(device)


def remarks(rows: Sequence[Row]) -> list[str]:
    """From how many members on a vmap is faster than the loop, beyond the quartiles of both, and stays so."""
    lines = []
    for batch in dict.fromkeys(row.case for row in rows):
        chosen = {(row.contender, row.scale): row for row in rows if row.case == batch}
        sizes = sorted({members for _, members in chosen})
        for contender in (EAGER, COMPILED):
            if {(name, members) for name in (LOOP, contender) for members in sizes} - set(chosen):
                continue
            pairs = [(chosen[LOOP, members], chosen[contender, members]) for members in sizes]
            slower = [loop.scale for loop, row in pairs if not row.third_quartile_ms < loop.first_quartile_ms]
            wins = [members for members in sizes if members > max(slower, default=0)]
            since = f"wins from N = {wins[0]} on" if wins else f"does not win up to N = {sizes[-1]}"
            lines.append(f"- {batch}: {contender} {since}.")
    return ["\n".join(lines)]


if __name__ == "__main__":
    main(suite="ensembles")
