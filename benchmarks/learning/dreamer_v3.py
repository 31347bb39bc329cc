"""DreamerV3 on real environments, with the update of all its networks as one pure function.

    python -m benchmarks.learning.dreamer_v3 cpu --task CartPole-v1 --logdir runs/cartpole
    python -m benchmarks.learning.dreamer_v3 published --task dmc:cartpole_swingup --device cuda --compile

`published` has the author's settings for 1M parameters, `cpu` smaller ones that learn classic control in minutes. Tasks
are gymnasium's by name (MiniGrid's too, as images) and dm_control's as `dmc:domain_task`. A run leaves a CSV with one
row for each episode, TensorBoard events, a picture and a checkpoint in its folder, and goes on with `--resume` after
any interruption as if there had been none.
"""

import dataclasses
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from torch import Tensor
from torch.nn.functional import one_hot
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from tqdm import tqdm

import rlloss
from benchmarks.learning.environments import Task
from benchmarks.learning.records import Log, draw_run, read_checkpoint, refuse_used, write_checkpoint
from benchmarks.learning.updates import captured, make_learner, make_update
from rlloss_nn import functionalize
from rlloss_nn.networks import Agent, Discrete, RSSMState

LOSSES = ("dynamic", "representation", "reco", "reward", "continue", "actor", "value", "replay_value", "entropy")


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of a run; the defaults are the author's for 1M parameters and vectors.

    But for these: float32, and fewer steps and less of them kept (his: 1.1 and 5 million).
    """

    task: str = "CartPole-v1"  # gymnasium name, or dmc:domain_task
    image: bool = False  # see rendered images of 64x64 pixels instead of the task's own observations
    steps: int = 100_000  # environment steps, over all environments
    minutes: float = float("inf")  # stop after so many, even before all steps are done
    logdir: Path = Path("runs/dreamer_v3")
    resume: bool = False  # go on from the checkpoint in logdir
    seed: int = 0
    device: Literal["cpu", "cuda"] = "cpu"
    threads: int = 0  # CPU threads of torch; 0: its own choice
    compile: bool = False  # compile the loss; takes a while at the start, pays off in long runs
    cuda_graph: bool = True  # with CUDA: the whole update as one graph, launched at once
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the networks' products; all else is float32
    checkpoint_every: int = 5_000  # environment steps

    envs: int = 16
    train_ratio: float = 1024.0  # steps replayed for each step made
    batch: int = 16  # sequences
    length: int = 64  # steps of each
    horizon: int = 15  # imagined steps
    starts: int | None = None  # last steps of each sequence that start a rollout; None: all
    capacity: int = 1_000_000  # steps kept
    prefill: int = 1_024  # steps before the first update, if enough for two sequences of each environment

    deter: int = 512
    hidden: int = 64
    stoch: int = 32
    classes: int = 4
    units: int = 64
    depth: int = 4
    learning_rate: float = 4e-5
    warmup: int = 1_000
    entropy: float = 3e-4
    reco: float = 1.0  # weight of the reconstruction: more where what matters moves in small numbers
    discount: float = 332 / 333


PUBLISHED = Config()
CPU = Config(
    threads=1,  # small operations gain nothing from a second thread
    steps=40_000, envs=4, train_ratio=64, length=32, starts=8, deter=128, stoch=8, classes=8,
    learning_rate=1e-3, warmup=100, reco=100.0,
)  # fmt: skip


# ------------------------------------------------------------------------------------------------ replay


class Replay:
    """The last steps of all environments, and the latent state the model had at each, in rings."""

    def __init__(self, entries: Mapping[str, tuple[Any, torch.dtype]], envs: int, capacity: int, length: int):
        self.size, self.length, self.count = max(capacity // envs, length), length, 0
        # Zeros of numpy take no memory before they are written to.
        kinds = {name: (shape, torch.empty(0, dtype=dtype).numpy().dtype) for name, (shape, dtype) in entries.items()}
        zeros = {name: np.zeros((envs, self.size, *shape), dtype) for name, (shape, dtype) in kinds.items()}
        self.data = {name: torch.from_numpy(x) for name, x in zeros.items()}
        self.online: deque[tuple[int, int]] = deque()  # sequences nobody has trained on: they go first

    def add(self, step: Mapping[str, Tensor]) -> None:
        """One step of every environment."""
        for name, x in step.items():
            self.data[name][:, self.count % self.size] = x
        self.count += 1
        if self.count % self.length == 0:
            self.online.extend((env, self.count - self.length) for env in range(len(self.data["reward"])))

    def sample(self, batch: int, generator: torch.Generator) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor]]:
        """`batch` sequences and where they are."""
        oldest = max(0, self.count - self.size)
        while self.online and self.online[0][1] < oldest:
            self.online.popleft()
        env = torch.randint(len(self.data["reward"]), (batch,), generator=generator)
        start = torch.randint(oldest, self.count - self.length + 1, (batch,), generator=generator)
        for i in range(min(batch, len(self.online))):
            env[i], start[i] = self.online.popleft()
        where = self.positions(env, start)
        return {name: x[where] for name, x in self.data.items()}, where

    def newest(self) -> dict[str, Tensor]:
        """The last sequence [1, length] of the first environment."""
        where = self.positions(torch.tensor([0]), torch.tensor([self.count - self.length]))
        return {name: x[where] for name, x in self.data.items()}

    def positions(self, env: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        return env[:, None], (start[:, None] + torch.arange(self.length)) % self.size

    def write_back(self, where: tuple[Tensor, Tensor], state: RSSMState) -> None:
        """The latent states that the model would have had with the parameters of now."""
        # One by one: where sequences overlap, it is always the same that is written last.
        for env, steps, deter, stoch in zip(*where, state.deter.cpu(), state.stoch.argmax(-1).cpu(), strict=True):
            self.data["deter"][env, steps] = deter
            self.data["stoch"][env, steps] = stoch.to(torch.int16)

    def state_dict(self) -> dict[str, Any]:
        data = {name: x[:, : min(self.count, self.size)].clone() for name, x in self.data.items()}
        return {"data": data, "count": self.count, "online": list(self.online)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.count, self.online = state["count"], deque(map(tuple, state["online"]))
        for name, x in state["data"].items():
            self.data[name][:, : x.shape[1]] = x


# ------------------------------------------------------------------------------------------------ learning


def make_batch(steps: dict[str, Tensor], agent: Agent, config: Config, generator: torch.Generator) -> tuple[Any, Any]:
    """What the update takes, of replayed sequences: their first step gives the state and action to start from."""
    device = generator.device
    steps = {name: x.to(device) for name, x in steps.items()}
    rest = {name: x[:, 1:] for name, x in steps.items() if name not in ("action", "deter", "stoch")}
    # An episode that was abandoned ends where the next begins.
    ends = torch.cat([rest["is_first"][:, 1:], torch.zeros_like(rest["is_first"][:, :1])], 1)
    classes = agent.world_model.rssm.classes
    latent = one_hot(steps["stoch"][:, 0].long(), classes).float()
    batch = {
        **{name: rest[name] for name in ("reward", "is_first", "terminated")},
        "observation": {name: rest[name] for name in ("image", "vector") if name in rest},
        "is_last": rest["is_last"] | ends,
        "action": steps["action"][:, :-1].flatten(2),
        "state": RSSMState(steps["deter"][:, 0], latent),
        "noise": agent.noise(config.batch, config.length, generator=generator)["latent"],
    }
    rollouts = config.batch * (config.starts or config.length)
    noise = agent.noise(rollouts, config.horizon + 1, generator=generator)
    return batch, {"policy": noise["policy"], "dynamics": noise["latent"][:, :-1]}


# ------------------------------------------------------------------------------------------------ a run


class Run:
    """Agent, environments and replay, and the loop over them."""

    columns = ("step", "updates", "return", "length", *LOSSES, "seconds")

    def __init__(self, config: Config):
        torch.manual_seed(config.seed)
        self.config = config
        self.tasks = [Task(config.task, image=config.image, seed=config.seed, index=i) for i in range(config.envs)]
        task = self.tasks[0]
        sizes = {name: getattr(config, name) for name in ("deter", "hidden", "stoch", "classes", "units", "depth")}
        self.agent = Agent({task.key: task.shape}, task.action, **sizes).to(config.device)
        action = (task.action.groups, task.action.classes) if isinstance(task.action, Discrete) else task.action
        entries = {task.key: (task.shape, task.dtype), "reward": ((), torch.float32), "action": (action, torch.float32)}
        entries |= {name: ((), torch.bool) for name in ("is_first", "is_last", "terminated")}  # noqa: C420
        entries |= {"deter": ((config.deter,), torch.float32), "stoch": ((config.stoch,), torch.int16)}
        self.replay = Replay(entries, config.envs, config.capacity, config.length + 1)
        self.learner, self.update = make_learner(self.agent), make_update(self.agent, config)
        if config.device == "cuda" and config.cuda_graph:
            self.update = captured(self.update)
        self.act = functionalize(self.agent, method="act")[0]
        self.memory = self.agent.initial(config.envs)
        self.noise = torch.Generator(config.device).manual_seed(config.seed)
        self.draws = torch.Generator().manual_seed(config.seed)
        self.step, self.updates, self.owed, self.seconds = 0, 0, 0.0, 0.0
        self.scores = [(0.0, 0)] * config.envs  # return and length of the running episodes
        self.losses: dict[str, Any] = {}
        self.rows: list[dict[str, float]] = []  # one for each episode that ended
        self.steps = [task.reset() for task in self.tasks]  # what each environment shows now

    def train(self) -> None:
        config, began = self.config, time.monotonic() - self.seconds
        if self.step == 0:
            self.save()
        prefill = max(config.prefill, 2 * config.envs * self.replay.length)
        bar = tqdm(total=config.steps, initial=self.step, unit="step", mininterval=1.0)
        with bar, Log(config.logdir, self.columns, self.rows) as log:
            while self.step < config.steps and self.seconds < 60 * config.minutes:
                # Act, remember it, and let every environment go on.
                seen = {name: torch.stack([torch.as_tensor(x[name]) for x in self.steps]) for name in self.steps[0]}
                actions = self.choose(seen)
                for row in self.count():
                    log.write(row)
                living = zip(self.tasks, self.steps, actions, strict=True)
                self.steps = [task.reset() if step["is_last"] else task.step(action) for task, step, action in living]
                self.step += config.envs

                # Train as often as the ratio says.
                if self.step >= prefill:
                    self.owed += config.envs * config.train_ratio / (config.batch * config.length)
                while self.owed >= 1:
                    sequences, (env, index) = self.replay.sample(config.batch, self.draws)
                    batch, noise = make_batch(sequences, self.agent, config, self.noise)
                    self.learner, metrics = self.update(self.learner, batch, noise)
                    self.replay.write_back((env, index[:, 1:]), metrics["latents"])
                    self.losses, self.updates, self.owed = metrics["losses"], self.updates + 1, self.owed - 1

                self.seconds = time.monotonic() - began
                bar.update(config.envs)
                if self.step % (25 * config.envs) == 0:
                    bar.set_postfix(self.summary(), refresh=False)
                if self.step % config.checkpoint_every < config.envs:
                    self.save()

    def choose(self, seen: dict[str, Tensor]) -> Tensor:
        """The next actions; they go into the replay, with what was seen and what the model made of it."""
        device, key = self.config.device, self.tasks[0].key
        with torch.no_grad():
            noise = self.agent.noise(len(self.tasks), generator=self.noise)
            observation, is_first = {key: seen[key].to(device)}, seen["is_first"].to(device)
            self.memory, action = self.act(flat(self.learner.params), self.memory, observation, is_first, noise)
        action, (deter, stoch) = action.cpu(), self.memory.state
        self.replay.add({**seen, "action": action, "deter": deter, "stoch": stoch.argmax(-1)})
        return action

    def count(self) -> list[dict[str, float]]:
        """Adds up the rewards; the rows of the episodes that ended."""
        ended = []
        for i, step in enumerate(self.steps):
            score, length = (0.0, 0) if step["is_first"] else self.scores[i]
            self.scores[i] = score, length = score + step["reward"], length + (not step["is_first"])
            if step["is_last"]:
                row = {"step": self.step, "updates": self.updates, "return": score, "length": length}
                losses = {name: float(x) for name, x in self.losses.items()}
                ended.append({**row, **losses, "seconds": round(self.seconds, 1)})
        self.rows += ended
        return ended

    def summary(self) -> dict[str, str]:
        """What the progress bar shows."""
        recent = self.rows[-20:]
        means = {name: sum(row[name] for row in recent) / max(1, len(recent)) for name in ("return", "length")}
        rate = {"updates/s": self.updates / max(1e-9, self.seconds)}
        losses = {name: float(x) for name, x in self.losses.items()}
        return {name: f"{x:.3g}" for name, x in {**means, **rate, **losses}.items()}

    def save(self) -> None:
        checkpoint = {
            "settings": settings(self.config),
            "learner": tree_flatten(self.learner)[0],
            "memory": tree_flatten(self.memory)[0],
            "replay": self.replay.state_dict(),
            "generators": [self.noise.get_state(), self.draws.get_state()],
            "tasks": [(task.episode, task.actions) for task in self.tasks],
            "counters": (self.step, self.updates, self.owed, self.seconds),
            "scores": self.scores,
            "losses": {name: float(x) for name, x in self.losses.items()},
            "rows": self.rows,
        }
        write_checkpoint(self.config.logdir, checkpoint)

    def load(self) -> None:
        """Takes over the last whole checkpoint, and plays the unfinished episodes up to where they were."""
        checkpoint = read_checkpoint(self.config.logdir, settings(self.config))
        for name in ("learner", "memory"):
            leaves, spec = tree_flatten(getattr(self, name))
            saved = [new.to(old.device) for new, old in zip(checkpoint[name], leaves, strict=True)]
            setattr(self, name, tree_unflatten(saved, spec))
        self.replay.load_state_dict(checkpoint["replay"])
        for generator, state in zip((self.noise, self.draws), checkpoint["generators"], strict=True):
            generator.set_state(state)
        self.step, self.updates, self.owed, self.seconds = checkpoint["counters"]
        self.scores, self.losses, self.rows = (checkpoint[name] for name in ("scores", "losses", "rows"))
        played = zip(self.tasks, checkpoint["tasks"], strict=True)
        self.steps = [task.play_again(episode, actions) for task, (episode, actions) in played]

    def open_loop(self) -> tuple[Tensor, Tensor, int]:
        """The newest sequence [T, *obs], what the model predicts that sees its first steps, and how many those are."""
        seen = min(5, self.config.length - 1)
        generator = torch.Generator(self.config.device).manual_seed(0)
        batch, _ = make_batch(self.replay.newest(), self.agent, dataclasses.replace(self.config, batch=1), generator)
        # What follows the end of an episode cannot be foreseen.
        resets = batch["is_first"][0, seen + 1 :].nonzero()
        stop = seen + 1 + int(resets[0]) if len(resets) else None
        state = batch.pop("state")
        batch = tree_map(lambda x: x[:, :stop], batch)
        self.agent.load_state_dict(flat(self.learner.params))
        model, key = self.agent.world_model, self.tasks[0].key
        with torch.no_grad():
            first = model({**tree_map(lambda x: x[:, :seen], batch), "state": state})
            state = RSSMState(first["deter"][:, -1], first["stoch"][:, -1])
            later = model.rssm.imagine(state, batch["action"][:, seen:], torch.zeros_like(batch["noise"][:, seen:]))
            future = model.predict(later.deter, later.stoch)
        predicted = torch.cat([x["reconstruction"][key] for x in (first, future)], 1)[0].cpu()
        real = batch["observation"][key][0].cpu()
        return (real / 255, predicted, seen) if key == "image" else (real, rlloss.symexp(predicted), seen)

    def draw(self) -> None:
        title = f"{self.config.task}, seed {self.config.seed}: {self.step} steps, {self.updates} updates"
        enough = self.replay.count >= self.replay.length
        draw_run(self.config.logdir, title, self.rows, self.open_loop() if enough else None)


def flat(params: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The parameters under the names they have in the agent."""
    return {f"{part}.{name}": p for part, own in params.items() for name, p in own.items()}


