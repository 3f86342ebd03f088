"""How wide every layer of an ONNX file is, and how wide it was: told by the file, or seen beside the dense one."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from td_plugin.export.session import read_graph

KEY = "td-plugin.widths"
"""Metadata entry: JSON of layer -> [units before, units after]."""

Widths = dict[str, tuple[int, int]]
"""Layer -> units before and after."""

_CONVOLUTIONS = ("Conv", "ConvTranspose")


def width_changes(paths: Mapping[str, str | os.PathLike[str]]) -> dict[str, Widths]:
    """Name -> layers whose width changed; by its metadata, else compared with the first file, which is the dense one.

    Args:
        paths: name -> ONNX file. One without our names in it (of another exporter, or quantized) says nothing.

    Raises:
        TdError: a file cannot be read.
    """
    graphs = {name: _facts(path) for name, path in paths.items()}
    dense = next(iter(graphs.values()))[1] if graphs else {}
    found = {}
    for name, (told, widths) in graphs.items():
        seen = {layer: (dense[layer], width) for layer, width in widths.items() if dense.get(layer, width) != width}
        if told or seen:
            found[name] = told or seen
    return found


def _facts(path: str | os.PathLike[str]) -> tuple[Widths, dict[str, int]]:
    graph = read_graph(path)
    return _told(graph), layer_widths(graph)


def layer_widths(graph: Any) -> dict[str, int]:
    """Layer -> outputs of its linear map or convolution, of an `onnx.ModelProto` whose nodes say where they come from.

    torch's exporter notes of every node the modules that it was traced in, as ``namespace``.
    """
    weights = {tensor.name: tuple(tensor.dims) for tensor in graph.graph.initializer}
    widths = {}
    for node in graph.graph.node:
        layer = next((_layer(entry.value) for entry in node.metadata_props if entry.key == "namespace"), "")
        shape = weights.get(node.input[1]) if len(node.input) > 1 else None
        if not layer or shape is None or len(shape) < 2:
            continue
        if node.op_type in _CONVOLUTIONS:
            widths[layer] = shape[node.op_type == "ConvTranspose"]
        elif node.op_type == "MatMul" or node.op_type == "Gemm":
            transposed = any(entry.name == "transB" and entry.i for entry in node.attribute)
            widths[layer] = shape[0] if transposed else shape[-1]
    return widths


def _layer(namespace: str) -> str:
    """The innermost module of ``": Net/encoder: Encoder/encoder.0: torch.nn...Linear/linear: aten.linear.default"``."""
    names = [part.rpartition(": ")[0] for part in namespace.split("/")]
    return names[-2] if len(names) > 1 else ""


def _told(graph: Any) -> Widths:
    text = next((entry.value for entry in graph.metadata_props if entry.key == KEY), "{}")
    try:
        told = json.loads(text)
        return {str(layer): (int(before), int(after)) for layer, (before, after) in told.items()}
    except (ValueError, TypeError, AttributeError):  # written by someone else: what it means is not known
        return {}
