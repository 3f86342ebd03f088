"""What zeros are worth on disk: one ONNX file in several forms, every one really written or encoded.

Single zeros gain nothing in onnxruntime but bytes: it multiplies them, and it makes sparse initializers dense again
while it loads them, so these save neither time nor memory. What has to be faster needs whole units (`shrink`) or whole
blocks (`block_sparse`).
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from td_plugin.errors import TdError
from td_plugin.export.external_data import LIMIT, weight_bytes
from td_plugin.export.progress import bar
from td_plugin.export.storage_forms import StorageRow as StorageRow
from td_plugin.export.storage_forms import bitmask_row, gap_row, half_row, read_weights, sparse_rows, zip_bytes
from td_plugin.report import table

GAPS = (8, 5)
"""Bits per gap that are tried: those of Han et al., arXiv 1510.00149, for convolutions and for linear layers."""

_DENSE_AGAIN = (
    "onnxruntime makes sparse initializers dense while it loads them: they save no time and no memory, and a zip has "
    "to be unpacked before"
)


@dataclass(frozen=True)
class StorageReport:
    """Forms of one file; `str()` is a table.

    Attributes:
        path: the file.
        rows: first the file as it is.
        zeros: how many of `weights` are zero.
        weights: float entries of all constants that could be stored otherwise.
        tensors: how many constants that is.
        notes: what else there is to know.
    """

    path: Path
    rows: tuple[StorageRow, ...]
    zeros: int
    weights: int
    tensors: int
    notes: tuple[str, ...] = ()

    @property
    def sparsity(self) -> float:
        """Share of zeros among the weights, in [0, 1]."""
        return self.zeros / self.weights if self.weights else 0.0

    def row(self, form: str) -> StorageRow:
        """One form by its name.

        Raises:
            TdError: there is none.
        """
        found = {row.form: row for row in self.rows}
        if form not in found:
            raise TdError("no such form", got=form, fix=f"one of {', '.join(found)}")
        return found[form]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {**asdict(self), "path": str(self.path), "sparsity": self.sparsity}

    def __str__(self) -> str:
        first = self.rows[0].bytes
        header = ["form", "MB", "of the file", "tensors", "lossless", "pays above", "read by"]
        cells = [
            [
                row.form,
                f"{row.bytes / 1e6:.2f}",
                f"{row.bytes / first:.1%}",
                f"{row.tensors}/{self.tensors}",
                "yes" if row.lossless else "no",
                "-" if row.pays_above is None else f"{row.pays_above:.1%}",
                row.read_by,
            ]
            for row in self.rows
        ]
        told = f"{self.sparsity:.1%} of {self.weights:,} weights in {self.tensors} tensors are zero"
        return "\n".join([table(header, cells), told, *self.notes])


def storage_table(path: str | os.PathLike[str], *, progress: bool = False) -> StorageReport:
    """Measure what an ONNX file takes as it is, zipped, with sparse initializers, as gaps and values, and in fp16.

    A tensor takes another form only where that makes it smaller. Sparse initializers and zips are really written, to a
    temporary directory; gaps and bitmasks are really encoded, and decoded again to see that nothing is lost.

    Args:
        path: the file, of any precision; only its float constants can be sparse.
        progress: show a bar on the terminal.

    Raises:
        TdError: the file is missing or damaged, its weights are missing or outside its directory, or it has no float
            constants.
    """
    file = read_weights(Path(path))
    notes = [_DENSE_AGAIN]
    with bar("forms", 3 + len(GAPS) + 2, progress) as steps:
        rows = [StorageRow("as it is", file.bytes, 0, True, "onnxruntime")]
        with tempfile.TemporaryDirectory(prefix="td_plugin.") as folder:
            rows.append(StorageRow("zip", zip_bytes(file.parts, Path(folder)), 0, True, "unzip, onnxruntime"))
            steps.advance()
            if weight_bytes(file.graph) > LIMIT:
                notes.append("not tried: sparse initializers and fp16, which are made of files below 2 GiB")
            else:
                rows += sparse_rows(file, Path(folder))
                steps.advance()
                rows.append(half_row(file, Path(folder)))
                steps.advance()
        for bits in GAPS:
            rows.append(gap_row(file, bits))
            steps.advance()
        rows.append(bitmask_row(file))
        steps.advance()
    negative = sum(int(np.signbit(values[values == 0]).sum()) for _, values in file.weights)
    if negative:
        notes.append(f"{negative:,} of the zeros are negative, which zip stores as values; bake() makes them positive")
    entries = sum(values.size for _, values in file.weights)
    zeros = entries - sum(int(np.count_nonzero(values)) for _, values in file.weights)
    return StorageReport(file.path, tuple(rows), zeros, entries, len(file.weights), tuple(notes))
