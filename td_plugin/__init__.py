"""Train it so that it can be pruned, make it physically smaller, ship it as ONNX, and know its latency."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from td_plugin import criteria, dropconnect, gates, granularity, layerwise, penalties, rates, recipes, schedules
    from td_plugin.by_name import Layers
    from td_plugin.contract import Evidence, Recipe
    from td_plugin.errors import TdError
    from td_plugin.ramp import Ramp
    from td_plugin.report import SparsityReport
    from td_plugin.scheduler import TargetedDropoutScheduler
    from td_plugin.sparsifier import TargetedDropout

__version__ = "0.1.0"

__all__ = [
    "Evidence",
    "Layers",
    "Ramp",
    "Recipe",
    "SparsityReport",
    "TargetedDropout",
    "TargetedDropoutScheduler",
    "TdError",
    "criteria",
    "dropconnect",
    "gates",
    "granularity",
    "layerwise",
    "penalties",
    "rates",
    "recipes",
    "schedules",
]

# Loaded when first asked for: the command line shows its help without torch.
_HOMES = {
    "Evidence": "contract",
    "Layers": "by_name",
    "Ramp": "ramp",
    "Recipe": "contract",
    "SparsityReport": "report",
    "TargetedDropout": "sparsifier",
    "TargetedDropoutScheduler": "scheduler",
    "TdError": "errors",
}

if not TYPE_CHECKING:  # a type checker that sees it takes every misspelt name for an object

    def __getattr__(name: str) -> object:
        """A public name or a module of the package."""
        unknown = AttributeError(f"module 'td_plugin' has no attribute {name!r}")
        if name.startswith("_"):  # and __main__ would run
            raise unknown
        module = f"td_plugin.{_HOMES.get(name, name)}"
        try:
            value = import_module(module)
        except ModuleNotFoundError as error:
            if error.name != module:
                raise
            raise unknown from None
        if name in _HOMES:
            value = getattr(value, name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
