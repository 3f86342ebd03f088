"""What all loops of the matrix share: model, data, optimizer, recipes. No loop adds anything to it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

import td_plugin as td

STEPS, STOP, BATCH, LEVEL, RAMP = 6, 3, 2, 0.5, 5
"""Optimizer steps of the run and of its first half, which is one epoch; rows of a micro-batch; γ; steps of the ramp."""

WORLD, RANK = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
"""Read once: Lightning takes them out of the environment when a fit ends."""

SHARDED = os.environ.get("LOOPS_SHARDED") == "1"
"""FSDP2 in place of DistributedDataParallel."""

RECIPES = {
    "weight": td.recipes.targeted_weight(0.5),
    "unit": td.recipes.targeted_unit(0.5),
    "ramping": td.recipes.ramping_targeted_unit(0.9),
}


@dataclass(frozen=True)
class Cell:
    """One row of the matrix, for a loop and a number of processes."""

    recipe: str
    precision: str
    accumulate: int

    @property
    def name(self) -> str:
        return f"{self.recipe}-{self.precision}-{self.accumulate}"

    @property
    def bf16(self) -> bool:
        return self.precision == "bf16"


CELLS = [Cell(*row) for row in product(RECIPES, ("fp32", "bf16"), (1, 3))]


def make_model(seed: int) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24,
        max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    # The Trainer then divides the loss by the micro-batches of a step, as the other loops do.
    model.accepts_loss_kwargs = False
    return model


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.01)


def rows(cell: Cell) -> list[dict[str, Tensor]]:
    """The data of one epoch, which is `STOP` optimizer steps."""
    ids = torch.randint(1, 50, (STOP * cell.accumulate * BATCH * WORLD, 6), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": x, "labels": (x[0] > 25).long()} for x in ids]


def make_sparsifier(cell: Cell) -> td.TargetedDropout:
    return td.TargetedDropout(RECIPES[cell.recipe], LEVEL, seed=7)
