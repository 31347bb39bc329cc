"""DreamerV3's world-model loss as a torch module."""

import copy
import pickle
import warnings

import pytest
import torch
from tensordict import LazyStackedTensorDict, TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torch.func import grad, jvp, vmap

import rlloss
from rlloss.dreamer_v3 import dreamer_v3_model_losses
from rlloss_nn import DreamerV3ModelLoss

B, T, GROUPS, CLASSES, PIXELS, ACTION, BINS = 2, 3, 4, 5, (3, 4, 4), 6, 17
NAMES = {
    "reward": "reward",
    "reward_logits": "reward_logits",
    "true_reward": "true_reward",
    "prior_logits": "prior_logits",
    "posterior_logits": "posterior_logits",
    "pixels": "pixels",
    "reco_pixels": "reco_pixels",
    "continue_pred": "continue_pred",
    "done": "done",
    "terminated": "terminated",
}


class World(nn.Module):
    """Linear heads on the action; writes under names of its own, and remembers what it read."""

    def __init__(
        self, heads=("prior_logits", "posterior_logits", "reco_pixels", "reward_logits"), names=(), inputs=ACTION
    ):
        super().__init__()
        sizes = {
            "prior_logits": (GROUPS, CLASSES),
            "posterior_logits": (GROUPS, CLASSES),
            "reco_pixels": PIXELS,
            "reco_vector": (7,),
            "reward_logits": (BINS,),
            "reward": (1,),
            "continue_pred": (1,),
        }
        self.sizes = {name: sizes[name] for name in heads}
        self.names = dict(names)
        self.heads = nn.ModuleDict(
            {name: nn.Linear(inputs, torch.Size(size).numel()) for name, size in self.sizes.items()}
        )
        self.seen = None

    def forward(self, td):
        self.seen = set(td.keys(True, True))
        for name, head in self.heads.items():
            key = self.names.get(name, name)
            td.set(
                ("next", *key) if isinstance(key, tuple) else ("next", key),
                head(td["action"]).unflatten(-1, self.sizes[name]),
            )
        return td


def sequential():
    """The same heads as TensorDictModules, which know their keys."""
    heads = {"prior_logits": (GROUPS, CLASSES), "posterior_logits": (GROUPS, CLASSES), "reward_logits": (BINS,)}
    return TensorDictSequential(
        *(
            TensorDictModule(
                nn.Sequential(nn.Linear(ACTION, torch.Size(size).numel()), nn.Unflatten(-1, size)),
                in_keys=["action"],
                out_keys=[("next", name)],
            )
            for name, size in {**heads, "reco_pixels": PIXELS}.items()
        )
    )


def batch(**more):
    following = {
        "pixels": torch.rand(B, T, *PIXELS),
        "reward": 3 * torch.randn(B, T, 1),
        "done": torch.zeros(B, T, 1, dtype=torch.bool),
        "terminated": torch.rand(B, T, 1) < 0.5,
        **more,
    }
    return TensorDict({"action": torch.randn(B, T, ACTION), "next": following}, [B, T])


def loss_of(world=None, **knobs):
    return DreamerV3ModelLoss(World() if world is None else world, **{"num_reward_bins": BINS, **knobs})


