"""One contract for all training loops: stopped, resumed in a new process, they end where an uninterrupted run ends."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from loops.cells import CELLS, Cell
from safetensors.torch import load_file
from torch import Tensor, nn

LOOPS = ("trainer", "lightning", "accelerate", "plain")
PAIRS = [(loop, processes) for loop in LOOPS for processes in (1, 2)]
FAST = [Cell("weight", "fp32", 1), Cell("ramping", "bf16", 3)]
SCRIPT = Path(__file__).parent / "loops" / "run.py"

# What libraries say of two-core machines, of data without workers, and of loops without validation.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


def train(loop: str, cell: Cell, directory: Path, *, stop: bool = False, resume: bool = False) -> dict[str, Tensor]:
    model: nn.Module = import_module(f"loops.{loop}_loop").train(cell, directory, stop=stop, resume=resume)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor], what: str) -> None:
    assert a.keys() == b.keys(), what
    assert [name for name in a if not torch.equal(a[name], b[name])] == [], what


@pytest.mark.parametrize("cell", FAST, ids=lambda cell: cell.name)
def test_loops_resume_exactly_and_agree(tmp_path: Path, cell: Cell) -> None:
    reference = train("plain", cell, tmp_path)
    pruned = reference["bert.encoder.layer.1.intermediate.dense.weight"]
    assert int((pruned == 0).sum()) == pruned.numel() // 2
    for loop in LOOPS:
        assert_same(reference, train(loop, cell, tmp_path / loop / "whole"), f"{loop}, whole")
        train(loop, cell, tmp_path / loop / "half", stop=True)
        resumed = train(loop, cell, tmp_path / loop / "half", resume=True)
        assert_same(reference, resumed, f"{loop}, resumed")


def launch(loop: str, half: str, directory: Path, processes: int) -> None:
    """All cells in new processes, which form a gloo group where there are several."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    group = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    running = []
    for rank in range(processes):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "NODE_RANK": "0"} | group if processes > 1 else {}
        command = [sys.executable, str(SCRIPT), loop, half, str(directory)]
        with (directory / f"{half}-{rank}.log").open("w") as log:  # the child keeps its own handle
            running.append(subprocess.Popen(command, env={**os.environ, **place}, stdout=log, stderr=log))
    codes = [process.wait(timeout=280) for process in running]
    texts = [(directory / f"{half}-{rank}.log").read_text()[-3000:] for rank in range(processes)]
    assert codes == [0] * processes, "\n\n".join(texts)


@pytest.mark.slow
@pytest.mark.parametrize(("loop", "processes"), PAIRS, ids=[f"{loop}-{processes}" for loop, processes in PAIRS])
def test_a_new_process_ends_where_an_uninterrupted_run_ends(tmp_path: Path, loop: str, processes: int) -> None:
    launch(loop, "first", tmp_path, processes)
    launch(loop, "second", tmp_path, processes)
    for cell in CELLS:
        found = {
            (run, rank): load_file(tmp_path / cell.name / f"{run}-{rank}.safetensors")
            for run in ("whole", "resumed")
            for rank in range(processes)
        }
        for key, state in found.items():
            assert_same(found["whole", 0], state, f"{cell.name}, {key}")
        if processes == 1 and loop != "plain":
            reference = train("plain", cell, tmp_path / "reference")
            assert_same(reference, found["whole", 0], f"{cell.name}: {loop} and a plain loop")
