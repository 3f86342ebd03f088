"""A small decoder trained from scratch and shrunk: perplexity against tokens per second.

    python benchmarks/finetune/decoder.py train --train TRAIN.parquet --test TEST.parquet [--column en] [--jobs 2]
    python benchmarks/finetune/decoder.py time  --train ... --test ...
    python benchmarks/finetune/decoder.py report --train ... --test ...
    python benchmarks/finetune/decoder.py all   --train ... --test ... [--full]

GPT-2 from its configuration, on any text in a column of a parquet file. Rows: dense; neurons and heads pruned by
ramping targeted dropout; by gradual magnitude; by magnitude in one shot after dense training; and a dense model of the
pruned widths, trained from scratch. All but one shot have the same steps. `train` skips what is on disk, so it can be
stopped at any moment. `time` is for a machine that does nothing else: it times the models of the first seed. `report`
needs only the stored runs.

--quick (the default), 29,000 captions, two processes on two cores: under 40 minutes for two seeds. --full: a larger
model and ten epochs, for a GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from decoder_models import FULL, QUICK, ROWS, Job, make
from decoder_report import Run, write
from decoder_time import measure

sys.path.append(str(Path(__file__).parent.parent / "reproduce"))

from processes import in_processes
from provenance import command, commit

LEVELS = (0.5, 0.75)


def jobs(args: argparse.Namespace) -> list[Job]:
    """All models that are asked for: the dense ones first, since others start from them."""
    wanted = sorted(args.methods, key=list(ROWS).index)
    common = (args.settings, args.train, args.test, args.column, args.output, args.device)
    return [
        Job(method, level, seed, *common)
        for method in wanted
        for seed in args.seeds
        for level in ((0.0,) if method == "dense" else args.levels)
    ]


def finished(args: argparse.Namespace) -> list[Run]:
    """All results on disk; they must have been made with today's settings."""
    paths = sorted((args.output / "runs").glob("*/result.json"))
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    if any(run["settings"] != asdict(args.settings) for run in runs):
        sys.exit(f"the runs in {args.output} have other settings; choose another --output")
    return runs


def train(args: argparse.Namespace) -> None:
    """Make the models that have no folder yet."""
    finished(args)
    missing = [job for job in jobs(args) if not (job.folder / "result.json").exists()]
    if missing:
        missing[0].text()  # the vocabulary is learned once, before several processes want it
    # One shot starts from dense models: when those are there.
    for last, what in ((False, "models"), (True, "one shot")):
        in_processes(make, [(job,) for job in missing if (job.method == "magnitude") == last], args.jobs, what)


def time(args: argparse.Namespace) -> None:
    """Tokens per second of the first seed's models."""
    folders = {f"{job.method}-{job.level:g}": job.folder for job in jobs(args) if job.seed == args.seeds[0]}
    absent = [str(folder) for folder in folders.values() if not (folder / "result.json").exists()]
    if absent or "dense-0" not in folders:
        sys.exit(f"not trained yet: {', '.join(absent) or 'dense'}: run the stage 'train' first")
    measure(folders, args.rounds, args.output / "time.json")


def report(args: argparse.Namespace) -> None:
    """Write JSON, Markdown and plot, and print the table."""
    wanted = {(job.method, job.level, job.seed) for job in jobs(args)}
    runs = [run for run in finished(args) if (run["method"], run["level"], run["seed"]) in wanted]
    kept = args.output / "time.json"
    if not runs or not kept.exists():
        sys.exit(f"nothing to report in {args.output}: run the stages 'train' and 'time' first")
    text = jobs(args)[0].text()
    tokens = {"train": len(text.train), "test": len(text.test), "vocabulary": text.vocabulary}
    found: dict[str, Any] = {
        "command": args.command,
        "commit": commit(),
        "settings": asdict(args.settings),
        "tokens": tokens,
        "runs": [{key: value for key, value in run.items() if key != "settings"} for run in runs],
        "time": json.loads(kept.read_text(encoding="utf-8")),
    }
    print(write(args.name, found, args.results))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["train", "time", "report", "all"])
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="width 256, 4 layers, 1.5 epochs (the default)")
    size.add_argument("--full", action="store_true", help="width 512, 8 layers, 10 epochs")
    parser.add_argument("--train", required=True, help="parquet file with the training text")
    parser.add_argument("--test", required=True, help="another, for the final numbers")
    parser.add_argument("--column", default="en", help="which holds the text")
    parser.add_argument("--epochs", type=float)
    parser.add_argument("--rate", type=float, help="peak of the learning rate")
    parser.add_argument("--width", type=int, help="of the residual stream")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--vocabulary", type=int, help="tokens, at most")
    parser.add_argument("--held-out", type=int, help="last training rows, not trained on")
    parser.add_argument("--methods", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="NAME")
    parser.add_argument("--levels", type=float, nargs="+", default=list(LEVELS), help="γ")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each; on a GPU they share it")
    parser.add_argument("--rounds", type=int, default=40, help="timings of every model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--output", type=Path, default=Path("build/finetune_decoder"))
    parser.add_argument("--results", type=Path, default=Path("docs/results"))
    parser.add_argument("--name", default="decoder", help="of the report's files, without suffix")
    args = parser.parse_args(arguments)
    given = {name: vars(args)[name] for name in ("epochs", "rate", "width", "layers", "vocabulary", "held_out")}
    changes = {name: value for name, value in given.items() if value is not None}
    args.settings = replace(FULL if args.full else QUICK, **changes)
    files = {args.train, args.test}
    words = [Path(word).name if word in files else word for word in (sys.argv[1:] if arguments is None else arguments)]
    args.command = command("benchmarks/finetune/decoder.py", words)
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one stage, or all."""
    args = parse(arguments)
    stages = {"train": train, "time": time, "report": report}
    for name in stages if args.stage == "all" else (args.stage,):
        stages[name](args)


if __name__ == "__main__":
    main()
