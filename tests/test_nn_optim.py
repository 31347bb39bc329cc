"""The optimiser class against the pure update and the author's runs, and as torch's own tools use it."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from rlloss import laprop_init, laprop_update
from rlloss_nn import LaProp

STEPS = 20


def author_rate(step, lr, warmup):
    """The author's ramp, which is a float32 difference."""
    left = torch.tensor(1.0) - torch.tensor(step, dtype=torch.float32) / warmup
    return (torch.tensor(lr) - torch.tensor(lr) * left).item() if step < warmup else lr


@pytest.mark.parametrize("case", ["warm20", "warm6", "default", "nesterov", "wd"])
@pytest.mark.parametrize(("dtype", "rtol", "share"), [(torch.float64, 1e-6, 1e-7), (torch.float32, 1e-5, 1e-6)])
def test_golden(golden, case, dtype, rtol, share):
    file, knobs = golden("11_optim"), golden("11_optim").meta["cases"][case]
    prefix = f"{case}.in.param0."
    params = {
        k.removeprefix(prefix): nn.Parameter(v.to(dtype, copy=True)) for k, v in file.items() if k.startswith(prefix)
    }
    decayed = [p for name, p in params.items() if name.endswith("/kernel")]
    others = [p for name, p in params.items() if not name.endswith("/kernel")]
    groups = [{"params": decayed, "weight_decay": knobs.get("wd", 0.0)}, {"params": others}]
    optimizer = LaProp(groups, warmup=0, nesterov=knobs.get("nesterov", False))
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = author_rate(step, knobs.get("lr", 4e-5), knobs.get("warmup", 1000))
        for name, p in params.items():
            p.grad = file[f"{case}.in.grads.{name}"][step].to(dtype)
        optimizer.step()
        for name, p in params.items():
            expected = file[f"{case}.out.param.{name}"][step]
            assert_close(p.data.double(), expected, rtol=rtol, atol=share * expected.abs().max().item())
    for name, p in params.items():
        assert optimizer.state[p]["step"] == STEPS
        for ours, theirs in (("square", "nu"), ("momentum", "mu")):
            expected = file[f"{case}.out.{theirs}.{name}"]
            got = optimizer.state[p][ours].double()
            assert_close(got, expected, rtol=rtol, atol=share * expected.abs().max().item())


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)


def train(module, optimizer, steps, start=0, scheduler=None):
    for step in range(start, start + steps):
        x = torch.sin(torch.arange(15.0).reshape(5, 3) + step).to(next(module.parameters()).dtype)
        optimizer.zero_grad()
        module(x).square().mean().backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def same(left, right):
    return all(torch.equal(x, y) for x, y in zip(left.parameters(), right.parameters(), strict=True))


def test_equals_the_pure_update_with_the_same_warmup():
    module = network()
    params = {name: p.detach().clone() for name, p in module.named_parameters()}
    state, optimizer = laprop_init(params), LaProp(module.parameters(), lr=0.01, warmup=3, weight_decay=0.1)
    for step in range(6):
        train(module, optimizer, 1, step)
        grads = {name: p.grad for name, p in module.named_parameters()}
        params, state = laprop_update(params, grads, state, learning_rate=0.01, warmup=3, weight_decay=0.1)
        assert all(torch.equal(p, params[name]) for name, p in module.named_parameters())


def test_defaults_are_those_of_the_pure_update():
    weight = nn.Parameter(torch.randn(3))
    params, state, optimizer = weight.detach().clone(), laprop_init(weight.detach()), LaProp([weight])
    for _ in range(3):
        weight.grad = torch.randn(3)
        optimizer.step()
        params, state = laprop_update(params, weight.grad, state)
    assert torch.equal(weight, params)


def test_it_learns():
    module, x = network(), torch.randn(64, 3)
    target, optimizer = x[:, :2] * 2 - 1, LaProp(module.parameters(), lr=1e-2, warmup=10)
    for _ in range(300):
        optimizer.zero_grad()
        loss = (module(x) - target).square().mean()
        loss.backward()
        optimizer.step()
    assert loss < 0.3


