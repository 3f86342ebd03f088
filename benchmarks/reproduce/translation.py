r"""English to German on Multi30k: BLEU by share of weights removed after training, beside the published numbers.

    python benchmarks/reproduce/translation.py all --quick --train train.parquet --validation validation.parquet \
        --test test2016.parquet
    python benchmarks/reproduce/translation.py train --full --minutes 9 --train ... --validation ... --test ...
    python benchmarks/reproduce/translation.py report --full

Gomez et al., arXiv 1905.13678, the table of the Transformer on WMT: none, targeted weight dropout with α 0.66 and
γ 0.75 or 0.90, and as a control, where `--methods` asks for it, DropConnect that drops as many weights in the mean. The
claim is its shape: +15 BLEU at 70 %. A Marian model of transformers is trained from scratch by `Seq2SeqTrainer` with
this library's callback, once per method and seed, and judged at every share: pruned by magnitude, in every output of
all layers but embeddings and logits, at once, nothing trained afterwards. At 0 % the dense model is judged.

Texts are in lower case and BLEU is uncased, as the paper's is; translations are greedy. Token accuracy is that of the
next piece, all before it given. Files have the columns ``en`` and ``de``. The loss on `--validation` is kept, of the
model pruned at γ; without `--test` those rows are judged.

`--quick`: 3 methods × 2 seeds of 2 + 2 layers of width 192, 3 epochs in steps of 32 rows, BLEU on 500 rows: under 40
minutes on two cores, as two processes of one thread. Batch and rate had the least loss on validation rows after 7,680
rows of training, among 64 rows at 0.001 and 0.002 and 32 rows at 0.001, 0.002 and 0.004 (16 rows at 0.002 did better,
and cost more). `--full`: the sizes of the Transformer's base model, 40 epochs, all rows, on a GPU; one model at a time
unless `--jobs` says otherwise. It was not tuned.

A finished model is a folder of `--output` and is not made again; an unfinished one goes on from its last whole epoch,
to the bit on a CPU.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import shutil
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from processes import in_processes
from provenance import commit
from resnet_report import TENTHS, write
from resnet_runs import Found
from transformers import MarianMTModel, Seq2SeqTrainer, TrainerCallback
from translation_report import render
from translation_task import (
    Settings,
    accuracy,
    bleu,
    build,
    encoded,
    learn_pieces,
    pruned,
    read,
    tokenizer_of,
)
from translation_training import Epochs, epochs_of, fit, trainer_of

import td_plugin as td
from td_plugin.export.machine import machine
from td_plugin.files import staged_directory, staged_file
from td_plugin.integrations.hf import TargetedDropoutCallback

METHODS: dict[str, tuple[td.Recipe, float] | None] = {
    "none": None,
    "td-66-75": (td.recipes.targeted_weight(0.66), 0.75),
    "td-66-90": (td.recipes.targeted_weight(0.66), 0.9),
    "dropconnect": (td.recipes.dropconnect(0.66 * 0.75), 0.0),
}
PAPER = ("none", "td-66-75", "td-66-90")
QUICK = Settings(192, 2, 4, 0.1, 4000, 0, 3, 32, 4e-3, 400, bfloat16=False, judged=500)
FULL = Settings(512, 6, 8, 0.3, 8000, 0, 40, 128, 5e-4, 2000, bfloat16=True, judged=0)
CHANGES = ("rows", "epochs", "width", "layers", "pieces", "batch", "judged")
PACKAGES = ("transformers", "tokenizers", "datasets", "sacrebleu")


@dataclass(frozen=True)
class Job:
    """One model to make, and where everything is.

    Attributes:
        name: of the method.
        seed: of weights, order and draws.
        settings: the budget.
        train: parquet file.
        validation: another.
        test: a third; empty: `validation` is judged.
        output: folder of what is kept.
        device: to train on.
    """

    name: str
    seed: int
    settings: Settings
    train: str
    validation: str
    test: str
    output: Path
    device: str

    @property
    def folder(self) -> Path:
        """Of the finished model."""
        return self.output / "runs" / f"{self.name}-seed{self.seed}"

    @property
    def unfinished(self) -> Path:
        """Folder of its checkpoints."""
        return self.output / "checkpoints" / self.folder.name


def make(job: Job, until: float) -> bool:
    """Train, judge, write the folder; False: the time was over first, and a checkpoint says where to go on."""
    if time.time() > until:
        return False  # before anything is loaded
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # transformers' advice on beams, and torch's on its own schedulers
    trainer, epochs = prepared(job, until)
    if not fit(trainer):
        return False
    settings = job.settings
    model = build(settings, trainer.processing_class, job.seed)
    model.load_state_dict(trainer.model.state_dict())  # the masks, which are still on, are no part of it
    about = {"method": job.name, "seed": job.seed, "settings": asdict(settings), "device": job.device}
    about |= {"tested": Path(job.test or job.validation).name, "commit": commit(), "machine": _machine(job.device)}
    about |= {"steps": trainer.state.global_step, "epochs": epochs_of(trainer.state.log_history)}
    about |= {"seconds_per_epoch": epochs.longest}
    found = {**about, **judged(model.to(job.device), job)}
    with staged_directory(job.folder) as folder:
        model.save_pretrained(folder)
        (folder / "result.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(job.unfinished, ignore_errors=True)
    return True


def prepared(job: Job, until: float) -> tuple[Seq2SeqTrainer, Epochs]:
    """What trains it, and its bar of epochs."""
    settings, method = job.settings, METHODS[job.name]
    tokenizer, epochs = tokenizer_of(job.output / "tokenizer.json"), Epochs(job.folder.name, until)
    rows = (encoded(read(job.train, settings.rows), tokenizer), encoded(read(job.validation), tokenizer))
    callbacks: list[TrainerCallback] = [epochs]
    if method is not None:
        callbacks.append(TargetedDropoutCallback(*method, seed=job.seed, squash=False))
    return trainer_of(settings, tokenizer, rows, job.unfinished, job.seed, job.device, callbacks), epochs


def _machine(device: str) -> dict[str, str]:
    facts = machine(["CUDAExecutionProvider"] if device == "cuda" else [])
    return facts | {name: importlib.metadata.version(name) for name in PACKAGES}


def judged(model: MarianMTModel, job: Job) -> Found:
    """BLEU and token accuracy by share removed, and the seconds that it took."""
    start, tokenizer = time.perf_counter(), tokenizer_of(job.output / "tokenizer.json")
    pairs, found = read(job.test or job.validation), {"bleu": {}, "accuracy": {}}
    for share in TENTHS:
        smaller = pruned(model, float(share))
        found["bleu"][share] = bleu(smaller, tokenizer, pairs.first(job.settings.judged))
        found["accuracy"][share] = accuracy(smaller, tokenizer, pairs)
    return {**found, "judging_seconds": time.perf_counter() - start}


def train(args: argparse.Namespace) -> None:
    """Make the models that have no folder yet, seed by seed, until the time is over."""
    tokenizer, kept = args.output / "tokenizer.json", args.output / "settings.json"
    if kept.exists():
        refuse_others(args, [json.loads(kept.read_text(encoding="utf-8"))])
    else:
        with staged_file(kept) as path:  # pieces and checkpoints are of these, too
            path.write_text(json.dumps(asdict(args.settings)) + "\n", encoding="utf-8")
    if not tokenizer.exists():
        learn_pieces(read(args.train, args.settings.rows), args.settings.pieces, tokenizer)
    files = (args.train, args.validation, args.test, args.output, args.device)
    jobs = [Job(name, seed, args.settings, *files) for seed in args.seeds for name in args.methods]
    until = time.time() + 60 * args.minutes if args.minutes else math.inf
    missing = [job for job in jobs if not (job.folder / "result.json").exists()]
    in_processes(make, [(job, until) for job in missing], args.jobs, "models")


def finished(args: argparse.Namespace) -> list[Found]:
    """All results on disk; they must have been made with today's settings."""
    paths = sorted((args.output / "runs").glob("*/result.json"))
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    refuse_others(args, [run["settings"] for run in runs])
    return runs


