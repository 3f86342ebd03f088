"""What a checkpoint or an ONNX file is made of, and what could be pruned from it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from td_plugin.budget import Budget, widths
from td_plugin.costs import Costs, parameter_costs, work_costs
from td_plugin.errors import TdError
from td_plugin.export.inspection_rows import FixedRow, Remainder, UnitRow, scaled
from td_plugin.export.module_tree import Node, draw, grow
from td_plugin.export.removal import zero_units
from td_plugin.export.session import open_session, read_graph
from td_plugin.granularity import KINDS, Units
from td_plugin.structure import Source, survey
from td_plugin.units import FixedGroup, Structure, UnitGroup
from td_plugin.widths import Widths

_LEGEND = (
    "Numbers are of what would go with all units of a group: a tensor between two groups counts in both. "
    "Of layers that are alike, they are those of one."
)
_OTHERS = "left alone by default; survey(model, source='graph').groups, handed over, would let it shrink"


@dataclass(frozen=True)
class ModelInspection:
    """A torch model, seen by what can be removed from it; `str()` is a tree.

    Attributes:
        model: its class.
        parameters: how many it has.
        zeros: how many of them are exactly zero.
        rows: one per group of units, in computing order.
        fixed: the dimensions that cannot shrink.
        source: where this was read: the traced graph, the table of families, or `nn.Sequential` chains.
        inputs: name -> shape of the inputs of the traced forward; empty without one.
        flops: of one forward of these; None without one.
        untraced: why there is no traced forward; empty if there is one, or if none was asked for.
        remainder: what γ would leave, if it was asked for.
    """

    model: str
    parameters: int
    zeros: int
    rows: tuple[UnitRow, ...]
    fixed: tuple[FixedRow, ...]
    source: str
    inputs: dict[str, tuple[int, ...]]
    flops: int | None
    untraced: str = ""
    remainder: Remainder | None = None

    @property
    def refused(self) -> dict[str, str]:
        """Layer -> why its units cannot be pruned."""
        found: dict[str, str] = {}
        for row in self.fixed:  # several dimensions may begin at one layer
            found[row.layer] = f"{found[row.layer]}; {row.reason}" if row.layer in found else row.reason
        return found

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {**asdict(self), "sparsity": self.zeros / max(self.parameters, 1), "refused": self.refused}

    def __str__(self) -> str:
        share = self.zeros / max(self.parameters, 1)
        head = f"{self.model}: {self.parameters:,} parameters, {self.zeros:,} of them zero ({share:.1%})"
        if self.flops is not None:
            given = ", ".join(f"{name} {'×'.join(map(str, shape))}" for name, shape in self.inputs.items())
            head += f"; {scaled(self.flops, 'FLOPs')} in one forward of {given}"
        lines = [head]
        tree = list(grow((row.layer, row.about) for row in self.rows))
        if self.fixed:
            tree.append(Node("fixed", below=grow((row.layer, row.about) for row in self.fixed)))
        lines += draw(tree)
        lines += [] if self.rows else ["no units known: only single weights can be pruned"]
        lines += [f"not traced, so no FLOPs: {self.untraced}"] if self.untraced else []
        lines += [_LEGEND] if self.rows else []
        lines += self.remainder.lines(self.parameters, self.flops) if self.remainder else []
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


def inspect_model(
    model: nn.Module,
    example_inputs: Mapping[str, Any] | None = None,
    *,
    source: Source = "auto",
    sparsity_level: float | None = None,
    kinds: Sequence[str] = KINDS,
) -> ModelInspection:
    """Count parameters, zeros and units, and say what cannot shrink; silent units are those that `shrink` finds.

    Args:
        model: dense, squashed or shrunk.
        example_inputs: as the model is called, by name; a transformers model needs none.
        source: ``"graph"`` shows the groups of the traced model; ``"known"`` does not trace and counts no FLOPs;
            ``"auto"`` shows the groups that training and `shrink` use, with FLOPs if the model can be traced.
        sparsity_level: γ in [0, 1): count what stays if every group loses ``int(γ·n)`` of its n units, and widths are
            rounded up to what onnxruntime gains from, as `shrink` does.
        kinds: the kinds of units that lose any; those that a unit recipe drops by default.

    Raises:
        TdError: γ or a kind is not possible, no group is of these kinds, or ``"graph"`` and the trace failed.
    """
    structure, untraced = _survey(model, example_inputs, source)
    kept = None
    if sparsity_level is not None:
        if not structure.groups:
            fix = "see what inspect says of it without γ"
            raise TdError("no units known, so none can go", where=type(model).__name__, got=untraced or None, fix=fix)
        kept = widths(model, structure, Budget(sparsity_level), granularity=Units(tuple(kinds), "producers"))
    tensors = dict(model.named_parameters())
    parameters = sum(tensor.numel() for tensor in tensors.values())
    flops = sum(work.flops for work in structure.work) if structure.work else None
    return ModelInspection(
        type(model).__name__,
        parameters,
        sum(int((tensor == 0).sum()) for tensor in tensors.values()),
        _unit_rows(model, structure, kept),
        _fixed_rows(model, structure),
        structure.source,
        _shapes(structure) if structure.work else {},
        flops,
        untraced,
        None if kept is None or sparsity_level is None else _remainder(kept, sparsity_level),
    )


def _survey(model: nn.Module, example_inputs: Mapping[str, Any] | None, source: Source) -> tuple[Structure, str]:
    """The structure that training and `shrink` use, with the work of a traced forward, or why there is none."""
    if source != "auto":
        return survey(model, example_inputs, source=source), ""
    known = survey(model, source="known")
    try:
        traced = survey(model, example_inputs, source="graph")
    except TdError as error:  # what is known without a trace is better than nothing
        return known, str(error)
    used = survey(model, example_inputs) if known.groups else traced
    if used.source == "graph":
        return traced, ""
    covered = {(part.fqn, part.dim) for group in used.groups for part in group.slices}
    others = tuple(
        FixedGroup(group.name, tuple(dict.fromkeys(part.fqn for part in group.slices)), group.units, _OTHERS)
        for group in traced.groups
        if not any((part.fqn, part.dim) in covered for part in group.ranked)
    )
    return replace(used, fixed=used.fixed + others + traced.fixed, work=traced.work, program=traced.program), ""


def _unit_rows(model: nn.Module, structure: Structure, kept: Widths | None) -> tuple[UnitRow, ...]:
    parameters = parameter_costs(model, structure.groups)
    work = work_costs(structure.work, structure.groups) if structure.work else None
    rows = []
    for group in structure.groups:
        silent = int(zero_units(model, group).sum())
        flops = None if work is None else _share(work, group)
        left = None if kept is None else kept.get(group.name)
        rows.append(UnitRow(group.name, group.kind, group.units, silent, _share(parameters, group), flops, left))
    return tuple(rows)


def _share(costs: Costs, group: UnitGroup) -> int:
    """What goes with all units of `group`."""
    return round(costs.total(None, group.name) - costs.total({group.name: 0}, group.name))


def _fixed_rows(model: nn.Module, structure: Structure) -> tuple[FixedRow, ...]:
    named = dict(model.named_parameters(remove_duplicate=False))
    rows = []
    for group in structure.fixed:
        inside = set(group.tensors)
        sizes = {id(named[name]): named[name].numel() for name in inside if name in named}  # tied ones count once
        flops = sum(work.flops for work in structure.work if work.where in inside) if structure.work else None
        rows.append(FixedRow(group.name, group.size, group.reason, group.tensors, sum(sizes.values()), flops))
    return tuple(rows)


def _shapes(structure: Structure) -> dict[str, tuple[int, ...]]:
    if structure.program is None:
        return {}
    names = structure.program.graph_signature.user_inputs
    values = {node.name: node.meta.get("val") for node in structure.program.graph.nodes if node.op == "placeholder"}
    return {str(name): tuple(map(int, v.shape)) for name in names if isinstance(v := values.get(str(name)), Tensor)}


def _remainder(kept: Widths, sparsity_level: float) -> Remainder:
    kinds = tuple(dict.fromkeys(row.kind for row in kept.rows))
    return Remainder(sparsity_level, kinds, kept.parameters[1], None if kept.flops is None else kept.flops[1])


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
