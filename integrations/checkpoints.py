"""Checkpoint directories in, results of the export package out: what the command line does with a saved model."""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from td_plugin.errors import TdError
from td_plugin.export import load_pretrained, save_onnx, save_pretrained, to_cached_onnx, to_onnx, verify
from td_plugin.export.example_inputs import inputs_for_model
from td_plugin.export.inspection import GraphInspection, inspect_graph
from td_plugin.export.optimize import check_optimize
from td_plugin.export.probes import longest_text, make_parity_batches
from td_plugin.export.save_onnx import SavedOnnx
from td_plugin.export.shrink import shrink
from td_plugin.export.verify import ParityReport

OPSET = 20
"""Of the ONNX standard operators, unless the user asks for another."""


@dataclass(frozen=True)
class ShrinkResult:
    """What `shrink_checkpoint` did; `str()` is one line.

    Attributes:
        output: where the smaller model is.
        before: parameters of the model that was read.
        after: parameters of the smaller one.
    """

    output: str
    before: int
    after: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)

    def __str__(self) -> str:
        """Counts and the place."""
        return f"{self.before:,} parameters -> {self.after:,} ({self.after / self.before:.1%}): {self.output}"


def load_checkpoint(directory: Path) -> PreTrainedModel:
    """The transformers model in `directory`, dense, masked or shrunk, in evaluation mode.

    Raises:
        TdError: no checkpoint, a damaged one, or one of another module than transformers'.
    """
    model = load_pretrained(directory)
    if not isinstance(model, PreTrainedModel):
        raise TdError("not a checkpoint of transformers", where=str(directory), got=type(model).__name__)
    return model


def shrink_checkpoint(directory: Path, output: Path) -> ShrinkResult:
    """Remove the silent units of a pruned checkpoint; tokenizer or processor, licence and model card go along.

    Raises:
        TdError: the checkpoint cannot be read, nothing can be removed, or `output` cannot be written.
    """
    model = load_checkpoint(directory)
    small = shrink(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the licence of the parent model is unknown")  # the card says so
        save_pretrained(small, output, parent=directory)
    return ShrinkResult(str(output), model.num_parameters(), small.num_parameters())


def export_checkpoint(
    directory: Path, output: Path, opset: int = OPSET, *, optimize: str = "none", cache: bool = False
) -> GraphInspection | SavedOnnx:
    """Write the checkpoint as ONNX, verified on random inputs.

    Args:
        directory: of the checkpoint.
        output: the file to write; a name without ``.onnx`` is a directory, written with all that serving needs.
        opset: of the ONNX standard operators.
        optimize: as `to_onnx` takes it.
        cache: write a decoder with its keys and values, for generating token by token; a directory always has them.

    Raises:
        TdError: the checkpoint cannot be read or exported, the file differs from the model or cannot be written.
    """
    if output.suffix != ".onnx":
        if opset != OPSET or output.is_file():
            got = "a file of this name" if output.is_file() else f"--opset {opset}"
            raise TdError("a directory is written with the usual opset", where=str(output), got=got, fix="name a .onnx")
        check_optimize(optimize)
        return _save_directory(directory, output, optimize)
    if cache and optimize != "none":
        fix = "export --cache, then td-plugin optimize"
        raise TdError("a decoder with a cache is written in fp32", got=f"--optimize {optimize}", fix=fix)
    check_optimize(optimize)
    model = load_checkpoint(directory)
    if cache:
        return inspect_graph(to_cached_onnx(model, output, opset=opset))
    return inspect_graph(to_onnx(model, output, inputs_for_model(model), opset=opset, optimize=optimize))


def _save_directory(directory: Path, output: Path, optimize: str) -> SavedOnnx:
    model = load_checkpoint(directory)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the licence of the parent model is unknown")  # the card says so
        return save_onnx(model, output, parent=directory, optimize=optimize)


def verify_checkpoint(directory: Path, file: Path, tolerance: float | None = None) -> ParityReport:
    """Compare the ONNX file with the checkpoint on random inputs of several sizes, the longest text among them.

    Raises:
        TdError: one of the two cannot be read, or they differ.
    """
    model = load_checkpoint(directory)
    return verify(model, file, make_parity_batches(inputs_for_model(model), longest_text(model)), tolerance=tolerance)