def refuse_others(args: argparse.Namespace, settings: Sequence[Found]) -> None:
    """End where some are not today's."""
    if any(found != asdict(args.settings) for found in settings):
        sys.exit(f"the runs in {args.output} have other settings; choose another --output")


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("stage", choices=["train", "report", "all"], help="report needs only the stored runs")
    size = made.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="a small model, a few epochs (the default)")
    size.add_argument("--full", action="store_true", help="the Transformer's base model, 40 epochs")
    made.add_argument("--train", default="", help="parquet file with columns en and de")
    made.add_argument("--validation", default="", help="another, whose loss is logged")
    made.add_argument("--test", default="", help="another, which is judged; default: --validation")
    for name in CHANGES:
        made.add_argument(f"--{name}", type=int, help="in place of the budget's")
    made.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    made.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(PAPER), metavar="NAME")
    made.add_argument("--jobs", type=int, help="processes, of one thread each; default: 2, or 1 on a GPU")
    made.add_argument("--minutes", type=float, default=0.0, help="then leave what is unfinished; run again to go on")
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    made.add_argument("--output", type=Path, help="default: build/reproduce/translation-quick or -full")
    made.add_argument("--results", type=Path, default=Path("docs/results"))
    return made


def completed(args: argparse.Namespace) -> argparse.Namespace:
    """Options that depend on others."""
    args.output = args.output or Path("build/reproduce") / f"translation-{'full' if args.full else 'quick'}"
    args.jobs = args.jobs or (1 if args.device == "cuda" else 2)
    changes = {name: vars(args)[name] for name in CHANGES if vars(args)[name] is not None}
    args.settings = replace(FULL if args.full else QUICK, **changes)
    if args.stage != "report" and not (args.train and args.validation):
        sys.exit("--train or --validation is missing")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    """Make what is missing, then write and print tables, numbers and plot."""
    args = completed(parser().parse_args(arguments))
    if args.stage != "report":
        train(args)
    if args.stage != "train":
        print(write(finished(args), args, "translation", render))


if __name__ == "__main__":
    main()
