"""Sixteen bits per weight: fp16 for GPUs, with the operators in float32 that need its range; bf16 as a way to store."""

from __future__ import annotations

from typing import Any

import torch

from td_plugin.errors import TdError
from td_plugin.export.graph_nodes import matrices_left, name_nodes
from td_plugin.export.session import require

FP32_OPERATORS = {
    **dict.fromkeys(("Pow", "ReduceMean", "ReduceSum", "ReduceL2", "ReduceSumSquare"), "squares and sums overflow"),
    **dict.fromkeys(("Sqrt", "Reciprocal", "Exp", "Log"), "they take what overflows or vanishes in fp16"),
    **dict.fromkeys(("Sin", "Cos"), "angles of late positions are no fp16 numbers"),
}
"""Operators that stay float32 in an fp16 graph, and why; onnxruntime's own list is added. What `Sin` and `Cos` are
taken of stays float32 as well: the angles of rotary embeddings."""

_LARGEST = 65504.0  # of fp16
_MASK = 32768.0  # instead of larger numbers in masks: twice as much would become infinite with a score added
_LEAST = 256  # elements; smaller constants are not worth a node
_FLOAT, _BFLOAT16 = 1, 16  # onnx.TensorProto


def to_fp16(graph: Any, *, large: bool = False) -> tuple[Any, dict[str, str]]:
    """The fp16 form of an `onnx.ModelProto` with float32 inputs and outputs.

    On a CPU it runs, at about the speed of fp32: onnxruntime casts back and forth there.

    Args:
        graph: with its weights; it is used up.
        large: too large for shape inference, which the file then must have brought along.

    Returns:
        The graph, and what stayed float32 and why.

    Raises:
        TdError: a weight is beyond what fp16 can hold.
    """
    tool = require("onnxruntime.transformers.float16")
    name_nodes(graph)
    _tame_masks(graph)
    blocked = [*tool.DEFAULT_OP_BLOCK_LIST, *FP32_OPERATORS]
    nodes = _between(graph, _angles(graph), set(blocked))
    floats = _floats(graph)
    computing = {node.op_type for node in graph.graph.node if floats & {*node.input, *node.output}}
    operators = sorted(computing & set(blocked))
    converted = tool.convert_float_to_float16(
        graph,
        keep_io_types=True,
        disable_shape_infer=large or bool(graph.graph.value_info),
        op_block_list=blocked,
        node_block_list=sorted(nodes),
    )
    _drop_round_trips(converted)
    return converted, {name: FP32_OPERATORS.get(name, "onnxruntime has it in float32 only") for name in operators}


def _floats(graph: Any) -> set[str]:
    """Names of the float32 values of a graph, as far as it states them."""
    stated = (*graph.graph.input, *graph.graph.value_info, *graph.graph.output)
    found = {entry.name for entry in stated if entry.type.tensor_type.elem_type == _FLOAT}
    return found | {tensor.name for tensor in graph.graph.initializer if tensor.data_type == _FLOAT}


def _tame_masks(graph: Any) -> None:
    helper = require("onnx.numpy_helper")
    for tensor in graph.graph.initializer:
        if tensor.data_type != _FLOAT:
            continue
        values = torch.from_numpy(helper.to_array(tensor).copy())
        beyond = values.isfinite() & (values.abs() > _LARGEST)
        if not beyond.any():
            continue
        if values.numel() > 1:
            raise TdError(
                "a weight is beyond what fp16 can hold", where=tensor.name, got=values[beyond][0].item(), fix="use bf16"
            )
        tensor.CopyFrom(helper.from_array((values.sign() * _MASK).numpy(), tensor.name))


def _angles(graph: Any) -> set[str]:
    """Names of the nodes that angles are computed by."""
    makers = {name: node for node in graph.graph.node for name in node.output}
    reached: set[str] = set()
    pending = [name for node in graph.graph.node if node.op_type in ("Sin", "Cos") for name in node.input]
    while pending:
        node = makers.get(pending.pop())
        if node is not None and node.name not in reached:
            reached.add(node.name)
            pending += node.input
    return reached


def _between(graph: Any, names: set[str], operators: set[str]) -> set[str]:
    """`names`, and the nodes that take float32 values from nodes that stay float32 and only hand them to such."""
    constants = {tensor.name for tensor in graph.graph.initializer}
    outputs = {entry.name for entry in graph.graph.output}
    makers = {name: node for node in graph.graph.node for name in node.output}
    readers: dict[str, list[Any]] = {}
    for node in graph.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    found = set(names)

    def stays(node: Any) -> bool:
        return node is not None and (node.name in found or node.op_type in operators)

    for node in graph.graph.node:
        sources = [makers.get(name) for name in node.input if name and name not in constants]
        users = [reader for name in node.output for reader in readers.get(name, [])]
        if sources and users and not outputs & set(node.output) and all(map(stays, [*sources, *users])):
            found.add(node.name)
    return found


def _drop_round_trips(graph: Any) -> None:
    """Hand values from one float32 node to the next as they are: the tool narrows and widens them again in between."""
    nodes = graph.graph.node
    narrowed = {node.output[0]: node.input[0] for node in nodes if node.name.endswith("_cast_to_fp16_node")}
    widened = {
        node.output[0]: narrowed[node.input[0]]
        for node in nodes
        if node.name.endswith("_cast_to_fp32_node") and node.input[0] in narrowed
    }
    for node in nodes:
        for index, name in enumerate(node.input):
            node.input[index] = widened.get(name, name)
    used = {name for node in nodes for name in node.input} | {entry.name for entry in graph.graph.output}
    casts = ("_cast_to_fp16_node", "_cast_to_fp32_node")
    kept = [node for node in nodes if not node.name.endswith(casts) or node.output[0] in used]
    del nodes[:]
    nodes.extend(kept)
    require("onnxruntime.quantization.onnx_model").ONNXModel(graph).topological_sort()


def to_bf16(graph: Any) -> tuple[Any, dict[str, str]]:
    """An `onnx.ModelProto` with its matrices stored as bf16 and cast to float32 where they are read.

    onnxruntime folds the casts when it loads the file: half the bytes on disk, float32 in memory and in time. Its CPU
    kernels compute nothing in bf16.

    Args:
        graph: with its weights; it is used up.

    Raises:
        TdError: the graph is older than the operator set that knows bf16.
    """
    onnx = require("onnx")
    opset = next((entry.version for entry in graph.opset_import if entry.domain in ("", "ai.onnx")), 0)
    if opset < 13:
        raise TdError("bf16 needs operator set 13", got=opset, fix="export the model with opset=20")
    stored = {tensor.name for _, tensor in matrices_left(graph) if _elements(tensor) >= _LEAST}
    casts = []
    for tensor in graph.graph.initializer:
        if tensor.name not in stored:
            continue
        values = torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy()).bfloat16()
        name = tensor.name
        tensor.Clear()
        tensor.name, tensor.data_type = f"{name}.bf16", _BFLOAT16
        tensor.dims.extend(values.shape)
        tensor.raw_data = values.view(torch.int16).numpy().tobytes()
        casts.append(onnx.helper.make_node("Cast", [tensor.name], [name], name=f"{name}.cast", to=_FLOAT))
    nodes = list(graph.graph.node)
    del graph.graph.node[:]
    graph.graph.node.extend(casts + nodes)
    return graph, {"vectors": "they are small, and norms are sensitive"}


def _elements(tensor: Any) -> int:
    count = 1
    for size in tensor.dims:
        count *= size
    return count
