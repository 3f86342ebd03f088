"""Which dimensions of which parameters live and die together.

A *unit* (a neuron, a convolution channel, an attention head) is a slice of several tensors: the rows that compute it,
its biases and norm parameters, and the columns that read it. `unit_groups` finds the units of a model: in transformer
layers by the table in `td_plugin.families`, in `nn.Sequential` chains by what stands between two layers. A unit is
*silenced* by zeroing its ranked and carried slices; what it then still emits is constant (`Residue`), so it can be
removed exactly.

A chain is read from the container alone: a model that taps the middle of its own `nn.Sequential`, or feeds its output
anywhere but to the next layer, computes something else than the container says and must not be pruned by units.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from operator import attrgetter
from typing import Literal

from torch import nn

from td_plugin.chains import Link, layer_fault, links
from td_plugin.families import FAMILIES, Heads, Neurons


@dataclass(frozen=True)
class Slice:
    """One dimension of one tensor, divided among the units.

    Attributes:
        module: fully qualified module name.
        tensor: ``"weight"``, ``"bias"``, ``"running_mean"``...
        dim: the dimension that the units occupy.
        span: consecutive entries per unit: head size for heads, spatial size behind a flatten.
    """

    module: str
    tensor: str
    dim: int
    span: int = 1

    @property
    def fqn(self) -> str:
        """The fully qualified tensor name."""
        return f"{self.module}.{self.tensor}" if self.module else self.tensor


@dataclass(frozen=True)
class Size:
    """A module attribute that states a width: `per_unit` for each unit."""

    module: str
    attribute: str
    per_unit: int = 1


@dataclass(frozen=True)
class Residue:
    """What a silenced unit still emits: the bias of `module` (zero if silenced too), passed through `through`.

    Attributes:
        module: the layer whose output the consumers read: the ranked layer, the value projection of heads.
        through: elementwise activations and norms behind it, in order.
        unfoldable: why a non-zero constant cannot move into the consumer's bias; empty if it can.
    """

    module: str
    through: tuple[str, ...] = ()
    unfoldable: str = ""


@dataclass(frozen=True)
class Setting:
    """Where a model's configuration states the width: `key` of its `layer`-th layer, and `size_key` for the span."""

    layer: int
    key: str
    size_key: str = ""


@dataclass(frozen=True)
class UnitGroup:
    """The units of one layer and every slice that belongs to them.

    Attributes:
        name: fully qualified name of the layer whose units these are.
        kind: what a unit is.
        units: how many there are.
        ranked: weights whose rows make a unit; their norm ranks it.
        carried: parameters silenced with the unit but never ranked: biases, norm scale and shift.
        consumers: weights whose columns read the units.
        statistics: buffers that are cut with the units: running mean and variance.
        sizes: module attributes that state the width.
        residue: the constant that a silenced unit still emits.
        setting: the width in the model's configuration, for the families of `td_plugin.families`.
    """

    name: str
    kind: Literal["neurons", "heads", "channels"]
    units: int
    ranked: tuple[Slice, ...]
    carried: tuple[Slice, ...]
    consumers: tuple[Slice, ...]
    statistics: tuple[Slice, ...]
    sizes: tuple[Size, ...]
    residue: Residue
    setting: Setting | None = None

    @property
    def slices(self) -> tuple[Slice, ...]:
        """Every slice that shrinks with the number of units."""
        return self.ranked + self.carried + self.consumers + self.statistics


def unit_groups(model: nn.Module) -> list[UnitGroup]:
    """The removable units of `model`, group by group in the order the model computes them; [] if none are known."""
    return [found for _, found in _survey(model) if isinstance(found, UnitGroup)]


def refused_groups(model: nn.Module) -> dict[str, str]:
    """Layers whose units look removable but are not: fully qualified layer name -> reason."""
    return {name: found for name, found in _survey(model) if isinstance(found, str)}


Found = tuple[str, UnitGroup | str]
"""The name of a layer with its group, or with the reason why its units are refused."""


