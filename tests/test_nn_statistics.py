"""Running statistics as a module."""

import copy
import pickle

import pytest
import torch
from torch import nn

from rlloss import statistics
from rlloss_nn import RunningMeanStd


def filled(shape=(4,), **kwargs):
    rms = RunningMeanStd(shape, **kwargs)
    rms.update(3 + 2 * torch.randn(50, *shape))
    return rms


@pytest.mark.parametrize("case", ["rms_vec", "rms_scalar", "rms_image", "rms_eps"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5)])
def test_golden(golden, case, dtype, tolerance):
    file = golden("09_rnd")
    case_meta = {"rms_eps": 0.01}
    shape = file[f"{case}.out.mean"].shape[1:]
    rms = RunningMeanStd(shape, case_meta.get(case, 1e-4), dtype=dtype)

    def check(row):
        for name in ("mean", "var", "count"):
            expected = file[f"{case}.out.{name}"][row]
            torch.testing.assert_close(getattr(rms, name).double(), expected, rtol=tolerance, atol=tolerance * 1e-2)

    check(0)
    for i in range(len(file[f"{case}.out.mean"]) - 1):
        assert rms.update(file[f"{case}.in.batch{i}"].to(dtype)) is None
        check(i + 1)
    normed = rms.normalize(file[f"{case}.in.probe"].to(dtype), clip=5.0)
    torch.testing.assert_close(normed.double(), file[f"{case}.out.probe_normed"], rtol=tolerance, atol=tolerance)


def test_equals_the_pure_functions():
    rms, state, x = (
        RunningMeanStd((2, 3), 0.5),
        statistics.running_mean_std_init((2, 3), epsilon=0.5),
        torch.randn(6, 2, 3),
    )
    rms.update(x)
    state = statistics.running_mean_std_update(state, x)
    assert all(torch.equal(a, b) for a, b in zip(rms.state, state, strict=True))
    for clip in (None, 1.0):
        assert torch.equal(rms.normalize(x, clip), statistics.running_mean_std_normalize(state, x, clip))


def test_buffers_stay_the_same_objects():
    rms = RunningMeanStd((4,))
    mean, var, count = rms.mean, rms.var, rms.count
    rms.update(torch.randn(8, 4))
    assert rms.mean is mean
    assert rms.var is var
    assert rms.count is count
    assert count > 8
    assert dict(rms.named_parameters()) == {}


def test_state_is_a_view_and_load_state_a_copy():
    rms, other = filled(), RunningMeanStd((4,))
    assert rms.state.mean is rms.mean
    other.load_state(rms.state)
    assert torch.equal(other.var, rms.var)
    assert other.var is not rms.var


def test_load_state_refuses_another_shape_and_changes_nothing():
    rms = filled()
    before = [x.clone() for x in rms.state]
    with pytest.raises(ValueError, match=r"RunningMeanStd.load_state: state.mean must be of shape \[4\] like"):
        rms.load_state(statistics.running_mean_std_init(()))
    with pytest.raises(ValueError, match=r"state.var"):
        rms.load_state(rms.state._replace(var=torch.ones(3)))
    assert all(torch.equal(a, b) for a, b in zip(rms.state, before, strict=True))


def test_wrong_input_changes_nothing():
    rms = filled()
    before = [x.clone() for x in rms.state]
    with pytest.raises(ValueError, match=r"x must be of shape \[..., 4\] like the statistics, got float32 \[2, 5\]"):
        rms.update(torch.ones(2, 5))
    with pytest.raises(TypeError, match="x must be a tensor"):
        rms.update([1.0])
    with pytest.raises(ValueError, match="like the statistics"):
        rms.normalize(torch.ones(2, 5))
    rms.update(torch.ones(0, 4))
    rms.update(torch.full((3, 4), torch.nan))
    assert all(torch.equal(a, b) for a, b in zip(rms.state, before, strict=True))


def test_non_finite_entries_leave_the_others_their_way():
    rms, clean, x = RunningMeanStd((2,)), RunningMeanStd((1,)), torch.randn(6, 2)
    x[3, 0] = torch.inf
    rms.update(x)
    clean.update(x[:, 1:])
    assert torch.equal(rms.mean, torch.stack([torch.zeros(()), clean.mean[0]]))
    assert torch.equal(rms.var, torch.stack([torch.ones(()), clean.var[0]]))


def test_constructor_refuses():
    with pytest.raises(TypeError, match="shape must be a tuple of ints"):
        RunningMeanStd(4)
    with pytest.raises(ValueError, match="epsilon must be at least 0"):
        RunningMeanStd((4,), -1.0)
    with pytest.raises(TypeError, match="floating-point dtype"):
        RunningMeanStd((4,), dtype=torch.int64)


