"""The console script: a thin door to `td_plugin.commands`, which needs the packages typer and rich."""

from __future__ import annotations

import sys


def main() -> None:
    """Run `td-plugin`; exit code 2 for every mistake that the user can mend."""
    try:
        from td_plugin.commands import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        print(f"error: {error.name} is not installed; fix: pip install 'td-plugin[hf,onnx]'", file=sys.stderr)
        sys.exit(2)
    app()
