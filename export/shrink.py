"""`shrink`: a physically smaller model that computes what the masked one does."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar, get_args

import torch
from torch import Tensor, nn

from td_plugin.cutting import cut, cut_all
from td_plugin.errors import TdError
from td_plugin.export.comparison import check_same, outputs_of
from td_plugin.export.constants import fold, measure
from td_plugin.export.modes import evaluating
from td_plugin.export.optimizer_state import carry_over
from td_plugin.export.removal import Removal, gone_entries, kept_units, plan, zero_units
from td_plugin.export.residue import fold_residue, refuse_carried
from td_plugin.given import given_structure
from td_plugin.layer_cutting import remove_layers
from td_plugin.model_inputs import model_inputs
from td_plugin.own_forward import unwrap
from td_plugin.parametrization import bake
from td_plugin.structure import survey
from td_plugin.units import Kind, Structure, UnitGroup
from td_plugin.widths import Rounding, runtime_width

__all__ = ["cut", "runtime_width", "shrink", "zero_units"]

Model = TypeVar("Model", bound=nn.Module)
Kept = dict[str, dict[int, Tensor]]
"""Fully qualified tensor name -> dimension -> the indices that stay."""


def shrink(
    model: Model,
    *,
    round_to: Rounding = None,
    floors: Mapping[str, int] | None = None,
    example_inputs: Mapping[str, Any] | None = None,
    groups: Sequence[UnitGroup] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> Model:
    """A smaller copy of `model` without the units whose weights are all zero; `model` itself is left as it was.

    Masks are baked first. A unit goes if all its ranked weight rows are exactly zero; the constant it still emits
    in evaluation (its bias, through norm and activation) moves into the bias of the layer that reads it. A traced
    model is run before and after, and must compute the same.

    Args:
        model: masked or squashed.
        round_to: widths are rounded up to multiples of it, by keeping some of the zero units; 1 removes all of them.
            None follows what onnxruntime gains from (`runtime_width`). Heads are never rounded.
        floors: kind -> how many units of every layer stay at least; 1 for kinds it does not name. A layer whose heads
            are all gone emits its constant.
        example_inputs: as the model is called, by name; needed for models that are neither of transformers nor plain
            `nn.Sequential` chains.
        groups: the units, where the caller knows better than `td_plugin.structure.survey`.
        optimizer: of `model`. It goes on with the smaller model's parameters and their part of its state.

    Returns:
        an ordinary module of the same classes, in the same mode, dtype and device; without the autocast that
        a Trainer has put on `model`.

    Raises:
        TdError: nothing can be removed (the reason is named), a unit emits a constant that cannot be folded, or the
            smaller model computes something else.

    Source: targeted dropout (arXiv 1905.13678) leaves the units zero; the folding is exact algebra.
    """
    _check(model, round_to, floors or {})
    small = copy.deepcopy(model)
    unwrap(small)
    bake(small)
    kept: Kept = {}
    taken = Taken(0, 0, {})
    for structure in _structures(small, example_inputs, groups):
        # Constants are those of evaluation: norms use their running statistics.
        with evaluating(small), torch.no_grad():
            take = _take_traced if structure.source == "graph" else _take_known
            taken = take(small, structure, round_to, floors or {}, kept)
        if taken.removed:
            break
    if not taken.removed:
        raise _nothing_removed(model, taken.zeros, structure)
    if optimizer is not None:
        names = {name for name, _ in model.named_parameters(remove_duplicate=False)}  # buffers have no moments
        carry_over(optimizer, model, small, {n: cut for n, cut in kept.items() if n in names}, taken.renamed)
    return small


def _check(model: nn.Module, round_to: Rounding, floors: Mapping[str, int]) -> None:
    multiples = round_to if isinstance(round_to, Mapping) else {}
    if min([round_to] if isinstance(round_to, int) else multiples.values(), default=1) < 1:
        raise TdError("widths are rounded to a positive multiple", where="round_to", got=round_to, fix="give 1 or more")
    for where, given in (("round_to", multiples), ("floors", floors)):
        if unknown := sorted(set(given) - set(get_args(Kind))):
            raise TdError("no such kind of units", where=where, got=unknown, fix=f"one of {get_args(Kind)}")
    if absent := next((name for name, tensor in model.named_parameters() if tensor.is_meta), None):
        raise TdError("the weights are not there", where=absent, got="a tensor on the meta device", fix="load them")


class Taken(NamedTuple):
    """Zero units found, units removed, and the tensors that have another name now."""

    zeros: int
    removed: int
    renamed: dict[str, str]


def _structures(
    model: nn.Module, example_inputs: Mapping[str, Any] | None, groups: Sequence[UnitGroup] | None
) -> Iterator[Structure]:
    """What may hold zero units: the table of families does not know the stream and whole layers, the graph does."""
    if groups is not None:
        yield given_structure(model, groups)
        return
    found = survey(model, example_inputs)
    yield found
    if found.source == "table" and model_inputs(model) is not None:
        with contextlib.suppress(TdError):  # a model that cannot be traced has no more to offer
            yield survey(model, example_inputs, source="graph")


def _take_traced(
    model: nn.Module, structure: Structure, round_to: Rounding, floors: Mapping[str, int], kept: Kept
) -> Taken:
    removal = plan(model, structure.groups, round_to, floors)
    if removal.removed == 0 or structure.program is None:
        return Taken(removal.zeros, 0, {})
    before = outputs_of(model, structure.program)
    gone = gone_entries(model, removal)
    names = {read.value for group, _ in removal.touched for read in group.reads}
    seen = measure(model, structure.program, names)
    for group, keep in removal.touched:
        if group.kind == "layers":
            refuse_carried(model, group, keep)
        fold(model, group, gone, seen)
    cut_all(model, [(group, keep) for group, keep in removal.touched if group.kind != "layers"])
    _note(kept, gone)
    renamed: dict[str, str] = {}
    for group, keep in removal.touched:
        renamed |= remove_layers(model, group, keep) if group.kind == "layers" else {}
    check_same(model, structure.program, before)
    return Taken(removal.zeros, removal.removed, renamed)


def _take_known(
    model: nn.Module, structure: Structure, round_to: Rounding, floors: Mapping[str, int], kept: Kept
) -> Taken:
    zeros, removed, groups = 0, 0, list(structure.groups)
    for index in range(len(groups)):  # in computing order: a cut may leave a unit of the next layer without weights
        group = groups[index]
        zero = zero_units(model, group)
        keep = kept_units(model, group, zero, round_to, floors.get(group.kind, 1))
        zeros, removed = zeros + int(zero.sum()), removed + group.units - len(keep)
        if len(keep) == group.units:
            continue
        made = fold_residue(model, group, keep)
        _note(kept, gone_entries(model, Removal({group: keep}, 0)))
        cut(model, group, keep)
        if made and structure.source != "given":
            groups = list(survey(model, source="known").groups)  # the new bias belongs to the units of a later group
    return Taken(zeros, removed, {})


def _note(kept: Kept, gone: Mapping[str, Mapping[int, Tensor]]) -> None:
    for name, dims in gone.items():
        for dim, mask in dims.items():
            kept.setdefault(name, {})[dim] = (~mask).nonzero().flatten()


_KNOWN = "give example_inputs, so that the model can be traced, or the groups themselves"


def _reasons(structure: Structure) -> str:
    return "; ".join(f"{group.name}: {group.reason}" for group in structure.fixed) or "no such layer"


def _nothing_removed(model: nn.Module, zeros: int, structure: Structure) -> TdError:
    where = type(model).__name__
    if not structure.groups:
        return TdError("no units of a known structure", where=where, got=_reasons(structure), fix=_KNOWN)
    if zeros:
        fix = "pass round_to=1, or prune more"
        return TdError("rounding up keeps every zero unit", where=where, got=f"{zeros} zero units", fix=fix)
    fix = "train with a unit recipe and squash; a model that is already shrunk stays as it is"
    refused = _reasons(structure) if structure.fixed else None
    return TdError("no unit is zero, nothing to remove", where=where, got=refused, fix=fix)
