"""From labels to groups of units: which classes can shrink, and what belongs to them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor

from td_plugin.graph.labels import UNKNOWN, Labels, Owner
from td_plugin.units import FixedGroup, Kind, MeanNorm, Read, Slice, UnitGroup, Work

Signature = tuple[tuple[int, int], ...]
"""(position among the owners, entries) of every tensor dimension a class runs through."""


@dataclass
class Found:
    """The groups of a graph, before their attributes are known.

    Attributes:
        groups: can shrink.
        fixed: cannot.
        work: every product.
        visitors: group name -> modules whose forward handles its activations.
    """

    groups: list[UnitGroup] = field(default_factory=list)
    fixed: list[FixedGroup] = field(default_factory=list)
    work: tuple[Work, ...] = ()
    visitors: dict[str, frozenset[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Class:
    """Classes of one signature: their roots, ``[units]``, and the reason why they are fixed, if any."""

    signature: Signature
    roots: Tensor
    reason: str


def find_groups(labels: Labels, keep: Sequence[str] = ()) -> Found:
    """The groups that the labels describe.

    Args:
        labels: of the whole graph.
        keep: fully qualified names of tensors whose units must all stay.
    """
    for owner in labels.owners:
        if owner.tensor in keep:
            labels.pin(torch.arange(owner.start, owner.start + owner.size), "the user keeps it")
    root = labels.classes()
    classes = _by_signature(labels, root)
    marks = {name: _marked(labels, root, name) for name in ("heads", "residual", "conv")}
    found, names = Found(), Counter[str]()
    order = {key: place for place, key in enumerate(labels.roles)}
    classes = sorted(classes, key=lambda c: _place(labels, c, order))
    for one, norms, reads in zip(classes, *_touching(labels, root, classes), strict=True):
        slices = _slices(labels, root, one, order)
        if not slices["ranked"]:
            found.fixed += _unread(one, slices)
            continue
        kind = _kind(one, marks)
        name = _name(slices["ranked"], kind)
        if one.reason or not slices["consumer"]:
            tensors = tuple(dict.fromkeys(s.fqn for s in chain(*slices.values())))
            found.fixed.append(FixedGroup(name, tensors, len(one.roots), one.reason or "nothing in the model reads it"))
            continue
        names[name] += 1
        if names[name] > 1:
            name = f"{name}#{names[name]}"
        unique = tuple(dict.fromkeys(norms)), tuple(dict.fromkeys(reads))
        roles = slices["ranked"], slices["carried"], slices["consumer"], slices["statistics"]
        found.groups.append(UnitGroup(name, kind, len(one.roots), *roles, (), None, norms=unique[0], reads=unique[1]))
    found.work = tuple(_work(labels, root))
    found.visitors = _visitors(labels, root, found.groups)
    return found


def _unread(one: _Class, slices: Mapping[str, tuple[Slice, ...]]) -> list[FixedGroup]:
    """Tensors that only an unknown operator reads: without a word they would look forgotten."""
    parts = list(chain(*slices.values()))
    if not one.reason.startswith(UNKNOWN) or not parts or slices["consumer"]:
        return []
    tensors = tuple(dict.fromkeys(part.fqn for part in parts))
    return [FixedGroup(parts[0].module or parts[0].fqn, tensors, len(one.roots), one.reason)]


def _by_signature(labels: Labels, root: Tensor) -> list[_Class]:
    places = torch.cat([torch.full((owner.size,), place) for place, owner in enumerate(labels.owners)] or [root[:0]])
    roots = torch.cat([root[o.start : o.start + o.size] for o in labels.owners] or [root[:0]])
    several = max(1, len(labels.owners))
    pairs, counts = torch.unique(roots * several + places, return_counts=True)
    members: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for pair, count in zip(pairs.tolist(), counts.tolist(), strict=True):
        one, place = divmod(pair, several)
        members[one].append((place, count))
    reasons = _reasons(labels, root)
    grouped: dict[tuple[Signature, str], list[int]] = defaultdict(list)
    for one, signature in members.items():
        grouped[tuple(signature), reasons.get(one, "")].append(one)
    return [_Class(key[0], torch.tensor(found), key[1]) for key, found in grouped.items()]


def _reasons(labels: Labels, root: Tensor) -> dict[int, str]:
    """Pinned class -> the first reason."""
    found: dict[int, str] = {}
    for dim, reason in labels.pins:
        for one in torch.unique(root[dim]).tolist():
            found.setdefault(one, reason)
    return found


def _marked(labels: Labels, root: Tensor, mark: str) -> Tensor:
    found: Tensor = torch.unique(torch.cat([root[dim] for dim, name in labels.marks if name == mark] or [root[:0]]))
    return found


def _place(labels: Labels, one: _Class, order: dict[tuple[str, int], int]) -> int:
    owners = [labels.owners[place] for place, _ in one.signature]
    return min(order.get((owner.tensor, owner.dim), len(order)) for owner in owners)


def _slices(
    labels: Labels, root: Tensor, one: _Class, order: dict[tuple[str, int], int]
) -> dict[str, tuple[Slice, ...]]:
    """By role; units are numbered by their first entry in the first ranked tensor."""
    owners = sorted(
        (labels.owners[p] for p, _ in one.signature), key=lambda o: order.get((o.tensor, o.dim), len(order))
    )
    by_role: dict[str, list[Owner]] = {"ranked": [], "carried": [], "consumer": [], "statistics": []}
    for owner in owners:
        roles = labels.roles.get((owner.tensor, owner.dim), {})
        role = next((r for r in ("ranked", "consumer", "statistics", "carried") if r in roles), None)
        by_role[role or "carried"].append(owner)
    leading = (by_role["ranked"] or owners)[0]
    found = root[leading.start : leading.start + leading.size]
    number = torch.full((len(root),), -1)
    first = found[torch.isin(found, one.roots)].tolist()
    for unit, label in enumerate(dict.fromkeys(first)):
        number[label] = unit
    return {
        role: tuple(_slice(owner, number[root[owner.start : owner.start + owner.size]], len(one.roots)) for owner in of)
        for role, of in by_role.items()
    }


def _slice(owner: Owner, units: Tensor, count: int) -> Slice:
    module, _, tensor = owner.tensor.rpartition(".")
    span = owner.size // count
    regular = span * count == owner.size and torch.equal(units, torch.arange(owner.size) // span)
    if regular:
        return Slice(module, tensor, owner.dim, span)
    return Slice(module, tensor, owner.dim, owners=tuple(units.tolist()))


def _kind(one: _Class, marks: dict[str, Tensor]) -> Kind:
    def marked(name: str) -> bool:
        return bool(torch.isin(one.roots[:1], marks[name]).any())

    if marked("conv"):
        return "channels"
    if marked("heads"):
        return "heads"
    return "hidden" if marked("residual") else "neurons"


def _name(ranked: Sequence[Slice], kind: Kind) -> str:
    """The layer that computes the units; of heads, the module that holds query, key and value."""
    if kind != "heads" or len(ranked) == 1:
        return ranked[0].module or ranked[0].fqn
    parts = [s.module.split(".") for s in ranked]
    shared = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return ".".join(shared) or ranked[0].module


def _touching(labels: Labels, root: Tensor, classes: Sequence[_Class]) -> tuple[list[list[MeanNorm]], list[list[Read]]]:
    """The norms over each class, and where it is read."""
    home = torch.full((labels.count + 1,), -1)
    for place, one in enumerate(classes):
        home[one.roots] = place
    norms: list[list[MeanNorm]] = [[] for _ in classes]
    reads: list[list[Read]] = [[] for _ in classes]
    for dim, norm in labels.norms:
        for place in _owned(home[root[dim]]):
            norms[place].append(norm)
    for dim, read in labels.reads:
        for place in _owned(home[root[dim]]):
            reads[place].append(read)
    return norms, reads


def _owned(places: Tensor) -> list[int]:
    """Without the -1 of classes that no tensor owns."""
    found: list[int] = torch.unique(places[places >= 0]).tolist()
    return found


def _work(labels: Labels, root: Tensor) -> Iterator[Work]:
    holders: dict[int, Owner] = {}
    for owner in labels.owners:
        holders.setdefault(int(root[owner.start]), owner)
    for product in labels.products:
        scales = []
        for dim in product.dims:
            holder = labels.owner(dim) or holders.get(int(root[dim[0]]))
            if holder is not None:
                scales.append((holder.tensor, holder.dim))
        if product.flops:
            yield Work(product.where, product.flops, tuple(scales))


def _visitors(labels: Labels, root: Tensor, groups: Sequence[UnitGroup]) -> dict[str, frozenset[str]]:
    leaders = {}
    first = {(owner.tensor, owner.dim): owner for owner in labels.owners}
    for group in groups:
        part = group.ranked[0]
        owner = first[part.fqn, part.dim]
        unit = next(i for i, u in enumerate(part.units(owner.size).tolist()) if u == 0)
        leaders[int(root[owner.start + unit])] = group.name
    leads = torch.zeros(labels.count, dtype=torch.bool)
    leads[list(leaders)] = True
    visitors: dict[str, set[str]] = defaultdict(set)
    for dim, module in labels.visits:
        found = root[dim]
        for one in found[leads[found]].tolist():
            visitors[leaders[one]].add(module)
    return {name: frozenset(modules) for name, modules in visitors.items()}
