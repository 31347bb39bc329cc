"""DreamerV3's world-model loss: golden numbers, the formula in loops, what stops where, and every refusal."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from torch.func import grad, grad_and_value, jvp, vmap
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves, tree_map

from rlloss import (
    DREAMER_V3_DEFAULTS,
    DREAMER_V3_OFFICIAL,
    categorical_kl_balanced,
    dreamer_v3_model_loss,
    dreamer_v3_model_losses,
    dreamer_v3_model_terms,
    fused,
    pages,
    symlog,
)
from rlloss.dreamer_v3 import model_knobs

NAN, INF = float("nan"), float("inf")
BATCH, TIME, OBS, ACTION, HIDDEN, GROUPS, CLASSES, BINS = 3, 4, 5, 2, 6, 2, 3, 11
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5}
KNOBS = {"num_reward_bins": BINS, "free_bits": 0.05, "lambda_continue": 0.7}


def world_model(params, batch):
    x = torch.cat([batch["observation"], batch["action"], batch["reward"].unsqueeze(-1)], -1)
    hidden = torch.tanh(x @ params["hidden"])
    prior = torch.tanh(batch["action"] @ params["action"]) @ params["prior"]
    return {
        "posterior_logits": (hidden @ params["posterior"]).unflatten(-1, (GROUPS, CLASSES)),
        "prior_logits": prior.unflatten(-1, (GROUPS, CLASSES)),
        "reconstruction": hidden @ params["decoder"],
        "reward": hidden @ params["reward"],
        "continue_logits": (hidden @ params["continue"]).squeeze(-1),
    }


def parameters(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "hidden": (OBS + ACTION + 1, HIDDEN),
        "posterior": (HIDDEN, GROUPS * CLASSES),
        "action": (ACTION, HIDDEN),
        "prior": (HIDDEN, GROUPS * CLASSES),
        "decoder": (HIDDEN, OBS),
        "reward": (HIDDEN, BINS),
        "continue": (HIDDEN, 1),
    }
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for name, shape in shapes.items()
    }


def make_batch(seed=100, dtype=torch.float32, batch=BATCH, time=TIME, mask=False):
    generator = torch.Generator().manual_seed(seed)
    entries = {
        "observation": 2 * torch.randn(batch, time, OBS, generator=generator, dtype=torch.float64),
        "action": torch.randn(batch, time, ACTION, generator=generator, dtype=torch.float64),
        "reward": torch.randn(batch, time, generator=generator, dtype=torch.float64),
    }
    entries = {name: value.to(dtype) for name, value in entries.items()}
    entries["terminated"] = torch.rand(batch, time, generator=generator) < 0.3
    if mask:
        entries["mask"] = torch.rand(batch, time, generator=generator) < 0.6
    return entries


def make_outputs(seed=200, dtype=torch.float64, lead=(BATCH, TIME)):
    """Outputs of no model in particular, as leaves to differentiate."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "posterior_logits": (GROUPS, CLASSES),
        "prior_logits": (GROUPS, CLASSES),
        "reconstruction": (OBS,),
        "reward": (BINS,),
        "continue_logits": (),
    }
    return {
        name: torch.randn((*lead, *shape), generator=generator, dtype=torch.float64).to(dtype)
        for name, shape in shapes.items()
    }


def model_loss(params, batch, **knobs):
    return dreamer_v3_model_loss(params, batch, world_model=world_model, **{**KNOBS, **knobs})[0]


def loss_of_outputs(outputs, batch, **knobs):
    """The loss where the parameters are the outputs themselves."""
    return dreamer_v3_model_loss(outputs, batch, world_model=lambda outputs, _: outputs, **knobs)[0]


def relative(actual, expected, rtol):
    """Equal up to ``rtol`` of the largest entry."""
    assert_close(actual.double(), expected, rtol=rtol, atol=rtol * expected.abs().max().item())


# ---- golden values ---------------------------------------------------------------------------------------------------


def torchrl_tensors(data, case, dtype):
    """Outputs and batch of a case of the torchrl file."""

    def read(name):
        x = data[f"{case}.in.{name}"]
        return x.to(dtype) if x.is_floating_point() else x

    outputs = {
        "prior_logits": read("prior_logits"),
        "posterior_logits": read("posterior_logits"),
        "reconstruction": read("reco_pixels"),
        "reward": read("reward_logits"),
        "continue_logits": read("continue_pred"),
    }
    batch = {"observation": read("pixels"), "reward": read("reward"), "terminated": read("terminated")}
    return outputs, batch, read("pred_reward")


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("alpha", [0.8, 0.5, 0.0])
def test_torchrl_grid(golden, alpha, dtype):
    data = golden("10a_torchrl_model_loss")
    grid = data.meta["cases"]["grid"]
    outputs, batch, scalar_prediction = torchrl_tensors(data, "grid", dtype)
    columns = [name.removeprefix("loss_model_") for name in grid["columns"]]
    checked = 0
    for combo, expected in zip(grid["combos"], data["grid.out.losses"], strict=True):
        if combo["kl_alpha"] != alpha:
            continue
        reward = outputs["reward"] if combo["reward_two_hot"] else scalar_prediction
        weighted, _, _ = dreamer_v3_model_losses({**outputs, "reward": reward}, batch, **combo)
        for name, value in zip(columns, expected, strict=True):
            assert (name in weighted) == (not value.isnan())
            if name in weighted:
                assert weighted[name].shape == ()
                assert weighted[name].dtype == dtype
                assert_close(weighted[name].double(), value, rtol=TOLERANCE[dtype], atol=0)
        checked += 1
    assert checked == 48


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_torchrl_grid_gradients(golden, dtype):
    data = golden("10a_torchrl_model_loss")
    outputs, batch, scalar_prediction = torchrl_tensors(data, "grid", dtype)
    names = {
        "prior_logits": "prior_logits",
        "posterior_logits": "posterior_logits",
        "reco_pixels": "reconstruction",
        "continue_pred": "continue_logits",
        "reward_logits": "reward",
        "pred_reward": "reward",
    }
    cases = {f"kl_a{a:g}_f{f:g}": {"kl_alpha": a, "free_bits": f} for a in (0.8, 0.5, 0.0) for f in (1.0, 0.1, 0.0)}
    cases |= {
        f"reco_{loss}_avg{int(average)}": {"reco_loss": loss, "global_average": average}
        for loss, average in itertools.product(("l1", "l2"), (False, True))
    }
    cases |= {
        "reward_twohot": {},
        "reward_symlogmse": {"reward_two_hot": False},
        "continue_0.5": {"lambda_continue": 0.5},
    }
    checked = set()
    for case, knobs in cases.items():
        reward = outputs["reward"] if knobs.get("reward_two_hot", True) else scalar_prediction
        gradients = grad(loss_of_outputs)({**outputs, "reward": reward}, batch, **knobs)
        for key, expected in data.items():
            if key.startswith(f"grid.grad.{case}."):
                relative(gradients[names[key.rsplit(".", 1)[1]]], expected, 1e-5)
                checked.add(key)
    assert checked == {key for key in data if key.startswith("grid.grad.")}


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "case", ["weights", "separate_u0", "separate_u0.01", "separate_free0", "raw_uint8", "two_heads"]
)
def test_torchrl_options(golden, case, dtype):
    data = golden("10a_torchrl_model_loss")
    outputs, batch, _ = torchrl_tensors(data, case, dtype)
    knobs = dict(data.meta["cases"][case]["kwargs"])
    raw = knobs.pop("reco_symlog", True)
    if case == "two_heads":
        outputs["reconstruction"] = {"pixels": outputs["reconstruction"], "vec": data[f"{case}.in.reco_vec"].to(dtype)}
        batch["observation"] = {"pixels": batch["observation"], "vec": data[f"{case}.in.vec"].to(dtype)}
        knobs["reco_transform"] = dict(zip(("pixels", "vec"), ("none", "symlog"), strict=True))
        assert raw == [False, True]
    elif raw is False:
        knobs["reco_transform"] = "none"
    weighted, _, _ = dreamer_v3_model_losses(outputs, batch, **knobs)
    expected = {
        key.split("loss_model_")[1]: value for key, value in data.items() if key.startswith(f"{case}.out.loss_model_")
    }
    assert set(weighted) == set(expected)
    for name, value in expected.items():
        # torchrl keeps the continue target in float32.
        assert_close(weighted[name].double(), value.squeeze(), rtol=TOLERANCE[dtype], atol=0)
    gradients = grad(loss_of_outputs)(outputs, batch, **knobs)
    reconstruction = gradients["reconstruction"]
    gradients |= {
        "reco_pixels": reconstruction["pixels"] if case == "two_heads" else reconstruction,
        "reco_vec": reconstruction["vec"] if case == "two_heads" else None,
        "reward_logits": gradients["reward"],
        "continue_pred": gradients["continue_logits"],
    }
    keys = [key for key in data if key.startswith(f"{case}.grad.")]
    assert len(keys) >= 4
    for key in keys:
        relative(gradients[key.removeprefix(f"{case}.grad.")], data[key], 1e-5)


def test_losses_can_be_added_up_in_place():
    outputs = {name: x.requires_grad_() for name, x in make_outputs(1, torch.float64).items()}
    wanted, aux = dreamer_v3_model_loss(outputs, make_batch(), world_model=lambda params, batch: params, **KNOBS)
    weighted, unweighted, _ = dreamer_v3_model_losses(outputs, make_batch(), **KNOBS)
    total = weighted.pop("kl")
    for loss in weighted.values():
        total += loss
    unweighted["kl"] += 1
    aux["losses"]["kl"] += wanted
    assert_close(aux["losses"]["kl"], wanted + unweighted["kl"] - 1)
    assert_close(total, wanted)
    gradients = torch.autograd.grad(wanted, outputs.values()), torch.autograd.grad(total, outputs.values())
    assert_close(*gradients)


