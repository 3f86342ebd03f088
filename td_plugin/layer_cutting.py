"""Whole layers leave a model: the container closes the gap, and what counts layers counts anew."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from td_plugin.errors import TdError
from td_plugin.units import UnitGroup

_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers")


def remove_layers(model: nn.Module, group: UnitGroup, keep: Tensor) -> dict[str, str]:
    """Delete the layers that go, in place.

    Args:
        model: the one `group` was found in, or a copy.
        group: of kind ``"layers"``; its name is that of the container.
        keep: ``[kept]`` int64 indices of the units that stay, ascending.

    Returns:
        old fully qualified tensor name -> new one, for all that moved.

    Raises:
        TdError: the container is no `nn.ModuleList` or `nn.Sequential`.
    """
    gone = _places(group, set(range(group.units)) - set(keep.tolist()))
    return keep_places(
        model, group.name, [place for place in range(len(_container(model, group.name))) if place not in gone]
    )


def keep_places(model: nn.Module, path: str, stay: list[int]) -> dict[str, str]:
    """Leave only the layers at the places `stay` of the container at `path`, in place; else as `remove_layers`."""
    container = _container(model, path)
    before, renamed = len(container), {}
    for new, old in enumerate(stay):
        for module in container[old].modules():
            _renumber(module, old, new)
        if new != old:
            for name, _ in container[old].named_parameters(remove_duplicate=False):
                renamed[f"{path}.{old}.{name}"] = f"{path}.{new}.{name}"
    for place in sorted(set(range(before)) - set(stay), reverse=True):
        del container[place]
    _count(model, path, before, stay)
    return renamed


def _container(model: nn.Module, path: str) -> nn.ModuleList | nn.Sequential:
    container = model.get_submodule(path)
    if not isinstance(container, (nn.ModuleList, nn.Sequential)):
        raise TdError("layers can only leave a ModuleList or Sequential", where=path, got=type(container).__name__)
    return container


def _places(group: UnitGroup, units: set[int]) -> set[int]:
    """The places in the container of the layers `units`."""
    depth = len(group.name.split(".")) if group.name else 0
    return {int(part.module.split(".")[depth]) for part in group.ranked if part.owners[0] in units}


def _renumber(module: nn.Module, old: int, new: int) -> None:
    if vars(module).get("layer_idx") == old:
        module.layer_idx = new  # type: ignore[assignment]


def _count(model: nn.Module, path: str, before: int, stay: list[int]) -> None:
    """State the new number of layers in the configuration of the innermost module around the container."""
    parts = path.split(".")
    owners = [vars(model.get_submodule(".".join(parts[:level]))) for level in range(len(parts), -1, -1)]
    config: Any = next((owner["config"] for owner in owners if "config" in owner), None)
    if config is None:
        return
    side = next((side for side in ("encoder", "decoder") if side in parts), "")
    stated = vars(config)
    for name in _COUNTS:
        other_side = side and name in ("encoder_layers", "decoder_layers") and not name.startswith(side)
        if stated.get(name) == before and not other_side:
            setattr(config, name, len(stay))
    types = stated.get("layer_types")
    if isinstance(types, list) and len(types) == before:
        config.layer_types = [types[place] for place in stay]
