"""The agent: what it does in an environment, and that its functional form is the same agent."""

from functools import partial

import pytest
import torch
from torch.utils._pytree import tree_flatten, tree_map

import rlloss
from rlloss_nn import functionalize
from rlloss_nn.networks import SIZES, Actor, Agent, Continuous, Discrete, RSSMState

SMALL = {"deter": 16, "hidden": 8, "stoch": 3, "classes": 4, "units": 8, "layers": 1, "num_reward_bins": 7}
ACTIONS = {
    "choice": Discrete(3),
    "choices": Discrete(3, groups=2),
    "vector": Continuous(2),
    "both": {"steer": Continuous(2), "jump": Discrete(3)},
}


@pytest.fixture(params=ACTIONS)
def agent(request):
    return Agent((5,), ACTIONS[request.param], num_value_bins=7, **SMALL).double()


def randomised(agent):
    """The same agent with heads that are not zero any more."""
    with torch.no_grad():
        for p in agent.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return agent


def make_batch(agent, size=2, length=4):
    noise = agent.noise(size, length)
    false = torch.zeros(size, length, dtype=torch.bool)
    return {
        "observation": torch.randn(size, length, 5).double(),
        "action": torch.randn(size, length, agent.action_dim).double(),
        "reward": torch.randn(size, length).double(),
        "is_first": false.clone().index_fill(1, torch.tensor(0), True),
        "terminated": false,
        "is_last": false,
        "noise": noise["latent"],
    }


def rollout_noise(agent, rows, horizon):
    noise = agent.noise(rows, horizon + 1)
    return {"policy": noise["policy"], "dynamics": noise["latent"][:, :-1]}


def test_the_smallest_size_has_as_many_parameters_as_the_authors():
    # pytorch/rl#4216: 640,867 in the author's program for the walker of dm_control.
    shapes = {"orientations": (14,), "height": (), "velocity": (9,)}
    agent = Agent(shapes, Continuous(6), **SIZES["1m"])
    assert sum(p.numel() for p in agent.parameters()) == 640_867


def test_sizes_are_named_by_their_parameters():
    with torch.device("meta"):
        counts = {name: Agent({"image": (3, 64, 64)}, Discrete(18), **size) for name, size in SIZES.items()}
    for name, agent in counts.items():
        millions = sum(p.numel() for p in agent.parameters()) / 1e6
        assert 0.5 * float(name[:-1]) < millions < 1.25 * float(name[:-1])


def test_acting_is_a_function_of_its_arguments(agent, variant):
    act, params = functionalize(randomised(agent), method="act")
    params = tree_map(torch.detach, params)
    memory, noise = agent.initial(3), agent.noise(3)
    observation, is_first = torch.randn(3, 5).double(), torch.tensor([True, False, True])

    def run(params, state, action, observation, is_first, noise):
        return act(params, type(memory)(RSSMState(*state), action), observation, is_first, noise)

    arguments = (params, tuple(memory.state), memory.action, observation, is_first, noise)
    after, action = variant(run)(*arguments)
    wanted, wanted_action = agent.act(memory, observation, is_first, noise)
    torch.testing.assert_close(action, wanted_action)
    torch.testing.assert_close(tree_flatten(after)[0], tree_flatten(wanted)[0])
    assert after.action.shape == (3, agent.action_dim)


def test_acting_draws_nothing(agent):
    noise, before = agent.noise(1), torch.random.get_rng_state()
    agent.act(agent.initial(1), torch.zeros(1, 5).double(), torch.tensor([True]), noise)
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_first_step_forgets(agent):
    memory = tree_map(lambda x: torch.full_like(x, torch.nan), agent.initial(2))
    observation, noise = torch.randn(2, 5).double(), agent.noise(2)
    first = torch.ones(2, dtype=torch.bool)
    after, _ = agent.act(memory, observation, first, noise)
    wanted, _ = agent.act(agent.initial(2), observation, first, noise)
    torch.testing.assert_close(tree_flatten(after)[0], tree_flatten(wanted)[0])


