"""`channel_prune`: units removed from a trained model layer by layer, and the layers behind them made to fit again."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from torch import nn

from td_plugin.contract import check_fraction
from td_plugin.errors import TdError
from td_plugin.export.activations import Batch, Sampling, reader_fault, sample, sampling
from td_plugin.export.progress import bar
from td_plugin.export.reconstruction import LayerError, samples_of, treat
from td_plugin.export.shrink import shrink
from td_plugin.given import given_structure, nearest
from td_plugin.own_forward import unwrap
from td_plugin.parametrization import bake
from td_plugin.report import table
from td_plugin.structure import survey
from td_plugin.units import Structure, UnitGroup
from td_plugin.widths import Rounding, rounded_width

Model = TypeVar("Model", bound=nn.Module)
_KINDS = ("channels", "neurons", "heads")


@dataclass(frozen=True)
class ChannelPruning:
    """A model whose units are silent, not yet removed; `str()` is a table.

    Attributes:
        model: of the dense widths; `shrink` removes the silent units.
        layers: in the order they were treated.
        skipped: layers left as they are, with the reason.
    """

    model: nn.Module
    layers: tuple[LayerError, ...]
    skipped: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: all but the model."""
        return {"layers": [asdict(row) for row in self.layers], "skipped": dict(self.skipped)}

    def __str__(self) -> str:
        header = ("layer", "kind", "left", "rows", "error, only removed", "reconstructed", "chosen by")
        cells = [
            (
                r.name,
                r.kind,
                f"{r.kept}/{r.units}",
                str(r.rows),
                f"{r.removed:.4g}",
                f"{r.reconstructed:.4g}",
                r.chosen_by,
            )
            for r in self.layers
        ]
        return "\n".join([table(header, cells), *(f"{name}: {why}" for name, why in self.skipped.items())])


def channel_prune(  # noqa: PLR0913 - all but the first three are options, by name only
    model: Model,
    batches: Iterable[Batch],
    sparsity_level: float | Mapping[str, float] = 0.5,
    *,
    kinds: tuple[str, ...] = ("channels", "neurons"),
    samples: int = 5000,
    seed: int = 0,
    round_to: Rounding = None,
    example_inputs: Mapping[str, Any] | None = None,
    groups: Sequence[UnitGroup] | None = None,
    progress: bool = False,
) -> Model:
    """A smaller copy of a trained model: LASSO chooses the units, least squares mend the layers that read them.

    No training and no labels: layer by layer in computing order, the units whose absence the next layer can best make
    up for are removed, and its weights (and bias) are fitted to what it computed in the dense model, from what it reads
    in the model pruned so far. Fine-tuning afterwards is worth its while.

    Args:
        model: trained; it stays as it is, masks of another method are baked in the copy.
        batches: some hundred rows of the training data, as the model is called: dicts by name, or single tensors.
        sparsity_level: γ in [0, 1): the share of units that goes, ``int(γ·units)`` of every layer; or γ by the name of
            the layer, others stay.
        kinds: of ``"channels"``, ``"neurons"`` and ``"heads"``.
        samples: rows of activations per layer, taken at random places of all batches.
        seed: of the places.
        round_to: as for `shrink`; rounding up keeps the next units, not silent ones.
        example_inputs: for `td_plugin.structure.survey`; the first batch where batches are dicts.
        groups: the units, where the caller knows better.
        progress: show a bar on the terminal.

    Returns:
        an ordinary module of the same classes, in the same mode, dtype and device. `reconstruct_channels` takes the
        same arguments and returns the errors of every layer, with the model before it is shrunk.

    Raises:
        TdError: no batches, NaN in them or in activations, scikit-learn is missing, no units of these kinds whose
            readers are Linear or ungrouped convolution layers, nothing to remove at this γ, all that `shrink` refuses.

    Source: He, Zhang & Sun, "Channel Pruning for Accelerating Very Deep Neural Networks", arXiv 1707.06168, section 3.
    """
    plan = sampling(batches, samples, seed)
    inputs = _example(plan, example_inputs)
    done = _reconstruct(model, plan, _Wish(sparsity_level, kinds, round_to), _Known(inputs, groups), progress)
    small: Model = shrink(done.model, round_to=round_to, example_inputs=inputs, groups=groups)  # type: ignore[assignment]
    return small


