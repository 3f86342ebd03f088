"""Where the time of a run goes: ONNX files recorded in turn by onnxruntime's profiler."""

from __future__ import annotations

import os
import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

from td_plugin.errors import TdError, first_line
from td_plugin.export.engines import OPENVINO
from td_plugin.export.flops import count_flops
from td_plugin.export.node_events import Recorder, RunEvents
from td_plugin.export.operators import OUTSIDE, FormProfile, OperatorReport, OperatorTime
from td_plugin.export.progress import Bar, bar
from td_plugin.export.runners import WARM_UP, Form, Inputs, Runner, as_forms, make_runner
from td_plugin.export.timing import interleaved


def profile_operators(
    files: Mapping[str, str | os.PathLike[str] | Form],
    example_inputs: Inputs,
    *,
    threads: int = 1,
    runs: int = 20,
    progress: bool = False,
) -> OperatorReport:
    """Record how long each operator takes, and compare it with what the FLOPs would let one expect.

    Args:
        files: name -> path or `Form`; the first one is what the others are compared with. Those that another runtime
            runs are left out.
        example_inputs: name -> tensor or array.
        threads: threads inside one operator.
        runs: recorded of each file.
        progress: show a bar on the terminal.

    Raises:
        TdError: a file is missing or damaged, a provider is not installed, inputs do not fit, or a count is below 1.
    """
    if runs < 1 or threads < 1:
        raise TdError("nothing to record", got=f"{runs} runs, {threads} threads", fix="one of each at least")
    made = {name: make_runner(form, [example_inputs], threads=threads) for name, form in as_forms(files).items()}
    runners = {name: runner for name, runner in made.items() if runner.engine.provider != OPENVINO}
    if not runners:
        raise TdError("no file here runs in onnxruntime, whose profiler this is", got=", ".join(made))
    with bar("recorded runs", runs, progress) as steps:
        recorded = _record(runners, runs, steps)
    forms = tuple(_profile(name, recorded[name], _flops(runner)) for name, runner in runners.items())
    return OperatorReport(forms, threads, runs)


def _record(runners: Mapping[str, Runner], runs: int, steps: Bar) -> dict[str, tuple[RunEvents, ...]]:
    """The recorded runs of each, in turn, after the warm-up."""
    orders = [tuple(runners)] * WARM_UP + interleaved(list(runners), runs, seed=0)
    name = ""
    try:
        with ExitStack() as stack:
            recorders = {}
            for name in runners:
                recorders[name] = stack.enter_context(Recorder(runners[name].engine))
            for turn, order in enumerate(orders):
                for name in order:
                    recorders[name].run(runners[name].feeds[0])
                if turn >= WARM_UP:
                    steps.advance()
    except Exception as error:  # onnxruntime's exceptions share no base class
        where = runners[name].engine.path
        raise TdError("onnxruntime cannot run the graph", where=where, got=first_line(error)) from error
    return {name: recorder.runs[WARM_UP:] for name, recorder in recorders.items()}


def _flops(runner: Runner) -> int | None:
    try:
        return count_flops(runner.engine.path, runner.feeds[0]).total
    except TdError:
        return None


def _profile(name: str, runs: Sequence[RunEvents], flops: int | None) -> FormProfile:
    """Medians over `runs` of the time of all nodes of an operator, and of what the run takes beside its nodes."""
    totals: list[dict[str, float]] = []
    for run in runs:
        sums = defaultdict[str, float](float)
        for node in run.nodes:
            sums[node.operator] += node.seconds
        totals.append({**sums, OUTSIDE: max(run.seconds - sum(sums.values()), 0.0)})
    nodes = Counter(node.operator for node in runs[-1].nodes)
    seconds = statistics.median(run.seconds for run in runs)
    operators = dict.fromkeys(operator for sums in totals for operator in sums)
    medians = {operator: statistics.median(sums.get(operator, 0.0) for sums in totals) for operator in operators}
    rows = [OperatorTime(name, median, median / seconds, nodes[name]) for name, median in medians.items()]
    return FormProfile(name, seconds, tuple(sorted(rows, key=lambda row: -row.seconds)), flops)
