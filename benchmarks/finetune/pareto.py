"""Accuracy against measured latency on a text classification task: ours, beside the peers, on one budget.

    python benchmarks/finetune/pareto.py teach  --model DIR --train sst2_train.parquet --test sst2_dev.parquet
    python benchmarks/finetune/pareto.py search --model ... --train ... --test ...
    python benchmarks/finetune/pareto.py train  --model ... --train ... --test ...
    python benchmarks/finetune/pareto.py deploy --model ... --train ... --test ...
    python benchmarks/finetune/pareto.py report

`teach` fine-tunes the dense model of every seed. Every method starts from it and has the same further steps. `search`
tries the learning rates for every method at one γ, on rows held out of the training data (one that is given alone is
taken as it is); `train` makes the runs of all levels and seeds with the best of them. Both skip what is on disk: they
can be stopped at any moment; `--jobs` makes several at once. `deploy` judges on the test rows, which nothing was chosen
by, exports, verifies, quantizes and times. `report` writes docs/results/, with `--add` beside what is there of other
seeds: a comparison can be made seed by seed, on machines that keep nothing. `run` makes one run with options of its
own.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
import transformers
from pareto_deploy import judge, latencies
from pareto_methods import OPTIONS, ROWS
from pareto_options import parse
from pareto_report import write
from pareto_tasks import Task, Training, accuracy, pretrained
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from td_plugin.export import save_pretrained
from td_plugin.files import staged_directory

sys.path.append(str(Path(__file__).parent.parent / "reproduce"))

from processes import in_processes
from provenance import command, commit

Call = tuple[str, float, int, float]
"""Method, γ, seed, learning rate."""


def teacher_of(task: Task, seed: int) -> Path:
    """Where the dense model of a seed is, fine-tuned."""
    found = sorted(task.output.glob(f"teacher-lr*-s{seed}"), key=lambda path: -read(path)["held_out"])
    if not found:
        raise SystemExit(f"no dense model of seed {seed} in {task.output}: run the stage 'teach' first")
    return found[0]


def read(directory: Path) -> dict[str, Any]:
    """The result of a run."""
    return json.loads((directory / "result.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def keep(task: Task, name: str, model: PreTrainedModel, result: dict[str, Any], *, plain: bool) -> None:
    """Put the model and the result in place, whole."""
    result |= {"held_out": accuracy(task, model, final=False), "parameters": model.num_parameters()}
    with staged_directory(task.output / name) as stage:
        if plain:
            model.save_pretrained(stage)
        else:
            save_pretrained(model, stage)
        (stage / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result), flush=True)


def teach(task: Task, args: argparse.Namespace) -> None:
    """The dense models; seed 0 tries the learning rates, the others take its best."""
    best = None
    for seed in args.seeds:
        for rate in args.teacher_rates if best is None else (best,):
            name = f"teacher-lr{rate:g}-s{seed}"
            if (task.output / name / "result.json").exists():
                continue
            model, start = pretrained(task, seed), time.perf_counter()
            Training(seed, args.teacher_epochs, rate).fit(task, model)
            result = {"method": "teacher", "seed": seed, "learning_rate": rate, "epochs": args.teacher_epochs}
            keep(task, name, model, result | {"minutes": (time.perf_counter() - start) / 60}, plain=True)
        if best is None:
            tried = [read(path) for path in task.output.glob(f"teacher-lr*-s{seed}")]
            best = max(tried, key=lambda run: run["held_out"])["learning_rate"]


def run(task: Task, args: argparse.Namespace, method: str, level: float, seed: int, rate: float) -> None:
    """One run, unless it is on disk."""
    row, options = ROWS[method], {**dict(ROWS[method].options), **args.options}
    settings = {"epochs": args.epochs, **options} if row.trained else {}
    words = [f"{key}{value:g}" if isinstance(value, float) else f"{key}{value}" for key, value in settings.items()]
    name = "-".join([method, f"{level:g}", *([f"lr{rate:g}"] if row.trained else []), *words, f"s{seed}"])
    if (task.output / name / "result.json").exists():
        return
    folder = teacher_of(task, seed)
    dense = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    terms = {key: options[key] for key in ("logits", "temperature", "hidden") if key in options}
    teacher = dense if row.distilled else None
    training = Training(seed, args.epochs, rate, teacher, folder / "answers.safetensors", **terms)
    start = time.perf_counter()
    model = row.run(task, dense, level, training, options)
    result = {"method": method, "level": level, "seed": seed, "learning_rate": rate, **settings}
    keep(task, name, model, result | {"minutes": (time.perf_counter() - start) / 60}, plain=False)


def runs(task: Task) -> Iterator[dict[str, Any]]:
    """All results on disk but the teachers', with their directories."""
    for path in sorted(task.output.glob("*/result.json")):
        if (found := read(path.parent))["method"] != "teacher":
            yield {**found, "directory": str(path.parent)}


def levels_of(method: str, levels: list[float]) -> list[float]:
    """γ to try: one for what does not depend on it."""
    return [0.0] if method.startswith("dense") else levels