def test_each_loss_has_a_graph_of_its_own():
    outputs = {name: x.requires_grad_() for name, x in make_outputs(1, torch.float64).items()}
    weighted, unweighted, _ = dreamer_v3_model_losses(outputs, make_batch(), **KNOBS)
    reached = {"kl": {"prior_logits", "posterior_logits"}, "reco": {"reconstruction"}, "reward": {"reward"}}
    reached["continue"] = {"continue_logits"}
    for losses in (unweighted, weighted):
        for name, loss in losses.items():
            again = losses is unweighted
            gradients = torch.autograd.grad(loss, outputs.values(), allow_unused=True, retain_graph=again)
            found = {key for key, gradient in zip(outputs, gradients, strict=True) if gradient is not None}
            assert found == reached[name]


def test_nan_of_one_loss_does_not_reach_the_gradient_of_another():
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    outputs = {name: x * scale for name, x in make_outputs(1, torch.float64).items()}
    outputs["reward"] = outputs["reward"] * math.nan
    weighted, _, _ = dreamer_v3_model_losses(outputs, make_batch(), **KNOBS)
    assert weighted["reward"].isnan()
    for name in ("kl", "reco", "continue"):
        assert torch.autograd.grad(weighted[name], scale, retain_graph=True)[0].isfinite()


def test_each_loss_has_the_dtype_of_its_term():
    outputs = make_outputs(1, torch.float32)
    outputs["reconstruction"] = outputs["reconstruction"].double()
    weighted, unweighted, terms = dreamer_v3_model_losses(outputs, make_batch(), **KNOBS)
    for losses in (weighted, unweighted, terms):
        assert {name: x.dtype for name, x in losses.items() if x.dtype != torch.float32} == {"reco": torch.float64}


def complete(lead, outputs, batch):
    """The rest of a call with leading dimensions ``lead``, in which only one term matters."""
    logits = torch.zeros(*lead, 1, 2)
    heads = {"reconstruction": torch.zeros(*lead, 1), "reward": torch.zeros(*lead, 2)}
    targets = {"observation": torch.zeros(*lead, 1), "reward": torch.zeros(lead)}
    return {"posterior_logits": logits, "prior_logits": logits, **heads, **outputs}, {**targets, **batch}


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("shape", "scale", "mix", "free"),
    list(itertools.product("ab", ("x1", "x100", "mixed"), ("0", "0.01"), ("0", "1"))),
)
def test_authors_dynamics_and_representation(golden, shape, scale, mix, free, dtype):
    data = golden("03_kl")
    inputs, case = f"{shape}_{scale}.in", f"{shape}_{scale}_u{mix}_f{free}"
    logits = {
        f"{name}_logits": data[f"{inputs}.{key}"].to(dtype)
        for name, key in {"posterior": "post", "prior": "prior"}.items()
    }
    knobs = {"kl_mode": "separate", "unimix": float(mix), "free_bits": float(free), "num_reward_bins": 2}
    outputs, batch = complete(logits["prior_logits"].shape[:2], logits, {})

    def term(logits, name):
        return dreamer_v3_model_terms({**outputs, **logits}, batch, **knobs)[name]

    wide = TOLERANCE[dtype]
    for name, golden_name, trained, stopped in (
        ("dynamic", "dyn", "prior_logits", "posterior_logits"),
        ("representation", "rep", "posterior_logits", "prior_logits"),
    ):
        relative(term(logits, name), data[f"{case}.out.{golden_name}"], wide)
        gradients = grad(lambda logits, name=name: term(logits, name).sum())(logits)
        expected = data[f"{case}.grad.{golden_name}.{trained.removesuffix('_logits').replace('posterior', 'post')}"]
        # What the authors' own float32 run keeps: differences of two large numbers, where logits are saturated.
        atol = 1e-6 + 1e-5 * expected.abs().max().item()
        assert_close(gradients[trained].double(), expected, rtol=0, atol=atol)
        assert torch.equal(gradients[stopped], torch.zeros_like(gradients[stopped]))


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("case", "transform"),
    [("image", "none"), ("image", "auto")]
    + [(f"mse_{kind}", "none") for kind in ("vec", "mat", "scalar")]
    + [
        (f"symlog_mse_{kind}", transform)
        for kind in ("vec", "mat", "scalar")
        for transform in ("symlog_target", "auto")
    ],
)
def test_authors_reconstruction(golden, case, transform, dtype):
    data = golden("04_outs")
    target, prediction = ("image", "recon") if case == "image" else ("target", "mean")
    observation, reconstruction = data[f"{case}.in.{target}"], data[f"{case}.in.{prediction}"].to(dtype)
    if observation.is_floating_point():
        observation = observation.to(dtype)
    else:
        assert observation.dtype == torch.uint8

    def loss(reconstruction):
        outputs, batch = complete(
            observation.shape[:2], {"reconstruction": reconstruction}, {"observation": observation}
        )
        term = dreamer_v3_model_terms(outputs, batch, num_reward_bins=2, reco_transform=transform)["reco"]
        return term.sum(), term

    gradient, term = grad(loss, has_aux=True)(reconstruction)
    assert_close(term.double(), data[f"{case}.out.loss"], rtol=TOLERANCE[dtype], atol=0)
    relative(gradient, data[f"{case}.grad.loss.{prediction}"], 1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", ["binary_hard", "binary_contdisc"])
def test_authors_continue(golden, case, dtype):
    data = golden("04_outs")
    event = data[f"{case}.in.event"]
    scale = 332 / 333 if case == "binary_contdisc" else 1.0
    assert_close(event.unique(), torch.tensor([0.0, scale], dtype=torch.float64))

    def loss(logits):
        outputs, batch = complete(event.shape, {"continue_logits": logits}, {"terminated": event == 0})
        knobs = {"lambda_continue": 1.0, "continue_target_scale": scale, "num_reward_bins": 2}
        term = dreamer_v3_model_terms(outputs, batch, **knobs)["continue"]
        return term.sum(), term

    gradient, term = grad(loss, has_aux=True)(data[f"{case}.in.logit"].to(dtype))
    assert_close(term.double(), data[f"{case}.out.loss"], rtol=TOLERANCE[dtype], atol=1e-7)
    relative(gradient, data[f"{case}.grad.loss.logit"], 1e-5)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("bins", [255, 41])
def test_authors_two_hot_reward(golden, bins, dtype):
    data = golden("02_twohot")
    logits, target = data[f"b{bins}.in.logits"].to(dtype)[None], data[f"b{bins}.in.target"].to(dtype)[None]

    def loss(logits):
        outputs, batch = complete(target.shape, {"reward": logits}, {"reward": target})
        term = dreamer_v3_model_terms(outputs, batch, num_reward_bins=bins)["reward"]
        return term.sum(), term

    gradient, term = grad(loss, has_aux=True)(logits)
    # The authors' support is rounded to float32 even in the float64 run: up to 1e-6 of a bin.
    assert_close(term[0].double(), data[f"b{bins}.out.loss"], rtol=1e-5, atol=1e-6)
    assert_close(gradient[0].double(), data[f"b{bins}.grad.loss.logits"], rtol=1e-5, atol=1e-5)


# ---- the formula, written as loops -----------------------------------------------------------------------------------


def probabilities(logits, mix):
    top = max(logits)
    weights = [math.exp(x - top) for x in logits]
    return [(1 - mix) * w / sum(weights) + mix / len(weights) for w in weights]


def divergence(p, q):
    return sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))


def squash(x):
    return math.copysign(math.log1p(abs(x)), x)


def two_hot_nats(logits, target):
    n = len(logits)
    bins = [math.copysign(math.expm1(abs(x)), x) for x in (-20 + 40 * k / (n - 1) for k in range(n))]
    target = min(max(target, bins[0]), bins[-1])
    k = max(i for i in range(n - 1) if bins[i] <= target)
    upper = (target - bins[k]) / (bins[k + 1] - bins[k])
    p = probabilities(logits, 0.0)
    return -(1 - upper) * math.log(p[k]) - upper * math.log(p[k + 1])


def oracle_step(outputs, batch, knobs):
    """Weighted terms of one step, from lists of numbers."""
    k = {**DREAMER_V3_DEFAULTS, **knobs}
    pairs = [
        [probabilities(logits, k["unimix"]) for logits in both]
        for both in zip(outputs["posterior_logits"], outputs["prior_logits"], strict=True)
    ]
    kls = [divergence(*pair) for pair in pairs]
    if k["kl_mode"] == "balanced":
        terms = {"kl": k["lambda_kl"] * sum(max(kl, k["free_bits"]) for kl in kls) / len(kls)}
    else:
        kl = k["lambda_kl"] * max(sum(kls), k["free_bits"])
        terms = {"dynamic": k["lambda_dynamic"] * kl, "representation": k["lambda_representation"] * kl}
    terms["reco"] = 0.0
    for head, target in batch["observation"].items():
        is_image = head == "image"
        transform = k["reco_transform"]
        transform = transform if isinstance(transform, str) else transform[head]
        transform = {"auto": "none" if is_image else "symlog_target"}.get(transform, transform)
        errors = []
        for x, y in zip(target, outputs["reconstruction"][head], strict=True):
            x = x / 255 if is_image else x
            x = x if transform == "none" else squash(x)
            y = squash(y) if transform == "symlog" else y
            errors.append(abs(x - y) if k["reco_loss"] == "l1" else (x - y) ** 2)
        terms["reco"] += k["lambda_reco"] * sum(errors) / (len(errors) if k["global_average"] else 1)
    if k["reward_two_hot"]:
        terms["reward"] = k["lambda_reward"] * two_hot_nats(outputs["reward"], batch["reward"])
    else:
        terms["reward"] = k["lambda_reward"] * (squash(outputs["reward"]) - squash(batch["reward"])) ** 2
    if k["lambda_continue"] > 0:
        chance = 1 / (1 + math.exp(-outputs["continue_logits"]))
        goal = 0.0 if batch["terminated"] else k["continue_target_scale"]
        nats = -goal * math.log(chance) - (1 - goal) * math.log(1 - chance)
        terms["continue"] = k["lambda_continue"] * nats
    return terms


