"""Widths: those that suit the target runtime, and those chosen for the groups of a model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from td_plugin.report import table
from td_plugin.units import UnitGroup

Rounding = int | Mapping[str, int] | None
"""One multiple for all kinds but heads and layers, one for each kind named, or None for what the runtime gains from."""

_COUNTED = ("heads", "layers")  # every one is a gain, whatever the others number


def runtime_width(kind: str, keep: int, dense: int) -> int:
    """The width to build for `keep` units of `dense`, by what onnxruntime's kernels gain from on CPUs.

    Linear layers of 256 and more, and the residual stream they read: a multiple of 16, at least 64, and not a multiple
    of 1024 (rows 4 KiB apart alias in the cache). Convolutions of 32 channels and more: a multiple of 16, its block.
    Never more than `dense`.
    """
    width = keep
    if kind in ("neurons", "hidden") and dense >= 256:
        width = max(64, _ceil(keep, 16))
        width += 16 if width % 1024 == 0 else 0
    elif kind == "channels" and dense >= 32:
        width = _ceil(keep, 16)
    return min(width, dense)


def rounded_width(kind: str, keep: int, dense: int, round_to: Rounding) -> int:
    """The width to build for `keep` units of `dense`: `keep` rounded up, never more than `dense`.

    Args:
        kind: what the units are.
        keep: units that must stay.
        dense: units there are.
        round_to: an integer is the multiple of every kind but heads and layers; of a mapping, kinds it does not name
            are not rounded; None is `runtime_width`.
    """
    if round_to is None:
        return runtime_width(kind, keep, dense)
    if isinstance(round_to, Mapping):
        return min(_ceil(keep, round_to.get(kind, 1)), dense)
    return min(_ceil(keep, 1 if kind in _COUNTED else round_to), dense)


def possible_widths(group: UnitGroup, floor: int, round_to: Rounding) -> list[int]:
    """Every width that `group` can be given, descending from all its units to `floor` of them or the next above."""
    least = min(max(floor, 1), group.units)
    keeps = range(least, group.units + 1)
    return sorted({rounded_width(group.kind, keep, group.units, round_to) for keep in keeps}, reverse=True)


def _ceil(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


@dataclass(frozen=True)
class Row:
    """One group: its name and kind, the first tensor that ranks it, the units it has and those it keeps."""

    name: str
    kind: str
    tensor: str
    units: int
    kept: int

    @property
    def sparsity_level(self) -> float:
        """γ such that ``int(γ·units)`` is exactly the number of units to remove."""
        removed = self.units - self.kept
        level = removed / self.units
        return level if int(level * self.units) >= removed else math.nextafter(level, 1.0)


@dataclass(frozen=True, eq=False)
class Widths(Mapping[str, int]):
    """Units to keep by the group's name; `str()` is a table.

    Attributes:
        rows: one per group.
        parameters: of the whole model, before and after.
        flops: of one forward of the example inputs, before and after; None without a traced forward.
    """

    rows: tuple[Row, ...]
    parameters: tuple[int, int]
    flops: tuple[int, int] | None = None

    def __getitem__(self, name: str) -> int:
        for row in self.rows:
            if row.name == name:
                return row.kept
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter(row.name for row in self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def config(self) -> list[dict[str, Any]]:
        """For `TargetedDropout.prepare` with a unit recipe: γ by the first ranked tensor of each group that shrinks."""
        shrinking = [row for row in self.rows if row.kept < row.units]
        return [{"tensor_fqn": row.tensor, "sparsity_level": row.sparsity_level} for row in shrinking]

    def __str__(self) -> str:
        body = [(r.name, r.kind, f"{r.kept}/{r.units}", f"{1 - r.kept / r.units:.3f}") for r in self.rows]
        for what, totals in (("parameters", self.parameters), ("FLOPs", self.flops)):
            if totals is not None:
                before, after = totals
                body.append((what, "", f"{after:,}/{before:,}", f"{1 - after / max(before, 1):.3f}"))
        return table(("group", "kind", "left", "removed"), body)
