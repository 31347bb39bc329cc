"""The same numbers as torchrl's classes, and use in their place. Skipped where torchrl is not installed."""

import itertools
import warnings
from collections.abc import Iterator

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from rlloss_nn import DreamerV3ModelLoss, RNDLoss, RunningMeanStd

with warnings.catch_warnings():
    # Its own, on import.
    warnings.simplefilter("ignore")
    torchrl = pytest.importorskip("torchrl", reason="torchrl is not installed: nothing to compare with")
    from torchrl.envs.transforms import RNDTransform
    from torchrl.envs.transforms.rnd import RunningMeanStd as TorchrlRunningMeanStd
    from torchrl.objectives import DreamerV3ModelLoss as TorchrlModelLoss
    from torchrl.objectives.rnd import RNDLoss as TorchrlRNDLoss

B, T, GROUPS, CLASSES, PIXELS, BINS = 2, 3, 4, 5, (3, 4, 4), 255


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """What torchrl warns of is not under test."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torchrl")
        yield


class Written(nn.Module):
    """A world model whose outputs are its parameters, so that their gradients can be compared."""

    def __init__(self, reward_two_hot=True, scale=1.0):
        super().__init__()
        shapes = {
            "prior_logits": (GROUPS, CLASSES),
            "posterior_logits": (GROUPS, CLASSES),
            "reco_pixels": PIXELS,
            "reco_vector": (7,),
            "continue_pred": (1,),
            **({"reward_logits": (BINS,)} if reward_two_hot else {"reward": (1,)}),
        }
        outputs = {name: scale * torch.randn(B, T, *shape).clamp(-4.9, 4.9) for name, shape in shapes.items()}
        self.outputs = nn.ParameterDict({name: nn.Parameter(x) for name, x in outputs.items()})

    def forward(self, td):
        for name, x in self.outputs.items():
            td.set(("next", name), x)
        return td


def batch():
    following = {
        "pixels": torch.rand(B, T, *PIXELS),
        "vector": 10 * torch.randn(B, T, 7),
        "reward": 10 * torch.randn(B, T, 1),
        "terminated": torch.rand(B, T, 1) < 0.5,
        "done": torch.ones(B, T, 1, dtype=torch.bool),
    }
    return TensorDict({"next": following}, [B, T])


def evaluate(loss, td):
    """Losses by name, and the gradient of each with respect to every parameter."""
    losses, outputs = loss(td)
    parameters = dict(loss.named_parameters())
    gradients = {}
    for name, value in losses.items():
        assert value.numel() == 1
        by_parameter = torch.autograd.grad(
            value.sum(), list(parameters.values()), retain_graph=True, materialize_grads=True
        )
        gradients |= {(name, p): g for p, g in zip(parameters, by_parameter, strict=True)}
    return {name: value.detach().squeeze() for name, value in losses.items()}, gradients, outputs


def assert_same(world, td, keys=(), theirs=(), ours=(), **knobs):
    """Our loss equals torchrl's in names, values, gradients and outputs."""
    reference, loss = (
        TorchrlModelLoss(world, **{**knobs, **dict(theirs)}),
        DreamerV3ModelLoss(world, **knobs, **dict(ours)),
    )
    for module in (reference, loss):
        module.set_keys(**dict(keys))
    expected, wanted_gradients, wanted_outputs = evaluate(reference, td)
    got, gradients, outputs = evaluate(loss, td)
    assert set(got) == set(expected)
    assert set(loss.out_keys) == set(got)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients, wanted_gradients, rtol=1e-5, atol=1e-6)
    assert set(outputs.keys(True, True)) == set(wanted_outputs.keys(True, True))
    return got


@pytest.mark.parametrize("reward_two_hot", [True, False])
def test_model_loss_for_every_combination_of_options(reward_two_hot):
    world, td = Written(reward_two_hot), batch()
    seen = set()
    for kl_alpha, free_bits, reco_loss, global_average, lambda_continue in itertools.product(
        (0.0, 0.5, 0.8, 1.0), (0.0, 0.1, 1.0), ("l2", "l1"), (False, True), (0.0, 0.5)
    ):
        losses = assert_same(
            world,
            td,
            kl_alpha=kl_alpha,
            free_bits=free_bits,
            reco_loss=reco_loss,
            global_average=global_average,
            reward_two_hot=reward_two_hot,
            lambda_continue=lambda_continue,
        )
        seen.add(tuple(f"{x.item():.4g}" for x in losses.values()))
    # Every option but kl_alpha changes a value; the balance changes gradients only, since both terms are one KL.
    assert len(seen) == 3 * 2 * 2 * 2


