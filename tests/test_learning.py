"""The agent that learns: its replay, its update and what an interruption leaves of a run."""

# ruff: noqa: E402, where the extra is missing the imports would fail

import dataclasses

import pytest
import torch
from torch.utils._pytree import tree_flatten, tree_map

for needed in ("gymnasium", "matplotlib", "tensorboard", "tqdm", "tyro"):
    pytest.importorskip(needed, reason='the extra "learning" is not installed')

import gymnasium
import numpy as np
from gymnasium.spaces import Box, MultiDiscrete
from gymnasium.spaces import Discrete as DiscreteSpace
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.learning import dreamer_v3, environments, records
from benchmarks.learning.dreamer_v3 import Config, Replay, Run, make_batch
from benchmarks.learning.environments import Task
from benchmarks.learning.updates import capture, captured, make_update

TINY = Config(
    envs=2, train_ratio=2, batch=2, length=4, horizon=2, starts=2, prefill=20, deter=16, hidden=8, stoch=2, classes=4,
    units=8, learning_rate=1e-3, warmup=0, checkpoint_every=20, threads=1,
)  # fmt: skip
ENTRIES = {"reward": ((), torch.float32), "deter": ((3,), torch.float32), "stoch": ((2,), torch.int16)}


def filled(count, capacity=100, envs=2, length=4):
    """A replay whose rewards say which step of which environment they are."""
    replay = Replay(ENTRIES, envs, capacity, length)
    for t in range(count):
        replay.add({"reward": torch.arange(envs) * 1000.0 + t, "deter": torch.zeros(envs, 3)})
    return replay


def drained(replay, generator):
    while replay.online:
        replay.sample(1, generator)
    return replay