def test_no_gradient_passes_the_statistics():
    rms, x = filled(), torch.randn(3, 4, requires_grad=True)
    rms.update(x)
    assert not rms.mean.requires_grad
    rms.normalize(x).sum().backward()
    torch.testing.assert_close(x.grad, rms.var.rsqrt().expand(3, 4))


def test_state_dict_round_trip():
    rms, other = filled(), RunningMeanStd((4,))
    state = rms.state_dict()
    assert list(state) == ["mean", "var", "count"]
    other.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(rms.state, other.state, strict=True))
    assert other.count.dtype == torch.float64


def test_state_dict_of_another_shape_is_refused_and_nothing_overwritten():
    state, other = filled().state_dict(), RunningMeanStd((3,))
    other.update(torch.randn(5, 3))
    before = {name: x.clone() for name, x in other.state_dict().items()}
    match = r"RunningMeanStd.load_state_dict: 'mean' must be of shape \[3\] like the module's own, got float32 \[4\]"
    with pytest.raises(ValueError, match=match):
        other.load_state_dict(state)
    assert all(torch.equal(x, before[name]) for name, x in other.state_dict().items())
    # torch alone would take the first number of a vector.
    with pytest.raises(ValueError, match=r"'count' must be of shape \[\] like the module's own, got float64 \[2\]"):
        other.load_state_dict({**before, "count": torch.ones(2, dtype=torch.float64)})
    with pytest.raises(KeyError, match=r"RunningMeanStd.load_state_dict: state_dict must be .* missing \['count'\]"):
        other.load_state_dict({"mean": torch.ones(3), "var": torch.ones(3)})
    assert all(torch.equal(x, before[name]) for name, x in other.state_dict().items())
    parent = torch.nn.ModuleDict({"rms": other})
    with pytest.raises(ValueError, match=r"'rms.mean' must be of shape \[3\]"):
        parent.load_state_dict({f"rms.{name}": x for name, x in state.items()})
    assert all(torch.equal(x, before[name]) for name, x in other.state_dict().items())


def test_copies_are_independent():
    rms = filled()
    for other in (copy.deepcopy(rms), pickle.loads(pickle.dumps(rms))):
        before = rms.mean.clone()
        assert torch.equal(other.mean, before)
        other.update(torch.randn(8, 4))
        assert torch.equal(rms.mean, before)


@pytest.mark.parametrize("owner", [lambda rms: rms, lambda rms: nn.ModuleList([rms])])
def test_casts(owner):
    rms = filled()
    mean, var, count = (x.clone() for x in rms.state)
    owner(rms).to(torch.float64)
    assert (rms.mean.dtype, rms.var.dtype, rms.count.dtype) == (torch.float64,) * 3
    assert torch.equal(rms.mean, mean.double())
    assert rms.normalize(torch.randn(3, 4, dtype=torch.float64)).dtype == torch.float64
    owner(rms).float()
    assert (rms.mean.dtype, rms.count.dtype) == (torch.float32, torch.float64)
    owner(rms).half()
    owner(rms).bfloat16()
    assert (rms.mean.dtype, rms.var.dtype, rms.count.dtype) == (torch.float32, torch.float32, torch.float64)
    assert torch.equal(rms.mean, mean)
    assert torch.equal(rms.var, var)
    assert torch.equal(rms.count, count)


def test_half_precision_owner_does_not_stop_the_count():
    rms = RunningMeanStd(()).half()
    for _ in range(3):
        rms.update(torch.randn(40_000))
    torch.testing.assert_close(rms.count, torch.tensor(120_000.0, dtype=torch.float64))
    assert rms.var > 0.9


def test_meta_device():
    rms = RunningMeanStd((4,)).to("meta")
    assert {x.device.type for x in rms.state} == {"meta"}
    rms.update(torch.ones(3, 4, device="meta"))
    assert rms.normalize(torch.ones(3, 4, device="meta")).shape == (3, 4)
    assert rms.to_empty(device="cpu").mean.device.type == "cpu"


def test_shown():
    assert repr(RunningMeanStd((4,))) == "RunningMeanStd(shape=(4,))"


def test_compiled():
    torch.compiler.reset()
    rms, eager, x = filled(), RunningMeanStd((4,)), torch.randn(8, 4)
    eager.load_state(rms.state)
    torch.compile(rms.update, backend="aot_eager", fullgraph=True)(x)
    eager.update(x)
    torch.testing.assert_close(rms.mean, eager.mean)
    torch.testing.assert_close(rms.var, eager.var)
