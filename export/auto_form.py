"""Which form of a model to ship: the fastest one, measured here, that computes the same and does its task as well."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from td_plugin.errors import TdError, first_line
from td_plugin.export.auto_report import AutoReport, Candidate
from td_plugin.export.benchmark import benchmark
from td_plugin.export.external_data import LIMIT, move_pair, staged_graph
from td_plugin.export.form_checks import beyond, compare_files, comparison_batches
from td_plugin.export.forms import FORMS, UNFUSED, Form, check_form, derive
from td_plugin.export.latency import LatencyReport
from td_plugin.export.parity import Precision, Tolerance
from td_plugin.export.probes import Batch
from td_plugin.export.progress import bar
from td_plugin.export.runners import Inputs
from td_plugin.export.scores import Score, drop
from td_plugin.export.session import read_graph
from td_plugin.export.source_graph import as_target, open_source

AUTO_KEY = "td-plugin.auto"
"""Metadata entry of a file that `best_form` wrote: JSON of the form and why it is no other."""

Accuracy = Callable[[Path], "float | Score"]
"""How well a file does its task: a number in [0, 1], more is better, or what `evaluate_onnx` returns."""

_ON_CPU: tuple[Form, ...] = ("fp32", "fused", "int8", "int8-static")  # fp16 and bf16 are for GPUs and disks
_ROUNDS = (50, 200)
_DECODER: tuple[Form, ...] = ("int8-weight", "int4")


def best_form(  # noqa: PLR0913 - all but the first three are options, by name only
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    example_inputs: Batch | Sequence[Batch],
    *,
    candidates: Sequence[Form] | None = None,
    calibration: Iterable[Inputs] | None = None,
    tolerances: Mapping[Precision, Tolerance] | None = None,
    accuracy: Accuracy | None = None,
    max_drop: float = 0.01,
    threads: int = 1,
    rounds: int | tuple[int, int] = _ROUNDS,
    progress: bool = False,
    limit: int = LIMIT,
) -> AutoReport:
    """Derive the forms of an fp32 ONNX file, time them in turn on this machine, and keep the best.

    A form is out if it cannot be made, differs from the source by more than the tolerance of its precision, or does
    the task worse than the source by more than `max_drop`. Of the others the most exact one stays, unless a less exact
    one is faster by more than the noise (`Speedup.verdict`): a difference inside the interval is no gain.

    Args:
        source: the fp32 file.
        target: the file to write, or the directory to write it to under the source's name.
        example_inputs: what to time on, as for `benchmark`, and what to compare on, as for `derive`.
        candidates: forms to try, of `FORMS`; fp32 always is. By default those for CPUs: ``fused``, ``int8``, with
            `calibration` ``int8-static``, and for a model that predicts each token ``int8-weight`` and ``int4``.
        calibration: see `derive`.
        tolerances: instead of `parity.TOLERANCES`, for the precisions it names.
        accuracy: judges a file; without it the differences alone decide.
        max_drop: how much worse than the source's that may be; of a perplexity relative.
        threads: threads inside one operator.
        rounds: timings per form, or the least and the most of them.
        progress: show bars on the terminal.
        limit: see `derive`.

    Raises:
        TdError: the source or the inputs are not as `derive` and `benchmark` need them; `target` is left as it was.
    """
    path = as_target(target, source)
    origin = open_source(source, path)
    batches = comparison_batches(source, example_inputs)
    forms = _to_try(candidates, calibration is not None, origin.metadata.get("td-plugin.model_class", ""))
    trial = _Trial(origin.path, batches, None if calibration is None else list(calibration), tolerances, limit)
    with staged_graph(path) as staged, tempfile.TemporaryDirectory(dir=staged.parent) as folder:
        tried: dict[Form, Candidate] = {}
        files: dict[Form, Path] = {}
        with bar("forms", len(forms), progress) as steps:
            for form in forms:
                place = Path(folder) / form / path.name
                tried[form] = trial.run(form, place)
                if not tried[form].rejected:
                    files[form] = place
                steps.advance()
        _judge(tried, files, accuracy, max_drop)
        latency = measure(files, example_inputs, threads, rounds, progress) if len(files) > 1 else None
        chosen, done = _choose(tried, latency)
        _take(files[chosen], staged, AutoReport(chosen, path, done))
    return AutoReport(chosen, path, done, latency)


def measure(
    files: Mapping[Form, Path],
    example_inputs: Batch | Sequence[Batch],
    threads: int,
    rounds: int | tuple[int, int],
    progress: bool,
) -> LatencyReport:
    """Time the files in turn, fp32 being the first."""
    return benchmark(
        {str(form): file for form, file in files.items()},
        example_inputs,
        threads=threads,
        rounds=rounds,
        progress=progress,
    )


def _to_try(candidates: Sequence[Form] | None, calibrated: bool, model: str) -> list[Form]:
    """fp32 and the others, the most exact first.

    Raises:
        TdError: there is no such form, or it needs data that were not given.
    """
    if candidates is None:
        default = [*_ON_CPU, *(_DECODER if model.endswith(("CausalLM", "LMHeadModel")) else ())]
        candidates = [form for form in default if form != "int8-static" or calibrated]
    for form in candidates:
        check_form(form)
    if "int8-static" in candidates and not calibrated:
        raise TdError("int8-static needs data", got="no calibration", fix="calibration=[{...}, ...], or leave it out")
    return [form for form in FORMS if form == "fp32" or form in candidates]


@dataclass(frozen=True)
class _Trial:
    """What all candidates share."""

    source: Path
    batches: Sequence[Batch]
    calibration: Sequence[Inputs] | None
    tolerances: Mapping[Precision, Tolerance] | None
    limit: int

    def run(self, form: Form, place: Path) -> Candidate:
        """Write the form to `place`, if it can be had."""
        try:
            report = derive(
                self.source,
                place,
                form,
                calibration=self.calibration if form == "int8-static" else None,
                example_inputs=list(self.batches),
                limit=self.limit,
            )
            problem = report.problem
            if self.tolerances:
                problem = beyond(compare_files(self.source, place, self.batches, self.tolerances, form))
        except TdError as error:
            if form == "fp32":  # the source itself
                raise
            return Candidate(form, rejected=f"cannot be made: {first_line(error)}")
        relative = None if report.parity is None else report.parity.relative
        found = Candidate(form, report.bytes, relative)
        if report.form != form:
            return replace(found, rejected=next(note for note in report.notes if note.startswith(UNFUSED)))
        return replace(found, rejected=f"parity: {problem}") if problem and form != "fp32" else found


def _judge(tried: dict[Form, Candidate], files: dict[Form, Path], accuracy: Accuracy | None, most: float) -> None:
    """Take out of `files` what does the task worse than fp32 by more than `most`."""
    if accuracy is None:
        return
    scores = {form: accuracy(file) for form, file in files.items()}
    for form, score in scores.items():
        loss = _loss(scores["fp32"], score)
        tried[form] = replace(tried[form], score=_number(score))
        if not loss <= most:  # a score that is no number is no good score
            del files[form]
            reason = f"accuracy: {_number(score):.4g} is {loss:.4g} below fp32, {most:g} is allowed"
            tried[form] = replace(tried[form], rejected=reason)


def _number(score: float | Score) -> float:
    return score.value if isinstance(score, Score) else float(score)


def _loss(base: float | Score, other: float | Score) -> float:
    if isinstance(base, Score) and isinstance(other, Score):
        return drop(base, other).value
    return _number(base) - _number(other)


def _choose(tried: Mapping[Form, Candidate], latency: LatencyReport | None) -> tuple[Form, tuple[Candidate, ...]]:
    """The most exact form that no less exact one beats by more than the noise."""
    best: Form = "fp32"
    if latency is None:
        return best, tuple(tried.values())
    timed = [form for form, candidate in tried.items() if not candidate.rejected]
    for form in timed[1:]:
        best = form if latency.speedup(form, best).verdict == "faster" else best
    done = dict(tried)
    for form in timed:
        ahead, seconds = latency.speedup(best, form), latency.file(form).percentile(50)
        slower, no_gain = f"{best} is {ahead.median:.2f}x as fast", f"no gain over {best}"
        reason = "" if form == best else slower if ahead.verdict == "faster" else no_gain
        gain = "" if form == "fp32" else str(latency.speedup(form, "fp32"))
        done[form] = replace(done[form], seconds=seconds, speedup=gain, rejected=reason)
    return best, tuple(done.values())


def _take(file: Path, staged: Path, report: AutoReport) -> None:
    """Move the file taken to `staged`, with its weights, and write down why it was taken."""
    move_pair(file, staged)
    graph = read_graph(staged)
    entry = graph.metadata_props.add()
    entry.key, entry.value = AUTO_KEY, json.dumps({"form": report.form, "rejected": report.rejected})
    staged.write_bytes(graph.SerializeToString())
