"""What a unit of each group costs in milliseconds, measured: the cost that `td_plugin.greedy.cheapest` divides by."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from statistics import median
from typing import Any

import torch
from torch import nn

from td_plugin.contract import Recipe
from td_plugin.criteria import magnitude
from td_plugin.errors import TdError
from td_plugin.export.shrink import shrink
from td_plugin.granularity import Units
from td_plugin.parametrization import bake
from td_plugin.sparsifier import TargetedDropout
from td_plugin.units import Structure


def milliseconds_per_unit(
    model: nn.Module, structure: Structure, example_inputs: Mapping[str, Any], *, rounds: int = 20, share: float = 0.5
) -> dict[str, float]:
    """The time that leaves with one unit of each group, by name: what a forward gains when `share` of a group is gone.

    Every group is narrowed alone, in a copy, and timed in turn with the dense model: each round runs all of them once,
    and the median difference counts. Where nothing is gained, a unit costs nothing, and `cheapest` leaves it.

    Args:
        model: masked or not; it is left as it is.
        structure: of `model`.
        example_inputs: as the model is called, of the size that will be served.
        rounds: forwards of every model.
        share: of the units that are removed to measure.

    Raises:
        TdError: no groups, `rounds` below 1.
    """
    if not structure.groups or rounds < 1:
        raise TdError("there is nothing to time", got=f"{len(structure.groups)} groups, {rounds} rounds")
    plain = copy.deepcopy(model)
    bake(plain)
    models, removed = {"": plain.eval()}, {}
    for group in structure.groups:
        small, gone = _without(plain, structure, group.name, share, example_inputs)
        if gone:
            models[group.name], removed[group.name] = small, gone
    seconds: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for turn in range(rounds + 2):
            for name, one in models.items():
                start = time.perf_counter()
                one(**example_inputs)
                if turn >= 2:  # the first ones warm up
                    seconds[name].append(time.perf_counter() - start)
    found = dict.fromkeys((group.name for group in structure.groups), 0.0)
    for name, gone in removed.items():
        gain = median(dense - small for dense, small in zip(seconds[""], seconds[name], strict=True))
        found[name] = max(gain * 1e3 / gone, 0.0)
    return found


def _without(
    model: nn.Module, structure: Structure, name: str, share: float, inputs: Mapping[str, Any]
) -> tuple[nn.Module, int]:
    """A copy of `model` with `share` of one group removed, and how many units that are."""
    (group,) = (group for group in structure.groups if group.name == name)
    gone = min(int(share * group.units), group.units - 1)
    if gone == 0:
        return model, 0
    twin = copy.deepcopy(model)
    recipe = Recipe(magnitude, Units((group.kind,), "producers"), 0.5, name="to be timed")
    sparsifier = TargetedDropout(recipe, (gone + 0.5) / group.units)
    sparsifier.prepare(twin, [{"tensor_fqn": group.ranked[0].fqn}], groups=[group])
    sparsifier.squash_mask()
    return shrink(twin, round_to=1, example_inputs=inputs, groups=[group]).eval(), gone
