"""What a rarer ranking of the weights costs: pruned loss against `refresh_every`, fine-tuning and from scratch.

    python benchmarks/refresh.py --model DIR --data sst2=sst2_train.parquet --data trec=trec_train.parquet \
        --data characters=text.parquet [--output build/refresh]
    python benchmarks/refresh.py --quick

Every run trains one task with one N and one seed: `targeted_weight` at α = 0.66 and γ = 0.75, AdamW, fp32, one thread.
Seeds decide head or initial weights, order, ordinary dropout and masks; the data and what is held out do not depend on
them, so runs of one seed are paired. N = 0 is a run without targeted dropout, pruned at its end.

Each finished run is a file in OUTPUT/runs and is not repeated, so the work can be stopped at any moment, and processes
with other `--tasks` or `--seeds` can run side by side. Table, numbers and plot cover all that is in OUTPUT/runs.
"Within seed noise" says that the mean difference of the pruned loss to N = 1 is no larger than the standard deviation
over the seeds, pooled of N and N = 1; the difference stands with the standard deviation of the pairs.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from refresh_report import markdown, plot, summary
from refresh_tasks import SETTINGS, Batch, Settings, Task, characters, digit_images, finetune
from torch import Tensor, nn

import td_plugin as td
from td_plugin import kernels
from td_plugin.files import staged_file
from td_plugin.masks import Cut, bottom_k, cut

ALPHA, GAMMA = 0.66, 0.75
ENCODERS = ("sst2", "trec")  # tasks that need --model
MEASURED = 3  # refresh intervals per run whose candidates are compared


class Staleness:
    """How far the candidates below thresholds of an earlier step are from those of the weights as they are.

    Found with `td_plugin.masks` alone, from copies of the thresholds, not from what the sparsifier keeps.
    """

    def __init__(self, model: nn.Module, sparsifier: td.TargetedDropout, every: int, steps: int) -> None:
        parameters = dict(model.named_parameters())
        self._weights = [parameters[group["tensor_fqn"]] for group in sparsifier.groups]
        # Whole intervals; a run shorter than one is measured at its end.
        ends = list(range(every - 1, steps, every)) or [steps - 1]
        self._ends = {ends[(i + 1) * len(ends) // MEASURED - 1] for i in range(MEASURED)}
        self._starts, self._cuts = {end // every * every for end in self._ends}, list[Cut]()
        self.overlap: list[float] = []
        self.share: list[float] = []

    def _rows(self) -> list[Tensor]:
        return [weight.detach().flatten(1).abs() for weight in self._weights]

    def observe(self, step: int) -> None:
        """Called in each step between `sparsifier.step()` and the forward."""
        if step in self._starts:
            self._cuts = [cut(rows, GAMMA) for rows in self._rows()]
        if step not in self._ends:
            return
        both = either = stale_ones = 0
        for rows, where in zip(self._rows(), self._cuts, strict=True):
            stale, exact = where.candidates(rows), bottom_k(rows, GAMMA)
            both, either = both + int((stale & exact).sum()), either + int((stale | exact).sum())
            stale_ones += int(stale.sum())
        self.overlap.append(both / either)
        self.share.append(stale_ones / sum(weight.numel() for weight in self._weights))


@torch.no_grad()
def judge(model: nn.Module, batches: list[Batch]) -> dict[str, float]:
    """Mean loss and accuracy over the held-out rows, in evaluation mode."""
    model.train(False)
    loss = right = scored = rows = 0.0
    for batch in batches:
        output = model(**batch)
        logits, labels = output.logits, batch["labels"]
        if logits.ndim == 3:  # a language model says what comes next
            logits, labels = logits[:, :-1], labels[:, 1:]
        loss, rows = loss + float(output.loss) * len(labels), rows + len(labels)
        right, scored = right + float((logits.argmax(-1) == labels).sum()), scored + labels.numel()
    return {"loss": loss / rows, "accuracy": right / scored}


def train(task: Task, every: int, seed: int) -> dict[str, Any]:
    """One run: what the dense and the pruned model are worth at its end, and how stale the candidates became."""
    start, settings = time.process_time(), task.settings
    torch.manual_seed(seed)
    model = task.model()
    recipe = td.recipes.targeted_weight(ALPHA if every else 0.0)
    sparsifier = td.TargetedDropout(recipe, GAMMA, seed=seed, refresh_every=max(every, 1))
    sparsifier.prepare(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, fused=True)
    warm = max(settings.steps // 10, 1)
    pace = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (settings.steps - step) / (settings.steps - warm))
    )
    staleness = Staleness(model, sparsifier, max(every, 1), settings.steps)
    model.train()
    for step, batch in enumerate(task.batches(seed)):
        sparsifier.step()
        if every:
            staleness.observe(step)
        model(**batch).loss.backward()
        optimizer.step()
        pace.step()
        optimizer.zero_grad()
    with sparsifier.dense():
        dense = judge(model, task.held_out)
    pruned = judge(model, task.held_out)
    sparsity = sparsifier.report().sparsity
    return {
        "dense": dense, "pruned": pruned, "sparsity": sparsity,
        "overlap": staleness.overlap, "candidate_share": staleness.share, "cpu_seconds": time.process_time() - start,
    }  # fmt: skip


def settings_of(name: str, quick: bool) -> Settings:
    """One of `SETTINGS`, or what takes seconds."""
    return replace(SETTINGS[name], steps=12, batch=8, held_out=32, width=32) if quick else SETTINGS[name]


def make_task(name: str, args: argparse.Namespace) -> Task:
    """The task of that name, its data loaded."""
    settings = settings_of(name, args.quick)
    if name in ENCODERS:
        return finetune(settings, args.data[name], args.model)
    return digit_images(settings) if name == "digits" else characters(settings, args.data.get(name, ""))


def run_all(args: argparse.Namespace) -> None:
    """Make the runs that have no file yet."""
    for name in args.tasks:
        wanted = [(seed, every) for seed in args.seeds for every in args.intervals]
        files = {pair: args.output / "runs" / f"{name}-every{pair[1]}-seed{pair[0]}.json" for pair in wanted}
        missing = [pair for pair in wanted if not files[pair].exists()]
        task = make_task(name, args) if missing else None
        for seed, every in missing if task else ():
            print(f"{name}, N = {every}, seed {seed}:", end=" ", file=sys.stderr, flush=True)
            result = train(task, every, seed)
            print(
                f"{result['cpu_seconds']:.0f} s, pruned loss {result['pruned']['loss']:.4f}",
                file=sys.stderr,
                flush=True,
            )
            document = {"task": name, "refresh_every": every, "seed": seed, **result, "settings": asdict(task.settings)}
            with staged_file(files[seed, every]) as path:
                path.write_text(json.dumps(document, indent=1) + "\n")


def finished(args: argparse.Namespace) -> list[dict[str, Any]]:
    """All runs on disk; they must have been made with today's settings."""
    runs = [json.loads(path.read_text()) for path in sorted((args.output / "runs").glob("*.json"))]
    for run in runs:
        if run["settings"] != asdict(settings_of(run["task"], args.quick)):
            sys.exit(f"{run['task']}: the runs in {args.output} have other settings; choose another --output")
    return runs


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="directory of the pretrained encoder for sst2 and trec")
    parser.add_argument("--data", action="append", default=[], metavar="TASK=FILE", help="texts (and labels) of a task")
    parser.add_argument("--tasks", nargs="+", choices=list(SETTINGS), help="default: all whose data are given")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: 0 1 2; with --quick 0")
    parser.add_argument("--intervals", type=int, nargs="+", default=[1, 10, 100], metavar="N")
    parser.add_argument("--output", type=Path, default=Path("build/refresh"))
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes: small models, 12 steps")
    args = parser.parse_args(arguments)
    args.data = dict(entry.partition("=")[::2] for entry in args.data)
    args.seeds = args.seeds or ([0] if args.quick else [0, 1, 2])
    ready = {name for name in ENCODERS if name in args.data and args.model} | {"digits"}
    ready |= {"characters"} if args.quick or "characters" in args.data else set()
    args.tasks = args.tasks or [name for name in SETTINGS if name in ready]
    if unready := sorted(set(args.tasks) - ready):
        parser.error(f"{', '.join(unready)}: give --data {unready[0]}=FILE" + " and --model" * (unready[0] in ENCODERS))
    return args


def main() -> None:
    """Run what is missing, then write and print table, numbers and plot."""
    args = parse()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    finished(args)
    run_all(args)
    runs = finished(args)
    rows, versions = summary(runs), {"torch": torch.__version__, "transformers": transformers.__version__}
    machine = {"machine": platform.machine(), "python": platform.python_version(), "kernels": kernels.available()}
    with staged_file(args.output / "refresh.json") as path:
        path.write_text(json.dumps({"rows": rows, "runs": runs, **versions, **machine}, indent=1) + "\n")
    with staged_file(args.output / "refresh.md") as path:
        path.write_text(markdown(rows) + "\n")
    plot(rows, args.output / "refresh.png")
    print(markdown(rows))


if __name__ == "__main__":
    main()
