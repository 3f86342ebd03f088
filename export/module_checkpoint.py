"""Checkpoints of modules that transformers cannot build: ``model.safetensors`` and a record of sizes.

Loading cuts a copy of the dense module to the recorded sizes, then loads strictly. The record, ``td_pruning.json``::

    {"format": 2, "class": "Sequential", "modules": {"0": "Linear"}, "lengths": {"": 1},
     "tensors": {"0.weight": [48, 64], ...}, "unsaved": {}, "attributes": {"0.out_features": 48, ...}}
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from td_plugin.errors import TdError, first_line
from td_plugin.export.checkpoint_record import anatomy, anatomy_from_json, difference
from td_plugin.export.resize import FORMAT, RecordError, cut_to_record
from td_plugin.parametrization import bake

RECORD = "td_pruning.json"
AGAIN = "save the model again"
_WEIGHTS = "model.safetensors"


def save_module(model: nn.Module, stage: Path) -> None:
    """Write weights and record of `model` into the folder `stage`."""
    record = {"format": FORMAT, "class": type(model).__name__, **asdict(anatomy(model))}
    _safetensors().save_model(model, str(stage / _WEIGHTS))
    (stage / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def load_into(directory: str | os.PathLike[str], module_factory: Callable[[], nn.Module]) -> nn.Module:
    """The ordinary module that `save_pretrained` wrote, in evaluation mode.

    Args:
        directory: a local directory.
        module_factory: builds the dense module that the checkpoint was shrunk from: its class, or a function.

    Raises:
        TdError: no checkpoint of an ordinary module there, a file that is damaged, or another architecture.
    """
    path = Path(directory)
    if not (path / RECORD).exists():
        fix = "give the directory save_pretrained wrote for a module; load_pretrained loads transformers models"
        raise TdError(f"the directory has no {RECORD}", where=str(path), fix=fix)
    return load_module(path, module_factory())


def load_module(path: Path, dense: nn.Module | None) -> nn.Module:
    """A copy of `dense`, cut to what the checkpoint in `path` records and loaded from it, in evaluation mode.

    Raises:
        TdError: no dense module, one of another architecture, or a damaged checkpoint.
    """
    if dense is None:
        fix = "load_pretrained(directory, module=the_dense_module)"
        raise TdError("a checkpoint of an ordinary module needs the dense module", where=str(path), fix=fix)
    content = read_json(path / RECORD)
    if content.get("format") != FORMAT:
        raise TdError("unknown or damaged record", where=str(path / RECORD), got=content.get("format"), fix=AGAIN)
    try:
        recorded = anatomy_from_json(content)
    except RecordError as error:
        raise damaged(path / RECORD, error) from error
    if content.get("class") != type(dense).__name__:
        raise other_architecture(path, expected=type(dense).__name__, got=content.get("class"))
    small = copy.deepcopy(dense)
    bake(small)
    try:
        cut_to_record(small, difference(anatomy(small), recorded))
        left = difference(anatomy(small), recorded)
    except RecordError as error:
        raise other_architecture(path, expected="the module", got=error) from error
    unknown = sorted(recorded.attributes.keys() - anatomy(small).attributes.keys())
    if len(left) > 1 or unknown:
        raise other_architecture(path, expected="the module", got=unknown[:3] or left)
    _load_tensors(small, path / _WEIGHTS)
    return small.eval()


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
        raise TdError("the weights cannot be loaded", where=str(file), got=first_line(error), fix=AGAIN) from error


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise TdError("safetensors is not installed", fix="pip install 'td-plugin[hf]'") from error
    return safetensors.torch


def damaged(place: Path | str, error: RecordError) -> TdError:
    """The error for a record that does not fit what it is applied to."""
    where = f"{place}: {error.where}" if error.where else str(place)
    return TdError("the record is damaged or does not fit the model", where=where, got=error.what, fix=AGAIN)


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
