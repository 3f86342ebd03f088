"""What the commands share: options that several take, and the one way to print a result."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeVar

import typer

from td_plugin.errors import TdError

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
ModelDir = Annotated[Path, typer.Argument(help="Checkpoint directory, as save_pretrained or td-plugin wrote it.")]
OnnxFile = Annotated[Path, typer.Argument(help="ONNX file.")]
Length = Annotated[int, typer.Option("--sequence", min=1, help="Tokens per row, for text models.")]
Rows = Annotated[int, typer.Option("--batch", min=1, help="Rows per call.")]
Lengths = Annotated[Path | None, typer.Option("--lengths", help="File of sequence lengths to draw from.")]
Threads = Annotated[int, typer.Option("--threads", min=1, help="Threads inside one operator.")]


class Printable(Protocol):
    """A result: plain values for machines, `str()` for people."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        ...


Result = TypeVar("Result", bound=Printable)


def show(work: Callable[[], Result], as_json: bool) -> Result:
    """Run `work` with everything it prints sent to stderr, then print its result, and nothing else, to stdout."""
    with contextlib.redirect_stdout(sys.stderr):
        result = work()
    typer.echo(json.dumps(result.to_dict(), indent=2) if as_json else str(result))
    return result


def named(files: list[str]) -> dict[str, str]:
    """Name -> file, of ``NAME=FILE`` or a file, which is its own name.

    Raises:
        TdError: two have one name.
    """
    pairs = [(name or path, path) for name, _, path in (file.rpartition("=") for file in files)]
    if len({name for name, _ in pairs}) < len(pairs):
        raise TdError("two files have the same name", got=", ".join(files), fix="name them: dense=a.onnx pruned=b.onnx")
    return dict(pairs)