def with_heads(dtype=torch.float64, seed=300):
    """Outputs and batch with an image and a vector to reconstruct."""
    generator = torch.Generator().manual_seed(seed)
    outputs, batch = make_outputs(seed, dtype), make_batch(seed, dtype)
    image = torch.randint(0, 256, (BATCH, TIME, 4), generator=generator, dtype=torch.uint8)
    batch["observation"] = {"image": image, "vector": batch["observation"]}
    reconstruction = torch.rand(BATCH, TIME, 4, generator=generator, dtype=torch.float64).to(dtype)
    outputs["reconstruction"] = {"image": reconstruction, "vector": outputs["reconstruction"]}
    return outputs, batch


def steps_of(tree):
    """One nest of Python numbers for each step."""
    return [tree_map(lambda x, b=b, t=t: x[b, t].tolist(), tree) for b in range(BATCH) for t in range(TIME)]


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize(
    "knobs",
    [
        {},
        dict(DREAMER_V3_OFFICIAL),
        {"free_bits": 0.1, "kl_alpha": 0.3, "unimix": 0.05, "lambda_kl": 0.7},
        {
            "kl_mode": "separate",
            "free_bits": 0.3,
            "lambda_kl": 2.0,
            "lambda_dynamic": 0.5,
            "lambda_representation": 0.2,
        },
        {"kl_mode": "separate", "free_bits": 0.0, "unimix": 0.01},
        {"reco_loss": "l1", "reco_transform": "none", "lambda_reco": 1.3},
        {"reco_loss": "l1", "global_average": True, "reco_transform": "auto"},
        {"global_average": True, "reco_transform": {"image": "symlog", "vector": "symlog_target"}},
        {"reward_two_hot": False, "lambda_reward": 3.0},
        {"lambda_continue": 0.4},
        {"lambda_continue": 2.0, "continue_target_scale": 0.9},
    ],
    ids=repr,
)
def test_loss_is_the_formula(knobs):
    outputs, batch = with_heads()
    if not knobs.get("reward_two_hot", True):
        outputs["reward"] = outputs["reward"][..., 0]
    knobs = {**knobs, "num_reward_bins": BINS}
    weighted, unweighted, terms = dreamer_v3_model_losses(outputs, batch, **knobs)
    steps = [oracle_step(*step, knobs) for step in zip(steps_of(outputs), steps_of(batch), strict=True)]
    assert set(weighted) == set(unweighted) == set(terms) == set(steps[0])
    for name, value in weighted.items():
        expected = sum(step[name] for step in steps) / len(steps)
        assert_close(value, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)
    loss = loss_of_outputs(outputs, batch, **knobs)
    expected = sum(sum(step.values()) for step in steps) / len(steps)
    assert_close(loss, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)
    for name, unit in dreamer_v3_model_losses(outputs, batch, **{**knobs, **unit_weights(knobs)})[0].items():
        assert_close(unweighted[name], unit)
        assert_close(terms[name].mean(), unit)


def unit_weights(knobs):
    weights = {name: 1.0 for name in DREAMER_V3_DEFAULTS if name.startswith("lambda_")}
    return weights if knobs.get("lambda_continue", 0.0) > 0 else {**weights, "lambda_continue": 0.0}


