"""The one table of recipes and models that the contract matrix runs through; a new recipe or model is one row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2ForSequenceClassification

import td_plugin as td
from td_plugin.criteria import magnitude, random
from td_plugin.granularity import NM, Block, OutputRow, Units, WholeTensor
from td_plugin.rates import Global
from td_plugin.schedules import Cubic

# Configurations of three-layer transformers whose widths are no multiples of anything convenient.
TEXT = {"vocab_size": 40, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 30}
DISTIL = {"vocab_size": 40, "dim": 24, "n_layers": 3, "n_heads": 4, "hidden_dim": 30}
IMAGE = {"image_size": 8, "patch_size": 4, "num_channels": 1}
IMAGE |= {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 30}

RECIPES: dict[str, td.Recipe] = {
    "targeted_weight": td.recipes.targeted_weight(0.5),
    "ramping_targeted_weight": td.recipes.ramping_targeted_weight(0.9),
    "targeted_unit": td.recipes.targeted_unit(0.5),
    "ramping_targeted_unit": td.recipes.ramping_targeted_unit(0.9),
    "delayed_targeted_weight": td.recipes.delayed_targeted_weight(0.3),
    "delayed_targeted_unit": td.recipes.delayed_targeted_unit(0.3),
    "random_weight": td.recipes.random_weight(0.5),
    "random_unit": td.recipes.random_unit(0.5),
    "xtreme": td.recipes.xtreme(3, 0.9),
    "dropconnect": td.recipes.dropconnect(0.3),
    "unit_dropout": td.recipes.unit_dropout(0.3),
    "magnitude": td.recipes.magnitude(),
    "gradual_magnitude": td.recipes.gradual_magnitude(),
    "gradual_magnitude, global": td.recipes.gradual_magnitude(rates=Global(0.1)),
    "iterative_magnitude": td.recipes.iterative_magnitude(2, 0.2, 0.8),
    "iterative_magnitude, quality": td.recipes.iterative_magnitude(2, 0.2, 0.8, quality=0.7),
    "network_surgery": td.recipes.network_surgery(),
    "n_m": td.recipes.n_m(1, 2),
    "block": td.recipes.block(2, 2),
    "blocks of two tensors, random, with memory": td.Recipe(random, Block(3, 1), 0.5, regrowth=0.5, rates=Global()),
    "ard": td.recipes.ard(0.5),
    "fisher": td.recipes.fisher(),
    "fisher of units": td.recipes.fisher(Units(members="producers"), 0.8),
    "taylor of units": td.recipes.taylor(Units(members="producers")),
    "movement": td.recipes.movement(rates=Global(0.1)),
    "whole tensor, cubic": td.Recipe(magnitude, WholeTensor(), 0.5, Cubic(), name="whole tensor"),
    "hard_concrete": td.gates.hard_concrete(),
    "hard_concrete, units": td.gates.hard_concrete(Units(), strength=1e-3),
    "variational": td.gates.variational(),
    "variational, units": td.gates.variational(Units(), log_variance=-4.0),
    "smallify": td.gates.smallify(OutputRow()),
    "smallify, units": td.gates.smallify(Units(members="producers"), learning_rate=0.1),
    "group L1, then pruned": replace(td.recipes.targeted_unit(0.5), penalty=td.penalties.GroupL1(0.01)),
    "units, drawn per weight": td.recipes.targeted_unit(0.5, members="all", draw="weight"),
}


@dataclass(frozen=True)
class ModelCase:
    """A tiny model without dropout of its own, inputs of a given batch size, and its logits."""

    build: Callable[[], nn.Module]
    inputs: Callable[[int], Tensor]
    logits: Callable[[nn.Module, Tensor], Tensor]
    units: bool = True  # whether unit recipes apply
    even: bool = True  # whether the inputs of every tensor can be divided by two


def _plain(model: nn.Module, batch: Tensor) -> Tensor:
    out: Tensor = model(batch)
    return out


def _hugging(model: nn.Module, batch: Tensor) -> Tensor:
    out: Tensor = model(batch).logits
    return out


def _floats(*shape: int) -> Callable[[int], Tensor]:
    return lambda n: torch.randn(n, *shape, generator=torch.Generator().manual_seed(n))


def _tokens(n: int) -> Tensor:
    return torch.randint(1, 20, (n, 6), generator=torch.Generator().manual_seed(n))


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 3))


def _conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6), nn.GELU(),
        nn.Flatten(), nn.Linear(6 * 9, 8), nn.ReLU(), nn.Linear(8, 3),
    )  # fmt: skip


def _bert() -> nn.Module:
    config = BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24,
        max_position_embeddings=8, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=3,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def _gpt2() -> nn.Module:
    config = GPT2Config(
        vocab_size=20, n_positions=8, n_embd=16, n_layer=1, n_head=2, num_labels=3, pad_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return GPT2ForSequenceClassification(config)


MODELS: dict[str, ModelCase] = {
    "mlp": ModelCase(_mlp, _floats(8), _plain),
    "conv": ModelCase(_conv, _floats(3, 5, 5), _plain, even=False),
    "bert": ModelCase(_bert, _tokens, _hugging),
    "gpt2": ModelCase(_gpt2, _tokens, _hugging, units=False),
}

MATRIX = [
    (recipe, model)
    for recipe, value in RECIPES.items()
    for model, case in MODELS.items()
    if (case.units or not value.granularity.kinds) and (case.even or type(value.granularity) is not NM)
]


def build(name: str, seed: int = 0) -> nn.Module:
    """The model of a case, the same weights for the same seed, in training mode."""
    torch.manual_seed(seed)
    return MODELS[name].build().train()
