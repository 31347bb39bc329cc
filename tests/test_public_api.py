"""The names users rely on: exactly these, each documented, with the signatures of the contract."""

import ast
import inspect
from pathlib import Path
from types import FunctionType

import pytest

import rlloss

PACKAGE = Path(rlloss.__file__).parent

#: File -> the public names it defines.
PUBLIC = {
    "transforms": ["symexp", "symlog"],
    "two_hot": ["symexp_bins", "two_hot_cross_entropy", "two_hot_decode", "two_hot_encode"],
    "categorical": [
        "categorical_entropy",
        "categorical_kl",
        "categorical_kl_balanced",
        "categorical_kl_terms",
        "straight_through_one_hot",
        "unimix",
    ],
    "statistics": [
        "DiscountedSum",
        "MeanStd",
        "ReturnRange",
        "RunningMeanStd",
        "discounted_sum_init",
        "discounted_sum_update",
        "mean_std_init",
        "mean_std_read",
        "mean_std_update",
        "return_range_init",
        "return_range_scale",
        "return_range_update",
        "running_mean_std_init",
        "running_mean_std_normalize",
        "running_mean_std_update",
    ],
    "returns": ["lambda_return"],
    "optim": ["LaPropState", "adaptive_clip", "ema_update", "laprop_init", "laprop_update", "linear_warmup"],
    "rnd": [
        "rnd_error",
        "rnd_error_and_target_features",
        "rnd_key_mask",
        "rnd_loss",
        "rnd_reward",
        "rnd_reward_stats_update",
    ],
    "dreamer_v3": [
        "BehaviourTargets",
        "DREAMER_V3_DEFAULTS",
        "DREAMER_V3_OFFICIAL",
        "DreamerV3Agent",
        "DreamerV3State",
        "Imagination",
        "dreamer_v3_actor_loss",
        "dreamer_v3_actor_terms",
        "dreamer_v3_loss",
        "dreamer_v3_model_loss",
        "dreamer_v3_model_losses",
        "dreamer_v3_model_terms",
        "dreamer_v3_replay_value_loss",
        "dreamer_v3_returns",
        "dreamer_v3_value_loss",
        "dreamer_v3_value_terms",
        "imagine",
    ],
    "policy": [
        "CategoricalPolicy",
        "EvaluatedPolicy",
        "NormalPolicy",
        "bounded_normal",
        "categorical_policy",
        "policy_entropy",
        "policy_log_prob",
        "policy_sample",
    ],
}

#: Used as `rlloss.random.key(0)`: names such as `normal` and `split` say too little on their own.
RANDOM = ["bernoulli", "bits", "choice", "fold_in", "gumbel", "key", "normal", "permutation", "split", "uniform"]

#: Files that define nothing public.
INTERNAL = ["__init__", "checks", "fused", "fused_triton", "pages", "recurrence", "types"]