@pytest.mark.usefixtures("path")
def test_terms_are_those_of_each_step():
    outputs, batch = with_heads()
    knobs = {**DREAMER_V3_OFFICIAL, "num_reward_bins": BINS, **unit_weights(DREAMER_V3_OFFICIAL)}
    terms = dreamer_v3_model_terms(outputs, batch, **knobs)
    for name, term in terms.items():
        assert term.shape == (BATCH, TIME)
        expected = [oracle_step(*step, knobs)[name] for step in zip(steps_of(outputs), steps_of(batch), strict=True)]
        assert_close(term.flatten(), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


def test_official_knobs_are_the_authors_configuration():
    knobs = {**DREAMER_V3_DEFAULTS, **DREAMER_V3_OFFICIAL}
    assert knobs["kl_mode"] == "separate"
    assert (knobs["lambda_kl"], knobs["lambda_dynamic"], knobs["lambda_representation"]) == (1.0, 1.0, 0.1)
    assert (knobs["lambda_reco"], knobs["lambda_reward"], knobs["lambda_continue"]) == (1.0, 1.0, 1.0)
    assert (knobs["free_bits"], knobs["unimix"], knobs["continue_target_scale"]) == (1.0, 0.01, 332 / 333)
    assert (knobs["reco_loss"], knobs["reco_transform"], knobs["global_average"]) == ("l2", "auto", False)
    assert (knobs["reward_two_hot"], knobs["num_reward_bins"]) == (True, 255)


def test_resolved_knobs_are_the_defaults_in_a_mapping_of_their_own():
    assert model_knobs({}) == DREAMER_V3_DEFAULTS
    assert model_knobs({}) is not DREAMER_V3_DEFAULTS
    assert model_knobs({"lambda_kl": 2.0}) == {**DREAMER_V3_DEFAULTS, "lambda_kl": 2.0}


# ---- eager, vmapped, compiled; derivatives ---------------------------------------------------------------------------


def test_loss_and_terms_in_every_variant(variant):
    def compute(params, batch):
        loss, aux = dreamer_v3_model_loss(params, batch, world_model=world_model, **KNOBS)
        return loss, aux["losses"], aux["terms"], aux["outputs"]

    args = (parameters(1), make_batch(mask=True))
    assert_close(variant(compute)(*args), compute(*args))


def test_official_loss_of_several_heads_in_every_variant(variant):
    def compute(outputs, batch):
        knobs = {**DREAMER_V3_OFFICIAL, "num_reward_bins": BINS}
        gradients, loss = grad_and_value(lambda outputs: loss_of_outputs(outputs, batch, **knobs))(outputs)
        return gradients, loss

    args = with_heads(torch.float32)
    assert_close(variant(compute)(*args), compute(*args))


@pytest.mark.usefixtures("nothing_kept")
@pytest.mark.filterwarnings("ignore")  # where warnings are errors, a compiler gets the formula in place of what it gets
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize(
    "knobs", [{}, {"reco_loss": "l1", "reco_transform": "none"}, {"global_average": True}, "official"]
)
def test_loss_compiled_as_users_do(knobs, mask, dtype, monkeypatch):
    torch.compiler.reset()
    monkeypatch.setattr(pages, "SMALLEST", 1)
    monkeypatch.setattr(pages, "HUGE", 1)
    monkeypatch.setattr(pages, "_madvise", lambda: lambda *advice: 0)
    monkeypatch.setattr(fused.Divergence, "smallest_operator", 0)
    outputs, batch = with_heads(dtype)
    if mask:
        batch["mask"] = make_batch(mask=True)["mask"]
    knobs = {**(DREAMER_V3_OFFICIAL if knobs == "official" else knobs), "num_reward_bins": BINS}
    compiled = torch.compile(loss_of_outputs, fullgraph=True, backend="aot_eager")
    results = []
    for function in (loss_of_outputs, compiled):
        leaves = tree_map(lambda x: x.clone().requires_grad_(), outputs)
        loss = function(leaves, batch, **knobs)
        loss.backward()
        results.append((loss, tree_map(lambda x: x.grad, leaves)))
    assert_close(*results)


def test_first_and_second_gradient_in_every_variant(variant):
    def compute(params, batch):
        def norm(params):
            return sum(g.square().sum() for g in grad(model_loss)(params, batch).values())

        return grad_and_value(model_loss)(params, batch), grad(norm)(params)

    args = (parameters(1), make_batch(mask=True))
    assert_close(variant(compute)(*args), compute(*args), rtol=1e-4, atol=1e-5)


def test_jvp_in_every_variant(variant):
    # Along the outputs: torch 2.13 cannot compile vmap of jvp of a matmul, with or without a loss.
    def compute(outputs, batch, direction):
        def terms(outputs):
            knobs = {"num_reward_bins": BINS, "lambda_continue": 1.0, "free_bits": 0.05}
            return dreamer_v3_model_terms(outputs, batch, **knobs)

        return jvp(terms, (outputs,), (direction,))

    args = (make_outputs(1, torch.float32), make_batch(), make_outputs(2, torch.float32))
    assert_close(variant(compute)(*args), compute(*args))


PRIOR_SIDE, POSTERIOR_SIDE, HEADS = ("action", "prior"), ("hidden", "posterior"), ("decoder", "reward", "continue")


@pytest.mark.parametrize(
    ("moving", "knobs"),
    [
        (PRIOR_SIDE, {"kl_alpha": 1.0}),
        (POSTERIOR_SIDE, {"kl_alpha": 0.0, "reco_loss": "l1", "global_average": True}),
        (PRIOR_SIDE, {"kl_mode": "separate", "lambda_representation": 0.0, "unimix": 0.01}),
        (POSTERIOR_SIDE, {"kl_mode": "separate", "lambda_dynamic": 0.0, "reco_transform": "symlog_target"}),
        (HEADS, {}),
    ],
)
def test_derivatives_are_those_of_finite_differences(moving, knobs):
    # Differences of the value do not see where a gradient stops, so one side of the KL moves at a time.
    params = parameters(1, torch.float64)
    batch = make_batch(dtype=torch.float64, batch=2, time=2, mask=True)

    def loss(*values):
        return model_loss({**params, **dict(zip(moving, values, strict=True))}, batch, **knobs)

    inputs = [params[name].clone().requires_grad_() for name in moving]
    assert torch.autograd.gradcheck(loss, inputs, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(loss, inputs, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("shared", [True, False])
def test_ensemble_is_a_loop(shared):
    members = [parameters(i) for i in range(3)]
    batches = [make_batch(seed=10 if shared else i, mask=True) for i in range(3)]
    stacked = tree_map(lambda *x: torch.stack(x), *members)
    batch = batches[0] if shared else tree_map(lambda *x: torch.stack(x), *batches)
    gradients, losses = vmap(grad_and_value(model_loss), in_dims=(0, None if shared else 0))(stacked, batch)
    for i, (member, own) in enumerate(zip(members, batches, strict=True)):
        expected = grad_and_value(model_loss)(member, own)
        assert_close((tree_map(lambda x, i=i: x[i], gradients), losses[i]), expected)


SCALARS = sorted(name for name, value in DREAMER_V3_DEFAULTS.items() if type(value) is float)


def test_second_call_does_not_recompile_and_knobs_may_change(counting_backend):
    torch.compiler.reset()
    backend, graphs = counting_backend

    def step(params, batch, knobs):
        return grad_and_value(lambda params: model_loss(params, batch, **knobs))(params)

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for i in range(3):
        knobs = {name: torch.tensor(0.1 + 0.2 * i) for name in SCALARS}
        args = (parameters(i), make_batch(seed=i, mask=True), knobs)
        assert_close(compiled(*args), step(*args))
    assert len(graphs) == 1


@pytest.mark.parametrize("mode", ["balanced", "separate"])
def test_numbers_that_change_recompile_at_most_once(mode, counting_backend):
    torch.compiler.reset()
    backend, graphs = counting_backend

    def step(params, batch, knobs):
        return model_loss(params, batch, kl_mode=mode, **knobs)

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for i in range(4):
        args = (parameters(1), make_batch(), dict.fromkeys(SCALARS, 0.1 + 0.2 * i))
        assert_close(compiled(*args), step(*args))
    assert len(graphs) <= 2


# ---- knobs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["balanced", "separate"])
def test_every_real_knob_may_be_a_tensor(mode):
    assert len(SCALARS) == 10
    numbers = {name: 0.1 + 0.05 * i for i, name in enumerate(SCALARS)}
    params, batch = parameters(1, torch.float64), make_batch(dtype=torch.float64)
    tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}
    expected = grad_and_value(model_loss)(params, batch, kl_mode=mode, **numbers)
    assert_close(grad_and_value(model_loss)(params, batch, kl_mode=mode, **tensors), expected)


def test_gradient_of_a_weight_is_the_unweighted_term():
    params, batch = parameters(1), make_batch(mask=True)
    _, aux = dreamer_v3_model_loss(params, batch, world_model=world_model, **KNOBS)
    for name in ("kl", "reco", "reward", "continue"):
        gradient = grad(lambda weight, name=name: model_loss(params, batch, **{f"lambda_{name}": weight}))(
            torch.tensor(2.0)
        )
        assert_close(gradient, aux["losses"][name])


def test_gradient_of_the_separate_weights_is_the_unweighted_term():
    params, batch = parameters(1), make_batch()
    knobs = {**KNOBS, "kl_mode": "separate", "lambda_kl": 3.0}
    _, aux = dreamer_v3_model_loss(params, batch, world_model=world_model, **knobs)
    for name in ("dynamic", "representation"):
        gradient = grad(lambda weight, name=name: model_loss(params, batch, **{**knobs, f"lambda_{name}": weight}))(
            torch.tensor(2.0)
        )
        assert_close(gradient, 3.0 * aux["losses"][name])


@pytest.mark.parametrize("name", SCALARS)
def test_vmap_over_a_knob(name):
    params, batch = parameters(1), make_batch()
    values = torch.tensor([0.1, 0.5, 0.9])
    mode = "separate" if name in ("lambda_dynamic", "lambda_representation", "unimix") else "balanced"
    losses = vmap(lambda value: model_loss(params, batch, kl_mode=mode, **{name: value}))(values)
    assert_close(losses, torch.stack([model_loss(params, batch, kl_mode=mode, **{name: v}) for v in values.tolist()]))


def test_continue_head_with_a_zero_tensor_weight_is_still_asked_for():
    outputs, batch = make_outputs(), make_batch(dtype=torch.float64)
    knobs = {"num_reward_bins": BINS}
    assert "continue" not in dreamer_v3_model_terms(outputs, batch, **knobs)
    assert "continue" in dreamer_v3_model_terms(outputs, batch, lambda_continue=torch.tensor(0.0), **knobs)


# ---- what stops where ------------------------------------------------------------------------------------------------


def gradients_of_logits(**knobs):
    outputs, batch = make_outputs(), make_batch(dtype=torch.float64)
    only_kl = {"lambda_reco": 0.0, "lambda_reward": 0.0, "num_reward_bins": BINS, "free_bits": 0.0}
    gradients = grad(loss_of_outputs)(outputs, batch, **only_kl, **knobs)
    return gradients["prior_logits"], gradients["posterior_logits"]


@pytest.mark.parametrize(
    ("knobs", "trains_prior", "trains_posterior"),
    [
        ({"kl_alpha": 1.0}, True, False),
        ({"kl_alpha": 0.0}, False, True),
        ({"kl_alpha": 0.8}, True, True),
        ({"kl_mode": "separate", "lambda_representation": 0.0}, True, False),
        ({"kl_mode": "separate", "lambda_dynamic": 0.0}, False, True),
        ({"kl_mode": "separate"}, True, True),
        ({"lambda_kl": 0.0}, False, False),
    ],
)
def test_kl_gradient_reaches_only_its_side(knobs, trains_prior, trains_posterior):
    for gradient, trained in zip(gradients_of_logits(**knobs), (trains_prior, trains_posterior), strict=True):
        assert (gradient.abs().sum() > 0) == trained
        assert trained or torch.equal(gradient, torch.zeros_like(gradient))


def test_balance_is_linear_in_alpha():
    prior_only, posterior_only = gradients_of_logits(kl_alpha=1.0)[0], gradients_of_logits(kl_alpha=0.0)[1]
    prior, posterior = gradients_of_logits(kl_alpha=0.3)
    assert_close((prior, posterior), (0.3 * prior_only, 0.7 * posterior_only))


@pytest.mark.parametrize(
    "knobs", [{}, {"reward_two_hot": False}, {"reco_loss": "l1"}, {"reco_transform": "none"}], ids=repr
)
def test_targets_get_exactly_no_gradient(knobs):
    outputs, batch = make_outputs(), make_batch(dtype=torch.float64)
    if not knobs.get("reward_two_hot", True):
        outputs["reward"] = outputs["reward"][..., 0]

    def loss(observation, reward):
        targets = {**batch, "observation": observation, "reward": reward}
        return loss_of_outputs(outputs, targets, num_reward_bins=BINS, **knobs)

    for gradient in grad(loss, argnums=(0, 1))(batch["observation"], batch["reward"]):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_observation_that_is_also_an_input_gets_the_gradient_of_the_input_alone():
    params, batch = parameters(1), make_batch()

    def loss(observation):
        return model_loss(params, {**batch, "observation": observation})

    def loss_with_constant_target(observation):
        outputs = world_model(params, {**batch, "observation": observation})
        return loss_of_outputs(outputs, batch, **KNOBS)

    expected = grad(loss_with_constant_target)(batch["observation"])
    assert expected.abs().sum() > 0
    assert_close(grad(loss)(batch["observation"]), expected, rtol=0, atol=0)


def test_each_head_is_trained_by_its_own_term():
    outputs, batch = make_outputs(), make_batch(dtype=torch.float64)
    terms = {"reco": "reconstruction", "reward": "reward", "continue": "continue_logits"}
    for name, head in terms.items():
        gradients = grad(
            lambda o, name=name: dreamer_v3_model_terms(o, batch, lambda_continue=1.0, num_reward_bins=BINS)[name].sum()
        )(outputs)
        for other, gradient in gradients.items():
            assert (gradient.abs().sum() > 0) == (other == head)


def test_aux_is_detached_but_for_the_outputs():
    params = {name: value.requires_grad_() for name, value in parameters(1).items()}
    loss, aux = dreamer_v3_model_loss(params, make_batch(), world_model=world_model, **KNOBS)
    assert sorted(aux) == ["losses", "outputs", "terms"]
    assert loss.requires_grad
    assert not any(x.requires_grad for x in tree_leaves((aux["losses"], aux["terms"])))
    assert all(x.requires_grad for x in tree_leaves(aux["outputs"]))


def test_world_model_runs_once_on_the_batch_itself():
    seen = []

    def spy(params, batch):
        seen.append(batch)
        return world_model(params, batch)

    batch = {**make_batch(), "anything": "else", "extra": torch.ones(7)}
    _, aux = dreamer_v3_model_loss(parameters(1), batch, world_model=spy, **KNOBS)
    assert len(seen) == 1
    assert seen[0] is batch
    assert set(aux["outputs"]) == set(make_outputs())


# ---- steps that do not count -----------------------------------------------------------------------------------------


def poison(batch, value, names=("observation", "action", "reward")):
    def spoil(x):
        mask = batch["mask"].reshape(*batch["mask"].shape, *[1] * (x.ndim - 2))
        return torch.where(mask, x, value)

    return {**batch, **{name: spoil(batch[name]) for name in names}}


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("knobs", [{}, {**DREAMER_V3_OFFICIAL, "num_reward_bins": BINS}], ids=["default", "official"])
def test_masked_step_changes_nothing_even_when_not_finite(value, knobs):
    params, batch = parameters(1), make_batch(mask=True)

    def compute(batch):
        def loss(params, reals):
            return dreamer_v3_model_loss(params, {**batch, **reals}, world_model=world_model, **{**KNOBS, **knobs})

        reals = {name: batch[name] for name in ("observation", "action", "reward")}
        gradients, (loss, aux) = grad_and_value(loss, argnums=(0, 1), has_aux=True)(params, reals)
        return gradients, loss, aux["losses"], aux["terms"]

    actual, expected = compute(poison(batch, value)), compute(poison(batch, 0.0))
    assert_close(actual, expected, rtol=0, atol=0)
    assert all(x.isfinite().all() for x in tree_leaves(actual))
    for gradient in actual[0][1].values():
        assert torch.equal(gradient[~batch["mask"]], torch.zeros_like(gradient[~batch["mask"]]))


def test_masked_step_changes_no_second_derivative():
    params, batch = parameters(1), make_batch(mask=True)

    def curvature(batch):
        return jvp(lambda params: grad(model_loss)(params, batch), (params,), (parameters(2),))

    assert_close(curvature(poison(batch, NAN)), curvature(poison(batch, 0.0)), rtol=0, atol=0)


@pytest.mark.parametrize("value", [0.0, 3.0, -1e3])
def test_finite_entries_of_a_masked_step_do_not_matter(value):
    params, batch = parameters(1), make_batch(mask=True)
    other = {**poison(batch, value), "terminated": batch["terminated"] ^ ~batch["mask"]}
    assert_close(grad_and_value(model_loss)(params, other), grad_and_value(model_loss)(params, batch))


def test_outputs_of_a_masked_step_may_be_anything():
    outputs, batch = make_outputs(), make_batch(dtype=torch.float64, mask=True)
    spoiled = poison({**outputs, "mask": batch["mask"]}, NAN, tuple(outputs))
    spoiled.pop("mask")
    knobs = {"num_reward_bins": BINS, "lambda_continue": 1.0}
    actual, expected = (grad_and_value(loss_of_outputs)(o, batch, **knobs) for o in (spoiled, outputs))
    assert_close(actual, expected, rtol=0, atol=0)


def test_masked_steps_warm_up_a_recurrent_state_but_cannot_poison_it():
    def recurrent(params, batch):
        batch = {**batch, "action": batch["action"].cumsum(1)}
        return world_model(params, batch)

    batch = make_batch()
    batch["mask"] = torch.tensor([False, True, True, True]).expand(BATCH, TIME)

    def loss(batch):
        return dreamer_v3_model_loss(parameters(1), batch, world_model=recurrent, **KNOBS)[0]

    shifted = {**batch, "action": batch["action"] + (~batch["mask"]).float().unsqueeze(-1)}
    assert loss(shifted) != loss(batch)
    assert_close(loss(poison(batch, NAN)), loss(poison(batch, 0.0)), rtol=0, atol=0)


def test_nan_that_counts_is_seen():
    batch = make_batch(mask=True)
    batch["observation"] = torch.where(batch["mask"].unsqueeze(-1), NAN, batch["observation"])
    assert model_loss(parameters(1), batch).isnan()


def test_mask_leaves_the_mean_over_the_steps_that_count():
    params, batch = parameters(1), make_batch(mask=True)
    kept = {name: value[batch["mask"]][None] for name, value in batch.items() if name != "mask"}
    assert_close(grad_and_value(model_loss)(params, batch), grad_and_value(model_loss)(params, kept))


@pytest.mark.usefixtures("path")
def test_terms_are_zero_where_the_mask_is_false():
    outputs, batch = make_outputs(), make_batch(dtype=torch.float64, mask=True)
    plain = {name: value for name, value in batch.items() if name != "mask"}
    knobs = {"num_reward_bins": BINS, "lambda_continue": 1.0}
    unmasked = dreamer_v3_model_terms(outputs, plain, **knobs)
    for name, term in dreamer_v3_model_terms(outputs, batch, **knobs).items():
        assert torch.equal(term, torch.where(batch["mask"], unmasked[name], 0.0))


def test_nothing_that_counts_gives_zero():
    batch = {**make_batch(), "mask": torch.zeros(BATCH, TIME, dtype=torch.bool)}
    gradients, loss = grad_and_value(model_loss)(parameters(1), poison(batch, NAN))
    assert loss == 0
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients.values())


# ---- properties ------------------------------------------------------------------------------------------------------

seeds = st.integers(0, 2**16)
weights = st.floats(0.0, 5.0)


@given(seed=seeds, masked=st.booleans())
def test_order_of_the_batch_does_not_matter(seed, masked):
    params, batch = parameters(1, torch.float64), make_batch(seed, torch.float64, mask=masked)
    order = torch.randperm(BATCH, generator=torch.Generator().manual_seed(seed))
    shuffled = {name: value[order] for name, value in batch.items()}
    assert_close(grad_and_value(model_loss)(params, shuffled), grad_and_value(model_loss)(params, batch))


@given(seed=seeds, lambda_kl=weights, lambda_reco=weights, lambda_reward=weights, lambda_continue=weights)
def test_loss_is_the_weighted_sum_of_its_terms(seed, lambda_kl, lambda_reco, lambda_reward, lambda_continue):
    outputs, batch = make_outputs(seed), make_batch(seed, torch.float64, mask=True)
    lambdas = {"kl": lambda_kl, "reco": lambda_reco, "reward": lambda_reward, "continue": lambda_continue}
    knobs = {**KNOBS, **{f"lambda_{name}": value for name, value in lambdas.items()}}
    weighted, unweighted, terms = dreamer_v3_model_losses(outputs, batch, **knobs)
    loss = loss_of_outputs(outputs, batch, **knobs)
    assert_close(loss, sum(weighted.values()))
    assert_close(loss, sum(lambdas[name] * value for name, value in unweighted.items()))
    for name, term in terms.items():
        assert_close(unweighted[name], term.sum() / max(1, int(batch["mask"].sum())))


@given(seed=seeds, free_bits=st.floats(0.0, 3.0), mode=st.sampled_from(["balanced", "separate"]))
def test_kl_never_falls_below_the_free_bits(seed, free_bits, mode):
    outputs, batch = make_outputs(seed), make_batch(seed, torch.float64)
    terms = dreamer_v3_model_terms(outputs, batch, kl_mode=mode, free_bits=free_bits, num_reward_bins=BINS)
    bare = dreamer_v3_model_terms(outputs, batch, kl_mode=mode, free_bits=0.0, num_reward_bins=BINS)
    for name in ("kl",) if mode == "balanced" else ("dynamic", "representation"):
        assert (terms[name] >= free_bits - 1e-12).all()
        assert (terms[name] >= bare[name] - 1e-12).all()
        assert (terms[name] <= bare[name] + free_bits + 1e-12).all()


@given(seed=seeds, shift=st.floats(-50.0, 50.0))
def test_shift_of_the_logits_does_not_matter(seed, shift):
    outputs, batch = make_outputs(seed), make_batch(seed, torch.float64)
    shifted = {name: x + shift if "logits" in name and x.ndim > 2 else x for name, x in outputs.items()}
    shifted["reward"] = outputs["reward"] + shift
    knobs = {"num_reward_bins": BINS, "free_bits": 0.1}
    assert_close(loss_of_outputs(shifted, batch, **knobs), loss_of_outputs(outputs, batch, **knobs))


@given(seed=seeds)
def test_everything_counting_is_no_mask(seed):
    params, batch = parameters(1), make_batch(seed)
    masked = {**batch, "mask": torch.ones(BATCH, TIME, dtype=torch.bool)}
    assert_close(grad_and_value(model_loss)(params, masked), grad_and_value(model_loss)(params, batch))


@given(seed=seeds)
def test_order_of_groups_classes_and_heads_does_not_matter(seed):
    outputs, batch = with_heads(seed=seed)
    other = {**outputs, "reconstruction": dict(reversed(outputs["reconstruction"].items()))}
    for name in ("prior_logits", "posterior_logits"):
        other[name] = outputs[name].flip(-1).flip(-2)
    flipped = {**batch, "observation": dict(reversed(batch["observation"].items()))}
    knobs = {"num_reward_bins": BINS, "free_bits": 0.2}
    assert_close(loss_of_outputs(other, flipped, **knobs), loss_of_outputs(outputs, batch, **knobs))


def test_kl_is_that_of_the_categorical_functions():
    outputs, batch = make_outputs(), make_batch(dtype=torch.float64)
    _, unweighted, _ = dreamer_v3_model_losses(outputs, batch, num_reward_bins=BINS, kl_alpha=0.6, free_bits=0.3)
    expected = categorical_kl_balanced(outputs["posterior_logits"], outputs["prior_logits"], 0.6, 0.3)
    assert_close(unweighted["kl"], expected)


def test_heads_are_summed_each_with_its_own_transform():
    outputs, batch = with_heads()
    transforms = {"image": "none", "vector": "symlog_target"}
    knobs = {"num_reward_bins": BINS}
    both = dreamer_v3_model_terms(outputs, batch, reco_transform=transforms, **knobs)["reco"]
    single = []
    for head, transform in transforms.items():
        of_head = {**outputs, "reconstruction": outputs["reconstruction"][head]}
        target = {**batch, "observation": batch["observation"][head]}
        single.append(dreamer_v3_model_terms(of_head, target, reco_transform=transform, **knobs)["reco"])
        named = dreamer_v3_model_terms(of_head, target, reco_transform={"observation": transform}, **knobs)["reco"]
        assert torch.equal(named, single[-1])
    assert_close(both, single[0] + single[1])
    assert_close(dreamer_v3_model_terms(outputs, batch, reco_transform="auto", **knobs)["reco"], both)


# ---- extreme inputs --------------------------------------------------------------------------------------------------


def complete_steps(batch=1, time=1, **outputs):
    return complete((batch, time), outputs, {})[0]


def one_step(**entries):
    return complete((1, 1), {}, {name: value[None, None] for name, value in entries.items()})[1]


def test_squared_error_in_symlog_space_never_leaves_it():
    outputs = complete_steps(reconstruction=torch.full((1, 1, 1), 100.0))
    knobs = {"num_reward_bins": 2, "reco_transform": "symlog_target"}
    term = dreamer_v3_model_terms(outputs, one_step(observation=torch.tensor([3.0])), **knobs)["reco"]
    assert_close(term, torch.tensor([[(100 - 1.3862944) ** 2]]))


@pytest.mark.parametrize(("classes", "nats"), [(4, 5.924097), (32, 7.980561)])
@pytest.mark.parametrize("mix", [0.01, 0.0])
@pytest.mark.parametrize("mode", ["balanced", "separate"])
def test_opposite_saturated_logits(classes, nats, mix, mode):
    posterior, prior = torch.full((1, 1, 1, classes), -1e4), torch.full((1, 1, 1, classes), -1e4)
    posterior[..., 0], prior[..., 1] = 1e4, 1e4
    outputs = complete_steps(posterior_logits=posterior, prior_logits=prior)
    knobs = {"num_reward_bins": 2, "unimix": mix, "kl_mode": mode, "lambda_representation": 0.0}

    def loss(outputs):
        weighted, _, _ = dreamer_v3_model_losses(outputs, one_step(), **knobs)
        return weighted["kl" if mode == "balanced" else "dynamic"]

    gradients, value = grad_and_value(loss)(outputs)
    assert_close(value, torch.tensor(nats if mix else 2e4))
    assert all(g.isfinite().all() for g in gradients.values())


def test_free_nats_act_on_the_sum_in_separate_mode_and_on_each_categorical_in_balanced():
    posterior = torch.zeros(1, 1, 32, 4, dtype=torch.float64)
    posterior[..., 0] = 0.9
    outputs = complete_steps(posterior_logits=posterior, prior_logits=torch.zeros_like(posterior))
    total = sum(divergence(probabilities(row.tolist(), 0), [0.25] * 4) for row in posterior[0, 0])
    assert 2 < total < 4

    def kl(outputs, mode):
        terms = dreamer_v3_model_terms(outputs, one_step(), kl_mode=mode, num_reward_bins=2)
        return terms["representation" if mode == "separate" else "kl"].squeeze()

    gradients, value = grad_and_value(kl)(outputs, "separate")
    assert_close(value, torch.tensor(total, dtype=torch.float64))
    assert gradients["posterior_logits"].abs().sum() > 0
    gradients, value = grad_and_value(kl)(outputs, "balanced")
    assert value == 1.0
    assert torch.equal(gradients["posterior_logits"], torch.zeros_like(posterior))


@pytest.mark.parametrize("mode", ["balanced", "separate"])
def test_equal_posterior_and_prior_cost_the_free_bits_and_train_nothing(mode):
    logits = torch.randn(2, 3, 4, 5)
    outputs = complete_steps(2, 3, posterior_logits=logits, prior_logits=logits.clone())
    batch = {"observation": torch.zeros(2, 3, 1), "reward": torch.zeros(2, 3)}
    for free_bits in (1.0, 0.0):
        knobs = {"kl_mode": mode, "free_bits": free_bits, "num_reward_bins": 2}
        terms = dreamer_v3_model_terms(outputs, batch, **knobs)
        for name in ("kl",) if mode == "balanced" else ("dynamic", "representation"):
            assert_close(terms[name], torch.full((2, 3), free_bits), rtol=0, atol=1e-6)
    gradients = grad(loss_of_outputs)(outputs, batch, kl_mode=mode, num_reward_bins=2)
    for name in ("posterior_logits", "prior_logits"):
        assert torch.equal(gradients[name], torch.zeros_like(logits))


def test_half_the_gradient_passes_exactly_at_the_free_bits():
    outputs, batch = make_outputs(lead=(1, 1)), make_batch(dtype=torch.float64, batch=1, time=1)
    knobs = {"kl_mode": "separate", "num_reward_bins": BINS}
    bare = dreamer_v3_model_terms(outputs, batch, free_bits=0.0, **knobs)["dynamic"].item()

    def dynamic(outputs, free_bits):
        return dreamer_v3_model_terms(outputs, batch, free_bits=free_bits, **knobs)["dynamic"].sum()

    tie, free = (grad(dynamic)(outputs, free_bits)["prior_logits"] for free_bits in (bare, 0.0))
    assert_close(tie, free / 2)


def test_continue_target_of_a_discount_is_learnt_not_zero():
    logit = torch.tensor([[math.log(332.0)]], dtype=torch.float64)
    knobs = {"lambda_continue": 1.0, "continue_target_scale": 332 / 333, "num_reward_bins": 2}

    def loss(logit, terminated):
        outputs = complete_steps(continue_logits=logit)
        return dreamer_v3_model_terms(outputs, one_step(terminated=torch.tensor(terminated)), **knobs)[
            "continue"
        ].squeeze()

    gradient, value = grad_and_value(loss)(logit, False)
    assert_close(value, torch.tensor(0.0204404, dtype=torch.float64), rtol=0, atol=5e-8)
    assert gradient.abs() < 3e-9
    assert_close(loss(logit, True), torch.tensor(math.log(333.0), dtype=torch.float64))


@pytest.mark.parametrize(
    ("logit", "terminated", "scale", "nats"),
    [
        (100.0, True, 1.0, 100.0),
        (1e4, True, 1.0, 1e4),
        (1e4, False, 1.0, 0.0),
        (-1e4, False, 1.0, 1e4),
        (-100.0, False, 332 / 333, 99.69970),
        (0.0, False, 332 / 333, 0.6931472),
    ],
)
def test_saturated_continue_logits(logit, terminated, scale, nats):
    def loss(logit):
        batch = one_step(terminated=torch.tensor(terminated))
        knobs = {"lambda_continue": 1.0, "continue_target_scale": scale, "num_reward_bins": 2}
        return dreamer_v3_model_terms(complete_steps(continue_logits=logit), batch, **knobs)["continue"].squeeze()

    gradient, value = grad_and_value(loss)(torch.tensor([[logit]]))
    assert_close(value, torch.tensor(nats))
    assert_close(
        gradient.squeeze(), torch.tensor(1 / (1 + math.exp(-max(logit, -700.0))) - (0 if terminated else scale))
    )


@pytest.mark.parametrize("reward", [1e9, -1e9, INF, -INF, 0.0])
def test_reward_outside_the_bins_saturates(reward):
    term = dreamer_v3_model_terms(complete_steps(reward=torch.zeros(1, 1, 255)), one_step(reward=torch.tensor(reward)))
    assert_close(term["reward"], torch.full((1, 1), math.log(255)))


def test_extreme_reward_logits_are_finite():
    logits = torch.zeros(1, 1, 255)
    logits[..., 127] = 1e4
    gradients, loss = grad_and_value(loss_of_outputs)(complete_steps(reward=logits), one_step(reward=torch.tensor(1.0)))
    assert_close(loss, torch.tensor(1e4 + 1.0))
    assert gradients["reward"].isfinite().all()


def test_zero_initialised_scalar_reward_head_is_trained():
    outputs = complete_steps(reward=torch.zeros(1, 1))
    gradient = grad(loss_of_outputs)(outputs, one_step(reward=torch.tensor(3.0)), reward_two_hot=False)["reward"]
    assert_close(gradient.squeeze(), -2 * symlog(torch.tensor(3.0)))


# ---- shapes and dtypes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "time"), [(1, 1), (1, 4), (3, 1), (0, 4), (3, 0)])
@pytest.mark.parametrize("knobs", [{}, {"kl_mode": "separate", "reco_transform": "auto"}], ids=["balanced", "separate"])
def test_small_and_empty_batches(batch, time, knobs):
    for mask in (False, True):
        gradients, loss = grad_and_value(model_loss)(
            parameters(1), make_batch(batch=batch, time=time, mask=mask), **knobs
        )
        assert loss.shape == ()
        assert loss.isfinite()
        assert all(g.isfinite().all() for g in gradients.values())
        if batch * time == 0:
            assert loss == 0
            assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients.values())


