"""The products with constant matrices in an ONNX graph, and how other nodes take their place."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from td_plugin.export.block_rewrite import Part, Product, dense_part, tensors
from td_plugin.export.engines import Engine
from td_plugin.export.graph_nodes import layer_of
from td_plugin.export.node_events import Recorder
from td_plugin.export.session import require

_FLOATS = (1, 10, 11)  # onnx.TensorProto: FLOAT, FLOAT16, DOUBLE
_STANDARD = ("", "ai.onnx")
OPSET = 14
"""The first whose Split takes its sizes as an input (13) and whose Reshape can be told a size of 0 (14)."""


@dataclass(frozen=True)
class Site:
    """A node that can be rewritten.

    Attributes:
        node: its name.
        layer: the module it comes from, or the node's name.
        weight: name of the constant.
        product: what it computes, apart from what `before` and `after` do.
        before: nodes that make the product's input.
        after: nodes that make the node's output from the product's.
    """

    node: str
    layer: str
    weight: str
    product: Product
    before: tuple[Any, ...] = ()
    after: tuple[Any, ...] = ()


def opset_of(graph: Any) -> int:
    """Version of the standard operators that an `onnx.ModelProto` is written in."""
    return max((int(entry.version) for entry in graph.opset_import if entry.domain in _STANDARD), default=1)


def find_sites(graph: Any) -> list[Site]:
    """MatMul and Gemm nodes of the outer graph whose second factor is a constant float matrix.

    Args:
        graph: `onnx.ModelProto` with its weights, every node named.
    """
    known = _constants(graph)
    return [
        _site(node, known)
        for node in graph.graph.node
        if node.domain in _STANDARD
        and node.op_type in ("MatMul", "Gemm")
        and node.input[0] not in known
        and node.input[1] in known
        and _is_matrix(known[node.input[1]])
    ]


def _is_matrix(tensor: Any) -> bool:
    return tensor.data_type in _FLOATS and len(tensor.dims) == 2 and math.prod(tensor.dims) > 0


def _constants(graph: Any) -> dict[str, Any]:
    """Name -> `onnx.TensorProto`; not those that a caller may replace by an input of his own."""
    replaceable = {entry.name for entry in graph.graph.input}
    known = {tensor.name: tensor for tensor in graph.graph.initializer if tensor.name not in replaceable}
    for node in graph.graph.node:
        if node.op_type == "Constant" and node.domain in _STANDARD:
            values = [entry.t for entry in node.attribute if entry.name == "value"]
            known |= dict(zip(node.output, values, strict=False))  # none for a constant number or string
    return known


def _site(node: Any, known: Mapping[str, Any]) -> Site:
    name, (given, weight), result = node.input[1], node.input[:2], node.output[0]
    values = _array(known[weight])
    if node.op_type == "MatMul":
        return Site(node.name, layer_of(node), weight, Product(given, result, values, None, False, name))
    helper = require("onnx").helper
    attributes = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
    alpha, beta = attributes.get("alpha", 1.0), attributes.get("beta", 1.0)
    label = name
    if attributes.get("transB", 0):
        values, label = values.T, f"{label}/transposed"
    if alpha != 1:
        values, label = (values * values.dtype.type(alpha)), f"{label}/times/{alpha:g}"
    before, after = [], []
    source, made = given, result
    if attributes.get("transA", 0):
        source = f"{result}/transposed"
        before.append(helper.make_node("Transpose", [given], [source], name=source, perm=[1, 0]))
    bias = None
    if len(node.input) > 2 and node.input[2]:
        bias = _bias(known.get(node.input[2]), beta, values)
        if bias is None:
            made = f"{result}/product"
            after = _added(made, node.input[2], result, beta, values.dtype)
    product = Product(source, made, values, bias, True, label)
    return Site(node.name, layer_of(node), weight, product, tuple(before), tuple(after))


def _array(tensor: Any) -> NDArray[Any]:
    values: NDArray[Any] = require("onnx.numpy_helper").to_array(tensor)
    return values


def _bias(tensor: Any, beta: float, weight: NDArray[Any]) -> NDArray[Any] | None:
    """``[columns]``, if that is what Gemm's third input is."""
    if tensor is None:
        return None
    values, columns = _array(tensor), weight.shape[1]
    if values.ndim > 2 or values.size not in (1, columns) or (values.ndim == 2 and values.shape[0] != 1):
        return None
    return np.broadcast_to(values.reshape(-1) * values.dtype.type(beta), (columns,))