def test_parameters_are_written_in_place_and_gradients_stay():
    module = network()
    optimizer = LaProp(module.parameters(), warmup=0)
    before = [(p, p.data_ptr()) for p in module.parameters()]
    train(module, optimizer, 2)
    assert all(p is q and p.data_ptr() == pointer for (p, pointer), q in zip(before, module.parameters(), strict=True))
    gradient = module[0].weight.grad.clone()
    optimizer.step()
    assert torch.equal(module[0].weight.grad, gradient)
    assert not any(x.requires_grad for state in optimizer.state.values() for x in state.values())


def test_a_parameter_without_gradient_waits():
    first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = LaProp([first, second], lr=0.1, warmup=0)
    first.grad = torch.ones(2)
    optimizer.step()
    assert second.tolist() == [1.0, 1.0]
    assert second not in optimizer.state
    second.grad = torch.ones(2)
    optimizer.step()
    assert optimizer.state[first]["step"] == 2
    assert optimizer.state[second]["step"] == 1
    # Its first update is corrected as a first one.
    assert_close(second.data, torch.full((2,), 0.9))


def test_groups_have_knobs_of_their_own():
    slow, fast = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = LaProp([{"params": [slow], "lr": 0.01}, {"params": [fast], "betas": (0.0, 0.5)}], lr=0.1, warmup=0)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "weight_decay": 0.5})
    slow.grad = fast.grad = torch.ones(2)
    optimizer.step()
    assert_close(slow.data, torch.full((2,), 0.99))
    assert_close(fast.data, torch.full((2,), 0.9))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.0, 0.5]


def test_dtypes_may_differ_between_parameters():
    wide, narrow = nn.Parameter(torch.ones(2, dtype=torch.float64)), nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    optimizer = LaProp([wide, narrow], lr=0.5, warmup=0)
    wide.grad, narrow.grad = torch.ones_like(wide), torch.ones_like(narrow)
    optimizer.step()
    assert wide.dtype == optimizer.state[wide]["square"].dtype == torch.float64
    assert narrow.dtype == torch.bfloat16
    assert optimizer.state[narrow]["square"].dtype == torch.float32
    assert_close(narrow.detach().double(), wide.detach())


def test_schedulers_change_the_rate_after_the_warmup():
    weight = nn.Parameter(torch.ones(1))
    optimizer = LaProp([weight], lr=0.1, warmup=2, clip=0)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    moved = []
    for _ in range(4):
        before = weight.item()
        weight.grad = torch.ones(1)
        optimizer.step()
        scheduler.step()
        moved.append(before - weight.item())
    assert moved == pytest.approx([0.0, 0.1 * 0.5 * 0.5, 0.1 * 0.25, 0.1 * 0.125], abs=1e-6)


def test_the_learning_rate_may_be_a_tensor():
    first, second = network(), network()
    train(first, LaProp(first.parameters(), lr=torch.tensor(0.01), warmup=0), 3)
    train(second, LaProp(second.parameters(), lr=0.01, warmup=0), 3)
    for x, y in zip(first.parameters(), second.parameters(), strict=True):
        assert_close(x, y)


def test_closure():
    weight = nn.Parameter(torch.ones(2))
    optimizer = LaProp([weight], lr=0.1, warmup=0)

    def closure():
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 2.0
    assert_close(weight.data, torch.full((2,), 0.9))
    assert optimizer.step(lambda: None) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("through_a_file", [False, True])
def test_round_trip_goes_on_as_if_nothing_had_happened(dtype, through_a_file):
    straight = network(dtype)
    optimizer = LaProp(straight.parameters(), lr=0.1, warmup=4)
    train(straight, optimizer, 3)
    resumed, saved = copy.deepcopy(straight), optimizer.state_dict()
    if through_a_file:
        file = io.BytesIO()
        torch.save(saved, file)
        saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    other = LaProp(resumed.parameters(), lr=0.9, clip=0.1)
    other.load_state_dict(saved)
    assert other.param_groups[0]["lr"] == 0.1
    assert other.param_groups[0]["clip"] == 0.3
    assert all(state["square"].dtype == torch.float32 for state in other.state.values())
    train(straight, optimizer, 4, 3)
    train(resumed, other, 4, 3)
    assert same(straight, resumed)


