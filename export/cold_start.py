"""What the first use of one ONNX file costs, measured in a process of its own.

In the caller's process the figures of several files would mix, and torch would drown them. So `cold_start` runs this
very file as a script; for that reason it imports nothing of td_plugin.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ColdStart:
    """The first use of a file.

    Attributes:
        load_seconds: time to open the session.
        first_seconds: time of the first run.
        peak_memory: bytes that loading and three runs add to the peak resident memory of the process; None where the
            kernel keeps no such record (anything but Linux).
    """

    load_seconds: float
    first_seconds: float
    peak_memory: int | None


def cold_start(path: Path, feeds: dict[str, Any], threads: int) -> ColdStart:
    """Load and run `path` in a fresh process.

    Args:
        path: an ONNX file that is known to load and to take `feeds`.
        feeds: graph input name -> numpy array.
        threads: threads inside one operator.

    Raises:
        subprocess.CalledProcessError: the process failed, for example for lack of memory.
    """
    import numpy as np

    with tempfile.TemporaryDirectory(prefix="td_plugin.") as folder:
        values = Path(folder) / "feeds.npz"
        np.savez(values, **feeds)
        command = [sys.executable, __file__, str(path), str(values), str(threads)]
        return ColdStart(**json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))


def _resident(field: str) -> int | None:
    # Not getrusage: the peak it reports is inherited from the parent process.
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    lines = status.read_text(encoding="utf-8").splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(field))) * 1024


def _measure(path: str, values: str, threads: str) -> dict[str, float | None]:
    import numpy as np
    import onnxruntime as ort

    feeds = dict(np.load(values, allow_pickle=False))
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = int(threads), 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    before = _resident("VmRSS:")
    start = time.perf_counter()
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    loaded = time.perf_counter()
    session.run(None, feeds)
    ran = time.perf_counter()
    for _ in range(2):
        session.run(None, feeds)
    peak = _resident("VmHWM:")
    return {
        "load_seconds": loaded - start,
        "first_seconds": ran - loaded,
        "peak_memory": None if before is None or peak is None else peak - before,
    }


if __name__ == "__main__":
    sys.path.pop(0)  # this folder: its file names are not meant for import
    sys.stdout.write(json.dumps(_measure(*sys.argv[1:4])))
