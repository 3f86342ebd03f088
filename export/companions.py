"""What lies beside a model in a complete directory: tokenizer or processor, configuration, the parent's licence."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from td_plugin.errors import TdError, first_line
from td_plugin.export.serving_files import CONFIG, PROCESSOR_FILES, TOKENIZER_FILES
from td_plugin.export.stock_checkpoint import pruned_config, stock_class
from td_plugin.parametrization import masked_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LICENCES = ("LICENSE*", "LICENCE*", "COPYING*", "NOTICE*", "USE_POLICY*")
_OURS = (*TOKENIZER_FILES, *PROCESSOR_FILES)


def check_processor(processor: Any) -> None:
    """Nothing, if `processor` is None, a tokenizer, an image processor or the like of transformers.

    Raises:
        TdError: it is something else.
    """
    from transformers import PreTrainedModel
    from transformers.utils.hub import PushToHubMixin

    if processor is not None and (not isinstance(processor, PushToHubMixin) or isinstance(processor, PreTrainedModel)):
        raise TdError(
            "no tokenizer or processor of transformers",
            where="processor",
            got=type(processor).__name__,
            fix="AutoTokenizer.from_pretrained(...), AutoImageProcessor.from_pretrained(...)",
        )


def find_parent(model: PreTrainedModel) -> Path | None:
    """The directory that `model` was loaded from, if it is on this machine: a path, or the Hub's cache of it."""
    name = model.config.name_or_path
    return Path(name) if name and Path(name).is_dir() else cached(name or "")


def cached(name: str) -> Path | None:
    """The Hub's cache of the repository `name`; None where it is not there, or `name` is no repository."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if not name or Path(name).exists():
        return None
    try:
        file = try_to_load_from_cache(name, CONFIG)
    except HFValidationError:  # a directory that is gone
        return None
    return Path(file).parent if isinstance(file, str) else None


def check_parent(parent: Path | None) -> None:
    """Nothing, if it is None or a directory.

    Raises:
        TdError: it is not.
    """
    if parent is not None and not parent.is_dir():
        fix = "the local directory of the checkpoint this model came from"
        raise TdError("there is no such directory", where=str(parent), fix=fix)


def has_processor(directory: Path | None) -> bool:
    """Whether a tokenizer or processor lies there."""
    return directory is not None and any((directory / name).is_file() for name in _OURS)


def write_processor(stage: Path, processor: Any, parent: Path | None) -> None:
    """Save `processor` into `stage`, or copy the files of the parent's."""
    if processor is not None:
        try:
            processor.save_pretrained(stage)
        except (OSError, ValueError) as error:
            where = type(processor).__name__
            raise TdError("the processor cannot be saved", where=where, got=first_line(error)) from error
    elif parent is not None:
        _copy((parent / name for name in _OURS), stage)


def write_licence(stage: Path, parent: Path | None) -> None:
    """Copy the parent's licence files."""
    if parent is not None:
        _copy(licence_files(parent), stage)


def licence_files(directory: Path) -> list[Path]:
    """Files that state the terms of use."""
    return [file for pattern in _LICENCES for file in sorted(directory.glob(pattern)) if file.is_file()]


def write_config(stage: Path, model: PreTrainedModel) -> None:
    """The configuration of `model` as its checkpoint would have it, and how it generates."""
    cls = stock_class(model)
    known = cls is not None and not masked_tensors(model)
    config = pruned_config(cls, model) if cls is not None and known else copy.deepcopy(model.config)
    config.architectures = [type(model).__name__ if cls is None else cls.__name__]
    config.dtype = model.config.dtype
    config.save_pretrained(stage)
    if model.can_generate():
        model.generation_config.save_pretrained(stage)


def _copy(files: Iterable[Path], stage: Path) -> None:
    for file in files:
        if file.is_file():
            shutil.copyfile(file, stage / file.name)  # a file of the Hub's cache is a link
