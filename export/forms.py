"""From one fp32 ONNX file to the forms it can be shipped in."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from td_plugin.errors import TdError, first_line
from td_plugin.export.calibration import Calibration
from td_plugin.export.external_data import LIMIT, save_graph, staged_graph
from td_plugin.export.form_checks import beyond, compare_files, comparison_batches
from td_plugin.export.form_makers import MAKERS, Made, Order, fused
from td_plugin.export.fusion import FusionError
from td_plugin.export.parity import ParityReport
from td_plugin.export.probes import Batch
from td_plugin.export.runners import Inputs
from td_plugin.export.session import open_session
from td_plugin.export.source_graph import FORM_KEY, SourceGraph, as_target, file_bytes, finish, open_source

Form = Literal["fp32", "fused", "bf16", "fp16", "int8-weight", "int8", "int8-static", "int4"]
FORMS: tuple[Form, ...] = get_args(Form)
"""Names of the forms, the most exact first:

- ``fp32``: as it is.
- ``fused``: fp32 with attention, norms and GELU as single nodes of onnxruntime; other runtimes cannot read it.
- ``bf16``: matrices stored in bf16, computed in fp32. Half the file; time and memory of fp32.
- ``fp16``: computed in fp16 with float32 inputs and outputs, for GPUs. Half the file.
- ``int8-weight``: linear layers stored in 8 bits, computed in float; for decoders.
- ``int8``: linear layers and embeddings in int8, activations measured while it runs; for CPUs.
- ``int8-static``: the same and convolutions, with scales from calibration data; the layers that make the output stay
  float.
