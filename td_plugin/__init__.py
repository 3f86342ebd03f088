"""Train it so that it can be pruned, make it physically smaller, ship it as ONNX, and know its latency."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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

# Loaded when first asked for: the command line shows its help without torch.
_HOMES = {
    "Evidence": "contract",
    "Recipe": "contract",
    "SparsityReport": "report",
    "TargetedDropout": "sparsifier",
    "TargetedDropoutScheduler": "scheduler",
    "TdError": "errors",
}


def __getattr__(name: str) -> object:
    if name in _HOMES:
        value = getattr(import_module(f"td_plugin.{_HOMES[name]}"), name)
    elif name in __all__:
        value = import_module(f"td_plugin.{name}")
    else:
        raise AttributeError(f"module 'td_plugin' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
