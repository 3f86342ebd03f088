"""int8 weights for an ONNX file."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from td_plugin.errors import TdError
from td_plugin.export.session import is_quantized, open_session, read_graph, require
from td_plugin.files import staged_file

# Convolutions are left in fp32: onnxruntime's ConvInteger runs four times slower than its fp32 Conv. Gemm is turned
# into MatMul and Add by the quantizer.
_OPERATORS = ("MatMul", "Gemm", "Gather", "Attention", "LSTM")


def quantize(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> Path:
    """Write the int8 form of an fp32 ONNX file: weights per channel, activations quantized while it runs.

    Dynamic quantization needs no calibration data. Linear layers and embeddings become int8, convolutions stay fp32.
    The metadata of `source` is kept. Compare the result with ``verify(model, target, batches)`` on real data.

    Args:
        source: what `to_onnx` wrote. Not a graph with fused attention: its weights would stay fp32.
        target: the file to write, another one than `source`.

    Returns:
        `target`.

    Raises:
        TdError: `source` is missing, damaged or already quantized, has no linear layer or embedding, or is `target`.
    """
    if Path(source).resolve() == Path(target).resolve():
        raise TdError("source and target are the same file", where=str(target), fix="choose another target")
    open_session(source)  # a damaged file is named before the quantizer stumbles over it
    graph = read_graph(source)
    if is_quantized(graph):
        raise TdError("the ONNX file is already quantized", where=str(source), fix="start from the fp32 file")
    kept = {entry.key: entry.value for entry in graph.metadata_props}
    with staged_file(target) as staged:
        _quantize_dynamic(require("onnx").load(str(source)), staged)
        quantized = read_graph(staged)
        if not is_quantized(quantized):
            raise TdError("nothing in the graph can be quantized", where=str(source), fix="use the fp32 file")
        require("onnx").helper.set_model_props(quantized, {**kept, "td-plugin.precision": "int8"})
        require("onnx").save(quantized, str(staged))
        open_session(staged)
    return Path(target)


def _quantize_dynamic(graph: Any, target: Path) -> None:
    # Given a graph, not a path: for a path the quantizer writes a file of its own beside the source.
    quantization = require("onnxruntime.quantization")
    logger = logging.getLogger()
    logger.addFilter(_is_wanted)
    try:
        quantization.quantize_dynamic(
            graph,
            str(target),
            per_channel=True,
            weight_type=quantization.QuantType.QInt8,
            op_types_to_quantize=list(_OPERATORS),
        )
    finally:
        logger.removeFilter(_is_wanted)


def _is_wanted(record: logging.LogRecord) -> bool:
    # The pre-processing it asks for fails on dynamic shapes, and shape inference has been done by the exporter.
    return not record.getMessage().startswith("Please consider to run pre-processing before quantization")
