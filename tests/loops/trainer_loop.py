"""The Trainer of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loops.cells import BATCH, LEVEL, RAMP, RECIPES, STEPS, STOP, WORLD, Cell, make_model, make_optimizer, rows
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from td_plugin.integrations.hf import TargetedDropoutCallback


class Stops(TrainerCallback):
    """Ends training where the first half ends."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        control.should_training_stop |= state.global_step == STOP


def train(cell: Cell, directory: Path, *, stop: bool = False, resume: bool = False) -> nn.Module:
    """Train to the end, or to the stop, where a checkpoint is written; the module as it is left."""
    model = make_model(seed=9 if resume else 0)
    callback = TargetedDropoutCallback(RECIPES[cell.recipe], LEVEL, seed=7, recipe_steps=RAMP)
    arguments = TrainingArguments(
        output_dir=str(directory),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=cell.accumulate,
        train_sampling_strategy="sequential",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        bf16=cell.bf16,
        save_strategy="steps" if stop else "no",
        save_steps=STOP,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    assert arguments.world_size == WORLD
    trainer = Trainer(
        model,
        arguments,
        train_dataset=rows(cell),
        callbacks=[callback, Stops()] if stop else [callback],
        optimizers=(make_optimizer(model), None),
    )
    trainer.train(resume_from_checkpoint=str(directory / f"checkpoint-{STOP}") if resume else None)
    return model
