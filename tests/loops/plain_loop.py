"""A loop written by hand: `training_step()`, safetensors and JSON; several processes by torch's own wrappers."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import torch
from loops.cells import BATCH, RAMP, STEPS, STOP, WORLD, Cell, make_model, make_optimizer, make_sparsifier, rows
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
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
        ours = {"sparsifier": self.sparsifier.state_dict(), "scheduler": self.scheduler.state_dict()}
        (directory / "td.json").write_text(json.dumps(ours), encoding="utf-8")

    def load(self, directory: Path) -> None:
        self.model.load_state_dict(load_file(directory / "model.safetensors"))
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in load_file(directory / "optimizer.safetensors").items():
            index, name = key.split(".", 1)
            moments.setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        ours = json.loads((directory / "td.json").read_text(encoding="utf-8"))
        self.sparsifier.load_state_dict(ours["sparsifier"])
        self.scheduler.load_state_dict(ours["scheduler"])


def train(cell: Cell, directory: Path, *, stop: bool = False, resume: bool = False) -> nn.Module:
    """Train to the end, or to the stop, where a checkpoint is written; the module as it is left."""
    model = make_model(seed=9 if resume else 0)
    sparsifier = make_sparsifier(cell)
    sparsifier.prepare(model)
    sparsifier.evaluate_at_target()
    wrapped = DistributedDataParallel(model) if WORLD > 1 else model
    optimizer = make_optimizer(wrapped)
    scheduler = td.TargetedDropoutScheduler(sparsifier, recipe_steps=RAMP)
    checkpoint = Checkpoint(model, optimizer, scheduler)
    if resume:
        checkpoint.load(directory)
    data = rows(cell)
    sampler = DistributedSampler(data, shuffle=False) if WORLD > 1 else None
    loader = DataLoader(data, batch_size=BATCH, sampler=sampler)
    model.train()
    while sparsifier.step_count < (STOP if stop else STEPS):
        for batch in loader:
            with sparsifier.training_step(cell.accumulate) as micro:
                silent = nullcontext() if micro.last or WORLD == 1 else wrapped.no_sync()
                with silent:
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
