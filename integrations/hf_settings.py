"""What a run was set up with, kept in its checkpoints, so that resuming with something else is said.

Like `td_plugin.integrations.hf_state` it lies in `trainer_state.json` under a name that is no callback's. Nothing is
read from it but the warning: what the callback is given now is what holds.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerState, TrainingArguments

from td_plugin.contract import Recipe
from td_plugin.errors import TdError
from td_plugin.integrations.settings import changes

OnTrial = Callable[[dict[str, Any]], tuple[Recipe, float | None]]
"""``values of a trial of hyperparameter_search, by name -> recipe and γ``."""

_NAME = "td_plugin_settings"


def autocast(args: TrainingArguments) -> torch.dtype | None:
    """The type that the Trainer has the model compute in; None: that of its weights."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None


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
    changed = changes(saved, settings)
    if changed:
        warnings.warn(
            f"resumed at step {state.global_step} with other settings than the checkpoint was trained with: "
            f"{'; '.join(changed)}. The new ones hold from here on, so the run is not the one that was interrupted",
            stacklevel=4,
        )
