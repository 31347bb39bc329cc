"""Random network distillation as torch modules."""

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torch.func import grad, jvp, vmap

import rlloss
from rlloss_nn import RNDLoss, RNDReward, RunningMeanStd
from rlloss_nn.networks import RNDConvNetwork

OBS, FEATURES = 4, 6


class Spy(nn.Module):
    """A network that remembers what it was given, and in which mode it was."""

    def __init__(self, inputs=OBS):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(inputs, 8), nn.Tanh(), nn.Linear(8, FEATURES))
        self.inputs, self.modes = [], []

    def forward(self, x):
        self.inputs.append(x.detach())
        self.modes.append(self.training)
        return self.layers(x)


def networks(inputs=OBS):
    return Spy(inputs), Spy(inputs)


def batch(*size, inputs=OBS):
    return TensorDict({"next": {"observation": torch.randn(*size, inputs)}}, size)


def params_of(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def stats(inputs=OBS):
    state = rlloss.running_mean_std_init((inputs,))
    return rlloss.running_mean_std_update(state, 3 + 2 * torch.randn(40, inputs))


class TorchrlStatistics(nn.Module):
    """What torchrl's class looks like from outside: float32 throughout, a normalize of its own."""

    def __init__(self, state):
        super().__init__()
        for name, value in state._asdict().items():
            self.register_buffer(name, value.float())


# The loss


def test_the_example_that_users_know():
    import torch
    import torch.nn as nn
    from tensordict import TensorDict

    from rlloss_nn import RNDLoss

    predictor = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64))
    target = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64))
    loss_fn = RNDLoss(predictor, target)
    batch = TensorDict({"next": {"observation": torch.randn(32, 4)}}, [32])
    loss_td = loss_fn(batch)
    loss_td["loss_predictor"].backward()

    assert loss_td.batch_size == torch.Size([])
    assert list(loss_td.keys()) == ["loss_predictor"]
    assert all(p.grad.any() for p in predictor.parameters())
    assert all(p.grad is None and not p.requires_grad for p in target.parameters())


def test_defaults():
    loss = RNDLoss(*networks())
    assert (loss.obs_rms, loss.obs_clip, loss.reduction, loss.update_fraction) == (None, 5.0, "mean", 0.25)
    assert loss.tensor_keys.observation == ("next", "observation")
    assert loss.default_keys().observation == ("next", "observation")
    assert loss.in_keys == [("next", "observation")]
    assert loss.out_keys == ["loss_predictor"]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("normalized", [False, True])
def test_values_and_gradients_are_those_of_the_pure_function(reduction, normalized):
    predictor, target = networks()
    rms = stats() if normalized else None
    loss = RNDLoss(predictor, target, obs_rms=rms, obs_clip=1.5, reduction=reduction, update_fraction=1)
    td = batch(10)
    value = loss(td)["loss_predictor"]
    value.sum().backward()

    def pure(params):
        return rlloss.rnd_loss(
            params,
            params_of(target),
            td["next", "observation"],
            predictor=lambda p, x: torch.func.functional_call(predictor, p, x),
            target=lambda p, x: torch.func.functional_call(target, p, x),
            obs_stats=rms,
            obs_clip=1.5,
            reduction=reduction,
        )

    assert torch.equal(value, pure(params_of(predictor)))
    gradient = grad(lambda p: pure(p).sum())(params_of(predictor))
    for name, p in predictor.named_parameters():
        torch.testing.assert_close(p.grad, gradient[name])
    assert all(p.grad is None for p in target.parameters())


@pytest.mark.parametrize("key", ["mean_p1_rms0", "mean_p1_rms1", "sum_p1_rms0", "sum_p1_rms1", "none_p1_rms1"])
def test_golden(golden, key):
    file = golden("10c_torchrl_rnd")
    make = lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 8)).double()  # noqa: E731
    predictor, target = make(), make()
    for network, name in ((predictor, "predictor"), (target, "target")):
        network.load_state_dict({k: file[f"rnd.in.{name}.{k}"] for k in network.state_dict()})
    rms = RunningMeanStd((4,), dtype=torch.float64)
    rms.update(file["rnd.in.rms_batch0"])
    rms.update(file["rnd.in.rms_batch1"])
    loss = RNDLoss(
        predictor,
        target,
        obs_rms=rms if "rms1" in key else None,
        reduction=key.partition("_")[0],
        update_fraction=1.0,
    )
    value = loss(TensorDict({"next": {"observation": file["rnd.in.obs"]}}, [10]))["loss_predictor"]
    # The reference computed in float32.
    torch.testing.assert_close(value, file[f"rnd.out.loss.{key}_std"], rtol=1e-5, atol=1e-7)
    if "none" not in key:
        value.backward()
        for name, p in predictor.named_parameters():
            torch.testing.assert_close(p.grad, file[f"rnd.grad.{key}_std.{name}"], rtol=1e-5, atol=1e-6)


@given(size=st.integers(0, 40), fraction=st.floats(0, 1))
def test_both_networks_run_on_exactly_the_rows_drawn(size, fraction):
    predictor, target = networks()
    td = batch(size)
    drawn = rlloss.rnd_key_mask(rlloss.random.key(0), size, fraction).shape[0]
    assert drawn in (math.ceil(fraction * size), math.ceil(fraction * size - 1e-9))
    value = RNDLoss(predictor, target, update_fraction=fraction, reduction="none")(td)["loss_predictor"]
    assert len(predictor.inputs) == len(target.inputs) == 1
    assert predictor.inputs[0].shape == (drawn, OBS)
    assert torch.equal(predictor.inputs[0], target.inputs[0])
    assert value.shape == (size,)
    assert int((value != 0).sum()) == drawn, "no row twice, and zeros where a row was not drawn"


def test_rows_are_rows_of_the_batch_and_their_errors_go_to_their_places():
    predictor, target = networks()
    td = batch(30)
    observation = td["next", "observation"]
    value = RNDLoss(predictor, target, reduction="none")(td)["loss_predictor"].detach()
    rows = [int((observation == row).all(-1).nonzero()) for row in predictor.inputs[0]]
    assert len(set(rows)) == 8
    every = RNDLoss(predictor, target, reduction="none", update_fraction=1)(td)["loss_predictor"].detach()
    expected = torch.zeros(30).index_copy(0, torch.tensor(rows), every[rows])
    torch.testing.assert_close(value, expected)


