"""The commands that turn one ONNX file into a faster one: ``optimize`` and ``block-sparse``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from td_plugin import commands_data as rows
from td_plugin.commands_shared import Json, Length, Lengths, OnnxFile, Rows, Threads, show
from td_plugin.errors import TdError
from td_plugin.files import check_file

MOST_ROUNDS = 200
FORMS = ("fused", "bf16", "fp16", "int8-weight", "int8", "int8-static", "int4")
"""Those of the library but fp32, which every file is made of; named here so that help needs not load it."""


def optimize(
    source: OnnxFile,
    output: Annotated[Path, typer.Argument(help="ONNX file to write, or the directory to write it to.")],
    form: Annotated[list[str] | None, typer.Option(help=f"{', '.join(FORMS)}; may be repeated.")] = None,
    keep: Annotated[list[str] | None, typer.Option(help="Layer, or pattern of layers, to leave as it is.")] = None,
    calibration: Annotated[
        str | None, typer.Option(help="Rows for int8-static: parquet, csv, json, directory or hub id.")
    ] = None,
    calibration_rows: Annotated[int, typer.Option(min=1, help="So many of them, drawn at random.")] = 256,
    max_accuracy_drop: Annotated[float, typer.Option(help="Of the score on --data, from the source's.")] = 0.01,
    batch: Rows = 1,
    sequence: Length = 128,
    lengths: Lengths = None,
    threads: Threads = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds at least.")] = 50,
    max_rounds: Annotated[
        int | None, typer.Option(min=1, help="Rounds at most, while an interval is wide; 200, or --rounds if more.")
    ] = None,
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
    """Write the fastest form of an fp32 ONNX file, measured here; or the one form that is named.

    The fastest of those that agree with the source and, with --data, score as well. One named form is written however
    far it is from the source: exit code 1 says that this is more than its tolerance.
    """
    options = rows.data_options(locals())
    most = max(rounds, MOST_ROUNDS) if max_rounds is None else max_rounds
    if most < rounds:
        raise TdError("--max-rounds is below --rounds", got=f"{most} and {rounds}", fix="give the larger one")

    from td_plugin.integrations.optimizing import OptimizeJob, run_optimize

    job = OptimizeJob(
        source,
        output,
        tuple(form or ()),
        tuple(keep or ()),
        calibration=calibration or "",
        calibration_rows=calibration_rows,
        max_drop=max_accuracy_drop,
        batch=batch,
        sequence=sequence,
        lengths=lengths,
        threads=threads,
        rounds=(rounds, most),
        options=options,
        progress=sys.stderr.isatty(),
    )
    report = show(lambda: run_optimize(job), as_json)
    if report.to_dict().get("problem"):
        raise typer.Exit(1)


def block_sparse(
    source: OnnxFile,
    output: Annotated[Path, typer.Argument(help="ONNX file to write.")],
    block: Annotated[str | None, typer.Option(metavar="INxOUT", help="Its inputs and outputs; else found.")] = None,
    min_gain: Annotated[float, typer.Option(help="Least speed-up of a matrix to rewrite it.")] = 1.05,
    batch: Rows = 1,
    sequence: Length = 128,
    threads: Threads = 1,
    as_json: Json = False,
) -> None:
    """Multiply only with the blocks that are not zero, matrix by matrix, where that is measured to be faster."""
    shape = None if block is None else _block(block)
    check_file(output)

    from td_plugin.export.block_sparse import block_sparse as run
    from td_plugin.export.example_inputs import inputs_for_graph

    show(
        lambda: run(
            source,
            output,
            block=shape,
            min_gain=min_gain,
            example_inputs=inputs_for_graph(source, batch, sequence),
            threads=threads,
            progress=sys.stderr.isatty(),
        ),
        as_json,
    )


def _block(text: str) -> tuple[int, int]:
    inputs, _, outputs = text.partition("x")
    try:
        return int(inputs), int(outputs)
    except ValueError as error:
        raise TdError("this is no block", where="--block", got=text, fix="INPUTSxOUTPUTS, such as 16x128") from error