def params_of(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def pure_arguments(world, td):
    """What the pure function takes, for a world model with the default names."""

    def world_model(params, batch):
        written = torch.func.functional_call(world, params, (batch["td"],))["next"]
        outputs = {
            "prior_logits": written["prior_logits"],
            "posterior_logits": written["posterior_logits"],
            "reconstruction": written["reco_pixels"],
            "reward": written["reward_logits"] if "reward_logits" in written.keys() else written["reward"],
        }
        return outputs | ({"continue_logits": written["continue_pred"]} if "continue_pred" in written.keys() else {})

    following = td["next"]
    data = {"observation": following["pixels"], "reward": following["reward"], "terminated": following["terminated"]}
    return params_of(world), {**data, "td": td.clone()}, world_model


def test_the_example_that_users_know():
    import torch
    from tensordict import TensorDict
    from torch import nn

    from rlloss_nn import DreamerV3ModelLoss

    class StubWorldModel(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.LazyLinear(4 * 4)
            self.reward_head = nn.LazyLinear(16)
            self.decoder = nn.LazyLinear(3 * 8 * 8)

        def forward(self, td):
            B, T = td.shape  # noqa: N806
            x = torch.cat([td["state"], td["belief"]], dim=-1)
            logits = self.head(x).view(B, T, 4, 4)
            reco = self.decoder(x).view(B, T, 3, 8, 8)
            reward = self.reward_head(x)
            td.set(("next", "prior_logits"), logits)
            td.set(("next", "posterior_logits"), logits)
            td.set(("next", "reco_pixels"), reco)
            td.set(("next", "reward"), reward)
            return td

    wm = StubWorldModel()
    td = TensorDict(
        {
            "state": torch.zeros(2, 3, 16),
            "belief": torch.zeros(2, 3, 8),
            "action": torch.randn(2, 3, 2),
            "next": {
                "pixels": torch.rand(2, 3, 3, 8, 8),
                "reward": torch.randn(2, 3, 1),
                "done": torch.zeros(2, 3, dtype=torch.bool),
            },
        },
        [2, 3],
    )
    with torch.no_grad():
        wm(td.clone())
    loss = DreamerV3ModelLoss(wm, num_reward_bins=16, free_bits=0.1)
    # This world model keeps its logits under the older name.
    with pytest.warns(DeprecationWarning, match=r"'reward'.*write them under .*'reward_logits'"):
        loss_td, _ = loss(td)
    assert sorted(loss_td.keys()) == ["loss_model_kl", "loss_model_reco", "loss_model_reward"]

    assert loss_td.batch_size == torch.Size([])
    assert all(value.shape == () for value in loss_td.values())
    torch.testing.assert_close(loss_td["loss_model_kl"], torch.tensor(0.1))
    sum(loss_td.values()).backward()
    assert wm.decoder.bias.grad.any()


def test_defaults():
    loss = DreamerV3ModelLoss(World())
    assert loss.knobs == rlloss.dreamer_v3.DREAMER_V3_DEFAULTS
    assert {name: getattr(loss, name) for name in loss.knobs} == loss.knobs
    assert loss.detach_output is True
    assert vars(loss.tensor_keys) == vars(loss.default_keys()) == NAMES
    assert loss.out_keys == ["loss_model_kl", "loss_model_reco", "loss_model_reward"]
    assert loss.in_keys == [("next", "pixels"), ("next", "reward")]


WEIGHTS = {"lambda_kl": 0.5, "lambda_reco": 2.0, "lambda_reward": 3.0, "lambda_continue": 0.25}
KNOBS = {
    "defaults": {},
    "weights": WEIGHTS,
    "separate": {"kl_mode": "separate", "lambda_kl": 2.0, "unimix": 0.05, "free_bits": 0.1},
    "plain": {"reco_loss": "l1", "global_average": True, "kl_alpha": 0.3, "free_bits": 0.0, "reco_transform": "none"},
    "scalar reward": {"reward_two_hot": False, "lambda_reward": 0.7},
    "the author's": {**rlloss.DREAMER_V3_OFFICIAL},
}


@pytest.mark.parametrize("name", list(KNOBS))
def test_values_and_gradients_are_those_of_the_pure_function(name):
    knobs = {"num_reward_bins": BINS, **KNOBS[name]}
    reward = "reward_logits" if knobs.get("reward_two_hot", True) else "reward"
    world, td = World(("prior_logits", "posterior_logits", "reco_pixels", reward, "continue_pred")), batch()
    loss = DreamerV3ModelLoss(world, **knobs)
    losses, _ = loss(td)
    params, data, world_model = pure_arguments(world, td)
    value, aux = rlloss.dreamer_v3_model_loss(params, data, world_model=world_model, **knobs)
    weighted, _, _ = dreamer_v3_model_losses(aux["outputs"], data, **knobs)

    assert [f"loss_model_{term}" for term in weighted] == loss.out_keys
    assert sorted(losses.keys()) == sorted(loss.out_keys)
    for term, expected in weighted.items():
        assert torch.equal(losses[f"loss_model_{term}"], expected)
    total = sum(losses.values())
    torch.testing.assert_close(total, value)
    total.backward()
    gradient = grad(lambda p: rlloss.dreamer_v3_model_loss(p, data, world_model=world_model, **knobs)[0])(params)
    for parameter, p in world.named_parameters():
        torch.testing.assert_close(torch.zeros_like(p) if p.grad is None else p.grad, gradient[parameter])


@pytest.mark.parametrize("case", ["weights", "separate_u0.01", "separate_free0", "raw_uint8", "two_heads"])
def test_golden(golden, case):
    file = golden("10a_torchrl_model_loss")
    entries = {k.removeprefix(f"{case}.in."): v for k, v in file.items() if k.startswith(f"{case}.in.")}
    knobs = dict(file.meta["cases"][case]["kwargs"])
    raw = knobs.pop("reco_symlog", True)
    written = [k for k in entries if "logits" in k or k.startswith(("reco", "continue"))]

    class Written(nn.Module):
        def __init__(self):
            super().__init__()
            self.outputs = nn.ParameterDict({k: nn.Parameter(entries[k]) for k in written})

        def forward(self, td):
            for k, value in self.outputs.items():
                td.set(("next", k), value)
            return td

    following = {k: v for k, v in entries.items() if k in ("pixels", "vec", "reward", "terminated")}
    world = Written()
    loss = DreamerV3ModelLoss(world, **knobs)
    if case == "two_heads":
        loss.set_keys(pixels=["pixels", "vec"], reco_pixels=["reco_pixels", "reco_vec"])
        loss.reco_transform = {"pixels": "none", "vec": "symlog"}
        assert raw == [False, True]
    elif raw is False:
        loss.reco_transform = "none"
    losses, _ = loss(TensorDict({"next": following}, [2, 3]))
    expected = {k.removeprefix(f"{case}.out."): v for k, v in file.items() if k.startswith(f"{case}.out.")}
    assert set(losses.keys()) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value.squeeze(), rtol=1e-6, atol=0)
    sum(losses.values()).backward()
    gradients = {k.removeprefix(f"{case}.grad."): v for k, v in file.items() if k.startswith(f"{case}.grad.")}
    assert len(gradients) >= 4
    for name, value in gradients.items():
        got = world.outputs[name].grad
        torch.testing.assert_close(got, value, rtol=1e-5, atol=1e-5 * float(value.abs().max()))


# Names


def test_every_name_can_be_set():
    names = {name: f"my_{name}" for name in NAMES}
    heads = ("prior_logits", "posterior_logits", "reco_pixels", "reward_logits", "continue_pred")
    world = World(heads)
    td = batch()
    loss = loss_of(world, lambda_continue=1.0)
    expected, _ = loss(td)
    world.names = names
    for name in ("pixels", "reward", "terminated", "done"):
        td.rename_key_(("next", name), ("next", names[name]))
    loss.set_keys(**names)
    assert vars(loss.tensor_keys) == names
    losses, outputs = loss(td)
    assert (losses == expected).all()
    assert ("next", "my_true_reward") in world.seen
    assert ("next", "my_reward") not in world.seen
    assert torch.equal(outputs["next", "my_true_reward"], td["next", "my_reward"])


def test_names_may_be_nested_and_may_start_with_next():
    world, td = World(), batch()
    loss = loss_of(world)
    expected, _ = loss(td)
    td.rename_key_(("next", "pixels"), ("next", "camera", "front"))
    loss.set_keys(pixels=("camera", "front"), reward=("next", "reward"))
    assert (loss(td)[0] == expected).all()
    loss.set_keys(pixels=("next", "camera", "front"), reward=None)
    assert (loss(td)[0] == expected).all()


def two_heads():
    heads = ("prior_logits", "posterior_logits", "reco_pixels", "reco_vector", "reward_logits")
    td = batch(vector=torch.randn(B, T, 7))
    return World(heads), td


def test_several_heads_are_paired_in_order_and_summed():
    world, td = two_heads()
    first, second, both = loss_of(world), loss_of(world), loss_of(world)
    second.set_keys(pixels="vector", reco_pixels="reco_vector")
    both.set_keys(pixels=["vector", "pixels"], reco_pixels=["reco_vector", "reco_pixels"])
    assert both.in_keys == [("next", "vector"), ("next", "pixels"), ("next", "reward")]
    single = [loss(td)[0]["loss_model_reco"] for loss in (first, second)]
    torch.testing.assert_close(both(td)[0]["loss_model_reco"], sum(single))
    both.reco_transform = {"vector": "none", "pixels": "symlog"}
    second.reco_transform = "none"
    torch.testing.assert_close(both(td)[0]["loss_model_reco"], single[0] + second(td)[0]["loss_model_reco"])


def test_a_list_of_one_is_that_one():
    world, td = World(), batch()
    loss = loss_of(world)
    expected, _ = loss(td)
    for names in ({"pixels": ["pixels"]}, {"reco_pixels": ["reco_pixels"]}, {"pixels": "pixels"}):
        loss.set_keys(**names)
        assert (loss(td)[0] == expected).all()


def test_two_heads_of_one_observation_both_count():
    world, td = World(), batch()
    loss = loss_of(world)
    expected = 2 * loss(td)[0]["loss_model_reco"]
    loss.set_keys(pixels=["pixels", "pixels"], reco_pixels=["reco_pixels", ("next", "reco_pixels")])
    torch.testing.assert_close(loss(td)[0]["loss_model_reco"], expected)


def test_lists_of_different_length_are_refused():
    loss = loss_of()
    loss.set_keys(pixels=["pixels", "vector"])
    with pytest.raises(
        ValueError, match=r"must be lists of one length, got \['pixels', 'vector'\] and \['reco_pixels'\]"
    ):
        loss(batch())
    loss.set_keys(pixels=[], reco_pixels=[])
    with pytest.raises(TypeError, match="a mapping of at least one"):
        loss(batch())


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"set_keys: each name must be one of .*got 'reco_pixel'. .*'reco_pixels'\?"):
        loss_of().set_keys(reco_pixel="x")


