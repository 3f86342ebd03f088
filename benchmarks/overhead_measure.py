"""How `overhead.py` measures: interleaved rounds, bytes held, the peak of a process, and the machine it ran on."""

from __future__ import annotations

import ctypes
import gc
import importlib
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from types import FunctionType, MethodType, ModuleType
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from overhead_rows import ROWS, Variant
from torch import Tensor, nn
from tqdm import tqdm
from transformers import BertConfig, BertForSequenceClassification

import td_plugin as td
from td_plugin import kernels
from td_plugin.parametrization import masks_of

HEAD = 64
BATCHES = 4
RESAMPLES = 2000


@dataclass(frozen=True)
class Setting:
    """What a step computes.

    Attributes:
        device: ``"cpu"`` or ``"cuda"``.
        dtype: ``"bfloat16"`` runs the forward under autocast; parameters are float32 always.
        compiled: whether forwards are compiled.
        layers: of the encoder.
        hidden: its width; heads of 64, FFN of four times that, as BERT-base.
        vocabulary: rows of the embedding.
        batch: sequences per step.
        sequence: tokens per sequence.
    """

    device: str
    dtype: str
    compiled: bool
    layers: int
    hidden: int
    vocabulary: int
    batch: int
    sequence: int

    def model(self) -> nn.Module:
        """BERT with a classifier, random weights, dropout as configured by default, in training mode."""
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=max(self.hidden // HEAD, 1),
            intermediate_size=4 * self.hidden,
            problem_type="single_label_classification",  # else the first forward sets it, and all is compiled twice
        )
        return BertForSequenceClassification(config).to(self.device).train()

    def batches(self) -> list[dict[str, Tensor]]:
        """A few batches of random tokens and labels; step i takes number i modulo their count."""
        generator = torch.Generator().manual_seed(0)
        draw = partial(torch.randint, generator=generator)
        made = [
            {
                "input_ids": draw(self.vocabulary, (self.batch, self.sequence)),
                "attention_mask": torch.ones(self.batch, self.sequence, dtype=torch.long),
                "labels": draw(2, (self.batch,)),
            }
            for _ in range(BATCHES)
        ]
        return [{name: tensor.to(self.device) for name, tensor in batch.items()} for batch in made]

    def autocast(self) -> AbstractContextManager[Any]:
        """Of the forward."""
        if self.dtype == "float32":
            return nullcontext()
        return torch.autocast(self.device, dtype=getattr(torch, self.dtype))

    def build(self, name: str, model: nn.Module) -> Variant:
        """The row `name` on `model`; `NotHereError` if that cannot be."""
        variant = ROWS[name].build(model)
        if self.compiled:
            variant.compile(name)
        return variant

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.device == "cuda":
            torch.cuda.synchronize()


