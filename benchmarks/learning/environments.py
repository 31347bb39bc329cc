"""Environments by name, through gymnasium: each step as a dict of what a replay keeps."""

import contextlib
import os
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box, Dict
from gymnasium.spaces import Discrete as DiscreteSpace
from torch import Tensor

from rlloss_nn.networks import Continuous, Discrete

#: Height and width of images.
PIXELS = 64


class Task:
    """One environment, whose episodes are seeded one by one: one that was cut off can be played again.

    That is exact for environments that draw from nothing but their own generator, as gymnasium asks of them.

    Args:
        name: a gymnasium name, or dmc:domain_task.
        image: render the environment, instead of its own observations.
        seed: of the run.
        index: of the environment in the run.
    """

    def __init__(self, name: str, *, image: bool, seed: int, index: int):
        self.env = make_env(name, image)
        self.seed, self.episode, self.actions = (seed, index), 0, list[Tensor]()
        seen, self.box = self.env.observation_space, self.env.action_space
        if not isinstance(seen, Box) or len(seen.shape) not in (1, 3):
            raise SystemExit(f"--task {name}: its observations must be vectors or images, got {seen}.")
        if not isinstance(self.box, (Box, DiscreteSpace)):
            raise SystemExit(f"--task {name}: its actions must be one choice or one vector, got {self.box}.")
        if isinstance(self.box, Box) and not self.box.is_bounded():
            raise SystemExit(f"--task {name}: its actions must have bounds, got {self.box}.")
        if len(seen.shape) == 3 and seen.dtype != np.uint8:
            raise SystemExit(f"--task {name}: its images must be of bytes, got {seen.dtype}.")
        self.key = "image" if len(seen.shape) == 3 else "vector"
        self.shape = (seen.shape[-1], PIXELS, PIXELS) if self.key == "image" else seen.shape
        self.dtype = torch.uint8 if self.key == "image" else torch.float32
        self.action: Discrete | Continuous = Continuous(int(np.prod(self.box.shape)))
        if isinstance(self.box, DiscreteSpace):
            self.action = Discrete(int(self.box.n))

    def reset(self) -> dict[str, Any]:
        """The first step of the next episode."""
        self.episode, self.actions = self.episode + 1, []
        seed = np.random.SeedSequence([*self.seed, self.episode]).generate_state(1)[0]
        observation, _ = self.env.reset(seed=int(seed))
        return self._step(observation, 0.0, is_first=True)

    def step(self, action: Tensor) -> dict[str, Any]:
        """The step that follows an action: one-hot for a choice, else a vector with [-1, 1] for the whole range."""
        self.actions.append(action)
        if isinstance(self.box, DiscreteSpace):
            taken: Any = int(action.argmax()) + int(self.box.start)
        else:
            share = (action.clamp(-1, 1).numpy().reshape(self.box.shape) + 1) / 2
            taken = (self.box.low + share * (self.box.high - self.box.low)).astype(self.box.dtype)
        observation, reward, terminated, truncated, _ = self.env.step(taken)
        return self._step(observation, float(reward), is_last=terminated or truncated, terminated=terminated)

    def play_again(self, episode: int, actions: list[Tensor]) -> dict[str, Any]:
        """The step after all these actions of an episode."""
        self.episode = episode - 1
        step = self.reset()
        for action in actions:
            step = self.step(action)
        return step

    def _step(self, observation: Any, reward: float, **flags: bool) -> dict[str, Any]:
        if self.key == "image":
            rows, columns = (np.arange(PIXELS) * size // PIXELS for size in observation.shape[:2])
            observation = observation[rows][:, columns].transpose(2, 0, 1)
        seen = torch.as_tensor(np.ascontiguousarray(observation), dtype=self.dtype)
        return {self.key: seen, "reward": reward, "is_first": False, "is_last": False, "terminated": False, **flags}


def make_env(name: str, image: bool) -> gymnasium.Env[Any, Any]:
    """An environment with one observation; images are [H, W, C]."""
    options: dict[str, Any] = {"render_mode": "rgb_array"} if image else {}
    try:
        if name.startswith("dmc:"):
            options |= {"render_kwargs": {"height": PIXELS, "width": PIXELS, "camera_id": 0}} if image else {}
            env = gymnasium.make(dm_control_name(name), **options)
        elif name.startswith("MiniGrid"):
            from minigrid.wrappers import ImgObsWrapper, RGBImgPartialObsWrapper

            return ImgObsWrapper(RGBImgPartialObsWrapper(gymnasium.make(name)))
        else:
            env = gymnasium.make(name, **options)
    except ImportError as error:
        raise SystemExit(f'--task {name} needs {error.name}: pip install -e ".[environments]"') from None
    except gymnasium.error.Error as error:
        raise SystemExit(f"Known tasks: {', '.join(known_tasks())}\n--task {name}: {error}") from None
    if image:
        return gymnasium.wrappers.AddRenderObservation(env, render_only=True)
    return gymnasium.wrappers.FlattenObservation(env) if isinstance(env.observation_space, Dict) else env


def dm_control_name(name: str) -> str:
    """The name gymnasium knows ``dmc:domain_task`` by; either part may have a "_" of its own."""
    if "DISPLAY" not in os.environ:
        os.environ.setdefault("MUJOCO_GL", "egl")
    import shimmy

    gymnasium.register_envs(shimmy)
    words = name.removeprefix("dmc:").split("_")
    splits = ["_".join(words[:i]) + "-" + "_".join(words[i:]) for i in range(1, len(words))]
    found = [f"dm_control/{split}-v0" for split in splits if f"dm_control/{split}-v0" in gymnasium.registry]
    if not found:
        raise gymnasium.error.NameNotFound(f"dm_control has no task {name.removeprefix('dmc:')}.")
    return found[0]


def known_tasks() -> list[str]:
    """Names of all that is registered, each in its newest version; those of dm_control, if installed, as dmc:..."""
    with contextlib.suppress(ImportError):
        import shimmy

        gymnasium.register_envs(shimmy)
    newest = {name.rpartition("-v")[0]: name for name in sorted(gymnasium.registry)}
    suite = {name for name in newest if name.startswith("dm_control/")}
    control = [f"dmc:{name.removeprefix('dm_control/').replace('-', '_')}" for name in sorted(suite)]
    return [*sorted(newest[name] for name in newest.keys() - suite), *(control or ["dmc:domain_task"])]