# Calls


@pytest.mark.parametrize("knobs", [{}, {"kl_mode": "separate"}])
def test_calls_with_positions_and_keywords(knobs):
    td = batch()
    loss = loss_of(sequential(), **knobs)
    expected, _ = loss(td)
    expected = tuple(expected[key] for key in loss.out_keys)
    action, pixels, reward = td["action"], td["next", "pixels"], td["next", "reward"]
    assert loss.in_keys == ["action", ("next", "pixels"), ("next", "reward")]
    for got in (
        loss(action=action, next_pixels=pixels, next_reward=reward),
        loss(next_reward=reward, action=action, next_pixels=pixels),
        loss(action, pixels, reward),
        loss(action, pixels, next_reward=reward.squeeze(-1)),
    ):
        assert isinstance(got, tuple)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    losses, _ = loss(tensordict=td)
    assert tuple(losses[key] for key in loss.out_keys) == expected
    loss.set_keys(pixels="camera")
    assert torch.equal(loss(action=action, next_camera=pixels, next_reward=reward)[-2], expected[-2])


def test_keywords_with_a_terminal_flag():
    heads = ("prior_logits", "posterior_logits", "reco_pixels", "reward_logits", "continue_pred")
    td = batch()
    loss = loss_of(World(heads), lambda_continue=0.5)
    loss.in_keys = ["action", *loss.in_keys]
    assert loss.in_keys == ["action", ("next", "pixels"), ("next", "reward"), ("next", "terminated")]
    assert loss.out_keys[-1] == "loss_model_continue"
    entries = {"action": td["action"], **{f"next_{k}": td["next", k] for k in ("pixels", "reward", "terminated")}}
    losses, _ = loss(td)
    assert torch.equal(loss(**entries)[-1], losses["loss_model_continue"])
    with pytest.raises(KeyError, match=r"Neither .*terminated.* nor .*done.* is there, and lambda_continue > 0"):
        loss(**{k: v for k, v in entries.items() if k != "next_terminated"})


