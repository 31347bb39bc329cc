"""What holds on a GPU: the same bits, the same losses, no wait for the device. Skipped where there is none.

Tests that take a device run on the CPU too: a mistake of their own shows everywhere.
"""

from typing import Any

import pytest
import torch
from conftest import take_path
from test_fused import CASES as REDUCTIONS
from torch.func import grad_and_value, vmap

import rlloss
from rlloss import fused
from rlloss_nn import functionalize
from rlloss_nn.networks import Agent, Continuous, Discrete, RNDVectorNetwork, WorldModel

pytestmark = pytest.mark.filterwarnings("ignore:Synchronization debug mode")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, needs_cuda])]


def on_gpu(test: Any) -> Any:
    """A test that says nothing on a CPU."""
    return pytest.mark.cuda(needs_cuda(test))


def to(device: str, tree: Any) -> Any:
    return torch.utils._pytree.tree_map(lambda x: x.detach().to(device) if isinstance(x, torch.Tensor) else x, tree)


@pytest.fixture(params=DEVICES)
def device(request: Any) -> Any:
    return request.param


@pytest.fixture
def no_waiting(device: str) -> Any:
    """Raise where the host would wait for the device."""

    def guarded(function: Any, *args: Any) -> Any:
        if device == "cpu":
            return function(*args)
        function(*args)  # the first call may load kernels
        torch.cuda.set_sync_debug_mode("error")
        try:
            return function(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return guarded


@on_gpu
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


SIZES = {"deter": 16, "hidden": 8, "stoch": 3, "classes": 4, "units": 8, "layers": 1, "num_reward_bins": 7}


def small_agent() -> Agent:
    """Of two actions, with heads that are not zero any more."""
    agent = Agent((5,), {"steer": Continuous(2), "jump": Discrete(3)}, num_value_bins=7, **SIZES)
    with torch.no_grad():
        for p in agent.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return agent


def act_case() -> tuple[Any, tuple[Any, ...]]:
    agent = small_agent()
    act, params = functionalize(agent, method="act")
    is_first = torch.tensor([True, False, False])
    return act, (params, agent.initial(3), torch.randn(3, 5), is_first, agent.noise(3))


def whole_case() -> tuple[Any, tuple[Any, ...]]:
    module = small_agent()
    agent, params = module.functional()
    noise, rollouts = module.noise(2, 3), module.noise(2 * 3, 3)
    batch = {
        "observation": torch.randn(2, 3, 5),
        "action": torch.randn(2, 3, module.action_dim),
        "reward": torch.randn(2, 3),
        "is_first": torch.tensor([[True, False, False], [True, False, True]]),
        "is_last": torch.tensor([[False, False, False], [False, True, False]]),
        "terminated": torch.rand(2, 3) < 0.2,
        "noise": noise["latent"],
    }
    state = rlloss.DreamerV3State({k: 0.9 * x for k, x in params["critic"].items()}, rlloss.return_range_init())
    rollouts = {"policy": rollouts["policy"], "dynamics": rollouts["latent"][:, :2]}

    def loss(params: Any, state: Any, batch: Any, noise: Any) -> Any:
        knobs = {"horizon": 2, "num_reward_bins": 7}
        value, _, after = rlloss.dreamer_v3_loss(params, state, batch, noise, agent=agent, **knobs)
        return value, after.return_range

    return grad_and_value(loss, has_aux=True), (params, state, batch, rollouts)


def optimiser_case() -> tuple[Any, tuple[Any, ...]]:
    params = {"weight": torch.randn(4, 3), "bias": torch.zeros(3), "still": torch.ones(2)}
    grads = {"weight": torch.randn(4, 3), "bias": torch.randn(3), "still": torch.zeros(2)}

    def update(params: Any, grads: Any, state: Any) -> Any:
        for _ in range(3):
            params, state = rlloss.laprop_update(params, grads, state, learning_rate=0.1, warmup=2)
        return params, state

    return update, (params, grads, rlloss.laprop_init(params))


def slow_case() -> tuple[Any, tuple[Any, ...]]:
    return rlloss.ema_update, ({"weight": torch.randn(4, 3)}, {"weight": torch.randn(4, 3)})


def range_case() -> tuple[Any, tuple[Any, ...]]:
    state = rlloss.ReturnRange(torch.tensor(-1.0), torch.tensor(2.0))

    def move(state: Any, returns: Any) -> Any:
        state = rlloss.return_range_update(state, returns)
        return rlloss.return_range_update(state, returns * torch.inf), rlloss.return_range_scale(state)

    return move, (state, torch.randn(7, 9))


CASES = [rnd_case, model_case, act_case, whole_case, optimiser_case, slow_case, range_case]


@pytest.mark.parametrize("case", CASES)
def test_results_and_gradients_are_those_of_the_cpu_without_waiting(case: Any, device: str, no_waiting: Any) -> None:
    function, args = case()
    expected = function(*to("cpu", args))
    got = no_waiting(function, *to(device, args))
    torch.testing.assert_close(to("cpu", got), expected, rtol=1e-4, atol=1e-5)


@on_gpu
@pytest.mark.parametrize("case", CASES)
def test_everything_can_be_captured_in_a_graph(case: Any) -> None:
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


@on_gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_whole_update_as_one_graph(compiled: bool, dtype: str) -> None:
    for needed in ("gymnasium", "matplotlib", "tensorboard", "tqdm", "tyro"):
        pytest.importorskip(needed, reason='the extra "learning" is not installed')
    from benchmarks.learning.dreamer_v3 import Config
    from benchmarks.learning.updates import capture, make_learner, make_update

    _, (_, _, batch, noise) = whole_case()
    sizes = {**SIZES, "num_reward_bins": 255}
    agent = Agent((5,), {"steer": Continuous(2), "jump": Discrete(3)}, **sizes).cuda()
    batch, noise = to("cuda", (batch, noise))
    batch["state"] = agent.initial(2).state
    update = make_update(agent, Config(horizon=2, warmup=0, compile=compiled, dtype=dtype))
    learner = own = make_learner(agent)
    replay = capture(update, learner, batch, noise)
    for _ in range(3):
        learner, wanted = update(learner, batch, noise)
        own, metrics = replay(own, batch, noise)
        torch.testing.assert_close(metrics["losses"], wanted["losses"], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(own.params, learner.params, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", REDUCTIONS)
def test_fused_reductions_are_those_of_the_cpu_without_waiting(
    name: str, device: str, no_waiting: Any, monkeypatch: Any
) -> None:
    take_path(monkeypatch, "fused")
    reduction, operands = REDUCTIONS[name]
    args = tuple(x.float() if x.is_floating_point() else x for x in operands())

    def gradients(*args: Any) -> Any:
        leaves = tuple(x.detach().requires_grad_() for x in args[: reduction.live])
        values = fused.reduce(reduction, *leaves, *args[reduction.live :])
        return values, torch.autograd.grad(sum((k + 1) * v.sum() for k, v in enumerate(values)), leaves)

    assert fused.has_fast_path(reduction, to(device, args)) == (device == "cpu" or fused.has_triton())
    got = to("cpu", no_waiting(gradients, *to(device, args)))
    torch.testing.assert_close(got, gradients(*args), rtol=1e-4, atol=1e-5)


def test_ensemble_without_waiting(device: str, no_waiting: Any) -> None:
    function, args = rnd_case()
    args = to(device, args)
    stacked = {name: torch.stack([p, 2 * p]) for name, p in args[0].items()}
    _, losses = no_waiting(vmap(function, in_dims=(0, None, None, None, None)), stacked, *args[1:])
    torch.testing.assert_close(losses[0], function(*args)[1], rtol=1e-4, atol=1e-5)
