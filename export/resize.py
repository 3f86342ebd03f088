"""Cut a freshly built model to the sizes that a record states.

Imports torch only: `save_pretrained(..., auto_map=True)` copies this file into the checkpoint, so that it loads without
td_plugin. A record is a JSON object; every part but `format` may be left out::

    {"format": 2,
     "lengths": {"encoder.layer": 2},                     lists of modules with fewer entries; the last ones go
     "removed": ["pooler"],                               modules and tensors that are gone
     "tensors": {"encoder.layer.0.output.dense.weight": [24, 7]},
     "attributes": {"encoder.layer.0.output.dense.in_features": 7}}
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

FORMAT = 2
CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


class RecordError(ValueError):
    """A record that does not fit the model: what is wrong, and at which entry."""

    def __init__(self, what: str, where: str) -> None:
        super().__init__(f"{where}: {what}" if where else what)
        self.what, self.where = what, where


def cut_to_record(model: nn.Module, record: Any) -> None:
    """Give `model` the sizes of `record`, in place: what stays are the first entries of every dimension.

    Args:
        model: the dense model; on the meta device nothing is allocated.
        record: see above; it is data from a file and may hold anything.

    Raises:
        RecordError: the record is no such object, names what the model does not have, or asks for more than it has.
    """
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise RecordError(f"not a record of format {FORMAT}", "")
    renewed: dict[tuple[int, tuple[int, ...]], tuple[Tensor, Tensor]] = {}
    for name, length in _entries(record, "lengths"):
        _truncate(model, name, length)
    for name, _ in _entries(record, "removed"):
        _remove(model, name)
    for name, shape in _entries(record, "tensors"):
        _resize(model, name, shape, renewed)
    for name, value in _entries(record, "attributes"):
        _set_attribute(model, name, value)


def _entries(record: dict[str, Any], kind: str) -> list[tuple[str, Any]]:
    """Names and values of one part of the record."""
    part = record.get(kind, {})
    if kind == "removed" and isinstance(part, list) and all(type(name) is str for name in part):
        return [(name, None) for name in part]
    if not isinstance(part, dict) or (part and kind == "removed"):
        raise RecordError("of a wrong type", kind)
    return list(part.items())


def _owner(model: nn.Module, fqn: str, kind: str) -> tuple[nn.Module, str]:
    """The module that holds `fqn`, and its name there."""
    parent, _, name = fqn.rpartition(".")
    try:
        return model.get_submodule(parent), name
    except AttributeError as error:
        raise RecordError("no such module in the model", f"{kind}.{fqn}") from error


def _sizes(value: object, where: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(size) is int and size >= 0 for size in value):
        raise RecordError(f"{value} is no shape", where)
    return tuple(value)


def _truncate(model: nn.Module, fqn: str, length: object) -> None:
    owner, name = _owner(model, fqn, "lengths")
    module = owner if not fqn else dict(owner.named_children()).get(name)
    if not isinstance(module, (nn.ModuleList, nn.Sequential)):
        raise RecordError("no such list of modules in the model", f"lengths.{fqn}")
    if type(length) is not int or not 0 <= length <= len(module):
        raise RecordError(f"{length}; at most {len(module)}", f"lengths.{fqn}")
    del module[length:]


def _remove(model: nn.Module, fqn: str) -> None:
    owner, name = _owner(model, fqn, "removed")
    if name not in {**owner._modules, **owner._parameters, **owner._buffers}:
        raise RecordError("no such module or tensor in the model", f"removed.{fqn}")
    if isinstance(owner, CONTAINERS) and name in owner._modules:
        del owner._modules[name]
    else:
        setattr(owner, name, None)


def _resize(
    model: nn.Module, fqn: str, value: object, renewed: dict[tuple[int, tuple[int, ...]], tuple[Tensor, Tensor]]
) -> None:
    """Cut one tensor; tensors that were one before stay one. A bias that the dense model leaves out is made."""
    where, (owner, name) = f"tensors.{fqn}", _owner(model, fqn, "tensors")
    shape, slots = _sizes(value, where), {**owner._parameters, **owner._buffers}
    if name not in slots:
        raise RecordError("no such tensor in the model", where)
    old = slots[name]
    if old is None:
        others = [tensor for tensor in owner._parameters.values() if tensor is not None]
        if name not in owner._parameters or not others or len(shape) != 1 or shape[0] > others[0].numel():
            raise RecordError(f"{list(shape)} is no tensor that can be added", where)
        setattr(owner, name, nn.Parameter(torch.zeros_like(others[0].detach()).flatten()[: shape[0]].clone()))
        return
    if len(shape) != old.ndim or any(new > size for new, size in zip(shape, old.shape, strict=True)):
        raise RecordError(f"{list(shape)}; at most {list(old.shape)}", where)
    key = (id(old), shape)
    if key not in renewed:
        new = old.detach()[tuple(slice(0, size) for size in shape)].clone()
        kept = nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new
        renewed[key] = (old, kept)  # the old one too, so that its id stays taken
    setattr(owner, name, renewed[key][1])


def _set_attribute(model: nn.Module, fqn: str, value: object) -> None:
    where, (owner, name) = f"attributes.{fqn}", _owner(model, fqn, "attributes")
    if name.startswith("_") or name == "training" or name not in vars(owner):
        raise RecordError("no such attribute in the model", where)
    old = vars(owner)[name]
    fits = type(value) is bool if type(old) is bool else _is_number(value) and _is_number(old)
    if type(old) in (tuple, list, torch.Size) and all(type(item) is int for item in old):
        value, fits = type(old)(_sizes(value, where)), True
    if not fits:
        raise RecordError(f"{value!r} for an attribute that is {type(old).__name__}", where)
    setattr(owner, name, value)


def _is_number(value: object) -> bool:
    return value is None or type(value) in (int, float)
