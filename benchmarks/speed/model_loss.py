"""The world-model loss of DreamerV3, forward and backward, on given network outputs; and its two hardest terms alone.

Latents 32 x 32, 255 bins. Both sides get the same tensors: torchrl's `DreamerV3ModelLoss` from a world model that hands
on what the TensorDict holds, rlloss the same as a pure function. The limit reads each input once and writes each
gradient. Gradients are dropped after each call. torchrl and the limit then need fresh memory, while rlloss keeps that
of large ones (rlloss/pages.py) and can be faster than the limit, but not than the same copy into memory that is kept.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torchrl import objectives

import rlloss
import rlloss_nn
from benchmarks.speed.command import main
from benchmarks.speed.harness import Case
from rlloss.pages import for_result

TITLE = "World-model loss of DreamerV3, forward and backward, float32"
AXIS = "B x T"
QUICK = ""
SIZES = ((4, 16), (16, 64), (64, 64))
PIXELS, VECTOR, LATENTS, BINS = (3, 64, 64), (24,), (32, 32), 255
OFFICIAL = {name: value for name, value in rlloss.DREAMER_V3_OFFICIAL.items() if name != "reco_transform"}
NAMES = {  # of the world model's outputs: pure -> in a TensorDict
    "prior_logits": "prior_logits",
    "posterior_logits": "posterior_logits",
    "reconstruction": "reco_pixels",
    "reward": "reward_logits",
    "continue_logits": "continue_pred",
}


class Data(NamedTuple):
    """One batch: what the world model returned, what was observed, and both as a TensorDict."""

    outputs: dict[str, Tensor]  # leaves
    batch: dict[str, Tensor]
    tensordict: TensorDict


class Given(nn.Module):
    """A world model whose outputs are there already."""

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        for name in NAMES.values():
            tensordict.set(("next", name), tensordict.get(("outputs", name)))
        return tensordict


def cases(quick: bool, device: str) -> Iterator[Case]:
    """Three observations in all sizes, and the terms."""
    for size in SIZES[:1] if quick else SIZES:
        plain = {"torchrl": {"reco_symlog": False}, "rlloss": {"reco_transform": "none"}}
        yield whole("official, pixels", size, PIXELS, OFFICIAL, plain, device)
        if quick:
            continue
        if size == (16, 64):
            yield whole("official, pixels as bytes", size, PIXELS, OFFICIAL, plain, device, bytes_=True)
        yield whole("default knobs, pixels", size, PIXELS, {}, {}, device)
        both = {"torchrl": {"reco_symlog": True}, "rlloss": {"reco_transform": "symlog"}}
        yield whole("official, vectors", size, VECTOR, OFFICIAL, both, device)
        yield kl_terms(size, device)
        yield two_hot(size, device)


def whole(
    name: str,
    size: tuple[int, int],
    observation: tuple[int, ...],
    knobs: Mapping[str, Any],
    of_side: Mapping[str, Mapping[str, Any]],
    device: str,
    *,
    bytes_: bool = False,
) -> Case:
    """The whole loss: `knobs` for both sides, those that differ in name for each."""
    theirs = objectives.DreamerV3ModelLoss(Given(), **knobs, **of_side.get("torchrl", {})).to(device)
    knobs = {**knobs, **of_side.get("rlloss", {})}
    module = rlloss_nn.DreamerV3ModelLoss(Given(), **knobs).to(device)

    def torchrl(data: Data) -> Tensor:
        tensordict = data.tensordict
        if bytes_:  # it takes floats only
            tensordict = tensordict.copy().set(("next", "pixels"), tensordict["next", "pixels"] / 255)
        losses, _ = theirs(tensordict)
        return sum(loss.sum() for loss in losses.values())

    def pure(data: Data) -> Tensor:
        loss, _ = rlloss.dreamer_v3_model_loss(data.outputs, data.batch, world_model=outputs, **knobs)
        return loss

    def modular(data: Data) -> Tensor:
        losses, _ = module(data.tensordict)
        return sum(losses.values())

    def copy(data: Data, memory: Callable[[Tensor], Tensor]) -> None:
        seen = data.batch["observation"]
        copy_outputs(data, memory, **({} if bytes_ else {"reconstruction": seen}))
        if bytes_:
            seen.view(torch.int64).amax()  # nothing reads bytes faster

    contenders = {
        "torchrl eager": backward(torchrl),
        "torchrl compiled": backward(torch.compile(torchrl)),
        "rlloss eager": backward(pure),
        "rlloss_nn eager": backward(modular),
        "rlloss compiled": backward(torch.compile(pure, fullgraph=True)),
        **limits(copy),
    }
    return case(name, size, lambda: draw(size, observation, device, bytes_=bytes_), contenders)


def kl_terms(size: tuple[int, int], device: str) -> Case:
    """Separate KL terms of mixtures with 1 % of the uniform distribution."""

    def torchrl(data: Data) -> Tensor:
        return sum(objectives.categorical_kl_terms(data.outputs["posterior_logits"], data.outputs["prior_logits"]))

    def pure(data: Data) -> Tensor:
        terms = rlloss.categorical_kl_terms(data.outputs["posterior_logits"], data.outputs["prior_logits"])
        return terms[0].mean() + terms[1].mean()

    shapes = {"prior_logits": LATENTS, "posterior_logits": LATENTS}
    return case("KL terms", size, lambda: Data(leaves(size, shapes, device), {}, TensorDict()), term(torchrl, pure))


def two_hot(size: tuple[int, int], device: str) -> Case:
    """Cross-entropy of the reward's bins."""
    bins = rlloss.symexp_bins(BINS).to(device)

    def torchrl(data: Data) -> Tensor:
        return objectives.two_hot_cross_entropy(data.outputs["reward"], data.batch["reward"], bins).mean()

    def pure(data: Data) -> Tensor:
        return rlloss.two_hot_cross_entropy(data.outputs["reward"], data.batch["reward"], bins).mean()

    def new() -> Data:
        batch = {"reward": 5 * torch.randn(size, device=device)}
        return Data(leaves(size, {"reward": (BINS,)}, device), batch, TensorDict())

    return case("two-hot cross-entropy", size, new, term(torchrl, pure))


