"""A gate for releases: an ONNX file is held against the bars of a team, and the answer is yes or no."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence

from torch import nn

from td_plugin.errors import TdError
from td_plugin.export.benchmark import file_size
from td_plugin.export.check_bars import Bars
from td_plugin.export.check_latency import AGAINST, MODEL, Timing, latency_results, measure
from td_plugin.export.check_report import BarResult, CheckReport
from td_plugin.export.evaluation import Examples, evaluate_onnx
from td_plugin.export.form_checks import comparison_batches
from td_plugin.export.parity import precision_of
from td_plugin.export.probes import Batch, longest_text, make_parity_batches
from td_plugin.export.scores import LOWER_IS_BETTER, Score, drop
from td_plugin.export.session import graph_inputs, open_session, read_graph
from td_plugin.export.verify_forms import verify_forms

_SCORE_BARS = ("max_accuracy_drop", "min_accuracy", "max_perplexity")
# What `to_onnx` writes down: the key, and what is unknown without it.
_NOTED = {
    "td-plugin.model_class": "model class",
    "td-plugin.parameters": "parameters",
    "td-plugin.sparsity": "sparsity",
}

Reference = nn.Module | str | os.PathLike[str]


def check(
    path: str | os.PathLike[str],
    bars: Bars,
    *,
    against: str | os.PathLike[str] | None = None,
    data: Examples | None = None,
    equal_to: Reference | None = None,
    timing: Timing | None = None,
) -> CheckReport:
    """Hold an ONNX file against bars.

    A bar of a measured time or speed-up holds if the end of the 95 % interval that speaks against the file reaches it:
    the lower end of a speed-up, the upper end of a percentile. What noise could have done does not pass. While a bar is
    missed the files are timed anew (`Timing.sessions`): a speed-up is then that of all rounds together, whose interval
    is narrower; a percentile that of the calmest session. So a miss is no single hiccup, and a file that is better than
    its bar by more than the noise passes every time; a bar closer than that is said to be too close to call. Sizes,
    scores and differences do not vary and are compared as they are. A bar that cannot be judged counts as missed.

    Args:
        path: the ONNX file; one of another exporter will do.
        bars: the limits, one at least.
        against: the file it is compared with, as a rule the dense model's.
        data: labelled data, for the bars of scores.
        equal_to: the model that it shall equal, for `Bars.max_difference`: a torch module or an ONNX file. Compared at
            `make_parity_batches` of ``timing.inputs``, or of inputs made up.
        timing: how latency is measured.

    Raises:
        TdError: no bar, a file is missing or damaged, or inputs or data do not fit it.
    """
    if not bars.given:
        raise TdError("there is no bar to hold the file against", where=str(path), fix="give one, such as min_speedup")
    begin, timing = time.perf_counter(), timing or Timing()
    facts = _facts(path)
    if against is not None:
        open_session(against)
    scores = _scores(path, against, data, timing.progress)
    results = [_size(path, bars.given["max_size_mb"])] if bars.uses("max_size_mb") else []
    results += [_score_result(name, bars.given[name], scores) for name in _SCORE_BARS if bars.uses(name)]
    if bars.uses("max_difference"):
        results.append(_difference(path, bars.given["max_difference"], equal_to, timing))
    latency = measure(path, against, bars, timing)
    return CheckReport(
        file=str(path),
        results=(*latency_results(bars, latency), *results),
        against="" if against is None else str(against),
        scores=scores,
        latency=latency,
        facts=facts,
        unknown=tuple(what for key, what in _NOTED.items() if key not in facts),
        seconds=time.perf_counter() - begin,
    )


def _facts(path: str | os.PathLike[str]) -> dict[str, str]:
    open_session(path)
    graph = read_graph(path)
    opset = next((str(entry.version) for entry in graph.opset_import if entry.domain in ("", "ai.onnx")), "")
    about = {"producer": f"{graph.producer_name} {graph.producer_version}".strip(), "opset": opset}
    noted = {entry.key: entry.value for entry in graph.metadata_props}
    return {"precision": precision_of(graph), **about, **noted}


def _size(path: str | os.PathLike[str], limit: float) -> BarResult:
    megabytes = file_size(path) / 1e6
    return BarResult("max_size_mb", limit, megabytes, megabytes)


def _scores(
    path: str | os.PathLike[str], against: str | os.PathLike[str] | None, data: Examples | None, progress: bool
) -> dict[str, Score]:
    files = {} if data is None else {MODEL: path} if against is None else {MODEL: path, AGAINST: against}
    return {name: evaluate_onnx(file, data, progress=progress) for name, file in files.items() if data is not None}


def _score_result(name: str, limit: float, scores: Mapping[str, Score]) -> BarResult:
    score = scores.get(MODEL)
    if score is None:
        return BarResult(name, limit, note="not judged: needs data, --data")
    if name == "max_accuracy_drop":
        return _drop_result(limit, scores)
    if (score.metric in LOWER_IS_BETTER) != (name == "max_perplexity"):
        return BarResult(name, limit, note=f"not judged: the metric is {score.metric}")
    return BarResult(name, limit, score.value, score.value)


def _drop_result(limit: float, scores: Mapping[str, Score]) -> BarResult:
    if AGAINST not in scores:
        return BarResult("max_accuracy_drop", limit, note="not judged: needs a file to compare with, --against")
    found = drop(scores[AGAINST], scores[MODEL])
    note = ""
    if found.low is not None and found.high is not None and found.high - found.low > 2 * max(limit, 1e-12):
        half = (found.high - found.low) / 2
        note = f"{scores[MODEL].rows} rows know the drop to ± {half:.3g} only: more rows would tell"
    return BarResult("max_accuracy_drop", limit, found.value, found.value, found.low, found.high, note)


def _difference(path: str | os.PathLike[str], limit: float, equal_to: Reference | None, timing: Timing) -> BarResult:
    if equal_to is None:
        return BarResult("max_difference", limit, note="not judged: needs the model it shall equal, --equal-to")
    if isinstance(equal_to, nn.Module):
        batches = make_parity_batches(_example(equal_to, timing), longest_text(equal_to))
        report = verify_forms({"reference": equal_to}, {MODEL: path}, _fitting(path, batches))
    else:
        batches = comparison_batches(equal_to, timing.inputs)
        report = verify_forms({}, {"reference": equal_to, MODEL: path}, _fitting(path, batches))
    parity = report.forms[0].parity
    if not math.isfinite(parity.max_abs):
        return BarResult("max_difference", limit, note="not judged: an output is not finite")
    shapes = ", ".join(row.shape for row in parity.rows)
    return BarResult("max_difference", limit, parity.max_abs, parity.max_abs, note=f"batches of {shapes}")


def _example(model: nn.Module, timing: Timing) -> Batch:
    if timing.inputs is not None:
        return timing.inputs
    from transformers import PreTrainedModel

    from td_plugin.export.example_inputs import inputs_for_model

    if not isinstance(model, PreTrainedModel):
        raise TdError("no inputs can be made up for this model", got=type(model).__name__, fix="Timing(inputs=...)")
    return inputs_for_model(model)


def _fitting(path: str | os.PathLike[str], batches: Sequence[Batch]) -> list[Batch]:
    """The batches of sizes that the graph takes: another exporter may have fixed some.

    Raises:
        TdError: none fits.
    """
    session, found = open_session(path), list[Batch]()
    for batch in batches:
        try:
            graph_inputs(session, batch, str(path))
        except TdError as error:
            problem = error
        else:
            found.append(batch)
    if not found:
        raise problem
    return found
