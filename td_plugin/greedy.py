"""Greedy removal of units by loss increase per cost, with what Fisher pruning has gathered in training.

Theis et al. 2018, arXiv 1801.05787, section 2.3: among all units of all layers, remove the one with the least
``ΔL / ΔC``, L the loss and C the cost of the model; the costs of the others follow, since a layer costs less when its
neighbours are narrower. C is counted (FLOPs, parameters) or measured (milliseconds).

sparsifier = TargetedDropout(recipes.fisher(Units(members="producers"))); ...; train
found = cheapest(sparsifier, structure, Budget(0.5, of="flops"))    # structure: survey(model, example_inputs)
print(found); aim(sparsifier, found)                                 # from here on the groups' γ are these
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

import torch
from torch import Tensor

from td_plugin.budget import Budget, summary
from td_plugin.costs import Exact, Kept, parameter_costs, work_costs
from td_plugin.errors import TdError
from td_plugin.evidence import evidence_of
from td_plugin.sparsifier import TargetedDropout
from td_plugin.units import Structure, UnitGroup
from td_plugin.widths import Widths, possible_widths


class Price(Protocol):
    """What a model costs: `td_plugin.costs.Costs`, or `Milliseconds`."""

    def total(self, kept: Mapping[str, Kept] | None = None, group: str | None = None) -> Exact:
        """What is left when each group keeps `kept[name]`; of all of it, or of what `group` has a part in."""
        ...

    def unequal(self, group: str) -> bool:
        """Whether it matters which units of `group` stay, and not only how many."""
        ...


@dataclass(frozen=True)
class Milliseconds:
    """Measured time: so much per unit of each group, as far as units can be removed at all.

    Attributes:
        per_unit: milliseconds by the group's name; `td_plugin.export.unit_time.milliseconds_per_unit` measures them.
        units: how many units each group has.
    """

    per_unit: Mapping[str, float]
    units: Mapping[str, int]

    def total(self, kept: Mapping[str, Kept] | None = None, group: str | None = None) -> Fraction:
        """Σ over groups of the time of the units that are left."""
        names = self.units if group is None else (group,)
        left = {name: (kept or {}).get(name, self.units[name]) for name in names}
        numbers = {name: len(value) if isinstance(value, Tensor) else value for name, value in left.items()}
        return sum((Fraction(self.per_unit.get(name, 0.0)) * number for name, number in numbers.items()), Fraction(0))

    def unequal(self, group: str) -> bool:
        """Never: only the number counts."""
        return False


@dataclass(frozen=True)
class _Stairs:
    """The widths of one group, from all its units down; `loss[i]` is what removing the `i` least important adds."""

    group: UnitGroup
    widths: tuple[int, ...]
    order: Tensor
    loss: Tensor
    named: bool

    def kept(self, step: int) -> Kept:
        width = self.widths[step]
        return self.order[self.group.units - width :] if self.named else width

    def rise(self, step: int) -> float:
        """What step `step` adds to the loss."""
        units = self.group.units
        return float(self.loss[units - self.widths[step]] - self.loss[units - self.widths[step - 1]])


def _stairs(group: UnitGroup, increase: Tensor, price: Price, budget: Budget) -> _Stairs:
    order = increase.argsort(stable=True)
    loss = torch.cat((increase.new_zeros(1), increase[order].cumsum(0)))
    widths = possible_widths(group, budget.floors.get(group.kind, 1), budget.round_to)
    return _Stairs(group, tuple(widths), order, loss, price.unequal(group.name))


def _remove(found: Sequence[_Stairs], price: Price, most: Fraction) -> dict[str, Kept]:
    """Steps down, the one of the least loss per cost first, until at most `most` is left or nothing can go."""
    steps = [0] * len(found)
    kept: dict[str, Kept] = {one.group.name: one.kept(0) for one in found}
    left = price.total(kept)

    def ratio(i: int) -> tuple[float, Exact]:
        name = found[i].group.name
        after = {**kept, name: found[i].kept(steps[i] + 1)}
        saved = price.total(kept, group=name) - price.total(after, group=name)
        return (found[i].rise(steps[i] + 1) / float(saved) if saved > 0 else float("inf")), saved

    heap = [(ratio(i)[0], i) for i, one in enumerate(found) if len(one.widths) > 1]
    heapq.heapify(heap)
    while heap and left > most:
        _, i = heapq.heappop(heap)
        now, saved = ratio(i)  # narrower neighbours leave less to save: it can only have risen
        if heap and now > heap[0][0]:
            heapq.heappush(heap, (now, i))
            continue
        if now == float("inf"):
            break
        steps[i] += 1
        kept[found[i].group.name], left = found[i].kept(steps[i]), left - saved
        if steps[i] + 1 < len(found[i].widths):
            heapq.heappush(heap, (ratio(i)[0], i))
    return kept


def cheapest(
    sparsifier: TargetedDropout, structure: Structure, budget: Budget, milliseconds: Mapping[str, float] | None = None
) -> Widths:
    """How many units each group keeps when those of the least loss increase per cost go first.

    Args:
        sparsifier: prepared with a recipe that gathers evidence of units, and trained; Fisher's scores are losses.
        structure: from `td_plugin.structure.survey` of its model; for FLOPs, of a traced forward.
        budget: ``of="flops"`` or ``of="parameters"``; at least γ of the whole model's goes.
        milliseconds: per unit by the group's name: then at least γ of the time of these units goes, whatever
            `budget.of` says.

    Raises:
        TdError: the recipe gathers no evidence, or no gradient has come; units that the structure does not know; a
            budget that cannot be met, FLOPs without a traced forward.
    """
    model, evidence = sparsifier.model, evidence_of(sparsifier)
    by_tensor = {part.fqn: group for group in structure.groups for part in group.ranked}
    if unknown := [name for name in evidence if name not in by_tensor] or model is None:
        raise TdError("these units are not in the structure", where=str(unknown), fix="survey the model it prepares")
    groups = {name: by_tensor[name] for name in evidence}
    if milliseconds is None and budget.of == "units":
        raise TdError("units have no cost of their own", where="of", got=budget.of, fix="of='flops'")
    price: Price
    if milliseconds is not None:
        price = Milliseconds(milliseconds, {group.name: group.units for group in groups.values()})
    elif budget.of == "flops":
        price = work_costs(structure.work, groups.values())
    else:
        price = parameter_costs(model, groups.values())
    increase = {name: sparsifier.recipe.criterion(found).double().cpu() for name, found in evidence.items()}
    found = [_stairs(group, increase[name], price, budget) for name, group in groups.items()]
    dense = price.total()
    most = dense * (1 - Fraction(budget.level))
    kept = _remove(found, price, most)
    if (left := price.total(kept)) > most:
        got = f"{budget.level:g} asked for; at most {float(1 - left / dense) if dense else 0.0:.4g} can go"
        raise TdError("so much cannot be removed", got=got, fix="ask for less, or lower the floors or the rounding")
    return summary(model, structure, list(groups.values()), kept)


def aim(sparsifier: TargetedDropout, widths: Widths) -> None:
    """Set γ of every group of `sparsifier` to what leaves it as wide as `widths` says; ramps go there from now on.

    Raises:
        TdError: a group of `widths` that the sparsifier does not have.
    """
    groups = {group["tensor_fqn"]: group for group in sparsifier.groups}
    for row in widths.rows:
        if row.tensor not in groups:
            raise TdError("the sparsifier has no such group", where=row.tensor, fix="pass widths found for its model")
        group, level = groups[row.tensor], row.sparsity_level
        group["sparsity_level"] = group["target_sparsity_level"] = level
        if group["eval_sparsity_level"] is not None:
            group["eval_sparsity_level"] = level