def term(
    torchrl: Callable[[Data], Tensor], pure: Callable[[Data], Tensor]
) -> dict[str, Callable[[Data], Tensor | None]]:
    """The contenders of one term."""
    return {
        "torchrl eager": backward(torchrl),
        "torchrl compiled": backward(torch.compile(torchrl)),
        "rlloss eager": backward(pure),
        "rlloss compiled": backward(torch.compile(pure, fullgraph=True)),
        **limits(copy_outputs),
    }


def limits(copy: Callable[[Data, Callable[[Tensor], Tensor]], None]) -> dict[str, Callable[[Data], Tensor | None]]:
    """Into fresh memory, as torchrl writes its gradients, and into memory that is kept, as rlloss does."""
    kept = partial(copy, memory=lambda leaf: for_result(leaf, leaf.shape))
    return {
        "limit: a copy": backward(partial(copy, memory=torch.empty_like)),
        "limit: a copy, memory kept": backward(kept),
    }


def copy_outputs(data: Data, memory: Callable[[Tensor], Tensor], **seen: Tensor) -> None:
    """Read each output, and what is seen of it, and write as much as its gradient."""
    with torch.no_grad():
        for key, leaf in data.outputs.items():
            out = memory(leaf.detach())
            leaf.grad = torch.add(leaf, seen[key], out=out) if key in seen else out.copy_(leaf)


def case(name: str, size: tuple[int, int], new: Callable[[], Data], contenders: Mapping[str, Any]) -> Case:
    batch, length = size
    return Case(name, f"B {batch}, T {length}", batch * length, new, contenders, gradients)


def backward(loss: Callable[[Data], Tensor | None]) -> Callable[[Data], Tensor | None]:
    """Forward and backward; the gradients are dropped."""

    def run(data: Data) -> Tensor | None:
        value = loss(data)
        if value is not None:
            value.backward()
        for leaf in data.outputs.values():
            leaf.grad = None
        return None if value is None else value.detach()

    return run


def gradients(data: Data) -> int:
    """Bytes of all gradients."""
    return sum(leaf.nbytes for leaf in data.outputs.values())


def outputs(params: Any, batch: Any) -> Any:
    """A world model whose parameters are its outputs."""
    return params


def leaves(size: tuple[int, int], shapes: Mapping[str, tuple[int, ...]], device: str) -> dict[str, Tensor]:
    return {name: torch.randn(*size, *shape, device=device, requires_grad=True) for name, shape in shapes.items()}


def draw(size: tuple[int, int], observation: tuple[int, ...], device: str, *, bytes_: bool = False) -> Data:
    """Outputs of a world model that has learnt nothing, and steps of which one in ten is terminal."""
    shapes = {"prior_logits": LATENTS, "posterior_logits": LATENTS, "reconstruction": observation}
    made = leaves(size, shapes | {"reward": (BINS,), "continue_logits": (1,)}, device)
    numbers = torch.rand if len(observation) == 3 else torch.randn
    seen = numbers(*size, *observation, device=device)
    batch = {
        "observation": (255 * seen).to(torch.uint8) if bytes_ else seen,
        "reward": torch.randn(size, device=device),
        "terminated": torch.rand(size, device=device) < 0.1,
    }
    following = {name: batch[name].unsqueeze(-1) for name in ("reward", "terminated")}
    following |= {"pixels": batch["observation"], "done": following["terminated"].clone()}
    given = {NAMES[name]: leaf for name, leaf in made.items()}
    return Data(made, batch, TensorDict({"next": following, "outputs": given}, size))


if __name__ == "__main__":
    main(suite="model_loss")