def _survey(model: nn.Module) -> list[Found]:
    tensors = dict(chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)))
    uses = Counter(id(tensor) for tensor in tensors.values())

    def checked(found: UnitGroup | str) -> UnitGroup | str:
        for part in found.slices if isinstance(found, UnitGroup) else ():
            if part.fqn not in tensors:
                return f"{part.fqn} is not a plain tensor of its module"
            if uses[id(tensors[part.fqn])] > 1:
                return f"{part.fqn} is shared with another module"
        return found

    return [(name, checked(found)) for name, found in chain(_in_families(model), _in_chains(model))]


def _in_families(model: nn.Module) -> Iterator[Found]:
    layers = 0
    for prefix, module in model.named_modules():
        # By ancestry: sharding and checkpointing wrappers swap a layer's class for a subclass of it.
        family = next((FAMILIES[n] for n in map(_qualified_name, type(module).__mro__) if n in FAMILIES), None)
        if family is None:
            continue
        neurons, heads = family
        yield _neurons(model, f"{prefix}." if prefix else "", neurons, layers)
        yield _heads(model, f"{prefix}." if prefix else "", heads, layers)
        layers += 1


def _in_chains(model: nn.Module) -> Iterator[Found]:
    for name, link in links(model):
        yield name, link if isinstance(link, str) else _group(model, name, link)


def _qualified_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _neurons(model: nn.Module, prefix: str, row: Neurons, layer: int) -> Found:
    link = Link((prefix + row.up,), prefix + row.down, through=(prefix + row.activation,))
    return prefix + row.up, _group(model, prefix + row.up, link, Setting(layer, row.setting))


def _heads(model: nn.Module, prefix: str, row: Heads, layer: int) -> Found:
    name = prefix + row.attention
    size = int(attrgetter(f"{name}.{row.head_size}")(model))
    # Nothing in `through`: the attention weights of a query sum to one, so the value bias comes out as it is.
    link = Link(tuple(prefix + projection for projection in row.projections), prefix + row.output, rows=size, span=size)
    group = _group(model, name, link, Setting(layer, row.setting, row.size_setting))
    if isinstance(group, str):
        return name, group
    stated = (*(Size(name, count) for count in row.counts), *(Size(name, width, size) for width in row.widths))
    return name, replace(group, sizes=group.sizes + stated)


def _group(model: nn.Module, name: str, link: Link, setting: Setting | None = None) -> UnitGroup | str:
    for layer in (*link.producers, link.consumer):
        fault = layer_fault(model.get_submodule(layer))
        if fault:
            return f"{layer}: {fault}"
    first, rows = link.producers[0], link.rows
    linear = isinstance(model.get_submodule(first), nn.Linear)
    biases = tuple(Slice(layer, "bias", 0, rows) for layer in link.producers if "bias" in _parameters(model, layer))
    scales = tuple(Slice(norm, tensor, 0) for norm in link.norms for tensor in _parameters(model, norm))
    return UnitGroup(
        name=name,
        kind="heads" if len(link.producers) > 1 else "neurons" if linear else "channels",
        units=len(_parameters(model, first)["weight"]) // rows,
        ranked=tuple(Slice(layer, "weight", 0, rows) for layer in link.producers),
        carried=biases + scales,
        consumers=(Slice(link.consumer, "weight", 1, link.span),),
        statistics=tuple(Slice(norm, tensor, 0) for norm in link.norms for tensor in ("running_mean", "running_var")),
        sizes=(
            *(Size(layer, "out_features" if linear else "out_channels", rows) for layer in link.producers),
            *(Size(norm, "num_features") for norm in link.norms),
            Size(link.consumer, _inputs(model.get_submodule(link.consumer)), link.span),
        ),
        residue=Residue(link.producers[-1], link.through, link.unfoldable),
        setting=setting,
    )


def _parameters(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    return dict(model.get_submodule(name).named_parameters(recurse=False))


def _inputs(consumer: nn.Module) -> str:
    return "in_features" if isinstance(consumer, nn.Linear) else "in_channels"
