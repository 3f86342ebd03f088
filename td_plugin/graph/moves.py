"""Operators that move entries without computing: views, permutations, copies, concatenation, pieces."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from td_plugin.graph import values
from td_plugin.graph.context import Call, Result
from td_plugin.graph.labels import Dim
from td_plugin.graph.values import CONSTANT, VARYING, Value, resolve


def identity(call: Call) -> Value:
    """The same tensor."""
    return call.value(0)


def view(call: Call) -> Value:
    """view, reshape, flatten, unflatten."""
    return values.reshape(call.labels, call.value(0), call.shape)


def transpose(call: Call) -> Value:
    """Two dimensions change places; ``t`` and ``mT`` name none, and ``T`` turns all around."""
    x = call.value(0)
    order = list(range(len(x.shape)))
    one, other = (call.args[1], call.args[2]) if len(call.args) > 2 else (-2, -1)
    if len(order) < 2 or "numpy_T" in call.target:
        return values.permute(x, order[::-1])
    order[one], order[other] = order[other], order[one]
    return values.permute(x, order)


def permute(call: Call) -> Value:
    """Dimensions in another order."""
    return values.permute(call.value(0), call.args[1])


def movedim(call: Call) -> Value:
    """Some dimensions go to other places."""
    x = call.value(0)
    size = len(x.shape)
    source, to = ([place] if isinstance(place, int) else list(place) for place in call.args[1:3])
    order = [dim for dim in range(size) if dim not in {s % size for s in source}]
    for place, dim in sorted((t % size, s % size) for s, t in zip(source, to, strict=True)):
        order.insert(place, dim)
    return values.permute(x, order)


def unsqueeze(call: Call) -> Value:
    """A new dimension of size one."""
    x = call.value(0)
    return values.insert(x, call.args[1] % (len(x.shape) + 1))


def expand(call: Call) -> Value:
    """Dimensions of size one are repeated.

    Copies of what no unit runs through hold nothing back, as in a mask for every head. Others stay with their units.
    """
    x = call.value(0)
    free = not x.labelled
    for _ in range(len(call.shape) - len(x.shape)):
        x = values.insert(x, 0)
    dims = list(x.dims)
    for place, (one, several) in enumerate(zip(x.shape, call.shape, strict=True)):
        if one != several:
            dims[place] = call.labels.fresh(several) if free else "copies of one entry"
    rest = x.rest if not free else CONSTANT if x.weight else VARYING
    return replace(x, shape=call.shape, dims=tuple(dims), rest=rest)


def repeat_interleave(call: Call) -> Result:
    """Each entry of a dimension several times in a row."""
    x, dim, times = resolve(call.labels, call.value(0)), call.argument("dim"), call.argument("repeats")
    if not isinstance(times, int) or dim is None:
        return call.unknown()
    found = x.dims[dim]
    dims = list(x.dims)
    dims[dim] = found.repeat_interleave(times) if isinstance(found, Tensor) else found
    return replace(x, shape=call.shape, dims=tuple(dims))


def repeat(call: Call) -> Value:
    """The whole tensor several times along its dimensions: copies of an entry live and die with it."""
    x = resolve(call.labels, call.value(0))
    for _ in range(len(call.shape) - len(x.shape)):
        x = values.insert(x, 0)
    tiled = [
        found.repeat(size // old) if isinstance(found, Tensor) else found
        for found, old, size in zip(x.dims, x.shape, call.shape, strict=True)
    ]
    return replace(x, shape=call.shape, dims=tuple(tiled))


def concatenate(call: Call) -> Value:
    """Entries of one dimension after each other; those of the others are one."""
    tensors = [resolve(call.labels, value) for value in call.values(0) if 0 not in value.shape]
    if not tensors:
        return values.fixed(call.shape, "an empty tensor")
    along = int(call.argument("dim", 0)) % len(call.shape)
    weight = all(value.weight for value in tensors)
    for value in tensors:
        for dim in value.dims if value.weight and not weight else ():
            call.labels.role(dim, "carried")
    dims: list[Dim] = list(tensors[0].dims)
    for value in tensors[1:]:
        dims = [d if i == along else call.labels.join(d, value.dims[i]) for i, d in enumerate(dims)]
    if any(isinstance(value.dims[along], Tensor) for value in tensors):
        dims[along] = torch.cat([_labels_of(call, value, along) for value in tensors])
    rest = max(value.rest for value in tensors)
    return Value(call.shape, tuple(dims), weight=weight, rest=rest)


def _labels_of(call: Call, value: Value, dim: int) -> Tensor:
    found = value.dims[dim]
    if isinstance(found, Tensor):
        return found
    made = call.labels.fresh(value.shape[dim])
    call.labels.pin(made, found)
    return made


def stack(call: Call) -> Value:
    """Tensors of one shape along a new dimension."""
    first, *others = (resolve(call.labels, value) for value in call.values(0))
    out = values.broadcast(call.labels, [first, *others], first.shape)
    rest = max(value.rest for value in (first, *others))
    return replace(values.insert(out, call.args[1] % len(call.shape)), shape=call.shape, rest=rest)


def split(call: Call) -> Result:
    """A dimension in pieces: split, chunk, tensor_split.

    Where one number states all sizes, the pieces must stay of one size: entry i of each is the same unit.
    """
    x, shapes = call.value(0), call.shapes
    dim = int(call.argument("dim", 0)) % len(x.shape)
    sizes = [shape[dim] for shape in shapes]
    if not isinstance(call.args[1], (list, tuple)) and len(sizes) > 1:
        x = _in_step(call, x, dim, sizes)
    return [values.cut(call.labels, x, dim, sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(len(sizes))]


def _in_step(call: Call, x: Value, dim: int, sizes: list[int]) -> Value:
    if x.joint and dim in x.joint.dims:
        if set(sizes) == {1}:
            return x
        x = resolve(call.labels, x)
    found = x.dims[dim]
    if isinstance(found, Tensor):
        if len(set(sizes)) > 1:
            call.labels.pin(found, f"it is split into unequal pieces: {call.location}")
        else:
            call.labels.merge(found.view(len(sizes), -1).T.contiguous())
    return x


def unbind(call: Call) -> Result:
    """Every entry of a dimension by itself."""
    x = call.value(0)
    piece = values.select(call.labels, x, int(call.argument("dim", 0)) % len(x.shape))
    return [piece for _ in call.shapes]


def select(call: Call) -> Value:
    """One entry of a dimension."""
    x = call.value(0)
    return values.select(call.labels, x, int(call.args[1]) % len(x.shape))


def slice_(call: Call) -> Value:
    """A range of a dimension."""
    x = call.value(0)
    dim = int(call.args[1] or 0) % len(x.shape)
    start, stop, step = slice(call.args[2], call.args[3], call.args[4]).indices(x.shape[dim])
    return values.cut(call.labels, x, dim, start, stop, step)


def narrow(call: Call) -> Result:
    """A range of a dimension, from a start and a length."""
    x, (dim, start, length) = call.value(0), call.args[1:4]
    if not isinstance(start, int) or not isinstance(length, int):
        return call.unknown()
    start %= x.shape[dim]
    return values.cut(call.labels, x, dim % len(x.shape), start, start + length)
