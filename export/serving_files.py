"""What lies in a directory that is served: the graph, the configuration, the tokenizer, and the task they are for."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from td_plugin.errors import TdError, first_line

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig

MODEL, CONFIG, GENERATION = "model.onnx", "config.json", "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "spm.model",
    "sentencepiece.bpe.model",
    "normalizer.json",
    "chat_template.jinja",
)
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")

_NESTED = "onnx"  # folder of a repository of the Hub in which some tools put the graphs, with the rest around it

# Task -> the table of transformers that lists the classes for it: type of a configuration -> class or classes.
_TASKS = {
    "text-classification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "token-classification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "image-classification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "fill-mask": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "text-generation": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "feature-extraction": "MODEL_MAPPING_NAMES",
    "image-feature-extraction": "MODEL_MAPPING_NAMES",
}
TASKS = tuple(_TASKS)
"""What a graph can be served for, named as transformers' pipelines are."""


@dataclass(frozen=True)
class Job:
    """What a model is for.

    Attributes:
        task: one of `TASKS`.
        architecture: the class of transformers that does it.
    """

    task: str
    architecture: str

    @property
    def images(self) -> bool:
        """Whether it takes images; else texts."""
        return self.task.startswith("image-")


def find_graph(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """The ONNX file that `path` names, and the directory that the rest lies in.

    Args:
        path: an ONNX file, or a directory with ``model.onnx`` or one other ONNX file in it or in its folder ``onnx``.

    Raises:
        TdError: there is none, or more than one.
    """
    given = Path(path)
    if not given.is_dir():
        if not given.is_file():
            fix = "write it with save_onnx(model, directory)"
            raise TdError("there is no such ONNX file or directory", where=str(given), fix=fix)
        around = given.parent.parent
        nested = given.parent.name == _NESTED and not (given.parent / CONFIG).exists() and (around / CONFIG).exists()
        return given, around if nested else given.parent
    folders = [given, given / _NESTED]
    for folder in folders:
        if (folder / MODEL).is_file():
            return folder / MODEL, given
    found = [file for folder in folders for file in sorted(folder.glob("*.onnx"))]
    if len(found) == 1:
        return found[0], given
    raise TdError(
        f"the directory has no {MODEL}",
        where=str(given),
        got=", ".join(file.name for file in found) or "no ONNX file",
        fix="name one of the files" if found else "write it with save_onnx(model, directory)",
    )


def load_config(directory: Path) -> PreTrainedConfig:
    """The configuration in `directory`.

    Raises:
        TdError: there is none, or transformers cannot read it.
    """
    from transformers import AutoConfig

    file = directory / CONFIG
    if not file.is_file():
        fix = "model.config.save_pretrained(directory), or write the directory with save_onnx(model, directory)"
        raise TdError(f"there is no {CONFIG} beside the ONNX file", where=str(file), fix=fix)
    try:
        # Attention is in the graph already: torch's kernels for it are not asked for.
        found: PreTrainedConfig = AutoConfig.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False, attn_implementation="eager"
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TdError(f"{CONFIG} cannot be read", where=str(file), got=first_line(error)) from error
    return found


def load_generation_config(directory: Path, config: PreTrainedConfig) -> GenerationConfig:
    """How the model in `directory` generates; where no file says so, as its configuration does.

    Raises:
        TdError: the file cannot be read.
    """
    from transformers import GenerationConfig

    file = directory / GENERATION
    try:
        if file.is_file():
            return GenerationConfig.from_pretrained(directory, local_files_only=True)
        return GenerationConfig.from_model_config(config)
    except (OSError, ValueError, TypeError) as error:
        raise TdError(f"{file.name} cannot be read", where=str(file), got=first_line(error)) from error


def job_of(config: PreTrainedConfig, task: str | None, images: bool, where: str) -> Job:
    """What a model of this configuration is for.

    Args:
        config: its ``architectures`` tell the task.
        task: as a pipeline calls it; None for what the configuration says.
        images: whether the graph takes images, which tells the tasks of a model without a head apart.
        where: what errors call the configuration.

    Raises:
        TdError: the task is unknown, cannot be inferred, or no class of transformers does it for such a model.
    """
    stated = (config.architectures or [""])[0]
    if task is None:
        fitting = [name for name in TASKS if stated in _classes(config, name)]
        fitting = [name for name in fitting if name.startswith("image-") == images] or fitting
        if not fitting:
            fix = f"give task=..., one of {', '.join(TASKS)}"
            raise TdError("the task cannot be inferred from the architecture", where=where, got=stated or None, fix=fix)
        return Job(fitting[0], stated)
    name = _canonical(task)
    if name not in TASKS:
        raise TdError("no such task is served", got=task, fix=f"one of {', '.join(TASKS)}")
    classes = _classes(config, name)
    if not classes:
        raise TdError(f"transformers has no {config.model_type} for this task", where=where, got=task)
    return Job(name, stated if stated in classes else classes[0])


def task_of(directory: Path, images: bool) -> str:
    """The task that the configuration in `directory` tells; empty where it is none that is served."""
    try:
        return job_of(load_config(directory), None, images, str(directory)).task
    except TdError:
        return ""


def _classes(config: PreTrainedConfig, task: str) -> tuple[str, ...]:
    """The classes that do `task` for models of this type."""
    from transformers.models.auto import modeling_auto

    found = vars(modeling_auto)[_TASKS[task]].get(config.model_type, ())
    return (found,) if isinstance(found, str) else tuple(found)


def _canonical(task: str) -> str:
    from transformers.pipelines import PIPELINE_REGISTRY

    return str(PIPELINE_REGISTRY.task_aliases.get(task, task))


def load_processor(directory: Path, job: Job) -> Any:
    """The tokenizer in `directory`, or the image processor for a task on images.

    Raises:
        TdError: there is none, or transformers cannot read it.
    """
    from transformers import AutoImageProcessor, AutoTokenizer

    kind = "image processor" if job.images else "tokenizer"
    names = PROCESSOR_FILES if job.images else TOKENIZER_FILES
    if not any((directory / name).is_file() for name in names):
        raise TdError(
            f"there is no {kind} beside the ONNX file",
            where=str(directory / names[0]),
            fix=f"{kind.split()[-1]}.save_pretrained({str(directory)!r})",
        )
    auto: Any = AutoImageProcessor if job.images else AutoTokenizer
    try:
        return auto.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exceptions about its files
        raise TdError(f"the {kind} cannot be read", where=str(directory), got=first_line(error)) from error