@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_model_loss_with_weights_and_other_logits(scale):
    world, td = Written(scale=scale), batch()
    weights = {"lambda_kl": 0.3, "lambda_reco": 2.0, "lambda_reward": 0.7, "lambda_continue": 1.5}
    assert_same(world, td, **weights, continue_target_scale=0.9, free_bits=0.01)


def test_model_loss_in_separate_mode():
    world, td = Written(), batch()
    for unimix, free_bits, lambda_kl in itertools.product((0.0, 0.01, 0.3), (0.0, 0.1, 1.0, 30.0), (1.0, 0.4)):
        assert_same(
            world,
            td,
            kl_mode="separate",
            unimix=unimix,
            free_bits=free_bits,
            lambda_kl=lambda_kl,
            lambda_dynamic=0.5,
            lambda_representation=0.2,
        )


@pytest.mark.parametrize("symlog", [[False, True], [True, False], [True, True]])
def test_model_loss_of_several_heads(symlog):
    td = batch()
    td["next", "pixels"] = (
        torch.randint(0, 256, (B, T, *PIXELS), dtype=torch.uint8) if not symlog[0] else td["next", "pixels"]
    )
    transforms = dict(zip(("pixels", "vector"), ("symlog" if s else "none" for s in symlog), strict=True))
    keys = {"pixels": ["pixels", "vector"], "reco_pixels": ["reco_pixels", "reco_vector"]}
    assert_same(Written(), td, keys, {"reco_symlog": symlog}, {"reco_transform": transforms})


def test_model_loss_with_two_heads_of_one_observation():
    world, td = Written(), batch()
    keys = {"pixels": ["pixels", "pixels"], "reco_pixels": ["reco_pixels", "reco_pixels"]}
    assert_same(world, td, keys)


def test_model_loss_with_done_and_without_trailing_dimensions():
    td = batch()
    td["next"].pop("terminated")
    td["next", "done"] = torch.rand(B, T, 1) < 0.5
    assert_same(Written(), td, lambda_continue=1.0)


def test_model_loss_reads_older_models_alike():
    world, td = Written(), batch()
    world.outputs["reward"] = world.outputs.pop("reward_logits")
    results = []
    for loss in (TorchrlModelLoss(world), DreamerV3ModelLoss(world)):
        with pytest.warns(DeprecationWarning, match=r"v0\.16"):
            results.append(loss(td)[0]["loss_model_reward"].squeeze())
    torch.testing.assert_close(*results)


def test_model_terms_are_scalars_here():
    """The one difference that is meant: torchrl's have shape [1]."""
    world, td = Written(), batch()
    assert {x.shape for x in TorchrlModelLoss(world)(td)[0].values()} == {(1,)}
    assert {x.shape for x in DreamerV3ModelLoss(world)(td)[0].values()} == {()}


def test_keys_and_defaults_are_the_same():
    ours, theirs = DreamerV3ModelLoss(Written()), TorchrlModelLoss(Written())
    assert vars(ours.tensor_keys) == vars(theirs.tensor_keys)
    assert ours.detach_output == theirs.detach_output
    extra = {"reco_transform"}
    assert all(getattr(theirs, name) == value for name, value in ours.knobs.items() if name not in extra)
    ours, theirs = RNDLoss(*networks()), TorchrlRNDLoss(*networks())
    assert vars(ours.tensor_keys) == vars(theirs.tensor_keys)
    assert ours.out_keys == theirs.out_keys
    for name in ("obs_rms", "obs_clip", "reduction", "update_fraction"):
        assert getattr(ours, name) == getattr(theirs, name)


def networks():
    return tuple(nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 8)) for _ in range(2))


def observations(*size):
    return TensorDict({"next": {"observation": 2 + 3 * torch.randn(*size, 4)}}, size)


def filled(cls):
    rms = cls((4,))
    rms.update(2 + 3 * torch.randn(50, 4))
    return rms


