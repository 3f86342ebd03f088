"""L0 regularisation with hard-concrete gates (Louizos, Welling and Kingma 2018, arXiv 1712.01312)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from td_plugin.contract import Granularity, Recipe, check_fraction
from td_plugin.errors import TdError
from td_plugin.gates.contract import WHOLE_TENSOR, Gate, gated

TEMPERATURE = 2 / 3
"""β of the paper's equation 10."""
LOW, HIGH = -0.1, 1.1
"""γ and ζ of the paper: what the concrete variable is stretched to before it is clipped to [0, 1]."""


def sample(log_alpha: Tensor, uniform: Tensor) -> Tensor:
    """The gate z in [0, 1] for uniform numbers in (0, 1): equations 10 and 11."""
    soft = torch.sigmoid((uniform.log() - (-uniform).log1p() + log_alpha) / TEMPERATURE)
    return (soft * (HIGH - LOW) + LOW).clamp(0.0, 1.0)


def open_chance(log_alpha: Tensor) -> Tensor:
    """The chance that z is not 0: equation 12, the expected L0 norm of one gate."""
    return torch.sigmoid(log_alpha - TEMPERATURE * math.log(-LOW / HIGH))


def settled(log_alpha: Tensor) -> Tensor:
    """The gate of evaluation: equation 13."""
    return (torch.sigmoid(log_alpha) * (HIGH - LOW) + LOW).clamp(0.0, 1.0)


@dataclass(frozen=True)
class HardConcrete(Gate):
    """φ is log α: ``w·z`` with z hard concrete; the penalty is the expected number of weights that are not zero.

    Attributes:
        strength: λ per weight; a unit costs it once for each of its weights, as the paper's group penalty does.
        learning_rate: of log α.
        dropout: the chance 1 - sigmoid(log α) to start with.
    """

    strength: float = 1e-4
    learning_rate: float = 0.02
    dropout: float = 0.05

    @property
    def noise(self) -> Literal["", "uniform", "normal"]:
        """One uniform number per gate."""
        return "uniform"

    def initial(self, shape: torch.Size) -> Tensor:
        """``log α``."""
        return torch.full(shape, math.log(1 - self.dropout) - math.log(self.dropout))

    def forward(self, weight: Tensor, phi: Tensor, noise: Tensor | None, size: Tensor | None) -> Tensor:
        """``w·z``."""
        return weight if noise is None else weight * sample(phi, noise).to(weight.dtype)

    def value(self, phi: Tensor) -> Tensor | None:
        """The gate of evaluation."""
        return settled(phi)

    def importance(self, magnitude: Tensor, phi: Tensor) -> Tensor:
        """The size of the weight in evaluation: ``|w|`` times its gate."""
        return magnitude * settled(phi)

    def penalty(self, phi: Tensor, square: Tensor, count: Tensor) -> Tensor:
        """The expected L0 norm: equation 12 summed over all weights."""
        return (open_chance(phi) * count).sum()


def hard_concrete(
    granularity: Granularity = WHOLE_TENSOR,
    *,
    strength: float = 1e-4,
    learning_rate: float = 0.02,
    dropout: float = 0.05,
) -> Recipe:
    """L0 regularisation: every weight, or with `Units()` every unit, has a gate that closes where it is not worth λ.

    In training the weight is ``w·z`` with ``z = clip(1.2·σ((log u - log(1-u) + log α)/β) - 0.1)`` and u uniform; the
    loss grows by ``λ·Σ P(z ≠ 0)``. In evaluation ``z = clip(1.2·σ(log α) - 0.1)``. Weights are pruned by ``|w|·z``;
    what has z = 0 in evaluation is dropped whatever γ says. Louizos et al., arXiv 1712.01312.

    Args:
        granularity: single weights are ranked within it; `Units()`, one gate per unit.
        strength: λ, per weight. The paper's 0.1 per training example is 0.1 / the number of examples here.
        learning_rate: of log α.
        dropout: the chance to be closed to start with, in (0, 1); below 0.09 the gates of evaluation start at 1.

    Raises:
        TdError: an argument outside its range, or units that run through many tensors.
    """
    if check_fraction(dropout, "dropout", where="gate 'hard_concrete'") == 0.0:
        raise TdError("a gate that starts with log α = ∞ cannot learn", where="dropout", got=dropout, fix="0.05")
    return gated(HardConcrete(strength, learning_rate, dropout), granularity, "hard_concrete")
