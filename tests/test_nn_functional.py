"""A module as a pure function and its parameters."""

import pytest
import torch
from tensordict import TensorDict, TensorDictParams
from torch import nn
from torch.func import grad, jacrev, jvp, vmap

from rlloss_nn import functionalize


def mlp(inputs=4, outputs=3):
    return nn.Sequential(nn.Linear(inputs, 5), nn.Tanh(), nn.Linear(5, outputs))


def detached(params):
    return {name: p.detach().clone() for name, p in params.items()}


def test_apply_equals_the_module():
    module, x = mlp(), torch.randn(7, 4)
    apply, params = functionalize(module)
    assert torch.equal(apply(params, x), module(x))


def test_apply_follows_the_parameters_it_is_given_and_leaves_the_modules_alone():
    module, other, x = mlp(), mlp(), torch.randn(7, 4)
    before = detached(dict(module.named_parameters()))
    apply, _ = functionalize(module)
    assert torch.equal(apply(functionalize(other)[1], x), other(x))
    for name, p in module.named_parameters():
        assert torch.equal(p, before[name])


def test_nothing_is_copied():
    module = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).eval()
    _, params = functionalize(module)
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    assert params.keys() == own.keys()
    for name, tensor in own.items():
        assert params[name] is tensor


def test_backward_fills_the_gradients_of_the_module():
    module, x = mlp(), torch.randn(7, 4)
    apply, params = functionalize(module)
    apply(params, x).square().sum().backward()
    got = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    module(x).square().sum().backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(got, module.parameters(), strict=True))


def test_parameters_as_tensordicts():
    module, x = mlp(), torch.randn(7, 4)
    apply, params = functionalize(module)
    expected = module(x)
    nested = TensorDict.from_module(module)
    assert ("0", "weight") in nested.keys(True)
    flat = TensorDict(dict(params), [])
    for given in (nested, nested.data, flat, flat.unflatten_keys("."), TensorDictParams(nested.data.clone())):
        assert torch.equal(apply(given, x), expected)


def test_parameters_may_be_tied():
    module, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), torch.randn(7, 4)
    module[2].weight = module[0].weight
    apply, params = functionalize(module)
    assert list(params) == ["0.weight", "0.bias", "2.bias"]
    other = {name: p.detach() + 1 for name, p in params.items()}
    untied = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    untied.load_state_dict({**other, "2.weight": other["0.weight"]})
    assert torch.equal(apply(other, x), untied(x))
    assert torch.equal(apply({**other, "2.weight": other["0.weight"]}, x), untied(x))


def test_several_inputs_and_any_outputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, x, y):
            return {"sum": self.scale * (x + y), "product": x * y}

    apply, params = functionalize(Two())
    out = apply(params, torch.tensor(3.0), torch.tensor(4.0))
    assert out["sum"].item() == 14
    assert out["product"].item() == 12


def test_variants(variant):
    module, x = mlp(), torch.randn(7, 4)
    apply, params = functionalize(module)
    torch.testing.assert_close(variant(apply)(detached(params), x), module(x))


def test_transforms_agree_with_autograd():
    module, x = mlp(), torch.randn(7, 4)
    apply, params = functionalize(module)
    module(x).square().sum().backward()
    gradient = grad(lambda p: apply(p, x).square().sum())(detached(params))
    for name, p in module.named_parameters():
        torch.testing.assert_close(gradient[name], p.grad)
    direction = {name: torch.randn_like(p) for name, p in params.items()}
    _, tangent = jvp(lambda p: apply(p, x).square().sum(), (detached(params),), (direction,))
    torch.testing.assert_close(tangent, sum((gradient[name] * direction[name]).sum() for name in params))
    jacobian = jacrev(lambda p: apply(p, x))(detached(params))
    assert jacobian["2.bias"].shape == (7, 3, 3)


@pytest.mark.parametrize("container", ["dict", "nested TensorDict"])
def test_an_ensemble_by_vmap_equals_a_loop(container):
    modules, x = [mlp() for _ in range(3)], torch.randn(7, 4)
    apply, _ = functionalize(modules[0])
    members = [detached(functionalize(m)[1]) for m in modules]
    stacked = {name: torch.stack([m[name] for m in members]) for name in members[0]}
    if container == "nested TensorDict":
        stacked = TensorDict(stacked, [3]).unflatten_keys(".")
    together = vmap(apply, in_dims=(0, None))(stacked, x)
    torch.testing.assert_close(together, torch.stack([m(x) for m in modules]))
    gradients = vmap(grad(lambda p: apply(p, x).sum()))(stacked)
    if container == "nested TensorDict":
        gradients = gradients.flatten_keys(".")
    for i, module in enumerate(modules):
        module(x).sum().backward()
        for name, p in module.named_parameters():
            torch.testing.assert_close(gradients[name][i], p.grad)


