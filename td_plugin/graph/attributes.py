"""Which attributes of a model's modules must change with its units, found by rules and by trying.

Torch's own modules are known (`td_plugin.graph.widths`). For all others, every plain integer whose value is a multiple
of the number of units that a slice of the group has per unit is a candidate. A skeleton of the model without weights
is cut, candidates are lowered, and its forward is run: it must come to its end, with outputs of the same shapes, and
multiply and compare with the same numbers as before.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from td_plugin.cutting import alignment, cut_all, tensor_places
from td_plugin.graph.names import is_likely, is_unit_size
from td_plugin.graph.search import Key, search
from td_plugin.graph.trial import Observed, difference, observe, skeleton
from td_plugin.graph.widths import per_unit, ruled, stated
from td_plugin.units import Size, UnitGroup

MOST_TRIALS = 240
"""Forwards of the skeleton in one call of `with_sizes`."""

TRIALS_PER_SIGNATURE = 12

Claim = tuple[int, str, int | None]
"""id of a module, an attribute, an index in it."""


@dataclass(frozen=True)
class _Bench:
    """What a trial needs.

    Attributes:
        model: the skeleton, never changed.
        run: a forward.
        dense: what `run` of `model` looks like.
        names: id of each module of `model` -> its first name.
    """

    model: nn.Module
    run: Callable[[nn.Module], Any]
    dense: Observed
    names: Mapping[int, str]

    def fault(self, groups: Sequence[UnitGroup]) -> str:
        """Why the skeleton does not work without some units of each of `groups`; empty if it does."""
        small = skeleton(self.model)
        try:
            # Layers lose different numbers of units, so that an attribute of one layer does not fit another.
            keeps = [torch.arange(_kept(g.units, i, alignment(small, g))) for i, g in enumerate(groups)]
            cut_all(small, zip(groups, keeps, strict=True))
        except (RuntimeError, TypeError, ValueError) as error:
            return str(error)
        return difference(self.dense, observe(self.run, small))


def with_sizes(
    model: nn.Module,
    groups: Sequence[UnitGroup],
    owners: Mapping[str, frozenset[str]],
    run: Callable[[nn.Module], Any],
) -> list[UnitGroup | str]:
    """Fill in the `sizes` of `groups`; in place of a group that cannot be cut stands the reason, in words.

    Groups that differ in the numbers of their names alone are tried together.

    Args:
        model: on any device; it is neither run nor changed.
        groups: of one survey, without sizes.
        owners: name of a group -> fully qualified names of the modules whose forward handles its dimension.
        run: a forward of a model on the meta device, such as `td_plugin.graph.trial.meta_run` makes; it raises where
            shapes do not fit.
    """
    bench = _bench(model, run)
    if bench.dense.error:
        return [f"its forward does not run without weights: {bench.dense.error}"] * len(groups)
    by_signature: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for index, group in enumerate(groups):
        by_signature[_signature(bench.model, group, owners)].append(index)
    allowance = min(TRIALS_PER_SIGNATURE, MOST_TRIALS // max(1, len(by_signature)))
    found: dict[int, UnitGroup | str] = {}
    taken: set[Claim] = set()
    for indices in sorted(by_signature.values(), key=lambda indices: groups[indices[0]].kind == "hidden"):
        several = [groups[index] for index in indices]
        solved = _solve(bench, several, owners, taken, allowance)
        found.update(zip(indices, solved, strict=True))
        sizes = (size for group in solved if isinstance(group, UnitGroup) for size in group.sizes)
        taken.update((id(bench.model.get_submodule(s.module)), s.attribute, s.index) for s in sizes)
    return [found[index] for index in range(len(groups))]


def _bench(model: nn.Module, run: Callable[[nn.Module], Any]) -> _Bench:
    bare = skeleton(model)
    return _Bench(bare, run, observe(run, bare), {id(module): name for name, module in bare.named_modules()})


def _kept(units: int, index: int, multiple: int) -> int:
    """How many units of the `index`-th group stay in a trial: one less than all, two less, and so on."""
    keep = units - 1 - index % max(1, units - 1)
    return keep - keep % multiple if keep >= multiple else keep


def _signature(model: nn.Module, group: UnitGroup, owners: Mapping[str, frozenset[str]]) -> tuple[Any, ...]:
    classes = sorted({type(model.get_submodule(name)).__name__ for name in owners.get(group.name, ())})
    return re.sub(r"\d+", "#", group.name), group.kind, *classes


def _solve(
    bench: _Bench,
    groups: Sequence[UnitGroup],
    owners: Mapping[str, frozenset[str]],
    taken: set[Claim],
    allowance: int,
) -> list[UnitGroup | str]:
    """`groups` of one signature, with sizes or the reason."""
    known: dict[int, UnitGroup | str] = {i: _by_rules(bench, group) for i, group in enumerate(groups)}
    alive = {i: group for i, group in known.items() if isinstance(group, UnitGroup) and group.units > 1}
    if not alive:
        return list(known.values())
    if not allowance:
        return [f"trying its kind would take more than {MOST_TRIALS} forwards"] * len(groups)
    likely, others = _candidates(bench, alive, owners, taken)
    offers = {**likely, **others}

    def chosen(keys: frozenset[Key]) -> dict[int, UnitGroup]:
        sizes = {i: tuple(s for key in offers if key in keys for s in offers[key].get(i, ())) for i in alive}
        return {i: replace(group, sizes=_distinct(bench, group.sizes + sizes[i])) for i, group in alive.items()}

    def fault(keys: frozenset[Key]) -> str:
        return bench.fault([replace(group, norms=()) for group in chosen(keys).values()])  # their epsilon may change

    keys = search(list(likely), list(others), fault, allowance)
    known |= dict.fromkeys(alive, keys) if isinstance(keys, str) else chosen(keys)
    return list(known.values())


def _by_rules(bench: _Bench, group: UnitGroup) -> UnitGroup | str:
    """With the sizes that torch's own modules state; tied tensors speak for every module that holds them."""
    sizes: list[Size] = []
    places = tensor_places(bench.model)
    try:
        for part in group.slices:
            for module, tensor in places[id(attrgetter(part.fqn)(bench.model))]:
                name = bench.names[id(module)]
                sizes += stated(module, name, group, replace(part, module=name, tensor=tensor))
    except ValueError as error:
        return str(error)
    for norm in group.norms:
        if "weight" not in dict(bench.model.get_submodule(norm.module).named_parameters(recurse=False)):
            return f"{norm.module} divides by a mean over the units, and has no weight to make up for fewer of them"
    return replace(group, sizes=_distinct(bench, tuple(sizes)))


