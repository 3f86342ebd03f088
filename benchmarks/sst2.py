"""SST-2 with a pretrained encoder: what targeted unit dropout keeps where dense training, then pruning, does not.

    python benchmarks/sst2.py train    --model DIR --train sst2_train.parquet --validation sst2_dev.parquet --seed 0
    python benchmarks/sst2.py evaluate --model DIR --train ... --validation ...
    python benchmarks/sst2.py deploy   --model DIR --train ... --validation ...
    python benchmarks/sst2.py report

`train` makes one run per (method, seed) and skips those already on disk, so it can be stopped at any moment and several
seeds can run side by side. `evaluate` judges all of them in fp32. `deploy` shrinks, exports, verifies and times the
models of seed 0. `report` prints the tables and writes plot and raw numbers to docs/results/.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel, set_seed

import td_plugin as td
from td_plugin.export import benchmark, quantize, save_pretrained, shrink, to_onnx, verify
from td_plugin.export.plots import plot_tradeoff
from td_plugin.files import staged_directory, staged_file
from td_plugin.integrations.classifiers import Classifier, load_classifier
from td_plugin.integrations.config import DataConfig, TrainConfig
from td_plugin.integrations.data import load_data
from td_plugin.integrations.hf import TargetedDropoutCallback
from td_plugin.integrations.training import make_trainer, model_accuracy, onnx_accuracy

LEVELS = (0.5, 0.75)
SHAPES = tuple((batch, sequence) for batch in (1, 8) for sequence in (32, 128))


def methods(args: argparse.Namespace) -> dict[str, list[TargetedDropoutCallback]]:
    """The runs of one seed: equal budgets, equal learning rate; only the callback differs."""
    runs: dict[str, list[TargetedDropoutCallback]] = {"dense": []}
    for level in LEVELS:
        recipe = td.recipes.ramping_targeted_unit(args.drop_rate, members=args.members)
        runs[f"targeted-{level}"] = [
            TargetedDropoutCallback(recipe, level, seed=args.seed, recipe_steps=args.ramp, squash=False)
        ]
    return runs


def prune(model: PreTrainedModel, level: float) -> PreTrainedModel:
    """A copy with the units of smallest norm zeroed: one-shot magnitude pruning, the same units as the recipe's."""
    pruned = copy.deepcopy(model)
    sparsifier = td.TargetedDropout(td.recipes.targeted_unit(), level)
    sparsifier.prepare(pruned)
    sparsifier.squash_mask()
    return pruned


def load(args: argparse.Namespace) -> Classifier:
    """The same rows for every method and seed; the seed decides the head, the order and dropout."""
    data = load_data(DataConfig(args.train, args.validation, max_train_samples=args.samples), seed=0)
    set_seed(args.seed)
    return load_classifier(args.model, data, 64)


def train(args: argparse.Namespace) -> None:
    """Run every method of one seed that has no result yet."""
    torch.set_num_threads(args.threads)
    config = TrainConfig(args.epochs, 32, args.learning_rate, args.seed, bf16=True)
    for name, callbacks in methods(args).items():
        directory = args.output / f"{name}-seed{args.seed}"
        if (directory / "result.json").exists():
            continue
        classifier = load(args)
        start = time.perf_counter()
        trainer = make_trainer(classifier, config, str(args.output / "scratch"), callbacks)
        trainer.train()
        result = {"method": name, "seed": args.seed, "minutes": (time.perf_counter() - start) / 60}
        if callbacks:
            callbacks[0].sparsifier.squash_mask()
        with staged_directory(directory) as stage:
            classifier.model.save_pretrained(stage)
            (stage / "result.json").write_text(json.dumps(result, indent=2) + "\n")


