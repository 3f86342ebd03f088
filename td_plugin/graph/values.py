"""A value of the graph: the labels of its dimensions, and what reshapes, selections and joins do to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from td_plugin.graph.labels import Dim, Labels

INSIDE = "entries inside a unit"
ONE = "a dimension of size one"

NOTHING, CONSTANT, VARYING = 0, 1, 2

Block = tuple[list[int], list[int]]
"""Dimensions of one shape and of another that hold the same entries."""


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
        rest: what the entries of a silenced unit are: zero, a constant, or something that depends on the inputs.
        name: of its node.
    """

    shape: tuple[int, ...]
    dims: tuple[Dim, ...]
    joint: Joint | None = None
    weight: bool = False
    rest: int = NOTHING
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
    if 0 in value.shape:
        return fixed(shape, "an empty tensor")
    blocks = _blocks(value.shape, shape)
    split = _carried(value.joint, blocks, shape) if value.joint else None
    if split is None:
        value = _settle(labels, value, blocks)
    dims: list[Dim] = [ONE] * len(shape)
    joint = None
    for old, new in blocks:
        known = [dim for dim in old if isinstance(value.dims[dim], Tensor)]
        reason = next((str(value.dims[dim]) for dim in old if isinstance(value.dims[dim], str)), INSIDE)
        for dim in new:
            dims[dim] = reason if not known else INSIDE
        for dim in known[1:]:  # one of several can shrink: the outer one, such as the heads of (heads, size)
            labels.pin(value.dims[dim], "it is merged with another dimension that can shrink")
        if known:
            spread = _spread(value, old, known[0]).reshape([shape[dim] for dim in new])
            joint = _placed(labels, dims, joint, Joint(tuple(new), spread))
    if split is not None:
        joint = _placed(labels, dims, joint, split)
    return replace(value, shape=tuple(shape), dims=tuple(dims), joint=joint)


def _placed(labels: Labels, dims: list[Dim], joint: Joint | None, new: Joint) -> Joint | None:
    """Write labels that vary along one dimension into `dims`; those that vary along several make a joint."""
    found = new.labels
    varying = [i for i in range(found.ndim) if not torch.equal(found, found.narrow(i, 0, 1).expand_as(found))]
    core = found[tuple(slice(None) if i in varying else 0 for i in range(found.ndim))]
    if len(varying) == 1:
        dims[new.dims[varying[0]]] = core
    elif varying and joint is None:
        return Joint(tuple(new.dims[i] for i in varying), core)
    elif varying:
        dims[new.dims[varying[0]]] = labels.merge(core.reshape(core.shape[0], -1))
    return joint


def _carried(joint: Joint, blocks: Sequence[Block], shape: Sequence[int]) -> Joint | None:
    """A split that goes on behind a reshape: its dimensions only meet each other, in their order."""
    touched = [block for block in blocks if set(block[0]) & set(joint.dims)]
    if any(not set(old) <= set(joint.dims) for old, _ in touched):
        return None
    if all(len(old) == len(new) == 1 for old, new in touched):
        moved = {old[0]: new[0] for old, new in touched}
        return Joint(tuple(moved[dim] for dim in joint.dims), joint.labels)
    if list(joint.dims) != sorted(joint.dims):
        return None
    dims = tuple(dim for _, new in touched for dim in new)
    return Joint(dims, joint.labels.reshape([shape[dim] for dim in dims]))


def _settle(labels: Labels, value: Value, blocks: Sequence[Block]) -> Value:
    """Resolve a split before it is merged: a shuffle, which merges in another order, keeps the inner dimension."""
    if value.joint is None:
        return value
    together = any(set(value.joint.dims) <= set(old) and len(new) == 1 for old, new in blocks)
    shuffled = list(value.joint.dims) != sorted(value.joint.dims)
    return resolve(labels, value, len(value.joint.dims) - 1 if together and shuffled else 0)


def _spread(value: Value, block: Sequence[int], dim: int) -> Tensor:
    """The labels of `dim` over all dimensions of `block`."""
    sizes = [value.shape[other] for other in block]
    found = torch.as_tensor(value.dims[dim])
    return found.view([-1 if other == dim else 1 for other in block]).expand(sizes)


def _blocks(old: Sequence[int], new: Sequence[int]) -> list[Block]:
    """The smallest runs of dimensions of equal products; dimensions of size one are in none."""
    sides = [[dim for dim, size in enumerate(shape) if size != 1] for shape in (old, new)]
    blocks: list[Block] = []
    while sides[0]:
        taken = ([sides[0].pop(0)], [sides[1].pop(0)])
        products = [old[taken[0][0]], new[taken[1][0]]]
        while products[0] != products[1]:
            side = int(products[1] < products[0])
            dim = sides[side].pop(0)
            taken[side].append(dim)
            products[side] *= (old, new)[side][dim]
        blocks.append(taken)
    return blocks


def remainder(values: Sequence[Value], out: Value) -> list[int]:
    """What each operand holds where a unit of `out` is silenced; one that lacks the unit's dimension is the same."""
    places = [place - len(out.dims) for place, dim in enumerate(out.dims) if isinstance(dim, Tensor)]

    def one(value: Value) -> int:
        if all(-place <= len(value.shape) and value.shape[place] != 1 for place in places):
            return value.rest
        return CONSTANT if value.weight else VARYING

    return [one(value) for value in values]


def broadcast(labels: Labels, values: Sequence[Value], shape: Sequence[int]) -> Value:
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
    return Value(tuple(shape), tuple(dims), weight=all(value.weight for value in values))
