"""What the commands share: options that several take, and the one way to print a result."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Protocol

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
ModelDir = Annotated[Path, typer.Argument(help="Checkpoint directory, as save_pretrained or td-plugin wrote it.")]
OnnxFile = Annotated[Path, typer.Argument(help="ONNX file.")]
Length = Annotated[int, typer.Option("--sequence", min=1, help="Tokens per row, for text models.")]


class Printable(Protocol):
    """A result: plain values for machines, `str()` for people."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        ...


def show(work: Callable[[], Printable], as_json: bool) -> None:
    """Run `work` with everything it prints sent to stderr, then print its result, and nothing else, to stdout."""
    with contextlib.redirect_stdout(sys.stderr):
        result = work()
    typer.echo(json.dumps(result.to_dict(), indent=2) if as_json else str(result))
