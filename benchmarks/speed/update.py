"""One whole update of DreamerV3's 1M agent beside torchrl's: forward, backward, optimiser, slow critic.

    python -m benchmarks.speed.update
    python -m benchmarks.speed.update --device cuda
    python -m benchmarks.speed.update --quick --only eager,step

B 16, T 64, horizon 15, vectors of 24 numbers, 6 continuous actions; both sides with the author's sizes, scales and
optimiser (LaProp after adaptive clipping; torchrl's is its `DreamerV3Optimizer`). Ours is the update of
`benchmarks.learning.dreamer_v3`. torchrl's is its `DreamerV3Loss` of its own networks in its
`DreamerV3OptimizationStepper`, compiled as that class does it: loss and backward in one `torch.compile`, with a scan
over time; and with one compiled step of its rollout (`compile_rollout("step")`) and all else eager. The table goes to
benchmarks/speed/results, but with --quick, which has smaller shapes, it is only printed.
"""

import argparse
import csv
import datetime
import importlib.metadata
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tensordict import TensorDict
from tensordict.nn import (
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    TensorDictSequential,
)
from torch import Tensor, nn
from torchrl import modules, objectives
from torchrl.data import Bounded, Composite, Unbounded
from torchrl.envs.model_based import DreamerEnv
from torchrl.trainers.algorithms import DreamerV3OptimizationStepper, DreamerV3Optimizer

from benchmarks.learning.dreamer_v3 import Config, make_learner, make_update
from benchmarks.speed.harness import compare, machine, peak_memory
from rlloss_nn.networks import Agent, Continuous, RSSMState

RESULTS = Path(__file__).parent / "results"
OBSERVATION, ACTION, BINS = 24, 6, 255
SIZES = {"deter": 512, "hidden": 64, "stoch": 32, "classes": 4, "units": 64}
LATENT = SIZES["stoch"] * SIZES["classes"]


class Shape(NamedTuple):
    batch: int
    length: int
    horizon: int


# ------------------------------------------------------------------------------------------------ ours


def ours(shape: Shape, device: str, *, compiled: bool) -> Callable[[], object]:
    """The update of the learning benchmark; its result is dropped, so that every call does the same work."""
    torch.manual_seed(0)
    agent = Agent((OBSERVATION,), Continuous(ACTION), **SIZES).to(device)
    config = Config(batch=shape.batch, length=shape.length, horizon=shape.horizon, compile=compiled)
    learner, update = make_learner(agent), make_update(agent, config)
    noise, rollouts = agent.noise(*shape[:2]), agent.noise(shape.batch * shape.length, shape.horizon + 1)
    steps = draw(shape, device)
    batch = {
        **steps,
        "state": RSSMState(*agent.initial(shape.batch).state),
        "is_last": torch.zeros_like(steps["terminated"]),
        "noise": noise["latent"],
    }
    imagined = {"policy": rollouts["policy"], "dynamics": rollouts["latent"][:, :-1]}
    return lambda: update(learner, batch, imagined)


