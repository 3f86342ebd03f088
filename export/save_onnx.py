"""A directory that can be served, shared and published: the graph and all that belongs to it."""

from __future__ import annotations

import os
import shutil
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from td_plugin.errors import TdError
from td_plugin.export.companions import (
    check_parent,
    check_processor,
    find_parent,
    has_processor,
    write_config,
    write_licence,
    write_processor,
)
from td_plugin.export.decoder import example_prompts, to_cached_onnx
from td_plugin.export.example_inputs import inputs_for_model
from td_plugin.export.external_data import LIMIT, load_graph, move_pair, save_graph, staged_graph
from td_plugin.export.model_card import write_named_card
from td_plugin.export.origin import CARD, Origin, origin_of, parent_origin
from td_plugin.export.parity import ParityReport
from td_plugin.export.probes import Batch, longest_text, make_parity_batches
from td_plugin.export.serving import load_onnx
from td_plugin.export.serving_files import MODEL, task_of
from td_plugin.export.to_onnx import to_onnx
from td_plugin.export.verify import verify
from td_plugin.export.verify_decoding import DecodingReport, verify_decoding
from td_plugin.files import staged_directory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# transformers and torch swap functions of the whole process while they build and trace a model; two threads that did
# so at a time would each put back what the other had swapped in.
_BUILDING = threading.Lock()


@dataclass(frozen=True)
class SavedOnnx:
    """What `save_onnx` wrote; `str()` is a few lines.

    Attributes:
        directory: where.
        task: what `load_onnx` serves it for; empty for a model that it does not serve.
        files: in the directory.
        parity: the graph against the model, for `write_card`.
    """

    directory: str
    task: str
    files: tuple[str, ...]
    parity: ParityReport | DecodingReport

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        known = {"directory": self.directory, "task": self.task, "files": list(self.files)}
        return {**known, "parity": self.parity.to_dict()}

    def __str__(self) -> str:
        return "\n".join([f"{self.directory}: {self.task or 'no task'}", *self.files, str(self.parity)])


def save_onnx(  # noqa: PLR0913 - all but the first two are options, by name only
    model: PreTrainedModel,
    directory: str | os.PathLike[str],
    *,
    processor: Any = None,
    parent: str | os.PathLike[str] | None = None,
    origin: Origin | None = None,
    example_inputs: Batch | None = None,
    file: str | os.PathLike[str] | None = None,
    optimize: str = "none",
    metadata: Mapping[str, str] | None = None,
    tolerance: float | None = None,
    limit: int = LIMIT,
) -> SavedOnnx:
    """Write a model as a complete directory: what `load_onnx` serves and `push_to_hub` publishes.

    ``model.onnx`` (with the weights beside it where they are large), ``config.json``, tokenizer or processor, how the
    model generates, the parent's licence and a model card without measurements: `write_card` adds them. A decoder is
    written with its cache. The graph is compared with the model, and the directory is loaded once, before anything
    of it is moved into place; on an error nothing of `directory` changes.

    Args:
        model: of transformers, shrunk or dense; masks are baked into a copy.
        directory: made if missing; files of the same names are replaced. Readers see the old graph with its weights
            or the new one with its weights; writers take turns.
        processor: tokenizer, image processor or the like. Unless given, the parent's is copied.
        parent: directory of the checkpoint that the model comes from, for processor, licence and the facts of its
            model card. Unless given, what the model was loaded from, if that is on this machine.
        origin: what the card says of the parent; what it leaves empty is read there.
        example_inputs: as `to_onnx` takes them; made up unless given. With them a decoder is written without a cache.
        file: an ONNX file of this model, such as its int8 form, to be taken in place of a new export.
        optimize: as `to_onnx` takes it.
        metadata: written into the graph as `to_onnx` does; the card shows ``recipe`` and ``sparsity_level``.
        tolerance: of the comparison; see `verify` and `verify_decoding`.
        limit: as `to_onnx` takes it.

    Raises:
        TdError: no model of transformers, no tokenizer or processor to be found, the export fails, the graph differs
            from the model, or the directory cannot be written or loaded.
    """
    path = Path(directory)
    home = _parent(model, processor, parent)
    if processor is None and not has_processor(home) and not has_processor(path):
        fix = "processor=the tokenizer or image processor, or parent=a directory that has one"
        raise TdError("the directory would have no tokenizer or image processor", where=str(path), fix=fix)
    with ExitStack() as turn, staged_directory(path) as stage:
        write_processor(stage, processor, home if has_processor(home) else path)
        write_licence(stage, home)
        graph = stage / MODEL
        with _BUILDING:
            write_config(stage, model)
            task = task_of(stage, model.main_input_name == "pixel_values")
            cached = task == "text-generation"
            inputs = example_inputs if example_inputs is not None or cached else inputs_for_model(model)
            _write_graph(model, graph, inputs, file, {"optimize": optimize, "metadata": metadata, "limit": limit})
        parity = _agreement(model, graph, inputs, tolerance)
        if (path / CARD).is_file():
            shutil.copyfile(path / CARD, stage / CARD)
        known = (origin or Origin()).over(parent_origin(home, model.config.name_or_path or "")).over(origin_of(stage))
        write_named_card(stage, path.resolve().name, known, parity=parity)
        if task:
            load_onnx(stage)
        files = tuple(sorted(entry.name for entry in stage.iterdir()))
        turn.enter_context(_alone(path))
        if path.exists():  # the graph and its weights change at one moment, which file by file they would not
            with staged_graph(path / MODEL) as staged:
                move_pair(graph, staged)
    return SavedOnnx(str(path), task, files, parity)


def _parent(model: nn.Module, processor: Any, parent: str | os.PathLike[str] | None) -> Path | None:
    """The directory that the model comes from, all arguments checked."""
    transformers = sys.modules.get("transformers")  # without it nobody can have built such a model
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        fix = "to_onnx(model, path, example_inputs) writes the graph of any module"
        raise TdError("a directory is written for models of transformers", got=type(model).__name__, fix=fix)
    check_processor(processor)
    home = find_parent(model) if parent is None else Path(parent)
    check_parent(home)
    return home


def _write_graph(
    model: PreTrainedModel,
    graph: Path,
    inputs: Batch | None,
    file: str | os.PathLike[str] | None,
    options: Mapping[str, Any],
) -> None:
    """Put the graph in place; without `inputs` it is a decoder with a cache."""
    if file is not None and options["optimize"] != "none":
        raise TdError("a file is taken as it is", where=str(file), got=f"optimize={options['optimize']!r}")
    if file is not None:
        save_graph(load_graph(file), graph, limit=options["limit"])
    elif inputs is not None:
        to_onnx(model, graph, inputs, **options)
    elif options["optimize"] == "none":
        to_cached_onnx(model, graph, metadata=options["metadata"], limit=options["limit"])
    else:
        fix = "derive(path, target, form) from its model.onnx, then save_onnx(model, directory, file=target)"
        raise TdError("a decoder with a cache is written in fp32", got=f"optimize={options['optimize']!r}", fix=fix)


def _agreement(
    model: PreTrainedModel, graph: Path, inputs: Batch | None, tolerance: float | None
) -> ParityReport | DecodingReport:
    if inputs is None:
        return verify_decoding(model, graph, example_prompts(model), tolerance=tolerance)
    return verify(model, graph, make_parity_batches(inputs, longest_text(model)), tolerance=tolerance)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Wait until no other writer of ours moves files into `path`: two sets of files never mix."""
    if sys.platform == "win32":  # it has no locks for folders
        yield
        return
    import fcntl

    handle = os.open(path.absolute().parent, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)  # which ends the lock, as the end of the process would
