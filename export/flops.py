"""Multiplications and additions of one run of a graph, counted from the shapes it really ran on."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from td_plugin.errors import TdError, first_line
from td_plugin.export.engines import Engine
from td_plugin.export.node_events import NodeEvent, Recorder, Shape
from td_plugin.export.session import require

Shapes = Sequence[Shape]


@dataclass(frozen=True)
class FlopCount:
    """FLOPs of one run.

    Attributes:
        total: a multiplication and an addition are two; only operators that multiply matrices are counted.
        operators: the same by operator.
        uncounted: operators that multiply matrices in a way that is not counted, and how often they ran.
    """

    total: int
    operators: dict[str, int]
    uncounted: dict[str, int] = field(default_factory=dict)


def count_flops(path: str | os.PathLike[str], feeds: Mapping[str, Any]) -> FlopCount:
    """Run a graph once, unoptimized and on the CPU, and count from the shapes that onnxruntime's profiler records.

    So loops count as often as they run, and dynamic sizes are those of the inputs. Integer operators count as the
    floating-point ones that they stand for.

    Args:
        path: the ONNX file.
        feeds: graph input name -> numpy array.

    Raises:
        TdError: the CPU cannot run the graph as it stands, as with some made for a GPU.
    """
    try:
        with Recorder(Engine(os.fspath(path)), _as_written) as recorder:
            recorder.run(feeds)
    except Exception as error:  # onnxruntime's exceptions share no base class
        where, got = os.fspath(path), first_line(error)
        raise TdError("no FLOPs: the CPU cannot run the graph unoptimized", where=where, got=got) from error
    return count(recorder.runs[-1].nodes)


def _as_written(options: Any) -> None:
    options.graph_optimization_level = require("onnxruntime").GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")  # packed weights have no shape


def count(nodes: Sequence[NodeEvent]) -> FlopCount:
    """Add up what was recorded."""
    operators: Counter[str] = Counter()
    uncounted: Counter[str] = Counter()
    for node in nodes:
        if node.operator in _RULES:
            operators[node.operator] += _RULES[node.operator](node.inputs, node.outputs[0], node.outputs)
        elif node.operator in _UNCOUNTED:
            uncounted[node.operator] += 1
    return FlopCount(sum(operators.values()), dict(operators.most_common()), dict(uncounted))


Rule = Callable[[Shapes, Shape, Shapes], int]


def _matmul(inputs: Shapes, out: Shape, _: Shapes) -> int:
    """``[..., m, k] @ [..., k, n]``; FusedMatMul may take the left one transposed."""
    left = inputs[0]
    swapped = len(left) > 1 and len(out) > 1 and left[-2] != out[-2] == left[-1]
    return 2 * math.prod(out) * (left[-2] if swapped else left[-1])


def _gemm(inputs: Shapes, out: Shape, _: Shapes) -> int:
    return 2 * math.prod(out) * math.prod(inputs[0]) // max(out[0], 1)


def _convolution(weight: int) -> Rule:
    """A weight of ``[outputs, inputs / groups, *kernel]``."""
    return lambda inputs, out, _: 2 * math.prod(out) * math.prod(inputs[weight][1:])


def _transposed_convolution(inputs: Shapes, _out: Shape, _: Shapes) -> int:
    return 2 * math.prod(inputs[0]) * math.prod(inputs[1][1:])


def _fused_attention(inputs: Shapes, out: Shape, _: Shapes) -> int:
    """Input ``[b, s, h]`` times the weight ``[h, q + k + v]``, queries times keys, weights times values."""
    (batch, length, _width), weight = inputs[0], inputs[1]
    heads = weight[1] - out[-1]  # q and k are as wide as one another
    return 2 * batch * length * math.prod(weight) + 2 * batch * length * length * (heads // 2 + out[-1])


def _attention(inputs: Shapes, out: Shape, outputs: Shapes) -> int:
    """Queries times keys, weights times values; the keys may be those of a cache too."""
    length = outputs[1][-2] if len(outputs) > 1 and len(outputs[1]) == 4 else inputs[1][-2]
    return 2 * length * (math.prod(inputs[0]) + math.prod(out))


def _recurrent(inputs: Shapes, _out: Shape, _: Shapes) -> int:
    """Input ``[s, b, i]``, both weights applied at every step."""
    steps, batch, _width = inputs[0]
    return 2 * steps * batch * (math.prod(inputs[1]) + math.prod(inputs[2]))


# Shapes of quantized operators: data, scale, zero point, weight...; or data, weight, scales...
_RULES: dict[str, Rule] = {
    **dict.fromkeys(("MatMul", "FusedMatMul", "MatMulInteger", "MatMulIntegerToFloat", "QLinearMatMul"), _matmul),
    **dict.fromkeys(("DynamicQuantizeMatMul", "MatMulNBits"), _matmul),
    **dict.fromkeys(("Gemm", "FusedGemm", "QGemm"), _gemm),
    **dict.fromkeys(("Conv", "FusedConv", "ConvInteger"), _convolution(1)),
    "QLinearConv": _convolution(3),
    "ConvTranspose": _transposed_convolution,
    **dict.fromkeys(("QAttention",), _fused_attention),
    **dict.fromkeys(("MultiHeadAttention", "GroupQueryAttention"), _attention),
    **dict.fromkeys(("LSTM", "GRU", "RNN", "DynamicQuantizeLSTM"), _recurrent),
    "Attention": lambda inputs, out, outputs: (
        # onnxruntime's own takes a weight matrix, the standard one takes queries, keys and values.
        _fused_attention(inputs, out, outputs)
        if len(inputs[0]) == 3 and len(inputs[1]) == 2
        else _attention(inputs, out, outputs)
    ),
}
_UNCOUNTED = ("Einsum", "SparseToDenseMatMul", "PackedAttention", "PackedMultiHeadAttention", "QMoE", "MoE")