- ``int4``: linear layers stored in 4 bits, those that make the output in 8; for decoders.
"""

UNFUSED = "written unfused"
"""How the note begins that says why a fusion was of no use."""


@dataclass(frozen=True)
class FormReport:
    """What was written; `str()` is a few lines.

    Attributes:
        asked: the form that was asked for.
        form: the form that was written: fp32 where a fusion was of no use.
        path: of the file.
        bytes: of the file and of the weights beside it.
        parity: how far it is from its source; None where no inputs could be had to compare on.
        problem: why it is not within the tolerance of its precision; empty if it is.
        left_out: layer or operator -> why it is not in this form.
        notes: what else there is to know.
    """

    asked: Form
    form: Form
    path: Path
    bytes: int
    parity: ParityReport | None
    problem: str = ""
    left_out: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def max_abs(self) -> float | None:
        """Largest difference from the source; None where nothing was compared."""
        return None if self.parity is None else self.parity.max_abs

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "asked": self.asked,
            "form": self.form,
            "path": str(self.path),
            "bytes": self.bytes,
            "parity": None if self.parity is None else self.parity.to_dict(),
            "problem": self.problem,
            "left_out": dict(self.left_out),
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        lines = [f"{self.form}: {self.path}, {self.bytes / 1e6:.2f} MB"]
        if self.parity is not None:
            top1 = "" if self.parity.top1 is None else f", top-1 {self.parity.top1:.2%}"
            found = f"max {self.parity.max_abs:.2g}, relative {self.parity.relative:.2g}{top1}"
            lines.append(f"against the source: {found}")
        lines += [f"beyond its tolerance: {self.problem}"] if self.problem else []
        lines += [f"left out: {name}: {reason}" for name, reason in self.left_out.items()]
        return "\n".join([*lines, *self.notes])


def derive(  # noqa: PLR0913 - all but the first three are options, by name only
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    form: Form,
    *,
    calibration: Iterable[Inputs] | None = None,
    example_inputs: Batch | Sequence[Batch] | None = None,
    keep: Collection[str] = (),
    limit: int = LIMIT,
) -> FormReport:
    """Write a form of an fp32 ONNX file, and compare the two.

    A fused graph is written only if it computes the same and every attention keeps its heads; else the unfused one is,
    and the report says why. Any other form is written however far it is from its source, as long as its outputs are
    finite: `FormReport.problem` says whether it is within the tolerance of its precision (`parity.TOLERANCES`).

    Args:
        source: what `to_onnx` wrote, or an fp32 file of another exporter.
        target: the file to write, or the directory to write it to under the source's name.
        form: one of `FORMS`.
        calibration: for ``int8-static``: batches of the user's data, some hundred rows in all. Read once.
        example_inputs: what to compare on: one example, which is varied in size and padding, or several batches.
            Unless given, the first calibration batches, or inputs made up from what the graph says.
        keep: layers that stay as they are: their names, or patterns such as ``"*.attention.*"``. Not for ``fused``,
            ``fp16`` and ``bf16``.
        limit: bytes of weights beyond which they are put in a file beside the graph, ``<name>.data``.

    Raises:
        TdError: the source is missing, damaged, no fp32 file, or `target` itself; the calibration data are missing, do
            not fit or are not finite; nothing in the graph can take this form; the result cannot run or is not finite;
            the disk is full. `target` is left as it was.
    """
    check_form(form)
    path = as_target(target, source)
    origin = open_source(source, path)
    data = None if calibration is None else Calibration(calibration, str(source))
    order = Order(form, data, origin.selected(keep))
    with staged_graph(path) as staged:
        if form == "fused":
            made, written, parity, problem = _fused_or_not(origin, staged, example_inputs, limit)
        else:
            made, written = make_form(origin, staged, order, limit), form
            seen: Sequence[Batch] = data.seen if data is not None else ()
            parity, problem, extra = _compared(origin, staged, example_inputs, seen)
            made.notes.extend(extra)
    return FormReport(
        form, written, path, file_bytes(path), parity, problem, made.left_out, (*made.notes, *origin.notes())
    )


def check_form(form: str) -> None:
    """Nothing, if there is such a form.

    Raises:
        TdError: there is none.
    """
    if form not in FORMS:
        raise TdError("no such form", got=form, fix=f"one of {', '.join(FORMS)}")


def make_form(origin: SourceGraph, staged: Path, order: Order, limit: int = LIMIT) -> Made:
    """Write a form of `origin` to `staged`, without comparing the two.

    Raises:
        TdError: nothing in the graph can take this form, or onnxruntime cannot load the result.
    """
    if order.form not in ("fp32", "bf16", "fp16") and origin.metadata.get(FORM_KEY) == "fused":
        raise TdError(
            "the weights of fused attention would stay fp32", where=str(origin.path), fix="start from the unfused file"
        )
    made = MAKERS[order.form](origin, order)
    _write(origin, staged, made, limit)
    return made


def _write(origin: SourceGraph, staged: Path, made: Made, limit: int) -> None:
    finish(made.graph, origin.metadata, precision=made.precision, form=made.form)
    save_graph(made.graph, staged, limit=limit)
    open_session(staged)


_Outcome = tuple[Made, Form, "ParityReport | None", str]


def _fused_or_not(origin: SourceGraph, staged: Path, examples: Batch | Sequence[Batch] | None, limit: int) -> _Outcome:
    """The fused form if it is proven right, else the graph as it is with a note."""
    try:
        made = fused(origin)
        _write(origin, staged, made, limit)
        parity, problem, notes = _compared(origin, staged, examples, ())
        if parity is None:
            raise FusionError(f"no proof that the fusion is right: {notes[0]}")
        if problem:
            raise FusionError(f"the fused graph computes something else: {problem}")
    except (FusionError, TdError) as error:
        plain = make_form(origin, staged, Order("fp32"), limit)
        plain.notes.append(f"{UNFUSED}: {first_line(error)}")
        parity, problem, _ = _compared(origin, staged, examples, ())
        return plain, "fp32", parity, problem
    return made, "fused", parity, ""


def _compared(
    origin: SourceGraph, staged: Path, examples: Batch | Sequence[Batch] | None, seen: Sequence[Batch]
) -> tuple[ParityReport | None, str, list[str]]:
    """Parity, problem and notes.

    Raises:
        TdError: the form cannot run, or computes what is not finite where its source does; or `examples` do not fit.
    """
    try:
        batches = comparison_batches(origin.path, examples, seen)
    except TdError as error:
        if examples is not None:
            raise
        return None, "", [f"not compared with its source, example_inputs would help: {error}"]
    found = compare_files(origin.path, staged, batches)
    if not math.isfinite(found.parity.max_abs) and "the ONNX file's" in found.problem:
        raise TdError("this form of the graph is not finite", where=str(origin.path), got=found.problem)
    return found.parity, beyond(found), []
