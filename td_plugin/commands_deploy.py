"""The commands from a checkpoint to a verified ONNX file."""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from td_plugin import commands_data as rows
from td_plugin.commands_shared import Json, ModelDir, OnnxFile, named, show
from td_plugin.errors import TdError


class SourceName(str, Enum):
    """Where `inspect` reads the units."""

    auto = "auto"
    graph = "graph"
    known = "known"


def shrink(
    model: ModelDir,
    output: Annotated[Path, typer.Argument(help="Directory for the smaller model.")],
    as_json: Json = False,
) -> None:
    """Remove the silent units of a pruned checkpoint."""
    from td_plugin.integrations.checkpoints import shrink_checkpoint

    show(lambda: shrink_checkpoint(model, output), as_json)


def export(
    model: ModelDir,
    output: Annotated[Path, typer.Argument(help="ONNX file to write; without .onnx a directory, ready to serve.")],
    opset: Annotated[int, typer.Option(min=18, help="ONNX operator set.")] = 20,
    optimize: Annotated[str, typer.Option(help="auto: the fastest form here; or a form, see optimize.")] = "none",
    cache: Annotated[bool, typer.Option("--cache", help="A decoder with its keys and values, to generate.")] = False,
    as_json: Json = False,
) -> None:
    """Write a checkpoint as ONNX; the file is put in place only if it computes what the model computes."""
    from td_plugin.integrations.checkpoints import export_checkpoint

    show(lambda: export_checkpoint(model, output, opset, optimize=optimize, cache=cache), as_json)


def quantize(
    source: OnnxFile, output: Annotated[Path, typer.Argument(help="ONNX file to write.")], as_json: Json = False
) -> None:
    """Write the int8 dynamic form of an ONNX file."""
    from td_plugin.export.inspection import inspect_graph
    from td_plugin.export.quantize import quantize as run

    show(lambda: inspect_graph(run(source, output)), as_json)


def verify(
    model: Annotated[Path, typer.Argument(help="Checkpoint directory, or ONNX file: what all others shall equal.")],
    files: Annotated[list[str], typer.Argument(help="FILE or NAME=FILE: ONNX files, or smaller checkpoints.")],
    tolerance: Annotated[
        float | None, typer.Option(help="Largest difference allowed; by precision if left out.")
    ] = None,
    max_accuracy_drop: Annotated[
        float | None, typer.Option(help="Of the score on --data; by precision if left out.")
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="How far a decoder with a cache writes on.")] = 16,
    data: rows.Data = None,
    tokenizer: rows.Tokenizer = None,
    metric: rows.Metric = None,
    split: rows.Split = None,
    text_column: rows.TextColumn = None,
    pair_column: rows.PairColumn = None,
    image_column: rows.ImageColumn = None,
    label_column: rows.LabelColumn = None,
    max_length: rows.MaxLength = None,
    max_rows: rows.MaxRows = None,
    as_json: Json = False,
) -> None:
    """Compare ONNX files with the checkpoint that they came from, at several batch sizes and lengths.

    A decoder with a cache is compared token by token. With --data, scores are compared, too. Of several files, or with
    data, exit code 1 says that one does not hold.
    """
    options, others = rows.data_options(locals()), named(files)
    if max_accuracy_drop is not None and data is None:
        raise TdError("--max-accuracy-drop is about labelled data", got=max_accuracy_drop, fix="give --data")

    from td_plugin.integrations.verification import VerifyJob, run_verify

    paths = {name: Path(path) for name, path in others.items()}
    job = VerifyJob(model, paths, tolerance, max_accuracy_drop, new_tokens, options)
    holds = show(lambda: run_verify(job), as_json).to_dict().get("passed", True)
    if not holds:
        raise typer.Exit(1)


def inspect(
    path: Annotated[Path, typer.Argument(help="Checkpoint directory or ONNX file.")],
    sparsity_level: Annotated[float | None, typer.Option(help="γ in [0, 1): show what this would leave.")] = None,
    kind: Annotated[list[str] | None, typer.Option(help="Of units that γ removes; may be repeated.")] = None,
    source: Annotated[SourceName, typer.Option(help="Trace the model, or read what is known.")] = SourceName.auto,
    storage: Annotated[bool, typer.Option("--storage", help="Show what an ONNX file's zeros save on disk.")] = False,
    as_json: Json = False,
) -> None:
    """Show what can shrink in a checkpoint, what is fixed and why; or what an ONNX file takes and says."""
    if path.suffix == ".onnx" and (sparsity_level is not None or kind):
        raise TdError("an ONNX file does not name its units", where=str(path), fix="inspect the checkpoint")
    if path.suffix != ".onnx" and storage:
        raise TdError("--storage is about an ONNX file", where=str(path), fix="export the checkpoint")
    if storage:
        from td_plugin.export.storage import storage_table

        show(lambda: storage_table(path, progress=sys.stderr.isatty()), as_json)
        return

    from td_plugin.export.inspection import inspect_graph, inspect_model

    if path.suffix == ".onnx":
        show(lambda: inspect_graph(path), as_json)
        return

    from td_plugin.granularity import KINDS
    from td_plugin.integrations.checkpoints import load_checkpoint

    kinds = kind or KINDS
    show(
        lambda: inspect_model(load_checkpoint(path), source=source.value, sparsity_level=sparsity_level, kinds=kinds),
        as_json,
    )