def test_draws_are_fresh_fair_and_follow_the_generator():
    predictor, target = networks()
    loss, td = RNDLoss(predictor, target, reduction="none"), batch(12)
    torch.manual_seed(3)
    first, second = loss(td)["loss_predictor"], loss(td)["loss_predictor"]
    torch.manual_seed(3)
    assert torch.equal(loss(td)["loss_predictor"], first)
    assert not torch.equal(first, second)
    times = sum((loss(td)["loss_predictor"] > 0).int() for _ in range(400))
    assert times.sum() == 400 * 3
    assert times.min() > 60
    assert times.max() < 140


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_mean_is_over_the_rows_drawn_and_sum_is_not_rescaled(reduction):
    predictor, target = networks()
    td = batch(20)
    torch.manual_seed(5)
    value = RNDLoss(predictor, target, reduction=reduction)(td)["loss_predictor"]
    torch.manual_seed(5)
    errors = RNDLoss(predictor, target, reduction="none")(td)["loss_predictor"]
    torch.testing.assert_close(value, errors.sum() / (5 if reduction == "mean" else 1))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("size", "fraction"), [(6, 0.0), (0, 0.25), (0, 1.0)])
def test_nothing_drawn_gives_zero_and_zero_gradients(reduction, size, fraction):
    predictor, target = networks()
    value = RNDLoss(predictor, target, reduction=reduction, update_fraction=fraction)(batch(size))["loss_predictor"]
    value.sum().backward()
    assert not value.any()
    assert all(p.grad is not None and not p.grad.any() for p in predictor.parameters())


def test_equal_networks_have_no_loss_and_no_gradient():
    predictor = Spy()
    value = RNDLoss(predictor, copy.deepcopy(predictor))(batch(8))["loss_predictor"]
    value.backward()
    assert value == 0
    assert not any(p.grad.any() for p in predictor.parameters())


def test_fraction_one_draws_nothing_from_the_generator():
    loss, td = RNDLoss(*networks(), update_fraction=1), batch(5)
    before = torch.get_rng_state()
    assert torch.equal(loss(td)["loss_predictor"], loss(td)["loss_predictor"])
    assert torch.equal(torch.get_rng_state(), before)


def test_all_batch_dimensions_count_as_samples():
    predictor, target = networks()
    td = batch(2, 3, 5)
    value = RNDLoss(predictor, target, reduction="none")(td)["loss_predictor"]
    assert predictor.inputs[0].shape == (8, OBS)
    assert value.shape == (2, 3, 5)
    assert int((value > 0).sum()) == 8
    every = RNDLoss(predictor, target, reduction="none", update_fraction=1)
    torch.testing.assert_close(every(td)["loss_predictor"].flatten(), every(td.reshape(-1))["loss_predictor"])


def test_images_in_sequences_reach_a_convolution_as_one_batch():
    make = lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2 * 9, FEATURES))  # noqa: E731
    loss = RNDLoss(make(), make(), reduction="none", update_fraction=1)
    frames = torch.randint(0, 256, (2, 3, 1, 5, 5), dtype=torch.uint8)
    td = TensorDict({"next": {"observation": frames}}, [2, 3])
    value = loss(td)["loss_predictor"]
    assert value.shape == (2, 3)
    as_floats = TensorDict({"next": {"observation": frames / 255}}, [2, 3])
    torch.testing.assert_close(loss(as_floats)["loss_predictor"], value)
    loss_fn, *params = loss.functional()
    torch.testing.assert_close(loss_fn(*params, td), value)


def test_dimensions_beyond_the_batch_size_stay_with_the_sample():
    """Several agents: one error each."""
    predictor, target = networks()
    td = TensorDict({"next": {"observation": torch.randn(8, 3, OBS)}}, [8])
    value = RNDLoss(predictor, target, reduction="none")(td)["loss_predictor"]
    assert predictor.inputs[0].shape == (2, 3, OBS)
    assert value.shape == (8, 3)
    assert int((value > 0).sum()) == 6


@pytest.mark.parametrize("shape", [(6,), (6, 3)])
def test_without_a_batch_size_the_first_dimension_is_the_batch(shape):
    predictor, target = networks()
    td = TensorDict({"next": {"observation": torch.randn(*shape, OBS)}}, [])
    value = RNDLoss(predictor, target, reduction="none", update_fraction=0.5)(td)["loss_predictor"]
    assert predictor.inputs[0].shape == (3, *shape[1:], OBS)
    assert value.shape == shape


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_single_observation(reduction):
    predictor, target = networks()
    td = batch()
    value = RNDLoss(predictor, target, reduction=reduction)(td)["loss_predictor"]
    assert value.shape == ()
    assert value > 0
    assert predictor.inputs[0].shape == (1, OBS)


def test_observations_may_be_nested():
    class TwoSensors(nn.Module):
        def __init__(self):
            super().__init__()
            self.near, self.far = nn.Linear(3, FEATURES), nn.Linear(2, FEATURES)
            self.inputs = []

        def forward(self, x):
            self.inputs.append(x["near"].shape[0])
            return self.near(x["near"]) + self.far(x["far"])

    predictor, target = TwoSensors(), TwoSensors()
    observation = {"near": torch.randn(8, 3), "far": torch.randn(8, 2)}
    td = TensorDict({"next": {"observation": observation}}, [8])
    value = RNDLoss(predictor, target, reduction="none")(td)["loss_predictor"]
    assert predictor.inputs == target.inputs == [2]
    assert int((value > 0).sum()) == 2
    rms = {"near": rlloss.running_mean_std_init((3,)), "far": rlloss.running_mean_std_init((2,))}
    value = RNDLoss(predictor, target, obs_rms=rms, reduction="none", update_fraction=1)(td)["loss_predictor"]
    assert value.shape == (8,)
    with pytest.raises(ValueError, match=r"RNDLoss: tensordict must be one with a batch size, where the observation"):
        RNDLoss(predictor, target)(TensorDict({"next": {"observation": observation}}, []))


def test_calls_with_positions_and_keywords():
    loss, td = RNDLoss(*networks(), update_fraction=1), batch(5)
    expected, observation = loss(td)["loss_predictor"], td["next", "observation"]
    assert torch.equal(loss(tensordict=td)["loss_predictor"], expected)
    assert torch.equal(loss(observation), expected)
    assert torch.equal(loss(next_observation=observation), expected)
    loss.set_keys(observation="seen")
    assert loss.in_keys == ["seen"]
    assert torch.equal(loss(seen=observation), expected)
    assert torch.equal(loss(TensorDict({"seen": observation}, [5]))["loss_predictor"], expected)
    loss.set_keys(observation=None)
    assert torch.equal(loss(td)["loss_predictor"], expected)


def test_the_tensordict_stays_as_it_is():
    td = batch(6).lock_()
    before = td.clone()
    RNDLoss(*networks())(td)
    assert (td == before).all()
    assert set(td.keys(True, True)) == set(before.keys(True, True))
    assert td["next", "observation"].grad is None


