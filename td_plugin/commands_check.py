"""The command ``check``: a gate for CI."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated

import typer

from td_plugin import commands_data as rows
from td_plugin.commands_shared import Json, OnnxFile, show


def check(
    file: OnnxFile,
    against: Annotated[Path | None, typer.Option(help="ONNX file to compare with, such as the dense model's.")] = None,
    bars: Annotated[Path | None, typer.Option(help="TOML or JSON file with any of these options.")] = None,
    min_speedup: Annotated[float | None, typer.Option(help="Over --against; the interval's lower end counts.")] = None,
    min_efficiency: Annotated[float | None, typer.Option(help="That speed-up over the ratio of the FLOPs.")] = None,
    max_p50_ms: Annotated[float | None, typer.Option(help="Median latency; the upper end counts.")] = None,
    max_p95_ms: Annotated[float | None, typer.Option(help="Of 95 % of the runs; the upper end counts.")] = None,
    max_p99_ms: Annotated[float | None, typer.Option(help="Of 99 % of the runs; the upper end counts.")] = None,
    max_size_mb: Annotated[float | None, typer.Option(help="With weights beside the file; 1 MB = 10^6 bytes.")] = None,
    max_accuracy_drop: Annotated[float | None, typer.Option(help="Of the score on --data, from --against.")] = None,
    min_accuracy: Annotated[float | None, typer.Option(help="Least score on --data, in [0, 1].")] = None,
    max_perplexity: Annotated[float | None, typer.Option(help="On --data.")] = None,
    max_difference: Annotated[float | None, typer.Option(help="Of any output from --equal-to.")] = None,
    equal_to: Annotated[Path | None, typer.Option(help="Checkpoint or ONNX file that the file shall equal.")] = None,
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
    batch: Annotated[int | None, typer.Option(help="Rows per timed call; 1.")] = None,
    sequence: Annotated[int | None, typer.Option(help="Tokens per row when timed; 128.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads inside one operator; 1.")] = None,
    rounds: Annotated[int | None, typer.Option(help="Timings per session; 200, for a p99 500.")] = None,
    sessions: Annotated[int | None, typer.Option(help="Times anew while a bar is missed; 3 at most.")] = None,
    junit: Annotated[Path | None, typer.Option(help="Write JUnit XML.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write a summary in Markdown.")] = None,
    job_summary: Annotated[bool, typer.Option("--job-summary", help="Append it to $GITHUB_STEP_SUMMARY.")] = False,
    as_json: Json = False,
) -> None:
    """Hold an ONNX file against bars. Exit code 0: all hold, 1: one is missed or cannot be judged, 2: a mistake."""
    given = locals()

    from td_plugin.integrations.gate import KEYS, read_gate, run_gate, summary_file, write_outcome

    if job_summary:
        summary_file()  # a mistake shows before the minutes that a check may take
    gate = read_gate(file, {name: given[name] for name in KEYS}, bars)
    with contextlib.redirect_stdout(sys.stderr):  # all but the result
        report = run_gate(gate, progress=sys.stderr.isatty())
    write_outcome(report, junit=junit, markdown=markdown, job_summary=job_summary)
    show(lambda: report, as_json)
    if not report.passed:
        raise typer.Exit(1)