def test_rnd_loss_for_every_reduction_and_statistics():
    predictor, target = networks()
    statistics = (None, filled(TorchrlRunningMeanStd), filled(RunningMeanStd))
    for rms, reduction, size, clip in itertools.product(
        statistics, ("mean", "sum", "none"), ((16,), (3, 4), (1,)), (5.0, 0.5)
    ):
        # Theirs calls normalize of what it is given, ours reads mean and var: either takes either.
        kwargs = {"obs_rms": rms, "obs_clip": clip, "reduction": reduction, "update_fraction": 1.0}
        td, results = observations(*size), []
        for cls in (TorchrlRNDLoss, RNDLoss):
            value = cls(predictor, target, **kwargs)(td)["loss_predictor"]
            results.append((value, torch.autograd.grad(value.sum(), list(predictor.parameters()))))
        torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)


def test_rnd_loss_of_float64_observations():
    """As simulators give them: the networks are float32."""
    predictor, target = networks()
    td = observations(8).to(torch.float64)
    results = [cls(predictor, target, update_fraction=1.0)(td)["loss_predictor"] for cls in (TorchrlRNDLoss, RNDLoss)]
    torch.testing.assert_close(results[1], results[0])


def test_rnd_loss_shares_networks_and_statistics_with_the_transform():
    predictor, target = networks()
    transform = RNDTransform(target, predictor)
    transform.train()
    for _ in range(3):
        transform._step(TensorDict({}, [8]), TensorDict({"observation": 2 + 3 * torch.randn(8, 4)}, [8]))
    loss = RNDLoss(predictor, target, obs_rms=transform.obs_rms, update_fraction=1.0)
    reference = TorchrlRNDLoss(predictor, target, obs_rms=transform.obs_rms, update_fraction=1.0)
    optimizer, td = torch.optim.Adam(predictor.parameters(), lr=3e-3), observations(32)
    transform.eval()

    def bonus():
        following = TensorDict({"observation": td["next", "observation"]}, [32])
        return transform._step(TensorDict({}, [32]), following)["intrinsic_reward"].mean().item()

    before = bonus()
    for _ in range(100):
        torch.testing.assert_close(loss(td)["loss_predictor"], reference(td)["loss_predictor"])
        optimizer.zero_grad()
        loss(td)["loss_predictor"].backward()
        optimizer.step()
    assert bonus() < before / 2, "training with our loss lowers the bonus of their transform"


def test_running_mean_std_is_the_same_and_loads_theirs():
    ours, theirs = RunningMeanStd((4,)), TorchrlRunningMeanStd((4,))
    for size in (7, 1, 30):
        x = 2 + 3 * torch.randn(size, 4)
        ours.update(x)
        theirs.update(x)
    x = torch.randn(5, 4)
    torch.testing.assert_close(ours.normalize(x), theirs.normalize(x))
    torch.testing.assert_close(ours.var, theirs.var)
    fresh = RunningMeanStd((4,))
    fresh.load_state_dict(theirs.state_dict())
    assert torch.equal(fresh.mean, theirs.mean)
    assert torch.equal(fresh.var, theirs.var)
    assert fresh.count == theirs.count
    assert fresh.count.dtype == torch.float64
    theirs.load_state_dict(fresh.state_dict())
    torch.testing.assert_close(theirs.normalize(x), ours.normalize(x))


def test_a_plain_loop_trains_with_either():
    """The usual loop, sum of what starts with "loss" and backward, gives the same parameters."""
    trained = []
    for model_loss, rnd_loss in ((TorchrlModelLoss, TorchrlRNDLoss), (DreamerV3ModelLoss, RNDLoss)):
        torch.manual_seed(0)
        modules = [model_loss(Written(), free_bits=0.1), rnd_loss(*networks(), update_fraction=1.0)]
        parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
        optimizer, td, observed = torch.optim.SGD(parameters, lr=1e-2), batch(), observations(8)
        totals = []
        for _ in range(5):
            losses = {**modules[0](td)[0], **modules[1](observed)}
            total = sum(value.sum() for name, value in losses.items() if name.startswith("loss_"))
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            totals.append(total.item())
        assert totals[-1] < totals[0]
        trained.append([p.detach() for p in parameters])
    torch.testing.assert_close(trained[1], trained[0], rtol=1e-5, atol=1e-6)