def test_copies_go_on_too():
    module = network()
    optimizer = LaProp(module.parameters(), warmup=0)
    train(module, optimizer, 2)
    for duplicate in (copy.deepcopy((module, optimizer)), pickle.loads(pickle.dumps((module, optimizer)))):
        train(*duplicate, 1, 2)
        expected = copy.deepcopy((module, optimizer))
        train(*expected, 1, 2)
        assert same(duplicate[0], expected[0])
        assert not same(duplicate[0], module)


def test_a_saved_state_does_not_move():
    module = network()
    optimizer = LaProp(module.parameters(), warmup=0)
    train(module, optimizer, 1)
    saved = optimizer.state_dict()
    before = copy.deepcopy(saved)
    other = LaProp(network().parameters())
    other.load_state_dict(saved)
    train(module, optimizer, 2, 1)
    assert_close(saved["state"], before["state"], rtol=0, atol=0)
    assert other.state[other.param_groups[0]["params"][0]]["step"] == 1


def test_a_state_of_another_shape_is_refused_and_changes_nothing():
    module, other = network(), nn.Linear(3, 2)
    optimizer = LaProp(module.parameters(), lr=0.1)
    train(module, optimizer, 1)
    before = copy.deepcopy(optimizer.state_dict())
    wrong = copy.deepcopy(before)
    wrong["param_groups"][0]["lr"] = 0.5
    wrong["state"][2]["momentum"] = torch.zeros(3)
    with pytest.raises(
        ValueError, match=r"^LaProp.load_state_dict: state 2 'momentum' must be of shape \[2, 4\] like its parameter"
    ):
        optimizer.load_state_dict(wrong)
    adam = torch.optim.Adam(network().parameters())
    for p in adam.param_groups[0]["params"]:
        p.grad = torch.zeros_like(p)
    adam.step()
    with pytest.raises(KeyError, match=r"state 0 must be a mapping with 'square', got keys \['exp_avg'"):
        optimizer.load_state_dict(adam.state_dict())
    with pytest.raises(ValueError, match="doesn't match the size"):
        optimizer.load_state_dict(LaProp(other.parameters()).state_dict())
    assert_close(optimizer.state_dict()["state"], before["state"], rtol=0, atol=0)
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_a_gradient_that_is_not_finite_stays_with_its_parameter():
    module = network()
    optimizer = LaProp(module.parameters(), warmup=0)
    module(torch.ones(1, 3)).sum().backward()
    module[0].weight.grad[0, 0] = math.nan
    optimizer.step()
    assert module[0].weight.isnan().all()
    assert all(p.isfinite().all() for name, p in module.named_parameters() if name != "0.weight")


WEIGHT = nn.Parameter(torch.ones(2))
ERRORS = [
    ({"lr": -1.0}, ValueError, "learning_rate must be at least 0, got -1.0"),
    ({"betas": (1.0, 0.999)}, ValueError, "beta1 must be less than 1, got 1.0"),
    ({"betas": (0.9, 1.1)}, ValueError, r"beta2 must be in \[0, 1\], got 1.1"),
    ({"eps": 0.0}, ValueError, "eps must be at least"),
    ({"clip": "0.3"}, TypeError, "clip must be a number"),
    ({"floor": 0}, ValueError, "floor must be at least"),
    ({"warmup": 0.5}, TypeError, "warmup must be an int, got float 0.5"),
    ({"nesterov": None}, TypeError, "nesterov must be True or False, got NoneType"),
    ({"weight_decay": -0.1}, ValueError, "weight_decay must be at least 0, got -0.1"),
]


@pytest.mark.parametrize(("knobs", "error", "text"), ERRORS, ids=range(len(ERRORS)))
def test_knobs_out_of_range_are_refused_at_once(knobs, error, text):
    with pytest.raises(error, match=text):
        LaProp([WEIGHT], **knobs)
    optimizer = LaProp([WEIGHT])
    with pytest.raises(error, match=text):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], **knobs})
    assert len(optimizer.param_groups) == 1


def test_a_sparse_gradient_is_refused():
    embedding = nn.Embedding(4, 2, sparse=True)
    optimizer = LaProp(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match=r"^LaProp.step: each gradient must be dense, got torch.sparse_coo"):
        optimizer.step()


def test_a_complex_parameter_is_refused():
    weight = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    weight.grad = torch.ones_like(weight)
    with pytest.raises(TypeError, match=r"must be a floating-point tensor, got complex64 \[2\]"):
        LaProp([weight]).step()