def test_keywords_of_one_dimensional_entries_make_a_batch_of_two_dimensions():
    """The last dimension of reward, action and observation is 1 in all: it is none of the batch."""

    class Shapes(World):
        def forward(self, td):
            assert td.shape == td["next"].shape == (B, T)
            return super().forward(td)

    world = Shapes(inputs=1)
    world.sizes["reco_pixels"] = (1,)
    world.heads["reco_pixels"] = nn.Linear(1, 1)
    loss = loss_of(world)
    loss.in_keys = ["action", *loss.in_keys]
    assert len(loss(torch.randn(B, T, 1), torch.randn(B, T, 1), torch.randn(B, T, 1))) == 3


def test_what_the_world_model_reads_under_true_reward_is_asked_for_as_reward():
    world = sequential()
    reader = TensorDictModule(nn.Identity(), in_keys=[("next", "true_reward")], out_keys=["copied"])
    loss = loss_of(TensorDictSequential(reader, *world))
    assert loss.in_keys == [("next", "reward"), "action", ("next", "pixels")]
    td = batch()
    outputs = loss(td)[1]
    assert torch.equal(outputs["copied"], td["next", "reward"])


@pytest.mark.parametrize("kind", ["plain", "locked", "lazy stack", "compiled"])
def test_the_callers_tensordict_stays_as_it_is(kind):
    td = batch()
    if kind == "lazy stack":
        td = LazyStackedTensorDict.lazy_stack(list(td.unbind(0)))
    before, entries = td.clone(), dict(td.items(True, True))
    if kind == "locked":
        td.lock_()
    loss = loss_of()
    if kind == "compiled":
        torch.compiler.reset()
        loss = torch.compile(loss, backend="aot_eager", fullgraph=True)
    loss(td)
    assert set(td.keys(True, True)) == set(before.keys(True, True))
    assert (td == before).all()
    if kind != "lazy stack":
        assert all(td[key] is value for key, value in entries.items())