def test_acting_step_by_step_is_observing_a_sequence(agent):
    agent = randomised(agent)
    batch = make_batch(agent)
    memory, states, actions = agent.initial(2), [], []
    for t in range(4):
        noise = {"latent": batch["noise"][:, t], "policy": tree_map(torch.zeros_like, agent.noise(2)["policy"])}
        memory, _ = agent.act(memory, batch["observation"][:, t], batch["is_first"][:, t], noise)
        states.append(memory.state.deter)
        actions.append(memory.action)
    before = torch.stack([torch.zeros_like(actions[0]), *actions[:-1]], 1)
    observed = agent.observe({**batch, "action": before})
    torch.testing.assert_close(observed["state"].deter, torch.stack(states, 1))


def test_imagining_follows_actor_and_model(agent):
    agent = randomised(agent)
    start, noise = agent.initial(3).state, rollout_noise(agent, 3, 2)
    rollout = agent.imagine(start, noise, horizon=2)
    state = start
    for t in range(2):
        action = rlloss.policy_sample(agent.policy(state), tree_map(lambda x, t=t: x[:, t], noise["policy"]))
        taken = tree_map(lambda x, t=t: x[:, t], rollout.actions)
        torch.testing.assert_close(taken, action)
        state = agent.world_model.imagine_step(state, agent.flatten_action(action), noise["dynamics"][:, t])
        torch.testing.assert_close(rollout.states.deter[:, t + 1], state.deter)
    assert rollout.states.stoch.shape == (3, 3, 3, 4)


def test_functional_agent_is_this_agent(agent):
    agent = randomised(agent)
    functions, params = agent.functional()
    batch, rows = make_batch(agent), 2 * 4
    outputs = functions.world_model(params["world_model"], batch)
    own = agent.observe(batch)
    torch.testing.assert_close(outputs["reward"], own["reward"])
    torch.testing.assert_close(tuple(outputs["state"]), tuple(own["state"]))
    torch.testing.assert_close(functions.reward(params["world_model"], own["state"]), own["reward"])
    continuation = functions.continuation(params["world_model"], own["state"])
    torch.testing.assert_close(continuation, own["continue_logits"])
    torch.testing.assert_close(functions.critic(params["critic"], own["state"]), agent.value(own["state"]))
    policy = functions.actor(params["actor"], own["state"])
    torch.testing.assert_close(tree_flatten(policy)[0], tree_flatten(agent.policy(own["state"]))[0])
    assert rollout_noise(agent, rows, 1)["dynamics"].shape == (rows, 1, 3, 4)


def test_the_whole_objective_trains_every_parameter(agent):
    agent = randomised(agent)
    functions, params = agent.functional()
    state = rlloss.DreamerV3State(params["critic"], rlloss.return_range_init(dtype=torch.float64))
    batch, noise = make_batch(agent), rollout_noise(agent, 2 * 4, 3)
    loss, aux, _ = rlloss.dreamer_v3_loss(
        params, state, batch, noise, agent=functions, horizon=3, num_reward_bins=7, lambda_actor=100.0, free_bits=0.0
    )
    loss.backward()
    assert aux["losses"]["actor"].isfinite()
    untouched = [name for name, p in agent.named_parameters() if p.grad is None or not p.grad.any()]
    assert untouched == []


@pytest.fixture
def unwatched():
    """No check of operations at their first call, which makes it seem other than later ones."""
    with torch._functorch.config.patch(check_custom_op_aliasing=False):
        yield


