"""All forms that a model can be shipped in, dense and pruned, side by side: what they answer, weigh and take.

    python benchmarks/deploy.py [--runs build/sst2 --model DIR --train FILE --validation FILE] [--output build/deploy]
                                [--rounds 12 60] [--seconds 45] [--repeat 2] [--minutes 10] [--lock FILE] [--quick]

BERT-base's shape from config, and with --runs the models that `sst2.py train` left there: torch eager, `torch.compile`
and the ONNX forms fp32, fused, int8 and static int8, each dense and with 50 % and 75 % of the neurons and heads
removed. Each combination of --batches, --sequences and --threads is measured --repeat times; in a round everything runs
once, in random order, and ratios are taken within a round. What is done lies in the output folder and is not done
again, so the command can be stopped at any moment; with --minutes it begins nothing after that time. Writes
deploy.json, deploy.md and a plot per model. `--quick` shows with a tiny model that it runs.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
import transformers
from deploy_measure import AGAIN, BASE, Opener, Plan, Setting, file_opener, measure, torch_opener, turn
from deploy_models import LEVELS, TIMED, Data, Subject, file_of, from_config, key, make, random_inputs, trained
from deploy_report import write
from transformers import BertConfig, PreTrainedModel

from td_plugin.export import profile_operators
from td_plugin.export.engines import CPU
from td_plugin.export.machine import machine
from td_plugin.files import staged_file

TINY = BertConfig(
    vocab_size=200, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=256
)  # 4 heads, 256 neurons: half of them can go


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; what --quick decides is filled in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, help="what `sst2.py train` wrote; leave out to measure only BERT-base")
    parser.add_argument("--model", help="directory of the pretrained encoder, for its tokenizer")
    parser.add_argument("--train", help="parquet file with text and label: rows for the static form")
    parser.add_argument("--validation", help="parquet file with text and label: rows for the accuracy")
    parser.add_argument("--calibration", type=int, default=256, help="rows for the static form")
    parser.add_argument("--output", type=Path, default=Path("build/deploy"))
    parser.add_argument("--only", choices=["minilm", "bert"], help="one of the models")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--sequences", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, nargs=2, default=(12, 60), metavar=("LEAST", "MOST"))
    parser.add_argument("--seconds", type=float, default=45, help="of a run of a setting, if LEAST and MOST allow")
    parser.add_argument("--sittings", type=int, default=3, help="how often a run opens everything anew")
    parser.add_argument("--repeat", type=int, default=2, help="runs of the whole comparison")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin nothing after that; call again")
    parser.add_argument("--lock", type=Path, help="file to lock while the clock runs; others that do so wait")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--report", action="store_true", help="measure nothing, write what is known")
    parser.add_argument("--quick", action="store_true", help="a tiny model, one setting, few rounds")
    args = parser.parse_args(argv)
    if args.runs and not (args.model and args.train and args.validation):
        parser.error("--runs needs --model, --train and --validation")
    if args.quick:
        args.batches, args.sequences, args.threads, args.backend = [2], [16], [1], "eager"
        args.rounds, args.seconds, args.sittings, args.runs, args.only = (4, 4), 1, 2, None, None
    return args


def subjects(args: argparse.Namespace) -> list[Subject]:
    """The models that are asked for."""
    if args.quick:
        return [from_config(TINY, "tiny", "a tiny BERT, random weights")]
    bert = from_config(BertConfig(), "bert", "BERT-base's shape (12 layers, hidden 768), random weights", rows=128)
    found = [trained(args), bert] if args.runs else [bert]
    return [subject for subject in found if args.only in (None, subject.name)]


class Work:
    """One model's files and parts, made where they are missing."""

    def __init__(self, subject: Subject, args: argparse.Namespace) -> None:
        self.subject, self.args = subject, args
        self.settings = [Setting(b, s, t) for t, b, s in product(args.threads, args.batches, args.sequences)]
        self.levels = LEVELS[:2] if args.quick else LEVELS
        self._data: Data | None = None
        self._small: dict[float, PreTrainedModel] = {}
        self._compiled: dict[float, Callable[..., Any]] = {}

    @property
    def data(self) -> Data:
        """Read once."""
        if self._data is None:
            self._data = self.subject.data()
        return self._data

    def part(self, name: str) -> Path:
        """A piece of the results."""
        output: Path = self.args.output
        return output / "parts" / f"{self.subject.name}-{name}.json"

    def steps(self) -> list[tuple[str, Any]]:
        """What there is to do, in this order: the name of the part, and what makes it."""
        found: list[tuple[str, Any]] = [
            (f"forms-{level:g}", lambda level=level: self.forms(level)) for level in self.levels
        ]
        found.append(("profile", self.profile))
        for run, setting in product(range(self.args.repeat), self.settings):
            found.append((f"{setting.name}-run{run}", lambda setting=setting, run=run: self.times(setting, run)))
        return found

    def forms(self, level: float) -> dict[str, Any]:
        """Files and answers of one level."""
        torch.set_num_threads(1)
        torch.compiler.reset()
        shapes = product(self.args.batches, self.args.sequences)
        return make(self.subject, level, self.data, self.args.output / "files", shapes, self.args.backend)

    def profile(self) -> dict[str, Any]:
        """Where the time of a run goes, by operator; one thread, one row of the longest sequence."""
        files = {key(level, "fp32"): self.file(level, "fp32") for level in self.levels}
        inputs = random_inputs(1, max(self.args.sequences), self.data.vocabulary)
        with turn(self.args.lock):
            report = profile_operators(files, inputs, threads=1, runs=3 if self.args.quick else 20)
        return {"sequence": max(self.args.sequences), "text": str(report), **report.to_dict()}

    def times(self, setting: Setting, run: int) -> dict[str, Any]:
        """All rows at one setting."""
        args = self.args
        least, most = args.rounds
        plan = Plan(least, most, args.seconds, args.sittings, args.lock)
        if torch.get_num_threads() != setting.threads or not self._compiled:
            torch.set_num_threads(setting.threads)
            torch.compiler.reset()  # a compiled function keeps to the number of threads it was compiled for
            torch._inductor.config.cpp.threads = setting.threads  # so does the cache on disk, unless it is told
            self._compiled.clear()
        inputs = setting.inputs(self.data.vocabulary)
        title = f"{self.subject.name} {setting.name} run {run + 1}/{args.repeat}"
        found = measure(self.openers(inputs, setting.threads), plan, run, setting.threads, title)
        return {**vars(setting), "run": run, **found, "machine": facts()}

    def openers(self, inputs: dict[str, torch.Tensor], threads: int) -> dict[str, Opener]:
        """Row -> how to open it, the baseline first."""
        found = {name: file_opener(self.file(0.0, "fp32"), inputs, threads) for name in (BASE, AGAIN)}
        taken = {name: value for name, value in inputs.items() if name in self.data.batches[0]}
        for level in self.levels:
            for form in TIMED:
                if (level, form) != (0.0, "fp32"):
                    found[key(level, form)] = file_opener(self.file(level, form), inputs, threads)
            small, compiled = self.torch_models(level)
            found[key(level, "eager")] = torch_opener(small, small, taken)
            found[key(level, "compile")] = torch_opener(small, compiled, taken)
        return found

    def torch_models(self, level: float) -> tuple[PreTrainedModel, Callable[..., Any]]:
        """The shrunk model, plain and compiled for inputs of any size, as the ONNX files are."""
        if level not in self._small:
            self._small[level] = self.subject.load(level)[1]
        if level not in self._compiled:
            self._compiled[level] = torch.compile(self._small[level], backend=self.args.backend, dynamic=True)
        return self._small[level], self._compiled[level]

    def file(self, level: float, form: str) -> Path:
        """Where a form lies."""
        return file_of(self.args.output / "files", self.subject, level, form)


