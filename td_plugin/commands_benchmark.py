"""The command ``benchmark``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from td_plugin.commands_shared import Json, Length, Lengths, Rows, Threads, named, show
from td_plugin.errors import TdError

MOST_ROUNDS = 400


def benchmark(
    files: Annotated[list[str], typer.Argument(help="NAME=FILE.onnx, also with @PROVIDER; the first is the baseline.")],
    batch: Rows = 1,
    sequence: Length = 128,
    lengths: Lengths = None,
    threads: Threads = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds at least; each runs every file once.")] = 100,
    max_rounds: Annotated[
        int | None, typer.Option(min=1, help="Rounds at most, while an interval is wide; 400, or --rounds if more.")
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Throughput under so many requests at a time, too.")] = 0,
    profile: Annotated[bool, typer.Option("--profile", help="Show where the time goes, by operator.")] = False,
    repeat: Annotated[int, typer.Option(min=1, help="Time so often, and say if the speed-ups agree.")] = 1,
    accuracy: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="In [0, 1], for the report; may be repeated.")
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="Write one line per file.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with pictures.")] = None,
    png: Annotated[Path | None, typer.Option(help="Draw the distributions.")] = None,
    as_json: Json = False,
) -> None:
    """Time ONNX files against each other, interleaved, with an interval for the speed-up."""
    forms, scores = named(files), _scores(accuracy or [])
    most = max(rounds, MOST_ROUNDS) if max_rounds is None else max_rounds
    if most < rounds:
        raise TdError("--max-rounds is below --rounds", got=f"{most} and {rounds}", fix="give the larger one")

    from td_plugin.export.benchmark_job import Job, run_job
    from td_plugin.export.runners import Form

    job = Job(
        {name: Form.parse(text) for name, text in forms.items()},
        (rounds, most),
        batch=batch,
        sequence=sequence,
        lengths=lengths,
        threads=threads,
        workers=workers,
        profile=profile,
        repeat=repeat,
        accuracy=scores,
        csv=csv,
        html=html,
        png=png,
        progress=sys.stderr.isatty(),
    )
    show(lambda: run_job(job), as_json)


def _scores(given: list[str]) -> dict[str, float]:
    scores = {}
    for text in given:
        name, _, value = text.rpartition("=")
        try:
            scores[name] = float(value)
        except ValueError as error:
            raise TdError("this is no accuracy", got=text, fix="NAME=VALUE, such as pruned=0.91") from error
    return scores
