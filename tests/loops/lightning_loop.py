"""The Trainer of Lightning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from loops.cells import (
    BATCH,
    LEVEL,
    RAMP,
    RANK,
    RECIPES,
    SHARDED,
    STEPS,
    STOP,
    WORLD,
    Cell,
    make_model,
    make_optimizer,
    rows,
)
from loops.plain_loop import shard
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

from td_plugin.integrations.lightning import TargetedDropoutCallback


class Stops(Callback):
    """Ends training where the first half ends."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.should_stop = True


class Classifier(LightningModule):
    """What a user writes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        loss: Tensor = self.model(**batch).loss
        return loss.float()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return make_optimizer(self.model)

    def configure_model(self) -> None:
        if SHARDED and self.device_mesh is not None:
            shard(self.model, mesh=self.device_mesh["data_parallel"])


def train(cell: Cell, directory: Path, *, stop: bool = False, resume: bool = False) -> nn.Module:
    """Train to the end, or to the stop, where a checkpoint is written; the module as it is left."""
    module = Classifier(make_model(seed=9 if resume else 0)).train()
    ours = TargetedDropoutCallback(RECIPES[cell.recipe], LEVEL, seed=7, recipe_steps=RAMP, module="model")
    saves = ModelCheckpoint(directory, filename="half", every_n_epochs=1, save_on_train_epoch_end=True)
    strategy = ModelParallelStrategy(data_parallel_size=WORLD, tensor_parallel_size=1) if SHARDED else "ddp"
    options: dict[str, Any] = {"strategy": strategy, "use_distributed_sampler": False} if WORLD > 1 else {}
    trainer = Trainer(
        accelerator="cpu",
        devices=WORLD,
        max_epochs=STEPS // STOP,
        accumulate_grad_batches=cell.accumulate,
        precision="bf16-mixed" if cell.bf16 else "32-true",
        callbacks=[ours, *([saves] if stop or resume else []), *([Stops()] if stop else [])],
        enable_checkpointing=stop or resume,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
        **options,
    )
    assert trainer.world_size == WORLD
    data = rows(cell)
    sampler = DistributedSampler(data, WORLD, RANK, shuffle=False)  # Lightning would shuffle
    trainer.fit(
        module,
        DataLoader(data, batch_size=BATCH, sampler=sampler if WORLD > 1 else None),
        ckpt_path=str(directory / "half.ckpt") if resume else None,
        weights_only=True if resume else None,
    )
    return module.model
