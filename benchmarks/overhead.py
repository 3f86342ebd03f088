"""What targeted dropout adds to a training step, beside what other ways of pruning while training add.

    python benchmarks/overhead.py [--device cpu|cuda] [--quick] [--pairs 30] [--threads 2] [--output build/overhead]
                                  [--rows weights,units] [--compile] [--dtype float32|bfloat16]

A step is forward, backward, fused AdamW and zero_grad of BERT-base with random weights, its dropout on, and all that a
method does per step. Every row is a copy of the model with an optimizer of its own; in every round each row makes one
step on the same batch, in random order, and is compared with the plain model's step of that round. The copies are made
anew a few times (`--builds`), since where a copy lies in memory changes its speed; the row "none, again" shows by how
much. Evaluation is a forward under `no_grad`. Memory is counted in the masks, and as the peak of a process that trains.

Writes JSON (all single times), a Markdown table and a plot into the output folder. `--quick` only shows that it runs.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import random
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from overhead_measure import Setting, compared, held_bytes, in_turn, own_seconds, peak_bytes, targeted
from overhead_report import machine, plot, text
from overhead_rows import ALPHA, GAMMA, ROWS, NotHereError, Variant, matrices
from torch import nn
from tqdm import tqdm

from td_plugin.files import staged_file

WARMUP = 2
EVALUATED = ("none", "control", "weights", "units")
LIMIT, LIMIT_COMPILED = 0.03, 0.02


def parse() -> argparse.Namespace:
    """The command line; what --quick and the device decide is filled in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--quick", action="store_true", help="2 layers, 1000 tokens, batch 2 x 32, 5 pairs, 1 build")
    parser.add_argument("--pairs", type=int, help="rounds; 30")
    parser.add_argument("--threads", type=int, help="2; 1 if --quick")
    parser.add_argument("--output", type=Path, default=Path("build/overhead"))
    parser.add_argument("--rows", type=lambda text: text.split(","), default=list(ROWS), help=f"of {','.join(ROWS)}")
    parser.add_argument("--compile", action="store_true", help="torch.compile the forwards")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="of autocast; bfloat16 on cuda")
    parser.add_argument("--builds", type=int, help="how often the copies are made anew; 3, compiled 1")
    parser.add_argument("--layers", type=int, help="12")
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--batch", type=int, help="8 on cpu, 32 on cuda")
    parser.add_argument("--sequence", type=int, help="128")
    parser.add_argument("--no-peak", action="store_true", help="leave the processes out that measure peak memory")
    parser.add_argument("--peak", choices=list(ROWS), help="only print the memory of one row, as JSON")
    args = parser.parse_args()
    if unknown := sorted(set(args.rows) - set(ROWS)):
        parser.error(f"unknown rows {', '.join(unknown)}; there are {', '.join(ROWS)}")
    once = args.quick or args.compile
    full = {"pairs": 30, "builds": 1 if once else 3, "threads": 2, "layers": 12, "batch": 8, "sequence": 128}
    full["dtype"] = "float32"
    if args.device == "cuda":
        full |= {"batch": 32, "dtype": "bfloat16"}
    if args.quick:
        full |= {"pairs": 5, "threads": 1, "layers": 2, "batch": 2, "sequence": 32}
    for name, value in full.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if min(args.pairs, args.builds) < 1 or args.builds > args.pairs:
        parser.error("at least one pair, one build, and a pair for each build")
    return args


def setting_of(args: argparse.Namespace) -> Setting:
    vocabulary = 1000 if args.quick else 30522
    return Setting(
        args.device, args.dtype, args.compile, args.layers, args.hidden, vocabulary, args.batch, args.sequence
    )


def build(setting: Setting, base: nn.Module, names: list[str], left_out: dict[str, str]) -> dict[str, Variant]:
    """A copy of `base` per row, each after two steps; a row of others that fails is left out, with the reason."""
    variants: dict[str, Variant] = {}
    batch = setting.batches()[0]
    for name in tqdm(names, desc="building", file=sys.stderr, mininterval=1.0):
        try:
            variant = setting.build(name, copy.deepcopy(base))
            for _ in range(WARMUP):
                variant.step(batch, setting.autocast)
            variants[name] = variant
        except Exception as error:
            if ROWS[name].ours and not isinstance(error, NotHereError):
                raise
            left_out[name] = str(error).splitlines()[0] if str(error) else type(error).__name__
            print(f"left out: {name}: {left_out[name]}", file=sys.stderr)
    return variants


