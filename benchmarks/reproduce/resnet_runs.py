"""What `resnet.py`, `ablation.py` and `dependence.py` share: their options, and the models that are trained once."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import warnings
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from processes import in_processes
from provenance import commit
from resnet_images import Images, load
from resnet_judge import Tensors, Verdict, dense, judge, pruned
from resnet_network import Shape, build
from resnet_rows import ROWS, Group, Row, Strengths, names
from resnet_train import Run, Settings, Stop, prepare
from safetensors.torch import load_file, save_file

import td_plugin as td
from td_plugin.export.machine import machine
from td_plugin.files import staged_file
from td_plugin.switches import EvalMask

MASKS: tuple[EvalMask, ...] = ("pruned", "expected", "dense")
SMALL = Shape(stem=8, stem_stride=2, widths=(16, 32, 64), units=1, momentum=0.1)
QUICK = Settings(SMALL, epochs=10, batch=64, rate=0.1, cosine=True, rows=10_240, test_rows=2_000)
FULL = Settings(strengths=Strengths(l1=1.8e-6, l0=0.1 / 50_000, variational=0.01 / 50_000))
"""The authors' strengths; their L1 is 0.1 for the mean weight of a tensor, which is 1.8e-6 for one of 1.9 million."""

Found = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One model to make, and where everything is.

    Attributes:
        name: of the row.
        seed: of weights, order and draws.
        settings: the budget.
        train: parquet file.
        test: parquet file, or empty.
        output: folder of what is kept.
        device: to train on.
        compiled: whether `torch.compile` is used.
        minutes: after which an unfinished model is saved and left; 0: never.
        every: steps between checkpoints; 0: none.
    """

    name: str
    seed: int
    settings: Settings
    train: str
    test: str
    output: Path
    device: str
    compiled: bool
    minutes: float
    every: int

    def file(self, kind: str, suffix: str) -> Path:
        """Where something of it is kept."""
        return self.output / kind / f"{self.name}-seed{self.seed}.{suffix}"


@lru_cache(maxsize=1)
def _images(train: str, test: str, rows: int, test_rows: int, device: str) -> Images:
    return load(train, test, rows, test_rows).to(device)


def make(job: Job, until: float) -> bool:
    """Train, judge, write the file; False: the time was over first, and a checkpoint says where to go on."""
    if job.minutes and time.time() > until:
        return False  # before anything is loaded
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # units that `shrink` could not remove: the paper's are those of each layer
    settings = job.settings
    images = _images(job.train, job.test, settings.rows, settings.test_rows, job.device)
    file = job.file("weights", "safetensors")
    if not file.exists() and not _train(job, images, file, until):
        return False
    found = verdicts(ROWS[job.name], load_file(file), settings.shape, images)
    about = {"method": job.name, "seed": job.seed, "settings": asdict(settings), "device": job.device}
    about |= {"tested": Path(job.test).name or "held out", **json.loads(job.file("weights", "json").read_text())}
    with staged_file(job.file("runs", "json")) as path:
        path.write_text(json.dumps({**about, **found}, indent=1) + "\n", encoding="utf-8")
    job.file("checkpoints", "safetensors").unlink(missing_ok=True)
    return True


def _judged(job: Job) -> bool:
    """Whether there is a result at all shares of today."""
    file, row = job.file("runs", "json"), ROWS[job.name]
    if not file.exists():
        return False
    found = json.loads(file.read_text(encoding="utf-8"))
    return all({f"{share:g}" for share in row.shares} <= set(found[what]) for what in row.what)


def _train(job: Job, images: Images, file: Path, until: float) -> bool:
    start, checkpoint = time.perf_counter(), job.file("checkpoints", "safetensors")
    run = Run(job.name, job.settings, job.seed, job.device)
    if checkpoint.exists():
        run.load(checkpoint)
    first = run.done
    left = max(until - time.time(), 0.0) if job.minutes else math.inf
    forward = torch.compile(run.model) if job.compiled else None
    if not run.fit(images, Stop(time.monotonic() + left, job.every), checkpoint, forward):
        return False
    about: Found = {"steps": run.done, "seconds_per_step": (time.perf_counter() - start) / max(run.done - first, 1)}
    providers = ["CUDAExecutionProvider"] if job.device == "cuda" else []
    about |= {"commit": commit(), "machine": machine(providers)}
    with staged_file(job.file("weights", "json")) as path:
        path.write_text(json.dumps(about) + "\n", encoding="utf-8")
    with staged_file(file) as path:
        save_file(run.weights(), path)
    return True


def verdicts(row: Row, weights: Tensors, shape: Shape, images: Images) -> Found:
    """Accuracy and loss by share removed, and under each mask that evaluation may have."""
    if not row.shares:
        return {row.what[0]: {f"{row.level:g}": dense(weights, shape, images)}}
    found: Found = {what: pruned(weights, shape, images, what, row.shares) for what in row.what}
    if row.recipe is not None and row.level:
        recipe = row.recipe(Strengths())
        found["masks"] = {mask: _under(recipe, row.level, mask, weights, shape, images) for mask in MASKS}
    return found


def _under(recipe: td.Recipe, level: float, mask: EvalMask, weights: Tensors, shape: Shape, images: Images) -> Verdict:
    model = build(shape, 0)
    model.load_state_dict(weights)
    sparsifier = td.TargetedDropout(recipe, level, eval_mask=mask)
    prepare(sparsifier, model)
    return judge(model.to(images.test.device), images)


def run_all(jobs: list[Job], processes: int, minutes: float) -> None:
    """Make the models that have no file yet, until the time is over."""
    until = time.time() + 60 * minutes
    missing = [job for job in jobs if not _judged(job)]
    in_processes(make, [(job, until) for job in missing], processes, "models")


def finished(output: Path, settings: Settings, groups: tuple[Group, ...]) -> list[Found]:
    """All results on disk of some comparisons; they must have been made with today's settings."""
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((output / "runs").glob("*.json"))]
    if any(run["settings"] != json.loads(json.dumps(asdict(settings))) for run in runs):
        sys.exit(f"the runs in {output} have other settings; choose another --output")
    return [run for run in runs if run["method"] in ROWS and ROWS[run["method"]].group in groups]


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that the three scripts share."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("stage", choices=["train", "report", "all"], help="report needs only the stored runs")
    size = made.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="a small network on a part of the data (the default)")
    size.add_argument("--full", action="store_true", help="the authors' network and schedule")
    made.add_argument("--train", default="", help="parquet file with columns image and label")
    made.add_argument("--test", default="", help="another; default: held-out rows of --train")
    made.add_argument("--rows", type=int, help="to train on; 0: all")
    made.add_argument("--test-rows", type=int, help="to judge on; 0: all")
    made.add_argument("--epochs", type=int)
    made.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    made.add_argument("--methods", nargs="+", choices=list(ROWS), metavar="NAME", help=f"of {', '.join(ROWS)}")
    made.add_argument("--jobs", type=int, default=2, help="processes, of one thread each; on a GPU they share it")
    made.add_argument("--minutes", type=float, default=0.0, help="then save what is unfinished; run again to go on")
    made.add_argument("--every", type=int, default=0, help="steps between checkpoints; default: 2000 with --full")
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    made.add_argument("--compile", action="store_true", help="use torch.compile")
    made.add_argument("--output", type=Path, help="default: build/reproduce/resnet-quick or -full")
    made.add_argument("--results", type=Path, default=Path("docs/results"))
    return made


def completed(args: argparse.Namespace) -> argparse.Namespace:
    """Options that depend on others."""
    size = "full" if args.full else "quick"
    args.output = args.output or Path("build/reproduce") / f"resnet-{size}"
    changes = {"rows": args.rows, "test_rows": args.test_rows, "epochs": args.epochs}
    args.settings = replace(
        FULL if args.full else QUICK, **{name: value for name, value in changes.items() if value is not None}
    )
    args.every = args.every or (2000 if args.full else 0)
    if args.stage != "report" and not args.train:
        sys.exit("--train is missing")
    return args


def train(args: argparse.Namespace, groups: tuple[Group, ...], wanted: tuple[str, ...] = ()) -> None:
    """Make the models of some comparisons, seed by seed, and `wanted` ones of others."""
    methods = args.methods or [*names(groups, args.full), *wanted]
    finished(args.output, args.settings, groups)
    jobs = [
        Job(
            name, seed, args.settings, args.train, args.test, args.output,
            args.device, args.compile, args.minutes, args.every,
        )
        for seed in args.seeds
        for name in methods
    ]  # fmt: skip
    run_all(jobs, args.jobs, args.minutes)
