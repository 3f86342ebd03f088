"""The rows of `methods.py`: every method is one expression, at its defaults; and what is not a recipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from methods_tasks import NETWORKS, UNITS, WEIGHTS, Images, Settings, accuracy, fit
from torch import nn

import td_plugin as td
from td_plugin import gates, recipes
from td_plugin.export import channel_prune, from_scratch, shrink
from td_plugin.granularity import Units
from td_plugin.penalties import L1, GroupL1

UNIT = Units(members="producers")
Result = dict[str, float]


@dataclass(frozen=True)
class Row:
    """One method.

    Attributes:
        make: the recipe; None for what is not a recipe: `other` runs it.
        levels: shares removed it is run at.
        networks: it applies to.
        other: trains and judges by itself.
    """

    make: Callable[[], td.Recipe] | None
    levels: tuple[float, ...] = WEIGHTS
    networks: tuple[str, ...] = tuple(NETWORKS)
    other: Callable[[str, Images, Settings, float, int], Result] | None = None

    @property
    def units(self) -> bool:
        """Whether whole units are removed."""
        return self.levels is UNITS


def _seeded(network: str, images: Images, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return NETWORKS[network](images)


def by_recipe(
    make: Callable[[], td.Recipe], network: str, images: Images, settings: Settings, level: float, seed: int
) -> Result:
    """Train with the recipe, squash, judge."""
    model = _seeded(network, images, seed)
    sparsifier = td.TargetedDropout(make(), level, seed=seed)
    sparsifier.prepare(model)

    def before(step: int) -> None:
        sparsifier.set_progress(step / (settings.ramp * settings.steps))
        sparsifier.step()

    fit(model, images, settings, seed, before)
    sparsifier.evaluate_at_target()
    sparsity = sparsifier.report().sparsity
    sparsifier.squash_mask()
    return {"accuracy": accuracy(model, images), "sparsity": sparsity}


def dense(network: str, images: Images, settings: Settings, level: float, seed: int) -> Result:
    """No pruning at all."""
    model = _seeded(network, images, seed)
    fit(model, images, settings, seed, lambda step: None)
    return {"accuracy": accuracy(model, images), "sparsity": 0.0}


def by_lasso(network: str, images: Images, settings: Settings, level: float, seed: int) -> Result:
    """Dense training, then channel pruning on training rows; no training afterwards."""
    model = _seeded(network, images, seed)
    fit(model, images, settings, seed, lambda step: None)
    rows = [images.train[index : index + 256] for index in range(0, len(images.train), 256)]
    small = channel_prune(model, rows, level, samples=5000, seed=seed, round_to=1)
    return {"accuracy": accuracy(small, images), "sparsity": level}


def scratch(network: str, images: Images, settings: Settings, level: float, seed: int) -> Result:
    """The architecture that unit pruning leaves, with fresh weights, trained on the same budget."""
    model = _seeded(network, images, seed)
    sparsifier = td.TargetedDropout(recipes.magnitude(UNIT), level)
    sparsifier.prepare(model)
    sparsifier.squash_mask()
    small = from_scratch(shrink(model, round_to=1), seed)
    fit(small, images, settings, seed, lambda step: None)
    return {"accuracy": accuracy(small, images), "sparsity": level}


_FIRST = ("LeNet-300-100",)  # the inputs of LeNet-5's first filters are no multiple of 4

ROWS: dict[str, Row] = {
    "none": Row(None, (0.0,), other=dense),
    # single weights
    "magnitude": Row(recipes.magnitude),
    "targeted_weight": Row(recipes.targeted_weight),
    "ramping_targeted_weight": Row(recipes.ramping_targeted_weight),
    "delayed_targeted_weight": Row(recipes.delayed_targeted_weight),
    "gradual_magnitude": Row(recipes.gradual_magnitude),
    "iterative_magnitude": Row(recipes.iterative_magnitude),
    "network_surgery": Row(recipes.network_surgery),
    "dropconnect": Row(recipes.dropconnect),
    "L1": Row(lambda: replace(recipes.magnitude(), penalty=L1(), name="L1")),
    "hard_concrete": Row(gates.hard_concrete),
    "variational": Row(gates.variational),
    "smallify": Row(gates.smallify),
    "fisher": Row(recipes.fisher),
    "taylor": Row(recipes.taylor),
    "movement": Row(recipes.movement),
    "ard": Row(recipes.ard),
    "random_weight": Row(recipes.random_weight),
    "random before training": Row(lambda: recipes.random_weight(1.0)),
    # patterns of weights; γ of the first two is their own
    "n_m 2:4": Row(recipes.n_m, (0.5,), _FIRST),
    "n_m 1:4": Row(lambda: recipes.n_m(1, 4), (0.75,), _FIRST),
    "xtreme": Row(recipes.xtreme, (0.95,)),
    "block 4x4": Row(recipes.block),
    # units
    "magnitude, units": Row(lambda: recipes.magnitude(UNIT), UNITS),
    "targeted_unit": Row(recipes.targeted_unit, UNITS),
    "ramping_targeted_unit": Row(recipes.ramping_targeted_unit, UNITS),
    "gradual_magnitude, units": Row(lambda: recipes.gradual_magnitude(UNIT), UNITS),
    "unit_dropout": Row(recipes.unit_dropout, UNITS),
    "group L1": Row(lambda: replace(recipes.magnitude(UNIT), penalty=GroupL1(), name="group L1"), UNITS),
    "hard_concrete, units": Row(lambda: gates.hard_concrete(UNIT), UNITS),
    "variational, units": Row(lambda: gates.variational(UNIT), UNITS),
    "smallify, units": Row(lambda: gates.smallify(UNIT), UNITS),
    "fisher, units": Row(lambda: recipes.fisher(UNIT), UNITS),
    "taylor, units": Row(lambda: recipes.taylor(UNIT), UNITS),
    "channel_prune": Row(None, UNITS, other=by_lasso),
    "random_unit": Row(recipes.random_unit, UNITS),
    "random units before training": Row(lambda: recipes.random_unit(1.0), UNITS),
    "from scratch": Row(None, UNITS, other=scratch),
}


def run(name: str, network: str, images: Images, settings: Settings, level: float, seed: int) -> Result:
    """One model: trained, pruned and judged."""
    row = ROWS[name]
    if row.other is not None:
        return row.other(network, images, settings, level, seed)
    if row.make is None:
        raise ValueError(f"{name} is neither a recipe nor anything else")
    return by_recipe(row.make, network, images, settings, level, seed)
