"""One process of the matrix: all cells of one loop, its first half or its second."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from datetime import timedelta
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from loops.cells import CELLS, RANK, WORLD
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor


def main(loop: str, half: str, directory: Path) -> None:
    """`first`: every cell without a stop, and up to the stop; `second`: every cell from the stop on."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    if WORLD > 1:
        torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    train = import_module(f"loops.{loop}_loop").train
    for cell in CELLS:
        here = directory / cell.name
        if half == "first":
            keep(train(cell, here / "whole"), here, "whole")
            train(cell, here / "half", stop=True)
        else:
            keep(train(cell, here / "half", resume=True), here, "resumed")
    if WORLD > 1:
        torch.distributed.destroy_process_group()


def keep(model: torch.nn.Module, directory: Path, name: str) -> None:
    """The model that a run has ended with, of every process."""
    directory.mkdir(parents=True, exist_ok=True)
    state = {k: v.full_tensor() if isinstance(v, DTensor) else v.contiguous() for k, v in model.state_dict().items()}
    save_file(state, directory / f"{name}-{RANK}.safetensors")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
