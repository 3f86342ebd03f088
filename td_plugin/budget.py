"""How many units each group keeps: one rate for all, or a budget for the whole model.

structure = survey(model)
found = widths(model, structure, Budget(0.5, of="parameters"))
print(found)                                       # a table
sparsifier.prepare(model, config=found.config())   # training drops as many units as will go
"""

from __future__ import annotations

import difflib
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from td_plugin.allocation import Ladder, allocate, kept_after, ladders
from td_plugin.choices import mask_fault, parameter_of, units_of
from td_plugin.contract import Criterion, Evidence, Recipe, check_fraction
from td_plugin.costs import Costs, Kept, checked, parameter_costs, work_costs
from td_plugin.criteria import magnitude
from td_plugin.errors import TdError
from td_plugin.granularity import Units
from td_plugin.masks import count
from td_plugin.units import Kind, Structure, UnitGroup
from td_plugin.widths import Rounding, Row, Widths, possible_widths, rounded_width

Quantity = Literal["units", "parameters", "flops"]
PAPER = Units(members="producers")
"""Neurons, channels and heads, ranked as `td_plugin.recipes.targeted_unit` ranks them."""


@dataclass(frozen=True)
class Budget:
    """How much to remove.

    Attributes:
        level: γ in [0, 1), the share to remove.
        of: of what. ``"units"``: of the units of every group. ``"parameters"``, ``"flops"``: of those of the whole
            model, where the units of all groups compete (`td_plugin.allocation`); at least γ of it goes.
        floors: fewest units that a group keeps, by kind; 1 for kinds not named.
        round_to: widths are rounded up to multiples, as in `td_plugin.export.shrink`: one integer for all kinds but
            heads and layers, or one by kind; None is what onnxruntime gains from.
        overrides: for ``"units"``: regular expression -> γ of the groups whose whole name it matches, the first one
            that does; 0 leaves them alone.

    Raises:
        TdError: a fraction outside [0, 1), an unknown quantity or kind, a floor or multiple below 1, overrides of a
            budget for the whole model, an invalid regular expression.
    """

    level: float
    of: Quantity = "units"
    floors: Mapping[str, int] = field(default_factory=dict)
    round_to: Rounding = None
    overrides: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fraction(self.level, "level (γ)")
        if self.of not in get_args(Quantity):
            raise TdError("unknown quantity", where="of", got=self.of, fix=f"one of {get_args(Quantity)}")
        _check_by_kind(self.floors, "floors")
        _check_by_kind(self.round_to if isinstance(self.round_to, Mapping) else {}, "round_to")
        if isinstance(self.round_to, int) and self.round_to < 1:
            raise TdError("widths are rounded to a positive multiple", where="round_to", got=self.round_to)
        if self.overrides and self.of != "units":
            fix = "use of='units', or leave out the kind"
            raise TdError("a budget for the whole model has no rates of its own", where="overrides", fix=fix)
        for pattern, level in self.overrides.items():
            check_fraction(level, "level (γ)", where=pattern)
            try:
                re.compile(pattern)
            except re.error as error:
                raise TdError("not a regular expression", where="overrides", got=pattern, fix=str(error)) from error


def _check_by_kind(numbers: Mapping[str, int], where: str) -> None:
    for kind, number in numbers.items():
        if kind not in get_args(Kind):
            raise TdError("unknown kind of units", where=where, got=kind, fix=f"one of {get_args(Kind)}")
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise TdError("not a positive number", where=f"{where}[{kind!r}]", got=number, fix="give 1 or more")


def widths(
    model: nn.Module,
    structure: Structure,
    budget: Budget,
    *,
    criterion: Criterion = magnitude,
    granularity: Units = PAPER,
) -> Widths:
    """How many units each group keeps under `budget`. The model is only read.

    Args:
        model: the one that `structure` was found in.
        structure: from `td_plugin.structure.survey`; for FLOPs, of a traced forward.
        budget: how much to remove.
        criterion: importance of weights; a budget for the whole model compares units by it.
        granularity: which kinds of units take part, and whose weights rank them: give that of the recipe.

    Raises:
        TdError: no groups of these kinds, an override that matches none, a budget that cannot be met (the most that can
            be removed is named), FLOPs without a traced forward, weights with NaN or infinity.
    """
    chosen = (group for group in structure.groups if group.kind in granularity.kinds)
    groups = [group for group in chosen if not mask_fault(model, group)]
    if not groups:
        got = sorted({group.kind for group in structure.groups})
        raise TdError("no units of these kinds", where=str(granularity.kinds), got=got, fix="name other kinds")
    parameters, recipe = parameter_costs(model, groups), Recipe(criterion, granularity)
    work = work_costs(structure.work, groups) if structure.work or budget.of == "flops" else None
    costs = work if budget.of == "flops" and work is not None else parameters
    if budget.of == "units":
        kept = _by_rate(groups, budget)
        for group in groups:
            if parameters.unequal(group.name) or (work is not None and work.unequal(group.name)):
                order = _importance(model, group, recipe).argsort(stable=True)
                kept[group.name] = order[group.units - _number(kept[group.name]) :]
    else:
        importances = [_importance(model, group, recipe) for group in groups]
        possible = [possible_widths(group, budget.floors.get(group.kind, 1), budget.round_to) for group in groups]
        kept = _by_budget(ladders(groups, possible, importances, costs), costs, budget)
    return summary(model, structure, groups, kept)


