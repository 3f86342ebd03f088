"""The ramp of a run of the Trainer."""

from __future__ import annotations

import math
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_utils import has_length

from td_plugin.errors import TdError
from td_plugin.ramp import Ramp


def ramp_of(length: float | None, ramp: Ramp | None) -> Ramp:
    """The ramp that the callback's two arguments say.

    Raises:
        TdError: both are given, or `length` is neither a number of steps nor a share in (0, 1].
    """
    if ramp is not None and length is not None:
        raise TdError("both recipe_steps and ramp are given", got=(length, ramp), fix="leave recipe_steps out")
    if length is None:
        return ramp or Ramp()
    if isinstance(length, bool) or length <= 0 or (isinstance(length, float) and length > 1):
        raise TdError(
            "recipe_steps must be a number of steps (int) or a share of the run in (0, 1]",
            got=length,
            fix="None ramps over the whole run",
        )
    return Ramp(end=length, unit="share" if isinstance(length, float) else "steps")


def steps_of_epoch(args: TrainingArguments, batches: Any) -> int | None:
    """Optimizer steps of an epoch as the Trainer counts them; None for data without a length."""
    if batches is None or not has_length(batches):
        return None
    return max(math.ceil(len(batches) / args.gradient_accumulation_steps), 1)