def test_options_are_checked_at_construction():
    predictor, target = networks()
    for fraction in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"RNDLoss: update_fraction must be in \[0, 1\], got"):
            RNDLoss(predictor, target, update_fraction=fraction)
    with pytest.raises(TypeError, match=r"RNDLoss: update_fraction must be a number, got a tensor"):
        RNDLoss(predictor, target, update_fraction=torch.tensor(0.5))
    with pytest.raises(TypeError, match=r"RNDLoss: update_fraction must be a number"):
        RNDLoss(predictor, target, update_fraction="all")
    with pytest.raises(ValueError, match=r"RNDLoss: obs_clip must be at least 0, got -1"):
        RNDLoss(predictor, target, obs_clip=-1)
    with pytest.raises(ValueError, match=r"RNDLoss: reduction must be one of 'mean', 'sum', 'none', got 'max'"):
        RNDLoss(predictor, target, reduction="max")
    with pytest.raises(TypeError, match="positional"):
        RNDLoss(predictor, target, None)
    assert all(p.requires_grad for p in target.parameters()), "a refused call leaves the target as it was"


def test_errors_at_the_call():
    loss = RNDLoss(*networks())
    match = r"RNDLoss: tensordict must be one with .*next.*observation.*, got keys \['observation'\].*set_keys\(obs"
    with pytest.raises(KeyError, match=match):
        loss(TensorDict({"observation": torch.randn(3, OBS)}, [3]))
    with pytest.raises(TypeError, match="a tensor of numbers, got bool"):
        loss(next_observation=torch.ones(3, OBS, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"rnd_loss: obs_stats must be statistics of .*, got mean float32 \[3\]"):
        RNDLoss(*networks(), obs_rms=stats(3))(batch(5))
    with pytest.raises(TypeError, match="obs_stats must be an object with tensors mean and var, got str"):
        RNDLoss(*networks(), obs_rms="mean")(batch(5))
    with pytest.raises(ValueError, match="like the predictor's features"):
        RNDLoss(Spy(), nn.Linear(OBS, FEATURES + 1))(batch(5))
    with pytest.raises(ValueError, match="each name must be one of"):
        loss.set_keys(obs="x")


def make_reward(*pair, **kwargs):
    return RNDReward(*pair, observation_shape=(OBS,), **kwargs)


@pytest.mark.parametrize("make", [RNDLoss, make_reward])
def test_refuses_networks_that_are_none_or_share_parameters(make):
    predictor, target = networks()
    for pair in [(predictor, predictor), (nn.Sequential(target.layers[0], nn.ReLU()), target)]:
        with pytest.raises(
            ValueError, match=r"target_network must be a network with parameters of its own, got one that"
        ):
            make(*pair)
    with pytest.raises(TypeError, match=r"predictor_network must be an nn.Module, got function"):
        make(lambda x: x, target)
    with pytest.raises(
        TypeError, match=r"target_network must be an nn.Module, got type\. Did you mean Linear\(\.\.\.\)\?"
    ):
        make(predictor, nn.Linear)
    assert all(p.requires_grad for p in [*predictor.parameters(), *target.parameters()])


def test_networks_are_held_in_the_order_of_the_arguments():
    pair = networks()
    for module in (RNDLoss(*pair), make_reward(*pair)):
        assert [name for name, _ in module.named_children()][:2] == ["predictor_network", "target_network"]


# Frozen target


def test_networks_stay_the_callers_objects_and_the_target_is_frozen():
    predictor, target = networks()
    loss = RNDLoss(predictor, target)
    assert loss.predictor_network is predictor
    assert loss.target_network is target
    assert not any(p.requires_grad for p in target.parameters())
    assert all(p.requires_grad for p in predictor.parameters())


def test_modes():
    predictor, target = networks()
    target.layers.append(nn.Dropout(0.5))
    loss, td = RNDLoss(predictor, target, update_fraction=1), batch(4)
    for switch in (lambda: loss.train(), lambda: loss.eval(), lambda: nn.ModuleList([loss]).train()):
        switch()
        assert not target.training
        loss(td)
    assert predictor.modes == [True, False, True]
    assert target.modes == [False, False, False]
    assert not any(m.training for m in target.modules())


@pytest.mark.parametrize("through", ["module", "functional", "reward"])
def test_a_target_put_into_train_mode_by_others_is_evaluated_in_eval_mode(through):
    predictor, target = networks()
    target.layers.append(nn.Dropout(0.5))
    loss, reward = RNDLoss(predictor, target, update_fraction=1), RNDReward(predictor, target, observation_shape=(OBS,))
    td = batch(4)
    loss_fn, *params = loss.functional()
    call = {"module": lambda: loss(td), "functional": lambda: loss_fn(*params, td), "reward": lambda: reward(td)}
    target.train()
    call[through]()
    assert target.modes == [False]


def test_training_reduces_the_error_where_it_was_and_leaves_it_elsewhere():
    """The author's claim at its smallest: what was seen is no longer new."""
    make = lambda: nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 16))  # noqa: E731
    loss = RNDLoss(make(), make(), update_fraction=1.0)
    optimizer = torch.optim.Adam([p for p in loss.parameters() if p.requires_grad], lr=1e-3)
    frozen = params_of(loss.target_network)
    seen = batch(64)
    start = loss(seen)["loss_predictor"].item()
    for _ in range(500):
        optimizer.zero_grad()
        loss(seen)["loss_predictor"].backward()
        optimizer.step()
    end = loss(seen)["loss_predictor"].item()
    assert end < start / 10
    assert loss(TensorDict({"next": {"observation": 10 + torch.randn(64, 4)}}, [64]))["loss_predictor"] > 100 * end
    assert all(torch.equal(p, frozen[name]) for name, p in loss.target_network.named_parameters())


# Statistics of the observation


@pytest.mark.parametrize("kind", ["pure", "module", "torchrl"])
def test_observation_statistics_of_every_kind(kind):
    predictor, target = networks()
    state = stats()
    module = RunningMeanStd((OBS,))
    module.load_state(state)
    rms = {"pure": state, "module": module, "torchrl": TorchrlStatistics(state)}[kind]
    td = batch(6)
    td["next", "observation"][0, 0] = 1e6
    RNDLoss(predictor, target, obs_rms=rms, obs_clip=2.0, update_fraction=1)(td)
    expected = ((td["next", "observation"] - state.mean) / state.var.sqrt()).clamp(-2, 2)
    torch.testing.assert_close(predictor.inputs[0], expected)
    assert predictor.inputs[0][0, 0] == 2.0
    assert torch.equal(target.inputs[0], predictor.inputs[0])


def test_statistics_are_shared_and_the_loss_does_not_move_them():
    predictor, target = networks()
    rms = RunningMeanStd((OBS,))
    loss, td = RNDLoss(predictor, target, obs_rms=rms, update_fraction=1), batch(6)
    before = loss(td)["loss_predictor"]
    assert rms.count == 1e-4
    rms.update(10 + torch.randn(20, OBS))
    assert not torch.equal(loss(td)["loss_predictor"], before)
    assert "obs_rms.mean" in loss.state_dict()


def test_a_non_finite_sample_that_is_not_drawn_leaves_no_trace():
    predictor, target = networks()
    loss, td = RNDLoss(predictor, target, reduction="none"), batch(4)
    td["next", "observation"][2] = torch.nan
    seen = set()
    for _ in range(30):
        predictor.zero_grad()
        value = loss(td)["loss_predictor"]
        value.sum().backward()
        drawn = bool(value[2].isnan())
        seen.add(drawn)
        assert drawn == any(bool(p.grad.isnan().any()) for p in predictor.parameters())
    assert seen == {True, False}


