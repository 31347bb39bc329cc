"""One whole update of DreamerV3's 1M agent beside torchrl's: forward, backward, optimiser, slow critic.

B 16, T 64, horizon 15, vectors of 24 numbers, 6 continuous actions; both sides with the author's sizes, scales and
optimiser (LaProp after adaptive clipping; torchrl's is its `DreamerV3Optimizer`). Ours is the update of
`benchmarks.learning.dreamer_v3`. torchrl's is its `DreamerV3Loss` of its own networks in its
`DreamerV3OptimizationStepper`, compiled as that class does it: loss and backward in one `torch.compile`, with a scan
over time; and with one compiled step of its rollout (`compile_rollout("step")`) and all else eager. With CUDA the 12M
agent too, and ours captured in a CUDA graph as well (torchrl's whole stepper then is). `--quick` has smaller shapes.
"""

from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

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

from benchmarks.learning.dreamer_v3 import Config
from benchmarks.learning.updates import captured, make_learner, make_update
from benchmarks.speed.command import main
from benchmarks.speed.harness import Case
from rlloss_nn.networks import Agent, Continuous, RSSMState

TITLE = "DreamerV3, one update: forward, backward, optimiser, slow critic, float32"
AXIS = "parameters"
QUICK = "eager"
OURS, PEER = "rlloss_nn", "torchrl"
OBSERVATION, ACTION, BINS = 24, 6, 255


class Shape(NamedTuple):
    batch: int
    length: int
    horizon: int


class Sizes(NamedTuple):
    """Of the networks."""

    deter: int
    hidden: int
    stoch: int
    classes: int
    units: int

    @property
    def latent(self) -> int:
        return self.stoch * self.classes


AGENTS = {1e6: Sizes(512, 64, 32, 4, 64), 12e6: Sizes(2048, 256, 32, 16, 256)}  # parameters -> sizes


def cases(quick: bool, device: str) -> Iterator[Case]:
    """One agent, or with CUDA two."""
    shape = Shape(4, 8, 3) if quick else Shape(16, 64, 15)
    for count in AGENTS if device == "cuda" and not quick else [1e6]:
        given = (shape, AGENTS[count], device)
        updates = {
            f"{PEER} eager": torchrl(*given),
            f"{OURS} eager": ours(*given),
            f"{PEER} compiled, rollout step": torchrl(*given, compiled="step"),
            f"{PEER} compiled, whole stepper": torchrl(*given, compiled="whole"),
            f"{OURS} compiled": ours(*given, compile=True),
        }
        if device == "cuda":
            updates |= {
                f"{OURS} captured": ours(*given, cuda_graph=True),
                f"{OURS} compiled, captured": ours(*given, compile=True, cuda_graph=True),
                f"{OURS} compiled, captured, bf16": ours(*given, compile=True, cuda_graph=True, dtype="bfloat16"),
            }
        contenders = {name: lambda data, update=update: update() for name, update in updates.items()}
        size = f"B {shape.batch}, T {shape.length}, horizon {shape.horizon}"
        yield Case(f"{count / 1e6:.0f}M agent", size, count, lambda: None, contenders)


# ------------------------------------------------------------------------------------------------ ours


def ours(
    shape: Shape,
    sizes: Sizes,
    device: str,
    *,
    compile: bool = False,
    cuda_graph: bool = False,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> Callable[[], None]:
    """The update of the learning benchmark, again and again on the same batch."""
    torch.manual_seed(0)
    agent = Agent((OBSERVATION,), Continuous(ACTION), **sizes._asdict()).to(device)
    config = Config(**shape._asdict(), compile=compile, cuda_graph=cuda_graph, dtype=dtype)
    learner, update = make_learner(agent), make_update(agent, config)
    update = captured(update) if cuda_graph else update
    noise, rollouts = agent.noise(*shape[:2]), agent.noise(shape.batch * shape.length, shape.horizon + 1)
    steps = draw(shape, device)
    batch = {
        **steps,
        "state": RSSMState(*agent.initial(shape.batch).state),
        "is_last": torch.zeros_like(steps["terminated"]),
        "noise": noise["latent"],
    }
    imagined = {"policy": rollouts["policy"], "dynamics": rollouts["latent"][:, :-1]}

    def run() -> None:
        nonlocal learner
        learner, _ = update(learner, batch, imagined)

    return run


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

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.mlp = modules.DreamerV3MLP(sizes.deter + sizes.latent, 2 * ACTION, 3, sizes.units, outscale=0.01)

    def forward(self, state: Tensor, belief: Tensor) -> tuple[Tensor, Tensor]:
        mean, deviation = self.mlp(state, belief).chunk(2, -1)
        return torch.tanh(mean), 0.9 * torch.sigmoid(deviation + 2) + 0.1


def torchrl_loss(sizes: Sizes, device: str) -> tuple[objectives.DreamerV3Loss, modules.RSSMRolloutV3]:
    """Its whole objective on its own networks, wired as in its documentation."""
    features, following = ["state", "belief"], [("next", "state"), ("next", "belief")]
    seen = [("next", "belief"), ("next", "encoded_latents")]

    def head(outputs: int, depth: int, outscale: float = 1.0) -> nn.Module:
        return modules.DreamerV3MLP(sizes.deter + sizes.latent, outputs, depth, sizes.units, outscale=outscale)

    def module(network: Any, inputs: list[Any], *outputs: Any) -> TensorDictModule:
        return TensorDictModule(network, in_keys=inputs, out_keys=list(outputs))

    widths = {"hidden_dim": sizes.hidden, "rnn_hidden_dim": sizes.deter}
    widths |= {"num_categoricals": sizes.stoch, "num_classes": sizes.classes, "unimix": 0.01}
    prior = modules.RSSMPriorV3(action_shape=(ACTION,), action_dim=ACTION, recurrent_model="block_gru", **widths)
    posterior = modules.RSSMPosteriorV3(obs_embed_dim=sizes.units, use_rms_norm=True, **widths)
    rollout = modules.RSSMRolloutV3(
        module(prior, [*features, "action"], ("next", "prior_logits"), *following),
        module(posterior, seen, ("next", "posterior_logits"), following[0]),
    )
    reward, going, decode = head(BINS, 1, 0.0), head(1, 1), modules.SymExpTwoHot(BINS)
    encoder = modules.DreamerV3MLP(OBSERVATION, None, 3, sizes.units)
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
        prior_shape=(sizes.latent,),
        belief_shape=(sizes.deter,),
        device=torch.device(device),
    )
    env.observation_spec = Composite(state=Unbounded(sizes.latent), belief=Unbounded(sizes.deter)).to(device)
    env.state_spec = env.observation_spec.clone()
    env.action_spec, env.reward_spec = Bounded(-1, 1, (ACTION,)).to(device), Unbounded((1,)).to(device)
    actor = ProbabilisticTensorDictSequential(
        module(TorchRLActor(sizes), features, "loc", "scale"),
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


def torchrl(shape: Shape, sizes: Sizes, device: str, *, compiled: str = "") -> Callable[[], object]:
    """Its stepper; `compiled` is "whole", "step" or nothing."""
    torch.manual_seed(0)
    loss, rollout = torchrl_loss(sizes, device)
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
    zeros = {"state": sizes.latent, "belief": sizes.deter}
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


if __name__ == "__main__":
    main(suite="update")
