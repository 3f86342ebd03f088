"""Learned masks: each a recipe whose weights or units carry a parameter that decides about them.

`TargetedDropout(td_plugin.gates.hard_concrete())` trains single weights, `hard_concrete(granularity.Units())` whole
units. The parameters of a gate belong to the sparsifier, which trains them when the user's optimizer steps: the model's
parameters and checkpoints stay plain, the loop and the loss stay the user's.
"""

from td_plugin.gates.hard_concrete import hard_concrete
from td_plugin.gates.smallify import smallify
from td_plugin.gates.variational import variational

__all__ = ["hard_concrete", "smallify", "variational"]
