"""Running checks in several processes: all functions of one module under `ranks`, in one gloo group on CPU.

A start costs seconds, so one launch serves a whole module; a test then asks what has become of one function.
"""

from __future__ import annotations

import inspect
import json
import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from importlib import import_module
from pathlib import Path

HERE = Path(__file__).parent
Outcome = dict[str, str]
"""What has become of each function: empty where it returned, else the traceback."""


def checks_of(module: str) -> dict[str, Callable[[Path], None]]:
    """The public functions that `ranks.<module>` defines itself, in their order."""
    here = import_module(f"ranks.{module}")
    found = inspect.getmembers(here, inspect.isfunction)
    own = [(name, each) for name, each in found if each.__module__ == here.__name__ and not name.startswith("_")]
    return dict(sorted(own, key=lambda item: item[1].__code__.co_firstlineno))


def launch(module: str, directory: Path, processes: int = 2, seconds: float = 200) -> list[Outcome]:
    """Run the checks of `ranks.<module>` in new processes; by rank, what has become of them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    group = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    running = []
    for rank in range(processes):
        place = {**os.environ, **group, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        command = [sys.executable, __file__, module, str(directory)]
        with (directory / f"{rank}.log").open("w") as log:
            running.append(subprocess.Popen(command, env=place, stdout=log, stderr=log))
    try:
        codes = [process.wait(timeout=seconds) for process in running]
    finally:
        for process in running:
            process.kill()
    assert codes == [0] * processes, "\n".join((directory / f"{r}.log").read_text()[-3000:] for r in range(processes))
    return [json.loads((directory / f"{rank}.json").read_text()) for rank in range(processes)]


def _main(module: str, directory: Path) -> None:
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", timeout=timedelta(seconds=30))
    outcome: Outcome = {}
    for name, check in checks_of(module).items():
        place = directory / name
        place.mkdir(exist_ok=True)
        torch.manual_seed(0)
        try:
            check(place)
            outcome[name] = ""
        except Exception:
            outcome[name] = traceback.format_exc()
            break  # the processes may have lost their common step
    (directory / f"{distributed.get_rank()}.json").write_text(json.dumps(outcome))
    os._exit(0)  # a group in which one process has failed cannot be left in good order


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    _main(sys.argv[1], Path(sys.argv[2]))