def draw(shape: Shape, device: str) -> dict[str, Tensor]:
    """Replayed sequences, an episode's beginning in the middle of the first."""
    steps = shape[:2]
    first = torch.zeros(steps, dtype=torch.bool)
    first[0, shape.length // 2] = True
    data = {
        "observation": torch.randn(*steps, OBSERVATION),
        "action": torch.rand(*steps, ACTION) * 2 - 1,
        "reward": torch.randn(steps),
        "is_first": first,
        "terminated": torch.zeros(steps, dtype=torch.bool),
    }
    return {name: x.to(device) for name, x in data.items()}


# ------------------------------------------------------------------------------------------------ torchrl


class TorchRLActor(nn.Module):
    """The author's bounded normal: mean and deviation."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = modules.DreamerV3MLP(SIZES["deter"] + LATENT, 2 * ACTION, 3, SIZES["units"], outscale=0.01)

    def forward(self, state: Tensor, belief: Tensor) -> tuple[Tensor, Tensor]:
        mean, deviation = self.mlp(state, belief).chunk(2, -1)
        return torch.tanh(mean), 0.9 * torch.sigmoid(deviation + 2) + 0.1


def torchrl_loss(device: str) -> tuple[objectives.DreamerV3Loss, modules.RSSMRolloutV3]:
    """Its whole objective on its own networks, wired as in its documentation."""
    features, following = ["state", "belief"], [("next", "state"), ("next", "belief")]
    seen = [("next", "belief"), ("next", "encoded_latents")]

    def head(outputs: int, depth: int, outscale: float = 1.0) -> nn.Module:
        return modules.DreamerV3MLP(SIZES["deter"] + LATENT, outputs, depth, SIZES["units"], outscale=outscale)

    def module(network: Any, inputs: list[Any], *outputs: Any) -> TensorDictModule:
        return TensorDictModule(network, in_keys=inputs, out_keys=list(outputs))

    sizes = {"hidden_dim": SIZES["hidden"], "rnn_hidden_dim": SIZES["deter"]}
    sizes |= {"num_categoricals": SIZES["stoch"], "num_classes": SIZES["classes"], "unimix": 0.01}
    prior = modules.RSSMPriorV3(action_shape=(ACTION,), action_dim=ACTION, recurrent_model="block_gru", **sizes)
    posterior = modules.RSSMPosteriorV3(obs_embed_dim=SIZES["units"], use_rms_norm=True, **sizes)
    rollout = modules.RSSMRolloutV3(
        module(prior, [*features, "action"], ("next", "prior_logits"), *following),
        module(posterior, seen, ("next", "posterior_logits"), following[0]),
    )
    reward, going, decode = head(BINS, 1, 0.0), head(1, 1), modules.SymExpTwoHot(BINS)
    encoder = modules.DreamerV3MLP(OBSERVATION, None, 3, SIZES["units"])
    world_model = TensorDictSequential(
        module(objectives.symlog, [("next", "observation")], ("next", "symlog_observation")),
        module(encoder, [("next", "symlog_observation")], ("next", "encoded_latents")),
        rollout,
        module(head(OBSERVATION, 3), following, ("next", "reco_pixels")),
        module(reward, following, ("next", "reward_logits")),
        module(decode, [("next", "reward_logits")], ("next", "reward")),
        module(going, following, ("next", "continue_pred")),
    )
    dynamics = module(prior, [*features, "action"], "_", *features)
    expected = TensorDictSequential(
        module(reward, features, "reward_logits"), module(decode, ["reward_logits"], "reward")
    )
    env = DreamerEnv(
        modules.WorldModelWrapper(dynamics, expected),
        prior_shape=(LATENT,),
        belief_shape=(SIZES["deter"],),
        device=torch.device(device),
    )
    env.observation_spec = Composite(state=Unbounded(LATENT), belief=Unbounded(SIZES["deter"])).to(device)
    env.state_spec = env.observation_spec.clone()
    env.action_spec, env.reward_spec = Bounded(-1, 1, (ACTION,)).to(device), Unbounded((1,)).to(device)
    actor = ProbabilisticTensorDictSequential(
        module(TorchRLActor(), features, "loc", "scale"),
        ProbabilisticTensorDictModule(
            in_keys=["loc", "scale"], out_keys=["action"], distribution_class=modules.IndependentNormal
        ),
    )
    critic = TensorDictSequential(
        module(head(BINS, 3, 0.0), features, "state_value_logits"),
        module(modules.SymExpTwoHot(BINS), ["state_value_logits"], "state_value"),
    )
    continuation = TensorDictSequential(
        module(going, features, "continue_logits"), module(nn.Sigmoid(), ["continue_logits"], "continuation")
    )
    for part in (world_model, actor, critic, continuation):
        part.to(device)

    model_loss = objectives.DreamerV3ModelLoss(
        world_model,
        kl_mode="separate",
        unimix=0.01,
        lambda_continue=1.0,
        continue_target_scale=332 / 333,
        reco_symlog=False,
        detach_output=False,
    )
    model_loss.set_keys(pixels="symlog_observation")
    actor_loss = objectives.DreamerV3ActorLoss(
        actor, critic, env, continuation_model=continuation, imagination_horizon=15, use_reinforce=True
    )
    actor_loss.make_value_estimator(gamma=1.0, lmbda=0.95)
    value_loss = objectives.DreamerV3ValueLoss(
        critic, "two_hot", num_value_bins=BINS, actor_loss=actor_loss, slow_critic_regularization=1.0
    )
    return objectives.DreamerV3Loss(model_loss, actor_loss, value_loss).to(device), rollout


def torchrl(shape: Shape, device: str, *, compiled: str = "") -> Callable[[], object]:
    """Its stepper; `compiled` is "whole", "step" or nothing."""
    torch.manual_seed(0)
    loss, rollout = torchrl_loss(device)
    loss.actor_loss.imagination_horizon = shape.horizon
    if compiled == "step":
        rollout.compile_rollout("step")
    whole = compiled == "whole"
    stepper = DreamerV3OptimizationStepper(
        loss,
        DreamerV3Optimizer(loss.parameters()),
        objectives.SoftUpdate(loss.value_loss, tau=0.02),
        compile_train_step=whole,
        cudagraph=whole and device == "cuda",
        warmup_steps=5 if whole and device == "cuda" else 1,
    )
    steps = draw(shape, device)
    following = {name: steps[name] for name in ("observation", "reward", "terminated")}
    following = {name: x if name == "observation" else x.unsqueeze(-1) for name, x in following.items()}
    zeros = {"state": LATENT, "belief": SIZES["deter"]}
    sample = TensorDict(
        {
            **{name: torch.zeros(*shape[:2], size, device=device) for name, size in zeros.items()},
            "action": steps["action"],
            "is_init": steps["is_first"].unsqueeze(-1),
            "next": {**following, "done": following["terminated"].clone()},
        },
        shape[:2],
    )
    ready = False

    def run() -> object:
        nonlocal ready
        if whole and not ready:
            stepper.warmup(sample)
        ready = True
        return stepper.step(None, sample)

    return run


# ------------------------------------------------------------------------------------------------ the table

OURS, PEER = "rlloss_nn", "torchrl"
CONTENDERS: dict[str, Callable[[Shape, str], Callable[[], object]]] = {
    f"{PEER} eager": torchrl,
    f"{OURS} eager": lambda shape, device: ours(shape, device, compiled=False),
    f"{PEER} compiled, rollout step": lambda shape, device: torchrl(shape, device, compiled="step"),
    f"{PEER} compiled, whole stepper": lambda shape, device: torchrl(shape, device, compiled="whole"),
    f"{OURS} compiled": lambda shape, device: ours(shape, device, compiled=True),
}


class Row(NamedTuple):
    contender: str
    median_ms: float
    first_quartile_ms: float
    third_quartile_ms: float
    times_faster_than_torchrl_eager: float
    peak_memory_mib: float
    first_call_s: float
    graphs: int
    graph_breaks: int
    note: str


class First(NamedTuple):
    """What a contender's first call, which compiles, has shown."""

    seconds: float
    graphs: int
    breaks: int
    note: str = ""


def first_call(update: Callable[[], object], limit: float) -> First:
    """Calls it once; a contender that fails, or is not ready in time, is told of and left out."""

    def stop(*_: object) -> None:
        raise TimeoutError

    note, start = "", time.perf_counter()
    torch._dynamo.utils.counters.clear()
    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        update()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except Exception as error:
        late = time.perf_counter() - start >= limit
        note = f"not ready after {limit:.0f} s" if late else f"fails: {type(error).__name__}: {error}".split("\n")[0]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    counters = torch._dynamo.utils.counters
    breaks = sum(counters["graph_break"].values())
    return First(time.perf_counter() - start, counters["stats"]["unique_graphs"], breaks, note)


def measure(names: Iterable[str], shape: Shape, options: argparse.Namespace) -> list[Row]:
    device, limit = options.device, options.limit
    updates = {name: CONTENDERS[name](shape, device) for name in names}
    first = {}
    for name, update in updates.items():
        first[name] = first_call(update, limit)
        print(f"{name}: {first[name]}", flush=True)
    ready = {name: update for name, update in updates.items() if not first[name].note}
    clock = time.process_time if options.busy else time.perf_counter
    timings = compare(ready, options.repetitions, min(3, options.repetitions // 4), clock)
    reference = timings.get(f"{PEER} eager")
    nothing = float("nan")
    rows = []
    for name in updates:
        timing, memory = timings.get(name), nothing
        if timing is not None:
            memory = peak_memory(ready[name], device) / 2**20
        ratio = reference.median / timing.median if reference and timing else nothing
        rows.append(Row(name, *(timing or [nothing] * 3), ratio, memory, *first[name]))
    return rows


def markdown(rows: list[Row], title: str) -> str:
    """The table, as in the README."""
    lines = [title, "", "| | ms (quartiles) | x torchrl eager | peak memory, MiB | first call, s | graphs (breaks) |"]
    lines += ["|---|---|---|---|---|---|"]
    for row in rows:
        time = f"{row.median_ms:.0f} ({row.first_quartile_ms:.0f} - {row.third_quartile_ms:.0f})"
        ratio, memory = f"{row.times_faster_than_torchrl_eager:.2f}", f"{row.peak_memory_mib:.0f}"
        cells = [row.note, "-", "-"] if row.note else [time, ratio, memory]
        graphs = f"{row.graphs} ({row.graph_breaks})" if row.graphs else "-"
        lines.append(f"| {' | '.join([row.contender, *cells, f'{row.first_call_s:.0f}', graphs])} |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.update", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--quick", action="store_true", help="B 4, T 8, horizon 3, five rounds; writes no table")
    parser.add_argument("--only", default="", help="contenders with one of these in the name, such as eager,whole")
    parser.add_argument("--repetitions", type=int, help="timed rounds (default: 21, 5 with --quick)")
    parser.add_argument("--busy", action="store_true", help="one thread, its processor time: on a CPU with other work")
    parser.add_argument("--limit", type=float, default=900, help="seconds for a first call (default: 900)")
    parser.add_argument("--output", type=Path, default=RESULTS / "update", help="where .csv and .md go")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no CUDA device here.")
    names = [name for name in CONTENDERS if any(part in name for part in options.only.split(","))]
    if not names:
        parser.error(f"--only {options.only}: none of {', '.join(CONTENDERS)}.")
    warnings.filterwarnings("ignore", module="torchrl|tensordict")

    options.repetitions = options.repetitions or (5 if options.quick else 21)
    if options.busy and options.device == "cuda":
        parser.error("--busy is for the CPU.")
    if options.busy:
        torch.set_num_threads(1)
    shape = Shape(4, 8, 3) if options.quick else Shape(16, 64, 15)
    rows = measure(names, shape, options)
    title = (
        f"DreamerV3, one update of the 1M agent, B {shape.batch}, T {shape.length}, horizon {shape.horizon}, float32. "
        f"{'Processor time' if options.busy else 'Wall time'} of {options.repetitions} calls in turn. "
        f"{machine(options.device)}, torchrl {importlib.metadata.version('torchrl')}, "
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}; load average {os.getloadavg()[0]:.1f} at the end."
    )
    table = markdown(rows, title)
    print(f"\n{table}")
    if not options.quick:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.with_suffix(".md").write_text(table)
        with options.output.with_suffix(".csv").open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(Row._fields)
            writer.writerows([[round(x, 3) if isinstance(x, float) else x for x in row] for row in rows])


if __name__ == "__main__":
    main()
