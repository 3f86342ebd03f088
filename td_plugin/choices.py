"""What a target is made of: which tensors are ranked, masked, or only evidence, and that none is masked twice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from td_plugin.contract import Recipe
from td_plugin.errors import TdError
from td_plugin.packed import packed
from td_plugin.units import Slice, UnitGroup


@dataclass(frozen=True)
class Choice:
    """One target to be.

    Attributes:
        ranked: slices to rank.
        carried: slices silenced with them.
        overrides: the user's γ and α for it.
        removable: whether `shrink` knows the layers that read the units; not for single weights.
        evidence: slices that are ranked too but not silenced: what reads the units.
        kind: of the units; empty for single weights.
        readers: what reads the units, whether it is evidence or not.
    """

    ranked: tuple[Slice, ...]
    carried: tuple[Slice, ...] = ()
    overrides: dict[str, Any] = field(default_factory=dict)
    removable: bool = True
    evidence: tuple[Slice, ...] = ()
    kind: str = ""
    readers: tuple[Slice, ...] = ()

    @property
    def slices(self) -> tuple[Slice, ...]:
        """What is masked, ranked ones first."""
        return self.ranked + self.carried


def parameter_of(model: nn.Module, slice_: Slice) -> nn.Parameter | None:
    """The dense parameter of a slice; None where the module computes the tensor or holds a buffer."""
    return model.get_submodule(slice_.module)._parameters.get(slice_.tensor)


def mask_fault(model: nn.Module, group: UnitGroup) -> str:
    """Why the units of `group` cannot be masked; empty if they can."""
    for part in group.ranked + group.carried:
        parameter = parameter_of(model, part)
        if parameter is None:
            return f"{part.fqn} belongs to its units and is no parameter"
        if reason := packed(parameter):
            return f"{part.fqn} belongs to its units and is {reason}"
    return ""


def units_of(model: nn.Module, recipe: Recipe, group: UnitGroup, overrides: dict[str, Any] | None = None) -> Choice:
    """The target that drops the units of `group`; a tied parameter counts once, whatever its names."""
    seen: set[tuple[object, ...]] = set()

    def fresh(parts: tuple[Slice, ...]) -> tuple[Slice, ...]:
        keys = [(id(parameter_of(model, part)), part.dim, part.span, part.owners) for part in parts]
        kept = tuple(part for i, part in enumerate(parts) if keys[i] not in seen and keys[i] not in keys[:i])
        seen.update(keys)
        return kept

    ranked, carried = fresh(group.ranked), fresh(group.carried)
    reads = group.consumers if recipe.granularity.members == "all" else ()
    evidence = fresh(tuple(part for part in reads if parameter_of(model, part) is not None))
    return Choice(ranked, carried, overrides or {}, evidence=evidence, kind=group.kind, readers=group.consumers)


def whole_layer(name: str, module: nn.Module, dim: int) -> Choice:
    """Every output of one layer as a unit: weight row and bias."""
    bias = (Slice(name, "bias", 0),) if module._parameters.get("bias") is not None else ()
    return Choice((Slice(name, "weight", dim),), bias, removable=False, kind="neurons")


def in_short(skipped: dict[str, str], most: int = 8) -> str:
    """Why tensors are left alone, every reason once, with the first tensor that has it."""
    names: dict[str, list[str]] = {}
    for name, reason in skipped.items():
        names.setdefault(reason, []).append(name)
    lines = ((f"{first} and {len(more)} more" if more else first, why) for why, (first, *more) in names.items())
    return "; ".join(f"{which}: {why}" for which, why in list(lines)[:most])


def check_once(model: nn.Module, choices: Sequence[Choice]) -> None:
    """No entry of a parameter may be masked twice.

    Raises:
        TdError: one would.
    """
    taken: dict[int, list[tuple[Choice, Slice]]] = {}
    for choice in choices:
        for part in choice.slices:
            before = taken.setdefault(id(parameter_of(model, part)), [])
            for other in (first for first, earlier in before if not _apart(earlier, part)):
                got, fix = None, "name every tensor, or every unit, once"
                if other.kind != choice.kind:
                    mine, theirs = (
                        f"the {choice.kind} of {choice.ranked[0].fqn}",
                        f"the {other.kind} of {other.ranked[0].fqn}",
                    )
                    got = f"by {theirs} and by {mine}"
                    fix = f"one recipe for one kind: kinds=({other.kind!r},) or kinds=({choice.kind!r},)"
                raise TdError("a tensor is asked for twice", where=part.fqn, got=got, fix=fix)
            before.append((choice, part))


def _apart(one: Slice, other: Slice) -> bool:
    """Whether two groups own different entries of one tensor, as those behind a concatenation do."""
    both = zip(one.owners, other.owners, strict=False)
    return one.dim == other.dim and bool(one.owners and other.owners) and all(a < 0 or b < 0 for a, b in both)
