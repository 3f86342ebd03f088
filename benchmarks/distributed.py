"""What targeted dropout adds to a step of two processes, and what masks take on each.

    python benchmarks/distributed.py [--steps 40] [--processes 2] [--width 1024] [--quick]

DistributedDataParallel over gloo on CPU: two copies of one model, with masks and without, take a step each in turn, in
random order, on the same batch; a step is over when the slowest process is done. Median of the pairs' ratios, and the
interval that holds it with 95 % confidence (order statistics). Under FSDP2: the bytes of masks that a process keeps
between forwards, against those of one process with the whole model. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import time
from collections.abc import Callable
from datetime import timedelta

import torch
from torch import Tensor, distributed, multiprocessing, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import td_plugin as td
from td_plugin.parametrization import masks_of
from td_plugin.sharded import ShardedMask

RECIPES = {"weights": td.recipes.targeted_weight(0.5), "units": td.recipes.targeted_unit(0.5)}
BATCH, LAYERS, WARMUP = 64, 6, 3


def network(width: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(LAYERS)))


def masked(model: nn.Module, recipe: str) -> td.TargetedDropout:
    sparsifier = td.TargetedDropout(RECIPES[recipe], 0.5)
    sparsifier.prepare(model, [{"tensor_fqn": f"{index}.0.weight"} for index in range(LAYERS - 1)])
    return sparsifier


def stepper(width: int, recipe: str | None) -> Callable[[Tensor], float]:
    """Takes a step and says how many seconds it took the slowest process."""
    model = network(width)
    sparsifier = None if recipe is None else masked(model, recipe)
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-4)

    def step(batch: Tensor) -> float:
        distributed.barrier()
        start = time.perf_counter()
        if sparsifier is not None:
            sparsifier.step()
        wrapped(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        taken = torch.tensor(time.perf_counter() - start)
        distributed.all_reduce(taken, distributed.ReduceOp.MAX)
        return float(taken)

    return step


def interval(values: list[float]) -> dict[str, float]:
    """Median, and the order statistics around it that hold it in 95 of 100 cases."""
    ordered, n = sorted(values), len(values)
    reach = 0.98 * n**0.5
    low, high = max(int(n / 2 - reach), 0), min(int(n / 2 + reach + 1), n - 1)
    return {"median": ordered[n // 2], "low": ordered[low], "high": ordered[high], "pairs": n}


def ratios(width: int, steps: int, recipe: str) -> dict[str, float]:
    sides = {"with": stepper(width, recipe), "without": stepper(width, None)}
    order, found = random.Random(0), []  # the same in all processes
    for index in range(WARMUP + steps):
        batch, names = torch.randn(BATCH, width), ["with", "without"]
        order.shuffle(names)
        taken = {name: sides[name](batch) for name in names}
        if index >= WARMUP:
            found.append(taken["with"] / taken["without"])
    return interval(found)


def mask_bytes(width: int, recipe: str, sharded: bool) -> int:
    """What this process keeps of all masks after a step and an evaluation."""
    model = network(width)
    if sharded:
        for layer in model:
            fully_shard(layer)
        fully_shard(model)
    sparsifier = masked(model, recipe)
    sparsifier.step()
    model.eval()
    total = 0
    for _, _, mask in masks_of(model):
        kept = mask.held_bytes() if isinstance(mask, ShardedMask) else 0
        if not isinstance(mask, ShardedMask) and mask.keep is not None:
            kept = 2 * mask.keep.untyped_storage().nbytes()  # of training and of evaluation, equally large
        total += kept
    return total


def work(rank: int, processes: int, port: int, width: int, steps: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    distributed.init_process_group("gloo", rank=rank, world_size=processes, timeout=timedelta(minutes=2))
    result: dict[str, object] = {"processes": processes, "width": width, "layers": LAYERS, "batch": BATCH}
    for recipe in RECIPES:
        result[f"DDP step with {recipe}, times one without"] = ratios(width, steps, recipe)
        held = {name: mask_bytes(width, recipe, name == "FSDP2") for name in ("whole", "FSDP2")}
        result[f"bytes of masks per process, {recipe}"] = held
    if rank == 0:
        print(json.dumps(result, indent=1))
    distributed.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--quick", action="store_true", help="a few steps of a small model")
    options = parser.parse_args()
    width, steps = (64, 5) if options.quick else (options.width, options.steps)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.spawn(work, (options.processes, port, width, steps), nprocs=options.processes)


if __name__ == "__main__":
    main()
