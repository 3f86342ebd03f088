"""Smallify (Leclerc, Vartak, Fernandez, Kraska and Madden 2018, arXiv 1806.03723)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from td_plugin.contract import Granularity, Recipe, check_fraction
from td_plugin.gates.contract import WHOLE_TENSOR, Gate, gated


def follow_signs(phi: Tensor, memory: dict[str, Tensor], decay: float, threshold: float) -> None:
    """Update the moving mean and variance of every switch's sign, and turn off those that vary too much, for good.

    With ``d = sign(β) - mean``: ``variance = decay·(variance + (1 - decay)·d²)`` and ``mean = mean + (1 - decay)·d``,
    the exponentially weighted variance in one pass.

    Args:
        phi: β, edited in place: 0 where it is off.
        memory: ``mean``, ``variance`` and ``off``, edited in place.
        decay: of the moving averages.
        threshold: of the variance, in [0, 1]; a sign that is as often + as - has 1.
    """
    difference = phi.sign() - memory["mean"]
    memory["variance"].add_((1 - decay) * difference.square()).mul_(decay)
    memory["mean"].add_((1 - decay) * difference)
    memory["off"] |= memory["variance"] > threshold
    phi.masked_fill_(memory["off"], 0.0)


@dataclass(frozen=True)
class Smallify(Gate):
    """φ is the switch β: ``w·β``, with an L1 penalty on β that makes its sign flicker before it is turned off.

    Attributes:
        strength: λ.
        learning_rate: of β.
        decay: of the moving averages of the sign.
        threshold: the variance of the sign beyond which a switch is off for good.
    """

    strength: float = 1e-4
    learning_rate: float = 0.01
    decay: float = 0.9
    threshold: float = 0.5

    @property
    def noise(self) -> Literal["", "uniform", "normal"]:
        """None: a switch is no random variable."""
        return ""

    def initial(self, shape: torch.Size) -> Tensor:
        """All on, so that a trained model starts as it is."""
        return torch.ones(shape)

    def forward(self, weight: Tensor, phi: Tensor, noise: Tensor | None, size: Tensor | None) -> Tensor:
        """``w·β``."""
        return weight * phi.to(weight.dtype)

    def value(self, phi: Tensor) -> Tensor | None:
        """The switch itself."""
        return phi

    def importance(self, magnitude: Tensor, phi: Tensor) -> Tensor:
        """The size of the weight in evaluation: ``|w·β|``."""
        return magnitude * phi.abs()

    def penalty(self, phi: Tensor, square: Tensor, count: Tensor) -> Tensor:
        """The L1 norm of the switches."""
        return phi.abs().sum()

    def memory(self, phi: Tensor) -> dict[str, Tensor]:
        """Moving mean and variance of the sign, and what is off."""
        zeros = torch.zeros_like(phi)
        return {"mean": phi.sign(), "variance": zeros, "off": zeros.bool()}

    def settle(self, phi: Tensor, memory: dict[str, Tensor]) -> None:
        """Turn off the switches whose sign varies too much."""
        follow_signs(phi, memory, self.decay, self.threshold)


def smallify(
    granularity: Granularity = WHOLE_TENSOR,
    *,
    strength: float | None = None,
    learning_rate: float = 0.01,
    decay: float = 0.9,
    threshold: float = 0.5,
) -> Recipe:
    """Smallify: a switch β on every weight, or with `Units()` on every unit, is pulled to 0 and turned off there.

    The weight is ``w·β`` in training and evaluation; the loss grows by ``λ·Σ|β|``. A switch that has come to 0 changes
    its sign from step to step: where the moving variance of the sign exceeds a threshold it is off for good. Weights
    are pruned by ``|w·β|``; what is off is dropped whatever γ says. Leclerc et al., arXiv 1806.03723; the constants
    0.9 and 0.5 are those of Gomez et al., arXiv 1905.13678.

    Args:
        granularity: single weights are ranked within it; `Units()`, one switch per unit.
        strength: λ. None: 1e-4, or 1e-3 with units.
        learning_rate: of β.
        decay: of the moving averages of the sign, in [0, 1).
        threshold: of the variance of the sign, in [0, 1).

    Raises:
        TdError: an argument outside its range, or units that run through many tensors.
    """
    for name, value in (("decay", decay), ("threshold", threshold)):
        check_fraction(value, name, where="gate 'smallify'")
    strength = (1e-3 if granularity.kinds else 1e-4) if strength is None else strength
    return gated(Smallify(strength, learning_rate, decay, threshold), granularity, "smallify")