# Dtypes, copies, files


@pytest.mark.parametrize("network", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("observation", [torch.float64, torch.float32, torch.bfloat16, torch.int64])
def test_networks_get_their_own_dtype_and_the_loss_computes_in_float32_at_least(network, observation):
    predictor, target = networks()
    loss = RNDLoss(predictor, target, obs_rms=RunningMeanStd((OBS,)), update_fraction=1).to(network)
    td = TensorDict({"next": {"observation": (3 * torch.randn(6, OBS)).to(observation)}}, [6])
    value = loss(td)["loss_predictor"]
    value.backward()
    assert value.dtype == (torch.float64 if network == torch.float64 else torch.float32)
    assert predictor.inputs[0].dtype == network
    assert all(p.grad.isfinite().all() for p in predictor.parameters())
    loss_fn, *params = loss.functional()
    assert torch.equal(loss_fn(*params, td), value)


def test_meta_device():
    loss = RNDLoss(*networks(), obs_rms=RunningMeanStd((OBS,)), reduction="none").to("meta")
    value = loss(TensorDict({"next": {"observation": torch.randn(8, OBS, device="meta")}}, [8]))["loss_predictor"]
    assert value.shape == (8,)
    assert value.device.type == "meta"


def test_state_dict_round_trip():
    loss, other = (RNDLoss(*networks(), obs_rms=RunningMeanStd((OBS,)), update_fraction=1) for _ in range(2))
    loss.obs_rms.update(torch.randn(20, OBS))
    td = batch(5)
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other(td)["loss_predictor"], loss(td)["loss_predictor"])
    assert not any(p.requires_grad for p in other.target_network.parameters())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda loss: pickle.loads(pickle.dumps(loss))])
@pytest.mark.parametrize("rms", [None, "pure", "module"])
def test_copies(copied, rms):
    rms = {None: None, "pure": stats(), "module": RunningMeanStd((OBS,))}[rms]
    loss, td = RNDLoss(*networks(), obs_rms=rms, update_fraction=1), batch(5)
    loss.set_keys(observation=("next", "o"))
    td.rename_key_(("next", "observation"), ("next", "o"))
    other = copied(loss)
    assert torch.equal(other(td)["loss_predictor"], loss(td)["loss_predictor"])
    with torch.no_grad():
        for p in other.predictor_network.parameters():
            p.add_(1)
    assert not torch.equal(other(td)["loss_predictor"], loss(td)["loss_predictor"])


def test_reset_parameters_recursive():
    loss = RNDLoss(*networks())
    before = params_of(loss)
    loss.reset_parameters_recursive()
    assert not any(torch.equal(p, before[name]) for name, p in loss.named_parameters())


@pytest.mark.parametrize("fraction", [1.0, 0.25])
def test_compiled_equals_eager(fraction):
    torch.compiler.reset()
    predictor, target = (nn.Sequential(nn.Linear(OBS, 8), nn.Tanh(), nn.Linear(8, FEATURES)) for _ in range(2))
    loss = RNDLoss(predictor, target, obs_rms=RunningMeanStd((OBS,)), reduction="none", update_fraction=fraction)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for size in (8, 12, 20):
        td = batch(size)
        torch.manual_seed(1)
        expected = loss(td)["loss_predictor"]
        torch.manual_seed(1)
        value = compiled(td)["loss_predictor"]
        torch.testing.assert_close(value, expected)
        wanted, got = (torch.autograd.grad(v.sum(), list(predictor.parameters())) for v in (expected, value))
        torch.testing.assert_close(got, wanted)


# Memory formats and mixed precision


def images_and_networks(dtype=torch.float32):
    networks = RNDConvNetwork((2, 36, 36), 6, hidden=8, predictor=True), RNDConvNetwork((2, 36, 36), 6)
    images = torch.randn(8, 2, 36, 36).to(dtype)
    return images, networks


def loss_and_gradients(images, networks, **options):
    loss = RNDLoss(*networks, **options)
    torch.manual_seed(1)
    value = loss(TensorDict({"next": {"observation": images}}, [8]))["loss_predictor"]
    return value, torch.autograd.grad(value, list(networks[0].parameters()))


@pytest.mark.parametrize("fraction", [0.5, 1.0])
@pytest.mark.parametrize("normalized", [False, True])
def test_channels_last_changes_nothing_and_is_kept(fraction, normalized):
    images, networks = images_and_networks()
    options = {"update_fraction": fraction, "obs_rms": RunningMeanStd((2, 36, 36)) if normalized else None}
    expected = loss_and_gradients(images, networks, **options)
    networks = [network.to(memory_format=torch.channels_last) for network in networks]
    formats = []

    def remember(module, inputs, output):
        formats.extend(x.is_contiguous(memory_format=torch.channels_last) for x in (*inputs, output))

    for network in networks:
        for layer in network.trunk[:-1]:
            layer.register_forward_hook(remember)
    images = images.to(memory_format=torch.channels_last)
    torch.testing.assert_close(loss_and_gradients(images, networks, **options), expected, rtol=1e-4, atol=1e-5)
    assert len(formats) == 2 * 2 * 6
    assert all(formats)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("channels_last", [False, True])
def test_under_autocast_features_are_bfloat16_and_the_loss_is_float32(dtype, channels_last):
    images, networks = images_and_networks()
    images = (50 * images.abs()).to(dtype) if dtype == torch.uint8 else images.to(dtype)
    if channels_last:
        images = images.to(memory_format=torch.channels_last)
        networks = [network.to(memory_format=torch.channels_last) for network in networks]
    expected = loss_and_gradients(images, networks, update_fraction=0.5)
    dtypes = []
    for network in networks:
        network.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        value, gradients = loss_and_gradients(images, networks, update_fraction=0.5)
    assert dtypes == [torch.bfloat16] * 2
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected[0], rtol=0.02, atol=0)
    for got, wanted in zip(gradients, expected[1], strict=True):
        assert got.dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(got.flatten(), wanted.flatten(), dim=0) > 0.99


def test_bfloat16_networks_and_observations():
    images, networks = images_and_networks(torch.bfloat16)
    expected, _ = loss_and_gradients(images, networks, update_fraction=0.5)
    value, gradients = loss_and_gradients(images, [network.bfloat16() for network in networks], update_fraction=0.5)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected, rtol=0.02, atol=0)
    assert all(g.dtype == torch.bfloat16 and g.isfinite().all() for g in gradients)


