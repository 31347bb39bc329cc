"""Train a world model and an ensemble of novelty detectors on a real environment, with nothing but pure functions.

Collects sequences from a gymnasium environment with random actions, then trains on them

- a small RSSM world model with `dreamer_v3_model_loss`, and
- five predictors of random network distillation at once with `vmap(grad_and_value(rnd_loss))`,

both through an Adam step written as a function: no module loss, no torch.optim. Writes one picture (losses, open-loop
prediction, map of intrinsic reward) and prints figures from before and after. Ctrl-C stops training early and still
draws.
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import matplotlib
import numpy as np
import torch
from matplotlib.backend_bases import FigureCanvasBase
from torch import Tensor
from torch.func import grad_and_value, vmap
from tqdm import tqdm

import rlloss
from rlloss_nn import functionalize
from rlloss_nn.networks import RNDVectorNetwork, RSSMState, WorldModel

matplotlib.use("Agg")  # there may be no screen
from matplotlib import pyplot as plt

Params = dict[str, Tensor]

BATCH, LENGTH = 16, 16  # sequences a batch, steps a sequence
CONTEXT = 5  # steps seen before the open-loop prediction starts
MEMBERS = 5  # predictors in the ensemble
STOCH, CLASSES = 8, 8  # categorical latents of the world model, and classes of each
EPISODES = 5  # at least: the last fifth is kept apart
KNOBS = {**rlloss.DREAMER_V3_OFFICIAL, "reco_transform": "none"}  # observations come in normalised
STATE_NAMES = {
    "CartPole-v1": ["cart position", "cart velocity", "pole angle", "pole velocity"],
    "MountainCar-v0": ["position", "velocity"],
    "Pendulum-v1": ["cos angle", "sin angle", "angular velocity"],
}


class Steps(NamedTuple):
    """A stream of experience, episode after episode. The action is the one taken before the observation was seen."""

    observation: Tensor  # [N, *obs]
    action: Tensor  # [N, A], zeros at the first step of an episode
    reward: Tensor  # [N]
    is_first: Tensor  # bool [N]
    terminated: Tensor  # bool [N]


class Adam(NamedTuple):
    """Optimiser state; `params` of an ensemble have a leading dimension more, which changes nothing here."""

    params: Params
    first: Params
    second: Params
    step: int


# ------------------------------------------------------------------------------------------------ experience


def collect(name: str, steps: int, seed: int) -> Steps:
    """At least `steps` steps of random actions in whole episodes, and at least EPISODES of those."""
    try:
        env = gymnasium.make(name)
    except (gymnasium.error.Error, ImportError) as error:
        raise SystemExit(f"quickstart: gymnasium cannot make --env {name}: {error}") from None
    if not isinstance(env.observation_space, gymnasium.spaces.Box) or len(env.observation_space.shape or ()) != 1:
        raise SystemExit(f"quickstart: --env must have vector observations, got {env.observation_space}.")
    env.action_space.seed(seed)
    rows: list[tuple[Any, ...]] = []
    episodes = 0
    with tqdm(total=steps, desc=f"collect {name}", unit="step") as bar:
        while len(rows) < steps or episodes < EPISODES:
            observation, _ = env.reset(seed=seed if not rows else None)
            rows.append((observation, encode(env.action_space, None), 0.0, True, False))
            done = False
            while not done:
                action = env.action_space.sample()
                observation, reward, terminated, truncated, _ = env.step(action)
                rows.append((observation, encode(env.action_space, action), float(reward), False, terminated))
                bar.update()
                done = terminated or truncated
            episodes += 1
    env.close()
    observation, action, reward, is_first, terminated = (np.stack(column) for column in zip(*rows, strict=True))
    return Steps(
        torch.from_numpy(observation.astype(np.float32)),
        torch.from_numpy(action.astype(np.float32)),
        torch.from_numpy(reward.astype(np.float32)),
        torch.from_numpy(is_first),
        torch.from_numpy(terminated),
    )


def encode(space: gymnasium.Space[Any], action: Any) -> np.ndarray:
    """An action as a vector: one-hot if discrete, zeros if there is none."""
    size = int(space.n) if isinstance(space, gymnasium.spaces.Discrete) else math.prod(space.shape or ())
    if action is None:
        return np.zeros(size)
    return np.eye(size)[int(action)] if isinstance(space, gymnasium.spaces.Discrete) else np.ravel(action)


def split(steps: Steps) -> tuple[Steps, Steps]:
    """The last fifth of the episodes apart, to measure on."""
    starts = steps.is_first.nonzero().squeeze(-1)
    cut = int(starts[int(0.8 * len(starts))])
    return Steps(*(x[:cut] for x in steps)), Steps(*(x[cut:] for x in steps))


def sequences(steps: Steps, starts: Tensor, length: int) -> dict[str, Tensor]:
    """[B, length] pieces of the stream; each begins as if an episode did, for nothing is known of what was before."""
    index = starts[:, None] + torch.arange(length)
    batch = {name: x[index] for name, x in steps._asdict().items()}
    return {**batch, "is_first": batch["is_first"] | (torch.arange(length) == 0)}


# ------------------------------------------------------------------------------------------------ learning


def adam_init(params: Params) -> Adam:
    zeros = {name: torch.zeros_like(p) for name, p in params.items()}
    return Adam(params, zeros, zeros, 0)


def adam_update(state: Adam, grads: Params, lr: float, beta1: float = 0.9, beta2: float = 0.999) -> Adam:
    """One step of Adam as a function: nothing is written in place."""
    step = state.step + 1
    first = {k: torch.lerp(state.first[k], g, 1 - beta1) for k, g in grads.items()}
    second = {k: torch.lerp(state.second[k], g.square(), 1 - beta2) for k, g in grads.items()}
    size, scale = lr / (1 - beta1**step), 1 - beta2**step
    params = {k: p - size * first[k] / ((second[k] / scale).sqrt() + 1e-8) for k, p in state.params.items()}
    return Adam(params, first, second, step)


class Learner:
    """The networks as pure functions, their parameters and optimiser states, and the update of both."""

    def __init__(self, train: Steps, seed: int):
        torch.manual_seed(seed)
        size, actions = train.observation.shape[-1], train.action.shape[-1]
        self.train = train
        self.noise = torch.Generator().manual_seed(seed)
        self.key = rlloss.random.key(seed)
        sizes = {"deter": 128, "hidden": 64, "stoch": STOCH, "classes": CLASSES, "units": 64, "layers": 2}
        self.module = WorldModel((size,), actions, **sizes)
        self.world_model, params = functionalize(self.module)
        self.model = adam_init(detached(params))
        ensemble = [
            functionalize(RNDVectorNetwork(size, hidden=64, out_features=32, predictor=True)) for _ in range(MEMBERS)
        ]
        self.predictor = ensemble[0][0]
        self.rnd = adam_init({k: torch.stack([p[k].detach() for _, p in ensemble]) for k in ensemble[0][1]})
        self.target, target_params = functionalize(RNDVectorNetwork(size, hidden=64, out_features=32))
        self.target_params = detached(target_params)

    def update(self) -> dict[str, float]:
        starts = torch.randint(len(self.train.reward) - LENGTH + 1, (BATCH,), generator=self.noise)
        batch = sequences(self.train, starts, LENGTH)
        batch["noise"] = self.gumbel(BATCH, LENGTH)
        gradients, (_, aux) = grad_and_value(self.model_loss, has_aux=True)(self.model.params, batch)
        self.model = adam_update(self.model, gradients, lr=1e-3)

        # One key a step, one a member: each draws its own quarter of the observations.
        self.key, draw = rlloss.random.split(self.key)
        observations = batch["observation"].flatten(0, 1)
        masks = vmap(lambda key: rlloss.rnd_key_mask(key, len(observations), 0.25))(rlloss.random.split(draw, MEMBERS))
        each = vmap(grad_and_value(self.rnd_loss), in_dims=(0, None, None, 0))
        gradients, novelty = each(self.rnd.params, self.target_params, observations, masks)
        self.rnd = adam_update(self.rnd, gradients, lr=3e-4)
        return {**{k: float(v) for k, v in aux["losses"].items()}, "rnd": float(novelty.mean())}

    def model_loss(self, params: Params, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Any]]:
        return rlloss.dreamer_v3_model_loss(params, batch, world_model=self.world_model, **KNOBS)

    def rnd_loss(self, params: Params, target_params: Params, observations: Tensor, rows: Tensor) -> Tensor:
        return rlloss.rnd_loss(params, target_params, observations, rows, predictor=self.predictor, target=self.target)

    def intrinsic_reward(self, observations: Tensor) -> Tensor:
        """[N]: the error of the predictors, averaged over the ensemble."""
        error = vmap(
            lambda params: rlloss.rnd_error(
                params, self.target_params, observations, predictor=self.predictor, target=self.target
            )
        )
        return error(self.rnd.params).mean(0)

    def open_loop(self, batch: dict[str, Tensor]) -> Tensor:
        """[B, T, obs]: the model sees CONTEXT steps, then imagines with the actions that were really taken."""
        size, length = batch["reward"].shape
        # `functionalize` makes a function of the forward only; imagining takes other methods of the module.
        self.module.load_state_dict(self.model.params)
        modes = torch.zeros(size, length, STOCH, CLASSES)  # without noise, the most likely classes are taken
        with torch.no_grad():
            seen = {name: x[:, :CONTEXT] for name, x in {**batch, "noise": modes}.items()}
            context = self.module(seen)
            state = RSSMState(context["deter"][:, -1], context["stoch"][:, -1])
            imagined = self.module.rssm.imagine(state, batch["action"][:, CONTEXT:], modes[:, CONTEXT:])
            future = self.module.predict(imagined.deter, imagined.stoch)["reconstruction"]
        return torch.cat([context["reconstruction"], future], 1)

    def gumbel(self, size: int, length: int) -> Tensor:
        uniform = torch.rand(size, length, STOCH, CLASSES, generator=self.noise).clamp_min(1e-20)
        return -torch.log(-torch.log(uniform))


def detached(params: Params) -> Params:
    return {name: p.detach().clone() for name, p in params.items()}


# ------------------------------------------------------------------------------------------------ measuring


class Probe(NamedTuple):
    """Data kept apart, on which both halves are measured."""

    episodes: dict[str, Tensor]  # [B, T] whole pieces of held-out episodes
    visited: Tensor  # [M, obs] held-out states where the agent was
    unvisited: Tensor  # [M, obs] states around them, further than one standard deviation from any trained on


def make_probe(test: Steps, train: Steps, seed: int) -> Probe:
    generator = torch.Generator().manual_seed(seed)
    first = test.is_first.nonzero().squeeze(-1)
    lengths = torch.diff(first, append=torch.tensor([len(test.reward)]))
    horizon = int(min(50, max(CONTEXT + 2, lengths.float().quantile(0.5).item())))
    episodes = sequences(test, first[lengths >= horizon][:64], horizon)
    low, high = train.observation.amin(0), train.observation.amax(0)
    middle, reach = (low + high) / 2, (high - low).clamp_min(1.0)
    around = middle + reach * (2 * torch.rand(4096, len(low), generator=generator) - 1)
    # In pieces: all distances at once would fill the memory after many steps.
    distance = torch.stack([torch.cdist(around, piece).amin(-1) for piece in train.observation.split(2000)]).amin(0)
    probe = Probe(episodes, test.observation, around[distance > 1.0])
    if not len(probe.episodes["reward"]):
        raise SystemExit(f"quickstart: no held-out episode is {horizon} steps long, which measuring takes.")
    if not len(probe.unvisited):
        raise SystemExit("quickstart: random actions reached every state around; there is no novelty to measure.")
    return probe


def measure(learner: Learner, probe: Probe) -> dict[str, float]:
    real = probe.episodes["observation"]
    error = (learner.open_loop(probe.episodes) - real)[:, CONTEXT:].square().mean()
    repeat = (real[:, CONTEXT - 1 : CONTEXT] - real)[:, CONTEXT:].square().mean()
    visited, unvisited = (learner.intrinsic_reward(x).mean() for x in (probe.visited, probe.unvisited))
    return {
        "open-loop error": float(error),
        "error of repeating the last observation": float(repeat),
        "intrinsic reward, visited states": float(visited),
        "intrinsic reward, unvisited states": float(unvisited),
    }


def report(before: dict[str, float], after: dict[str, float], updates: int) -> None:
    print(f"\nBefore and after {updates} updates, on data that was not trained on:")
    for name in before:
        print(f"  {name:<42} {before[name]:>9.4f} {after[name]:>9.4f}")
    error, repeat, visited, unvisited = after.values()
    print(
        f"  open-loop error is {error / repeat:.2f} times that of repeating the last observation (below 1 is learning)"
    )
    print(f"  unvisited states are {unvisited / visited:.1f} times as rewarding as visited ones (above 1 is novelty)")


# ------------------------------------------------------------------------------------------------ drawing


def draw(path: Path, name: str, history: list[dict[str, float]], learner: Learner, probe: Probe, train: Steps) -> None:
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(17, 5), layout="constrained")
    labels = STATE_NAMES.get(name, [f"observation {i}" for i in range(train.observation.shape[-1])])
    draw_losses(left, history)
    draw_open_loop(middle, learner, probe, labels)
    draw_map(figure, right, learner, train, labels)
    figure.suptitle(f"{name}: {len(history)} updates on {len(train.reward)} random steps")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_losses(axes: Any, history: list[dict[str, float]]) -> None:
    window = max(1, len(history) // 50)
    # The two KL terms differ in what they train, not in value: one line for both.
    labels = {"dynamic": "KL (dynamic, representation)", "rnd": "RND (mean of ensemble)"}
    for term in [name for name in (history[0] if history else []) if name != "representation"]:
        values = np.convolve([losses[term] for losses in history], np.ones(window) / window, mode="valid")
        axes.plot(np.arange(len(values)) + window, values, label=labels.get(term, term))
    axes.set(title="Loss terms (unweighted, moving mean)", xlabel="update", yscale="log")
    if history:
        axes.margins(y=0.25)  # room for the legend
        axes.legend(fontsize=8, ncols=2, loc="upper right")


def draw_open_loop(axes: Any, learner: Learner, probe: Probe, labels: list[str]) -> None:
    real, predicted = probe.episodes["observation"][0], learner.open_loop(probe.episodes)[0]
    for i, label in enumerate(labels[:4]):
        axes.plot(real[:, i], color=f"C{i}", label=label)
        axes.plot(predicted[:, i], color=f"C{i}", linestyle="--")
    axes.axvspan(-0.5, CONTEXT - 0.5, color="0.9", zorder=0)
    axes.text((CONTEXT - 1) / 2, 0.02, "seen", ha="center", transform=axes.get_xaxis_transform())
    axes.set(title="A held-out episode: real (solid), predicted (dashed)", xlabel="step", ylabel="standard deviations")
    axes.set_xlim(-0.5, len(real) - 0.5)
    axes.legend(fontsize=8)


def draw_map(figure: Any, axes: Any, learner: Learner, train: Steps, labels: list[str]) -> None:
    size = train.observation.shape[-1]
    x, y = 0, size // 2  # position and angle of CartPole
    reach = [2.5 * float(train.observation[:, i].abs().quantile(0.99)) for i in (x, y)]
    grid = torch.meshgrid(*(torch.linspace(-r, r, 80) for r in reach), indexing="xy")
    states = torch.zeros(80 * 80, size)
    states[:, x], states[:, y] = grid[0].flatten(), grid[1].flatten() if y != x else grid[0].flatten()
    reward = learner.intrinsic_reward(states).reshape(80, 80)
    image = axes.pcolormesh(grid[0], grid[1], reward.log10(), cmap="viridis", shading="nearest")
    figure.colorbar(image, ax=axes, label="log10 of intrinsic reward")
    shown = train.observation[:: max(1, len(train.observation) // 1500)]
    axes.scatter(shown[:, x], shown[:, y], s=2, color="white", alpha=0.5, label="visited states")
    axes.set(title="Intrinsic reward in standardised state space (the rest at its mean)")
    axes.set(xlabel=labels[x], ylabel=labels[y], xlim=(-reach[0], reach[0]), ylim=(-reach[1], reach[1]))
    axes.legend(fontsize=8, loc="upper right", facecolor="0.3", labelcolor="white", markerscale=3)


# ------------------------------------------------------------------------------------------------ the command


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(1)  # tensors this small are slower when shared out
    steps = collect(options.env, options.steps, options.seed)
    stats = rlloss.running_mean_std_update(
        rlloss.running_mean_std_init(steps.observation.shape[1:]), split(steps)[0].observation
    )
    train, test = split(steps._replace(observation=rlloss.running_mean_std_normalize(stats, steps.observation)))
    learner, probe = Learner(train, options.seed), make_probe(test, train, options.seed)
    before, history = measure(learner, probe), run(learner.update, options.updates)
    report(before, measure(learner, probe), len(history))
    draw(options.picture, options.env, history, learner, probe, train)
    print(f"picture: {options.picture}")


def run(update: Callable[[], dict[str, float]], updates: int) -> list[dict[str, float]]:
    """Repeat `update` under a progress bar; Ctrl-C ends it with what there is."""
    history: list[dict[str, float]] = []
    with tqdm(total=updates, desc="train", unit="update", smoothing=0.1) as bar:
        try:
            while len(history) < updates:
                history.append(update())
                bar.set_postfix({k: f"{v:.3g}" for k, v in history[-1].items()}, refresh=False)
                bar.update()
        except KeyboardInterrupt:
            bar.write("interrupted: drawing what has been learned so far")
    return history


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.learning.quickstart",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--env", default="CartPole-v1", help="a gymnasium environment with vector observations (default: CartPole-v1)")
    add("--steps", type=int, default=6000, help="environment steps to collect with random actions (default: 6000)")
    add("--updates", type=int, default=800, help="updates of both models (default: 800)")
    add("--seed", type=int, default=0, help="of everything random; the same seed gives the same figures (default: 0)")
    add("--picture", type=Path, default=Path("quickstart.png"), help="file to draw into (default: quickstart.png)")
    options = parser.parse_args(arguments)
    if options.steps < 20 * LENGTH or options.updates < 1:
        parser.error(f"--steps must be at least {20 * LENGTH} and --updates at least 1")
    # Now, not when there is something to draw and nowhere to draw it.
    if not options.picture.parent.is_dir():
        parser.error(f"--picture must be in a folder that exists, got {options.picture}")
    kinds = sorted(FigureCanvasBase.get_supported_filetypes())
    if options.picture.suffix.removeprefix(".").lower() not in kinds:
        parser.error(f"--picture must end with one of .{', .'.join(kinds)}, got {options.picture}")
    return options


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("\nquickstart: interrupted before the picture was drawn") from None
