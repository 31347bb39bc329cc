"""The update of all networks as one pure function: eager, compiled, and with CUDA as one graph of kernels.

Compiled (`compile`), the loss is one graph with forward and backward (`fullgraph`). In it the time loops of the world
model and of imagination are operations that run a step compiled once, see `rlloss_nn.networks.loop`: unrolled, their
64 and 15 steps would be compiled one by one. The optimiser stays as it is: its operations are on all parameters at once
already, and a compiler would take them apart. The update can be one graph with it, where
`torch._dynamo.config.trace_autograd_ops` is set (`torch.compile(update, fullgraph=True)`), but that took the 1M agent
200 s to compile in place of 72, and was no faster.

Captured (`captured`), the launches of the whole update, compiled or not, optimiser included, are recorded once and
replayed as one. Nothing in it waits for the device or asks for a value, and all shapes stay the same.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch._functorch import config as functorch_config
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

import rlloss
from rlloss_nn.networks import Agent

if TYPE_CHECKING:
    from benchmarks.learning.dreamer_v3 import Config


class Learner(NamedTuple):
    """All that an update changes."""

    params: dict[str, dict[str, Tensor]]
    loss: rlloss.DreamerV3State
    optimizer: rlloss.LaPropState


#: ``(learner, batch, noise) -> (learner, metrics)``.
Update = Callable[[Learner, Any, Any], tuple[Learner, dict[str, Any]]]


def make_learner(agent: Agent) -> Learner:
    params = tree_map(lambda p: p.detach().clone(), agent.functional()[1])
    slow_critic = tree_map(torch.clone, params["critic"])
    like = next(iter(slow_critic.values()))
    state = rlloss.DreamerV3State(slow_critic, rlloss.return_range_init(device=like.device))
    return Learner(params, state, rlloss.laprop_init(params))


def make_update(agent: Agent, config: "Config") -> Update:
    """One step of training as a function: equal arguments, equal results, and nothing is changed."""
    autocast = torch.bfloat16 if config.dtype == "bfloat16" else None
    functions, _ = agent.functional(step_backend="inductor" if config.compile else None, autocast=autocast)

    def loss(params: Any, state: Any, batch: Any, noise: Any) -> Any:
        return rlloss.dreamer_v3_loss(
            params, state, batch, noise, agent=functions, horizon=config.horizon, starts=config.starts,
            replay_discount=config.discount, entropy=config.entropy, continue_target_scale=config.discount,
            lambda_reco=config.reco,
        )  # fmt: skip

    loss = torch.compile(loss, fullgraph=True) if config.compile else loss

    def update(learner: Learner, batch: dict[str, Any], noise: dict[str, Any]) -> tuple[Learner, dict[str, Any]]:
        leaves, spec = tree_flatten(learner.params)
        leaves = [p.detach().requires_grad_() for p in leaves]
        # A check of operations at their first call makes them, and the steps in them, seem others than later.
        unchecked = functorch_config.patch(check_custom_op_aliasing=False) if config.compile else nullcontext()
        with unchecked:
            total, aux, state = loss(tree_unflatten(leaves, spec), learner.loss, batch, noise)
            grads = tree_unflatten(torch.autograd.grad(total, leaves), spec)
        with torch.no_grad():
            params, optimizer = rlloss.laprop_update(
                learner.params, grads, learner.optimizer, learning_rate=config.learning_rate, warmup=config.warmup
            )
            slow = rlloss.ema_update(state.slow_critic, params["critic"])
        metrics = {"losses": {**aux["losses"], "entropy": aux["entropy"].mean()}, "latents": aux["outputs"]["state"]}
        return Learner(params, state._replace(slow_critic=slow), optimizer), metrics

    return update


class Graph(Protocol):
    """What :func:`capture` needs of a graph."""

    def record(self, function: Callable[[], Any]) -> Any:
        """The outputs of a function: tensors that each replay fills anew."""

    def replay(self) -> None:
        """All that was recorded, once more."""


class CudaGraph:
    """A `torch.cuda.CUDAGraph`, recorded after warm-up calls that compile, load kernels and allocate workspaces."""

    def __init__(self, warmup: int = 3):
        self.graph, self.warmup = torch.cuda.CUDAGraph(), warmup

    def record(self, function: Callable[[], Any]) -> Any:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(self.warmup):
                function()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(self.graph):
            return function()

    def replay(self) -> None:
        self.graph.replay()


def capture(
    update: Update, learner: Learner, batch: Any, noise: Any, *, graph: Callable[[], Graph] = CudaGraph
) -> Update:
    """`update` recorded in a graph, for arguments of these shapes; it is not run before its first call.

    What it returns are always the same tensors: the next call overwrites them. Give back the learner it returned, and
    nothing is copied but batch and noise; another learner, as of a checkpoint, is copied in.
    """
    static = tree_map(torch.clone, (learner, batch, noise))
    kept = tree_leaves(static[0])
    recording = graph()

    def step() -> dict[str, Any]:
        after, metrics = update(*static)
        torch._foreach_copy_(kept, tree_leaves(after))
        return metrics

    metrics = recording.record(step)

    def replay(learner: Learner, batch: Any, noise: Any) -> tuple[Learner, dict[str, Any]]:
        fill(static[1:], (batch, noise))
        if learner is not static[0]:
            fill(static[0], learner)
        recording.replay()
        return static[0], metrics

    return replay


def captured(update: Update, *, graph: Callable[[], Graph] = CudaGraph) -> Update:
    """`update`, captured with the arguments of its first call."""
    replay: Update | None = None

    def run(learner: Learner, batch: Any, noise: Any) -> tuple[Learner, dict[str, Any]]:
        nonlocal replay
        replay = replay or capture(update, learner, batch, noise, graph=graph)
        return replay(learner, batch, noise)

    return run


def fill(static: Any, new: Any) -> None:
    """Copies a tree of tensors into another of the same shapes."""
    for old, x in zip(tree_leaves(static), tree_leaves(new), strict=True):
        if old.shape != x.shape:
            raise ValueError(f"a captured update takes the shapes it was captured with: {old.shape}, got {x.shape}.")
        old.copy_(x)