def test_sequences_are_consecutive_steps_of_one_environment():
    generator = torch.Generator().manual_seed(0)
    batch, _ = filled(30).sample(64, generator)
    assert batch["reward"].shape == (64, 4)
    assert torch.equal(batch["reward"].diff(dim=1), torch.ones(64, 3))
    assert set((batch["reward"] // 1000).flatten().tolist()) == {0.0, 1.0}


def test_every_start_is_drawn_alike():
    generator = torch.Generator().manual_seed(0)
    batch, _ = drained(filled(13), generator).sample(20_000, generator)
    counts = torch.bincount((batch["reward"][:, 0] % 1000).long())
    assert counts.shape == (10,)
    assert counts.min() > 0.9 * 2_000


def test_new_sequences_go_first():
    batch, _ = filled(8).sample(5, torch.Generator().manual_seed(0))
    assert batch["reward"][:4, 0].tolist() == [0.0, 1000.0, 4.0, 1004.0]


def test_what_is_overwritten_is_never_drawn():
    generator = torch.Generator().manual_seed(0)
    replay = filled(57, capacity=20)
    batch, _ = replay.sample(500, generator)
    assert (batch["reward"][:, 0] % 1000).min() == 47.0
    assert torch.equal(batch["reward"].diff(dim=1), torch.ones(500, 3))


def test_latents_are_written_where_they_were_read():
    replay = filled(10)
    _, (env, index) = replay.sample(3, torch.Generator().manual_seed(0))
    deter = torch.randn(3, 3, 3)
    stoch = torch.nn.functional.one_hot(torch.randint(4, (3, 3, 2)), 4).float()
    replay.write_back((env, index[:, 1:]), dreamer_v3.RSSMState(deter, stoch))
    for i in range(3):
        assert torch.equal(replay.data["deter"][env[i], index[i, 1:]], deter[i])
        assert torch.equal(replay.data["stoch"][env[i], index[i, 1:]].long(), stoch[i].argmax(-1))


def test_the_picture_ends_where_an_episode_does(run):
    run.replay.data["is_first"][0, run.replay.count - 1] = True
    real, predicted, seen = run.open_loop()
    assert real.shape == predicted.shape == (seen + 1, 4) or len(real) == run.config.length - 1


@pytest.fixture
def run(tmp_path):
    run = Run(dataclasses.replace(TINY, steps=40, logdir=tmp_path))
    run.train()
    return run


def batch_of(run):
    generator = torch.Generator().manual_seed(1)
    sequences, _ = run.replay.sample(2, torch.Generator().manual_seed(0))
    return sequences, *make_batch(sequences, run.agent, run.config, generator)


def test_a_batch_pairs_each_observation_with_the_action_before_it(run):
    sequences, batch, noise = batch_of(run)
    assert torch.equal(batch["observation"]["vector"], sequences["vector"][:, 1:])
    assert torch.equal(batch["action"], sequences["action"][:, :-1].flatten(2))
    assert torch.equal(batch["state"].deter, sequences["deter"][:, 0])
    assert noise["dynamics"].shape == (4, 2, 2, 4)


def test_an_episode_that_was_abandoned_is_marked_as_ended(run):
    sequences, _, _ = batch_of(run)
    false = torch.zeros(2, 5, dtype=torch.bool)
    first = false.index_fill(1, torch.tensor(3), True)
    sequences = {**sequences, "is_first": first, "is_last": false}
    batch, _ = make_batch(sequences, run.agent, run.config, torch.Generator().manual_seed(1))
    assert batch["is_last"].tolist() == [[False, True, False, False]] * 2


def test_the_update_is_a_function(run):
    _, batch, noise = batch_of(run)
    before = tree_map(torch.clone, (run.learner, batch, noise))
    first, _ = run.update(run.learner, batch, noise)
    second, _ = run.update(run.learner, batch, noise)
    torch.testing.assert_close(tree_flatten(first)[0], tree_flatten(second)[0], rtol=0, atol=0)
    after = (run.learner, batch, noise)
    torch.testing.assert_close(tree_flatten(after)[0], tree_flatten(before)[0], rtol=0, atol=0, equal_nan=True)
    moved = [not torch.equal(a, b) for a, b in zip(tree_flatten(first)[0], tree_flatten(run.learner)[0], strict=True)]
    assert sum(moved) > len(moved) / 2


def test_the_update_with_its_optimiser_can_be_one_graph(run):
    _, batch, noise = batch_of(run)
    torch.compiler.reset()
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        compiled = torch.compile(run.update, fullgraph=True, backend="aot_eager")
        arguments = run.learner, batch, noise
        torch.testing.assert_close(compiled(*arguments), run.update(*arguments))


def same(a, b):
    torch.testing.assert_close(tree_flatten(a)[0], tree_flatten(b)[0], rtol=0, atol=0)


class Recording:
    """A graph for a CPU: a replay runs what was recorded, into the tensors that recording has put out."""

    def record(self, function):
        for _ in range(3):  # a warm-up, as on a GPU
            function()
        self.function, self.outputs = function, function()
        return self.outputs

    def replay(self):
        for old, new in zip(tree_flatten(self.outputs)[0], tree_flatten(self.function())[0], strict=True):
            old.copy_(new)


def test_a_captured_update_is_the_update(run):
    arguments = [batch_of(run)[1:]]
    arguments.append(tree_map(lambda x: x.clone() if x.dtype != torch.float32 else 0.9 * x, arguments[0]))
    learner, replay = run.learner, capture(run.update, run.learner, *arguments[0], graph=Recording)
    before, own, seen = tree_map(torch.clone, run.learner), run.learner, []
    for batch, noise in (*arguments, *arguments):
        learner, wanted = run.update(learner, batch, noise)
        own, metrics = replay(own, batch, noise)
        same(own, learner)
        same(metrics, wanted)
        seen.append(float(metrics["losses"]["reco"]))
    same(run.learner, before)
    assert len(set(seen)) == 4
    # Another learner, as of a checkpoint, goes on from where it is.
    after, _ = replay(before, *arguments[0])
    same(after, run.update(before, *arguments[0])[0])
    same(run.learner, before)


def test_a_captured_update_keeps_to_its_shapes(run):
    _, batch, noise = batch_of(run)
    replay = capture(run.update, run.learner, batch, noise, graph=Recording)
    with pytest.raises(ValueError, match=r"takes the shapes it was captured with: .*\[2, 4\]\), got .*\[2, 3\]"):
        replay(run.learner, {**batch, "reward": batch["reward"][:, 1:]}, noise)


def test_a_run_with_a_captured_update_is_the_same(tmp_path, run):
    other = Run(dataclasses.replace(run.config, logdir=tmp_path / "captured"))
    other.config.logdir.mkdir()
    other.update = captured(other.update, graph=Recording)
    other.train()
    same(other.learner, run.learner)
    same(other.replay.data, run.replay.data)
    assert curve(other) == curve(run)


class NoQuestions(TorchDispatchMode):
    """Refuses what would make the host wait for a device."""

    waits = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2", "lift_fresh")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        assert name not in self.waits, name
        indices = args[1] if name in ("index", "index_put_") else ()
        assert all(x is None or x.dtype != torch.bool for x in indices), name
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_update_waits_for_nothing(run, dtype):
    _, batch, noise = batch_of(run)
    update = make_update(run.agent, dataclasses.replace(run.config, dtype=dtype))
    with NoQuestions():
        update(run.learner, batch, noise)
        with pytest.raises(AssertionError, match="_local_scalar_dense"):
            float(batch["reward"].sum())


def test_in_bfloat16_only_the_products_are(run):
    _, batch, noise = batch_of(run)
    update = make_update(run.agent, dataclasses.replace(run.config, dtype="bfloat16"))
    (learner, metrics), (_, wanted) = update(run.learner, batch, noise), run.update(run.learner, batch, noise)
    dtypes = {x.dtype for x in tree_flatten((learner, metrics))[0]}
    assert dtypes == {torch.float32, torch.int64}
    assert metrics["losses"]["reco"] != wanted["losses"]["reco"]
    torch.testing.assert_close(metrics["losses"], wanted["losses"], rtol=0.05, atol=0.02)
    same(update(run.learner, batch, noise), (learner, metrics))


def curve(run):
    return [{name: x for name, x in row.items() if name != "seconds"} for row in run.rows]


def interrupted(config, step):
    """A run that ends at once when it gets to a step."""
    run = Run(config)
    update = run.update

    def until(*arguments):
        if run.step >= step:
            raise KeyboardInterrupt
        return update(*arguments)

    run.update = until
    with pytest.raises(KeyboardInterrupt):
        run.train()


@pytest.mark.parametrize(
    ("task", "dtype"), [("CartPole-v1", "float32"), ("Pendulum-v1", "float32"), ("CartPole-v1", "bfloat16")]
)
def test_a_run_goes_on_as_if_it_had_not_been_interrupted(tmp_path, task, dtype):
    settings = {"task": task, "dtype": dtype, "steps": 160, "checkpoint_every": 40}
    config = dataclasses.replace(TINY, **settings, logdir=tmp_path / "whole")
    whole, other = Run(config), dataclasses.replace(config, logdir=tmp_path / "cut")
    for folder in (config.logdir, other.logdir):
        folder.mkdir()
    whole.train()
    interrupted(other, 94)
    resumed = Run(other)
    resumed.load()
    assert resumed.step == 80
    resumed.train()
    assert curve(resumed) == curve(whole)
    assert len(curve(whole)) > 0 or task == "Pendulum-v1"
    torch.testing.assert_close(tree_flatten(resumed.learner)[0], tree_flatten(whole.learner)[0], rtol=0, atol=0)
    lines = [(folder / "metrics.csv").read_text().splitlines() for folder in (config.logdir, other.logdir)]
    assert [line.rpartition(",")[0] for line in lines[0]] == [line.rpartition(",")[0] for line in lines[1]]


def test_a_checkpoint_cut_off_gives_way_to_the_one_before(tmp_path, capsys):
    for number in (1, 2):
        records.write_checkpoint(tmp_path, {"settings": {"seed": 0}, "number": number})
    whole = (tmp_path / "checkpoint.pt").read_bytes()
    (tmp_path / "checkpoint.pt").write_bytes(whole[: len(whole) // 2])
    assert records.read_checkpoint(tmp_path, {"seed": 0})["number"] == 1
    assert "checkpoint.pt is not a whole checkpoint" in capsys.readouterr().out
    records.write_checkpoint(tmp_path, {"settings": {"seed": 0}, "number": 3})
    assert records.read_checkpoint(tmp_path, {"seed": 0})["number"] == 3
    assert (tmp_path / "checkpoint.damaged").exists()


def test_a_part_that_was_changed_is_noticed(tmp_path):
    for number in (1, 2):
        records.write_checkpoint(tmp_path, {"settings": {}, "x": torch.full((1000,), float(number))})
    whole = bytearray((tmp_path / "checkpoint.pt").read_bytes())
    whole[len(whole) // 2] ^= 1
    (tmp_path / "checkpoint.pt").write_bytes(whole)
    assert records.read_checkpoint(tmp_path, {})["x"][0] == 1.0


@pytest.mark.parametrize("name", ["checkpoint.pt", "previous.pt", "metrics.csv"])
def test_a_folder_with_a_run_is_not_written_over(tmp_path, name):
    records.refuse_used(tmp_path)
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(SystemExit, match=f"has {name} of a run in it"):
        records.refuse_used(tmp_path)


def test_there_is_a_checkpoint_from_the_first_step_on(tmp_path, monkeypatch):
    config = dataclasses.replace(TINY, steps=20, logdir=tmp_path)
    killed = Run(config)
    monkeypatch.setattr(killed, "choose", None)
    with pytest.raises(TypeError):
        killed.train()
    resumed = Run(config)
    resumed.load()
    assert resumed.step == 0


@pytest.mark.parametrize("call", ["torch.save", "os.fsync", "os.link", "os.replace"])
def test_a_checkpoint_is_whole_wherever_writing_the_next_one_stops(tmp_path, monkeypatch, call):
    for number in range(2):
        records.write_checkpoint(tmp_path, {"settings": {}, "number": number})

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(call, stop)
        with pytest.raises(KeyboardInterrupt):
            records.write_checkpoint(tmp_path, {"settings": {}, "number": 2})
    assert records.read_checkpoint(tmp_path, {})["number"] == 1


def test_no_checkpoint_is_said(tmp_path):
    with pytest.raises(SystemExit, match="there is no whole checkpoint in"):
        records.read_checkpoint(tmp_path, {})


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    records.write_checkpoint(tmp_path, {"settings": {"seed": 0, "batch": 16}})
    with pytest.raises(SystemExit, match=r"with other settings than those of .*: it has batch 16, not 8"):
        records.read_checkpoint(tmp_path, {"seed": 0, "batch": 8})


def test_an_unknown_task_is_refused_with_those_there_are():
    with pytest.raises(SystemExit, match=r"(?s)Known tasks: .*CartPole-v1.*dmc:.*--task Cartpole-v9: "):
        Task("Cartpole-v9", image=False, seed=0, index=0)


def test_a_task_that_does_not_fit_is_refused():
    with pytest.raises(SystemExit, match="its observations must be vectors or images, got Discrete"):
        Task("FrozenLake-v1", image=False, seed=0, index=0)


class Toy(gymnasium.Env):
    """Whatever spaces it is given."""

    def __init__(self, observation, action):
        self.observation_space, self.action_space = observation, action

    def reset(self, *, seed=None, options=None):
        return np.zeros(self.observation_space.shape, self.observation_space.dtype), {}

    def step(self, action):
        self.taken = action
        return (*self.reset()[:1], 0.0, False, False, {})


def toy(monkeypatch, observation, action):
    monkeypatch.setattr(environments, "make_env", lambda name, image: Toy(observation, action))
    return Task("toy", image=False, seed=0, index=0)


VECTOR, IMAGE = Box(-1.0, 1.0, (2,)), Box(0, 255, (8, 9, 3), np.uint8)


def test_choices_are_counted_from_where_they_start(monkeypatch):
    task = toy(monkeypatch, VECTOR, DiscreteSpace(3, start=5))
    task.step(torch.tensor([[0.0, 1.0, 0.0]]))
    assert task.env.taken == 6


def test_images_become_channels_first_squares(monkeypatch):
    step = toy(monkeypatch, IMAGE, VECTOR).reset()
    assert step["image"].shape == (3, 64, 64)
    assert step["image"].dtype == torch.uint8


@pytest.mark.parametrize(
    ("observation", "action", "match"),
    [
        (VECTOR, Box(-np.inf, np.inf, (2,)), "its actions must have bounds"),
        (VECTOR, MultiDiscrete([2, 3]), "its actions must be one choice or one vector"),
        (Box(0.0, 1.0, (8, 8, 3)), VECTOR, "its images must be of bytes, got float32"),
    ],
)
def test_spaces_that_cannot_be_served_are_refused(monkeypatch, observation, action, match):
    with pytest.raises(SystemExit, match=match):
        toy(monkeypatch, observation, action)


@pytest.mark.parametrize("name", ["cartpole_swingup", "point_mass_easy", "ball_in_cup_catch"])
def test_names_of_dm_control(name):
    pytest.importorskip("dm_control", reason='the extra "environments" is not installed')
    pytest.importorskip("shimmy", reason='the extra "environments" is not installed')
    assert environments.dm_control_name(f"dmc:{name}") in gymnasium.registry


def test_an_action_of_one_is_the_upper_end_of_its_range():
    task = Task("Pendulum-v1", image=False, seed=0, index=0)
    task.reset()
    taken = []
    step = task.env.step
    task.env.step = lambda action: taken.append(float(action[0])) or step(action)
    for share in (1.0, -1.0, 0.5, 7.0):
        task.step(torch.tensor([share]))
    assert taken == [2.0, -2.0, 1.0, 2.0]


def test_a_run_on_images(tmp_path, monkeypatch):
    class Screen(Toy):
        """Noise, for seven steps."""

        def reset(self, *, seed=None, options=None):
            self.count, self.noise = 0, np.random.default_rng(seed)
            return self.see(), {}

        def see(self):
            return self.noise.integers(0, 256, self.observation_space.shape, np.uint8)

        def step(self, action):
            self.count += 1
            return self.see(), 1.0, self.count == 7, False, {}

    monkeypatch.setattr(environments, "make_env", lambda name, image: Screen(IMAGE, DiscreteSpace(2)))
    config = dataclasses.replace(TINY, task="screen", depth=2, steps=30, logdir=tmp_path)
    run = Run(config)
    run.train()
    assert run.updates > 0
    assert [row["return"] for row in run.rows] == [7.0] * len(run.rows)
    real, predicted, seen = run.open_loop()
    assert real.shape[1:] == predicted.shape[1:] == (3, 64, 64)
    assert seen < len(predicted) <= len(real)
    run.draw()
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_the_picture_is_drawn(run):
    run.draw()
    assert (run.config.logdir / "picture.png").stat().st_size > 10_000
