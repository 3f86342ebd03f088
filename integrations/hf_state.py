"""What a sparsifier remembers beside weights and step, carried in the Trainer's own `trainer_state.json`.

Most recipes remember nothing, and then nothing is written. The Trainer keeps states of callbacks by name; this one has
a name that is no callback's, so that `restore_callback_states_from_checkpoint` leaves it to us.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from td_plugin.sparsifier import TargetedDropout

_NAME = "td_plugin"
_TARGETS = ("target_sparsity_level", "target_drop_rate")


def _states(state: TrainerState) -> dict[str, Any]:
    return state.stateful_callbacks  # type: ignore[return-value]  # a dict, whatever its annotation says


def keep(args: TrainingArguments, state: TrainerState, control: TrainerControl, sparsifier: TargetedDropout) -> None:
    """Put what `sparsifier` remembers where the next checkpoint takes it along, if one may be written now."""
    unannounced = args.save_strategy == "best" or args.enable_jit_checkpoint
    if (control.should_save or unannounced) and sparsifier.remembers:
        _states(state)[_NAME] = sparsifier.state_dict()


def forget(state: TrainerState) -> None:
    """Take it out again: it has been written."""
    _states(state).pop(_NAME, None)


def resume(state: TrainerState, sparsifier: TargetedDropout) -> None:
    """Go on from what the checkpoint remembers, where it does; γ and α stay what they are asked for now.

    Raises:
        TdError: it is of another set-up.
    """
    saved = _states(state).pop(_NAME, None)
    held = saved is not None and any("held" in group for group in saved["groups"])
    if saved is not None and (sparsifier.remembers or held):
        targets = [{key: group[key] for key in _TARGETS} for group in sparsifier.groups]
        sparsifier.load_state_dict(saved)
        for group, target in zip(sparsifier.groups, targets, strict=True):
            group.update(target)


def load_best(args: TrainingArguments, state: TrainerState, sparsifier: TargetedDropout) -> None:
    """`resume` from the best checkpoint, whose weights the Trainer has loaded."""
    best = state.best_model_checkpoint
    path = None if best is None else Path(best, TRAINER_STATE_NAME)
    if args.load_best_model_at_end and path is not None and path.is_file():
        sparsifier.release()  # the mask may have been held later than that
        resume(TrainerState.load_from_json(str(path)), sparsifier)
