"""Sparse variational dropout (Molchanov, Ashukha and Vetrov 2017, arXiv 1701.05369)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

from td_plugin.contract import Granularity, Recipe
from td_plugin.errors import TdError
from td_plugin.gates.contract import WHOLE_TENSOR, Gate, gated

K1, K2, K3 = 0.63576, 1.87320, 1.48695
"""The constants of the paper's equation 14."""
_TINY = 1e-8


def divergence(log_alpha: Tensor) -> Tensor:
    """The approximation of KL(q(w) || log-uniform prior), up to a constant, by the paper's equation 14; 0 for α = ∞."""
    return K1 * torch.sigmoid(-(K2 + K3 * log_alpha)) + 0.5 * softplus(-log_alpha)


@dataclass(frozen=True)
class Variational(Gate):
    """φ is log σ²: every weight is ``w + σ·ε`` in training, so the noise is α = σ²/w² of its square.

    With units all weights of one share ε, and σ is relative to their root mean square.

    Attributes:
        strength: λ; 1 / the number of training examples gives the evidence lower bound of the paper.
        learning_rate: of log σ².
        log_variance: log σ² to start with.
        warm_up: updates over which λ grows from 0 to its value.
    """

    strength: float = 1e-4
    learning_rate: float = 0.02
    log_variance: float = -10.0
    warm_up: int = 500

    @property
    def noise(self) -> Literal["", "uniform", "normal"]:
        """One normal number per weight or unit, unless the outputs are drawn."""
        return "normal"

    @property
    def pulls_weights(self) -> bool:
        """It depends on α, so on the weights."""
        return True

    @property
    def local(self) -> bool:
        """Outputs are drawn where a layer multiplies by its weights only; Kingma et al., arXiv 1506.02557."""
        return True

    def warmth(self, updates: int) -> float:
        """Linear: from the first step on the whole divergence closes weights before the loss can object."""
        return min(updates / self.warm_up, 1.0) if self.warm_up else 1.0

    def initial(self, shape: torch.Size) -> Tensor:
        """``log σ²``."""
        return torch.full(shape, self.log_variance)

    def forward(self, weight: Tensor, phi: Tensor, noise: Tensor | None, size: Tensor | None) -> Tensor:
        """``w + σ·ε``; with units ``w·(1 + ε·σ/size)``."""
        if noise is None:
            return weight
        spread = (phi / 2).exp() * noise
        if size is None:
            return weight + spread.to(weight.dtype)
        return weight * (1 + spread / size.clamp_min(_TINY)).to(weight.dtype)

    def value(self, phi: Tensor) -> Tensor | None:
        """The mean of the weight is the weight."""
        return None

    def importance(self, magnitude: Tensor, phi: Tensor) -> Tensor:
        """``1/√α``, the size of the weight, or the norm of the unit, over its noise."""
        return magnitude * (-phi / 2).exp()

    def penalty(self, phi: Tensor, square: Tensor, count: Tensor) -> Tensor:
        """The divergence from the prior, summed."""
        return divergence(phi - (square + _TINY).log()).sum()


def deviation(
    product: Callable[[Tensor, Tensor, Tensor | None], Tensor], x: Tensor, weight: Tensor, log_variance: Tensor
) -> Tensor:
    """The standard deviation of a layer's outputs when every weight has noise of its own.

    Args:
        product: what the layer computes of input, weight and bias.
        x: its input.
        weight: ``[*w]``; only its dtype counts.
        log_variance: ``[*w]``, of the weights.
    """
    variance = product(x.square(), log_variance.exp().to(weight.dtype), None)
    return (variance + _TINY).sqrt()


def variational(
    granularity: Granularity = WHOLE_TENSOR,
    *,
    strength: float | None = None,
    learning_rate: float = 0.02,
    log_variance: float = -10.0,
    warm_up: int = 500,
) -> Recipe:
    """Sparse variational dropout: noise grows on weights, or with `Units()` on units, that the loss does not need.

    In training the weight is ``w + σ·ε``, ε normal; the loss grows by ``λ·Σ KL(α)``, ``α = σ²/w²``, whose gradient
    reaches σ and w. In linear layers and convolutions the output is drawn, with the mean ``x·w`` and the variance
    ``x²·σ²`` (local reparametrisation): other noise in every example. With units the noise multiplies the unit. In
    evaluation there is none. Weights are pruned by ``1/√α``. Molchanov et al., arXiv 1701.05369, who prune where
    log α > 3.

    Args:
        granularity: single weights are ranked within it; `Units()`, one σ per unit.
        strength: λ; the paper's is 1 / the number of training examples. None: 1e-4, or 1e-3 with units.
        learning_rate: of log σ².
        log_variance: log σ² to start with.
        warm_up: updates over which λ grows from 0 to its value; 0 for none.

    Raises:
        TdError: an argument outside its range, or units that run through many tensors.
    """
    if isinstance(warm_up, bool) or not isinstance(warm_up, int) or warm_up < 0:
        raise TdError("warm_up must be a number of updates", where="gate 'variational'", got=warm_up, fix="0 for none")
    strength = (1e-3 if granularity.kinds else 1e-4) if strength is None else strength
    return gated(Variational(strength, learning_rate, log_variance, warm_up), granularity, "variational")
