"""The authors' rule in numpy, written from the paper and its published code alone; it shares nothing with td_plugin.

Per output unit (the columns of a TensorFlow kernel), ``idx = int(γ·n)``; what is smaller than ``sorted[idx]`` is a
candidate. With ties the strict ``<`` of the original takes fewer than asked; ours takes exactly ``int(γ·n)``, the
first of equals first.
"""

from __future__ import annotations

from decimal import Decimal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


def share_of(gamma: float, n: int) -> int:
    """``int(γ·n)`` of the decimal number that the user wrote: 0.29 of 100 is 29."""
    return int(Decimal(repr(gamma)) * n)


def authors_row(importance: Floats, gamma: float) -> Bools:
    """``[n] -> [n]``: strictly below the threshold ``sorted[int(γ·n)]``."""
    threshold = np.sort(importance)[share_of(gamma, len(importance))]
    return importance < threshold


def exact_row(importance: Floats, gamma: float) -> Bools:
    """``[n] -> [n]``: the first ``int(γ·n)`` of a stable sort."""
    chosen = np.zeros(len(importance), dtype=bool)
    chosen[np.argsort(importance, kind="stable")[: share_of(gamma, len(importance))]] = True
    return chosen


def _per_row(importance: Floats, gamma: float) -> Bools:
    tied = [len(np.unique(row)) < len(row) for row in importance]
    return np.stack([(exact_row if t else authors_row)(r, gamma) for r, t in zip(importance, tied, strict=True)])


def targeted_weight(weight: Floats, gamma: float) -> Bools:
    """Candidates of a weight ``[outputs, ...]``: per output, the smallest magnitudes."""
    rows = np.abs(weight).reshape(len(weight), -1)
    return _per_row(rows, gamma).reshape(weight.shape)


def unit_norms(weight: Floats) -> Floats:
    """``[outputs, ...] -> [outputs]``: L2 norm of each unit's incoming weights."""
    return np.sqrt((weight.reshape(len(weight), -1) ** 2).sum(axis=1))


def targeted_unit(weight: Floats, gamma: float) -> Bools:
    """``[outputs, ...] -> [outputs]``: the units with the smallest norms."""
    return _per_row(unit_norms(weight)[None], gamma)[0]


def ramped_gamma(step: float, gamma: float) -> float:
    """The published ramp of γ, its constants as they stand in the authors' code."""
    return 0.95 * gamma * min(1.0, step / 20000) + 0.05 * gamma * min(max((step - 20000) / 20000, 0.0), 1.0)


def ramped_alpha(step: float, alpha: float) -> float:
    """The published ramp of α."""
    return alpha * min(1.0, step / 40000)
