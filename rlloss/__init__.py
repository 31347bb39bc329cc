"""Reinforcement-learning losses as pure functions: tensors in, tensors out, nothing hidden.

Each function works eager, under ``vmap``, ``grad``, ``jvp`` and ``torch.compile(fullgraph=True)``. The torch
modules over them are in ``rlloss_nn``.
"""

from rlloss.transforms import symexp as symexp
from rlloss.transforms import symlog as symlog

__all__ = [
    "symexp",
    "symlog",
]
