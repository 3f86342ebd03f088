"""What a ramp needs to know of a run of the Trainer."""

from __future__ import annotations

import math
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_utils import has_length


def steps_of_epoch(args: TrainingArguments, batches: Any) -> int | None:
    """Optimizer steps of an epoch as the Trainer counts them; None for data without a length."""
    if batches is None or not has_length(batches):
        return None
    return max(math.ceil(len(batches) / args.gradient_accumulation_steps), 1)
