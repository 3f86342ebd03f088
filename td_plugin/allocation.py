"""Which units to remove so that the whole model meets a budget: all units compete by importance per cost.

Within a group the least important units go first, as targeted unit dropout ranks them. Between groups a unit's score is
the share it has in the squared importance of the units that are still left in its group (LAMP: Lee et al., arXiv
2010.07611), divided by what it costs in the dense model as a share of what a group of its kind costs on
average. So

* scales of weights, which differ from layer to layer for reasons of initialisation and normalisation, do not decide;
* no layer collapses: the fewer units are left, the more each of them is worth, and the last one has all there is;
* within a kind, the more a layer costs the more of it goes (removed importance per parameter or FLOP);
* kinds compete as equals: where all units are alike, a typical group of each kind loses the same share. Without the
  mean cost of the kind, the residual stream, which is in nearly every tensor, would go before all else.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from td_plugin.costs import Costs, Kept
from td_plugin.units import UnitGroup


@dataclass(frozen=True)
class Ladder:
    """The widths that one group can be given, from all its units down, and what each step costs in importance.

    Attributes:
        group: whose units.
        widths: descending, the first one is all units.
        order: ``[units]`` int64, the least important unit first.
        scores: ``[steps]`` float64, ascending: the score of the units that go in each step.
        named: whether the units that stay must be named to know the costs, or their number is enough.
    """

    group: UnitGroup
    widths: tuple[int, ...]
    order: Tensor
    scores: Tensor
    named: bool

    def kept(self, step: int) -> Kept:
        """What stays after `step` steps."""
        width = self.widths[step]
        return self.order[self.group.units - width :] if self.named else width


def ladders(
    groups: Sequence[UnitGroup], widths: Sequence[Sequence[int]], importances: Sequence[Tensor], costs: Costs
) -> list[Ladder]:
    """One ladder for each group.

    Args:
        groups: that compete.
        widths: those that each can be given, descending from all its units.
        importances: ``[units]`` each, non-negative, higher = keep.
        costs: parameters or FLOPs.
    """
    prices = [costs.of_units(group) for group in groups]
    by_kind: dict[str, list[float]] = defaultdict(list)
    for group, price in zip(groups, prices, strict=True):
        by_kind[group.kind].append(float(price.sum()))
    found = []
    for group, steps, importance, price in zip(groups, widths, importances, prices, strict=True):
        order = importance.argsort(stable=True)  # ties by index, as `bottom_k` has it
        scale = sum(by_kind[group.kind]) / len(by_kind[group.kind])
        scores = _scores(importance.double()[order].square(), price[order] / (scale or 1.0), steps)
        found.append(Ladder(group, tuple(steps), order, scores, costs.unequal(group.name)))
    return found


def _scores(squares: Tensor, prices: Tensor, widths: Sequence[int]) -> Tensor:
    """``[units], [units] -> [len(widths) - 1]``; both ascend by importance."""
    gone = len(squares) - torch.tensor(widths)
    left = torch.cat((squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)))[gone]
    spent = torch.cat((prices.new_zeros(1), prices.cumsum(0)))[gone]
    share = torch.where(left[:-1] > 0, (left[:-1] - left[1:]) / left[:-1], 0.0)
    price = spent.diff()
    scores = torch.where(price > 0, share / price, torch.inf)  # units that cost nothing stay
    return scores.cummax(0).values if len(scores) else scores  # a later step never goes before an earlier one


def allocate(found: Sequence[Ladder], costs: Costs, most: Fraction) -> dict[str, int]:
    """Steps for each group, by name, so that at most `most` is left; all steps where even those are not enough.

    As few of the lowest-scored steps as are needed; then steps that turn out not to be needed are taken back, the
    highest-scored first, so that no single step back is possible within the budget. O(n log n) in the units.
    """
    scores = torch.cat([ladder.scores for ladder in found])
    owner = torch.cat([torch.full((len(ladder.scores),), i) for i, ladder in enumerate(found)])
    owner = owner[scores.argsort(stable=True)]

    def after(count: int) -> dict[str, int]:
        steps = owner[:count].bincount(minlength=len(found)).tolist()
        return {ladder.group.name: step for ladder, step in zip(found, steps, strict=True)}

    low, high = 0, len(owner)
    while low < high:
        middle = (low + high) // 2
        if costs.total(kept_after(found, after(middle))) <= most:
            high = middle
        else:
            low = middle + 1
    return _take_back(found, costs, after(low), most)


def kept_after(found: Sequence[Ladder], steps: Mapping[str, int]) -> dict[str, Kept]:
    """What stays of each group, by name."""
    return {ladder.group.name: ladder.kept(steps[ladder.group.name]) for ladder in found}


def _take_back(found: Sequence[Ladder], costs: Costs, steps: dict[str, int], most: Fraction) -> dict[str, int]:
    kept = kept_after(found, steps)
    total = costs.total(kept)
    if total > most:
        return steps
    last = [(-float(x.scores[steps[x.group.name] - 1]), i) for i, x in enumerate(found) if steps[x.group.name]]
    heapq.heapify(last)
    while last:
        _, index = heapq.heappop(last)
        ladder, name = found[index], found[index].group.name
        trial = {**kept, name: ladder.kept(steps[name] - 1)}
        more = total + costs.total(trial, group=name) - costs.total(kept, group=name)
        if more > most:
            continue  # nor will it fit later: what else comes back only adds
        total, kept, steps = more, trial, {**steps, name: steps[name] - 1}
        if steps[name]:
            heapq.heappush(last, (-float(ladder.scores[steps[name] - 1]), index))
    return steps
