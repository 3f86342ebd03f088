"""What the first use of one ONNX file costs, measured in a process of its own.

In the caller's process the figures of several files would mix, and torch would drown them.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from td_plugin.errors import TdError
from td_plugin.export import engines
from td_plugin.export.engines import Engine


@dataclass(frozen=True)
class ColdStart:
    """The first use of a file.

    Attributes:
        load_seconds: time to open the session.
        first_seconds: time of the first run.
        peak_memory: bytes that loading and three runs add to the resident memory of the process, at their peak; None
            where the kernel keeps no such record (anything but Linux). Memory of a GPU is not in it.
    """

    load_seconds: float
    first_seconds: float
    peak_memory: int | None


def cold_start(engine: Engine, feeds: Mapping[str, Any]) -> ColdStart:
    """Load and run a file in a fresh process.

    Args:
        engine: a file that is known to load and to take `feeds`, and how to open it.
        feeds: graph input name -> numpy array.

    Raises:
        TdError: the process failed, for example for lack of memory.
    """
    import numpy as np

    with tempfile.TemporaryDirectory(prefix="td_plugin.") as folder:
        values = Path(folder) / "feeds.npz"
        np.savez(values, *feeds.values())  # by position: a graph may call its inputs anything
        request = {"engine": asdict(engine), "names": list(feeds), "values": str(values)}
        command = [sys.executable, str(engines.__file__), json.dumps(request)]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "no message")
        raise TdError(
            "the file cannot be loaded in a process of its own",
            where=engine.path,
            got=f"exit code {done.returncode}: {last.strip()}",
            fix="a negative code is a signal: -9 is most often for lack of memory",
        )
    return ColdStart(**json.loads(done.stdout))