def in_turn(
    setting: Setting,
    variants: Mapping[str, Callable[[dict[str, Tensor]], object]],
    rounds: int,
    seed: int,
    label: str,
) -> tuple[dict[str, list[float]], dict[str, list[int]]]:
    """Seconds and page faults per row and round: every round runs each row once, on the same batch, in random order."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    faults: dict[str, list[int]] = {name: [] for name in variants}
    shuffle, batches = random.Random(seed), setting.batches()
    gc.collect()
    gc.freeze()  # what is there stays; collecting the rest between steps is quick
    for turn in tqdm(range(rounds), desc=label, file=sys.stderr, mininterval=1.0):
        for name in shuffle.sample(list(variants), len(variants)):
            gc.collect()  # else one row pays for the garbage of another
            setting.wait()
            before, start = _faults(), time.perf_counter()
            variants[name](batches[turn % BATCHES])
            setting.wait()
            seconds[name].append(time.perf_counter() - start)
            faults[name].append(_faults() - before)
    gc.unfreeze()
    return seconds, faults


def _faults() -> int:
    """Pages that the system has had to hand this process again, after its allocator had given them back."""
    if not (source := Path("/proc/self/stat")).exists():
        return 0
    return int(source.read_text().rpartition(")")[2].split()[7])


def own_seconds(setting: Setting, variant: Variant) -> float:
    """Median time per step inside the calls of td_plugin: `step`, masking a weight, masking its gradient."""
    spent, depth, steps = 0.0, 0, []

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            nonlocal spent, depth
            start, depth = time.perf_counter(), depth + 1
            result = function(*args)
            depth -= 1
            spent += time.perf_counter() - start if depth == 0 else 0.0
            return result

        return call

    with patch.object(variant, "begin", timed(variant.begin)), patch.object(kernels, "run", timed(kernels.run)):
        for batch in setting.batches() * 2:
            spent = 0.0
            variant.step(batch, setting.autocast)
            steps.append(spent)
    return statistics.median(steps)


def compared(seconds: list[float], base: list[float], seed: int = 0) -> dict[str, float]:
    """A row against the row without any method, from the rounds both ran in.

    Returns:
        ``median``, ``low``, ``high``: of ``t / t_none - 1`` over the rounds, with its 95 % bootstrap interval;
        ``of_means`` and ``of_minima``: the same of the mean and of the smallest time; ``median_ms``: of the row.
    """
    overhead = np.asarray(seconds) / np.asarray(base) - 1
    drawn = np.random.default_rng(seed).integers(len(overhead), size=(RESAMPLES, len(overhead)))
    low, high = np.quantile(np.median(overhead[drawn], axis=1), (0.025, 0.975))
    return {
        "median": float(np.median(overhead)),
        "low": float(low),
        "high": float(high),
        "of_means": float(np.mean(seconds) / np.mean(base)) - 1,
        "of_minima": min(seconds) / min(base) - 1,
        "median_ms": 1e3 * float(np.median(seconds)),
    }


def held_bytes(model: nn.Module, sparsifier: td.TargetedDropout) -> int:
    """Bytes of all tensors and arrays that masks and sparsifier keep alive; the model's own do not count."""
    storages = {tensor.untyped_storage().data_ptr(): 0 for tensor in chain(model.parameters(), model.buffers())}
    seen: dict[int, object] = {}
    waiting: list[Any] = [sparsifier, *(mask for _, _, mask in masks_of(model))]
    while waiting:
        item = waiting.pop()
        if id(item) in seen or isinstance(item, (nn.Module, ModuleType, type, FunctionType, MethodType)):
            continue
        seen[id(item)] = item
        if isinstance(item, Tensor):
            storage = item.untyped_storage()
            storages.setdefault(storage.data_ptr(), storage.nbytes())
        elif isinstance(item, np.ndarray):
            storages.setdefault(item.ctypes.data, item.nbytes)
        elif isinstance(item, Mapping):
            waiting += item.values()
        elif isinstance(item, Iterable) and not isinstance(item, (str, bytes)):
            waiting += item
        else:
            waiting += getattr(item, "__dict__", {}).values()
    return sum(storages.values())


def targeted(model: nn.Module) -> tuple[int, int]:
    """How many tensors of `model` carry a mask of ours, and how many scalars they have."""
    tensors = {id(module._parameters[name]): module._parameters[name] for module, name, _ in masks_of(model)}
    return len(tensors), sum(tensor.numel() for tensor in tensors.values() if tensor is not None)


def peak_bytes(setting: Setting, name: str) -> dict[str, int]:
    """Memory of this process between two training steps of a row and at the peak of a step; for a fresh process.

    On CUDA what torch allocates on the device, elsewhere what is resident, by the record of the kernel (Linux; 0 on
    other systems). That counts code too, so numba is loaded for every row, and what it takes is told apart.
    """
    before = _resident("VmRSS")
    if kernels.available():
        importlib.import_module("numba")
    libraries = _resident("VmRSS") - before
    variant, batches = setting.build(name, setting.model()), setting.batches()
    for batch in batches[:2]:  # optimizer states are made in the first
        variant.step(batch, setting.autocast)
    setting.wait()
    gc.collect()
    if setting.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        between = torch.cuda.memory_allocated()
    else:
        _trim_and_forget()
        between = _resident("VmRSS")
    for batch in batches[2:]:
        variant.step(batch, setting.autocast)
    setting.wait()
    peak = torch.cuda.max_memory_allocated() if setting.device == "cuda" else _resident("VmHWM")
    return {"between": between, "peak": peak, "libraries": libraries}


def _trim_and_forget() -> None:
    """Give freed memory back and start the kernel's record anew: what came before must not hide the next steps.

    `ru_maxrss` would not do, it goes back to the process that started this one.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
    if (switch := Path("/proc/self/clear_refs")).exists():
        switch.write_text("5")


def _resident(key: str) -> int:
    if not (source := Path("/proc/self/status")).exists():
        return 0
    lines = (line.split() for line in source.read_text(encoding="utf-8").splitlines())
    return next(1024 * int(words[1]) for words in lines if words[:1] == [f"{key}:"])