def summary(model: nn.Module, structure: Structure, groups: Sequence[UnitGroup], kept: Mapping[str, Kept]) -> Widths:
    """`Widths` of a choice: what each of `groups` keeps, and what the whole model has before and after.

    Args:
        model: the one that `structure` was found in.
        structure: its groups are there.
        groups: those that take part.
        kept: by name, how many units stay, or which.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    tied = {key for key, holders in Counter(map(id, named.values())).items() if holders > 1}
    rows = tuple(Row(g.name, g.kind, _first_tensor(g, named, tied), g.units, _number(kept[g.name])) for g in groups)
    flops = _before_and_after(work_costs(structure.work, groups), kept) if structure.work else None
    return Widths(rows, _before_and_after(parameter_costs(model, groups), kept), flops)


def _number(kept: Kept) -> int:
    return len(kept) if isinstance(kept, Tensor) else kept


def _before_and_after(costs: Costs, kept: Mapping[str, Kept]) -> tuple[int, int]:
    return round(costs.total()), round(costs.total(kept))


def _by_rate(groups: Sequence[UnitGroup], budget: Budget) -> dict[str, Kept]:
    names = [group.name for group in groups]
    for pattern in budget.overrides:
        if not any(re.fullmatch(pattern, name) for name in names):
            nearest = difflib.get_close_matches(pattern, names, n=1, cutoff=0.0)
            raise TdError("an override matches no group", where="overrides", got=pattern, fix=f"nearest: {nearest}")
    kept: dict[str, Kept] = {}
    for group in groups:
        levels = (level for pattern, level in budget.overrides.items() if re.fullmatch(pattern, group.name))
        asked = group.units - count(next(levels, budget.level), group.units)
        least = min(group.units, max(asked, budget.floors.get(group.kind, 1)))
        kept[group.name] = rounded_width(group.kind, least, group.units, budget.round_to)
    return kept


def _by_budget(found: Sequence[Ladder], costs: Costs, budget: Budget) -> dict[str, Kept]:
    dense = costs.total()
    most = dense - math.ceil(budget.level * float(dense) - 1e-6)  # the slack keeps 0.3 of 10 at 3
    kept = kept_after(found, allocate(found, costs, Fraction(most)))
    left = costs.total(kept)
    if left > most:
        raise TdError(
            f"so many {budget.of} cannot be removed",
            got=f"{budget.level:g} asked for; at most {math.floor(float(1 - left / dense) * 1e4) / 1e4:g} can go",
            fix="ask for less, lower the floors or the rounding, or let other kinds of units take part",
        )
    return kept


@torch.no_grad()
def _importance(model: nn.Module, group: UnitGroup, recipe: Recipe) -> Tensor:
    """``[units]`` float32, on the CPU: what the recipe ranks the units by in training."""
    choice = units_of(model, recipe, group)
    found = [(part, parameter_of(model, part)) for part in choice.ranked + choice.evidence]
    dense = [(part, tensor.detach()) for part, tensor in found if tensor is not None]  # masked or not
    scores = [recipe.criterion(Evidence(tensor, part.fqn)) for part, tensor in dense]
    units = recipe.granularity.to_groups(scores, [part for part, _ in dense])[0].cpu()
    if not torch.isfinite(units).all():
        raise TdError("the weights hold NaN or infinity, so they cannot be ranked", where=group.name)
    return pad(units, (0, group.units - len(units)))


def _first_tensor(group: UnitGroup, holders: Mapping[str, nn.Parameter], tied: set[int]) -> str:
    """The first ranked tensor; one that a config may name, which is a matrix that is not tied, if there is any."""
    names = [part.fqn for part in group.ranked]
    return next((n for n in names if holders[n].dim() > 1 and id(holders[n]) not in tied), names[0])


def parameters_left(
    model: nn.Module,
    groups: Iterable[UnitGroup],
    widths: Mapping[str, int],
    kept: Mapping[str, Tensor] | None = None,
) -> int:
    """How many parameters `model` has after each group keeps `widths[group.name]` units, without building it.

    Exact where all units of a group have equally many entries, or where `kept` says which of them stay; else the mean
    over all choices is taken for every dimension, and the sum rounded. Tied parameters count once.

    Args:
        model: the one that `groups` were found in.
        groups: from `td_plugin.structure.survey`.
        widths: units to keep by the group's name; a group that is not named keeps all.
        kept: which units stay, by the group's name: ``[kept]`` int64, in place of `widths`.

    Raises:
        TdError: a width or unit that its group does not have, an unknown group, groups of another model.
    """
    groups = tuple(groups)
    return round(parameter_costs(model, groups).total(checked(groups, {**widths, **(kept or {})})))


def flops_left(structure: Structure, widths: Mapping[str, int], kept: Mapping[str, Tensor] | None = None) -> int:
    """FLOPs of one forward of the example inputs after each group keeps `widths[group.name]` units.

    Args:
        structure: from `td_plugin.structure.survey`, of a traced model.
        widths: units to keep by the group's name; a group that is not named keeps all.
        kept: which units stay, as for `parameters_left`.

    Raises:
        TdError: no traced forward, an unknown group, a width or unit that its group does not have.
    """
    kept_units = checked(structure.groups, {**widths, **(kept or {})})
    return round(work_costs(structure.work, structure.groups).total(kept_units))
