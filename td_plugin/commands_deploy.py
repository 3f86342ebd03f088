"""The commands from a checkpoint to a verified ONNX file."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from td_plugin.commands_shared import Json, ModelDir, OnnxFile, show
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
    output: Annotated[Path, typer.Argument(help="ONNX file to write.")],
    opset: Annotated[int, typer.Option(min=18, help="ONNX operator set.")] = 20,
    as_json: Json = False,
) -> None:
    """Write a checkpoint as ONNX; the file is put in place only if it computes what the model computes."""
    from td_plugin.integrations.checkpoints import export_checkpoint

    show(lambda: export_checkpoint(model, output, opset), as_json)


def quantize(
    source: OnnxFile, output: Annotated[Path, typer.Argument(help="ONNX file to write.")], as_json: Json = False
) -> None:
    """Write the int8 dynamic form of an ONNX file."""
    from td_plugin.export.inspection import inspect_graph
    from td_plugin.export.quantize import quantize as run

    show(lambda: inspect_graph(run(source, output)), as_json)


def verify(
    model: ModelDir,
    file: OnnxFile,
    tolerance: Annotated[
        float | None, typer.Option(help="Largest difference allowed; by precision if left out.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare an ONNX file with the checkpoint that it came from, at several batch sizes and lengths."""
    from td_plugin.integrations.checkpoints import verify_checkpoint

    show(lambda: verify_checkpoint(model, file, tolerance), as_json)


def inspect(
    path: Annotated[Path, typer.Argument(help="Checkpoint directory or ONNX file.")],
    sparsity_level: Annotated[float | None, typer.Option(help="γ in [0, 1): show what this would leave.")] = None,
    kind: Annotated[list[str] | None, typer.Option(help="Of units that γ removes; may be repeated.")] = None,
    source: Annotated[SourceName, typer.Option(help="Trace the model, or read what is known.")] = SourceName.auto,
    as_json: Json = False,
) -> None:
    """Show what can shrink in a checkpoint, what is fixed and why; or what an ONNX file takes and says."""
    if path.suffix == ".onnx" and (sparsity_level is not None or kind):
        raise TdError("an ONNX file does not name its units", where=str(path), fix="inspect the checkpoint")

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
