"""Reinforcement-learning losses as pure functions: tensors in, tensors out, nothing hidden.

Each function works eager, under ``vmap``, ``grad``, ``jvp`` and ``torch.compile(fullgraph=True)``. The torch
modules over them are in ``rlloss_nn``.
"""

from rlloss.transforms import symexp as symexp
from rlloss.transforms import symlog as symlog
from rlloss.two_hot import symexp_bins as symexp_bins
from rlloss.two_hot import two_hot_cross_entropy as two_hot_cross_entropy
from rlloss.two_hot import two_hot_decode as two_hot_decode
from rlloss.two_hot import two_hot_encode as two_hot_encode

__all__ = [
    "symexp",
    "symexp_bins",
    "symlog",
    "two_hot_cross_entropy",
    "two_hot_decode",
    "two_hot_encode",
]
