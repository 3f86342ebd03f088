"""A loop under accelerate: `prepare`, `accumulate`, `save_state`."""

from __future__ import annotations

from pathlib import Path

from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from loops.cells import BATCH, RAMP, STEPS, STOP, WORLD, Cell, make_model, make_optimizer, make_sparsifier, rows
from torch import nn
from torch.utils.data import DataLoader

import td_plugin as td


def train(cell: Cell, directory: Path, *, stop: bool = False, resume: bool = False) -> nn.Module:
    """Train to the end, or to the stop, where a checkpoint is written; the module as it is left."""
    AcceleratorState._reset_state()  # one process runs several cells, of both precisions
    GradientState._reset_state()
    accelerator = Accelerator(
        cpu=True, mixed_precision="bf16" if cell.bf16 else "no", gradient_accumulation_steps=cell.accumulate
    )
    assert accelerator.num_processes == WORLD
    model = make_model(seed=9 if resume else 0)
    sparsifier = make_sparsifier(cell)
    if cell.accumulate == 1:  # before accelerate or after it
        sparsifier.prepare(model)
    wrapped, optimizer, loader = accelerator.prepare(
        model, make_optimizer(model), DataLoader(rows(cell), batch_size=BATCH)
    )
    if cell.accumulate > 1:
        sparsifier.prepare(accelerator.unwrap_model(wrapped))
    sparsifier.evaluate_at_target()
    scheduler = td.TargetedDropoutScheduler(sparsifier, recipe_steps=RAMP)
    accelerator.register_for_checkpointing(sparsifier, scheduler)
    if resume:
        accelerator.load_state(str(directory))
    model.train()
    while sparsifier.step_count < (STOP if stop else STEPS):
        for batch in loader:
            with accelerator.accumulate(wrapped), sparsifier.training_step(last=accelerator.sync_gradients):
                accelerator.backward(wrapped(**batch).loss)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                scheduler.step()
    if stop:
        accelerator.save_state(str(directory))
        return model
    sparsifier.set_progress(1.0)
    sparsifier.squash_mask()
    return model