def test_compiled_under_autocast():
    torch.compiler.reset()
    images, networks = images_and_networks()
    loss_fn, *params = RNDLoss(*networks).functional()
    params = [{name: p.detach() for name, p in each.items()} for each in params]
    arguments = (*params, images.to(memory_format=torch.channels_last), torch.tensor([0, 3, 5]))
    step = torch.func.grad_and_value(loss_fn)
    with torch.autocast("cpu", torch.bfloat16):
        compiled = torch.compile(step, backend="aot_eager", fullgraph=True)(*arguments)
        _, expected = step(*arguments)
    assert compiled[1].dtype == torch.float32
    torch.testing.assert_close(compiled[1], expected, rtol=1e-3, atol=0)
    assert all(g.dtype == torch.float32 for g in compiled[0].values())


# Features that the reward has computed already


FEATURES_KEY = ("next", "rnd_target_features")


def reward_and_loss(env_shape=(), reduction="mean", fraction=0.5):
    pair = networks()
    reward = RNDReward(*pair, observation_shape=(OBS,), env_shape=env_shape, target_features_key=FEATURES_KEY)
    shared = {"obs_rms": reward.obs_rms, "reduction": reduction, "update_fraction": fraction}
    return reward, RNDLoss(*pair, **shared, target_features_key=FEATURES_KEY), RNDLoss(*pair, **shared)


def seeded(loss, td):
    torch.manual_seed(1)
    return loss(td)["loss_predictor"]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("fraction", [0.5, 1.0])
@pytest.mark.parametrize("size", [(5,), (5, 4), ()])
def test_features_of_the_reward_replace_the_target_network(reduction, fraction, size):
    reward, reusing, running = reward_and_loss(size[:1], reduction, fraction)
    reward(batch(*size))
    td, before = batch(*size), copy.deepcopy(reward)
    reward.eval()(td)
    assert td[FEATURES_KEY].shape == (*size, FEATURES)
    z = before.obs_rms.normalize(td["next", "observation"], 5.0)
    assert torch.equal(td[FEATURES_KEY], reward.target_network.layers(z))
    calls = len(reward.target_network.inputs)
    value = seeded(reusing, td)
    assert len(reward.target_network.inputs) == calls
    assert torch.equal(value, seeded(running, td))
    assert len(reward.target_network.inputs) == calls + 1
    gradients = [
        torch.autograd.grad(seeded(loss, td).sum(), list(reward.predictor_network.parameters()))
        for loss in (reusing, running)
    ]
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_features_of_the_reward_are_those_of_the_statistics_before_the_rollout():
    reward, reusing, running = reward_and_loss(fraction=1)
    reward(batch(20))
    before, td = copy.deepcopy(reward.obs_rms), batch(20)
    td["next", "observation"] += 2
    reward(td)
    old, new = (rms.normalize(td["next", "observation"], 5.0) for rms in (before, reward.obs_rms))
    error = reward.predictor_network(new) - reward.target_network(old)
    torch.testing.assert_close(seeded(reusing, td), error.square().mean())
    assert not torch.equal(seeded(reusing, td), seeded(running, td))
    reusing.obs_rms = running.obs_rms = before
    assert torch.equal(seeded(reusing, td), seeded(running, td))


def test_reward_writes_features_only_where_they_have_a_key():
    td = batch(3)
    filled_reward()(td)
    assert set(td.keys(True, True)) == {("next", "observation"), ("next", "intrinsic_reward")}
    reward = filled_reward(target_features_key="features").eval()
    assert reward.out_keys == [("next", "intrinsic_reward"), "features"]
    observation = td["next", "observation"]
    written, features = reward(observation)
    assert torch.equal(features, reward(td)["features"])
    assert torch.equal(written, td["next", "intrinsic_reward"])
    assert not features.requires_grad
    assert torch.equal(reward.select_out_keys("features")(td.select("next"))["features"], features)


def test_loss_takes_features_as_an_entry():
    reward, reusing, _ = reward_and_loss(fraction=1)
    assert reusing.in_keys == [("next", "observation"), FEATURES_KEY]
    td = reward(batch(5))
    expected = reusing(td)["loss_predictor"]
    assert torch.equal(reusing(td["next", "observation"], td[FEATURES_KEY]), expected)
    named = {"next_observation": td["next", "observation"], "next_rnd_target_features": td[FEATURES_KEY]}
    assert torch.equal(reusing(**named), expected)


