"""ResNet-32 on CIFAR-10: accuracy by share of weights or units removed after training, beside the published numbers.

    python benchmarks/reproduce/resnet.py all --quick --train cifar10_train.parquet --test cifar10_test.parquet
    python benchmarks/reproduce/resnet.py train --full --jobs 4 --minutes 9 --train ... --test ...
    python benchmarks/reproduce/resnet.py report --full

Gomez et al., arXiv 1905.13678, the tables of weight and unit pruning, of ramping targeted dropout and of random pruning
before training. A model is trained once per method and seed and judged at every share: pruned by magnitude at once,
every convolution but the stem, nothing trained afterwards. At 0 % the dense model is judged, without the mask that
evaluation has in the authors' code (`ablation.py` compares those masks).

`--quick`: 20 methods × 3 seeds of a network with one unit per stage and 16, 32 and 64 filters behind a stem with
stride 2, 10 epochs of 10,240 rows, judged on 2,000: under 40 minutes on two cores, as two processes of one thread.
L1, L0 and variational dropout run at the library's strengths, which suit short runs. `--full`: the authors' network,
256 epochs, their optimizer and strengths, bfloat16 on a GPU, `--jobs` models at once. It trains on all 50,000 rows, the
authors' code on 40,000. Nothing was tuned; the test rows are read after training.

Each finished model is a file and is not made again. With `--minutes` what is unfinished is saved in time, and the next
call goes on from there, to the bit on a CPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from resnet_report import markdown, plot, write
from resnet_runs import Found, completed, finished, parser, train

GROUPS = ("weights", "units", "random")


def report(args: argparse.Namespace) -> str:
    """Write JSON, tables and plot; the tables are returned."""
    return write(finished(args.output, args.settings, GROUPS), args, "resnet", render)


def render(found: Found, picture: Path) -> str:
    """The tables, and the plot beside them, of the file that `write` leaves."""
    network = "ResNet-32" if "--full" in found["command"] else "small network"
    plot(found["runs"], f"here, {network}, {found['settings']['epochs']} epochs", picture.with_suffix(".png"))
    return markdown(found["runs"])


def main(arguments: Sequence[str] | None = None) -> None:
    """Make what is missing, then write and print tables, numbers and plot."""
    args = completed(parser(__doc__).parse_args(arguments))
    if args.stage != "report":
        train(args, GROUPS)
    if args.stage != "train":
        print(report(args))


if __name__ == "__main__":
    main()
