"""Attention, norms and GELU as single nodes of onnxruntime, and the proof that they are what they replace."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from td_plugin.errors import first_line
from td_plugin.export.graph_nodes import Heads, attentions
from td_plugin.export.quiet import quiet
from td_plugin.export.session import require

PROVIDER = "cpu"
"""What `transformers.exporters` fuses for: on a GPU other nodes pay."""
_UNDOMAINED = ("SimplifiedLayerNormalization",)  # onnxruntime's, though it has the standard's domain


class FusionError(Exception):
    """Why the unfused graph is to be used; the message is for the user."""


def fuse(graph: Any, provider: str = PROVIDER) -> tuple[Any, Counter[str]]:
    """Fuse an `onnx.ModelProto` by the rules of transformers (``ort_fusions``), else by those of onnxscript.

    onnxruntime's own optimizer is not used: it gives every layer the same number of heads, without an error.

    Args:
        graph: with its weights; it is left alone.
        provider: ``"cpu"``, ``"cuda"``, ``"webgpu"`` or ``"dml"``.

    Returns:
        The new graph, and how many nodes of each operator of onnxruntime it has.

    Raises:
        FusionError: the rules fail, change nothing, or a fused attention has other heads than the one it replaces.
    """
    ir = require("onnx_ir")
    program = ir.serde.deserialize_model(graph)
    try:
        with quiet(), _calm():
            _lower_padding_guards(program)
            _rules(program, provider)
        fused = ir.serde.serialize_model(program)
    except Exception as error:  # rules of two other packages, over graphs of any origin
        raise FusionError(f"the fusion failed: {type(error).__name__}: {first_line(error)}") from error
    counts = _own_nodes(fused)
    if counts == _own_nodes(graph):
        raise FusionError("there is nothing to fuse in this graph")
    check_heads(attentions(graph), attentions(fused))
    return fused, counts


def check_heads(before: list[Heads], after: list[Heads]) -> None:
    """Whether every fused attention has the heads of one of the attentions that were there.

    Raises:
        FusionError: it has not, or there are more or fewer of them.
    """
    if len(before) != len(after):
        raise FusionError(f"{len(before)} attentions became {len(after)}")
    wanted = Counter((one.heads, one.size) for one in before)
    for one in sorted(after, key=lambda heads: heads.size is None):  # those that say most choose first
        fitting = [pair for pair in wanted if wanted[pair] and _fits(one, pair)]
        if not fitting:
            known = ", ".join(f"{heads} of {size}" for heads, size in sorted(wanted, key=str))
            raise FusionError(f"a fused attention has {one.heads} heads of {one.size} where the graph has {known}")
        wanted[fitting[0]] -= 1


def _fits(one: Heads, pair: tuple[int | None, int | None]) -> bool:
    """Equal as far as both are known; a fused node knows its heads."""
    known = (now == then for now, then in zip((one.heads, one.size), pair, strict=True) if None not in (now, then))
    return all(known)


def _own_nodes(graph: Any) -> Counter[str]:
    """Operators that only onnxruntime has."""
    own = (node for node in graph.graph.node if node.domain == "com.microsoft" or node.op_type in _UNDOMAINED)
    return Counter(node.op_type for node in own)


@contextmanager
def _calm() -> Iterator[None]:
    """The constant folder warns of norms that it leaves alone."""
    logger = logging.getLogger("onnxscript.optimizer._constant_folding")
    logger.addFilter(_is_news)
    try:
        yield
    finally:
        logger.removeFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Skipping constant folding")


def _rules(program: Any, provider: str) -> None:
    try:
        from transformers.exporters.onnxruntime_fusions import fuse_for_onnxruntime
    except ImportError:  # the model is none of transformers: a part of the same rules
        require("onnxscript.rewriter.ort_fusions").optimize_for_ort(program)
    else:
        fuse_for_onnxruntime(program, provider)


def _lower_padding_guards(program: Any) -> None:
    """Move the zeros that transformers' exporter writes into rows without any token past the merge of the heads.

    Between an attention and its merge they keep every rule from seeing an attention: ``Where(empty [b, 1, s, 1], 0,
    values [b, h, s, d])``, ``Transpose``, ``Reshape`` becomes ``Transpose``, ``Reshape``, ``Where(empty [b, s, 1], 0,
    merged [b, s, h·d])``, which is the same for every element.
    """
    ir = require("onnx_ir")
    graph = program.graph
    for index, guard in enumerate([node for node in graph if node.op_type == "Where" and not node.domain]):
        path = _to_merge(guard)
        if path is None:
            continue
        condition, zero, values = guard.inputs
        *between, transpose, merge = path
        merged, readers = merge.outputs[0], list(merge.outputs[0].uses())
        axis = ir.Value(name=f"padding_guard_{index}_axis", const_value=ir.tensor([1], dtype=ir.DataType.INT64))
        axis.shape, axis.dtype = ir.Shape([1]), ir.DataType.INT64
        graph.register_initializer(axis)
        tape = ir.tape.Tape()
        empty = tape.op("Squeeze", [condition, axis])
        empty.shape, empty.dtype = ir.Shape([condition.shape[0], condition.shape[2], 1]), condition.dtype
        guarded = tape.op("Where", [empty, zero, merged])
        guarded.shape, guarded.dtype = merged.shape, merged.dtype
        for reader in readers:
            reader.node.replace_input_with(reader.idx, guarded)
        graph.insert_after(merge, tape.nodes)
        transpose.replace_input_with(0, values)
        for node in (*between, guard):
            graph.remove(node, safe=True)


def _to_merge(guard: Any) -> list[Any] | None:
    """What follows a guard until the heads are merged: ``Transpose``, ``Reshape``, of one head another ``Reshape``."""
    condition, zero, _ = guard.inputs
    scalar = zero.const_value is not None and zero.const_value.size == 1
    if not scalar or condition.shape is None or len(condition.shape) != 4:
        return None
    if condition.shape[1] != 1 or condition.shape[3] != 1:
        return None
    same = _only_reader(guard, "Reshape")
    between = [same] if same is not None and _same_shape(same) else []
    transpose = _only_reader((*between, guard)[0], "Transpose")
    merge = None if transpose is None else _only_reader(transpose, "Reshape")
    if merge is None or list(transpose.attributes["perm"].as_ints()) != [0, 2, 1, 3]:
        return None
    shapes = [node.outputs[0].shape for node in (transpose, merge)]
    ranks = [0 if shape is None else len(shape) for shape in shapes]
    return [*between, transpose, merge] if ranks == [4, 3] else None


def _same_shape(reshape: Any) -> bool:
    before, after = reshape.inputs[0].shape, reshape.outputs[0].shape
    known = before is not None and after is not None and all(isinstance(n, int) or n.value is not None for n in before)
    return known and before == after


def _only_reader(node: Any, operator: str) -> Any:
    """The one node that reads what `node` computes, if it is an `operator`, and no output of the graph."""
    readers = list(node.outputs[0].uses())
    if len(readers) != 1 or node.outputs[0].is_graph_output():
        return None
    return readers[0].node if readers[0].node.op_type == operator else None
