"""What ``td-plugin verify`` does: checkpoints and ONNX files, all against the first, as outputs and as scores go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from td_plugin.errors import TdError
from td_plugin.export.decoder import example_prompts
from td_plugin.export.example_inputs import inputs_for_model
from td_plugin.export.form_checks import comparison_batches, keeps_cache
from td_plugin.export.parity import TOLERANCES, ParityReport, Precision, Tolerance
from td_plugin.export.probes import Batch, longest_text, make_parity_batches
from td_plugin.export.session import open_session
from td_plugin.export.verify_decoding import DecodingReport, verify_decoding
from td_plugin.export.verify_forms import FormsReport, verify_forms
from td_plugin.integrations.checkpoints import load_checkpoint, verify_checkpoint


@dataclass(frozen=True)
class VerifyJob:
    """One use of the command.

    Attributes:
        reference: checkpoint directory or ONNX file that all others shall equal.
        others: name -> ONNX file, or checkpoint directory.
        tolerance: of every precision; its own unless given.
        max_drop: how much worse than the reference's the score may be; that of the precision unless given.
        new_tokens: how far a decoder with a cache writes on.
        options: of the data, as `config_of` takes them; ``data`` is among them if there is a score.
    """

    reference: Path
    others: Mapping[str, Path]
    tolerance: float | None = None
    max_drop: float | None = None
    new_tokens: int = 16
    options: Mapping[str, Any] = field(default_factory=dict)


def run_verify(job: VerifyJob) -> ParityReport | DecodingReport | FormsReport:
    """Compare: one file with its checkpoint, a decoder with a cache token by token, or all with the first.

    Raises:
        TdError: something cannot be read, does not fit, or, of one file with its checkpoint, differs.
    """
    if not _is_checkpoint(job.reference) and any(map(_is_checkpoint, job.others.values())):
        raise TdError("a checkpoint comes first", where=str(job.reference), fix="verify CHECKPOINT FILE ...")
    cached = [path for path in (job.reference, *job.others.values()) if _keeps_cache(path)]
    files = [path for path in job.others.values() if not _is_checkpoint(path)]
    alone = len(job.others) == len(files) == 1 and _is_checkpoint(job.reference) and "data" not in job.options
    if cached and not alone:
        fix = "verify CHECKPOINT FILE, one file at a time and without --data"
        raise TdError("a decoder with a cache is compared token by token", where=str(cached[0]), fix=fix)
    if cached:
        return _decoding(job, files[0])
    if alone:
        return verify_checkpoint(job.reference, files[0], job.tolerance)
    return _all(job)


def _is_checkpoint(path: Path) -> bool:
    return path.is_dir() or (path.suffix != ".onnx" and not path.exists())  # a directory that is not there


def _keeps_cache(path: Path) -> bool:
    return not _is_checkpoint(path) and keeps_cache(open_session(path).get_inputs())


def _decoding(job: VerifyJob, file: Path) -> DecodingReport:
    model = load_checkpoint(job.reference)
    prompts = example_prompts(model)
    return verify_decoding(model, file, prompts, new_tokens=job.new_tokens, tolerance=job.tolerance)


def _all(job: VerifyJob) -> FormsReport:
    given = {str(job.reference): job.reference, **job.others}
    models = {name: load_checkpoint(path) for name, path in given.items() if _is_checkpoint(path)}
    files = {name: path for name, path in given.items() if name not in models}
    examples = None
    if "data" in job.options:
        from td_plugin.integrations.evaluation_data import examples_of

        home = job.reference if job.reference.is_dir() else job.reference.parent
        examples = examples_of(job.options, home)
    return verify_forms(
        models,
        files,
        _batches(job, next(iter(models.values()), None)),
        examples=examples,
        tolerances=_tolerances(job),
    )


def _batches(job: VerifyJob, model: PreTrainedModel | None) -> Sequence[Batch]:
    if model is None:
        return comparison_batches(job.reference, None)
    return make_parity_batches(inputs_for_model(model), longest_text(model))


def _tolerances(job: VerifyJob) -> dict[Precision, Tolerance]:
    return {
        precision: Tolerance(
            usual.bound if job.tolerance is None else job.tolerance,
            usual.drop if job.max_drop is None else job.max_drop,
        )
        for precision, usual in TOLERANCES.items()
    }
