"""Shrunk checkpoints: every layer may have a width of its own, and loading gives the stock class back, bit for bit.

A transformers model is written by its own `save_pretrained` (`td_plugin.export.stock_checkpoint`), any other module as
``model.safetensors`` and ``td_pruning.json`` (`td_plugin.export.module_checkpoint`), for which loading needs the dense
module.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from td_plugin.errors import TdError
from td_plugin.export.companions import check_parent, check_processor, write_licence, write_processor
from td_plugin.export.model_card import write_named_card
from td_plugin.export.module_checkpoint import RECORD, load_module, save_module
from td_plugin.export.origin import CARD, origin_of, parent_origin
from td_plugin.export.stock_checkpoint import CONFIG, DeviceMap, load_stock, save_stock, stock_class
from td_plugin.files import staged_directory
from td_plugin.parametrization import masked_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def save_pretrained(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    auto_map: bool = False,
    max_shard_size: int | str | None = None,
    processor: Any = None,
    parent: str | os.PathLike[str] | None = None,
) -> None:
    """Write `model` so that `load_pretrained` restores it bit for bit; on an error nothing of `directory` changes.

    Args:
        model: shrunk or dense, without masks.
        directory: made if missing; files of the same names are replaced, weights of an earlier save are removed.
        auto_map: also write code with which ``AutoModel...from_pretrained(directory, trust_remote_code=True)`` loads
            the checkpoint where td_plugin is not installed. Nothing is written where stock transformers loads it.
        max_shard_size: the largest weight file, in bytes or such as ``"2GB"``; None is transformers' default.
        processor: tokenizer, image processor or the like, saved beside the model.
        parent: directory of the checkpoint that the model comes from: its licence, and its processor where none is
            given, are copied, and a model card passes on what its card says of licence and data.

    Raises:
        TdError: `model` carries masks, is no smaller form of its class, or `directory` cannot be written or holds a
            checkpoint of the other kind; an option that only transformers models have.
    """
    if masked_tensors(model):
        raise TdError("the model carries masks", where=masked_tensors(model)[0], fix="squash the masks, then shrink")
    cls, path = stock_class(model), Path(directory)
    other = path / (RECORD if cls else CONFIG)
    if other.exists():
        raise TdError("a checkpoint of another kind is there", where=str(other), fix="choose a new directory")
    complete = processor is not None or parent is not None
    if cls is None and (auto_map or max_shard_size is not None or complete):
        fix = "leave out auto_map, max_shard_size, processor and parent"
        raise TdError("an option of transformers checkpoints", where=type(model).__name__, fix=fix)
    home = None if parent is None else Path(parent)
    if complete:
        check_processor(processor)
        check_parent(home)
    with staged_directory(path) as stage:
        if cls is None:
            save_module(model, stage)
        else:
            save_stock(cls, model, stage, auto_map, max_shard_size)
        if complete:
            _complete(cast("PreTrainedModel", model), path, stage, processor, home)
        written = {file.name for file in stage.iterdir()}
    for stale in [*path.glob("model*.safetensors"), *path.glob("model.safetensors.index.json")]:
        if stale.name not in written:  # else transformers would load the weights of the earlier save
            stale.unlink()


def _complete(model: PreTrainedModel, path: Path, stage: Path, processor: Any, home: Path | None) -> None:
    """Write all but the model itself; the text of a model card that is there stays."""
    write_processor(stage, processor, home)
    write_licence(stage, home)
    if (path / CARD).is_file():
        shutil.copyfile(path / CARD, stage / CARD)
    known = parent_origin(home, model.config.name_or_path or "").over(origin_of(stage))
    write_named_card(stage, path.resolve().name, known)


def load_pretrained(
    directory: str | os.PathLike[str],
    module: nn.Module | None = None,
    *,
    device_map: DeviceMap | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """The model that `save_pretrained` wrote, of its stock class, in evaluation mode.

    Args:
        directory: a local directory.
        module: the dense module that a checkpoint of an ordinary module was shrunk from; it is left as it was. With a
            transformers checkpoint it is only compared with the architecture in the configuration.
        device_map: where transformers puts the modules, as its `from_pretrained` takes it; needs accelerate.
        dtype: of the loaded model; None keeps the saved one.

    Raises:
        TdError: no checkpoint there, a file that is damaged, another architecture, or tensors missing or left over.
    """
    path = Path(directory)
    if not path.is_dir():
        raise TdError("there is no such directory", where=str(path), fix="give the directory save_pretrained wrote")
    if (path / RECORD).exists():
        if device_map is not None:
            fix = "leave out device_map and move the loaded module"
            raise TdError("an option of transformers checkpoints", where=str(path), got="device_map", fix=fix)
        return load_module(path, module).to(dtype=dtype)
    if (path / CONFIG).exists():
        return load_stock(path, module, {"device_map": device_map, "dtype": "auto" if dtype is None else dtype})
    raise TdError(f"the directory has no {CONFIG}", where=str(path), fix="give the directory save_pretrained wrote")
