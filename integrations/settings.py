"""What a run was set up with, kept in its checkpoints, so that resuming with something else is said."""

from __future__ import annotations

from typing import Any

from td_plugin.contract import Recipe, Schedule
from td_plugin.sparsifier import TargetedDropout

_SHOWN = 4  # tensors whose levels are named one by one


def _curve(schedule: Schedule) -> list[float]:
    return [round(schedule(step / 8), 6) for step in range(9)]


def _recipe(recipe: Recipe) -> dict[str, Any]:
    return {
        "recipe": recipe.name,
        "granularity": str(recipe.granularity),
        "sparsity_schedule": _curve(recipe.sparsity_schedule),
        "drop_schedule": _curve(recipe.drop_schedule),
    }


def settings_of(sparsifier: TargetedDropout, ramp: str, mask_every: str, max_steps: int) -> dict[str, Any]:
    """What decides over the masks beside weights and step, JSON-able.

    Args:
        sparsifier: prepared.
        ramp: as the user said it.
        mask_every: as of the callback.
        max_steps: optimizer steps of the whole run, from which follows how fast γ and α rise.
    """
    levels = {g["tensor_fqn"]: [g["target_sparsity_level"], g["target_drop_rate"]] for g in sparsifier.groups}
    common = [sparsifier.defaults["sparsity_level"], sparsifier.defaults["drop_rate"]]
    return {
        **_recipe(sparsifier.recipe),
        "sparsity_level": common[0],
        "drop_rate": common[1],
        "seed": sparsifier.seed,
        "ramp": ramp,
        "mask_every": mask_every,
        "max_steps": max_steps,
        "targets": len(levels),
        "levels": {name: level for name, level in levels.items() if level != common},
    }


def changes(saved: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    """Each of `settings` that is not as it was `saved`, with its old and its new value."""
    changed = [
        f"{name} {saved[name]} -> {value}"
        for name, value in settings.items()
        if name in saved and saved[name] != value and name != "levels"
    ]
    return changed + _changed_levels(saved.get("levels", {}), settings["levels"])


def _changed_levels(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    names = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
    told = [f"γ and α of {name} {old.get(name, 'as all')} -> {new.get(name, 'as all')}" for name in names[:_SHOWN]]
    return told + ([f"and of {len(names) - _SHOWN} more tensors"] if len(names) > _SHOWN else [])
