"""All methods on one task: accuracy by share of weights or units removed, on equal budgets.

    python benchmarks/methods.py --quick [--output build/methods] [--jobs 2]
    python benchmarks/methods.py --data cifar10_train.parquet --rows 10000 --steps 2000

LeNet-300-100 and LeNet-5, on scikit-learn's digits or on images of a parquet file. One model is trained per method,
share and seed: that is how a model that ships is made, and methods whose schedule ends at the share asked for (gradual,
iterative, N:M) have no other sensible way. Every method runs at its defaults with the same optimizer and number of
steps; nothing was tuned. The test rows are read once per model, after training.

Each finished model is a file in OUTPUT/runs and is not made again, so the work can be stopped at any moment.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from methods_report import markdown, plot, summary
from methods_rows import ROWS, run
from methods_tasks import NETWORKS, Settings, load
from overhead_report import machine
from tqdm import tqdm

from td_plugin.files import staged_file

_load = lru_cache(load)


@dataclass(frozen=True)
class Job:
    """One model to make."""

    network: str
    method: str
    level: float
    seed: int

    def file(self, output: Path) -> Path:
        """Where its result is."""
        name = f"{self.network}-{self.method}-{self.level}-seed{self.seed}.json".replace(" ", "_").replace(":", "of")
        return output / "runs" / name


def make(job: Job, data: str, settings: Settings, output: Path) -> None:
    """Train, judge, write the file."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of recipes without candidates; the numbers tell
    start, images = time.perf_counter(), _load(data, settings)
    result = run(job.method, job.network, images, settings, job.level, job.seed)
    seconds = time.perf_counter() - start
    document = {**asdict(job), **result, "seconds": seconds, "settings": asdict(settings), "data": bool(data)}
    with staged_file(job.file(output)) as path:
        path.write_text(json.dumps(document, indent=1) + "\n")


def jobs(args: argparse.Namespace) -> list[Job]:
    """All models that are asked for, seed by seed."""
    return [
        Job(network, name, level, seed)
        for seed in args.seeds
        for network in args.networks
        for name in args.methods
        if network in ROWS[name].networks
        for level in ROWS[name].levels
    ]


def run_all(args: argparse.Namespace) -> None:
    """Make the models that have no file yet."""
    missing = [job for job in jobs(args) if not job.file(args.output).exists()]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, mp_context=context) as pool:
        waiting = {pool.submit(make, job, args.data, args.settings, args.output): job for job in missing}
        for done in tqdm(as_completed(waiting), total=len(waiting), desc="models", file=sys.stderr, mininterval=2.0):
            if error := done.exception():
                job = waiting[done]
                print(f"{job.network}, {job.method} at {job.level}: {error}", file=sys.stderr, flush=True)
                if not args.keep_going:
                    pool.shutdown(cancel_futures=True)
                    raise error


def finished(args: argparse.Namespace) -> list[dict[str, Any]]:
    """All results on disk; they must have been made with today's settings."""
    runs = [json.loads(path.read_text()) for path in sorted((args.output / "runs").glob("*.json"))]
    if any(run["settings"] != asdict(args.settings) or run["data"] != bool(args.data) for run in runs):
        sys.exit(f"the runs in {args.output} have other settings; choose another --output")
    return [run for run in runs if run["method"] in ROWS]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="300 steps on the digits: minutes on two cores")
    parser.add_argument("--data", default="", help="parquet file with columns image and label; default: the digits")
    parser.add_argument("--rows", type=int, default=5000, help="of that file")
    parser.add_argument("--steps", type=int, help="default: 1000; with --quick 300")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="NAME")
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--keep-going", action="store_true", help="a model that fails is named and left out")
    parser.add_argument("--output", type=Path, default=Path("build/methods"))
    args = parser.parse_args(arguments)
    args.settings = Settings(steps=args.steps or (300 if args.quick else 1000), rows=args.rows)
    return args


def main() -> None:
    """Make what is missing, then write and print tables, numbers and plot."""
    args = parse()
    finished(args)
    run_all(args)
    runs = finished(args)
    rows = summary(runs)
    single = [{key: value for key, value in run.items() if key not in ("settings", "data")} for run in runs]
    found = {"machine": machine("cpu"), "settings": asdict(args.settings), "rows": rows, "runs": single}
    with staged_file(args.output / "methods.json") as path:
        path.write_text(json.dumps(found, separators=(",", ":")) + "\n")
    with staged_file(args.output / "methods.md") as path:
        path.write_text(markdown(rows) + "\n")
    plot(rows, args.output / "methods.png")
    print(markdown(rows))


if __name__ == "__main__":
    main()