def test_a_compiled_rollout_is_the_rollout(agent, unwatched):
    agent = randomised(agent)
    functions, params = agent.functional(step_backend="aot_eager")
    start = tree_map(lambda x: torch.randn_like(x).requires_grad_(), agent.initial(3).state)
    noise = tree_map(lambda x: x.requires_grad_(), rollout_noise(agent, 3, 2))
    leaves = [*tree_flatten(params)[0], *start, *tree_flatten(noise["policy"])[0]]
    torch.compiler.reset()

    def run(rollout):
        tensors = tree_flatten(tuple(rollout()))[0]
        total = sum((x * torch.linspace(-1, 1, x.numel()).view_as(x)).sum() for x in tensors)
        return tensors, torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)

    compiled = torch.compile(functions.rollout, backend="aot_eager", fullgraph=True)
    wanted = run(lambda: agent.imagine(start, noise, horizon=2))
    assert len(wanted[0]) == 2 + len(agent.spaces)
    assert wanted[0][0].shape == (3, 3, 16)
    torch.testing.assert_close(run(lambda: compiled(params, start, noise, 2)), wanted)
    torch.testing.assert_close(run(lambda: functions.rollout(params, start, noise, 2)), wanted, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"noise\['policy'\] must be of 4 steps in dimension 1"):
        functions.rollout(params, start, noise | {"dynamics": torch.zeros(3, 3, 3, 4)}, 3)


def test_a_compiled_rollout_is_one_operation(agent, counting_backend):
    functions, params = agent.functional(step_backend="eager")
    start, noise = agent.initial(3).state, rollout_noise(agent, 3, 4)
    torch.compiler.reset()
    backend, graphs = counting_backend
    compiled = torch.compile(functions.rollout, backend=backend, fullgraph=True)
    assert compiled(params, start, noise, 4).states.deter.shape == (3, 5, 16)
    (graph,) = graphs
    assert [node.target for node in graph.graph.nodes].count(torch.ops.rlloss_nn.loop.default) == 1


def test_agents_are_compiled_one_after_another(unwatched):
    torch.compiler.reset()
    for sizes in (SMALL, SMALL, {**SMALL, "hidden": 6}):
        agent = randomised(Agent((5,), Continuous(2), num_value_bins=7, **sizes))
        functions, params = agent.functional(step_backend="eager")
        start, noise = agent.initial(3).state, rollout_noise(agent, 3, 2)

        def imagined(params, start, noise, functions=functions):
            return functions.rollout(params, start, noise, 2)

        compiled = torch.compile(imagined, backend="eager", fullgraph=True)
        torch.testing.assert_close(tuple(compiled(params, start, noise)), tuple(imagined(params, start, noise)))


@pytest.mark.parametrize("name", ["dynamics", "policy"])
@pytest.mark.parametrize("compiling", [False, True])
def test_noise_that_a_rollout_lacks_is_named(agent, name, compiling, monkeypatch):
    functions, params = agent.functional(step_backend="eager")
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    given = rollout_noise(agent, 3, 2)
    for noise in (given | {name: None}, {other: x for other, x in given.items() if other != name}):
        with pytest.raises(TypeError, match=r"noise.* must be"):
            functions.rollout(params, agent.initial(3).state, noise, 2)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_the_compiled_objective_is_the_same(autocast, unwatched):
    agent, outcomes = randomised(Agent((5,), ACTIONS["both"], num_value_bins=7, **SMALL)), []
    agent, tolerance = (agent.double(), {}) if autocast is None else (agent, {"rtol": 0.1, "atol": 0.1})
    dtype = next(agent.parameters()).dtype
    batch, noise = make_batch(agent, length=3), rollout_noise(agent, 2 * 3, 2)
    torch.compiler.reset()
    for step_backend in (None, "aot_eager"):
        functions, params = agent.functional(step_backend=step_backend, autocast=autocast)
        state = rlloss.DreamerV3State(params["critic"], rlloss.return_range_init(dtype=dtype))
        objective = partial(rlloss.dreamer_v3_loss, agent=functions, horizon=2, num_reward_bins=7)
        if step_backend is not None:
            objective = torch.compile(objective, backend="aot_eager", fullgraph=True)
        loss, aux, state = objective(params, state, batch, noise)
        grads = torch.autograd.grad(loss, tree_flatten(params)[0])
        outcomes.append(tree_flatten([loss, aux["losses"], aux["targets"], tuple(state.return_range), grads])[0])
    torch.testing.assert_close(outcomes[1], outcomes[0], **tolerance)
    with torch.compiler.set_stance("fail_on_recompile"):
        objective(params, rlloss.DreamerV3State(params["critic"], state.return_range), batch, noise)


