"""A product with a matrix that has blocks of zeros, as smaller products, in standard operators of ONNX alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from td_plugin.export.block_layout import Group, Layout
from td_plugin.export.session import require

Way = Literal["split", "gather", "rows"]
"""How the columns of the input that a group needs are brought together:

- ``split``: the input is cut into blocks once (Split), each group strings its own together (Concat).
- ``gather``: blocks are picked for many groups at a time (Reshape, Gather), then handed out (Split).
- ``rows``: the input is transposed once, each group picks its rows (Gather) and multiplies them as they lie (Gemm with
  transA): for single rows and low blocks, which are slow to pick out of the columns.
"""

_GATHERED = 4  # times the input: what one Gather makes; more would leave the cache before it is used
_LOW = 8  # rows; lower blocks are slow to gather


@dataclass(frozen=True)
class Product:
    """``input @ weight + bias``, whatever node it came from.

    Attributes:
        input: name of the left factor, ``[..., rows]``.
        output: name of the result, ``[..., columns]``.
        weight: ``[rows, columns]``, transposed and scaled as the node does it.
        bias: ``[columns]`` or None.
        flat: whether the input is known to have two dimensions, as for Gemm.
        label: of the weight: constants that two nodes share are named after it.
    """

    input: str
    output: str
    weight: NDArray[Any]
    bias: NDArray[Any] | None
    flat: bool
    label: str


@dataclass
class Part:
    """A piece of a graph.

    Attributes:
        nodes: in computing order.
        constants: name -> values.
    """

    nodes: list[Any] = field(default_factory=list)
    constants: dict[str, NDArray[Any]] = field(default_factory=dict)

    def node(self, operator: str, inputs: list[str], outputs: list[str], **attributes: int | list[int]) -> None:
        """Add one; it is named after its first output."""
        name = f"{outputs[0]}/{operator}"
        self.nodes.append(require("onnx").helper.make_node(operator, inputs, outputs, name=name, **attributes))

    def constant(self, name: str, values: NDArray[Any] | list[int]) -> str:
        """Add one, of int64 where it is a list."""
        self.constants[name] = np.asarray(values, dtype=np.int64) if isinstance(values, list) else values
        return name


def ways(layout: Layout) -> list[Way]:
    """Those that can gain anything."""
    rows = layout.shape[0]
    found: list[Way] = []
    if len(layout.segments) <= max(4, rows // 4):
        found.append("split")
    if rows % layout.height == 0 and (layout.height >= _LOW or layout.kept_rows <= 2 * rows):
        found.append("gather")
    if layout.height <= _LOW:
        found.append("rows")
    return found or ["rows"]


def dense_part(product: Product) -> Part:
    """The product as one node."""
    part = Part()
    weight = part.constant(product.label, product.weight)
    _multiply(part, product, [product.input, weight], product.output, slice(None))
    return part


def sparse_part(product: Product, layout: Layout, way: Way) -> Part:
    """The product as one smaller product per group of columns.

    Values within are named after the output, constants after the label; both are new to any graph that has no name
    beginning so.
    """
    part, name = Part(), f"{product.output}/blocks"
    groups = layout.groups
    results = [f"{name}/out/{index}" for index in range(len(groups))] if len(groups) > 1 else [f"{name}/out"]
    source = product.input if product.flat or way == "split" else _flattened(part, product, name)
    pieces = _PIECES[way](part, product.label, layout, source, name)
    for index, (group, piece) in enumerate(zip(groups, pieces, strict=True)):
        columns = slice(group.start, group.stop)
        values = np.ascontiguousarray(product.weight[group.rows, columns])
        weight = part.constant(f"{product.label}/blocks/{index}", values)
        _multiply(part, product, [piece, weight], results[index], columns, transposed=way == "rows")
    restored = product.flat or way == "split"
    joined = product.output if restored else f"{name}/flat"
    if len(results) > 1:
        part.node("Concat", results, [joined], axis=-1)
    else:
        _renamed(part, results[0], joined)
    if not restored:
        _restored(part, product, joined, name)
    return part


def _multiply(
    part: Part, product: Product, factors: list[str], result: str, columns: slice, transposed: bool = False
) -> None:
    """One product; as Gemm where its input has two dimensions anyway and something comes with it."""
    if product.bias is None and not transposed:
        part.node("MatMul", factors, [result])
        return
    inputs = list(factors)
    if product.bias is not None:
        inputs.append(part.constant(f"{result}/bias", np.ascontiguousarray(product.bias[columns])))
    part.node("Gemm", inputs, [result], transA=int(transposed))


def _split(part: Part, label: str, layout: Layout, source: str, name: str) -> Iterator[str]:
    segments = layout.segments
    blocks = [f"{name}/in/{index}" for index in range(len(segments))]
    sizes = part.constant(f"{label}/blocks/sizes", [stop - start for start, stop in segments])
    part.node("Split", [source, sizes], blocks, axis=-1)
    starts = np.array([start for start, _ in segments])
    for index, group in enumerate(layout.groups):
        own = [blocks[at] for at in np.flatnonzero(np.isin(starts, group.rows))]
        piece = f"{name}/piece/{index}"
        if len(own) > 1:
            part.node("Concat", own, [piece], axis=-1)
        yield piece if len(own) > 1 else own[0]


def _gather(part: Part, label: str, layout: Layout, source: str, name: str) -> Iterator[str]:
    rows, height = layout.shape[0], layout.height
    shape = part.constant(f"{label}/blocks/shape", [-1, rows // height, height])
    part.node("Reshape", [source, shape], [f"{name}/in"])
    done = 0
    for turn, groups in enumerate(_chunks(layout)):
        picked, flat = f"{name}/picked/{turn}", f"{name}/gathered/{turn}"
        blocks = np.concatenate([group.rows[::height] // height for group in groups])
        sizes = [len(group.rows) for group in groups]
        part.node("Gather", [f"{name}/in", part.constant(f"{label}/blocks/places/{turn}", blocks)], [picked], axis=1)
        total = part.constant(f"{label}/blocks/flat/{turn}", [-1, sum(sizes)])
        part.node("Reshape", [picked, total], [flat])
        pieces = [f"{name}/piece/{done + index}" for index in range(len(groups))]
        if len(groups) > 1:
            part.node("Split", [flat, part.constant(f"{label}/blocks/sizes/{turn}", sizes)], pieces, axis=1)
        yield from pieces if len(groups) > 1 else [flat]
        done += len(groups)


def _chunks(layout: Layout) -> Iterator[list[Group]]:
    """Groups that share one Gather."""
    chunk: list[Group] = []
    limit = _GATHERED * layout.shape[0]
    for group in layout.groups:
        if chunk and sum(len(other.rows) for other in chunk) + len(group.rows) > limit:
            yield chunk
            chunk = []
        chunk.append(group)
    yield chunk


def _rows(part: Part, label: str, layout: Layout, source: str, name: str) -> Iterator[str]:
    part.node("Transpose", [source], [f"{name}/in"], perm=[1, 0])
    for index, group in enumerate(layout.groups):
        piece = f"{name}/piece/{index}"
        places = part.constant(f"{label}/blocks/places/{index}", group.rows)
        part.node("Gather", [f"{name}/in", places], [piece], axis=0)
        yield piece


_PIECES = {"split": _split, "gather": _gather, "rows": _rows}


def _flattened(part: Part, product: Product, name: str) -> str:
    shape = part.constant(f"{product.label}/blocks/inputs", [-1, len(product.weight)])
    part.node("Reshape", [product.input, shape], [f"{name}/rows"])
    return f"{name}/rows"


def _restored(part: Part, product: Product, joined: str, name: str) -> None:
    """Give the result the dimensions of the input but the last; their number need not be known."""
    label, columns = product.label, product.weight.shape[1]
    first = part.constant(f"{label}/blocks/first", [0])
    last = part.constant(f"{label}/blocks/last", [-1])
    part.node("Shape", [product.input], [f"{name}/shape"])
    part.node("Slice", [f"{name}/shape", first, last], [f"{name}/outer"])
    end = part.constant(f"{label}/blocks/columns", [columns])
    part.node("Concat", [f"{name}/outer", end], [f"{name}/target"], axis=0)
    part.node("Reshape", [joined, f"{name}/target"], [product.output], allowzero=1)


def _renamed(part: Part, old: str, new: str) -> None:
    maker = next(node for node in part.nodes if old in node.output)
    maker.output[list(maker.output).index(old)] = new


def tensors(constants: Mapping[str, NDArray[Any]]) -> list[Any]:
    """The `onnx.TensorProto` of each constant."""
    helper = require("onnx.numpy_helper")
    return [helper.from_array(values, name) for name, values in constants.items()]