def evaluate(args: argparse.Namespace) -> None:
    """Accuracy in fp32 of every checkpoint on disk: pruned, shrunk; the dense ones also pruned by magnitude."""
    torch.set_num_threads(args.threads)
    judge = make_trainer(load(args), TrainConfig(batch_size=32), str(args.output / "scratch"))
    for path in sorted(args.output.glob("*-seed*/result.json")):
        result = {key: json.loads(path.read_text())[key] for key in ("method", "seed", "minutes")}
        model = AutoModelForSequenceClassification.from_pretrained(path.parent).eval()
        result["accuracy"] = model_accuracy(judge, model)
        if result["method"] == "dense":
            result |= {f"magnitude_{level}": model_accuracy(judge, prune(model, level)) for level in LEVELS}
        else:
            small = shrink(model)
            rows = next(iter(judge.get_eval_dataloader()))
            with torch.no_grad():
                difference = (small(**rows).logits - model(**rows).logits).abs().max().item()
            result |= {"accuracy_shrunk": model_accuracy(judge, small), "logits_difference": difference}
        with staged_file(path) as staged:
            staged.write_text(json.dumps(result, indent=2) + "\n")
        print(json.dumps(result), flush=True)


def deploy(args: argparse.Namespace) -> None:
    """Shrink, export, verify and time the models of seed 0; one thread."""
    torch.set_num_threads(args.threads)
    classifier = load(args)
    batches = make_trainer(classifier, TrainConfig(batch_size=32), str(args.output / "scratch")).get_eval_dataloader()
    example = {k: v for k, v in next(iter(batches)).items() if k != "labels"}
    files: dict[str, Path] = {}
    result: dict[str, Any] = {"models": {}, "latency": []}
    for name in ("dense", *(f"targeted-{level}" for level in LEVELS)):
        model = AutoModelForSequenceClassification.from_pretrained(args.output / f"{name}-seed0").eval()
        if name != "dense":
            model = shrink(model)
            save_pretrained(model, args.output / f"{name}-shrunk")
        trainer = make_trainer(classifier, TrainConfig(batch_size=32), str(args.output / "scratch"))
        path = to_onnx(model, args.output / f"{name}.onnx", example)
        int8 = quantize(path, args.output / f"{name}.int8.onnx")
        files |= {name: path, f"{name} int8": int8}
        result["models"][name] = {
            "parameters": model.num_parameters(),
            "accuracy": model_accuracy(trainer, model),
            "accuracy_onnx": onnx_accuracy(path, batches),
            "accuracy_int8": onnx_accuracy(int8, batches),
            "parity": verify(model, path, list(batches)).to_dict(),
        }
    for batch, sequence in SHAPES:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(1000, 20000, (batch, sequence), generator=generator)
        ones = torch.ones_like(ids)
        inputs = {"input_ids": ids, "attention_mask": ones, "token_type_ids": torch.zeros_like(ids)}
        report = benchmark(files, inputs, threads=1, rounds=args.rounds, progress=True)
        print(f"batch {batch}, sequence {sequence}\n{report}", flush=True)
        speedups = {name: vars(report.speedup(name, over="dense")) for name in files if name != "dense"}
        measured = report.to_dict()
        for file in measured["files"]:
            del file["seconds"]  # single timings: percentiles and intervals are kept
        result["latency"].append({"batch": batch, "sequence": sequence, "speedup": speedups, **measured})
    with staged_file(args.output / "deploy.json") as path:
        path.write_text(json.dumps(result, indent=2, default=str) + "\n")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["train", "evaluate", "deploy", "report"])
    parser.add_argument("--model", help="directory of the pretrained encoder")
    parser.add_argument("--train", help="parquet file with text and label")
    parser.add_argument("--validation", help="parquet file with text and label")
    parser.add_argument("--output", type=Path, default=Path("build/sst2"))
    parser.add_argument("--samples", type=int, default=40_000)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--drop-rate", type=float, default=0.99)
    parser.add_argument("--members", choices=["producers", "all"], default="producers", help="what ranks a unit")
    parser.add_argument("--ramp", type=float, default=0.6, help="share of the run over which γ and α grow")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=200)
    args = parser.parse_args()
    if args.stage != "report" and not (args.model and args.train and args.validation):
        parser.error("--model, --train and --validation are needed")
    return args


