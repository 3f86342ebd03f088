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
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from loops.cells import CELLS, Cell
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import TrainingArguments

LOOPS = ("trainer", "lightning", "accelerate", "plain")
WAYS = {"alone": 1, "ddp": 2, "fsdp2": 2}
"""Processes; DistributedDataParallel, and `fully_shard`."""

NO_FSDP2_ON_CPU = {
    "trainer": "TrainingArguments(fsdp=True) without a GPU trains with DistributedDataParallel, and does not say so",
    "accelerate": "Accelerator(fsdp_plugin=...) without a GPU leaves the plugin out, and does not say so",
}
"""Loops of the matrix that cannot run there; `test_what_cannot_run_without_a_gpu` fails when that changes."""

PAIRS = [(loop, way) for loop in LOOPS for way in WAYS if way != "fsdp2" or loop not in NO_FSDP2_ON_CPU]
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


def launch(loop: str, half: str, directory: Path, way: str) -> None:
    """All cells in new processes, which form a gloo group where there are several."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    group = {"WORLD_SIZE": str(WAYS[way]), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    group |= {"LOOPS_SHARDED": str(int(way == "fsdp2"))}
    running, processes = [], WAYS[way]
    for rank in range(processes):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "NODE_RANK": "0"} | group if processes > 1 else {}
        command = [sys.executable, str(SCRIPT), loop, half, str(directory)]
        with (directory / f"{half}-{rank}.log").open("w") as log:  # the child keeps its own handle
            running.append(subprocess.Popen(command, env={**os.environ, **place}, stdout=log, stderr=log))
    try:
        codes = [process.wait(timeout=140) for process in running]
    finally:
        for process in running:
            process.kill()
    texts = [(directory / f"{half}-{rank}.log").read_text()[-3000:] for rank in range(processes)]
    assert codes == [0] * processes, "\n\n".join(texts)


@pytest.mark.slow
@pytest.mark.parametrize(("loop", "way"), PAIRS, ids=[f"{loop}-{way}" for loop, way in PAIRS])
def test_a_new_process_ends_where_an_uninterrupted_run_ends(tmp_path: Path, loop: str, way: str) -> None:
    launch(loop, "first", tmp_path, way)
    launch(loop, "second", tmp_path, way)
    for cell in CELLS:
        found = {
            (run, rank): load_file(tmp_path / cell.name / f"{run}-{rank}.safetensors")
            for run in ("whole", "resumed")
            for rank in range(WAYS[way])
        }
        for key, state in found.items():
            assert_same(found["whole", 0], state, f"{cell.name}, {key}")
        if way == "alone" and loop != "plain":
            reference = train("plain", cell, tmp_path / "reference")
            assert_same(reference, found["whole", 0], f"{cell.name}: {loop} and a plain loop")


def test_what_cannot_run_without_a_gpu(tmp_path: Path) -> None:
    """Where the libraries take another way in silence."""
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, fsdp=True, fsdp_config={"version": 2}, report_to="none")
    assert arguments.distributed_state is not None
    assert arguments.distributed_state.distributed_type != DistributedType.FSDP
    AcceleratorState._reset_state()
    accelerator = Accelerator(cpu=True, fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2))
    assert accelerator.distributed_type != DistributedType.FSDP
    AcceleratorState._reset_state()
    assert set(NO_FSDP2_ON_CPU) == {"trainer", "accelerate"}
