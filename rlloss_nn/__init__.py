"""Torch modules over the pure losses of ``rlloss``: they hold networks, name tensordict entries and call.

``rlloss_nn.networks`` has reference networks to go with them.
"""

from rlloss_nn.dreamer_v3 import DreamerV3Loss as DreamerV3Loss
from rlloss_nn.dreamer_v3 import DreamerV3ModelLoss as DreamerV3ModelLoss
from rlloss_nn.dreamer_v3_actor import DreamerV3ActorLoss as DreamerV3ActorLoss
from rlloss_nn.dreamer_v3_value import DreamerV3ValueLoss as DreamerV3ValueLoss
from rlloss_nn.functional import functionalize as functionalize
from rlloss_nn.loss_module import LossModule as LossModule
from rlloss_nn.optim import LaProp as LaProp
from rlloss_nn.optim import SoftUpdate as SoftUpdate
from rlloss_nn.rnd import RNDLoss as RNDLoss
from rlloss_nn.rnd import RNDReward as RNDReward
from rlloss_nn.statistics import ReturnRange as ReturnRange
from rlloss_nn.statistics import RunningMeanStd as RunningMeanStd

__all__ = [
    "DreamerV3ActorLoss",
    "DreamerV3Loss",
    "DreamerV3ModelLoss",
    "DreamerV3ValueLoss",
    "LaProp",
    "LossModule",
    "RNDLoss",
    "RNDReward",
    "ReturnRange",
    "RunningMeanStd",
    "SoftUpdate",
    "functionalize",
]