def _mean(values: list[float]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{100 * statistics.mean(values):.1f} ± {100 * spread:.1f}"


def accuracy_table(runs: list[dict[str, Any]]) -> str:
    """Mean ± standard deviation over the seeds, in percent."""
    dense = [run for run in runs if run["method"] == "dense"]
    lines = [
        "| neurons and heads removed | dense training, then magnitude | targeted dropout, masked | the same, shrunk |"
        " largest logits difference masked/shrunk | seeds |",
        "|---|---|---|---|---|---|",
        f"| none | {_mean([run['accuracy'] for run in dense])} | | | | {len(dense)} |",
    ]
    for level in LEVELS:
        targeted = [run for run in runs if run["method"] == f"targeted-{level}"]
        if not targeted:
            continue
        cells = [
            f"{level:.0%}",
            _mean([run[f"magnitude_{level}"] for run in dense]),
            f"**{_mean([run['accuracy'] for run in targeted])}**",
            f"**{_mean([run['accuracy_shrunk'] for run in targeted])}**",
            f"{max(run['logits_difference'] for run in targeted):.1e}",
            str(len(targeted)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def model_table(models: dict[str, dict[str, Any]]) -> str:
    """Parameters, accuracy of torch, ONNX and int8, and parity, per model."""
    lines = [
        "| model | parameters | torch | ONNX | ONNX int8 | max abs difference torch/ONNX |",
        "|---|---|---|---|---|---|",
    ]
    for name, m in models.items():
        cells = [f"{100 * m[key]:.1f}" for key in ("accuracy", "accuracy_onnx", "accuracy_int8")]
        lines.append(f"| {name} | {m['parameters']:,} | {' | '.join(cells)} | {m['parity']['max_abs']:.1e} |")
    return "\n".join(lines)


def latency_table(latency: list[dict[str, Any]]) -> str:
    """p50 of the dense file and the speed-up of every other one, per shape."""
    names = list(latency[0]["speedup"])
    lines = [f"| batch × sequence | dense p50 ms | {' | '.join(names)} |", "|---|---|" + "---|" * len(names)]
    for row in latency:
        dense = next(f for f in row["files"] if f["name"] == "dense")
        cells = [f"{s['median']:.2f} [{s['low']:.2f}, {s['high']:.2f}]" for s in row["speedup"].values()]
        lines.append(f"| {row['batch']} × {row['sequence']} | {1e3 * dense['p50_seconds']:.1f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def tradeoff(runs: list[dict[str, Any]], deployed: dict[str, Any]) -> dict[str, list[tuple[float, float]]]:
    """Per method, (speed-up at batch 1 and sequence 128, accuracy): mean over the seeds, int8 of seed 0."""

    def mean(method: str, key: str) -> float:
        return statistics.mean(run[key] for run in runs if run["method"] == method)

    row = next(row for row in deployed["latency"] if (row["batch"], row["sequence"]) == (1, 128))
    faster = {name: speedup["median"] for name, speedup in row["speedup"].items()}
    dense, pruned = (1.0, mean("dense", "accuracy")), [f"targeted-{level}" for level in LEVELS]
    return {
        "dense, then magnitude": [dense, *((faster[f"targeted-{g}"], mean("dense", f"magnitude_{g}")) for g in LEVELS)],
        "targeted dropout": [dense, *((faster[name], mean(name, "accuracy_shrunk")) for name in pruned)],
        "int8 (one seed)": [
            (faster[f"{name} int8"], deployed["models"][name]["accuracy_int8"]) for name in ("dense", *pruned)
        ],
    }


def report(args: argparse.Namespace) -> None:
    """Write docs/results/sst2.json and sst2.png from what is on disk, and print the tables of docs/results.md."""
    runs = [json.loads(path.read_text()) for path in sorted(args.output.glob("*-seed*/result.json"))]
    deployed = json.loads((args.output / "deploy.json").read_text())
    target = Path("docs/results")
    text = [accuracy_table(runs), model_table(deployed["models"]), latency_table(deployed["latency"])]
    with staged_file(target / "sst2.json") as path:
        path.write_text(json.dumps({"runs": runs, **deployed}, indent=1) + "\n")
    title, conditions = "SST-2, 6-layer encoder", "onnxruntime, 1 thread, batch 1 × 128 tokens"
    plot_tradeoff(tradeoff(runs, deployed), target / "sst2.png", title=title, conditions=conditions)
    print("\n\n".join(text))


if __name__ == "__main__":
    arguments = parse()
    {"train": train, "evaluate": evaluate, "deploy": deploy, "report": report}[arguments.stage](arguments)
