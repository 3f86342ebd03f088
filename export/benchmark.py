"""How long ONNX files take, side by side: interleaved runs in random order, so that other load hits all alike."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from td_plugin.errors import TdError
from td_plugin.export.cold_start import cold_start
from td_plugin.export.engines import CPU
from td_plugin.export.flops import count_flops
from td_plugin.export.graph_widths import width_changes
from td_plugin.export.latency import Conditions, FileLatency, LatencyReport
from td_plugin.export.machine import cores, load_average, machine
from td_plugin.export.noise import Signs
from td_plugin.export.probes import text_length
from td_plugin.export.progress import Bar, bar
from td_plugin.export.runners import Form, Inputs, Runner, as_examples, as_forms, make_runner
from td_plugin.export.session import read_graph
from td_plugin.export.timing import Plan, Timings, time_in_turn, widest

_ROUNDS = (100, 400)


def benchmark(
    files: Mapping[str, str | os.PathLike[str] | Form],
    example_inputs: Inputs | Sequence[Inputs],
    *,
    threads: int = 1,
    rounds: int | tuple[int, int] = _ROUNDS,
    seed: int = 0,
    progress: bool = False,
) -> LatencyReport:
    """Time ONNX files against each other.

    Every round runs each file once on the same input, in an order drawn so that each file comes first, second...
    equally often. The ratio of two files is taken within a round, which cancels load from outside: at one thread and
    100 rounds or more it repeats within 3 %. While an interval is wider than 4 % there are more rounds.

    Args:
        files: name -> path or `Form`; the first one is the baseline of the printed speed-ups.
        example_inputs: name -> tensor or array, as the model is called; what the graphs do not take is left out. Or a
            list of such, such as `at_lengths` makes from the user's data: every round draws one.
        threads: threads inside one operator. They do not spin.
        rounds: timings per file, or the least and the most of them; p99 needs 200.
        seed: of the order of the runs, of the draws and of the bootstrap.
        progress: show a bar on the terminal.

    Raises:
        TdError: a file is missing or damaged, a provider is not installed, inputs do not fit a graph, or a count is
            below 1.
    """
    forms, examples = as_forms(files), as_examples(example_inputs)
    if threads < 1:
        raise TdError("nothing to time", got=f"threads={threads}", fix="give one thread at least")
    plan, load = Plan.of(rounds, len(examples), seed), load_average()
    runners = {name: make_runner(form, examples, threads=threads) for name, form in forms.items()}
    with bar("rounds", plan.least, progress) as steps:
        timings = time_in_turn(list(runners), lambda order: {n: runners[n].timed() for n in order}, plan, steps)
    with bar("cold starts", len(runners), progress) as steps:
        measured = tuple(_file(name, runner, timings.seconds[name], steps) for name, runner in runners.items())
    return LatencyReport(
        measured,
        _conditions(runners, timings, threads, seed),
        notes=_signs(runners, timings, load, seed).notes(),
        widths=width_changes({name: runner.engine.path for name, runner in runners.items()}),
    )


def _file(name: str, runner: Runner, seconds: tuple[float, ...], steps: Bar) -> FileLatency:
    cold = cold_start(runner.engine, runner.largest)
    steps.advance()
    return FileLatency(
        name=name,
        bytes=file_size(runner.engine.path),
        cold=cold,
        seconds=seconds,
        provider=runner.engine.provider,
        flops=_mean_flops(runner),
    )


def _mean_flops(runner: Runner) -> float | None:
    """Over the examples, each of which runs equally often; None where the CPU cannot run the graph."""
    shapes = [tuple(value.shape for value in feeds.values()) for feeds in runner.feeds]
    try:
        counts = {shape: count_flops(runner.engine.path, runner.feeds[shapes.index(shape)]) for shape in set(shapes)}
    except TdError:
        return None
    return sum(counts[shape].total for shape in shapes) / len(shapes)


def _conditions(runners: Mapping[str, Runner], timings: Timings, threads: int, seed: int) -> Conditions:
    name, first = next(iter(runners.items()))
    lengths = [text_length(inputs) for inputs in first.inputs]
    several = len(lengths) > 1
    return Conditions(
        threads=threads,
        batch=first.batch,
        sequence=None if several else lengths[0],
        rounds=len(timings.seconds[name]),
        seed=seed,
        machine=machine(runner.engine.provider for runner in runners.values()),
        lengths=tuple(length for length in lengths if length is not None) if several else (),
        sessions=timings.sessions,
    )


def _signs(runners: Mapping[str, Runner], timings: Timings, load: float | None, seed: int) -> Signs:
    threads = {runner.engine.threads for runner in runners.values()}
    single = threads == {1} and all(runner.engine.provider == CPU for runner in runners.values())
    return Signs(
        widest=widest(timings.seconds, seed),
        rounds=len(next(iter(timings.seconds.values()))),
        cpu_share=timings.cpu_share if single else None,
        load=load,
        threads=max(threads),
        cores=cores(),
    )


def file_size(path: str | os.PathLike[str]) -> int:
    """Bytes of an ONNX file and of the files beside it that hold its weights.

    Raises:
        TdError: the file is missing or cannot be parsed, or one beside it is missing.
    """
    outside = {
        str(entry.value)
        for tensor in read_graph(path).graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    parts = [Path(path), *(Path(path).parent / name for name in sorted(outside))]
    for part in parts[1:]:
        if not part.is_file():
            raise TdError("weights kept outside the ONNX file are missing", where=str(path), got=str(part))
    return sum(part.stat().st_size for part in parts)