@pytest.mark.parametrize("as_tensordict", [False, True])
def test_missing_and_unexpected_parameters_are_refused(as_tensordict):
    apply, params = functionalize(mlp())
    wrap = (lambda p: TensorDict(p, []).unflatten_keys(".")) if as_tensordict else dict
    without = {name: p for name, p in params.items() if name != "2.bias"}
    with pytest.raises(KeyError, match=r"functionalize: params must be all of Sequential.*missing \['2.bias'\]"):
        apply(wrap(without), torch.randn(1, 4))
    with pytest.raises(KeyError, match=r"missing \[\], unexpected \['3.weight'\]"):
        apply(wrap({**params, "3.weight": torch.ones(1)}), torch.randn(1, 4))


BATCH_NORM = r"functionalize: module .* no buffer, got Sequential with a BatchNorm1d at '1' in train mode.*\.eval\(\)"


def test_batch_norm_in_train_mode_is_refused_at_once():
    with pytest.raises(ValueError, match=BATCH_NORM):
        functionalize(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)))


def test_batch_norm_in_eval_mode_works_and_writes_nothing():
    module = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).eval()
    x = torch.randn(7, 4)
    apply, params = functionalize(module)
    given = {name: p.detach().clone() for name, p in params.items()}
    before = {name: p.clone() for name, p in given.items()}
    assert torch.equal(apply(given, x), module(x))
    assert all(torch.equal(given[name], before[name]) for name in given)


def test_batch_norm_put_back_into_train_mode_is_refused_at_the_call():
    module = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).eval()
    apply, params = functionalize(module)
    module.train()
    before = {name: p.clone() for name, p in params.items()}
    with pytest.raises(ValueError, match=BATCH_NORM):
        apply(params, torch.randn(7, 4))
    assert all(torch.equal(params[name], before[name]) for name in params)


def test_norms_that_keep_no_running_statistics_are_accepted():
    x = torch.randn(7, 4)
    for norm in (nn.LayerNorm(4), nn.RMSNorm(4), nn.GroupNorm(2, 4), nn.BatchNorm1d(4, track_running_stats=False)):
        apply, params = functionalize(norm)
        assert torch.equal(apply(params, x), norm(x))


@pytest.mark.parametrize("wrap", [nn.utils.parametrizations.spectral_norm, nn.utils.spectral_norm])
def test_spectral_norm_in_train_mode_is_refused(wrap):
    with pytest.raises(ValueError, match=r"SpectralNorm at .* in train mode"):
        functionalize(wrap(nn.Linear(4, 3)))
    module, x = wrap(nn.Linear(4, 3)).eval(), torch.randn(2, 4)
    apply, params = functionalize(module)
    assert torch.equal(apply(params, x), module(x))


def test_lazy_modules_are_refused_until_they_have_seen_data():
    module = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(ValueError, match=r"uninitialised \['0.weight', '0.bias'\]. Call the module once"):
        functionalize(module)
    with pytest.raises(ValueError, match=r"uninitialised \['running_mean', 'running_var'\]"):
        functionalize(nn.LazyBatchNorm1d(affine=False).eval())
    x = torch.randn(2, 4)
    module(x)
    apply, params = functionalize(module)
    assert torch.equal(apply(params, x), module(x))


class Doubler(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return self.scale * x

    def plus(self, x, y):
        return self.scale * x + y


def test_another_method_under_the_same_names(variant):
    apply, params = functionalize(Doubler(), method="plus")
    assert list(params) == ["scale"]
    result = variant(apply)({"scale": torch.tensor(3.0)}, torch.tensor([1.0]), torch.tensor([5.0]))
    assert result.tolist() == [8.0]


@pytest.mark.parametrize("method", ["minus", "training"])
def test_what_is_no_method_is_refused(method):
    with pytest.raises(
        ValueError, match=f"functionalize: method must be the name of a method of Doubler, got '{method}'"
    ):
        functionalize(Doubler(), method=method)