def _added(made: str, bias: str, result: str, beta: float, dtype: np.dtype[Any]) -> list[Any]:
    """``made + beta * bias`` as nodes."""
    helper, numpy_helper = require("onnx").helper, require("onnx.numpy_helper")
    if beta == 1:
        return [helper.make_node("Add", [made, bias], [result], name=f"{result}/Add")]
    factor, scaled = f"{result}/beta", f"{result}/scaled"
    value = numpy_helper.from_array(np.array(beta, dtype=dtype), factor)
    return [
        helper.make_node("Constant", [], [factor], name=factor, value=value),
        helper.make_node("Mul", [bias, factor], [scaled], name=scaled),
        helper.make_node("Add", [made, scaled], [result], name=f"{result}/Add"),
    ]


def replace(graph: Any, parts: Mapping[str, tuple[Site, Part]]) -> None:
    """Put parts in the place of nodes, and drop the constants that nothing reads any more.

    The new nodes do not note the module they come from: the width of one of several products is not that of a layer.

    Args:
        graph: `onnx.ModelProto`, changed in place.
        parts: name of a node -> what it is, and what takes its place.
    """
    nodes, known = [], {tensor.name for tensor in graph.graph.initializer}
    for node in graph.graph.node:
        if node.name not in parts:
            nodes.append(node)
            continue
        site, part = parts[node.name]
        nodes += [*site.before, *part.nodes, *site.after]
        fresh = {name: values for name, values in part.constants.items() if name not in known}
        known |= fresh.keys()
        graph.graph.initializer.extend(tensors(fresh))
    copies = [type(node).FromString(node.SerializeToString()) for node in nodes]  # those in the graph go with it
    del graph.graph.node[:]
    graph.graph.node.extend(copies)
    _drop_unread(graph, {site.weight for site, _ in parts.values()})


def _drop_unread(graph: Any, names: Collection[str]) -> None:
    read = Counter([*_read(graph.graph), *(entry.name for entry in graph.graph.output)])
    gone = {name for name in names if not read[name]}
    for index in reversed(range(len(graph.graph.initializer))):
        if graph.graph.initializer[index].name in gone:
            del graph.graph.initializer[index]
    for index in reversed(range(len(graph.graph.node))):
        node = graph.graph.node[index]
        if node.op_type == "Constant" and node.output[0] in gone:
            del graph.graph.node[index]


def _read(graph: Any) -> Iterator[str]:
    """Names that nodes read, those of inner graphs too."""
    for node in graph.node:
        yield from node.input
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _read(inner)


def input_rows(path: Path, feeds: Mapping[str, Any]) -> dict[str, int]:
    """Node -> rows of its first factor in one run of a file whose nodes have names; those in loops are left out."""
    with Recorder(Engine(str(path)), _as_written) as recorder:
        recorder.run(feeds)
    events = recorder.runs[-1].nodes
    times = Counter(event.node for event in events)
    found = [(event.node, event.inputs[0]) for event in events if event.inputs and times[event.node] == 1]
    return {node: math.prod(shape[:-1]) for node, shape in found}


def _as_written(options: Any) -> None:
    options.graph_optimization_level = require("onnxruntime").GraphOptimizationLevel.ORT_DISABLE_ALL


def alone(product: Product, part: Part | None = None, opset: int = 20) -> Any:
    """An `onnx.ModelProto` of one product, as one node or as `part` of it; its rows are dynamic."""
    helper = require("onnx").helper
    part = dense_part(product) if part is None else part
    sizes = ["rows"] if product.flat else ["batch", "rows"]
    kind = helper.np_dtype_to_tensor_dtype(product.weight.dtype)
    given = helper.make_tensor_value_info(product.input, kind, [*sizes, product.weight.shape[0]])
    result = helper.make_tensor_value_info(product.output, kind, [*sizes, product.weight.shape[1]])
    graph = helper.make_graph(part.nodes, "product", [given], [result], tensors(part.constants))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
