"""Operators that pick, compare, pool or sum entries of a dimension, which then cannot shrink; the others pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from td_plugin.graph import norms
from td_plugin.graph.context import Call, Result
from td_plugin.graph.elementwise import elementwise
from td_plugin.graph.labels import Dim
from td_plugin.graph.values import CONSTANT, NOTHING, ONE, VARYING, Value, resolve

_MOVES = ("aten.roll", "aten.flip", "aten.sort", "aten.topk")


def embedding(call: Call) -> Value:
    """Rows of a table."""
    table, indices = call.value(0), call.value(1)
    call.labels.pin(table.dims[0], "rows of an embedding table")
    call.labels.role(table.dims[1], "ranked")
    return Value(call.shape, (*indices.dims, table.dims[1]))


def index(call: Call) -> Result:
    """``x[i, j, ..]``: the dimensions that are indexed go, the others stay."""
    x = resolve(call.labels, call.value(0))
    indexed = [i for i, item in enumerate(call.args[1]) if item is not None]
    if indexed != list(range(indexed[0], indexed[-1] + 1)):
        return call.unknown("indexing of dimensions that are not neighbours")
    if any(call.args[1][i].meta["val"].dtype in (torch.bool, torch.uint8) for i in indexed):
        return call.unknown("indexing by a mask")
    reason = f"entries of it are picked: {call.location}"
    for picked in (*(x.dims[dim] for dim in indexed), *(dim for value in call.values(1) for dim in value.dims)):
        call.labels.pin(picked, reason)
    made = len(call.shape) - (len(x.shape) - len(indexed))
    before, after = x.dims[: indexed[0]], x.dims[indexed[-1] + 1 :]
    return replace(x, shape=call.shape, dims=(*before, *("picked entries",) * made, *after))


def gather(call: Call) -> Value:
    """One dimension is indexed; along the others, x and the indices run side by side."""
    x, picked = resolve(call.labels, call.value(0)), resolve(call.labels, call.value(2))
    along = call.args[1] % len(x.shape)
    dims: list[Dim] = []
    for place, (one, other) in enumerate(zip(x.dims, picked.dims, strict=True)):
        if place == along or x.shape[place] != picked.shape[place]:
            for dim in (one, other):
                call.labels.pin(dim, f"entries of it are picked: {call.location}")
            dims.append("picked entries")
        else:
            dims.append(call.labels.join(one, other))
    return replace(x, shape=call.shape, dims=tuple(dims))


def index_select(call: Call) -> Value:
    """Some entries of a dimension."""
    x, along = resolve(call.labels, call.value(0)), call.args[1]
    dims = list(x.dims)
    call.labels.pin(dims[along], f"entries of it are picked: {call.location}")
    dims[along] = "picked entries"
    return replace(x, shape=call.shape, dims=tuple(dims))


def index_add(call: Call) -> Value:
    """Entries of one dimension are added to those of another tensor; along the others, both run side by side."""
    x, source = resolve(call.labels, call.value(0)), resolve(call.labels, call.value(3))
    along = call.args[1] % len(x.shape)
    dims: list[Dim] = []
    for place, (one, other) in enumerate(zip(x.dims, source.dims, strict=True)):
        for dim in (one, other) if place == along else ():
            call.labels.pin(dim, f"entries of it are picked: {call.location}")
        dims.append("picked entries" if place == along else call.labels.join(one, other))
    return Value(call.shape, tuple(dims), rest=max(x.rest, source.rest))


def over(call: Call) -> Result:
    """Operators that mix the entries of one dimension and keep the others: softmax, cumsum, sort, topk, roll, flip."""
    x = resolve(call.labels, call.value(0))
    along = _places(x, call.argument("dim", call.argument("dims", -1)))
    _pin(call, x, along, "its entries are compared or mixed")
    dims = tuple("entries that are mixed" if dim in along else found for dim, found in enumerate(x.dims))
    moved = call.target.startswith(_MOVES) or (x.rest == NOTHING and "softmax" not in call.target)
    return _results(call, replace(x, dims=dims, rest=x.rest if moved else max(x.rest, CONSTANT)))


def windows(call: Call) -> Result:
    """Pooling and resizing of trailing dimensions; leading ones (batch, channels) pass."""
    x = resolve(call.labels, call.value(0))
    name = call.target.split(".")[1]
    trailing = next((int(d) for d in "123" if f"{d}d" in name), 2)
    _pin(call, x, range(len(x.shape) - trailing, len(x.shape)), "it is pooled or resized")
    return _results(call, replace(x, dims=(*x.dims[:-trailing], *("a spatial dimension",) * trailing), weight=False))


def pad(call: Call) -> Value:
    """Trailing dimensions grow."""
    x = resolve(call.labels, call.value(0))
    dims = list(x.dims)
    for place in range(len(call.args[1]) // 2):
        if any(call.args[1][2 * place : 2 * place + 2]):
            call.labels.pin(dims[-1 - place], f"it is padded: {call.location}")
            dims[-1 - place] = "a padded dimension"
    filled = x.rest == NOTHING and not call.argument("value")
    return replace(x, shape=call.shape, dims=tuple(dims), rest=NOTHING if filled else VARYING)


def reduction(call: Call) -> Result:
    """A dimension is summed, averaged or searched."""
    x = resolve(call.labels, call.value(0))
    gone = _places(x, call.argument("dim"))
    keep = len(call.shape) == len(x.shape)
    _pin(call, x, [dim for dim in gone if not norms.mean_square(call, x.dims[dim])], "it is reduced")
    dims = tuple(ONE if dim in gone else found for dim, found in enumerate(x.dims) if keep or dim not in gone)
    return _results(call, Value(call.shape, dims, weight=x.weight, rest=x.rest))


def extremum(call: Call) -> Result:
    """``max`` and ``min``: of two tensors, or along a dimension."""
    return elementwise(call) if len(call.tensors) > 1 else reduction(call)


def _places(x: Value, given: object) -> list[int]:
    """The dimensions that an argument names; none or an empty list name all."""
    several = [given] if isinstance(given, int) else given
    named = several if isinstance(several, (list, tuple)) and several else range(len(x.shape))
    return [dim % len(x.shape) for dim in named]


def _pin(call: Call, x: Value, places: Sequence[int], reason: str) -> None:
    for place in places:
        if isinstance(x.dims[place], Tensor):
            call.labels.pin(x.dims[place], f"{reason}: {call.location}")


def _results(call: Call, value: Value) -> Result:
    """The same labels for every tensor that comes out, such as values and indices."""
    out = [replace(value, shape=shape, joint=None) for shape in call.shapes]
    return out if isinstance(call.node.meta.get("val"), (list, tuple)) else out[0]
