"""Checks that run in two processes under DeepSpeed on CPU, where it is installed: it is no dependency."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
from torch import Tensor, distributed, nn

import td_plugin as td

ROWS, STEPS = 8, 6
X = torch.randn(ROWS, 6, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(ROWS) % 3


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 3))


def _masked(recipe: td.Recipe) -> tuple[nn.Sequential, td.TargetedDropout]:
    model, sparsifier = _model(), td.TargetedDropout(recipe, 0.5, seed=3)
    sparsifier.prepare(model)
    return model, sparsifier


def _engine(model: nn.Module, stage: int) -> Any:
    import deepspeed

    options = {
        "train_micro_batch_size_per_gpu": ROWS // 2,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=options, dist_init_required=False)[0]


def _loss(output: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output, labels)


def _alone(recipe: td.Recipe) -> nn.Module:
    """The same run in one process, on all rows."""
    model = _model()
    sparsifier = td.TargetedDropout(recipe, 0.5, seed=3, agree_every=0)
    sparsifier.prepare(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(STEPS):
        sparsifier.step()
        _loss(model(X), LABELS).backward()
        optimizer.step()
        optimizer.zero_grad()
    sparsifier.squash_mask()
    return model


def zero_1_and_2_train_what_one_process_trains(_: Path) -> None:
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo")
    rank = distributed.get_rank()
    mine = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)
    for recipe in (td.recipes.targeted_weight(0.5), td.recipes.targeted_unit(0.5)):
        alone = _alone(recipe).state_dict()
        for stage in (1, 2):
            model, sparsifier = _masked(recipe)
            engine = _engine(model, stage)
            for _ in range(STEPS):
                sparsifier.step()
                engine.backward(_loss(engine(X[mine]), LABELS[mine]))
                engine.step()
            sparsifier.squash_mask()
            found = model.state_dict()
            assert list(found) == list(alone)
            for name, tensor in alone.items():
                assert torch.allclose(tensor, found[name], atol=1e-5), (stage, name)
                assert torch.equal(tensor == 0, found[name] == 0), (stage, name)


def zero_3_is_refused_before_and_after_prepare(_: Path) -> None:
    model, sparsifier = _masked(td.recipes.targeted_weight())
    _engine(model, 3)
    for what in (sparsifier.step, lambda: td.TargetedDropout(td.recipes.magnitude(), 0.5).prepare(_taken())):
        try:
            what()
        except td.TdError as error:
            assert "ZeRO-3" in str(error), error
        else:
            raise AssertionError("ZeRO-3 was not refused")


def _taken() -> nn.Module:
    model = _model()
    _engine(model, 3)
    return model
