"""A loop written by hand: `training_step()`, safetensors and JSON; several processes by torch's own wrappers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from loops.cells import (
    BATCH,
    RAMP,
    SHARDED,
    STEPS,
    STOP,
    WORLD,
    Cell,
    make_model,
    make_optimizer,
    make_sparsifier,
    rows,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

import td_plugin as td


class Checkpoint:
    """Weights and moments in safetensors, the sparsifier's state in JSON."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: td.TargetedDropoutScheduler
    ) -> None:
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler
        self.sparsifier = scheduler.sparsifier

    def save(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        save_file(self.model.state_dict(), directory / "model.safetensors")
        moments = self.optimizer.state_dict()["state"]
        named = {f"{index}.{name}": value for index, values in moments.items() for name, value in values.items()}
        save_file(named, directory / "optimizer.safetensors")
        self.save_ours(directory)

    def save_ours(self, directory: Path) -> None:
        ours = {"sparsifier": self.sparsifier.state_dict(), "scheduler": self.scheduler.state_dict()}
        (directory / "td.json").write_text(json.dumps(ours), encoding="utf-8")

    def load(self, directory: Path) -> None:
        self.model.load_state_dict(load_file(directory / "model.safetensors"))
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in load_file(directory / "optimizer.safetensors").items():
            index, name = key.split(".", 1)
            moments.setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        self.load_ours(directory)

    def load_ours(self, directory: Path) -> None:
        ours = json.loads((directory / "td.json").read_text(encoding="utf-8"))
        self.sparsifier.load_state_dict(ours["sparsifier"])
        self.scheduler.load_state_dict(ours["scheduler"])


class ShardedCheckpoint(Checkpoint):
    """Every process writes its shards."""

    def save(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        model, optimizer = get_state_dict(self.model, self.optimizer)
        dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=directory)
        self.save_ours(directory)

    def load(self, directory: Path) -> None:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        dcp.load({"model": model, "optimizer": optimizer}, checkpoint_id=directory)
        set_state_dict(self.model, self.optimizer, model_state_dict=model, optim_state_dict=optimizer)
        self.load_ours(directory)


def wrap(model: nn.Module) -> nn.Module:
    """Over the processes, as torch does it."""
    if WORLD == 1:
        return model
    if not SHARDED:
        return DistributedDataParallel(model)
    return shard(model)


def shard(model: nn.Module, **where: Any) -> nn.Module:
    """Each layer, and what is left: FSDP2."""
    for layer in model.bert.encoder.layer:
        fully_shard(layer, **where)
    return fully_shard(model, **where)


@contextmanager
def synced(wrapped: nn.Module, last: bool) -> Iterator[None]:
    """Processes exchange gradients in the last backward of a step only."""
    if SHARDED:
        wrapped.set_requires_gradient_sync(last)
    with nullcontext() if last or WORLD == 1 or SHARDED else wrapped.no_sync():
        yield


def train(cell: Cell, directory: Path, *, stop: bool = False, resume: bool = False) -> nn.Module:
    """Train to the end, or to the stop, where a checkpoint is written; the module as it is left."""
    model = make_model(seed=9 if resume else 0)
    wrapped = wrap(model)
    sparsifier = make_sparsifier(cell)
    sparsifier.prepare(model)
    sparsifier.evaluate_at_target()
    optimizer = make_optimizer(wrapped)
    scheduler = td.TargetedDropoutScheduler(sparsifier, recipe_steps=RAMP)
    checkpoint = (ShardedCheckpoint if SHARDED else Checkpoint)(model, optimizer, scheduler)
    if resume:
        checkpoint.load(directory)
    data = rows(cell)
    sampler = DistributedSampler(data, shuffle=False) if WORLD > 1 else None
    loader = DataLoader(data, batch_size=BATCH, sampler=sampler)
    model.train()
    while sparsifier.step_count < (STOP if stop else STEPS):
        for batch in loader:
            with sparsifier.training_step(cell.accumulate) as micro, synced(wrapped, micro.last):
                with torch.autocast("cpu", torch.bfloat16, enabled=cell.bf16):
                    loss = wrapped(**batch).loss
                (loss.float() / cell.accumulate).backward()
            if micro.last:
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
    if stop:
        checkpoint.save(directory)
        return model
    sparsifier.set_progress(1.0)
    sparsifier.squash_mask()
    return model