def test_output_is_what_the_world_model_returned():
    td = batch()
    loss = loss_of(World(("prior_logits", "posterior_logits", "reco_pixels", "reward_logits", "reward")))
    _, outputs = loss(td)
    assert outputs.batch_size == (B, T)
    assert torch.equal(outputs["next", "true_reward"], td["next", "reward"])
    assert not torch.equal(outputs["next", "reward"], td["next", "reward"])
    assert torch.equal(outputs["action"], td["action"])
    assert not any(value.requires_grad for value in outputs.values(True, True))
    assert all(value.requires_grad for value in loss(td)[0].values())


def test_entries_that_are_no_tensors_and_nested_ones_reach_the_world_model():
    td = batch()
    td["task"] = "reach"
    td["next", "deep", "down"] = torch.ones(B, T)
    loss = loss_of()
    deep = td["next", "deep"]
    _, outputs = loss(td)
    assert outputs["task"] == "reach"
    assert torch.equal(outputs["next", "deep", "down"], torch.ones(B, T))
    loss.world_model.names = {"reco_pixels": ("deep", "reco")}
    loss.set_keys(reco_pixels=("deep", "reco"))
    _, outputs = loss(td)
    assert ("next", "deep", "reco") in outputs.keys(True)
    assert list(deep.keys()) == ["down"]


def test_output_stays_attached_where_asked():
    loss = loss_of(detach_output=False)
    _, outputs = loss(batch())
    outputs["next", "posterior_logits"].sum().backward()
    assert loss.world_model.heads["posterior_logits"].bias.grad.all()


def test_a_world_model_may_return_a_new_tensordict():
    class Fresh(World):
        def forward(self, td):
            return super().forward(td.copy()).select("next")

    world, td = World(), batch()
    fresh = Fresh()
    fresh.load_state_dict(world.state_dict())
    assert (loss_of(world)(td)[0] == loss_of(fresh)(td)[0]).all()


# Continuation


def with_continue(**knobs):
    heads = ("prior_logits", "posterior_logits", "reco_pixels", "reward_logits", "continue_pred")
    return loss_of(World(heads), lambda_continue=1.0, **knobs)


@pytest.mark.parametrize("trailing", [True, False])
def test_terminated_comes_before_done(trailing):
    loss, td = with_continue(), batch()
    if not trailing:
        td["next", "terminated"] = td["next", "terminated"].squeeze(-1)
    continues = ~td["next", "terminated"].reshape(B, T)
    losses, outputs = loss(td)
    expected = nn.functional.binary_cross_entropy_with_logits(
        outputs["next", "continue_pred"].squeeze(-1), continues.float()
    )
    torch.testing.assert_close(losses["loss_model_continue"], expected)
    td["next", "done"] = ~td["next", "done"]
    torch.testing.assert_close(loss(td)[0]["loss_model_continue"], expected)


def test_done_stands_in_for_terminated():
    loss, td = with_continue(continue_target_scale=0.9), batch()
    expected = loss(td)[0]["loss_model_continue"]
    td["next", "done"] = td["next"].pop("terminated")
    torch.testing.assert_close(loss(td)[0]["loss_model_continue"], expected)


def test_without_a_weight_nothing_is_asked_for():
    td = batch().exclude(("next", "done"), ("next", "terminated"))
    losses, _ = loss_of()(td)
    assert "loss_model_continue" not in losses.keys()


# What is refused


@pytest.mark.parametrize(
    ("missing", "match"),
    [
        (["reward"], r"one with \(.*next.*reward.*set_keys\(reward=...\)"),
        (["pixels"], r"one with \(.*next.*pixels.*set_keys\(pixels=...\)"),
        (["terminated", "done"], r"one with \(.*done.*Neither .*terminated.* nor .*done.*lambda_continue > 0"),
    ],
)
def test_missing_data(missing, match):
    td = batch().exclude(*(("next", name) for name in missing))
    with pytest.raises(KeyError, match=rf"DreamerV3ModelLoss: tensordict must be {match}"):
        with_continue()(td)


