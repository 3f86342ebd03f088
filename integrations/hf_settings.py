"""What a run was set up with, kept in its checkpoints, so that resuming with something else is said.

Like `td_plugin.integrations.hf_state` it lies in `trainer_state.json` under a name that is no callback's. Nothing is
read from it but the warning: what the callback is given now is what holds.
"""

from __future__ import annotations

import warnings
from typing import Any

from transformers import TrainerState, TrainingArguments

from td_plugin.contract import Recipe, Schedule
from td_plugin.errors import TdError
from td_plugin.sparsifier import TargetedDropout

_NAME = "td_plugin_settings"
_SHOWN = 4  # tensors whose levels are named one by one


def refuse_zero3(args: TrainingArguments) -> None:
    """Refuse DeepSpeed's third stage.

    Raises:
        TdError: parameters are sharded, and empty between the forwards of their modules.
    """
    plugin = args.deepspeed_plugin
    if plugin is not None and plugin.zero_stage == 3:
        raise TdError(
            "targeted dropout cannot run under DeepSpeed ZeRO-3: between the forwards a weight is an empty tensor, so "
            "it can be neither ranked nor pruned",
            got="zero_stage 3",
            fix="ZeRO-1 or ZeRO-2, which shard optimizer and gradients only, or FSDP2",
        )


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


def compare(state: TrainerState, settings: dict[str, Any]) -> None:
    """Warn of what differs from the settings in the checkpoint, if it has any, and keep those of now.

    Warns:
        UserWarning: names each setting that changed, with its old and its new value.
    """
    states: dict[str, Any] = state.stateful_callbacks  # type: ignore[assignment]  # a dict, whatever it is declared as
    saved = states.get(_NAME)
    states[_NAME] = settings
    if not isinstance(saved, dict) or not state.is_world_process_zero:
        return
    changed = [
        f"{name} {saved[name]} -> {value}"
        for name, value in settings.items()
        if name in saved and saved[name] != value and name != "levels"
    ]
    changed += _changed_levels(saved.get("levels", {}), settings["levels"])
    if changed:
        warnings.warn(
            f"resumed at step {state.global_step} with other settings than the checkpoint was trained with: "
            f"{'; '.join(changed)}. The new ones hold from here on, so the run is not the one that was interrupted",
            stacklevel=4,
        )


def _changed_levels(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    names = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
    told = [f"γ and α of {name} {old.get(name, 'as all')} -> {new.get(name, 'as all')}" for name in names[:_SHOWN]]
    return told + ([f"and of {len(names) - _SHOWN} more tensors"] if len(names) > _SHOWN else [])