def test_any_leading_dimensions():
    outputs, batch = make_outputs(), make_batch(dtype=torch.float64, mask=True)
    knobs = {"num_reward_bins": BINS, "lambda_continue": 1.0}
    terms = dreamer_v3_model_terms(outputs, batch, **knobs)
    for reshape in (lambda x: x.flatten(0, 1), lambda x: x.unflatten(1, (2, 2)), lambda x: x[0, 0]):
        other = dreamer_v3_model_terms(tree_map(reshape, outputs), tree_map(reshape, batch), **knobs)
        assert_close(other, tree_map(reshape, terms))


def test_trailing_dimension_of_one_is_the_same():
    outputs, batch = make_outputs(), make_batch(dtype=torch.float64)
    for two_hot in (True, False):
        knobs = {"num_reward_bins": BINS, "lambda_continue": 1.0, "reward_two_hot": two_hot}
        flat = outputs if two_hot else {**outputs, "reward": outputs["reward"][..., 0]}
        column = {**flat, "continue_logits": flat["continue_logits"].unsqueeze(-1)}
        column["reward"] = flat["reward"] if two_hot else flat["reward"].unsqueeze(-1)
        targets = {**batch, "reward": batch["reward"].unsqueeze(-1), "terminated": batch["terminated"].unsqueeze(-1)}
        assert_close(dreamer_v3_model_terms(column, targets, **knobs), dreamer_v3_model_terms(flat, batch, **knobs))