@pytest.mark.parametrize(
    ("head", "match"),
    [
        ("prior_logits", r"one with \(.*prior_logits.*set_keys\(prior_logits=...\)"),
        ("posterior_logits", r"one with \(.*posterior_logits.*set_keys\(posterior_logits=...\)"),
        ("reco_pixels", r"one with \(.*reco_pixels.*set_keys\(reco_pixels=...\)"),
        ("reward_logits", r"one with \(.*reward_logits.*predicts no reward.*set_keys\(reward_logits=...\)"),
        ("continue_pred", r"one with \(.*continue_pred.*lambda_continue > 0 asks for.*set_keys\(continue_pred=...\)"),
    ],
)
def test_missing_outputs(head, match):
    loss = with_continue()
    del loss.world_model.heads[head]
    with pytest.raises(KeyError, match=rf"DreamerV3ModelLoss: tensordict must be {match}"):
        loss(batch())


def test_a_scalar_reward_that_is_missing():
    with pytest.raises(KeyError, match=r"one with \(.*next.*reward.*predicts no reward.*set_keys\(reward=...\)"):
        loss_of(reward_two_hot=False)(batch())


def test_a_world_model_that_returns_nothing():
    class Forgetful(World):
        def forward(self, td):
            super().forward(td)

    with pytest.raises(TypeError, match=r"must be a TensorDict, got NoneType. Did the world model forget to return"):
        loss_of(Forgetful())(batch())


@pytest.mark.parametrize(
    ("knobs", "error", "match"),
    [
        ({"kl_alpha": 1.5}, ValueError, r"kl_alpha must be in \[0, 1\], got 1.5"),
        ({"free_bits": -1.0}, ValueError, "free_bits must be at least 0"),
        ({"lambda_reco": -1.0}, ValueError, "lambda_reco must be at least 0"),
        ({"reco_loss": "l3"}, ValueError, "reco_loss must be one of 'l2', 'l1', got 'l3'"),
        ({"kl_mode": "both"}, ValueError, "kl_mode must be one of"),
        ({"num_reward_bins": 1}, ValueError, "num_reward_bins must be an int of at least 2"),
        ({"free_nats": 1.0}, TypeError, "each knob must be one of"),
    ],
)
def test_knobs_are_checked_at_construction(knobs, error, match):
    with pytest.raises(error, match=match):
        DreamerV3ModelLoss(World(), **knobs)


def test_knobs_are_checked_again_where_they_are_changed_later():
    loss = loss_of()
    loss.kl_alpha = 2.0
    with pytest.raises(ValueError, match="kl_alpha must be"):
        loss(batch())


def test_shapes_and_dtypes_are_checked():
    with pytest.raises(ValueError, match=r"must be of shape \[..., 255\], got .*num_reward_bins to the width"):
        DreamerV3ModelLoss(World())(batch())
    with pytest.raises(ValueError, match=r"reward must be of shape \[2, 3\] like .*, got float32 \[2, 3, 3\]"):
        loss_of()(batch(reward=torch.randn(B, T, T)))
    with pytest.raises(TypeError, match="reward must be a tensor of numbers, got bool"):
        loss_of()(batch(reward=torch.ones(B, T, 1, dtype=torch.bool)))
    with pytest.raises(TypeError, match="terminated must be a bool tensor, got float32"):
        with_continue()(batch(terminated=torch.ones(B, T, 1)))
    with pytest.raises(ValueError, match=r"reconstruction of .* must be of shape"):
        loss_of()(batch(pixels=torch.rand(B, T, 1)))


def test_integer_rewards_and_images_are_promoted():
    loss = loss_of(reco_transform="auto")
    reward, pixels = torch.randint(-3, 4, (B, T, 1)), torch.randint(0, 256, (B, T, *PIXELS), dtype=torch.uint8)
    td = batch(reward=reward, pixels=pixels)
    whole, _ = loss(td)
    td["next", "reward"] = reward.float()
    assert (loss(td)[0] == whole).all()
    loss.reco_transform = "none"
    td["next", "pixels"] = pixels / 255
    torch.testing.assert_close(loss(td)[0]["loss_model_reco"], whole["loss_model_reco"])


# Older world models