#: Parameters as in the contract: names, order, what is keyword-only, defaults.
SIGNATURES = {
    "random.key": "(seed, *, device=None)",
    "random.split": "(key, num=2)",
    "random.fold_in": "(key, data)",
    "random.bits": "(key, shape)",
    "random.uniform": "(key, shape, low=0.0, high=1.0, *, dtype=torch.float32)",
    "random.normal": "(key, shape, *, dtype=torch.float32)",
    "random.gumbel": "(key, shape, *, dtype=torch.float32)",
    "random.bernoulli": "(key, p, shape)",
    "random.permutation": "(key, n_or_tensor)",
    "random.choice": "(key, n_or_tensor, shape, *, replace=False)",
    "symlog": "(x)",
    "symexp": "(x)",
    "symexp_bins": "(num_bins=255, low=-20.0, high=20.0, *, dtype=torch.float32, device=None)",
    "two_hot_encode": "(x, bins)",
    "two_hot_decode": "(logits, bins)",
    "two_hot_cross_entropy": "(logits, target, bins)",
    "unimix": "(logits, mix=0.01)",
    "categorical_kl": "(p_logits, q_logits)",
    "categorical_kl_balanced": "(posterior_logits, prior_logits, alpha=0.8, free_bits=1.0)",
    "categorical_kl_terms": "(posterior_logits, prior_logits, *, free_nats=1.0, unimix=0.01)",
    "categorical_entropy": "(logits)",
    "straight_through_one_hot": "(logits, noise)",
    "running_mean_std_init": "(shape=(), *, epsilon=0.0001, dtype=torch.float32, device=None)",
    "running_mean_std_update": "(state, x, *, group=None)",
    "running_mean_std_normalize": "(state, x, clip=None)",
    "discounted_sum_init": "(shape=(), *, dtype=torch.float32, device=None)",
    "discounted_sum_update": "(state, reward, *, discount=0.99)",
    "return_range_init": "(*, dtype=torch.float32, device=None)",
    "return_range_update": "(state, returns, *, rate=0.01, quantiles=(0.05, 0.95), group=None)",
    "return_range_scale": "(state, *, minimum=1.0)",
    "mean_std_init": "(*, dtype=torch.float32, device=None)",
    "mean_std_update": "(state, x, *, rate=0.01, group=None)",
    "mean_std_read": "(state, *, debias=True, minimum=1e-08)",
    "lambda_return": "(reward, bootstrap, continuation, last=None, *, discount, lmbda=0.95)",
    "laprop_init": "(params)",
    "laprop_update": (
        "(params, grads, state, *, learning_rate=4e-05, clip=0.3, floor=0.001, beta1=0.9, beta2=0.999, eps=1e-20,"
        " warmup=1000, nesterov=False, weight_decay=0.0)"
    ),
    "adaptive_clip": "(params, grads, *, clip=0.3, floor=0.001)",
    "linear_warmup": "(step, *, steps=1000)",
    "ema_update": "(slow_params, params, *, rate=0.02)",
    "rnd_key_mask": "(key, batch_size, fraction=0.25, *, exact=True)",
    "rnd_error": ("(pred_params, target_params, batch, *, predictor, target=None, obs_stats=None, obs_clip=5.0)"),
    "rnd_error_and_target_features": (
        "(pred_params, target_params, batch, *, predictor, target=None, obs_stats=None, obs_clip=5.0)"
    ),
    "rnd_loss": (
        "(pred_params, target_params, batch, key_mask=None, *, predictor, target=None, obs_stats=None, obs_clip=5.0,"
        " reduction='mean', target_features=None)"
    ),
    "rnd_reward_stats_update": "(sums, stats, error, *, discount=0.99)",
    "rnd_reward": "(stats, error)",
    "dreamer_v3_model_terms": "(outputs, batch, **knobs)",
    "dreamer_v3_model_losses": "(outputs, batch, **knobs)",
    "dreamer_v3_model_loss": "(params, batch, *, world_model, **knobs)",
    "imagine": "(params, start, noise, *, dynamics, policy, horizon, time_dim=1)",
    "dreamer_v3_returns": (
        "(reward, continuation, value, range_state, *, discount=1.0, lmbda=0.95, value_stats=None, rate=0.01,"
        " quantiles=(0.05, 0.95), minimum=1.0, group=None)"
    ),
    "dreamer_v3_actor_terms": (
        "(policy, action, advantage, weight, *, entropy=0.0003, estimator='score', advantage_stats=None)"
    ),
    "dreamer_v3_actor_loss": ("(params, batch, *, actor, entropy=0.0003, estimator='score', advantage_stats=None)"),
    "dreamer_v3_value_terms": (
        "(prediction, slow_prediction, returns, weight, *, slow_weight=1.0, value_loss='two_hot', bins=None,"
        " value_stats=None)"
    ),
    "dreamer_v3_value_loss": (
        "(params, slow_params, batch, *, critic, slow_weight=1.0, value_loss='two_hot', bins=None, value_stats=None,"
        " reduction='mean')"
    ),
    "dreamer_v3_replay_value_loss": (
        "(params, slow_params, batch, *, critic, discount=0.996996996996997, lmbda=0.95, slow_weight=1.0,"
        " value_loss='two_hot', bins=None, value_stats=None, reduction='mean')"
    ),
    "dreamer_v3_loss": (
        "(params, state, batch, noise, *, agent, horizon=15, starts=None, discount=1.0,"
        " replay_discount=0.996996996996997, lmbda=0.95, entropy=0.0003, slow_weight=1.0, lambda_actor=1.0,"
        " lambda_value=1.0, lambda_replay_value=0.3, **knobs)"
    ),
    "bounded_normal": "(mean, stddev, *, minimum=0.1, maximum=1.0)",
    "categorical_policy": "(logits, *, unimix=0.0)",
    "policy_sample": "(policy, noise)",
    "policy_log_prob": "(policy, action)",
    "policy_entropy": "(policy)",
}

#: Knobs of the world-model loss that the contract documents, with their defaults.
KNOBS = {
    "lambda_kl": 1.0,
    "lambda_reco": 1.0,
    "lambda_reward": 1.0,
    "lambda_continue": 0.0,
    "kl_alpha": 0.8,
    "free_bits": 1.0,
    "reco_loss": "l2",
    "reward_two_hot": True,
    "num_reward_bins": 255,
    "global_average": False,
    "kl_mode": "balanced",
    "lambda_dynamic": 1.0,
    "lambda_representation": 0.1,
    "unimix": 0.0,
    "continue_target_scale": 1.0,
    "reco_transform": "symlog",
}