def make(task: Task, args: argparse.Namespace, calls: list[Call]) -> None:
    """The runs that are not on disk, `--jobs` at once."""
    if args.jobs > 1:
        in_processes(alone, [(task, args, *call) for call in calls], args.jobs, "runs")
        return
    for call in calls:
        run(task, args, *call)


def alone(task: Task, args: argparse.Namespace, *call: Any) -> None:
    """`run` in a process of its own."""
    quietly(args)
    run(task, args, *call)


def search(task: Task, args: argparse.Namespace) -> None:
    """All learning rates for every method that trains, seed 0."""
    trained = [method for method in args.methods if ROWS[method].trained]
    make(task, args, [(m, *levels_of(m, [args.searched]), 0, rate) for m in trained for rate in args.rates])


def ordinary(found: dict[str, Any]) -> bool:
    """Whether a run has the options of its row, and none that `--options` has put in."""
    options = {key: value for key, value in found.items() if key in OPTIONS}
    return options == dict(ROWS[found["method"]].options)


def best_rate(task: Task, args: argparse.Namespace, method: str) -> float:
    """The learning rate that was best on the held-out rows; the one that is given, if it is one."""
    if len(args.rates) == 1:
        return float(args.rates[0])
    level = 0.0 if method.startswith("dense") else args.searched
    wanted = {"method": method, "level": level, "seed": 0, "epochs": args.epochs}
    tried = [found for found in runs(task) if wanted.items() <= found.items() and ordinary(found)]
    if not tried:
        raise SystemExit(f"no learning rate has been tried for {method}: run the stage 'search' first")
    return float(max(tried, key=lambda found: found["held_out"])["learning_rate"])


def train(task: Task, args: argparse.Namespace) -> None:
    """All levels and seeds of every method, with its best learning rate."""
    rates = {m: best_rate(task, args, m) if ROWS[m].trained else 0.0 for m in args.methods}
    of_seed = [(m, level, rate) for m, rate in rates.items() for level in levels_of(m, args.levels)]
    make(task, args, [(m, level, seed, rate) for seed in args.seeds for m, level, rate in of_seed])


def one(task: Task, args: argparse.Namespace) -> None:
    """The runs that the options name, whatever was searched."""
    make(task, args, list(product(args.methods, args.levels, args.seeds, args.rates)))


def teachers(task: Task) -> list[dict[str, Any]]:
    """The dense model of every seed, with its directory."""
    found: dict[int, dict[str, Any]] = {}
    for path in sorted(task.output.glob("teacher-*")):
        result = {**read(path), "directory": str(path), "name": path.name, "level": 0.0}
        if result["seed"] not in found or result["held_out"] > found[result["seed"]]["held_out"]:
            found[result["seed"]] = result
    return list(found.values())


def chosen(task: Task, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The runs that the comparison is made of: those with each method's best learning rate."""
    rates = {
        name: best_rate(task, args, name) if row.trained else None for name, row in ROWS.items() if name in args.methods
    }
    return [
        {**found, "name": Path(found["directory"]).name}
        for found in runs(task)
        if found["method"] in rates
        and ordinary(found)
        and rates[found["method"]] in (None, found["learning_rate"])
        and found.get("epochs", args.epochs) == args.epochs
    ]


def deploy(task: Task, args: argparse.Namespace) -> None:
    """Test accuracy of every chosen run in every form; latency of those of seed 0."""
    dense, found = teachers(task), chosen(task, args)
    for run_ in (*dense, *found):
        judge(task, Path(run_["directory"]))
    first = [Path(run_["directory"]) for run_ in found if run_["seed"] == 0]
    for base in (Path(run_["directory"]) for run_ in dense if run_["seed"] == 0):
        latencies(task, first, base, args.sequence, args.rounds)


def report(task: Task, args: argparse.Namespace) -> None:
    """Write the JSON and the plot of docs/results/ and print the table."""

    def judged(run_: dict[str, Any]) -> dict[str, Any]:
        deployed = json.loads((Path(run_["directory"]) / "deployed.json").read_text(encoding="utf-8"))
        return {key: value for key, value in {**run_, **deployed}.items() if key != "directory"}

    timed, groups = task.output / "latency.json", {"dense": teachers(task), "runs": chosen(task, args)}
    found: dict[str, Any] = {key: [judged(run_) for run_ in group] for key, group in groups.items()}
    if timed.exists():
        found["latency"] = json.loads(timed.read_text(encoding="utf-8"))
    made_by = {"command": command("benchmarks/finetune/pareto.py", sys.argv[1:]), "commit": commit()}
    conditions = {"title": args.title, **made_by, "torch": torch.__version__}
    print(write(args.name, {**conditions, **found}, args.results, add=args.add))


def quietly(args: argparse.Namespace) -> None:
    """As many threads as asked for, and no advice from transformers."""
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()


def main() -> None:
    """Run one stage."""
    args = parse(__doc__)
    quietly(args)
    files = (args.model or "", args.train or "", args.test or "")
    task = Task(*files, rows=args.rows, held_out=args.held_out, output=args.output)
    stages = {"teach": teach, "search": search, "train": train, "run": one, "deploy": deploy, "report": report}
    stages[args.stage](task, args)


if __name__ == "__main__":
    main()
