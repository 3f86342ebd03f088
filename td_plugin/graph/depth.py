"""Whole residual layers as units: ``x + f(x) + g(x + f(x))`` is the identity once what f and g write is zero."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from td_plugin.units import Slice, UnitGroup

Written = list[tuple[str, int, bool]]
"""Tensors that write: fully qualified name, output dimension, whether they are ranked."""

_SAME = ("dropout", "contiguous", "clone", "alias", "detach", "to", "view", "reshape")
_MOVED = (*_SAME, "permute", "transpose", "slice", "roll", "unsqueeze", "squeeze", "flatten")


def layer_groups(model: nn.Module, program: ExportedProgram, sizes: dict[str, tuple[int, ...]]) -> list[UnitGroup]:
    """One group for every container of layers, of those layers that can leave exactly.

    Args:
        model: the one that was traced.
        program: its traced forward.
        sizes: the shape of every parameter by its fully qualified name.
    """
    nodes = [node for node in program.graph.nodes if node.op == "call_function"]
    names: dict[str, str] = program.graph_module.meta["td_parameters"]
    found: list[UnitGroup] = []
    for path, container in model.named_modules():
        alike = isinstance(container, (nn.ModuleList, nn.Sequential)) and len({type(child) for child in container}) == 1
        if path and alike and len(container) > 1:
            layers = [_Layer(f"{path}.{i}", nodes, names) for i in range(len(container))]
            written = [layer.writers() for layer in layers]
            if sum(map(bool, written)) > 1:
                found.append(_group(path, [parts for parts in written if parts], sizes))
    return found


def _group(path: str, layers: Sequence[Written], sizes: dict[str, tuple[int, ...]]) -> UnitGroup:
    parts: dict[bool, list[Slice]] = {True: [], False: []}
    for unit, written in enumerate(layers):
        for tensor, dim, ranked in written:
            module, _, name = tensor.rpartition(".")
            parts[ranked].append(Slice(module, name, dim, owners=(unit,) * sizes[tensor][dim]))
    return UnitGroup(
        name=path,
        kind="layers",
        units=len(layers),
        ranked=tuple(parts[True]),
        carried=tuple(parts[False]),
        consumers=(),
        statistics=(),
        sizes=(),
        residue=None,
    )


class _Layer:
    """The part of the graph that one layer computes."""

    def __init__(self, path: str, nodes: Sequence[fx.Node], names: dict[str, str]) -> None:
        self.path, self.names = path, names
        self.nodes = {node for node in nodes if self._inside(node)}

    def _inside(self, node: fx.Node) -> bool:
        paths = (str(entry[0]) for entry in node.meta.get("nn_module_stack", {}).values())
        return any(path == self.path or path.startswith(f"{self.path}.") for path in paths)

    def writers(self) -> Written:
        """(tensor, output dimension, whether it is ranked) of what the layer adds to its input; [] if it does more."""
        out = [node for node in self.nodes if any(user not in self.nodes for user in node.users)]
        if len(out) != 1 or not isinstance(out[0].meta.get("val"), Tensor):
            return []
        walked = self._stream(out[0])
        if walked is None or not walked[1]:
            return []
        start = walked[0].meta.get("val")
        same = isinstance(start, Tensor) and start.shape == out[0].meta["val"].shape
        return walked[1] if same else []

    def _stream(self, node: fx.Node) -> tuple[fx.Node, Written] | None:
        """The node outside that the stream comes from, and what is added to it on the way."""
        if node not in self.nodes:
            return node, []
        kind = _kind(node)
        if kind in _SAME and isinstance(node.args[0], fx.Node):
            return self._stream(node.args[0])
        if kind == "add":
            for skip, branch in ((node.args[0], node.args[1]), (node.args[1], node.args[0])):
                if isinstance(skip, fx.Node) and isinstance(branch, fx.Node):
                    before, written = self._stream(skip), self._written(branch)
                    if before is not None and written:
                        return before[0], before[1] + written
        return None

    def _written(self, node: Any) -> Written:
        """The layer's own tensors that make `node` zero when they are; [] if there are none such."""
        if not isinstance(node, fx.Node) or node not in self.nodes:
            return []
        kind = _kind(node)
        if kind in _MOVED:
            return self._written(node.args[0])
        if kind == "mul":
            return next((found for arg in node.args if (found := self._written(arg))), [])
        if kind == "batch_norm":
            own = [(name, 0, False) for arg in node.args[1:3] if (name := self._tensor(arg))]
            before = self._written(node.args[0])
            return before + own if before else []
        if kind == "addmm":
            return self._product(node.args[2], node.args[0], 1)
        if kind == "linear" or kind.startswith("conv"):
            return self._product(node.args[1], node.args[2] if len(node.args) > 2 else None, 0)
        return []

    def _product(self, weight: Any, bias: Any, dim: int) -> Written:
        name, shift = self._tensor(weight), self._tensor(bias)
        if not name or (bias is not None and not shift):
            return []
        return [(name, dim, True), *([(shift, 0, False)] if shift else [])]

    def _tensor(self, node: Any) -> str:
        """The layer's own parameter; empty for anything else."""
        name = self.names.get(node.name, "") if isinstance(node, fx.Node) else ""
        return name if name.startswith(f"{self.path}.") else ""


def _kind(node: fx.Node) -> str:
    return ".".join(str(node.target).split(".")[1:2])
