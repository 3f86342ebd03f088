"""Running the command line within the tests' own process, and what every command owes its caller."""

from __future__ import annotations

import json
from typing import Any

from typer.testing import CliRunner, Result

from td_plugin.commands import app


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def document(result: Result, code: int = 0) -> Any:
    """What --json printed: exactly one document, and nothing else, on stdout."""
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


def refused(result: Result, *words: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    line = next(line for line in result.stderr.splitlines() if line.startswith("error: "))
    assert all(word in line for word in words), line
    assert "Traceback" not in result.stderr