def older(**knobs):
    world = World(names={"reward_logits": "reward"})
    return loss_of(world, **knobs)


def test_reward_logits_under_the_older_name_are_read_with_a_warning_at_the_callers_line():
    loss, td = older(), batch()
    with pytest.warns(DeprecationWarning, match=r"under \('next', 'reward'\), as older models do. .*v0.16") as caught:
        losses, _ = loss(td)
    assert [warning.filename for warning in caught] == [__file__]
    loss.world_model.names = {}
    assert (loss(td)[0] == losses).all()


def test_logits_come_before_the_older_name_without_a_warning():
    world, td = World(("prior_logits", "posterior_logits", "reco_pixels", "reward_logits", "reward")), batch()
    loss = loss_of(world)
    losses, _ = loss(td)
    del world.heads["reward"]
    assert (loss(td)[0] == losses).all()


def test_older_models_compile_without_the_warning():
    torch.compiler.reset()
    loss, td = older(), batch()
    with pytest.warns(DeprecationWarning, match="older models"):
        expected, _ = loss(td)
    losses, _ = torch.compile(loss, backend="aot_eager", fullgraph=True)(td)
    torch.testing.assert_close(losses["loss_model_reward"], expected["loss_model_reward"])


# Dtypes, copies, files


def test_double_precision():
    loss, td = loss_of(), batch()
    single, _ = loss(td)
    double, _ = loss.to(torch.float64)(td.to(torch.float64).set(("next", "terminated"), td["next", "terminated"]))
    for name, value in double.items():
        assert value.dtype == torch.float64
        torch.testing.assert_close(single[name], value.float(), rtol=1e-5, atol=1e-6)


def test_half_precision_outputs_are_computed_in_float32():
    loss, td = loss_of().to(torch.bfloat16), batch()
    td["action"] = td["action"].bfloat16()
    losses, outputs = loss(td)
    assert outputs["next", "prior_logits"].dtype == torch.bfloat16
    assert all(value.dtype == torch.float32 for value in losses.values())


def test_meta_device():
    losses, _ = loss_of().to("meta")(batch().to("meta"))
    assert all(value.device.type == "meta" and value.shape == () for value in losses.values())


def test_state_dict_holds_the_world_model_alone():
    loss, other, td = loss_of(), loss_of(), batch()
    assert all(name.startswith("world_model.") for name in loss.state_dict())
    other.load_state_dict(loss.state_dict())
    assert (other(td)[0] == loss(td)[0]).all()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda loss: pickle.loads(pickle.dumps(loss))])
def test_copies(copied):
    loss, td = loss_of(**WEIGHTS | {"lambda_continue": 0.0}), batch()
    td.rename_key_(("next", "pixels"), ("next", "camera"))
    loss.set_keys(pixels="camera")
    other = copied(loss)
    assert (other(td)[0] == loss(td)[0]).all()
    other.set_keys(pixels=None)
    assert loss.tensor_keys.pixels == "camera"


def test_reset_parameters_recursive():
    loss = loss_of()
    before = params_of(loss)
    loss.reset_parameters_recursive()
    assert not any(torch.equal(p, before[name]) for name, p in loss.named_parameters())


@pytest.mark.parametrize("name", ["defaults", "separate"])
def test_compiled_equals_eager(name):
    torch.compiler.reset()
    loss, td = loss_of(**KNOBS[name]), batch()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    results = [call(td)[0] for call in (loss, compiled)]
    gradients = [torch.autograd.grad(sum(r.values()), loss.parameters(), allow_unused=True) for r in results]
    assert set(results[0].keys()) == set(results[1].keys())
    for key in loss.out_keys:
        torch.testing.assert_close(results[1][key], results[0][key])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled(batch())


# The pure function behind it


@pytest.mark.parametrize("name", list(KNOBS))
def test_functional_is_the_pure_loss_with_the_parameters_taken_out(name):
    knobs = KNOBS[name]
    reward = "reward_logits" if knobs.get("reward_two_hot", True) else "reward"
    world = World(("prior_logits", "posterior_logits", "reco_pixels", reward, "continue_pred"))
    loss, td = loss_of(world, **knobs), batch()
    before = set(td.keys(True, True))
    loss_fn, params = loss.functional()
    assert all(params[key] is p for key, p in world.named_parameters())
    losses, outputs = loss(td)
    value, aux = loss_fn(params, td)
    torch.testing.assert_close(value, sum(losses.values()))
    assert [f"loss_model_{term}" for term in aux["losses"]] == loss.out_keys
    assert torch.equal(aux["outputs"]["tensordict"]["next", "prior_logits"], outputs["next", "prior_logits"])
    assert set(td.keys(True, True)) == before
    value.backward()
    assert world.heads["reco_pixels"].bias.grad.any()


