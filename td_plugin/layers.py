"""Units of layers that are known beforehand: the families of the table, and neighbours in an `nn.Sequential`.

A chain is read from the container alone: a model that taps the middle of its own `nn.Sequential`, or feeds its output
anywhere but to the next layer, computes something else than the container says and must not be pruned by units.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from operator import attrgetter

from torch import nn

from td_plugin.chains import Link, layer_fault, links
from td_plugin.families import FAMILIES, Heads, Neurons
from td_plugin.units import Residue, Setting, Size, Slice, UnitGroup

Found = tuple[str, UnitGroup | str]
"""The name of a layer with its group, or with the reason why its units are refused."""


def in_table(model: nn.Module) -> bool:
    """Whether any layer of `model` stands in the table of families."""
    return next(_in_families(model), None) is not None


def read_layers(model: nn.Module) -> list[Found]:
    """What the table of families and `nn.Sequential` chains say of `model`, layer by layer."""
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
