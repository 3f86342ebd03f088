"""Masked torch, shrunk torch, ONNX and every form derived from it: one function or not, with a row for each."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from td_plugin.errors import TdError
from td_plugin.export.evaluation import Examples, evaluate_model, evaluate_onnx
from td_plugin.export.modes import evaluating
from td_plugin.export.parity import (
    TOLERANCES,
    BatchParity,
    ParityReport,
    Precision,
    Tolerance,
    compare,
    judge,
    paired,
    precision_of,
)
from td_plugin.export.probes import Batch, tensors_of
from td_plugin.export.scores import Drop, Score, drop
from td_plugin.export.session import graph_inputs, open_session, read_graph
from td_plugin.export.verify import graph_outputs, model_outputs, shape_of
from td_plugin.report import table

_Answer = Callable[[Batch], dict[str, Tensor]]


@dataclass(frozen=True)
class FormParity:
    """One model or file against the reference.

    Attributes:
        name: what the caller calls it.
        parity: the differences, batch by batch.
        tolerance: what they were held against.
        score: on the data set; None without one.
        drop: how much worse that is than the reference's.
        problem: why it does not pass; empty if it does.
    """

    name: str
    parity: ParityReport
    tolerance: Tolerance
    score: Score | None = None
    drop: Drop | None = None
    problem: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "name": self.name,
            "passed": not self.problem,
            "problem": self.problem,
            **self.parity.to_dict(),
            "allowed_drop": self.tolerance.drop,
            "score": self.score and self.score.to_dict(),
            "drop": self.drop and self.drop.value,
        }


@dataclass(frozen=True)
class FormsReport:
    """Models and files against the first of them; `str()` is a table.

    Attributes:
        reference: name of what all others are compared with.
        forms: the others, in the order given.
        score: of the reference on the data set; None without one.
    """

    reference: str
    forms: tuple[FormParity, ...]
    score: Score | None = None

    @property
    def passed(self) -> bool:
        """Whether all are within their tolerance."""
        return not any(form.problem for form in self.forms)

    def require(self) -> FormsReport:
        """This report, if all are within their tolerance.

        Raises:
            TdError: the first that is not.
        """
        for form in self.forms:
            if form.problem:
                raise TdError(f"{form.name!r} does not agree with {self.reference!r}", got=form.problem)
        return self

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        score = self.score and self.score.to_dict()
        forms = [form.to_dict() for form in self.forms]
        return {"reference": self.reference, "passed": self.passed, "score": score, "forms": forms}

    def __str__(self) -> str:
        header = ["", "precision", "max", "mean", "relative", "top-1", "score", "drop", "holds"]
        first = [self.reference, "", "", "", "", "", *_scores(self.score, None), ""]
        lines = [table(header, [first, *(_row(form) for form in self.forms)])]
        lines += [f"score: {self.score.metric} on {self.score.rows} rows"] if self.score else []
        return "\n".join(lines + [f"{form.name}: {form.problem}" for form in self.forms if form.problem])


def _row(form: FormParity) -> list[str]:
    parity = form.parity
    top1 = "-" if parity.top1 is None else f"{parity.top1:.2%}"
    differences = [f"{value:.1e}" for value in (parity.max_abs, parity.mean_abs, parity.relative)]
    holds = "no" if form.problem else "yes"
    return [form.name, parity.precision, *differences, top1, *_scores(form.score, form.drop), holds]


def _scores(score: Score | None, loss: Drop | None) -> list[str]:
    return ["-" if score is None else f"{score.value:.4g}", "-" if loss is None else f"{loss.value:.4f}"]


def verify_forms(
    models: Mapping[str, nn.Module],
    files: Mapping[str, str | os.PathLike[str]],
    batches: Sequence[Batch],
    *,
    examples: Examples | None = None,
    tolerances: Mapping[Precision, Tolerance] | None = None,
) -> FormsReport:
    """Compare torch models and ONNX files, each with the first one given: the masked model, then whatever came of it.

    A difference that is too large does not raise: it is in the report, and `FormsReport.require` raises for it.

    Args:
        models: name -> torch model, first the one that all others shall equal. May be empty: then it is the first file.
        files: name -> ONNX file, of any precision.
        batches: dicts of tensors as the models are called, such as `make_parity_batches` makes: batches of one, odd
            sizes, the longest text, padding on both sides.
        examples: labelled data: each one's score may be no more than `Tolerance.drop` below the reference's. BLEU is
            taken of the files alone, against the first of them.
        tolerances: instead of `parity.TOLERANCES`, for the precisions it names; torch models count as fp32.

    Raises:
        TdError: nothing to compare, or a file is missing, damaged, takes other inputs or cannot run.
    """
    names = [*models, *files]
    if len(names) < 2 or len(set(names)) < len(names) or not batches:
        raise TdError(
            "nothing to compare", got=f"{names} on {len(batches)} batches", fix="two names or more, each once, a batch"
        )
    for path in files.values():  # all mistakes before the first comparison, which may take minutes
        open_session(path)
    allowed = {**TOLERANCES, **(tolerances or {})}
    answers = {**{name: partial(_ask, model) for name, model in models.items()}}
    scores = {name: _score(name, models, files, examples) for name in names}
    base = next((name for name in names if scores[name] is not None), names[0])
    forms = []
    for name in names[1:]:
        precision: Precision = "fp32" if name in models else precision_of(read_graph(files[name]))
        pair = [answers.get(other) or _asking(files[other]) for other in (names[0], name)]
        parity, problem = _differences(pair, batches, (precision, allowed[precision].bound), name)
        score, reference = scores[name], scores[base]
        loss = drop(reference, score) if score is not None and reference is not None and name != base else None
        if loss is not None and loss.value > allowed[precision].drop + 1e-9 and not problem:
            problem = f"{score} is {loss.value:.4f} worse than {base!r}; {allowed[precision].drop:g} is allowed"
        forms.append(FormParity(name, parity, allowed[precision], score, loss, problem))
    return FormsReport(names[0], tuple(forms), scores[names[0]])


def _score(
    name: str,
    models: Mapping[str, nn.Module],
    files: Mapping[str, str | os.PathLike[str]],
    examples: Examples | None,
) -> Score | None:
    if examples is None or (name in models and examples.generation is not None):
        return None
    return evaluate_model(models[name], examples) if name in models else evaluate_onnx(files[name], examples)


def _ask(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    with evaluating(model), torch.no_grad():
        return model_outputs(model, {name: value for name, value in batch.items() if name != "labels"})


def _asking(path: str | os.PathLike[str]) -> _Answer:
    session, where = open_session(path), str(path)
    return lambda batch: graph_outputs(session, graph_inputs(session, batch, where), where)


def _differences(
    pair: Sequence[_Answer], batches: Sequence[Batch], tolerance: tuple[Precision, float], name: str
) -> tuple[ParityReport, str]:
    """All batches, whether close or not, and the first problem."""
    rows: list[BatchParity] = []
    problem = ""
    for index, batch in enumerate(batches):
        inputs = {key: value for key, value in tensors_of(batch).items() if key != "labels"}
        pairs = paired(pair[0](batch), pair[1](batch), inputs, name)
        rows.append(compare(pairs, shape_of(inputs)))
        try:
            judge(pairs, rows[-1], tolerance, f"batch {index} of shape {rows[-1].shape}", name)
        except TdError as error:
            problem = problem or str(error)
    return ParityReport(tuple(rows), *tolerance), problem
