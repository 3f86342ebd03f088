"""How long ONNX files take, side by side: interleaved runs in random order, so that other load hits all alike."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import random
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from td_plugin.errors import TdError
from td_plugin.export.cold_start import cold_start
from td_plugin.export.latency import Conditions, FileLatency, LatencyReport
from td_plugin.export.probes import text_length
from td_plugin.export.session import PROVIDER, graph_inputs, open_session, read_graph

if TYPE_CHECKING:
    import numpy as np

_WARMUP = 5  # onnxruntime's times are flat from the first runs on
_CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8", "amx_bf16", "asimddp", "i8mm")


def benchmark(
    files: Mapping[str, str | os.PathLike[str]],
    example_inputs: Mapping[str, Tensor | np.ndarray[Any, Any]],
    *,
    threads: int = 1,
    rounds: int = 100,
    seed: int = 0,
    progress: bool = False,
) -> LatencyReport:
    """Time ONNX files against each other on the CPU.

    Every round runs each file once, in an order drawn so that each file comes first, second... equally often. The
    ratio of two files is taken within a round, which cancels load from outside: at one thread and 50 rounds or more it
    repeats within 3 %.

    Args:
        files: name -> path; the first one is the baseline of the printed speed-ups.
        example_inputs: name -> tensor or array, as the model is called; what the graphs do not take is left out.
        threads: threads inside one operator. They do not spin.
        rounds: timings per file; p99 needs 200.
        seed: of the order of the runs and of the bootstrap.
        progress: show a bar on the terminal.

    Raises:
        TdError: a file is missing or damaged, inputs do not fit its graph, or a count is below 1.
    """
    if not files or threads < 1 or rounds < 1:
        raise TdError(
            "nothing to time",
            got=f"{len(files)} files, {threads} threads, {rounds} rounds",
            fix="give at least one file, one thread and one round",
        )
    opened = {name: _open(Path(path), example_inputs, threads) for name, path in files.items()}
    seconds = _time_in_turn(opened, rounds, seed, progress)
    measured = [
        FileLatency(
            name=name,
            bytes=file_size(files[name]),
            cold=cold_start(Path(files[name]), file.feeds, threads),
            seconds=tuple(seconds[name]),
        )
        for name, file in opened.items()
    ]
    inputs = next(iter(opened.values())).inputs
    batch = next(iter(inputs.values())).shape[0]
    conditions = Conditions(threads, batch, text_length(inputs), rounds, seed, _machine())
    return LatencyReport(tuple(measured), conditions)


@dataclass(frozen=True)
class _Open:
    """An open session and what it is fed."""

    session: Any
    inputs: dict[str, Tensor]
    feeds: dict[str, Any]

    def run(self) -> float:
        """Seconds of one run."""
        start = time.perf_counter()
        self.session.run(None, self.feeds)
        return time.perf_counter() - start


def _open(path: Path, inputs: Mapping[str, Any], threads: int) -> _Open:
    session = open_session(path, threads=threads)
    fitted = graph_inputs(session, inputs, str(path))
    opened = _Open(session, fitted, {name: tensor.numpy() for name, tensor in fitted.items()})
    try:
        for _ in range(_WARMUP):
            opened.run()
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise TdError("onnxruntime cannot run the graph", where=str(path), got=str(error).splitlines()[0]) from error
    return opened


def _time_in_turn(files: Mapping[str, _Open], rounds: int, seed: int, progress: bool) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in files}
    with _bar(interleaved(list(files), rounds, seed), progress) as orders:
        for order in orders:
            for name in order:
                seconds[name].append(files[name].run())
    return seconds


def interleaved(names: Sequence[str], rounds: int, seed: int) -> list[tuple[str, ...]]:
    """One order of all `names` per round: random, and over every ``len(names)`` rounds each takes each place once."""
    generator = random.Random(seed)
    orders: list[tuple[str, ...]] = []
    while len(orders) < rounds:
        shuffled = generator.sample(names, len(names))
        block = [tuple(shuffled[turn:] + shuffled[:turn]) for turn in range(len(names))]
        orders += generator.sample(block, len(block))
    return orders[:rounds]


@contextmanager
def _bar(orders: list[tuple[str, ...]], shown: bool) -> Iterator[Iterable[tuple[str, ...]]]:
    if not shown:
        yield orders
        return
    try:
        from rich.progress import Progress
    except ImportError as error:
        raise TdError("rich draws the progress bar", got=error, fix="pip install 'td-plugin[onnx]'") from error
    with Progress(transient=True) as bar:
        yield bar.track(orders, description="rounds")


def file_size(path: str | os.PathLike[str]) -> int:
    """Bytes of an ONNX file and of the files beside it that hold its weights.

    Raises:
        TdError: the file is missing or cannot be parsed.
    """
    outside = {
        str(entry.value)
        for tensor in read_graph(path).graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    return Path(path).stat().st_size + sum((Path(path).parent / name).stat().st_size for name in outside)


def _machine() -> dict[str, str]:
    model, flags = _processor()
    load = " ".join(f"{value:.1f}" for value in os.getloadavg()) if os.name == "posix" else ""
    return {
        "cpu": model,
        "flags": " ".join(flag for flag in _CPU_FLAGS if flag in flags),
        "cores": str(os.cpu_count()),
        "load": load,
        "python": platform.python_version(),
        "onnxruntime": importlib.metadata.version("onnxruntime"),
        "provider": PROVIDER,
    }


def _processor() -> tuple[str, set[str]]:
    """Model name and instruction sets; the latter only where /proc tells them."""
    source = Path("/proc/cpuinfo")
    if not source.exists():
        return platform.processor() or platform.machine(), set()
    pairs = [line.partition(":") for line in source.read_text(encoding="utf-8").splitlines()]
    facts = {key.strip(): value.strip() for key, _, value in reversed(pairs)}
    flags = facts.get("flags") or facts.get("Features") or ""
    return facts.get("model name") or platform.machine(), set(flags.split())