def reconstruct_channels(  # noqa: PLR0913 - as `channel_prune`
    model: nn.Module,
    batches: Iterable[Batch],
    sparsity_level: float | Mapping[str, float] = 0.5,
    *,
    kinds: tuple[str, ...] = ("channels", "neurons"),
    samples: int = 5000,
    seed: int = 0,
    round_to: Rounding = None,
    example_inputs: Mapping[str, Any] | None = None,
    groups: Sequence[UnitGroup] | None = None,
    progress: bool = False,
) -> ChannelPruning:
    """What `channel_prune` does before it shrinks: a copy whose units are silent, and the errors of every layer.

    Arguments and errors are those of `channel_prune`.
    """
    plan = sampling(batches, samples, seed)
    known = _Known(_example(plan, example_inputs), groups)
    return _reconstruct(model, plan, _Wish(sparsity_level, kinds, round_to), known, progress)


@dataclass(frozen=True)
class _Wish:
    """How much of what is to go."""

    sparsity_level: float | Mapping[str, float]
    kinds: tuple[str, ...]
    round_to: Rounding

    def check(self, names: Sequence[str]) -> None:
        if unknown := sorted(set(self.kinds) - set(_KINDS)):
            raise TdError("units that no layer's input can be told apart by", got=unknown, fix=f"of {_KINDS}")
        if not isinstance(self.sparsity_level, Mapping):
            check_fraction(self.sparsity_level, "sparsity_level (γ)")
            return
        for name, level in self.sparsity_level.items():
            if name not in names:
                raise TdError("no units of that name", where=name, fix=nearest(name, names))
            check_fraction(level, "sparsity_level (γ)", where=name)

    def width(self, group: UnitGroup) -> int:
        level = self.sparsity_level
        share = level.get(group.name, 0.0) if isinstance(level, Mapping) else level
        return max(1, rounded_width(group.kind, group.units - int(share * group.units), group.units, self.round_to))


@dataclass(frozen=True)
class _Known:
    """What the caller says of the structure."""

    inputs: Mapping[str, Any] | None
    groups: Sequence[UnitGroup] | None

    def structure(self, model: nn.Module) -> Structure:
        return survey(model, self.inputs) if self.groups is None else given_structure(model, self.groups)


def _example(plan: Sampling, given: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    first = plan.batches[0]
    return first if given is None and isinstance(first, Mapping) else given


def _reconstruct(model: nn.Module, plan: Sampling, wish: _Wish, known: _Known, progress: bool) -> ChannelPruning:
    pruned = copy.deepcopy(model)
    unwrap(pruned)
    bake(pruned)
    structure = known.structure(pruned)
    groups = [group for group in structure.groups if group.kind in wish.kinds]
    wish.check([group.name for group in groups])
    skipped = {group.name: group.reason for group in structure.fixed}
    skipped |= {group.name: fault for group in groups if (fault := _fault(pruned, group, wish))}
    names = list(dict.fromkeys(p.module for g in groups if g.name not in skipped for p in g.consumers))
    targets = sample(pruned, names, plan, "outputs")
    for group in groups:
        if lost := [p.module for p in group.consumers if p.module not in targets and group.name not in skipped]:
            skipped[group.name] = f"{lost[0]} is not called as a module, so what it reads cannot be seen"
    left, rows = [group for group in groups if group.name not in skipped], []
    if not left:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(skipped.items())[:8]) or "no such units"
        raise TdError("nothing to remove", where=type(model).__name__, got=reasons, fix="a larger γ, or round_to=1")
    with bar("channel pruning", len(left), progress) as steps:
        for group in left:
            inputs = sample(pruned, [part.module for part in group.consumers], plan, "inputs")
            readers = [samples_of(pruned, part, inputs[part.module], targets[part.module]) for part in group.consumers]
            rows.append(treat(pruned, group, wish.width(group), readers))
            steps.advance()
    return ChannelPruning(pruned, tuple(rows), skipped)


def _fault(model: nn.Module, group: UnitGroup, wish: _Wish) -> str:
    """Why the units of `group` stay; empty if they are to be pruned."""
    if wish.width(group) >= group.units:
        return f"γ and rounding leave all of its {group.units} {group.kind}"
    modules = [part.module for part in group.consumers]
    if not modules:
        return "no layer reads its units"
    if len(set(modules)) < len(modules) or not set(modules).isdisjoint(part.module for part in group.ranked):
        return "a layer reads its units twice, or computes them too"
    for part in group.consumers:
        fault = reader_fault(model.get_submodule(part.module))
        if fault or part.tensor != "weight":
            return f"{part.fqn} reads them: {fault or 'it is no plain weight'}"
    return ""
