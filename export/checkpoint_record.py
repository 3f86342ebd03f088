"""What a checkpoint records of a model's sizes: the difference between the model and its dense form, from any source.

Nothing here knows an architecture: tensors, plain attributes and lists of modules are compared by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

import torch
from torch import nn

from td_plugin.export.resize import FORMAT, RecordError

Plain: TypeAlias = "int | float | bool | list[int] | None"
"""Attributes that can state a width; tuples are lists, as JSON has them."""

_MODES = {"training", "gradient_checkpointing"}  # how a model is run, not how large it is


@dataclass(frozen=True)
class Anatomy:
    """The sizes of a model, by fully qualified name.

    Attributes:
        modules: class name of every module but the root.
        lengths: number of entries of each list or chain of modules that is numbered.
        tensors: shapes of parameters and of buffers that checkpoints hold.
        unsaved: shapes of the other buffers.
        attributes: public attributes of a plain kind, except those that say how the model is run.
    """

    modules: dict[str, str]
    lengths: dict[str, int]
    tensors: dict[str, list[int]]
    unsaved: dict[str, list[int]]
    attributes: dict[str, Plain]


def anatomy(model: nn.Module) -> Anatomy:
    """The sizes of `model`. Tied tensors appear under each of their names."""
    modules: dict[str, str] = {}
    lengths: dict[str, int] = {}
    attributes: dict[str, Plain] = {}
    unsaved: set[str] = set()
    for name, module in model.named_modules():
        if name:
            modules[name] = type(module).__name__
        numbered = list(module._modules) == [str(index) for index in range(len(module._modules))]
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and numbered:
            lengths[name] = len(module)
        unsaved |= {_join(name, buffer) for buffer in module._non_persistent_buffers_set}
        attributes |= {_join(name, key): value for key, value in _plain_attributes(module).items()}
    tensors = {name: list(tensor.shape) for name, tensor in model.named_parameters(remove_duplicate=False)}
    tensors |= {name: list(tensor.shape) for name, tensor in model.named_buffers(remove_duplicate=False)}
    saved = {name: shape for name, shape in tensors.items() if name not in unsaved}
    return Anatomy(modules, lengths, saved, {name: tensors[name] for name in tensors if name in unsaved}, attributes)


def _join(module: str, name: str) -> str:
    return f"{module}.{name}" if module else name


def _plain_attributes(module: nn.Module) -> dict[str, Plain]:
    if isinstance(module, nn.modules.dropout._DropoutNd):  # its rate is a choice of training
        return {}
    found: dict[str, Plain] = {}
    for name, value in vars(module).items():
        if name.startswith("_") or name in _MODES:
            continue
        if type(value) in (tuple, list, torch.Size) and all(type(item) is int for item in value):
            found[name] = list(value)
        elif value is None or type(value) in (int, bool) or (type(value) is float and math.isfinite(value)):
            found[name] = value
    return found


def difference(dense: Anatomy, small: Anatomy) -> dict[str, Any]:
    """The record that `cut_to_record` needs to cut `dense` to `small`; only its format if they are equal.

    Raises:
        RecordError: `small` is not a smaller form of `dense`.
    """
    lengths = {name: n for name, n in small.lengths.items() if dense.lengths.get(name, n) != n}
    gone = (dense.modules.keys() | dense.tensors.keys()) - (small.modules.keys() | small.tensors.keys())
    removed: list[str] = []
    for name in sorted(gone, key=lambda name: (name.count("."), name)):
        parents = {name[: match.start()] for match in re.finditer(r"\.", name)}
        if not parents & set(removed) and not _is_truncated(name, lengths):
            removed.append(name)
    for name, kind in small.modules.items():
        if dense.modules.get(name) != kind:
            raise RecordError(f"{kind} where the dense model has {dense.modules.get(name, 'nothing')}", name)
    for name, shape in small.unsaved.items():
        if any(new < old for new, old in zip(shape, dense.unsaved.get(name, shape), strict=False)):
            raise RecordError("a buffer that checkpoints do not hold is cut", name)
    tensors = {name: shape for name, shape in small.tensors.items() if dense.tensors.get(name) != shape}
    attributes = {
        name: value
        for name, value in small.attributes.items()
        if name in dense.attributes and not _equal(dense.attributes[name], value)
    }
    parts = {"lengths": lengths, "removed": removed, "tensors": tensors, "attributes": attributes}
    return {"format": FORMAT, **{kind: part for kind, part in parts.items() if part}}


def _is_truncated(name: str, lengths: Mapping[str, int]) -> bool:
    """Whether `name` is or lies in an entry that a shortened list does not have."""
    for fqn, length in lengths.items():
        prefix = _join(fqn, "")
        index = name.removeprefix(prefix).partition(".")[0]
        if name.startswith(prefix) and index.isdigit() and int(index) >= length:
            return True
    return False


def _equal(one: Plain, other: Plain) -> bool:
    return type(one) is type(other) and one == other


def anatomy_from_json(content: Mapping[str, Any]) -> Anatomy:
    """The `Anatomy` that a file holds, checked for its form; the parts of an `Anatomy` are its keys.

    Raises:
        RecordError: a part is missing or of a wrong type.
    """
    for field in fields(Anatomy):
        part = content.get(field.name)
        if not isinstance(part, dict):
            raise RecordError("missing or of a wrong type", field.name)
        for name, value in part.items():
            if not _fits(field.name, value):
                raise RecordError(f"{value!r} is no value for it", f"{field.name}.{name}")
    return Anatomy(**{field.name: content[field.name] for field in fields(Anatomy)})


def _fits(part: str, value: object) -> bool:
    sizes = isinstance(value, list) and all(type(size) is int for size in value)
    if part == "modules":
        return isinstance(value, str)
    if part == "lengths":
        return type(value) is int and value >= 0
    if part == "attributes":
        return sizes or value is None or type(value) in (int, float, bool)
    return isinstance(value, list) and sizes and all(size >= 0 for size in value)
