"""Which units of which groups go, and which entries of which tensors that are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import Tensor, nn

from td_plugin.cutting import alignment, entries_kept
from td_plugin.units import Slice, UnitGroup
from td_plugin.widths import Rounding, rounded_width


def zero_units(model: nn.Module, group: UnitGroup) -> Tensor:
    """``[units]`` bool, on the CPU: every ranked slice of the unit is exactly zero, so `shrink` can remove it."""
    silent = torch.ones(group.units, dtype=torch.bool)
    for part in group.ranked:
        tensor = tensor_of(model, part).detach().movedim(part.dim, 0)
        entries = (tensor.reshape(tensor.shape[0], -1) != 0).any(dim=1).cpu()
        owners = part.units(len(entries))
        silent[owners[entries & (owners >= 0)]] = False
    return silent


def kept_units(model: nn.Module, group: UnitGroup, zero: Tensor, round_to: Rounding, floor: int) -> Tensor:
    """Indices of the units to keep, ascending: all others are zero; the first zero ones fill up to the width.

    Args:
        model: the one `group` belongs to.
        group: whose units these are.
        zero: ``[units]`` bool, from `zero_units`.
        round_to: as for `shrink`.
        floor: how many stay at least, zero or not.
    """
    needed = min(max(floor, group.units - int(zero.sum())), group.units)
    width, multiple = rounded_width(group.kind, needed, group.units, round_to), alignment(model, group)
    width = min(-(-width // multiple) * multiple, group.units)
    return zero.to(torch.uint8).argsort(stable=True)[:width].sort().values


@dataclass(frozen=True)
class Removal:
    """What goes.

    Attributes:
        kept: group -> indices of the units that stay, ascending.
        zeros: how many silent units were found.
    """

    kept: Mapping[UnitGroup, Tensor]
    zeros: int

    @property
    def removed(self) -> int:
        """How many units go."""
        return sum(group.units - len(keep) for group, keep in self.kept.items())

    @property
    def touched(self) -> Iterator[tuple[UnitGroup, Tensor]]:
        """The groups that lose units, with those that stay."""
        return ((group, keep) for group, keep in self.kept.items() if len(keep) < group.units)


def plan(model: nn.Module, groups: tuple[UnitGroup, ...], round_to: Rounding, floors: Mapping[str, int]) -> Removal:
    """Keep what is not zero, and what rounding and floors ask for."""
    zero = {group: zero_units(model, group) for group in groups}
    kept = {group: kept_units(model, group, zero[group], round_to, floors.get(group.kind, 1)) for group in groups}
    return Removal(kept, sum(int(units.sum()) for units in zero.values()))


def gone_entries(model: nn.Module, removal: Removal) -> dict[str, dict[int, Tensor]]:
    """Fully qualified tensor name -> dimension -> ``[size]`` bool, true for the entries of units that go."""
    gone: dict[str, dict[int, Tensor]] = {}
    for group, keep in removal.touched:
        if group.kind == "layers":  # they leave as modules
            continue
        for part in group.slices:
            size = tensor_of(model, part).shape[part.dim]
            before = gone.setdefault(part.fqn, {}).get(part.dim, torch.zeros(size, dtype=torch.bool))
            gone[part.fqn][part.dim] = before | ~entries_kept(group, keep, part, size)
    return gone


def tensor_of(model: nn.Module, part: Slice) -> Tensor:
    """The tensor that `part` is a slice of."""
    found: Tensor = attrgetter(part.fqn)(model)
    return found
