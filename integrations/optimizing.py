"""What ``td-plugin optimize`` does: a form of an ONNX file, the one named or the best of several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from td_plugin.errors import TdError
from td_plugin.export.auto_form import Accuracy, best_form
from td_plugin.export.auto_report import AutoReport
from td_plugin.export.benchmark_job import read_lengths
from td_plugin.export.example_inputs import inputs_for_graph
from td_plugin.export.form_checks import cached_inputs, keeps_cache
from td_plugin.export.forms import Form, FormReport, check_form, derive
from td_plugin.export.lengths import at_lengths
from td_plugin.export.probes import Batch
from td_plugin.export.session import open_session
from td_plugin.files import check_file

if TYPE_CHECKING:
    from collections.abc import Iterable


@dataclass(frozen=True)
class OptimizeJob:
    """One use of the command.

    Attributes:
        source: the fp32 file.
        output: the file to write.
        forms: one to write, several to choose from, or none: the usual ones to choose from.
        keep: layers that stay as they are; for one form only.
        calibration: rows for ``int8-static``: a file, directory or hub id.
        calibration_rows: how many of them, drawn at random.
        max_drop: how much worse than fp32 the score may be.
        batch: rows per call, when timed.
        sequence: tokens per row, when timed; of a decoder with a cache, tokens in it.
        lengths: file of sequence lengths to draw from instead.
        threads: threads inside one operator.
        rounds: timings, the least and the most.
        options: of the data, as `config_of` takes them; ``data`` is among them if the forms are scored.
        progress: show bars on the terminal.
    """

    source: Path
    output: Path
    forms: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    calibration: str = ""
    calibration_rows: int = 256
    max_drop: float = 0.01
    batch: int = 1
    sequence: int = 128
    lengths: Path | None = None
    threads: int = 1
    rounds: tuple[int, int] = (50, 200)
    options: Mapping[str, Any] = field(default_factory=dict)
    progress: bool = False


def run_optimize(job: OptimizeJob) -> FormReport | AutoReport:
    """Write the form that is asked for, or measure several and keep the best.

    Raises:
        TdError: as `derive` and `best_form`; an option that the form has no use for; the data cannot be read.
    """
    _check(job)
    calibration = _calibration(job)
    if len(job.forms) == 1:
        (form,) = job.forms
        return derive(job.source, job.output, cast(Form, form), calibration=calibration, keep=job.keep)
    return best_form(
        job.source,
        job.output,
        _timed_on(job),
        candidates=cast("Sequence[Form]", job.forms) or None,
        calibration=calibration,
        accuracy=_accuracy(job),
        max_drop=job.max_drop,
        threads=job.threads,
        rounds=job.rounds,
        progress=job.progress,
    )


def _check(job: OptimizeJob) -> None:
    """What can be known before anything is read."""
    for form in job.forms:
        check_form(form)
    if len(job.forms) == 1 and "data" in job.options:
        fix = f"td-plugin verify {job.source} {job.output} --data ..., afterwards"
        raise TdError("--data chooses between forms", got=f"--form {job.forms[0]}", fix=fix)
    if len(job.forms) != 1 and job.keep:
        raise TdError("--keep needs the form that the layers shall not take", fix="give one --form")
    if job.calibration and job.forms and "int8-static" not in job.forms:
        fix = "--form int8-static, or leave it out"
        raise TdError("--calibration is for int8-static", got=f"--form {', '.join(job.forms)}", fix=fix)
    if not job.output.is_dir():  # then it is written there, under the source's name
        check_file(job.output)


def _calibration(job: OptimizeJob) -> Iterable[Batch] | None:
    if not job.calibration:
        return None
    from td_plugin.integrations.input_data import config_of, load_inputs

    about_scores = ("data", "metric", "split", "max_rows")
    shared = {name: value for name, value in job.options.items() if name not in about_scores}
    given = {**shared, "data": job.calibration, "max_rows": job.calibration_rows}
    return load_inputs(config_of(given, job.source.parent))


def _accuracy(job: OptimizeJob) -> Accuracy | None:
    if "data" not in job.options:
        return None
    from td_plugin.export.evaluation import evaluate_onnx
    from td_plugin.integrations.evaluation_data import examples_of

    examples = examples_of(job.options, job.source.parent)
    return lambda file: evaluate_onnx(file, examples, threads=job.threads, progress=job.progress)


def _timed_on(job: OptimizeJob) -> Batch | Sequence[Batch]:
    """Made-up inputs of the sizes asked for: of a decoder with a cache, the token after so many others."""
    wanted = open_session(job.source).get_inputs()
    if keeps_cache(wanted):
        return cached_inputs(wanted, job.batch, job.sequence, 1)
    if job.lengths is None:
        return inputs_for_graph(job.source, job.batch, job.sequence)
    lengths = read_lengths(job.lengths)
    return at_lengths(inputs_for_graph(job.source, job.batch, max(lengths)), lengths, batch=job.batch)