def test_autocast_is_for_the_products_of_the_networks_alone():
    agent = randomised(Agent((5,), ACTIONS["both"], num_value_bins=7, **SMALL))
    batch, noise, outcomes = tree_map(lambda x: x.float() if x.is_floating_point() else x, make_batch(agent)), [], []
    noise = rollout_noise(agent, 2 * 4, 2)
    for autocast in (None, torch.bfloat16):
        functions, params = agent.functional(autocast=autocast)
        state = rlloss.DreamerV3State(params["critic"], rlloss.return_range_init())
        outcome = rlloss.dreamer_v3_loss(params, state, batch, noise, agent=functions, horizon=2, num_reward_bins=7)
        grads = torch.autograd.grad(outcome[0], tree_flatten(params)[0])
        assert {x.dtype for x in tree_flatten((outcome, grads))[0]} == {torch.float32}
        outcomes.append(outcome[1]["losses"])
    assert outcomes[0]["reco"] != outcomes[1]["reco"]
    for name, loss in outcomes[0].items():
        torch.testing.assert_close(outcomes[1][name], loss, rtol=0.05, atol=0.02, msg=name)


def test_actions_are_concatenated_in_the_order_of_their_names():
    agent = Agent((5,), {"b": Continuous(2), "a": Discrete(2)}, **SMALL)
    action = {"b": torch.tensor([[3.0, 4.0]]), "a": torch.tensor([[[0.0, 1.0]]])}
    assert agent.flatten_action(action).tolist() == [[0.0, 1.0, 3.0, 4.0]]


def test_noise_comes_from_the_generator_alone(agent):
    before = torch.random.get_rng_state()
    first, second = (agent.noise(2, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    torch.testing.assert_close(tree_flatten(first)[0], tree_flatten(second)[0], rtol=0, atol=0)
    assert torch.equal(before, torch.random.get_rng_state())


def test_noise_has_the_distribution_its_name_says():
    agent = Agent((5,), {"turn": Continuous(1), "jump": Discrete(2)}, **SMALL)
    noise = agent.noise(20_000)
    assert noise["policy"]["turn"].mean().abs() < 0.03
    # Mean of a Gumbel variable: Euler's constant; variance: pi^2 / 6.
    for gumbel in (noise["latent"], noise["policy"]["jump"]):
        assert abs(gumbel.mean() - 0.5772) < 0.03
        assert abs(gumbel.var() - 1.6449) < 0.05


@pytest.mark.parametrize(
    ("actions", "error", "match"),
    [
        ({}, ValueError, r"Agent: actions must be at least one action, got none"),
        (3, TypeError, r"Agent: actions must be a Discrete, a Continuous or a mapping of them, got"),
        ({"jump": 3}, TypeError, r"Agent: jump must be a Discrete"),
        (Discrete(0), ValueError, r"Agent: classes must be"),
        (Continuous(0), ValueError, r"Agent: size must be"),
    ],
)
def test_impossible_actions_are_refused(actions, error, match):
    with pytest.raises(error, match=match):
        Agent((5,), actions, **SMALL)


def test_a_missing_action_is_named():
    agent = Agent((5,), {"b": Continuous(2), "a": Discrete(2)}, **SMALL)
    with pytest.raises(KeyError, match=r"Agent\.flatten_action: action must .*'a'"):
        agent.flatten_action({"b": torch.zeros(1, 2)})


def test_missing_noise_is_named(agent):
    with pytest.raises(KeyError, match=r"Agent\.act: noise must .*'latent'"):
        agent.act(agent.initial(1), torch.zeros(1, 5).double(), torch.tensor([True]), {})


def test_wrong_features_are_refused():
    with pytest.raises(ValueError, match=r"Actor: features must"):
        Actor(4, Discrete(2))(torch.zeros(3, 5))


def test_unimix_bounds_the_choices():
    actor = Actor(4, Discrete(2), unimix=0.5, outscale=100.0)
    probability = actor(torch.randn(50, 4)).logits.softmax(-1)
    assert probability.min() >= 0.25 - 1e-6
