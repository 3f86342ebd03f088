"""A value of the graph: the labels of its dimensions, and what reshapes, selections and joins do to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import prod

import torch
from torch import Tensor

from td_plugin.graph.labels import Dim, Labels

INSIDE = "entries inside a unit"
ONE = "a dimension of size one"


@dataclass(frozen=True)
class Joint:
    """Labels that vary along several dimensions at once, as after splitting ``3·heads·size`` into three.

    Attributes:
        dims: the value's dimension behind each axis of `labels`, outermost of the split first.
        labels: of the sizes of those dimensions.
    """

    dims: tuple[int, ...]
    labels: Tensor


@dataclass(frozen=True)
class Value:
    """A tensor in the graph.

    Attributes:
        shape: its sizes.
        dims: the labels of each dimension, or why it cannot shrink.
        joint: labels of the dimensions that were split and not yet told apart.
        weight: whether it is made of parameters and buffers alone.
        name: of its node.
    """

    shape: tuple[int, ...]
    dims: tuple[Dim, ...]
    joint: Joint | None = None
    weight: bool = False
    name: str = field(default="", compare=False)

    @property
    def labelled(self) -> bool:
        """Whether any dimension can shrink, as far as is known."""
        return self.joint is not None or any(isinstance(dim, Tensor) for dim in self.dims)


def fixed(shape: Sequence[int], reason: str) -> Value:
    """A value of which no dimension can shrink."""
    return Value(tuple(shape), (reason,) * len(shape))


def resolve(labels: Labels, value: Value, axis: int = 0) -> Value:
    """Decide for one dimension of a split: units lie along its `axis`-th dimension and take the others whole."""
    joint = value.joint
    if joint is None:
        return value
    rows = joint.labels.movedim(axis, 0)
    dims = list(value.dims)
    dims[joint.dims[axis]] = labels.merge(rows.reshape(rows.shape[0], -1))
    return replace(value, dims=tuple(dims), joint=None)


def permute(value: Value, order: Sequence[int]) -> Value:
    """Dimensions in another order."""
    order = [dim % len(value.shape) for dim in order]
    joint = value.joint and Joint(tuple(order.index(dim) for dim in value.joint.dims), value.joint.labels)
    shape, dims = tuple(value.shape[dim] for dim in order), tuple(value.dims[dim] for dim in order)
    return replace(value, shape=shape, dims=dims, joint=joint)


def insert(value: Value, dim: int, size: int = 1) -> Value:
    """A new dimension at `dim`."""
    shape = (*value.shape[:dim], size, *value.shape[dim:])
    dims = (*value.dims[:dim], ONE, *value.dims[dim:])
    joint = value.joint and Joint(tuple(d + (d >= dim) for d in value.joint.dims), value.joint.labels)
    return replace(value, shape=shape, dims=dims, joint=joint)


def remove(value: Value, dim: int) -> Value:
    """Without a dimension that `joint` does not know."""
    joint = value.joint and Joint(tuple(d - (d > dim) for d in value.joint.dims), value.joint.labels)
    without = (*value.shape[:dim], *value.shape[dim + 1 :]), (*value.dims[:dim], *value.dims[dim + 1 :])
    return replace(value, shape=without[0], dims=without[1], joint=joint)


def select(labels: Labels, value: Value, dim: int) -> Value:
    """One entry of `dim`: of a split like (3, heads, size), which the others must stay in step with."""
    if value.joint and dim in value.joint.dims:
        axis = value.joint.dims.index(dim)
        rest = value.joint.labels.movedim(axis, -1)
        merged = labels.merge(rest.reshape(-1, rest.shape[-1])).view(rest.shape[:-1])
        kept = tuple(d for d in value.joint.dims if d != dim)
        dims = list(value.dims)
        joint = Joint(kept, merged) if len(kept) > 1 else None
        if joint is None:
            dims[kept[0]] = merged
        return remove(replace(value, dims=tuple(dims), joint=joint), dim)
    labels.pin(value.dims[dim], "one entry of it is picked")
    return remove(value, dim)


def cut(labels: Labels, value: Value, dim: int, start: int, stop: int, step: int = 1) -> Value:
    """The entries ``start:stop:step`` of `dim`."""
    size = len(range(start, stop, step))
    if value.joint and dim in value.joint.dims:
        if size == 1:
            return insert(select(labels, value, dim), dim)
        if size != value.shape[dim]:
            value = resolve(labels, value)
    shape = (*value.shape[:dim], size, *value.shape[dim + 1 :])
    old = value.dims[dim]
    new = old[start:stop:step] if isinstance(old, Tensor) else old
    return replace(value, shape=shape, dims=(*value.dims[:dim], new, *value.dims[dim + 1 :]))


def reshape(labels: Labels, value: Value, shape: Sequence[int]) -> Value:
    """The same entries, in order, under another shape."""
    value = _settle(labels, value, shape)
    dims: list[Dim] = [ONE] * len(shape)
    joint = None
    for old, new in _blocks(value.shape, shape):
        known = [dim for dim in old if isinstance(value.dims[dim], Tensor)]
        reason = next((str(value.dims[dim]) for dim in old if isinstance(value.dims[dim], str)), INSIDE)
        for dim in new:
            dims[dim] = reason if not known else INSIDE
        if len(known) > 1:
            for dim in known:
                labels.pin(value.dims[dim], "two dimensions that could shrink are merged into one")
        elif known:
            spread = _spread(value, old, known[0]).reshape([shape[dim] for dim in new])
            varying = [i for i in range(len(new)) if not torch.equal(spread, spread.narrow(i, 0, 1).expand_as(spread))]
            core = spread[tuple(slice(None) if i in varying else 0 for i in range(len(new)))]
            if len(varying) == 1:
                dims[new[varying[0]]] = core
            elif joint is None and varying:
                joint = Joint(tuple(new[i] for i in varying), core)
            elif varying:
                dims[new[varying[0]]] = labels.merge(core.reshape(core.shape[0], -1))
    return replace(value, shape=tuple(shape), dims=tuple(dims), joint=joint)


def _settle(labels: Labels, value: Value, shape: Sequence[int]) -> Value:
    """Resolve a split before it is merged: a shuffle, which merges in another order, keeps the inner dimension."""
    if value.joint is None:
        return value
    together = any(set(value.joint.dims) <= set(old) and len(new) == 1 for old, new in _blocks(value.shape, shape))
    shuffled = list(value.joint.dims) != sorted(value.joint.dims)
    return resolve(labels, value, len(value.joint.dims) - 1 if together and shuffled else 0)


def _spread(value: Value, block: Sequence[int], dim: int) -> Tensor:
    """The labels of `dim` over all dimensions of `block`."""
    sizes = [value.shape[other] for other in block]
    found = value.dims[dim]
    assert isinstance(found, Tensor)
    return found.view([-1 if other == dim else 1 for other in block]).expand(sizes)


def _blocks(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The smallest runs of dimensions of equal products; dimensions of size one are in none."""
    sides = [[dim for dim, size in enumerate(shape) if size != 1] for shape in (old, new)]
    blocks = []
    while sides[0] or sides[1]:
        taken: tuple[list[int], list[int]] = ([], [])
        while not taken[0] or prod(old[d] for d in taken[0]) != prod(new[d] for d in taken[1]):
            smaller = 0 if prod(old[d] for d in taken[0]) <= prod(new[d] for d in taken[1]) else 1
            taken[smaller if sides[smaller] else 1 - smaller].append(sides[smaller if sides[smaller] else 1 - smaller].pop(0))
        blocks.append(taken)
    return blocks


def broadcast(labels: Labels, values: Sequence[Value], shape: Sequence[int], name: str) -> Value:
    """An elementwise operator: entries that meet are equated; dimensions are aligned on the right."""
    values = [resolve(labels, value) for value in values]
    dims: list[Dim] = [ONE] * len(shape)
    for position in range(1, len(shape) + 1):
        met = [v.dims[-position] for v in values if position <= len(v.shape) and v.shape[-position] == shape[-position]]
        if shape[-position] != 1 and met:
            first = met[0]
            for other in met[1:]:
                first = labels.join(first, other)
            dims[-position] = first
    return Value(tuple(shape), tuple(dims), weight=all(value.weight for value in values), name=name)
