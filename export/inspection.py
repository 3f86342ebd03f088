"""What a checkpoint or an ONNX file is made of, and what could be pruned from it."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from td_plugin.export.session import open_session, read_graph
from td_plugin.export.shrink import zero_units
from td_plugin.report import table
from td_plugin.structure import refused_groups, unit_groups


@dataclass(frozen=True)
class UnitRow:
    """The units of one layer.

    Attributes:
        layer: its fully qualified name.
        kind: neurons, heads or channels.
        units: how many there are.
        silent: how many of them have no weights left: `shrink` removes those.
        parameters: in all slices of the units.
    """

    layer: str
    kind: str
    units: int
    silent: int
    parameters: int


@dataclass(frozen=True)
class ModelInspection:
    """A torch model, seen by what can be removed from it; `str()` is a table.

    Attributes:
        model: its class.
        parameters: how many it has.
        zeros: how many of them are exactly zero.
        rows: one per layer with units.
        refused: layer -> why its units cannot be pruned.
    """

    model: str
    parameters: int
    zeros: int
    rows: tuple[UnitRow, ...]
    refused: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {**asdict(self), "sparsity": self.zeros / self.parameters}

    def __str__(self) -> str:
        share = self.zeros / self.parameters
        lines = [f"{self.model}: {self.parameters:,} parameters, {self.zeros:,} of them zero ({share:.1%})"]
        header = ("layer", "kind", "units", "silent", "parameters")
        rows = [(r.layer, r.kind, str(r.units), str(r.silent), f"{r.parameters:,}") for r in self.rows]
        lines += [table(header, rows)] if rows else ["no units known: only single weights can be pruned"]
        lines += [f"not prunable by units: {name}: {reason}" for name, reason in self.refused.items()]
        return "\n".join(lines)


@dataclass(frozen=True)
class GraphInspection:
    """An ONNX file; `str()` is a few lines.

    Attributes:
        file: its path.
        bytes: its size.
        inputs: name -> type and shape.
        outputs: the same.
        metadata: what the exporter noted: recipe, versions, sparsity.
    """

    file: str
    bytes: int
    inputs: dict[str, str]
    outputs: dict[str, str]
    metadata: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{self.file}: {self.bytes:,} bytes"]
        for title, entries in (("input", self.inputs), ("output", self.outputs), ("metadata", self.metadata)):
            lines += [f"{title} {name}: {value}" for name, value in entries.items()]
        return "\n".join(lines)


def inspect_model(model: nn.Module) -> ModelInspection:
    """Count parameters, zeros and units; silent units are those that `shrink` finds."""
    tensors = dict(model.named_parameters())
    rows = []
    for group in unit_groups(model):
        own = (*group.ranked, *group.carried)
        parameters = sum(tensors[s.fqn].numel() for s in (*own, *group.consumers))
        rows.append(UnitRow(group.name, group.kind, group.units, int(zero_units(model, group).sum()), parameters))
    return ModelInspection(
        type(model).__name__,
        sum(tensor.numel() for tensor in tensors.values()),
        sum(int((tensor == 0).sum()) for tensor in tensors.values()),
        tuple(rows),
        refused_groups(model),
    )


def inspect_graph(path: str | os.PathLike[str]) -> GraphInspection:
    """Read inputs, outputs and metadata of an ONNX file.

    Raises:
        TdError: the file is missing or damaged.
    """
    session = open_session(path)
    return GraphInspection(
        str(path),
        Path(path).stat().st_size,
        {entry.name: f"{entry.type} {entry.shape}" for entry in session.get_inputs()},
        {entry.name: f"{entry.type} {entry.shape}" for entry in session.get_outputs()},
        {entry.key: entry.value for entry in read_graph(path).metadata_props},
    )