def train(setting: Setting, names: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """All rounds of training, then those of evaluation on the last copies."""
    base, seconds, builds, left_out = setting.model(), {name: [] for name in names}, [], {}
    faults: dict[str, list[int]] = {name: [] for name in names}
    for number in range(args.builds):
        order = [name for name in names if name not in left_out]
        variants = build(setting, base, random.Random(number).sample(order, len(order)), left_out)
        steps = {name: lambda batch, v=variant: v.step(batch, setting.autocast) for name, variant in variants.items()}
        rounds = args.pairs // args.builds + (number < args.pairs % args.builds)
        new, given_back = in_turn(setting, steps, rounds, number, f"training {number + 1}/{args.builds}")
        for name, values in new.items():
            seconds[name] += values
            faults[name] += given_back[name]
        builds.append({name: compared(values, new["none"])["median"] for name, values in new.items()})
        shown = (f"{name} {100 * value:+.1f} %" for name, value in builds[-1].items() if name != "none")
        print(f"build {number + 1}: {', '.join(shown)}", file=sys.stderr)  # what there is if the rest is cut off
        rows = {name: memory(variants[name]) for name in variants if ROWS[name].ours}
        if setting.device == "cpu" and not setting.compiled:  # elsewhere a call returns before its work is done
            for name in set(rows) & {"weights", "weights-every-10"}:
                rows[name]["own_ms"] = 1e3 * own_seconds(setting, variants[name])
        if number + 1 < args.builds:
            del variants, steps
            gc.collect()
    for name in (name for name in names if name not in left_out):
        by_build = [medians[name] for medians in builds]
        rows[name] = {**rows.get(name, {}), **compared(seconds[name], seconds["none"]), "by_build": by_build}
        rows[name] |= {"title": ROWS[name].title, "what": ROWS[name].what, "seconds": seconds[name]}
        rows[name]["faults"] = statistics.median(faults[name])
    del steps
    evaluated = {name: variants[name] for name in EVALUATED if name in variants}
    variants.clear()
    weights = [base.get_parameter(name).numel() for name in matrices(base)]
    return {
        "matrices": {"tensors": len(weights), "weights": sum(weights), "of": sum(p.numel() for p in base.parameters())},
        "training": {name: rows[name] for name in names if name in rows},
        "evaluation": evaluate(setting, evaluated, args.pairs),
        "left_out": left_out,
    }


def memory(variant: Variant) -> dict[str, float]:
    """What the masks of one of our rows hold, while the model is in training."""
    if variant.sparsifier is None:
        return {}
    held = held_bytes(variant.model, variant.sparsifier)
    tensors, weights = targeted(variant.model)
    return {"tensors": tensors, "weights": weights, "held_bytes": held, "held_bytes_per_weight": held / weights}


def evaluate(setting: Setting, variants: dict[str, Variant], pairs: int) -> dict[str, Any]:
    """Forwards in evaluation mode without gradients; the masked weights are made by the one that is not timed."""
    forwards = {}
    for name, variant in variants.items():
        variant.model.eval()

        def forward(batch: dict[str, torch.Tensor], variant: Variant = variant) -> None:
            with torch.no_grad(), setting.autocast():
                variant.forward(**batch)

        forwards[name] = forward
    in_turn(setting, forwards, WARMUP, 0, "evaluation, warm-up")
    seconds, _ = in_turn(setting, forwards, pairs, 1, "evaluation")
    return {name: {**compared(seconds[name], seconds["none"]), "seconds": seconds[name]} for name in seconds}


def peaks(names: list[str]) -> dict[str, dict[str, int]]:
    """Memory of the plain model and of our rows, each trained in a process of its own, before this one grows."""
    command, found = [sys.executable, __file__, *sys.argv[1:], "--peak"], {}
    for name in names:
        print(f"memory of {name}", file=sys.stderr)
        done = subprocess.run([*command, name], stdout=subprocess.PIPE, text=True, check=True)
        found[name] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure, write the three files and print the table."""
    args = parse()
    torch.set_num_threads(args.threads)
    torch._dynamo.config.recompile_limit = 64  # torch.ao's mask breaks the graph in every layer
    transformers.logging.set_verbosity_error()
    setting = setting_of(args)
    if args.peak:
        print(json.dumps(peak_bytes(setting, args.peak)))
        return
    names = list(dict.fromkeys(["none", *args.rows]))
    ours = [name for name in names if ROWS[name].ours]
    measured = [] if args.no_peak else ["none", *(ours[:1] if args.quick else ours)]
    found = {
        "command": " ".join(["python benchmarks/overhead.py", *_shown(sys.argv[1:])]),
        "machine": machine(args.device),
        "setting": {**vars(setting), "pairs": args.pairs, "builds": args.builds, "gamma": GAMMA, "alpha": ALPHA},
        "quick": args.quick,
        "peak": peaks(measured),
        **train(setting, names, args),
    }
    stem = f"overhead_{args.device}{'_compiled' if args.compile else ''}"
    with staged_file(args.output / f"{stem}.json") as path:
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    with staged_file(args.output / f"{stem}.md") as path:
        path.write_text(text(found), encoding="utf-8")
    with staged_file(args.output / f"{stem}.png") as path:
        plot(found, path, LIMIT_COMPILED if args.compile else LIMIT)
    print(text(found))


def _shown(arguments: list[str]) -> list[str]:
    """The options without the output folder, which says nothing."""
    kept = [word for word in arguments if not word.startswith("--output=")]
    if "--output" in kept:
        at = kept.index("--output")
        del kept[at : at + 2]
    return kept


if __name__ == "__main__":
    main()
