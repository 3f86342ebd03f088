"""int8 with scales that are measured beforehand: QDQ, for runtimes and processors that want no arithmetic per run."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from td_plugin.export.calibration import Calibration
from td_plugin.export.external_data import save_graph
from td_plugin.export.graph_nodes import head_nodes, layer_of, name_nodes
from td_plugin.export.session import require, stated_inputs

# Products of two activations (attention scores) stay float: int8 there costs accuracy and gains next to nothing.
_OPERATORS = ("MatMul", "Gemm", "Conv", "Gather")


class _Reader:
    """Batches as onnxruntime's calibration asks for them."""

    def __init__(self, feeds: Iterator[dict[str, Any]]) -> None:
        self._feeds = feeds

    def get_next(self) -> dict[str, Any] | None:
        return next(self._feeds, None)


def quantize_static(
    graph: Any, calibration: Calibration, *, keep: Collection[str] = (), optimized: bool = False
) -> tuple[Any, dict[str, str]]:
    """The static int8 form of an `onnx.ModelProto`: weights per channel and symmetric, activations uint8 per tensor.

    Args:
        graph: with its weights; it is used up.
        calibration: the batches. The range of an activation is the least and the largest value in them.
        keep: names of nodes that stay float.
        optimized: the exporter has folded constants and batch norms already. onnxruntime's pre-processing, which
            would do it, renames nodes, and merges some products with their bias.

    Returns:
        The graph, and which layers stayed float and why.

    Raises:
        TdError: a batch does not fit, is not finite, or there is none.
    """
    quantization = require("onnxruntime.quantization")
    name_nodes(graph)
    with tempfile.TemporaryDirectory(prefix="td_plugin.") as folder:  # the tools leave files where they run
        source, ready, target = (Path(folder) / name for name in ("source.onnx", "ready.onnx", "int8.onnx"))
        save_graph(graph, source)
        _pre_process(source, ready, optimized)
        graph = require("onnx").load(str(ready))
        name_nodes(graph)
        heads = head_nodes(graph)
        feeds = calibration.feeds(stated_inputs(graph))
        first = next(feeds)  # mistakes in the data are told before the tools start
        quantization.quantize_static(
            graph,
            str(target),
            _Reader(_again(first, feeds)),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=list(_OPERATORS),
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            nodes_to_exclude=sorted({*keep, *(node.name for node in heads)}),
            use_external_data_format=ready.with_name(f"{source.name}.data").exists(),
            extra_options={"MatMulConstBOnly": True},
        )
        result = require("onnx").load(str(target))
    return result, {layer_of(node): "makes the output: an error there is not damped" for node in heads}


def _again(first: dict[str, Any], others: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    yield first
    yield from others


def _pre_process(source: Path, target: Path, optimized: bool) -> None:
    # Symbolic shape inference fails on dynamic axes, and leaves files as large as the model in the working directory.
    shapes = require("onnxruntime.quantization.shape_inference")
    shapes.quant_pre_process(
        str(source),
        str(target),
        skip_symbolic_shape=True,
        skip_optimization=optimized,
        save_as_external_data=source.with_name(f"{source.name}.data").exists(),
    )
