"""Scores of models on labelled data, and how much worse one is than another."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from td_plugin.errors import TdError

Metric = Literal["accuracy", "f1", "binary_f1", "perplexity", "masked_perplexity", "bleu"]
METRICS: tuple[Metric, ...] = get_args(Metric)
LOWER_IS_BETTER: tuple[Metric, ...] = ("perplexity", "masked_perplexity")
_RESAMPLES = 2000


def check_metric(metric: str) -> None:
    """Nothing, if there is such a metric.

    Raises:
        TdError: there is none.
    """
    if metric not in METRICS:
        raise TdError("no such metric", got=metric, fix=f"one of {', '.join(METRICS)}")


@dataclass(frozen=True)
class Score:
    """What one model reached; `str()` is one line.

    Attributes:
        metric: the measure.
        value: of all rows together; perplexity at least 1, the others in [0, 1].
        rows: rows judged.
        evidence: ``[rows, 2]``, per row its summand of the numerator and of the denominator, for intervals; None where
            the metric is no such quotient.
    """

    metric: Metric
    value: float
    rows: int
    evidence: Tensor | None = field(default=None, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {"metric": self.metric, "value": self.value, "rows": self.rows}

    def __str__(self) -> str:
        return f"{self.metric} {self.value:.4g} on {self.rows} rows"


@dataclass(frozen=True)
class Drop:
    """How much worse one score is than another on the same rows.

    Attributes:
        value: the difference; of a perplexity the relative increase. Below 0 is better.
        low: lower end of the 95 % interval, from resampling rows that both judged; None where there is none.
        high: its upper end.
    """

    value: float
    low: float | None = None
    high: float | None = None


def drop(reference: Score, candidate: Score, *, seed: int = 0) -> Drop:
    """How much worse `candidate` is than `reference`.

    Raises:
        TdError: they are scores of different metrics or numbers of rows.
    """
    if (reference.metric, reference.rows) != (candidate.metric, candidate.rows):
        raise TdError("two scores of one data set are needed", got=f"{reference} and {candidate}")
    exact = torch.tensor([reference.value, candidate.value], dtype=torch.float64)
    value = _worse(candidate.metric, exact[0], exact[1]).item()
    if reference.evidence is None or candidate.evidence is None:
        return Drop(value)
    pairs = torch.stack([reference.evidence, candidate.evidence])  # [2, rows, 2]
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(_RESAMPLES):
        chosen = pairs[:, torch.randint(reference.rows, (reference.rows,), generator=generator)].sum(1)
        found.append(_worse(candidate.metric, *quotient(candidate.metric, chosen)))
    low, high = torch.stack(found).nan_to_num().quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Drop(value, low, high)


def quotient(metric: Metric, sums: Tensor) -> Tensor:
    """The metric of ``[..., 2]`` sums of numerators and denominators."""
    mean = sums[..., 0] / sums[..., 1]
    return mean.exp() if metric in LOWER_IS_BETTER else mean


def _worse(metric: Metric, reference: Tensor, candidate: Tensor) -> Tensor:
    return candidate / reference - 1 if metric in LOWER_IS_BETTER else reference - candidate
