"""What holds on a GPU: the same bits, the same losses, no wait for the device. Skipped where there is none."""

from typing import Any

import pytest
import torch
from torch.func import grad_and_value, vmap

import rlloss
from rlloss_nn import functionalize
from rlloss_nn.networks import RNDVectorNetwork, WorldModel

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.filterwarnings("ignore:Synchronization debug mode"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def to(device: str, tree: Any) -> Any:
    return torch.utils._pytree.tree_map(lambda x: x.detach().to(device) if isinstance(x, torch.Tensor) else x, tree)


@pytest.fixture
def no_waiting() -> Any:
    """Raise where the host would wait for the device."""

    def guarded(function: Any, *args: Any) -> Any:
        function(*args)  # the first call may load kernels
        torch.cuda.set_sync_debug_mode("error")
        try:
            return function(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return guarded


@pytest.mark.parametrize("compiled", [False, True])
def test_random_bits_are_those_of_the_cpu(compiled: bool) -> None:
    def draw(key: torch.Tensor) -> tuple[torch.Tensor, ...]:
        r = rlloss.random
        return r.bits(key, (1000,)), r.uniform(key, (1000,)), r.permutation(key, 1000), r.split(key, 5)

    expected = draw(rlloss.random.key(3))
    on_gpu = torch.compile(draw, fullgraph=True) if compiled else draw
    for got, wanted in zip(on_gpu(rlloss.random.key(3, device="cuda")), expected, strict=True):
        assert torch.equal(got.cpu(), wanted)


def rnd_case() -> tuple[Any, tuple[Any, ...]]:
    predictor, params = functionalize(RNDVectorNetwork(6, hidden=32, out_features=16, predictor=True))
    target, target_params = functionalize(RNDVectorNetwork(6, hidden=32, out_features=16))
    stats = rlloss.running_mean_std_update(rlloss.running_mean_std_init((6,)), torch.randn(64, 6))
    rows = rlloss.rnd_key_mask(rlloss.random.key(0), 64)

    def loss(params: Any, target_params: Any, batch: Any, rows: Any, stats: Any) -> Any:
        return rlloss.rnd_loss(params, target_params, batch, rows, predictor=predictor, target=target, obs_stats=stats)

    return grad_and_value(loss), (params, target_params, torch.randn(64, 6), rows, stats)


def model_case() -> tuple[Any, tuple[Any, ...]]:
    sizes = {"deter": 32, "hidden": 16, "stoch": 4, "classes": 4, "units": 16}
    world_model, params = functionalize(WorldModel((5,), 2, **sizes))
    batch = {
        "observation": torch.randn(3, 4, 5),
        "action": torch.randn(3, 4, 2),
        "reward": torch.randn(3, 4),
        "terminated": torch.rand(3, 4) < 0.2,
        "is_first": torch.rand(3, 4) < 0.2,
        "mask": torch.rand(3, 4) < 0.8,
        "noise": rlloss.random.gumbel(rlloss.random.key(0), (3, 4, 4, 4)),
    }

    def loss(params: Any, batch: Any) -> Any:
        return rlloss.dreamer_v3_model_loss(params, batch, world_model=world_model, **rlloss.DREAMER_V3_OFFICIAL)[0]

    return grad_and_value(loss), (params, batch)


@pytest.mark.parametrize("case", [rnd_case, model_case])
def test_losses_and_gradients_are_those_of_the_cpu_without_waiting(case: Any, no_waiting: Any) -> None:
    function, args = case()
    expected = function(*to("cpu", args))
    got = no_waiting(function, *to("cuda", args))
    torch.testing.assert_close(to("cpu", got), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", [rnd_case, model_case])
def test_losses_can_be_captured_in_a_graph(case: Any) -> None:
    function, args = case()
    args = to("cuda", args)
    expected = function(*args)
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function(*args)
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        captured = function(*args)
    graph.replay()
    torch.testing.assert_close(captured, expected, rtol=1e-4, atol=1e-5)


def test_ensemble_without_waiting(no_waiting: Any) -> None:
    function, args = rnd_case()
    args = to("cuda", args)
    stacked = {name: torch.stack([p, 2 * p]) for name, p in args[0].items()}
    _, losses = no_waiting(vmap(function, in_dims=(0, None, None, None, None)), stacked, *args[1:])
    torch.testing.assert_close(losses[0], function(*args)[1], rtol=1e-4, atol=1e-5)
