"""Train it so that it can be pruned, make it physically smaller, ship it as ONNX, and know its latency."""

from td_plugin import criteria, granularity, recipes, schedules
from td_plugin.contract import Evidence, Recipe
from td_plugin.errors import TdError
from td_plugin.report import SparsityReport
from td_plugin.scheduler import TargetedDropoutScheduler
from td_plugin.sparsifier import TargetedDropout

__version__ = "0.1.0"

__all__ = [
    "Evidence",
    "Recipe",
    "SparsityReport",
    "TargetedDropout",
    "TargetedDropoutScheduler",
    "TdError",
    "criteria",
    "granularity",
    "recipes",
    "schedules",
]
