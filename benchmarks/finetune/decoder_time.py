"""How fast the models of `decoder.py` are: tokens per second, every model in every round, in random order."""

from __future__ import annotations

import gc
import json
import random
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from td_plugin.export import benchmark, load_pretrained, to_cached_onnx, to_onnx
from td_plugin.export.decoding import greedy
from td_plugin.export.machine import machine
from td_plugin.export.session import open_session
from td_plugin.export.speedup import paired_speedup
from td_plugin.files import staged_file

PROMPT, NEW, PREFILL = 8, 64, 64
"""Tokens given, tokens generated, tokens of one forward without a cache."""

WAYS = {
    "torch": f"torch `generate` with a cache, {NEW} tokens after {PROMPT}",
    "cached": f"onnxruntime with a cache, {NEW} tokens after {PROMPT}",
    "prefill": f"onnxruntime, one forward of {PREFILL} tokens",
}
"""What is timed: batch 1, one thread, greedy."""


def in_turn(calls: Mapping[str, Callable[[], object]], rounds: int, label: str) -> dict[str, list[float]]:
    """Seconds of every call in every round, after two rounds that do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    shuffle = random.Random(0)
    gc.collect()
    gc.freeze()  # what is there stays; collecting the rest is quick
    for turn in tqdm(range(rounds + 2), desc=label, file=sys.stderr, mininterval=1.0):
        for name in shuffle.sample(list(calls), len(calls)):
            gc.collect()  # else one model pays for the garbage of another
            start = time.perf_counter()
            calls[name]()
            taken = time.perf_counter() - start
            if turn >= 2:
                seconds[name].append(taken)
    gc.unfreeze()
    return seconds


def summary(seconds: Mapping[str, list[float]], tokens: int, base: str) -> dict[str, Any]:
    """Tokens per second (median over rounds), and the speed-up over `base` with its 95 % interval, by model."""
    found = {}
    for name, taken in seconds.items():
        speedup = paired_speedup(seconds[base], taken)
        interval = {"median": speedup.median, "low": speedup.low, "high": speedup.high}
        found[name] = {"tokens_per_second": tokens / median(taken), "speedup": interval}
    return found


def generating(model: PreTrainedModel, ids: Tensor) -> Callable[[], object]:
    """One greedy run of `generate`."""
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    length = {"max_new_tokens": NEW, "min_new_tokens": NEW}
    return lambda: model.generate(**given, **length, do_sample=False, pad_token_id=0)


def decoding(path: Path, ids: Tensor) -> Callable[[], object]:
    """The same on an ONNX file that keeps keys and values."""
    session, given = open_session(path, threads=1), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return lambda: greedy(session, given, NEW)


def loaded(folder: Path) -> PreTrainedModel:
    """The model of a run."""
    model = load_pretrained(folder)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"{folder}: not a transformers model")
    return model.eval()


def exported(folder: Path, model: PreTrainedModel, ids: Tensor) -> dict[str, Path]:
    """Both ONNX files of a run, which are compared with the model when they are written."""
    files = {"cached": folder / "cached.onnx", "prefill": folder / "model.onnx"}
    if not files["cached"].exists():
        to_cached_onnx(model, files["cached"])
    if not files["prefill"].exists():
        to_onnx(model, files["prefill"], {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    return files


def measure(folders: Mapping[str, Path], rounds: int, kept: Path) -> None:
    """Time every model in every way; each way's numbers are kept when it is done.

    Args:
        folders: name -> folder of a run; the first is what the others are compared with.
        rounds: timings of each.
        kept: the JSON file for the numbers; what is in it for the same models and rounds is not measured again.
    """
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    models = {name: loaded(folder) for name, folder in folders.items()}
    base, size = next(iter(folders)), min(model.config.vocab_size for model in models.values())
    ids = torch.randint(1, size, (1, PREFILL), generator=torch.Generator().manual_seed(0))
    progress = tqdm(models.items(), desc="ONNX files", file=sys.stderr)
    files = {name: exported(folders[name], model, ids) for name, model in progress}
    asked = {"rounds": rounds, "models": list(folders)}
    found: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    if found.get("asked") != asked:
        found = {"asked": asked, "machine": machine(["CPUExecutionProvider"]), "ways": {}}
    for way in WAYS:
        if way not in found["ways"]:
            found["ways"][way] = _timed(way, models, files, ids, rounds, base)
            with staged_file(kept) as path:
                path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _timed(
    way: str,
    models: Mapping[str, PreTrainedModel],
    files: Mapping[str, Mapping[str, Path]],
    ids: Tensor,
    rounds: int,
    base: str,
) -> dict[str, Any]:
    """One entry of `WAYS`."""
    start = ids[:, :PROMPT]
    if way == "torch":
        calls = {name: generating(model, start) for name, model in models.items()}
        return summary(in_turn(calls, rounds, WAYS[way]), NEW, base)
    if way == "cached":
        calls = {name: decoding(found["cached"], start) for name, found in files.items()}
        return summary(in_turn(calls, rounds, WAYS[way]), NEW, base)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    plain = {name: found["prefill"] for name, found in files.items()}
    report = benchmark(plain, given, threads=1, rounds=5 * rounds, progress=True)
    return summary({file.name: list(file.seconds) for file in report.files}, PREFILL, base)