def settings(config: Config) -> dict[str, Any]:
    """What the numbers of a run depend on."""
    free = ("steps", "minutes", "logdir", "resume", "checkpoint_every", "cuda_graph")
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in free}


def main() -> None:
    presets = {"published": ("The author's settings for 1M parameters.", PUBLISHED), "cpu": ("Classic control.", CPU)}
    config = tyro.extras.overridable_config_cli(presets, description=__doc__)
    for name in ("envs", "batch", "length", "horizon", "checkpoint_every"):
        if getattr(config, name) < 1:
            raise SystemExit(f"--{name.replace('_', '-')} must be at least 1, got {getattr(config, name)}.")
    torch.set_num_threads(config.threads or torch.get_num_threads())
    config.logdir.mkdir(parents=True, exist_ok=True)
    if not config.resume:
        refuse_used(config.logdir)
    run = Run(config)
    if config.resume:
        run.load()
    try:
        run.train()
        run.save()
    except KeyboardInterrupt:
        print("\nInterrupted. --resume goes on from the last checkpoint.")
    run.draw()
    print(f"{run.step} steps, {run.updates} updates, {run.seconds / 60:.1f} minutes. Written to {config.logdir}.")
    print(f"Mean return of the last 20 episodes: {run.summary()['return']}")


if __name__ == "__main__":
    main()
