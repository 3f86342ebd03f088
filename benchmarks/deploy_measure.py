"""Torch models and ONNX files timed in turn, each round running every one of them once."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from deploy_models import Batch, random_inputs
from torch import nn
from tqdm import tqdm

from td_plugin.export.machine import load_average
from td_plugin.export.runners import Form, make_runner
from td_plugin.export.session import open_session
from td_plugin.export.speedup import paired_speedup
from td_plugin.export.timing import interleaved

Run = Callable[[], float]
"""One run; the seconds it took."""
Opener = Callable[[], Run]
"""Put the weights somewhere else in memory, get ready, and run once."""

BASE = "0/fp32"
AGAIN = "0/fp32-again"
"""The baseline's file in a session of its own: what a row that changes nothing looks like."""
PAUSE = 0.005  # seconds before a run; the threads of a torch operator spin for some time when it has ended


@dataclass(frozen=True)
class Setting:
    """One shape of the input, and the threads inside an operator."""

    batch: int
    sequence: int
    threads: int

    @property
    def name(self) -> str:
        """In the names of files."""
        return f"{self.batch}x{self.sequence}-t{self.threads}"

    def inputs(self, vocabulary: int) -> Batch:
        """What is timed."""
        return random_inputs(self.batch, self.sequence, vocabulary)


@dataclass(frozen=True)
class Plan:
    """How long one setting is measured.

    Attributes:
        least: rounds in any case.
        most: no more than these.
        seconds: as many rounds as fit in it, between the two.
        sittings: how often everything is opened anew.
        lock: a file that is locked while the clock runs, so that measurements on one machine wait for each other.
    """

    least: int
    most: int
    seconds: float
    sittings: int
    lock: Path | None = None

    def goes_on(self, rounds: int, seconds: float) -> bool:
        """Whether a sitting has another round after so many, which took so long."""
        if rounds * self.sittings < self.least:
            return True
        return rounds * self.sittings < self.most and seconds * self.sittings < self.seconds


def file_opener(path: Path, inputs: Batch, threads: int) -> Opener:
    """An ONNX file in onnxruntime on the CPU; its threads do not spin."""
    feeds = make_runner(Form(path), [inputs], threads=threads).feeds[0]

    def ready() -> Run:
        session = open_session(path, threads=threads)
        return warmed(lambda: session.run(None, feeds))

    return ready


def torch_opener(model: nn.Module, call: Callable[..., Any], inputs: Batch) -> Opener:
    """A torch model, or what `torch.compile` made of it."""

    def once() -> None:
        with torch.inference_mode():
            call(**inputs)

    def ready() -> Run:
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        return warmed(once)

    return ready


def warmed(call: Callable[[], Any]) -> Run:
    """The call, timed, after it has run twice."""

    def run() -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    run(), run()
    return run


@contextmanager
def turn(lock: Path | None) -> Iterator[None]:
    """Hold the lock on the file, if there is one."""
    if lock is None:
        yield
        return
    import fcntl

    with lock.open("a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def measure(openers: Mapping[str, Opener], plan: Plan, seed: int, threads: int, title: str) -> dict[str, Any]:
    """Time all in turn; in every sitting they are opened anew, in another order.

    Returns:
        The seconds of each, one per round, and what the machine was doing.
    """
    names, generator = list(openers), random.Random(seed)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    loads, cpu, wall = [], 0.0, 0.0
    for sitting in range(plan.sittings):
        runs: dict[str, Run] = {}  # the old ones are given up first
        for name in tqdm(generator.sample(names, len(names)), f"{title} opening", leave=False, mininterval=1.0):
            runs[name] = openers[name]()
        with turn(plan.lock):
            loads.append(load_average())
            before, start = time.process_time(), time.perf_counter()
            orders = interleaved(names, plan.most, seed * 100 + sitting)
            for done, order in enumerate(tqdm(orders, title, leave=False, mininterval=1.0)):
                if not plan.goes_on(done, time.perf_counter() - start):
                    break
                for name in order:
                    if threads > 1:
                        time.sleep(PAUSE)
                    seconds[name].append(runs[name]())
            cpu, wall = cpu + time.process_time() - before, wall + time.perf_counter() - start
    return {
        "rounds": len(seconds[BASE]),
        "sittings": plan.sittings,
        "load": loads,
        "cpu_share": cpu / wall,
        "minutes": wall / 60,
        "seconds": {name: [round(value, 7) for value in values] for name, values in seconds.items()},
    }


def ratios(parts: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of every row the median time, the speed-up over the baseline, and that of each run by itself."""
    found = {}
    for name in parts[0]["seconds"]:
        mine = [part["seconds"][name] for part in parts]
        base = [part["seconds"][BASE] for part in parts]
        base_all, mine_all = list(chain(*base)), list(chain(*mine))
        each = [paired_speedup(theirs, own) for theirs, own in zip(base, mine, strict=True)]
        medians = [speedup.median for speedup in each]
        found[name] = {
            "p50_ms": 1e3 * statistics.median(mine_all),
            "speedup": paired_speedup(base_all, mine_all).to_dict(),
            "runs": [speedup.to_dict() for speedup in each],
            "apart": max(medians) / min(medians) - 1,
        }
    return found
