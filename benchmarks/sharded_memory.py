"""What a process holds at the highest point of its training steps: the whole model, or its shard under FSDP2.

    python benchmarks/sharded_memory.py [--processes 2] [--width 4096] [--layers 8] [--steps 3]
                                        [--masks none weights units] [--quick]

Stacks of square `nn.Linear` in float32 on CPU over gloo, AdamW, 64 rows a step. Every case runs in new processes:
without masks, with weights, with units; whole (DistributedDataParallel) and sharded (`fully_shard` on every layer).
Resident memory over what the process had before the model was there (Linux, `VmHWM`), of the process that needs most;
prints a table. Layers are drawn one by one and sharded at once, so that the model's making does not decide the peak.
"""

from __future__ import annotations

import argparse
import os
import socket
import tempfile
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed, multiprocessing, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import td_plugin as td

RECIPES = {"none": None, "weights": td.recipes.targeted_weight(0.5), "units": td.recipes.targeted_unit(0.5)}
ROWS = 64


def resident(field: str) -> int:
    """Bytes of this process: `VmRSS` now, `VmHWM` at most."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def network(width: int, layers: int, sharded: bool) -> nn.Sequential:
    """`layers` linear layers with ReLU between them; sharded, if so, as soon as each is there."""
    torch.manual_seed(0)
    model = nn.Sequential()
    for _ in range(layers):
        layer = nn.Sequential(nn.Linear(width, width, bias=False), nn.ReLU())
        model.append(fully_shard(layer) if sharded else layer)
    return fully_shard(model) if sharded else model  # type: ignore[return-value]


def work(rank: int, port: int, options: argparse.Namespace, recipe: str, sharded: bool, out: str) -> None:
    """One process of one case: its peak goes to the file `out`."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    distributed.init_process_group("gloo", rank=rank, world_size=options.processes, timeout=timedelta(minutes=5))
    # What is loaded at first use, the masks' compiled loops among it, is no part of the model.
    for warm in (True, False):
        before = resident("VmRSS")
        peak = _train(16 if warm else options.width, 2 if warm else options.layers, options.steps, recipe, sharded)
    most = torch.tensor(peak - before)
    distributed.all_reduce(most, distributed.ReduceOp.MAX)
    if rank == 0:
        Path(out).write_text(str(int(most)), encoding="utf-8")
    distributed.barrier()
    distributed.destroy_process_group()


def _train(width: int, layers: int, steps: int, recipe: str, sharded: bool) -> int:
    model = network(width, layers, sharded)
    chosen = RECIPES[recipe]
    sparsifier = None if chosen is None else td.TargetedDropout(chosen, 0.5)
    if sparsifier is not None:
        sparsifier.prepare(model, [{"tensor_fqn": f"{index}.0.weight"} for index in range(layers - 1)])
    wrapped = model if sharded else DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-4)
    for _ in range(steps):
        if sparsifier is not None:
            sparsifier.step()
        wrapped(torch.randn(ROWS, width)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return resident("VmHWM")


def peak(options: argparse.Namespace, recipe: str, sharded: bool) -> int:
    """Bytes, of the process that needs most."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as directory:
        out = str(Path(directory) / "peak")
        multiprocessing.spawn(work, (port, options, recipe, sharded, out), nprocs=options.processes)
        return int(Path(out).read_text(encoding="utf-8"))


def main() -> None:
    """Measure all cases and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--masks", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--quick", action="store_true", help="a small model")
    options = parser.parse_args()
    if options.quick:
        options.width, options.layers = 512, 4
    weights = options.layers * options.width**2
    print(f"{weights:,} float32 weights, {options.processes} processes, torch {torch.__version__}\n")
    print("| masks | whole, MB per process | FSDP2, MB per process | FSDP2 over whole |\n| --- | --- | --- | --- |")
    for recipe in options.masks:
        whole, shard = (peak(options, recipe, sharded) for sharded in (False, True))
        print(f"| {recipe} | {whole / 1e6:,.0f} | {shard / 1e6:,.0f} | {shard / whole:.2f} |", flush=True)


if __name__ == "__main__":
    main()
