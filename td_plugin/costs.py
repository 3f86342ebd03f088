"""What a model costs, in parameters or FLOPs, when its groups keep fewer units: exact, without building it.

Every parameter, and every multiplication of the traced forward, is one term: its size in the dense model times the
share that is left of each dimension. Shares multiply between dimensions (neurons times residual stream) and add up
within one (two groups that are concatenated). A tensor of a removed layer goes whole.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TypeAlias

import torch
from torch import Tensor, nn

from td_plugin.errors import TdError
from td_plugin.units import Slice, UnitGroup, Work

Exact: TypeAlias = int | Fraction
"""An exact number; whole unless units of unequal size are given by their number alone."""

Kept: TypeAlias = int | Tensor
"""How many units stay, or which: ``[kept]`` int64."""


@dataclass(frozen=True)
class Part:
    """The entries of one dimension that belong to the units of one group.

    Attributes:
        group: its name.
        units: how many there are.
        each: entries of every unit, where they all have equally many.
        counts: ``[units]`` entries of each unit, where they have not.
    """

    group: str
    units: int
    each: int = 0
    counts: Tensor | None = None

    def removed(self, kept: Kept) -> Exact:
        """Entries that go with the units outside `kept`; the mean where only their number is known."""
        if self.counts is None:
            return self.each * (self.units - (len(kept) if isinstance(kept, Tensor) else kept))
        if isinstance(kept, Tensor):
            return int(self.counts.sum() - self.counts[kept].sum())
        return Fraction(int(self.counts.sum()) * (self.units - kept), self.units)


@dataclass(frozen=True)
class Factor:
    """One dimension, or the existence of a whole tensor as a dimension of size 1."""

    size: int
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Term:
    """One parameter or one multiplication: `dense` times the share left of each factor."""

    dense: int
    factors: tuple[Factor, ...]

    def left(self, kept: Mapping[str, Kept]) -> Exact:
        """What is left of `dense`; groups that `kept` does not name keep all their units."""
        product, sizes = Fraction(self.dense), 1
        for factor in self.factors:
            product *= factor.size - sum(p.removed(kept[p.group]) for p in factor.parts if p.group in kept)
            sizes *= factor.size
        return product / sizes


@dataclass(frozen=True)
class Costs:
    """The terms of a model, and those that each group has a part in; `total` of no argument is the dense model's."""

    terms: tuple[Term, ...]
    _touched: Mapping[str, list[Term]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        touched: dict[str, list[Term]] = defaultdict(list)
        for term in self.terms:
            for group in dict.fromkeys(part.group for factor in term.factors for part in factor.parts):
                touched[group].append(term)
        object.__setattr__(self, "_touched", dict(touched))  # an index of `terms`, made once

    def total(self, kept: Mapping[str, Kept] | None = None, group: str | None = None) -> Exact:
        """What is left when each group keeps `kept[name]`, of all terms or of those that `group` has a part in."""
        terms = self.terms if group is None else self._touched.get(group, [])
        return sum((term.left(kept or {}) for term in terms), Fraction(0))

    def of_units(self, group: UnitGroup) -> Tensor:
        """``[units]`` float64: what each unit of `group` costs in the dense model."""
        costs = torch.zeros(group.units, dtype=torch.float64)
        for term in self._touched.get(group.name, []):
            for size, part in ((f.size, p) for f in term.factors for p in f.parts if p.group == group.name):
                entries = part.each if part.counts is None else part.counts
                costs += entries * (term.dense / size)
        return costs

    def unequal(self, group: str) -> bool:
        """Whether it matters which units of `group` stay, and not only how many."""
        terms = self._touched.get(group, [])
        return any(p.group == group and p.counts is not None for t in terms for f in t.factors for p in f.parts)


def parameter_costs(model: nn.Module, groups: Iterable[UnitGroup]) -> Costs:
    """One term for each parameter of `model`; tied ones count once.

    Raises:
        TdError: a slice of `groups` does not fit its tensor: they are another model's, or from before it was shrunk.
    """
    names: dict[int, list[str]] = defaultdict(list)
    named = dict(model.named_parameters(remove_duplicate=False))
    for name, tensor in named.items():
        names[id(tensor)].append(name)
    parts: dict[int, dict[int, dict[Slice, Part]]] = defaultdict(lambda: defaultdict(dict))
    groups = tuple(groups)
    for group in groups:
        for slice_ in (part for part in group.slices if part.fqn in named):  # the others are buffers
            tensor = named[slice_.fqn]
            if _size(group, slice_) != tensor.shape[slice_.dim]:
                got = f"{slice_.fqn}: {tuple(tensor.shape)}"
                raise TdError("the group does not fit the model", where=group.name, got=got, fix="survey it again")
            if _layer(group, slice_) is None:  # a tied tensor may be listed under each of its names
                anonymous = Slice(group.name, "", slice_.dim, slice_.span, slice_.owners)
                parts[id(tensor)][slice_.dim][anonymous] = _part(group, slice_)
    layers, terms = _layers(groups), []
    for key, (first, *others) in names.items():
        tensor = named[first]
        factors = [Factor(tensor.shape[dim], tuple(found.values())) for dim, found in parts[key].items()]
        exists = _layers_of(first, layers)
        for other in others:  # a tensor that several layers hold goes with none of them
            exists = {layer: part for layer, part in exists.items() if layer in _layers_of(other, layers)}
        terms.append(Term(tensor.numel(), (*factors, *(Factor(1, (part,)) for part in exists.values()))))
    return Costs(tuple(terms))


def work_costs(work: Sequence[Work], groups: Iterable[UnitGroup]) -> Costs:
    """One term for each multiplication in `work`.

    Raises:
        TdError: `work` is empty.
    """
    if not work:
        raise TdError(
            "FLOPs are counted in a traced forward, and there is none",
            fix="give example_inputs so that the model can be traced",
        )
    groups, dims = tuple(groups), dict[tuple[str, int], Factor]()
    for group in groups:
        for slice_ in group.slices:
            if _layer(group, slice_) is None:
                known = dims.get((slice_.fqn, slice_.dim), Factor(0, ())).parts
                dims[slice_.fqn, slice_.dim] = Factor(_size(group, slice_), (*known, _part(group, slice_)))
    layers, terms = _layers(groups), []
    for one in work:
        factors = [dims[scale] for scale in one.scales if scale in dims]
        exists = _layers_of(one.where, layers)
        terms.append(Term(one.flops, (*factors, *(Factor(1, (part,)) for part in exists.values()))))
    return Costs(tuple(terms))


Layers: TypeAlias = dict[str, dict[tuple[str, int], Part]]
"""Fully qualified name of a module or tensor -> group and unit of the layer that it is, with its existence."""


def _layers(groups: Iterable[UnitGroup]) -> Layers:
    found: Layers = defaultdict(dict)
    for group in groups:
        for slice_ in group.slices if group.kind == "layers" else ():
            layer = _layer(group, slice_)
            if layer is not None:
                name, unit = layer
                found[name][group.name, unit] = _existence(group, unit)
    return found


def _layers_of(name: str, layers: Layers) -> dict[tuple[str, int], Part]:
    """The layers, one in the other, that the tensor or module `name` goes with."""
    pieces = name.split(".") if layers else []
    prefixes = (".".join(pieces[:end]) for end in range(1, len(pieces) + 1))
    return {layer: part for prefix in prefixes for layer, part in layers.get(prefix, {}).items()}


def _layer(group: UnitGroup, slice_: Slice) -> tuple[str, int] | None:
    """The layer that all of the tensor belongs to, and its unit; None for a tensor that shrinks along a dimension.

    The slices of a group that is called after the layers' container need only be what its layers write: all that is
    inside goes with them. Of any other group of layers the tensors go that it names.
    """
    owners = set(slice_.owners)
    if group.kind != "layers" or len(owners) != 1 or -1 in owners:
        return None
    inside = f"{group.name}."
    if slice_.module.startswith(inside):
        return inside + slice_.module.removeprefix(inside).split(".")[0], slice_.owners[0]
    return slice_.fqn, slice_.owners[0]


def _size(group: UnitGroup, slice_: Slice) -> int:
    return len(slice_.owners) or group.units * slice_.span


def _existence(group: UnitGroup, unit: int) -> Part:
    counts = torch.zeros(group.units, dtype=torch.int64)
    counts[unit] = 1
    return Part(group.name, group.units, counts=counts)


def _part(group: UnitGroup, slice_: Slice) -> Part:
    if not slice_.owners:
        return Part(group.name, group.units, slice_.span)
    owners = torch.tensor(slice_.owners)
    counts = owners[owners >= 0].bincount(minlength=group.units)
    if len(counts) != group.units:
        got = f"{slice_.fqn}: unit {len(counts) - 1} of {group.units}"
        raise TdError("an entry belongs to a unit that the group does not have", where=group.name, got=got)
    equal = bool((counts == counts[0]).all())
    return Part(group.name, group.units, int(counts[0])) if equal else Part(group.name, group.units, counts=counts)


def checked(groups: Iterable[UnitGroup], kept: Mapping[str, Kept]) -> Mapping[str, Kept]:
    """`kept`, where every entry is possible.

    Raises:
        TdError: an unknown group, fewer than one unit, more units than there are, one twice.
    """
    units = {group.name: group.units for group in groups}
    for name, value in kept.items():
        if name not in units:
            raise TdError("there is no such group of units", where=name, fix=f"one of {list(units)[:8]}")
        indices = value.sort().values if isinstance(value, Tensor) else torch.arange(max(value, 0))
        if not len(indices) or not 0 <= int(indices[0]) <= int(indices[-1]) < units[name]:
            got = value.tolist() if isinstance(value, Tensor) else value
            raise TdError("not a choice of its units", where=name, got=got, fix=f"keep 1 to {units[name]} of them")
        if bool((indices[1:] == indices[:-1]).any()):
            raise TdError("a unit is kept twice", where=name, got=indices.tolist(), fix="name every unit once")
    return kept