def test_functional_reads_what_set_keys_says():
    loss, td = loss_of(), batch()
    loss_fn, params = loss.functional()
    td.rename_key_(("next", "pixels"), ("next", "camera"))
    with pytest.raises(KeyError, match=r"set_keys\(pixels=...\)"):
        loss_fn(params, td)
    loss.set_keys(pixels="camera")
    assert loss_fn(params, td)[0] > 0


def test_functional_refuses_batch_norm_in_train_mode():
    loss = loss_of()
    loss.world_model.heads["reco_pixels"] = nn.Sequential(nn.Flatten(0, 1), nn.BatchNorm1d(ACTION))
    with pytest.raises(ValueError, match=r"World with a BatchNorm1d at 'heads.reco_pixels.1' in train mode"):
        loss.functional()


@pytest.mark.parametrize("container", ["dict", "TensorDict"])
def test_ensemble_by_vmap_equals_a_loop(container):
    members, td = [loss_of(**KNOBS["separate"]) for _ in range(3)], batch()
    loss_fn, _ = members[0].functional()
    trees = [params_of(member.world_model) for member in members]
    stacked = {name: torch.stack([tree[name] for tree in trees]) for name in trees[0]}
    if container == "TensorDict":
        stacked = TensorDict(stacked, [3]).unflatten_keys(".")
    gradients, aux = vmap(grad(loss_fn, has_aux=True), in_dims=(0, None))(stacked, td)
    if container == "TensorDict":
        gradients = gradients.flatten_keys(".")
    assert aux["outputs"]["tensordict"]["next", "prior_logits"].shape == (3, B, T, GROUPS, CLASSES)
    for i, member in enumerate(members):
        losses, _ = member(td)
        sum(losses.values()).backward()
        torch.testing.assert_close(
            member.lambda_kl * aux["losses"]["dynamic"][i] * member.lambda_dynamic, losses["loss_model_dynamic"]
        )
        for name, p in member.world_model.named_parameters():
            torch.testing.assert_close(gradients[name][i], torch.zeros_like(p) if p.grad is None else p.grad)


def test_batches_by_vmap_equal_a_loop():
    loss, tds = loss_of(), [batch() for _ in range(3)]
    loss_fn, params = loss.functional()
    together = vmap(lambda p, td: loss_fn(p, td)[0], in_dims=(None, 0))(params, torch.stack(tds))
    torch.testing.assert_close(together, torch.stack([sum(loss(td)[0].values()) for td in tds]))


def test_jvp_agrees_with_grad():
    loss, td = loss_of(free_bits=0.0), batch()
    loss_fn, params = loss.functional()
    params = {name: p.detach() for name, p in params.items()}
    direction = {name: torch.randn_like(p) for name, p in params.items()}
    _, tangent = jvp(lambda p: loss_fn(p, td)[0], (params,), (direction,))
    gradient, _ = grad(loss_fn, has_aux=True)(params, td)
    expected = sum((gradient[name] * direction[name]).sum() for name in gradient)
    torch.testing.assert_close(tangent.float(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["compile", "compiled_vmap"])
def test_functional_compiled(kind):
    torch.compiler.reset()
    loss_fn, params = loss_of().functional()
    params = {name: p.detach() for name, p in params.items()}

    def function(params, td):
        gradient, aux = grad(loss_fn, has_aux=True)(params, td)
        return gradient, aux["losses"]

    td = batch()
    if kind == "compiled_vmap":
        function = vmap(function, in_dims=(0, None))
        params = {name: torch.stack([p, 2 * p]) for name, p in params.items()}
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(params, td), function(params, td))
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled(params, batch())


def test_warnings_do_not_come_from_current_models():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_of()(batch())


@pytest.mark.parametrize(("world_model", "got"), [(None, "NoneType"), (nn.Linear, r"type\. Did you mean Linear\(")])
def test_a_world_model_is_a_module(world_model, got):
    with pytest.raises(TypeError, match=rf"DreamerV3ModelLoss: world_model must be an nn.Module, got {got}"):
        DreamerV3ModelLoss(world_model)
