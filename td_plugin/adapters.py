"""Layers that PEFT has put into a model, told apart from the model's own. PEFT is never imported here."""

from __future__ import annotations

import sys

from torch import nn

FACTOR = "an adapter's: zeros in its factors are none in the merged weight; name it in the config to drop them"
UNUSED = "PEFT keeps it beside the copy in modules_to_save, which is what runs"
WRAPPED = "an adapter's delta goes past the mask of its units: merge_and_unload() first, or wrap other layers"


def wrapped_by_peft(model: nn.Module) -> dict[str, str]:
    """The weights of the model's own layers that adapters wrap, with why their units may be unknown."""
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    if tuners is None:
        return {}
    found = [name for name, module in model.named_modules() if isinstance(module, tuners.BaseTunerLayer)]
    return {f"{name}.base_layer.weight".lstrip("."): WRAPPED for name in found}


def added_by_peft(model: nn.Module) -> dict[str, str]:
    """The modules that PEFT added (adapters, originals that no longer run) by name, with why they are left alone.

    A wrapped layer itself, ``...query.base_layer``, is the model's own.
    """
    tuners, others = sys.modules.get("peft.tuners.tuners_utils"), sys.modules.get("peft.utils.other")
    if tuners is None or others is None:  # nobody has such layers without it
        return {}
    added = {}
    for name, module in model.named_modules():
        if isinstance(module, tuners.BaseTunerLayer):
            inner = [path for path, _ in module.named_modules() if path.split(".")[0] not in ("", "base_layer")]
            added.update({f"{name}.{path}".lstrip("."): FACTOR for path in inner})
        elif isinstance(module, others.ModulesToSaveWrapper):
            inner = [path for path, _ in module.named_modules() if path.split(".")[0] == "original_module"]
            added.update({f"{name}.{path}".lstrip("."): UNUSED for path in inner})
    return added
