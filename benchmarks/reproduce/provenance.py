"""Where numbers come from: the command and the commit that made them."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path


def commit() -> str:
    """Of the working tree, shortened; empty where there is none."""
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False, cwd=Path(__file__).parent
    )
    return done.stdout.strip()


def command(script: str, words: Sequence[str]) -> str:
    """A command line to be shown: absolute paths by their last part, since where files lie is nobody's business.

    Args:
        script: as it is called from the repository.
        words: its arguments.
    """
    return " ".join(["python", script, *(Path(word).name if Path(word).is_absolute() else word for word in words)])
