"""What scaled dot-product attention says: a head is its query, key and value together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod

from torch import Tensor

from td_plugin.graph.context import Call
from td_plugin.graph.labels import Dim
from td_plugin.graph.values import ONE, Value, remainder, resolve

HEAD = "entries of a head"
POSITIONS = "positions that attend to each other"


def attention(call: Call) -> Value:
    """``q [.., h, s, d], k [.., g, t, d], v [.., g, t, e], mask``: g key and value heads serve h/g queries each."""
    labels, shape = call.labels, call.shape
    query, key, value = (resolve(labels, call.value(place)) for place in range(3))
    mask = call.optional(3)
    masks = [resolve(labels, mask)] if mask is not None else []
    for dim in (query.dims[-1], key.dims[-1]):
        labels.pin(dim, HEAD)
    for dim in (*(x.dims[-2] for x in (query, key, value)), *(dim for x in masks for dim in x.dims[-2:])):
        labels.pin(dim, POSITIONS)
    leading = [_together(call, (query, key, value, *masks), place) for place in range(len(shape), 2, -1)]
    entries = value.dims[-1]
    heads = [dim for dim in leading if isinstance(dim, Tensor)]
    for dim in heads:
        labels.marks.append((dim, "heads"))
        labels.pin(entries, HEAD)
        entries = HEAD
    multiplications = prod(shape[:-1]) * key.shape[-2] * (query.shape[-1] + shape[-1])
    call.product((query, key, value), multiplications, heads)
    out = Value(shape, (*leading, POSITIONS, entries))
    (rest,) = remainder([value], out)  # a query's head that shares its value with others still emits a mean of it
    return replace(out, rest=rest)


def _together(call: Call, values: Sequence[Value], place: int) -> Dim:
    """Dimension -`place` of all of them, of which some may be shared by several heads or by all."""
    size = call.shape[-place]
    dims: list[Dim] = []
    for value in values:
        found = value.shape[-place] if place <= len(value.shape) else 1
        dim = value.dims[-place] if found > 1 else ONE
        if found > 1:
            dims.append(dim.repeat_interleave(size // found) if isinstance(dim, Tensor) else dim)
    for other in dims[1:]:
        call.labels.join(dims[0], other)
    return next((dim for dim in dims if isinstance(dim, str)), dims[0]) if dims else ONE
