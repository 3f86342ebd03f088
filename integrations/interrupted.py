"""Where an interrupted run of the Trainer can go on.

The Trainer writes its checkpoints file by file into their final place, so a process that dies in a save leaves one that
looks like the newest. Here every file is looked at before anything is loaded; nothing is unpickled.
"""

from __future__ import annotations

import json
import os
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

from td_plugin.errors import TdError

try:
    from safetensors import SafetensorError, safe_open
    from transformers.trainer import OPTIMIZER_NAME, SCALER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
    from transformers.utils import (
        CONFIG_NAME,
        SAFE_WEIGHTS_INDEX_NAME,
        SAFE_WEIGHTS_NAME,
    )
except ImportError as error:
    raise TdError("transformers is not installed", got=error, fix="pip install 'td-plugin[hf]'") from error

_NUMBERED = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
_ADAPTER = "adapter_model.safetensors"  # as PEFT names it
_SHARDED = (
    "pytorch_model_fsdp_0",
    "optimizer_0",
)  # directories of torch.distributed.checkpoint, as accelerate names them


def last_complete_checkpoint(output_dir: str | os.PathLike[str], *, processes: int | None = None) -> str | None:
    """The newest checkpoint of a Trainer's `output_dir` from which a run goes on bit for bit; None if there is none.

    Complete is a checkpoint whose `trainer_state.json` and `config.json` parse, whose safetensors files open and hold
    every tensor their index names, and whose optimizer, scheduler, scaler and generator states are whole archives with
    right checksums. FSDP's sharded directories count as whole once their metadata, written last, is there. A checkpoint
    of `save_only_model` is incomplete: it has no optimizer.

    Args:
        output_dir: of the `TrainingArguments`.
        processes: how many trained, each of which left its generator's state; None: as many as there are files.

    Returns:
        What `Trainer.train(resume_from_checkpoint=...)` takes: None starts from the beginning.

    Warns:
        UserWarning: names each newer checkpoint that is incomplete, and why.

    Example:
        >>> trainer.train(resume_from_checkpoint=last_complete_checkpoint(arguments.output_dir))
    """
    folder = Path(output_dir)
    found = [(int(match[1]), path) for path in _folders(folder) if (match := _NUMBERED.fullmatch(path.name))]
    for _, path in sorted(found, reverse=True):
        problem = why_incomplete(path, processes=processes)
        if problem is None:
            return str(path)
        warnings.warn(f"{path} is incomplete and will not be loaded: {problem}", stacklevel=2)
    return None


def why_incomplete(checkpoint: str | os.PathLike[str], *, processes: int | None = None) -> str | None:
    """What keeps a run from going on from this checkpoint of a Trainer; None if nothing does.

    Args:
        checkpoint: its directory.
        processes: as of `last_complete_checkpoint`.
    """
    path = Path(checkpoint)
    checks = (
        _json_problem(path / TRAINER_STATE_NAME, {"global_step", "log_history"}),
        _json_problem(path / CONFIG_NAME, set()) if (path / CONFIG_NAME).exists() else None,
        _weights_problem(path),
        None if _sharded(path) else _archive_problem(path / OPTIMIZER_NAME),
        _archive_problem(path / SCHEDULER_NAME),
        _archive_problem(path / SCALER_NAME) if (path / SCALER_NAME).exists() else None,
        _generators_problem(path, processes),
    )
    return next((problem for problem in checks if problem is not None), None)


def _folders(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []


def _json(path: Path) -> dict[str, Any] | str:
    """What the file holds, or what is wrong with it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"{path.name} is missing"
    except (OSError, ValueError) as error:  # half-written; UnicodeDecodeError is a ValueError
        return f"{path.name} cannot be read ({error})"
    return value if isinstance(value, dict) else f"{path.name} holds no object"


def _json_problem(path: Path, needed: set[str]) -> str | None:
    value = _json(path)
    if isinstance(value, str):
        return value
    lacking = sorted(needed - value.keys())
    return f"{path.name} lacks {lacking}" if lacking else None


def _sharded(path: Path) -> bool:
    return any((path / name).is_dir() for name in _SHARDED)


def _weights_problem(path: Path) -> str | None:
    if _sharded(path):
        lacking = [name for name in _SHARDED if not (path / name / ".metadata").is_file()]
        return f"{lacking[0]}/.metadata is missing" if lacking else None
    if (path / SAFE_WEIGHTS_INDEX_NAME).exists():
        return _shards_problem(path)
    adapter = path / _ADAPTER
    names = _tensor_names(adapter if adapter.exists() else path / SAFE_WEIGHTS_NAME)
    return names if isinstance(names, str) else None


def _shards_problem(path: Path) -> str | None:
    index = _json(path / SAFE_WEIGHTS_INDEX_NAME)
    if isinstance(index, str):
        return index
    files = index.get("weight_map")
    if not isinstance(files, dict) or not files:
        return f"{SAFE_WEIGHTS_INDEX_NAME} names no tensors"
    for file in sorted(set(files.values())):
        names = _tensor_names(path / file)
        if isinstance(names, str):
            return names
        lacking = sorted(name for name, place in files.items() if place == file and name not in names)
        if lacking:
            return f"{file} lacks {lacking[0]}"
    return None


def _tensor_names(path: Path) -> set[str] | str:
    """The tensors of a safetensors file, whose header is held against its size; or what is wrong with it."""
    if not path.is_file():
        return f"{path.name} is missing"
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
    except (SafetensorError, OSError, ValueError) as error:
        return f"{path.name} cannot be read ({error})"
    return names or f"{path.name} holds no tensors"


def _archive_problem(path: Path) -> str | None:
    """What torch.save writes is a zip archive, with the table at the end and a checksum for every part."""
    if not path.is_file():
        return f"{path.name} is missing"
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        return f"{path.name} cannot be read ({error})"
    return f"{path.name} is damaged at {damaged}" if damaged else None


def _generators_problem(path: Path, processes: int | None) -> str | None:
    count = len(list(path.glob("rng_state_*.pth"))) if processes is None else processes
    names = ["rng_state.pth"] if count == 0 or processes == 1 else [f"rng_state_{rank}.pth" for rank in range(count)]
    return next((problem for name in names if (problem := _archive_problem(path / name))), None)