STATES = {
    "BehaviourTargets": ["returns", "advantage", "weight"],
    "CategoricalPolicy": ["logits"],
    "DiscountedSum": ["value"],
    "DreamerV3Agent": ["world_model", "dynamics", "reward", "continuation", "actor", "critic", "rollout"],
    "DreamerV3State": ["slow_critic", "return_range"],
    "EvaluatedPolicy": ["log_prob", "entropy"],
    "Imagination": ["states", "actions"],
    "LaPropState": ["step", "square", "momentum"],
    "MeanStd": ["mean", "square", "correction"],
    "NormalPolicy": ["mean", "stddev"],
    "ReturnRange": ["low", "high"],
    "RunningMeanStd": ["mean", "var", "count"],
}

FUNCTIONS = [f"random.{name}" for name in RANDOM]
FUNCTIONS += sorted(name for names in PUBLIC.values() for name in names if name == name.lower())


def resolve(name):
    return getattr(rlloss.random, name.removeprefix("random.")) if name.startswith("random.") else getattr(rlloss, name)


def test_all_is_exactly_the_documented_names():
    documented = {"random", *(name for names in PUBLIC.values() for name in names)}
    assert set(rlloss.__all__) == documented
    assert len(rlloss.__all__) == len(documented)


def test_all_is_exactly_what_is_imported_as_itself():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    imports = [(node.module, alias) for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert all(alias.asname == alias.name for _, alias in imports)
    assert sorted(alias.asname for _, alias in imports) == sorted(rlloss.__all__)
    assert not [node for node in tree.body if isinstance(node, ast.Import)]
    homes = {alias.name: module for module, alias in imports}
    expected = {name: f"rlloss.{file}" for file, names in PUBLIC.items() for name in names}
    assert homes == {**expected, "random": "rlloss"}


def test_every_file_of_the_package_is_in_the_table():
    files = {file.stem for file in PACKAGE.glob("*.py")}
    assert files == {*PUBLIC, *INTERNAL, "random"}


def test_random_has_exactly_its_documented_functions():
    functions = [
        name
        for name, value in vars(rlloss.random).items()
        if isinstance(value, FunctionType) and value.__module__ == "rlloss.random" and not name.startswith("_")
    ]
    assert sorted(functions) == RANDOM


@pytest.mark.parametrize("name", FUNCTIONS)
def test_docstring_says_what_a_reader_needs(name):
    function = resolve(name)
    text = inspect.getdoc(function)
    first = text.splitlines()[0]
    assert first.endswith("."), "the first line is one sentence"
    assert "Source: " in text
    sections = [section for section in ("Args:", "Returns:", "Example:") if f"\n{section}\n" in f"\n{text}\n"]
    parameters = list(inspect.signature(function).parameters)
    assert sections == (["Args:"] if parameters else []) + ["Returns:", "Example:"]
    assert ">>> " in text.split("\nExample:\n")[1]
    if parameters:
        described = text.split("\nArgs:\n")[1].split("\nReturns:\n")[0]
        missing = [p for p in parameters if f"    {p}: " not in described and f"    **{p}: " not in described]
        assert not missing


@pytest.mark.parametrize("name", sorted(STATES))
def test_state_is_a_documented_named_tuple(name):
    state = getattr(rlloss, name)
    assert issubclass(state, tuple)
    assert list(state._fields) == STATES[name]
    assert inspect.getdoc(state).endswith(".")


def test_every_function_has_a_signature_in_the_contract():
    assert set(SIGNATURES) == set(FUNCTIONS)


@pytest.mark.parametrize("name", sorted(SIGNATURES))
def test_signature_is_that_of_the_contract(name):
    signature = inspect.signature(resolve(name))
    empty = inspect.Parameter.empty
    bare = [parameter.replace(annotation=empty) for parameter in signature.parameters.values()]
    assert str(inspect.Signature(bare)) == SIGNATURES[name]
    unannotated = [p.name for p in signature.parameters.values() if p.annotation is empty]
    assert not unannotated
    assert signature.return_annotation is not inspect.Signature.empty


def test_knobs_and_defaults_are_those_of_the_contract():
    assert dict(rlloss.DREAMER_V3_DEFAULTS) == KNOBS
    assert set(rlloss.DREAMER_V3_OFFICIAL) <= set(KNOBS)


def test_types_are_shipped():
    assert (PACKAGE / "py.typed").exists()