def facts() -> dict[str, str]:
    """What the numbers were taken on, and with which versions."""
    return {**machine([CPU]), "transformers": transformers.__version__}


def shown(arguments: Sequence[str]) -> str:
    """The command without folders, which say nothing."""
    hidden: dict[str, str | None] = {
        "--output": None,
        "--lock": None,
        "--minutes": None,
        "--report": None,
        "--only": None,
    }
    hidden |= {"--runs": "build/sst2", "--model": "MINILM", "--train": "sst2_train.parquet"}
    hidden |= {"--validation": "sst2_dev.parquet"}
    kept, words = ["python benchmarks/deploy.py"], list(arguments)
    while words:
        word = words.pop(0)
        if word not in hidden:
            kept.append(word)
            continue
        value = "" if word == "--report" else words.pop(0)
        kept += [word, str(hidden[word])] if value and hidden[word] else []
    return " ".join(kept)


def main(argv: Sequence[str] | None = None) -> None:
    """Do what is missing, as long as there is time, and write what is known."""
    args = parse(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    end = time.monotonic() + 60 * args.minutes
    works = [Work(subject, args) for subject in subjects(args)]
    queue = [(work, name, make_part) for work in works for name, make_part in work.steps()]
    queue.sort(key=lambda step: step[1].rpartition("-run")[2] if "-run" in step[1] else "")  # run by run
    for work, name, make_part in [] if args.report else queue:
        path = work.part(name)
        if path.exists() or time.monotonic() > end:
            continue
        print(f"{time.strftime('%H:%M:%S')} {path.stem}", file=sys.stderr, flush=True)
        found = make_part()
        with staged_file(path) as staged:
            staged.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    command = shown(sys.argv[1:] if argv is None else argv)
    print(write(works, command, args))


if __name__ == "__main__":
    main()
