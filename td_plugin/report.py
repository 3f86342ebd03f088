"""What is pruned, in numbers: one row per target and the totals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain-text table; the first column is left-aligned, the others right-aligned."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in [header, *rows]
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


@dataclass(frozen=True)
class SparsityRow:
    """One target.

    Attributes:
        tensor: fully qualified name of its first ranked tensor.
        kind: ``"weights"`` or ``"units"``.
        groups: weights or units ranked.
        dropped: how many of them the deterministic mask drops.
        elements: scalars in all tensors of the target, biases included.
        zeros: scalars the deterministic mask zeroes.
        sampled: scalars that the last training draw zeroes.
        sparsity_level: γ asked for, now.
        drop_rate: α, now.
    """

    tensor: str
    kind: str
    groups: int
    dropped: int
    elements: int
    zeros: int
    sampled: int
    sparsity_level: float
    drop_rate: float


@dataclass(frozen=True)
class SparsityReport:
    """Rows per target, totals, and what was left alone and why; `str()` is a table.

    Attributes:
        recipe: its name.
        step: draws made so far.
        rows: one per target.
        skipped: fully qualified tensor name -> reason.
    """

    recipe: str
    step: int
    rows: tuple[SparsityRow, ...]
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def elements(self) -> int:
        """Scalars in all targeted tensors."""
        return sum(row.elements for row in self.rows)

    @property
    def zeros(self) -> int:
        """Scalars the deterministic masks zero."""
        return sum(row.zeros for row in self.rows)

    @property
    def sparsity(self) -> float:
        """Share of the targeted scalars that the deterministic masks zero, in [0, 1]."""
        return self.zeros / self.elements if self.elements else 0.0

    @property
    def dropped_share(self) -> float:
        """Share of the targeted scalars that the last training draw zeroes, in [0, 1]; about γ·α."""
        return sum(row.sampled for row in self.rows) / self.elements if self.elements else 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        totals = {"elements": self.elements, "zeros": self.zeros, "sparsity": self.sparsity}
        return {**asdict(self), **totals, "dropped_share": self.dropped_share}

    def __str__(self) -> str:
        header = ("tensor", "kind", "dropped", "zeros", "sparsity", "γ", "α")
        body = [
            (r.tensor, r.kind, f"{r.dropped}/{r.groups}", f"{r.zeros:,}/{r.elements:,}")
            + (f"{r.zeros / max(r.elements, 1):.3f}", f"{r.sparsity_level:.3f}", f"{r.drop_rate:.3f}")
            for r in self.rows
        ]
        total = ("total", "", "", f"{self.zeros:,}/{self.elements:,}", f"{self.sparsity:.3f}", "", "")
        lines = [f"recipe {self.recipe}, step {self.step}", table(header, [*body, total])]
        if self.skipped:
            lines += ["left alone:", *(f"  {name}: {reason}" for name, reason in self.skipped.items())]
        return "\n".join(lines)
