"""What a search for blocks of zeros found, measured and chose, matrix by matrix."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from td_plugin.export.parity import ParityReport
from td_plugin.export.speedup import Speedup
from td_plugin.report import table

NO_BLOCKS = "no blocks of zeros"


@dataclass(frozen=True)
class BlockRow:
    """One matrix.

    Attributes:
        layers: modules, or nodes, that multiply with it.
        weight: name of the constant.
        shape: inputs and outputs, as MatMul takes them; a torch Linear has them the other way round.
        zeros: share of its entries that are zero, in [0, 1].
        inputs: rows of input at which it was measured.
        block: rows and columns of the blocks, 0 columns where groups differ in width; None without blocks of zeros.
        density: share of the matrix that lies in blocks which are not zero.
        choice: how it is multiplied now.
        speedup: of the fastest rewritten product over the dense one; None if none was measured.
    """

    layers: tuple[str, ...]
    weight: str
    shape: tuple[int, int]
    zeros: float
    inputs: int
    block: tuple[int, int] | None = None
    density: float = 1.0
    choice: Literal["dense", "split", "gather", "rows"] = "dense"
    speedup: Speedup | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {**asdict(self), "speedup": self.speedup and self.speedup.to_dict()}


@dataclass(frozen=True)
class BlockSparseReport:
    """What was rewritten; `str()` is a table.

    Attributes:
        path: of the file.
        rows: one per matrix.
        bytes: of the file and the weights beside it.
        source_bytes: the same of the source.
        min_gain: speed-up that was asked for.
        threads: at which it was measured.
        parity: how far the file is from its source; None where no inputs could be had to compare on.
        notes: what else there is to know.
    """

    path: Path
    rows: tuple[BlockRow, ...]
    bytes: int
    source_bytes: int
    min_gain: float
    threads: int
    parity: ParityReport | None = None
    notes: tuple[str, ...] = ()

    @property
    def rewritten(self) -> int:
        """Matrices that are multiplied in blocks now."""
        return sum(row.choice != "dense" for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            **{key: value for key, value in asdict(self).items() if key not in ("parity", "rows")},
            "path": str(self.path),
            "rewritten": self.rewritten,
            "rows": [row.to_dict() for row in self.rows],
            "parity": None if self.parity is None else self.parity.to_dict(),
        }

    def __str__(self) -> str:
        header = ["matrix", "shape", "zeros", "block", "density", "choice", "measured"]
        lines = [table(header, [_cells(row) for row in self.rows])]
        lines.append(
            f"{self.rewritten} of {len(self.rows)} matrices rewritten, at {self.min_gain:g}x and more with "
            f"{self.threads} thread(s); {self.source_bytes / 1e6:.2f} -> {self.bytes / 1e6:.2f} MB"
        )
        if self.parity is not None:
            lines.append(f"against the source: max {self.parity.max_abs:.2g} over {self.parity.batches} batches")
        return "\n".join([*lines, *self.notes])


def _cells(row: BlockRow) -> list[str]:
    block = "-" if row.block is None else f"{row.block[0]}x{row.block[1] or 'any'}"
    measured = NO_BLOCKS if row.speedup is None else f"{row.speedup} at {row.inputs} rows"
    return [
        ", ".join(row.layers), f"{row.shape[0]}x{row.shape[1]}", f"{row.zeros:.3f}", block, f"{row.density:.3f}",
        row.choice, measured,
    ]  # fmt: skip
