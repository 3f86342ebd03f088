"""int8 whose activations are measured while it runs: no calibration data, and as fast on CPUs."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

from td_plugin.export.session import require

# Convolutions are left in fp32: onnxruntime's ConvInteger runs four times slower than its fp32 Conv. Gemm is turned
# into MatMul and Add by the quantizer.
_OPERATORS = ("MatMul", "Gemm", "Gather", "Attention", "LSTM")


def quantize_dynamic(graph: Any, *, keep: Collection[str] = (), large: bool = False) -> Any:
    """The dynamic int8 form of an `onnx.ModelProto`: weights per channel, activations per tensor and run.

    Args:
        graph: with its weights; it is used up.
        keep: names of nodes that stay as they are.
        large: more than one protobuf message holds.
    """
    quantization = require("onnxruntime.quantization")
    logger = logging.getLogger()
    logger.addFilter(_is_wanted)
    try:
        with tempfile.TemporaryDirectory(prefix="td_plugin.") as folder:
            target = Path(folder) / "int8.onnx"
            # Given a graph, not a path: for a path the quantizer writes a file of its own beside the source.
            quantization.quantize_dynamic(
                graph,
                str(target),
                per_channel=True,
                weight_type=quantization.QuantType.QInt8,
                op_types_to_quantize=list(_OPERATORS),
                nodes_to_exclude=sorted({*keep, *(f"{name}_MatMul" for name in keep)}),  # what a Gemm is turned into
                use_external_data_format=large,
            )
            return require("onnx").load(str(target))
    finally:
        logger.removeFilter(_is_wanted)


def _is_wanted(record: logging.LogRecord) -> bool:
    # The pre-processing it asks for fails on dynamic shapes, and shape inference has been done by the exporter.
    return not record.getMessage().startswith("Please consider to run pre-processing before quantization")
