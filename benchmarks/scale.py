"""What the sparsifier's own calls cost from a million to a billion weights, beside copying those weights.

    python benchmarks/scale.py [--max-weights 1e9] [--dtype float32|bfloat16] [--threads 1] [--rounds 3]
                               [--output build/scale] [--quick]

Stacks of square `nn.Linear` of random weights, `targeted_weight` at γ = 0.75. In every round: prepare, step, step after
a small change of all weights, redraw, state_dict, load_state_dict, report, squash_mask. Before each call the weights
are copied (`[p.clone() for p in weights]`), and ratios are to the median of those copies; since new memory is dear,
ratios to copying into memory that is there already are stated too. Calls are summed up by the medians of the rounds.

A redraw draws for weights that are ranked already, so a step less a redraw is what it takes to find the candidates:
from nothing in the first step, from the last thresholds later. Memory is what the masks hold after a step, and the peak
of resident memory in a call over what there was before it (Linux).

A line `seconds = a + b · tensors + c · weights` is fitted per call to all cases; "off by" is its largest relative error
for calls of more than 10 ms.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from scale_report import fits, markdown, plot
from torch import Tensor, nn

import td_plugin as td
from td_plugin import kernels
from td_plugin.export.machine import machine
from td_plugin.files import staged_file
from td_plugin.parametrization import masks_of

GAMMA = 0.75
CALLS = ("prepare", "first step", "step", "redraw", "state_dict", "load_state_dict", "report", "squash_mask")
SELECTS = {  # the calls that find candidates, and like which step
    "first step": "first step",
    "step": "step",
    "load_state_dict": "step",
    "report": "first step",
    "squash_mask": "first step",
}


@dataclass(frozen=True)
class Case:
    """A stack of layers.

    Attributes:
        tensors: how many.
        width: inputs and outputs of each.
    """

    tensors: int
    width: int

    @property
    def weights(self) -> int:
        """In all tensors together."""
        return self.tensors * self.width**2

    def model(self, dtype: torch.dtype) -> nn.Sequential:
        """Memory without values, and a last layer, which is left alone because it makes the logits."""
        shapes = [(self.width, self.width)] * self.tensors + [(self.width, 1)]
        layers = [nn.Linear(*shape, bias=False, device="meta", dtype=dtype) for shape in shapes]
        return nn.Sequential(*layers).to_empty(device="cpu")


CASES = (
    *(Case(1, width) for width in (1024, 3200, 10_000, 32_000)),  # weights per tensor
    *(Case(tensors, 1024) for tensors in (10, 100, 950)),  # tensors of a million
    Case(60, 4096),  # as in a language model
    *(Case(tensors, 32) for tensors in (1000, 10_000)),  # nothing but tensors
)
QUICK = (Case(1, 256), Case(4, 128), Case(50, 16), Case(200, 16))


def seconds_of(call: Callable[[], object]) -> float:
    """Of one call; what it returns is freed after the clock is read."""
    gc.collect()
    start = time.perf_counter()
    kept = call()
    seconds = time.perf_counter() - start
    del kept
    return seconds


def resident(key: str) -> int:
    """A line of this process's status in the kernel, in bytes; 0 where there is none."""
    if not (source := Path("/proc/self/status")).exists():
        return 0
    lines = (line.split() for line in source.read_text(encoding="utf-8").splitlines())
    return next(1024 * int(words[1]) for words in lines if words[:1] == [f"{key}:"])


def forget_peak() -> None:
    """Start the kernel's record of the peak anew."""
    if (switch := Path("/proc/self/clear_refs")).exists():
        switch.write_text("5")


def copy_at_hand(weights: list[Tensor]) -> float:
    """Seconds to copy all weights into one place that has been written to before."""
    place = torch.zeros_like(weights[0])
    return seconds_of(lambda: [place.copy_(weight) for weight in weights])


