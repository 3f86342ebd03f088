"""One function per form: a source in, a graph with its weights out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from td_plugin.errors import TdError
from td_plugin.export.calibration import Calibration
from td_plugin.export.dynamic_quantization import quantize_dynamic
from td_plugin.export.fusion import fuse
from td_plugin.export.graph_nodes import head_nodes, layer_of, matrices_left
from td_plugin.export.half import to_bf16, to_fp16
from td_plugin.export.session import is_quantized
from td_plugin.export.source_graph import SourceGraph
from td_plugin.export.static_quantization import quantize_static
from td_plugin.export.weight_only import to_bits

_WORTH_TELLING = 64  # elements
_CONVOLUTIONS = "onnxruntime's integer convolution is slower than its fp32 one; int8-static has a fast one"
_PRODUCTS_ONLY = "only linear layers take blocks of few bits"
_QUANTIZED = ("MatMulNBits", "DequantizeLinear", "QuantizeLinear")  # their float matrices are scales


@dataclass(frozen=True)
class Order:
    """What to make.

    Attributes:
        form: its name.
        calibration: for the static one.
        keep: nodes that stay as they are -> their layers.
    """

    form: str
    calibration: Calibration | None = None
    keep: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Made:
    """A form.

    Attributes:
        graph: `onnx.ModelProto` with its weights.
        precision: written into the file; empty for fp32.
        form: written into the file, where it says more than the precision.
        left_out: layer or operator -> why it is not in this form.
        notes: one line each.
    """

    graph: Any
    precision: str = ""
    form: str = ""
    left_out: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def _same(source: SourceGraph, order: Order) -> Made:
    return Made(source.load())


def fused(source: SourceGraph) -> Made:
    """The fused form.

    Raises:
        FusionError: there is none, or it is not what it should be.
    """
    graph, counts = fuse(source.load())
    nodes = ", ".join(f"{count} {operator}" for operator, count in sorted(counts.items()))
    return Made(graph, form="fused", notes=[f"fused: {nodes}"] if nodes else [])


def _int8(source: SourceGraph, order: Order) -> Made:
    graph = quantize_dynamic(source.load(), keep=order.keep, large=source.large)
    _require_quantized(source, is_quantized(graph))
    return Made(graph, "int8", left_out=_floats(graph, order, {"Conv": _CONVOLUTIONS}))


def _int8_static(source: SourceGraph, order: Order) -> Made:
    if order.calibration is None:
        raise TdError(
            "scales that are fixed beforehand need data",
            where=str(source.path),
            got="no calibration",
            fix="calibration=[{...}, ...]: batches of training data, some hundred rows in all",
        )
    graph, heads = quantize_static(source.load(), order.calibration, keep=order.keep, optimized=source.ours)
    _require_quantized(source, is_quantized(graph))
    note = f"scales from {order.calibration.count} batches"
    return Made(graph, "int8", "int8-static", {**_floats(graph, order, {}), **heads}, [note])


def _fp16(source: SourceGraph, order: Order) -> Made:
    graph, left_out = to_fp16(source.load(), large=source.large)
    return Made(graph, "fp16", left_out=left_out, notes=["for GPUs: a CPU computes it in float32, no faster"])


def _bf16(source: SourceGraph, order: Order) -> Made:
    graph, left_out = to_bf16(source.load())
    note = "stored in bf16, cast when the file is loaded: half the bytes on disk, memory and time of fp32"
    return Made(graph, "bf16", left_out=left_out, notes=[note])


def _weights(bits: int) -> Callable[[SourceGraph, Order], Made]:
    def make(source: SourceGraph, order: Order) -> Made:
        graph = to_bits(source.load(), bits, order.keep)
        _require_quantized(source, any(node.op_type == "MatMulNBits" for node in graph.graph.node))
        left_out = _floats(graph, order, dict.fromkeys(("Gather", "Conv", "Gemm", "Add"), _PRODUCTS_ONLY))
        if bits == 8:
            return Made(graph, "int8", "int8-weight", left_out)
        heads = {layer_of(node): "8 bits: it makes the output" for node in head_nodes(source.graph)}
        return Made(graph, "int4", left_out={**heads, **left_out})

    return make


MAKERS: Mapping[str, Callable[[SourceGraph, Order], Made]] = {
    "fp32": _same,
    "int8": _int8,
    "int8-static": _int8_static,
    "fp16": _fp16,
    "bf16": _bf16,
    "int8-weight": _weights(8),
    "int4": _weights(4),
}
"""All forms but the fused one, which may turn out to be none."""


def _require_quantized(source: SourceGraph, done: bool) -> None:
    if not done:
        raise TdError("nothing in the graph can be quantized", where=str(source.path), fix="use the fp32 file")


def _floats(graph: Any, order: Order, reasons: Mapping[str, str]) -> dict[str, str]:
    """Layers whose matrices are still float32, and why."""
    kept = set(order.keep) | {f"{name}_MatMul" for name in order.keep}
    found = {layer: "as asked" for layer in order.keep.values()}
    for node, tensor in matrices_left(graph):
        count = 1
        for size in tensor.dims:
            count *= size
        if count >= _WORTH_TELLING and node.name not in kept and node.op_type not in _QUANTIZED:
            reason = reasons.get(node.op_type, f"{node.op_type} has no such form in onnxruntime")
            found.setdefault(layer_of(node), reason)
    return found