@pytest.mark.parametrize("kind", ["eager", "vmap", "compile", "compiled_vmap"])
def test_functional_with_known_features(kind):
    torch.compiler.reset()
    reward, reusing, running = reward_and_loss((2,))
    reward(batch(2, 3))
    td = reward.eval()(batch(2, 3))
    rows, target = torch.tensor([0, 4]), reward.target_network
    (loss_fn, *params), (plain_fn, *_) = reusing.functional(), running.functional()
    pred_params, target_params = ({name: p.detach() for name, p in each.items()} for each in params)
    expected = grad(plain_fn)(pred_params, target_params, td, rows)
    calls = len(target.inputs)
    function, wanted = grad(loss_fn), expected
    if "vmap" in kind:
        function = vmap(function, in_dims=(0, None, None, None, None))
        pred_params = {name: torch.stack([p, p]) for name, p in pred_params.items()}
        wanted = {name: torch.stack([g, g]) for name, g in expected.items()}
    if "compile" in kind:
        for network in (reward.predictor_network, target):
            network.forward = network.layers.forward
        function = torch.compile(function, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(function(pred_params, target_params, td, rows, None), wanted)
    observation, features = td["next", "observation"].flatten(0, 1), td[FEATURES_KEY].flatten(0, 1)
    torch.testing.assert_close(function(pred_params, None, observation, rows, features), wanted)
    torch.testing.assert_close(function(pred_params, None, td, rows, td[FEATURES_KEY]), wanted)
    assert len(target.inputs) == calls


def test_known_features_that_are_missing_or_do_not_fit():
    reward, reusing, running = reward_and_loss()
    match = (
        r"RNDLoss: tensordict must be one with .*rnd_target_features.*, got keys .*target_features_key=\.\.\.\) writes"
    )
    with pytest.raises(KeyError, match=match):
        reusing(batch(5))
    loss_fn, *params = reusing.functional()
    match = r"RNDLoss: target_features must be handed in with a batch that is no TensorDict, got None"
    with pytest.raises(ValueError, match=match):
        loss_fn(*params, torch.randn(5, OBS))
    td = reward(batch(5))
    td[FEATURES_KEY] = torch.randn(5, FEATURES + 1)
    with pytest.raises(
        ValueError, match=r"rnd_loss: target_features must be of shape \[3, 6\] like the predictor's feat"
    ):
        reusing(td)
    td[FEATURES_KEY] = torch.ones(5, FEATURES, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"rnd_loss: target_features must be a floating-point tensor, got int64"):
        reusing(td)
    with pytest.raises(
        ValueError, match=r"RNDLoss: target_features must be of shape \[5, \.\.\.\] like the batch, got float"
    ):
        running.functional()[0](*params, td, None, torch.ones(4, FEATURES))
    with pytest.raises(TypeError, match=r"RNDLoss: target_features must be a tensor, got TensorDict"):
        running.functional()[0](*params, td, None, td)
    for key in (3, [], ("next", "observation")):
        for make in (RNDLoss, make_reward):
            with pytest.raises(ValueError, match=r"RND\w+: target_features_key must be None or a key other than"):
                make(*networks(), target_features_key=key)


# The pure function behind it


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_functional_is_the_pure_loss_with_the_parameters_taken_out(reduction):
    predictor, target = networks()
    loss = RNDLoss(predictor, target, obs_rms=stats(), reduction=reduction, update_fraction=1)
    loss_fn, pred_params, target_params = loss.functional()
    assert all(pred_params[name] is p for name, p in predictor.named_parameters())
    assert all(target_params[name] is p for name, p in target.named_parameters())
    td = batch(6)
    value, observation = loss(td)["loss_predictor"], td["next", "observation"]
    assert torch.equal(loss_fn(pred_params, target_params, td), value)
    assert torch.equal(loss_fn(pred_params, target_params, observation), value)
    loss_fn(pred_params, target_params, td).sum().backward()
    assert all(p.grad.any() for p in predictor.parameters())
    assert all(p.grad is None for p in target.parameters())
    rows = rlloss.rnd_key_mask(rlloss.random.key(0), 6, 0.5)
    weights = torch.zeros(6, dtype=torch.bool).index_fill(0, rows, True)
    torch.testing.assert_close(
        loss_fn(pred_params, target_params, td, rows), loss_fn(pred_params, target_params, observation, weights)
    )


def test_functional_counts_through_all_batch_dimensions():
    loss_fn, *params = RNDLoss(*networks(), reduction="none").functional()
    td, rows = batch(2, 3), torch.tensor([1, 5])
    value = loss_fn(*params, td, rows)
    assert (value > 0).flatten().nonzero().flatten().tolist() == [1, 5]
    torch.testing.assert_close(loss_fn(*params, td, value > 0), value)
    with pytest.raises(ValueError, match=r"RNDLoss: key_mask must be of shape \[2, 3\] like the batch.*time first"):
        loss_fn(*params, td, (value > 0).T)
    with pytest.raises(TypeError, match="key_mask must be bool"):
        loss_fn(*params, td, torch.ones(2, 3))
    with pytest.raises(TypeError, match="key_mask must be a tensor, got list"):
        loss_fn(*params, td, [0, 1])


def test_functional_reads_what_set_keys_says():
    loss, td = RNDLoss(*networks()), batch(4)
    td.rename_key_(("next", "observation"), "o")
    loss_fn, *params = loss.functional()
    with pytest.raises(KeyError, match=r"set_keys\(observation=...\)"):
        loss_fn(*params, td)
    loss.set_keys(observation="o")
    assert loss_fn(*params, td) > 0


def test_functional_consumes_no_randomness_and_is_repeatable():
    loss_fn, *params = RNDLoss(*networks()).functional()
    td = batch(6)
    before = torch.get_rng_state()
    assert torch.equal(loss_fn(*params, td), loss_fn(*params, td))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("container", ["dict", "TensorDict"])
def test_ensemble_by_vmap_equals_a_loop(container):
    target, td = Spy(), batch(6)
    members = [RNDLoss(Spy(), target, update_fraction=1) for _ in range(3)]
    loss_fn, _, target_params = members[0].functional()
    trees = [params_of(member.predictor_network) for member in members]
    stacked = {name: torch.stack([tree[name] for tree in trees]) for name in trees[0]}
    if container == "TensorDict":
        stacked = TensorDict(stacked, [3]).unflatten_keys(".")
    gradients = vmap(grad(loss_fn), in_dims=(0, None, None))(stacked, target_params, td)
    losses = vmap(loss_fn, in_dims=(0, None, None))(stacked, target_params, td)
    if container == "TensorDict":
        gradients = gradients.flatten_keys(".")
    for i, member in enumerate(members):
        value = member(td)["loss_predictor"]
        value.backward()
        torch.testing.assert_close(losses[i], value)
        for name, p in member.predictor_network.named_parameters():
            torch.testing.assert_close(gradients[name][i], p.grad)


def test_per_sample_gradients_add_up():
    loss_fn, pred_params, target_params = RNDLoss(*networks()).functional()
    pred_params = {name: p.detach() for name, p in pred_params.items()}
    td = batch(5)
    each = vmap(grad(loss_fn), in_dims=(None, None, 0))(pred_params, target_params, td)
    together = grad(loss_fn)(pred_params, target_params, td)
    for name in together:
        torch.testing.assert_close(each[name].mean(0), together[name])


def test_jvp_agrees_with_grad():
    loss_fn, pred_params, target_params = RNDLoss(*networks()).functional()
    pred_params = {name: p.detach() for name, p in pred_params.items()}
    direction, td = {name: torch.randn_like(p) for name, p in pred_params.items()}, batch(5)
    _, tangent = jvp(lambda p: loss_fn(p, target_params, td), (pred_params,), (direction,))
    gradient = grad(loss_fn)(pred_params, target_params, td)
    torch.testing.assert_close(tangent, sum((gradient[name] * direction[name]).sum() for name in gradient))
    frozen = grad(loss_fn, argnums=1)(pred_params, {k: p.detach() for k, p in target_params.items()}, td)
    assert not any(g.any() for g in frozen.values())


@pytest.mark.parametrize("kind", ["compile", "compiled_vmap"])
def test_functional_compiled(kind):
    torch.compiler.reset()
    make = lambda: nn.Sequential(nn.Linear(OBS, 8), nn.Tanh(), nn.Linear(8, FEATURES))  # noqa: E731
    loss_fn, pred_params, target_params = RNDLoss(make(), make(), obs_rms=RunningMeanStd((OBS,))).functional()
    pred_params = {name: p.detach() for name, p in pred_params.items()}
    td, rows = batch(6), torch.tensor([0, 3])
    function = grad(loss_fn)
    if kind == "compiled_vmap":
        function = vmap(function, in_dims=(0, None, None, None))
        pred_params = {name: torch.stack([p, 2 * p]) for name, p in pred_params.items()}
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    expected = function(pred_params, target_params, td, rows)
    torch.testing.assert_close(compiled(pred_params, target_params, td, rows), expected)


def test_functional_refuses_batch_norm_in_train_mode():
    make = lambda: nn.Sequential(nn.Linear(OBS, FEATURES), nn.BatchNorm1d(FEATURES))  # noqa: E731
    loss = RNDLoss(make(), make())
    with pytest.raises(ValueError, match="BatchNorm1d at '1' in train mode"):
        loss.functional()
    loss.eval()
    loss_fn, *params = loss.functional()
    assert loss_fn(*params, batch(3)) > 0


# The reward


def filled_reward(env_shape=(), **kwargs):
    predictor, target = networks()
    return RNDReward(predictor, target, observation_shape=(OBS,), env_shape=env_shape, **kwargs)


def all_statistics(reward):
    return [x.clone() for x in (*reward.obs_rms.state, *reward.reward_rms.state, reward.discounted_sum)]


def assert_statistics(reward, expected):
    assert all(torch.equal(a, b) for a, b in zip(all_statistics(reward), expected, strict=True))


@pytest.mark.parametrize("env_shape", [(), (3,), (3, 2)])
@pytest.mark.parametrize("time", [None, 5, 1, 0])
def test_reward_shapes(env_shape, time):
    size = env_shape if time is None else (*env_shape, time)
    reward, td = filled_reward(env_shape), batch(*size)
    out = reward(td)
    assert out is td
    assert td["next", "intrinsic_reward"].shape == (*size, 1)
    assert (td["next", "intrinsic_reward"] > 0).all()
    assert reward.discounted_sum.shape == env_shape
    assert torch.isclose(reward.obs_rms.count, torch.tensor(math.prod(size) + 1e-4, dtype=torch.float64))
    assert torch.isclose(reward.reward_rms.count, torch.tensor(math.prod(size) + 1e-4, dtype=torch.float64))


def test_reward_in_the_order_of_the_author():
    """The bonus with the old observation statistics, which then move; its scale with the new ones."""
    reward = filled_reward((2,), discount=0.9, obs_clip=1.5)
    obs_state, sums, scale = reward.obs_rms.state, torch.zeros(2), rlloss.running_mean_std_init(())
    obs_state = type(obs_state)(*(x.clone() for x in obs_state))
    predictor, target = reward.predictor_network, reward.target_network
    for _ in range(3):
        td = batch(2, 5)
        observation = 4 * td["next", "observation"]
        td["next", "observation"] = observation
        z = ((observation - obs_state.mean) / obs_state.var.sqrt()).clamp(-1.5, 1.5)
        bonus = (predictor(z) - target(z)).square().mean(-1).detach()
        reward(td)
        torch.testing.assert_close(predictor.inputs[-1].reshape(2, 5, OBS), z)
        obs_state = rlloss.running_mean_std_update(obs_state, observation)
        discounted = []
        for t in range(5):
            sums = 0.9 * sums + bonus[:, t]
            discounted.append(sums)
        scale = rlloss.running_mean_std_update(scale, torch.stack(discounted))
        torch.testing.assert_close(td["next", "intrinsic_reward"], (bonus / scale.var.sqrt()).unsqueeze(-1))
        torch.testing.assert_close(reward.obs_rms.mean, obs_state.mean)
        torch.testing.assert_close(reward.discounted_sum, sums)


class Prescribed(nn.Module):
    """Features whose error against zero is the observation itself."""

    def forward(self, x):
        return x.sqrt()


class Zero(nn.Module):
    def forward(self, x):
        return torch.zeros_like(x)


@pytest.mark.parametrize("case", ["update_default", "update_news"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_reward_golden(golden, case, dtype):
    """Several rollouts of the author's code: discounted sums, their statistics, and the reward."""
    file = golden("09_rnd")
    bonus = file[f"{case}.in.rews_int"].to(dtype)
    rollouts, envs, time = bonus.shape
    gamma = {"update_default": 0.99, "update_news": 0.9}[case]
    reward = RNDReward(Prescribed(), Zero(), observation_shape=(1,), env_shape=(envs,), discount=gamma).to(dtype)
    # Bonuses reach the networks as they are: nothing is normalised.
    reward.obs_rms.update = lambda _: None
    reward.obs_clip = math.inf
    rtol = 1e-6 if dtype == torch.float64 else 1e-5
    for r in range(rollouts):
        td = TensorDict({"next": {"observation": bonus[r].unsqueeze(-1)}}, [envs, time])
        reward(td)
        got = td["next", "intrinsic_reward"].squeeze(-1).double()
        torch.testing.assert_close(got, file[f"{case}.out.rews_int_normed"][r], rtol=rtol, atol=rtol)
        for name in ("mean", "var", "count"):
            expected = file[f"{case}.out.rms_{name}"][r]
            torch.testing.assert_close(getattr(reward.reward_rms, name).double(), expected, rtol=rtol, atol=rtol)
        torch.testing.assert_close(reward.discounted_sum.double(), file[f"{case}.out.rewems"][r], rtol=rtol, atol=rtol)


def test_reward_in_pieces_equals_the_reward_of_single_steps_in_their_sums():
    whole = filled_reward((2,))
    steps = copy.deepcopy(whole)
    for r in (whole, steps):
        r.obs_rms.update = lambda _: None
    td = batch(2, 6)
    whole(td)
    for t in range(6):
        steps(td[:, t])
    torch.testing.assert_close(whole.discounted_sum, steps.discounted_sum)
    torch.testing.assert_close(whole.reward_rms.var, steps.reward_rms.var)


def test_reward_keeps_the_order_and_forgets_the_scale():
    """Errors a thousand times larger give the same reward, once the prior weighs nothing."""
    predictor, target = networks()
    rewards = []
    for factor in (1.0, 1000**0.5):
        scaled = [nn.Sequential(net.layers, Scale(factor)) for net in (predictor, target)]
        reward, td = RNDReward(*scaled, observation_shape=(OBS,)), batch(0)
        generator = torch.Generator().manual_seed(0)
        for _ in range(4):
            td = TensorDict({"next": {"observation": torch.randn(500, OBS, generator=generator)}}, [500])
            reward(td)
        rewards.append(td["next", "intrinsic_reward"])
    torch.testing.assert_close(rewards[0], rewards[1], rtol=1e-3, atol=0)
    assert torch.equal(rewards[0].flatten().argsort(), rewards[1].flatten().argsort())


class Scale(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return self.factor * x


def test_eval_mode_moves_nothing_and_gives_the_same_reward_twice():
    reward = filled_reward((2,))
    reward(batch(2, 8))
    reward.eval()
    before, td = all_statistics(reward), batch(2, 3)
    first, second = reward(td.clone()), reward(td.clone())
    assert torch.equal(first["next", "intrinsic_reward"], second["next", "intrinsic_reward"])
    assert_statistics(reward, before)


def test_reward_has_no_gradient_and_freezes_the_target_only():
    reward, td, graphs = filled_reward(), batch(5), []
    td["next", "observation"].requires_grad_()
    reward.predictor_network.register_forward_hook(lambda module, inputs, output: graphs.append(output.requires_grad))
    reward(td)
    assert graphs == [False], "no graph is built"
    assert not td["next", "intrinsic_reward"].requires_grad
    assert not any(p.requires_grad for p in reward.target_network.parameters())
    assert all(p.requires_grad for p in reward.predictor_network.parameters())
    assert not reward.train().target_network.training
    assert reward.predictor_network.training


def test_reward_shares_its_statistics_with_the_loss():
    reward = filled_reward()
    loss = RNDLoss(reward.predictor_network, reward.target_network, obs_rms=reward.obs_rms, update_fraction=1)
    td = batch(10)
    reward(td)
    before = loss(td)["loss_predictor"]
    reward(TensorDict({"next": {"observation": 5 + torch.randn(20, OBS)}}, [20]))
    assert not torch.equal(loss(td)["loss_predictor"], before)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_non_finite_observations_do_not_poison_the_statistics(bad):
    reward = filled_reward((3,))
    reward(batch(3, 4))
    td = batch(3, 4)
    td["next", "observation"][1, 2, 0] = bad
    reward(td)
    assert all(x.isfinite().all() for x in all_statistics(reward))
    fine = td["next", "intrinsic_reward"].isfinite()
    fine[1, 2] = True
    assert fine.all()
    clean = batch(3, 4)
    assert reward(clean)["next", "intrinsic_reward"].isfinite().all()


def test_reward_keys():
    reward = filled_reward()
    assert list(reward.in_keys) == [("next", "observation")]
    assert list(reward.out_keys) == [("next", "intrinsic_reward")]
    named = filled_reward(in_keys=["seen"], out_keys=[("next", "bonus")]).eval()
    observation = torch.randn(5, OBS)
    out = named(TensorDict({"seen": observation}, [5]))["next", "bonus"]
    assert torch.equal(named(seen=observation), out)
    assert torch.equal(named(observation), out)
    sequence = TensorDictSequential(TensorDictModule(nn.Identity(), in_keys=["raw"], out_keys=["seen"]), named)
    assert sequence.in_keys == ["raw"]
    assert torch.equal(sequence(TensorDict({"raw": observation}, [5]))["next", "bonus"], out)


@pytest.mark.parametrize("keys", ["observation", ("next", "observation"), [], ["a", "b"], [3]])
@pytest.mark.parametrize("argument", ["in_keys", "out_keys"])
def test_reward_takes_one_key_each_way(argument, keys):
    with pytest.raises(ValueError, match=rf"RNDReward: {argument} must be a list of one key, got"):
        filled_reward(**{argument: keys})


def test_reward_refuses():
    with pytest.raises(ValueError, match=r"RNDReward: discount must be in \[0, 1\]"):
        filled_reward(discount=1.1)
    with pytest.raises(ValueError, match=r"RNDReward: obs_clip must be at least 0"):
        filled_reward(obs_clip=-1.0)
    predictor, target = networks()
    with pytest.raises(
        TypeError, match=r"RNDReward: observation_shape must be a tuple of ints, got int 4\. .*\(4,\)\?"
    ):
        RNDReward(predictor, target, observation_shape=4)
    with pytest.raises(TypeError, match=r"RNDReward: env_shape must be a tuple of ints, got int 2\. .*\(2,\)\?"):
        RNDReward(predictor, target, observation_shape=(4,), env_shape=2)
    assert all(p.requires_grad for p in target.parameters()), "a refused call leaves the target as it was"


@pytest.mark.parametrize(
    ("env_shape", "shape"),
    [((2,), (3, OBS)), ((2,), (2, 5, 1, OBS)), ((2,), (2, OBS + 1)), ((), (2, 3, OBS)), ((2,), (OBS,))],
)
def test_reward_of_wrong_shapes_is_refused_and_nothing_moves(env_shape, shape):
    reward = filled_reward(env_shape)
    before = all_statistics(reward)
    match = r"RNDReward: observation must be of shape \[.*4\] or \[.*'T', 4\], got float32"
    with pytest.raises(ValueError, match=match):
        reward(TensorDict({"next": {"observation": torch.randn(shape)}}, []))
    assert_statistics(reward, before)


def test_reward_of_a_call_that_fails_moves_nothing():
    reward = filled_reward()
    before = all_statistics(reward)
    with pytest.raises(
        KeyError, match=r"RNDReward: tensordict must be one with .*next.*observation.*, got keys \['o'\]"
    ):
        reward(TensorDict({"o": torch.ones(3, OBS)}, [3]))
    with pytest.raises(RuntimeError, match="locked"):
        reward(batch(3).lock_())
    with pytest.raises(TypeError, match="a tensor of numbers, got bool"):
        reward(TensorDict({"next": {"observation": torch.ones(3, OBS, dtype=torch.bool)}}, [3]))
    assert_statistics(reward, before)


def test_reward_of_images():
    make = lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, FEATURES))  # noqa: E731
    reward = RNDReward(make(), make(), observation_shape=(1, 3, 4), env_shape=(2,))
    frames = torch.randint(0, 256, (2, 5, 1, 3, 4), dtype=torch.uint8)
    td = reward(TensorDict({"next": {"observation": frames}}, [2, 5]))
    assert td["next", "intrinsic_reward"].shape == (2, 5, 1)
    torch.testing.assert_close(reward.obs_rms.mean, frames.float().mean((0, 1)), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_reward_dtypes(dtype):
    reward = filled_reward((2,)).to(dtype)
    td = reward(TensorDict({"next": {"observation": torch.randn(2, 4, OBS, dtype=torch.float64)}}, [2, 4]))
    assert td["next", "intrinsic_reward"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert reward.predictor_network.inputs[0].dtype == dtype
    assert reward.obs_rms.mean.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_reward_meta_device():
    reward = filled_reward((2,)).to("meta")
    td = reward(TensorDict({"next": {"observation": torch.randn(2, 4, OBS, device="meta")}}, [2, 4]))
    assert td["next", "intrinsic_reward"].shape == (2, 4, 1)


def test_reward_state_dict_and_copies():
    reward, other = filled_reward((2,)), filled_reward((2,))
    reward(batch(2, 8))
    names = {"obs_rms.mean", "obs_rms.count", "reward_rms.var", "discounted_sum", "predictor_network.layers.0.weight"}
    assert names <= set(reward.state_dict())
    other.load_state_dict(reward.state_dict())
    td = batch(2, 3)
    copies = [other, copy.deepcopy(reward), pickle.loads(pickle.dumps(reward))]
    expected = reward(td.clone())["next", "intrinsic_reward"]
    for module in copies:
        assert torch.equal(module(td.clone())["next", "intrinsic_reward"], expected)
        assert_statistics(module, all_statistics(reward))
    with pytest.raises(RuntimeError, match="size mismatch for discounted_sum"):
        filled_reward((3,)).load_state_dict(reward.state_dict())


def test_reward_prefers_what_the_predictor_has_not_seen():
    reward = filled_reward()
    loss = RNDLoss(reward.predictor_network, reward.target_network, obs_rms=reward.obs_rms, update_fraction=1)
    optimizer = torch.optim.Adam(reward.predictor_network.parameters(), lr=3e-3)
    here = TensorDict({"next": {"observation": torch.randn(64, OBS)}}, [64])
    there = TensorDict({"next": {"observation": 3 + torch.randn(64, OBS)}}, [64])
    reward(here)
    for _ in range(200):
        optimizer.zero_grad()
        loss(here)["loss_predictor"].backward()
        optimizer.step()
    reward.eval()
    seen, unseen = (reward(td)["next", "intrinsic_reward"].mean() for td in (here, there))
    assert unseen > 10 * seen