@torch.no_grad()
def change(weights: list[Tensor]) -> None:
    """Move every weight a little, as an optimizer's step does; needs no memory."""
    for weight in weights:
        first, second = weight.view(-1)[: weight.numel() // 2 * 2].chunk(2)
        first.add_(second, alpha=1e-3)
        second.add_(first, alpha=1e-3)


def one_round(model: nn.Module, weights: list[Tensor]) -> tuple[dict[str, Any], int]:
    """Every call once: its seconds, those of the copy before it, and its peak; and the bytes held after a step."""
    with torch.no_grad():
        for weight in weights:
            weight.uniform_(-1, 1)
    sparsifier = td.TargetedDropout(td.recipes.targeted_weight(), GAMMA)
    calls: dict[str, Callable[[], object]] = {
        "prepare": lambda: sparsifier.prepare(model),
        "first step": sparsifier.step,
        "step": sparsifier.step,
        "redraw": sparsifier.redraw,
        "state_dict": sparsifier.state_dict,
        "load_state_dict": lambda: sparsifier.load_state_dict(saved),
        "report": sparsifier.report,
        "squash_mask": sparsifier.squash_mask,
    }
    found: dict[str, Any] = {}
    held = 0
    for name in CALLS:
        copy = seconds_of(lambda: [weight.clone() for weight in weights])
        if name == "step":
            change(weights)
        forget_peak()
        before, seconds = resident("VmRSS"), seconds_of(calls[name])
        found[name] = {"seconds": seconds, "copy": copy, "peak": max(resident("VmHWM") - before, 0)}
        if name == "first step":
            held = sum(mask.keep.untyped_storage().nbytes() for _, _, mask in masks_of(model) if mask.keep is not None)
            saved = sparsifier.state_dict()
    return found, held


def measure(case: Case, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Medians over the rounds."""
    model = case.model(dtype)
    gc.freeze()  # what is there stays; collecting the rest before every call is quick
    weights = [layer.weight.detach() for layer in model[:-1]]
    results = [one_round(model, weights) for _ in range(rounds)]
    copies = {"copy": statistics.median(call["copy"] for found, _ in results for call in found.values())}
    copies["copy_at_hand"] = statistics.median(copy_at_hand(weights) for _ in range(max(rounds, 3)))
    row: dict[str, Any] = {"tensors": case.tensors, "width": case.width, "weights": case.weights, **copies}
    row["held_bytes_per_weight"] = results[-1][1] / case.weights
    row["calls"] = {
        name: {key: statistics.median(found[name][key] for found, _ in results) for key in results[0][0][name]}
        for name in CALLS
    }
    seconds = {name: call["seconds"] for name, call in row["calls"].items()}
    row["selection"] = {
        name: max(seconds[name] - seconds["redraw"], 0.0) / case.weights for name in ("first step", "step")
    }
    for name, call in row["calls"].items():
        finding = row["selection"][SELECTS[name]] * case.weights if name in SELECTS else 0.0
        for copy, taken in copies.items():
            call[f"times_{copy}"] = seconds[name] / taken
            call[f"times_{copy}_without_selection"] = max(seconds[name] - finding, 0.0) / taken
    return row


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-weights", type=float, default=1.1e9, help="leave out larger cases")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, help="default: 3; with --quick 1")
    parser.add_argument("--output", type=Path, default=Path("build/scale"))
    parser.add_argument("--quick", action="store_true", help="four small cases, one round: shows that it runs")
    args = parser.parse_args()
    args.rounds = args.rounds or (1 if args.quick else 3)
    return args


def main() -> None:
    """Measure, small cases first; write and print table, numbers and plot."""
    args = parse()
    torch.set_num_threads(args.threads)
    cases = [case for case in (QUICK if args.quick else CASES) if case.weights <= args.max_weights]
    one_round(model := Case(1, 64).model(torch.float32), [model[0].weight.detach()])  # compiles the loops
    rows = []
    for case in sorted(cases, key=lambda case: case.weights):
        print(f"{case.tensors} × {case.width}²", end=" ", file=sys.stderr, flush=True)
        start = time.perf_counter()
        rows.append(measure(case, getattr(torch, args.dtype), args.rounds))
        print(f"{time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    facts = {**machine(()), "threads": str(args.threads), "compiled loops": str(kernels.available())}
    found = {"machine": facts, "dtype": args.dtype, "rounds": args.rounds, "gamma": GAMMA, "rows": rows}
    found["fits"] = {name: fits(rows, name) for name in ("copy", *CALLS)}
    name = f"scale_{args.dtype}"
    with staged_file(args.output / f"{name}.json") as path:
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    with staged_file(args.output / f"{name}.md") as path:
        path.write_text(markdown(found) + "\n", encoding="utf-8")
    plot(found, args.output / f"{name}.png")
    print(markdown(found))


if __name__ == "__main__":
    main()
