"""Reinforcement-learning losses as pure functions: tensors in, tensors out, nothing hidden.

Each function works eager, under ``vmap``, ``grad``, ``jvp`` and ``torch.compile(fullgraph=True)``. The torch
modules over them are in ``rlloss_nn``.
"""

from rlloss import random as random
from rlloss.categorical import categorical_entropy as categorical_entropy
from rlloss.categorical import categorical_kl as categorical_kl
from rlloss.categorical import categorical_kl_balanced as categorical_kl_balanced
from rlloss.categorical import categorical_kl_terms as categorical_kl_terms
from rlloss.categorical import straight_through_one_hot as straight_through_one_hot
from rlloss.categorical import unimix as unimix
from rlloss.dreamer_v3 import DREAMER_V3_DEFAULTS as DREAMER_V3_DEFAULTS
from rlloss.dreamer_v3 import DREAMER_V3_OFFICIAL as DREAMER_V3_OFFICIAL
from rlloss.dreamer_v3 import BehaviourTargets as BehaviourTargets
from rlloss.dreamer_v3 import DreamerV3Agent as DreamerV3Agent
from rlloss.dreamer_v3 import DreamerV3State as DreamerV3State
from rlloss.dreamer_v3 import Imagination as Imagination
from rlloss.dreamer_v3 import dreamer_v3_actor_loss as dreamer_v3_actor_loss
from rlloss.dreamer_v3 import dreamer_v3_actor_terms as dreamer_v3_actor_terms
from rlloss.dreamer_v3 import dreamer_v3_loss as dreamer_v3_loss
from rlloss.dreamer_v3 import dreamer_v3_model_loss as dreamer_v3_model_loss
from rlloss.dreamer_v3 import dreamer_v3_model_losses as dreamer_v3_model_losses
from rlloss.dreamer_v3 import dreamer_v3_model_terms as dreamer_v3_model_terms
from rlloss.dreamer_v3 import dreamer_v3_replay_value_loss as dreamer_v3_replay_value_loss
from rlloss.dreamer_v3 import dreamer_v3_returns as dreamer_v3_returns
from rlloss.dreamer_v3 import dreamer_v3_value_loss as dreamer_v3_value_loss
from rlloss.dreamer_v3 import dreamer_v3_value_terms as dreamer_v3_value_terms
from rlloss.dreamer_v3 import imagine as imagine
from rlloss.optim import LaPropState as LaPropState
from rlloss.optim import adaptive_clip as adaptive_clip
from rlloss.optim import ema_update as ema_update
from rlloss.optim import laprop_init as laprop_init
from rlloss.optim import laprop_update as laprop_update
from rlloss.optim import linear_warmup as linear_warmup
from rlloss.policy import CategoricalPolicy as CategoricalPolicy
from rlloss.policy import EvaluatedPolicy as EvaluatedPolicy
from rlloss.policy import NormalPolicy as NormalPolicy
from rlloss.policy import bounded_normal as bounded_normal
from rlloss.policy import categorical_policy as categorical_policy
from rlloss.policy import policy_entropy as policy_entropy
from rlloss.policy import policy_log_prob as policy_log_prob
from rlloss.policy import policy_sample as policy_sample
from rlloss.returns import lambda_return as lambda_return
from rlloss.rnd import rnd_error as rnd_error
from rlloss.rnd import rnd_error_and_target_features as rnd_error_and_target_features
from rlloss.rnd import rnd_key_mask as rnd_key_mask
from rlloss.rnd import rnd_loss as rnd_loss
from rlloss.rnd import rnd_reward as rnd_reward
from rlloss.rnd import rnd_reward_stats_update as rnd_reward_stats_update
from rlloss.statistics import DiscountedSum as DiscountedSum
from rlloss.statistics import MeanStd as MeanStd
from rlloss.statistics import ReturnRange as ReturnRange
from rlloss.statistics import RunningMeanStd as RunningMeanStd
from rlloss.statistics import discounted_sum_init as discounted_sum_init
from rlloss.statistics import discounted_sum_update as discounted_sum_update
from rlloss.statistics import mean_std_init as mean_std_init
from rlloss.statistics import mean_std_read as mean_std_read
from rlloss.statistics import mean_std_update as mean_std_update
from rlloss.statistics import return_range_init as return_range_init
from rlloss.statistics import return_range_scale as return_range_scale
from rlloss.statistics import return_range_update as return_range_update
from rlloss.statistics import running_mean_std_init as running_mean_std_init
from rlloss.statistics import running_mean_std_normalize as running_mean_std_normalize
from rlloss.statistics import running_mean_std_update as running_mean_std_update
from rlloss.transforms import symexp as symexp
from rlloss.transforms import symlog as symlog
from rlloss.two_hot import symexp_bins as symexp_bins
from rlloss.two_hot import two_hot_cross_entropy as two_hot_cross_entropy
from rlloss.two_hot import two_hot_decode as two_hot_decode
from rlloss.two_hot import two_hot_encode as two_hot_encode

__all__ = [
    "DREAMER_V3_DEFAULTS",
    "DREAMER_V3_OFFICIAL",
    "BehaviourTargets",
    "CategoricalPolicy",
    "DiscountedSum",
    "DreamerV3Agent",
    "DreamerV3State",
    "EvaluatedPolicy",
    "Imagination",
    "LaPropState",
    "MeanStd",
    "NormalPolicy",
    "ReturnRange",
    "RunningMeanStd",
    "adaptive_clip",
    "bounded_normal",
    "categorical_entropy",
    "categorical_kl",
    "categorical_kl_balanced",
    "categorical_kl_terms",
    "categorical_policy",
    "discounted_sum_init",
    "discounted_sum_update",
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
    "ema_update",
    "imagine",
    "lambda_return",
    "laprop_init",
    "laprop_update",
    "linear_warmup",
    "mean_std_init",
    "mean_std_read",
    "mean_std_update",
    "policy_entropy",
    "policy_log_prob",
    "policy_sample",
    "random",
    "return_range_init",
    "return_range_scale",
    "return_range_update",
    "rnd_error",
    "rnd_error_and_target_features",
    "rnd_key_mask",
    "rnd_loss",
    "rnd_reward",
    "rnd_reward_stats_update",
    "running_mean_std_init",
    "running_mean_std_normalize",
    "running_mean_std_update",
    "straight_through_one_hot",
    "symexp",
    "symexp_bins",
    "symlog",
    "two_hot_cross_entropy",
    "two_hot_decode",
    "two_hot_encode",
    "unimix",
]
