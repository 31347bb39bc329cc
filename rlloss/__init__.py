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
from rlloss.dreamer_v3 import dreamer_v3_model_loss as dreamer_v3_model_loss
from rlloss.dreamer_v3 import dreamer_v3_model_losses as dreamer_v3_model_losses
from rlloss.dreamer_v3 import dreamer_v3_model_terms as dreamer_v3_model_terms
from rlloss.rnd import rnd_error as rnd_error
from rlloss.rnd import rnd_key_mask as rnd_key_mask
from rlloss.rnd import rnd_loss as rnd_loss
from rlloss.rnd import rnd_reward as rnd_reward
from rlloss.rnd import rnd_reward_stats_update as rnd_reward_stats_update
from rlloss.statistics import DiscountedSum as DiscountedSum
from rlloss.statistics import ReturnRange as ReturnRange
from rlloss.statistics import RunningMeanStd as RunningMeanStd
from rlloss.statistics import discounted_sum_init as discounted_sum_init
from rlloss.statistics import discounted_sum_update as discounted_sum_update
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
    "DiscountedSum",
    "ReturnRange",
    "RunningMeanStd",
    "categorical_entropy",
    "categorical_kl",
    "categorical_kl_balanced",
    "categorical_kl_terms",
    "discounted_sum_init",
    "discounted_sum_update",
    "dreamer_v3_model_loss",
    "dreamer_v3_model_losses",
    "dreamer_v3_model_terms",
    "random",
    "return_range_init",
    "return_range_scale",
    "return_range_update",
    "rnd_error",
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
