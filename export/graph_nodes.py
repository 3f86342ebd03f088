"""Questions about the nodes of an `onnx.ModelProto`: which make the logits, how many heads an attention has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

PRODUCTS = ("MatMul", "Gemm", "Conv")
"""Operators that multiply their first input with a constant, if the second is one."""

# Their other inputs are sizes, places and axes, not values that flow.
_ONE_SOURCE = {"Reshape", "Expand", "Slice", "Squeeze", "Unsqueeze", "Gather", "GatherND", "Tile", "Pad", "Flatten"}
_ONE_SOURCE |= {"ReduceMean", "ReduceMax", "ReduceSum", "TopK"}
# What makes one row per item out of one per token.
_PICK = {"Gather", "GatherND", "Slice", "ReduceMean", "ReduceMax"}


def layer_of(node: Any) -> str:
    """The module that a node comes from, as torch's exporter notes it; else the node's own name, or its output's."""
    noted = next((entry.value for entry in node.metadata_props if entry.key == "namespace"), "")
    names = [part.rpartition(": ")[0] for part in noted.split("/")]
    return names[-2] if len(names) > 1 and names[-2] else node.name or next(iter(node.output), "")


def name_nodes(graph: Any) -> None:
    """Give every node of the outer graph a name of its own: onnxruntime's tools tell nodes apart by it."""
    taken: set[str] = set()
    for index, node in enumerate(graph.graph.node):
        if not node.name or node.name in taken:
            node.name = f"{node.op_type}_{index}_of_td_plugin"
        taken.add(node.name)


def constants(graph: Any) -> dict[str, Any]:
    """Name -> `onnx.TensorProto` of the outer graph's constants."""
    return {tensor.name: tensor for tensor in graph.graph.initializer}


def products(graph: Any) -> list[Any]:
    """The nodes that multiply with a constant: linear layers and convolutions."""
    known = constants(graph)
    return [node for node in graph.graph.node if _is_product(node, known)]


def head_nodes(graph: Any) -> list[Any]:
    """The layers that make the outputs, and before them those that pool a text: what an error in shows undamped.

    From each output back along the one value that flows, to the first product; and past that to another one, if what
    it reads was picked out of the tokens (BERT's pooler, RoBERTa's head). A sum of two values, such as the stream of a
    model without a head, ends the search.
    """
    known = constants(graph)
    makers = {name: node for node in graph.graph.node for name in node.output}
    found: dict[str, Any] = {}
    for output in graph.graph.output:
        last = _product_before(output.name, makers, known)[0]
        if last is None:
            continue
        found[last.output[0]] = last
        pooler, _ = _product_before(last.input[0], makers, known)
        if pooler is not None and _PICK & set(_product_before(pooler.input[0], makers, known)[1]):
            found[pooler.output[0]] = pooler
    return list(found.values())


def _product_before(name: str, makers: dict[str, Any], known: dict[str, Any]) -> tuple[Any, list[str]]:
    """The product that a value comes from, or None, and the operators on the way."""
    passed: list[str] = []
    while name in makers:
        node = makers[name]
        if _is_product(node, known):
            return node, passed
        sources = node.input[:1] if node.op_type in _ONE_SOURCE else node.input
        flowing = [source for source in sources if source and source not in known]
        passed.append(node.op_type)
        if len(set(flowing)) != 1:
            break
        name = flowing[0]
    return None, passed


def _is_product(node: Any, known: dict[str, Any]) -> bool:
    return node.op_type in PRODUCTS and len(node.input) > 1 and node.input[1] in known


def matrices_left(graph: Any) -> Iterator[tuple[Any, Any]]:
    """Node and `onnx.TensorProto` of each float32 constant of two dimensions or more that a node reads."""
    matrices = (tensor for tensor in graph.graph.initializer if tensor.data_type == 1 and len(tensor.dims) > 1)
    known = {tensor.name: tensor for tensor in matrices}
    for node in graph.graph.node:
        for name in node.input:
            if name in known:
                yield node, known[name]


_FUSED = ("Attention", "MultiHeadAttention", "GroupQueryAttention")


@dataclass(frozen=True)
class Heads:
    """One attention.

    Attributes:
        heads: of the query; None where the graph does not say.
        size: of a head's values; None where the graph does not say.
        fused: whether it is one node of onnxruntime's.
    """

    heads: int | None
    size: int | None
    fused: bool


def attentions(graph: Any) -> list[Heads]:
    """Every attention of an `onnx.ModelProto`, in computing order: softmaxes over products of heads, or fused nodes."""
    shapes, known = _shapes(graph), constants(graph)
    readers: dict[str, list[Any]] = {}
    for node in graph.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    found = []
    for node in graph.graph.node:
        if node.domain == "com.microsoft" and node.op_type in _FUSED:
            found.append(_fused_heads(node, shapes, known))
        elif node.op_type == "Softmax":
            product = next((reader for reader in readers.get(node.output[0], []) if reader.op_type == "MatMul"), None)
            if product is not None:
                found += _plain_heads(shapes.get(node.input[0], []), shapes.get(product.input[1], []))
    return found


def _plain_heads(scores: list[int | None], values: list[int | None]) -> list[Heads]:
    """Of scores ``[batch, heads, queries, keys]`` and values ``[batch, heads, keys, size]``."""
    if len(values) == 4:
        return [Heads(values[1], values[3], fused=False)]
    return [Heads(scores[1] if len(scores) == 4 else None, None, fused=False)]


def _fused_heads(node: Any, shapes: dict[str, list[int | None]], known: dict[str, Any]) -> Heads:
    attributes = {entry.name: entry for entry in node.attribute}
    heads = int(attributes["num_heads"].i)
    if node.op_type == "Attention":
        sizes = list(attributes["qkv_hidden_sizes"].ints) if "qkv_hidden_sizes" in attributes else []
        weight = known.get(node.input[1])
        width = sizes[2] if sizes else weight.dims[1] // 3 if weight is not None else None
    else:
        value = shapes.get(node.input[2], []) if len(node.input) > 2 else []
        width = value[2] if len(value) == 3 else None
    if width is None or node.op_type == "GroupQueryAttention":  # whose values have heads of their own
        return Heads(heads, None, fused=True)
    return Heads(heads, width // heads if width % heads == 0 else -1, fused=True)


def _shapes(graph: Any) -> dict[str, list[int | None]]:
    """Name -> sizes of the values that the graph states, None where a size is open."""
    found: dict[str, list[int | None]] = {name: list(tensor.dims) for name, tensor in constants(graph).items()}
    for entry in (*graph.graph.input, *graph.graph.value_info, *graph.graph.output):
        sizes = entry.type.tensor_type.shape.dim
        found[entry.name] = [size.dim_value if size.HasField("dim_value") else None for size in sizes]
    return found