def _distinct(bench: _Bench, sizes: Sequence[Size]) -> tuple[Size, ...]:
    """Each attribute once, however many names its module has."""
    found: dict[Claim, Size] = {}
    for size in sizes:
        if size.per_unit:
            found.setdefault((id(bench.model.get_submodule(size.module)), size.attribute, size.index), size)
    return tuple(found.values())


Offers = dict[Key, dict[int, list[Size]]]
"""Attribute of a class -> index of a group -> what would change for it."""


def _candidates(
    bench: _Bench, groups: Mapping[int, UnitGroup], owners: Mapping[str, frozenset[str]], taken: set[Claim]
) -> tuple[Offers, Offers]:
    """Attributes that probably state the width, by their names and modules, and those that only might.

    An attribute that several groups would lower belongs to none of them.
    """
    claims: dict[Claim, list[tuple[Key, int, Size, bool]]] = defaultdict(list)
    for i, group in groups.items():
        shares = _shares(bench.model, group)
        widths, counts = {1, *shares}, {n for share in shares for n in range(1, share + 1) if share % n == 0}
        scope = _common(group)
        for name in sorted({*owners.get(group.name, ()), *(part.module for part in group.slices)}):
            module = bench.model.get_submodule(name)
            inside = name == scope or name.startswith(f"{scope}." if scope else "")
            for attribute, index, value in () if ruled(module) else _integers(module):
                factor, rest = divmod(value, group.units)
                factors = counts if "head" in attribute else widths  # several query heads may belong to a unit
                if value <= 0 or rest or factor not in factors or is_unit_size(attribute):
                    continue
                claim = (id(module), attribute, index)
                likely = inside and claim not in taken and is_likely(attribute, group.kind, len(shares) == 1)
                key = Key(type(module).__name__, attribute, index, factor)
                claims[claim].append((key, i, Size(name, attribute, factor, index), likely))
    offers: tuple[Offers, Offers] = {}, {}
    for offered in claims.values():
        if len({i for _, i, _, _ in offered}) == 1:
            key, i, size, likely = offered[0]
            offers[not likely].setdefault(key, {}).setdefault(i, []).append(size)
    return offers


def _shares(model: nn.Module, group: UnitGroup) -> frozenset[int]:
    """The numbers of entries that a unit has in its tensors."""
    tensors = ((part, attrgetter(part.fqn)(model)) for part in group.slices)
    return frozenset(per_unit(group, part, tensor.shape[part.dim]) for part, tensor in tensors)


def _common(group: UnitGroup) -> str:
    """The innermost module around all modules whose tensors the group slices."""
    first, *others = ([*part.module.split(".")] for part in group.slices)
    for other in others:
        same = [i for i, (one, two) in enumerate(zip(first, other, strict=False)) if one != two]
        first = first[: min(same[0] if same else len(first), len(other))]
    return ".".join(first)


def _integers(module: nn.Module) -> Iterator[tuple[str, int | None, int]]:
    """Plain integers of a module, those in tuples too: attribute, index, value."""
    for attribute, value in vars(module).items():
        if isinstance(value, int) and not isinstance(value, bool):
            yield attribute, None, value
        elif isinstance(value, tuple):
            yield from ((attribute, i, entry) for i, entry in enumerate(value) if type(entry) is int)
