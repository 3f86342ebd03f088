"""Checkpoints of modules that transformers cannot build: ``model.safetensors`` and a record of widths and shapes.

Loading cuts a copy of the dense module to the recorded widths, then loads strictly. The record, ``td_pruning.json``::

    {"format": 1, "class": "Sequential", "widths": {"0": 48}, "tensors": {"0.weight": [48, 64], ...}}
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from td_plugin.errors import TdError
from td_plugin.export.shrink import cut
from td_plugin.parametrization import bake
from td_plugin.structure import unit_groups

RECORD = "td_pruning.json"
AGAIN = "save the model again"
_WEIGHTS, _FORMAT = "model.safetensors", 1


def save_module(model: nn.Module, stage: Path) -> None:
    """Write weights and record of `model` into the folder `stage`."""
    record = {
        "format": _FORMAT,
        "class": type(model).__name__,
        "widths": {group.name: group.units for group in unit_groups(model)},
        "tensors": _shapes(model),
    }
    _safetensors().save_model(model, str(stage / _WEIGHTS))
    (stage / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def load_module(path: Path, dense: nn.Module | None) -> nn.Module:
    """A copy of `dense`, cut to what the checkpoint in `path` records and loaded from it, in evaluation mode.

    Raises:
        TdError: no dense module, one of another architecture, or a damaged checkpoint.
    """
    if dense is None:
        fix = "load_pretrained(directory, module=the_dense_module)"
        raise TdError("a checkpoint of an ordinary module needs the dense module", where=str(path), fix=fix)
    record = read_json(path / RECORD)
    widths, tensors = record.get("widths"), record.get("tensors")
    if record.get("format") != _FORMAT or not isinstance(widths, dict) or not isinstance(tensors, dict):
        raise TdError("unknown or damaged record", where=str(path / RECORD), got=record.get("format"), fix=AGAIN)
    if record.get("class") != type(dense).__name__:
        raise other_architecture(path, expected=type(dense).__name__, got=record.get("class"))
    small = copy.deepcopy(dense)
    bake(small)
    for group in unit_groups(small):
        width = widths.get(group.name)
        if type(width) is int and 1 <= width < group.units:
            cut(small, group, torch.arange(width))
    _add_biases(small, tensors)
    shapes = _shapes(small)
    for name in sorted(shapes.keys() | tensors.keys()):
        if shapes.get(name) != tensors.get(name):
            got = f"{name} is {tensors.get(name)} in the checkpoint and {shapes.get(name)} in the module"
            raise other_architecture(path, expected="the module", got=got)
    _load_tensors(small, path / _WEIGHTS)
    return small.eval()


def _shapes(model: nn.Module) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


def _add_biases(model: nn.Module, tensors: Mapping[str, Any]) -> None:
    """Give layers without a bias the one that folding made, where the checkpoint has it."""
    for name, layer in model.named_modules():
        if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d)) and layer.bias is None and f"{name}.bias" in tensors:
            layer.bias = nn.Parameter(layer.weight.new_zeros(layer.weight.shape[0]))


def _load_tensors(model: nn.Module, file: Path) -> None:
    tensors = _safetensors()
    from safetensors import SafetensorError

    state = model.state_dict(keep_vars=True)
    try:
        for name, stored in tensors.load_file(str(file)).items():
            if name in state:
                state[name].data = state[name].data.to(stored.dtype)  # the checkpoint's precision, bit for bit
        tensors.load_model(model, str(file), strict=True)
    except (SafetensorError, OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise TdError("the weights cannot be loaded", where=str(file), got=reason, fix=AGAIN) from error


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise TdError("safetensors is not installed", fix="pip install 'td-plugin[hf]'") from error
    return safetensors.torch


def other_architecture(path: Path, *, expected: str, got: object) -> TdError:
    """The error for a checkpoint that was not made from what the caller has."""
    fix = "give the module the checkpoint was made from"
    return TdError(f"the checkpoint does not fit {expected}", where=str(path), got=got, fix=fix)


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in `file`.

    Raises:
        TdError: the file cannot be read or holds something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TdError("the file cannot be read", where=str(file), got=error, fix=AGAIN) from error
    if not isinstance(content, dict):
        raise TdError("the file is not a JSON object", where=str(file), got=type(content).__name__, fix=AGAIN)
    return content