def test_uint8_images_become_fractions():
    image = torch.randint(0, 256, (BATCH, TIME, 2, 2, 3), dtype=torch.uint8)
    outputs, batch = make_outputs(), make_batch(dtype=torch.float64)
    outputs["reconstruction"] = torch.rand(BATCH, TIME, 2, 2, 3, dtype=torch.float64)
    for transform in ("none", "symlog", "symlog_target"):
        reco = [
            dreamer_v3_model_terms(
                outputs, {**batch, "observation": x}, num_reward_bins=BINS, reco_transform=transform
            )["reco"]
            for x in (image, image.double() / 255)
        ]
        assert_close(*reco, rtol=1e-6, atol=1e-6)


def test_image_in_a_masked_batch():
    outputs, batch = with_heads()
    batch["mask"] = make_batch(mask=True)["mask"]
    other = {
        **batch,
        "observation": {
            **batch["observation"],
            "image": torch.where(batch["mask"][..., None], batch["observation"]["image"], 255),
        },
    }
    assert other["observation"]["image"].dtype == torch.uint8
    knobs = {"num_reward_bins": BINS, "reco_transform": "auto"}
    assert torch.equal(loss_of_outputs(outputs, other, **knobs), loss_of_outputs(outputs, batch, **knobs))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_integer_rewards_and_observations_are_promoted(dtype):
    outputs, batch = make_outputs(dtype=torch.float32), make_batch()
    whole = {**batch, "reward": torch.randint(0, 5, (BATCH, TIME)).to(dtype)}
    if dtype != torch.uint8:
        whole["observation"] = torch.randint(-5, 5, (BATCH, TIME, OBS)).to(dtype)
    as_float = {name: x if name == "terminated" else x.float() for name, x in whole.items()}
    knobs = {"num_reward_bins": BINS}
    assert_close(loss_of_outputs(outputs, whole, **knobs), loss_of_outputs(outputs, as_float, **knobs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("mode", ["balanced", "separate"])
def test_arithmetic_is_float32_at_least(dtype, mode):
    outputs, batch = make_outputs(dtype=dtype), make_batch(dtype=dtype, mask=True)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    knobs = {"num_reward_bins": BINS, "lambda_continue": 1.0, "kl_mode": mode}
    gradients, loss = grad_and_value(loss_of_outputs)(outputs, batch, **knobs)
    upcast = tree_map(lambda x: x.to(wide) if x.is_floating_point() else x, (outputs, batch))
    assert loss.dtype == wide
    assert torch.equal(loss, loss_of_outputs(*upcast, **knobs))
    assert all(g.dtype == dtype and g.isfinite().all() for g in gradients.values())


def test_half_precision_images_do_not_overflow():
    outputs = complete_steps(reconstruction=torch.full((1, 1, 4), 300.0, dtype=torch.float16))
    batch = {**one_step(), "observation": torch.zeros(1, 1, 4, dtype=torch.float16)}
    term = dreamer_v3_model_terms(outputs, batch, num_reward_bins=2, reco_transform="none")["reco"]
    assert term.item() == 360000.0


# ---- TensorDicts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
def test_params_batch_and_outputs_may_be_tensordicts(masked):
    params, batch = parameters(1), make_batch(mask=masked)

    def writes_tensordict(params, batch):
        return TensorDict(world_model(params, batch), [BATCH, TIME])

    def loss(params, batch, world_model):
        loss, aux = dreamer_v3_model_loss(params, batch, world_model=world_model, **KNOBS)
        return loss, (aux["losses"], aux["terms"])

    expected, aux = grad(loss, has_aux=True)(params, batch, world_model)
    spoiled = poison(batch, NAN) if masked else batch
    gradients, actual = grad(loss, has_aux=True)(
        TensorDict(params), TensorDict(spoiled, [BATCH, TIME]), writes_tensordict
    )
    assert_close((gradients.to_dict(), actual), (expected, aux))


def test_ensemble_of_tensordicts_is_a_loop():
    members, batch = [parameters(i) for i in range(3)], TensorDict(make_batch(mask=True), [BATCH, TIME])
    stacked = torch.stack([TensorDict(member) for member in members])
    gradients, losses = vmap(grad_and_value(model_loss), in_dims=(0, None))(stacked, batch)
    for i, member in enumerate(members):
        expected = grad_and_value(model_loss)(member, batch.to_dict())
        assert_close((gradients[i].to_dict(), losses[i]), expected)


def test_gradient_over_tensordicts_compiles():
    torch.compiler.reset()
    params, batch = TensorDict(parameters(1)), TensorDict(make_batch(mask=True), [BATCH, TIME])

    def step(params, batch):
        gradients, loss = grad_and_value(model_loss)(params, batch)
        return gradients.to_dict(), loss

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert_close(compiled(params, batch), step(params, batch))


def test_observations_may_be_a_nested_tensordict():
    outputs, batch = with_heads(torch.float32)
    nested = TensorDict(batch, [BATCH, TIME])
    knobs = {"num_reward_bins": BINS, "reco_transform": "auto"}
    outputs_td = TensorDict(outputs, [BATCH, TIME])
    assert_close(loss_of_outputs(outputs_td, nested, **knobs), loss_of_outputs(outputs, batch, **knobs))


# ---- nothing outside changes -----------------------------------------------------------------------------------------


def test_arguments_and_generator_stay_as_they_are():
    args = (parameters(1), make_batch(mask=True), with_heads())
    before = tree_map(torch.clone, args)
    generator = torch.get_rng_state()

    def run():
        params, batch, heads = args
        knobs = {**DREAMER_V3_OFFICIAL, "num_reward_bins": BINS}
        return model_loss(params, batch), dreamer_v3_model_losses(*heads, **knobs)

    assert_close(run(), run(), rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), generator)
    assert_close(args, before, rtol=0, atol=0)
    assert list(args[1]) == list(before[1])
    assert all(x._version == 0 and not x.requires_grad for x in tree_leaves(args))


# ---- refusals --------------------------------------------------------------------------------------------------------


def no_model(params, batch):
    raise AssertionError("the world model ran before the batch was looked at")


@pytest.mark.parametrize(
    ("change", "knobs", "error", "text"),
    [
        ({"observation": None}, {}, KeyError, r"with 'observation', got keys \['action', 'reward', 'terminated'\]"),
        ({"reward": None}, {}, KeyError, r"dreamer_v3_model_loss: batch must be a mapping with 'reward', got keys"),
        ({"reward": None, "rewards": 1}, {}, KeyError, r"with 'reward'.*Did you mean 'rewards'\?"),
        (
            {"terminated": None},
            {"lambda_continue": 1.0},
            KeyError,
            r"'terminated', got .*lambda_continue > 0 asks for it",
        ),
        ({"terminated": None}, {"lambda_continue": torch.tensor(0.0)}, KeyError, r"a mapping with 'terminated'"),
        ({"mask": torch.ones(BATCH, TIME)}, {}, TypeError, r"mask must be a bool tensor, got float32 \[3, 4\]"),
        ({"observation": [1.0]}, {}, TypeError, r"observation must be a tensor or a mapping of at least one, got list"),
        ({"observation": {}}, {}, TypeError, r"observation must be a tensor or a mapping of at least one, got dict"),
        (
            {},
            {"reco_transform": {"pixels": "none"}},
            KeyError,
            r"mapping with \['observation'\], got keys \['pixels'\]",
        ),
        ({}, {"reco_transform": {}}, KeyError, r"reco_transform must be an option or a mapping with .*, got keys \[\]"),
    ],
)
def test_batch_is_refused_before_the_world_model_runs(change, knobs, error, text):
    batch = {name: value for name, value in {**make_batch(), **change}.items() if value is not None}
    with pytest.raises(error, match=text):
        dreamer_v3_model_loss(parameters(1), batch, world_model=no_model, **knobs)


@pytest.mark.parametrize("batch", [torch.zeros(2, 3), [1], None])
def test_batch_that_is_no_mapping_is_refused(batch):
    with pytest.raises(TypeError, match=r"batch must be a mapping of tensors \(dict or TensorDict\), got"):
        dreamer_v3_model_loss(parameters(1), batch, world_model=no_model)


NUMBER = "a number or a 0-d tensor, got"
LAMBDAS = sorted(name for name in DREAMER_V3_DEFAULTS if name.startswith("lambda_"))


@pytest.mark.parametrize(
    ("knobs", "error", "text"),
    [
        (
            {"lamda_kl": 1.0},
            TypeError,
            r"dreamer_v3_model_loss: each knob .*, got 'lamda_kl'\. Did you mean 'lambda_kl'\?$",
        ),
        ({"xyz": 1.0}, TypeError, r"each knob must be one of \['continue_target_scale', .*, got 'xyz'\.$"),
        ({"kl_alpha": 1.5}, ValueError, r"dreamer_v3_model_loss: kl_alpha must be in \[0, 1\], got 1\.5"),
        ({"kl_alpha": -0.1}, ValueError, r"kl_alpha must be in \[0, 1\], got -0\.1"),
        ({"kl_alpha": NAN}, ValueError, r"kl_alpha must be in \[0, 1\], got nan"),
        ({"unimix": 2.0}, ValueError, r"unimix must be in \[0, 1\], got 2\.0"),
        ({"continue_target_scale": 1.01}, ValueError, r"continue_target_scale must be in \[0, 1\], got 1\.01"),
        ({"free_bits": -1.0}, ValueError, r"free_bits must be at least 0, got -1\.0"),
        *[({name: -0.5}, ValueError, rf"{name} must be at least 0, got -0\.5") for name in LAMBDAS],
        ({"lambda_kl": "1"}, TypeError, rf"lambda_kl must be {NUMBER} str '1'"),
        ({"lambda_kl": True}, TypeError, rf"lambda_kl must be {NUMBER} bool True"),
        ({"lambda_kl": None}, TypeError, rf"lambda_kl must be {NUMBER} NoneType"),
        ({"lambda_kl": torch.ones(2)}, ValueError, rf"lambda_kl must be {NUMBER} float32 \[2\]"),
        ({"kl_mode": "balance"}, ValueError, r"kl_mode must be one of .*got 'balance'\. Did you mean 'balanced'\?"),
        ({"reco_loss": "l3"}, ValueError, r"reco_loss must be one of 'l2', 'l1', got 'l3'"),
        ({"reco_transform": "log"}, ValueError, r"reco_transform must be one of 'symlog', .*, got 'log'"),
        ({"reco_transform": None}, ValueError, r"reco_transform must be one of .*, got None"),
        ({"reco_transform": {"observation": "log"}}, ValueError, r"reco_transform must be one of .*, got 'log'"),
        ({"reward_two_hot": "no"}, TypeError, r"reward_two_hot must be True or False, got str 'no'"),
        ({"global_average": 1}, TypeError, r"global_average must be True or False, got int 1"),
        ({"num_reward_bins": 1}, ValueError, r"num_reward_bins must be an int of at least 2, got int 1"),
        ({"num_reward_bins": 255.0}, ValueError, r"num_reward_bins must be an int of at least 2, got float 255\.0"),
    ],
)
def test_knobs_are_refused_before_the_world_model_runs(knobs, error, text):
    with pytest.raises(error, match=text):
        dreamer_v3_model_loss(parameters(1), make_batch(), world_model=no_model, **knobs)
    for function in (dreamer_v3_model_terms, dreamer_v3_model_losses):
        with pytest.raises(error, match=text):
            function(make_outputs(), make_batch(), **knobs)
    with pytest.raises(error, match=text):
        model_knobs(knobs)


def check_refusal(outputs, batch, error, text, **knobs):
    knobs = {**KNOBS, **knobs}
    with pytest.raises(error, match=text):
        dreamer_v3_model_loss(parameters(1), batch, world_model=lambda *_: outputs, **knobs)
    with pytest.raises(error, match=text):
        dreamer_v3_model_terms(outputs, batch, **knobs)


@pytest.mark.parametrize("name", ["prior_logits", "posterior_logits", "reconstruction", "reward", "continue_logits"])
def test_missing_output_is_refused(name):
    outputs = {key: value for key, value in make_outputs().items() if key != name}
    text = rf"world_model\(params, batch\) must be a mapping with '{name}', got keys \["
    check_refusal(outputs, make_batch(), KeyError, text)
    check_refusal({**outputs, name + "s": 0}, make_batch(), KeyError, rf"Did you mean '{name}s'\?")


def test_missing_continue_head_is_explained():
    outputs = {key: value for key, value in make_outputs().items() if key != "continue_logits"}
    check_refusal(
        outputs, make_batch(), KeyError, "lambda_continue > 0 asks for it; set lambda_continue=0 to train without"
    )
    assert dreamer_v3_model_terms(outputs, make_batch(), num_reward_bins=BINS).keys() == {"kl", "reco", "reward"}


TIME_FIRST = r".*Did you pass time first\? Batches are \[B, T, \.\.\.\]"


@pytest.mark.parametrize(
    ("name", "value", "error", "text"),
    [
        (
            "prior_logits",
            torch.zeros(3, 4, 2, 4),
            ValueError,
            r"\[3, 4, 2, 3\] like posterior_logits, got .*\[3, 4, 2, 4\]",
        ),
        ("prior_logits", torch.zeros(4, 3, 2, 3), ValueError, "prior_logits must be" + TIME_FIRST),
        (
            "prior_logits",
            torch.zeros(3, 4, 2, 3).int(),
            TypeError,
            "prior_logits must be a floating-point tensor, got int32",
        ),
        ("posterior_logits", [0.0], TypeError, "posterior_logits must be a tensor, got list"),
        (
            "posterior_logits",
            torch.zeros(3),
            ValueError,
            r"posterior_logits must be of shape \[\.\.\., groups, classes\]",
        ),
        (
            "reward",
            torch.zeros(3, 4, 9),
            ValueError,
            r"the reward prediction must be of shape \[\.\.\., 11\], got float32",
        ),
        (
            "reward",
            torch.zeros(3, 4, 1),
            ValueError,
            "the reward prediction.*Set num_reward_bins.*or reward_two_hot=False",
        ),
        (
            "reward",
            torch.zeros(4, 3, BINS),
            ValueError,
            r"the reward prediction must be of shape \[3, 4, .*" + TIME_FIRST,
        ),
        (
            "reward",
            torch.zeros(3, 4, BINS) > 0,
            TypeError,
            "the reward prediction must be a floating-point tensor, got bool",
        ),
        (
            "reconstruction",
            torch.zeros(3, 4, 6),
            ValueError,
            r"'observation' must be of shape \[3, 4, 5\].*\[3, 4, 6\]",
        ),
        (
            "reconstruction",
            torch.zeros(3, 4, 5).int(),
            TypeError,
            "reconstruction of 'observation' must be a floating-point",
        ),
        (
            "reconstruction",
            {"a": torch.zeros(3, 4, 5)},
            TypeError,
            "reconstruction of 'observation' must be a tensor, got dict",
        ),
        ("continue_logits", torch.zeros(3, 4, 2), ValueError, r"continue_logits must be of shape \[3, 4\]"),
        (
            "continue_logits",
            torch.zeros(3, 4).int(),
            TypeError,
            "continue_logits must be a floating-point tensor, got int32",
        ),
    ],
)
def test_outputs_are_refused(name, value, error, text):
    check_refusal({**make_outputs(), name: value}, make_batch(), error, text)


@pytest.mark.parametrize(
    ("name", "value", "error", "text"),
    [
        (
            "observation",
            torch.zeros(4, 3, OBS),
            ValueError,
            r"'observation' must be of shape \[3, 4, \.\.\.\].*" + TIME_FIRST,
        ),
        (
            "observation",
            torch.zeros(3, 4, OBS) > 0,
            TypeError,
            "observation 'observation' must be a tensor of numbers, got bool",
        ),
        (
            "observation",
            {"a": torch.zeros(3, 4)},
            TypeError,
            r"reconstruction must be a mapping with \['a'\] like observation",
        ),
        (
            "reward",
            torch.zeros(4, 3),
            ValueError,
            r"reward must be of shape \[3, 4\].*got float32 \[4, 3\]" + TIME_FIRST,
        ),
        ("reward", torch.zeros(4, 3, 1), ValueError, r"reward must be of shape \[3, 4\]" + TIME_FIRST),
        (
            "reward",
            torch.zeros(3, 4, 2),
            ValueError,
            r"\[3, 4\] like the logits' leading dimensions, got float32 \[3, 4, 2\]",
        ),
        ("reward", torch.zeros(3, 4) > 0, TypeError, r"reward must be a tensor of numbers, got bool \[3, 4\]"),
        ("reward", 0.0, TypeError, r"reward must be a tensor, got float 0\.0"),
        ("terminated", torch.zeros(3, 4), TypeError, r"terminated must be a bool tensor, got float32 \[3, 4\]"),
        ("terminated", torch.zeros(4, 3) > 0, ValueError, r"terminated must be of shape \[3, 4\]" + TIME_FIRST),
        ("mask", torch.ones(4, 3) > 0, ValueError, r"mask must be of shape \[3, 4\]" + TIME_FIRST),
        ("mask", torch.ones(3, 4, 1) > 0, ValueError, r"mask must be of shape \[3, 4\].*got bool \[3, 4, 1\]"),
        ("mask", torch.ones(3, 4).int(), TypeError, r"mask must be a bool tensor, got int32 \[3, 4\]"),
    ],
)
def test_batch_is_refused(name, value, error, text):
    check_refusal(make_outputs(), {**make_batch(), name: value}, error, text)


def test_heads_that_do_not_match_are_refused():
    batch = {**make_batch(), "observation": {"a": torch.zeros(3, 4, 5)}}
    outputs = {**make_outputs(), "reconstruction": {"b": torch.zeros(3, 4, 5)}}
    check_refusal(outputs, batch, KeyError, r"mapping with \['a'\], got keys \['b'\]\. One head for each observation")


def test_logits_for_a_scalar_reward_are_refused():
    text = r"the reward prediction must be of shape \[3, 4\].*got float64 \[3, 4, 11\]\. With reward_two_hot=False"
    check_refusal(make_outputs(), make_batch(), ValueError, text, reward_two_hot=False)


@pytest.mark.parametrize("outputs", [torch.zeros(2, 3), (1, 2), None])
def test_outputs_that_are_no_mapping_are_refused(outputs):
    check_refusal(outputs, make_batch(), TypeError, r"world_model\(params, batch\) must be a mapping of tensors")


def test_refusal_under_vmap_speaks_of_one_member():
    batch, outputs = make_batch(), make_outputs()
    batch["reward"] = batch["reward"].transpose(0, 1)
    stacked = tree_map(lambda x: torch.stack([x, x]), outputs)
    with pytest.raises(ValueError, match=r"reward must be of shape \[3, 4\].*got float32 \[4, 3\]"):
        vmap(lambda outputs: loss_of_outputs(outputs, batch, num_reward_bins=BINS))(stacked)


@pytest.mark.parametrize("reco_loss", ["l2", "l1"])
def test_a_function_of_the_loss_may_cast_it(reco_loss):
    params, direction, batch = parameters(1), parameters(2), make_batch()

    def squared(params):
        return model_loss(params, batch, reco_loss=reco_loss, lambda_kl=0.5).double().square()

    curvature = jvp(grad(squared), (params,), (direction,))[1]
    assert {x.dtype for x in curvature.values()} == {torch.float32}
    assert all(x.isfinite().all() for x in curvature.values())


@pytest.mark.usefixtures("path")
def test_knobs_may_be_numpy_numbers_and_must_be_finite():
    outputs, batch = make_outputs(dtype=torch.float32), make_batch()
    knobs = {"lambda_kl": 0.5, "free_bits": 0.25, "kl_alpha": 0.75, "unimix": 0.125}
    of_numpy = {name: np.float32(x) for name, x in knobs.items()}
    losses = dreamer_v3_model_losses(outputs, batch, num_reward_bins=BINS, **of_numpy)
    wanted = dreamer_v3_model_losses(outputs, batch, num_reward_bins=BINS, **knobs)
    assert_close(losses, wanted, rtol=0, atol=0)
    for name in ("lambda_kl", "lambda_dynamic", "free_bits"):
        with pytest.raises(ValueError, match=rf"dreamer_v3_model_loss: {name} must be a finite number, got inf"):
            dreamer_v3_model_losses(outputs, batch, **{name: math.inf})


@pytest.mark.parametrize(("model", "got"), [(None, "NoneType"), ({}, "dict")])
def test_a_world_model_is_a_function(model, got):
    match = rf"dreamer_v3_model_loss: world_model must be a function \(params, batch\) -> outputs, got {got}"
    with pytest.raises(TypeError, match=match):
        dreamer_v3_model_loss(parameters(1), make_batch(), world_model=model)
