"""Four or eight bits per weight, computed in float: what pays for decoders, whose speed is the speed of memory."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from td_plugin.export.graph_nodes import constants, head_nodes, name_nodes
from td_plugin.export.session import require

BLOCK = 32  # weights that share a scale; the smallest that onnxruntime takes everywhere
_INT8_PRODUCTS = 4  # accuracy_level: activations become int8 within the product, which is what makes it fast on CPUs
_TOOL = "onnxruntime.quantization.matmul_nbits_quantizer"


def to_bits(graph: Any, bits: int, keep: Collection[str] = ()) -> Any:
    """Store the matrices of linear layers in blocks of few bits, by onnxruntime's own tool; activations stay float.

    With 4 bits the layers that make the logits get 8: an error there is not damped by anything.

    Args:
        graph: an `onnx.ModelProto` with its weights; it is used up.
        bits: 4 or 8.
        keep: names of nodes that stay as they are.
    """
    name_nodes(graph)
    _split_gemms(graph, keep)
    with _tool() as tool:
        if bits == 4:
            heads = {node.name for node in head_nodes(graph)}
            graph = _quantized(tool, graph, 4, {*keep, *heads})
            return _quantized(tool, graph, 8, keep)
        return _quantized(tool, graph, bits, keep)


def _split_gemms(graph: Any, keep: Collection[str]) -> None:
    """Turn each ``Gemm`` with a constant matrix into ``MatMul`` and ``Add``, which is what the tool takes."""
    helper, known = require("onnx.helper"), constants(graph)
    nodes = []
    for node in graph.graph.node:
        settings = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
        plain = settings.get("alpha", 1.0) == 1.0 and settings.get("beta", 1.0) == 1.0 and not settings.get("transA")
        if node.op_type != "Gemm" or not plain or node.input[1] not in known or node.name in keep:
            nodes.append(node)
            continue
        weight = node.input[1]
        if settings.get("transB"):
            weight = f"{weight}.of.{node.name}"
            values = require("onnx.numpy_helper").to_array(known[node.input[1]])
            graph.graph.initializer.append(require("onnx.numpy_helper").from_array(values.T.copy(), weight))
        bias = node.input[2] if len(node.input) > 2 else ""
        product = f"{node.output[0]}.product" if bias else node.output[0]
        nodes.append(helper.make_node("MatMul", [node.input[0], weight], [product], name=node.name))
        nodes[-1].metadata_props.extend(node.metadata_props)
        if bias:
            nodes.append(helper.make_node("Add", [product, bias], [node.output[0]], name=f"{node.name}.bias"))
    del graph.graph.node[:]
    graph.graph.node.extend(nodes)


def _quantized(tool: Any, graph: Any, bits: int, leave: Collection[str]) -> Any:
    quantizer = tool.MatMulNBitsQuantizer(
        graph,
        bits=bits,
        block_size=BLOCK,
        is_symmetric=True,
        accuracy_level=_INT8_PRODUCTS,
        nodes_to_exclude=sorted(leave),
    )
    quantizer.process()
    return quantizer.model.model


@contextmanager
def _tool() -> Iterator[Any]:
    """The tool without its talk: importing it sets up logging for the whole process, and it reports every node."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    module = require(_TOOL)
    for handler in set(root.handlers) - set(handlers):
        root.removeHandler(handler)
    root.setLevel(level)
    logger = logging.getLogger(_TOOL)
    logger.addFilter(_is_problem)
    try:
        yield module
    finally:
        logger.removeFilter(_is_problem)


def _is_problem(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING
