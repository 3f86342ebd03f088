"""Penalties on the weights, for any recipe: ``dataclasses.replace(recipe, penalty=L1(1e-4))``.

They are not added to the loss. After each step of the user's optimizer the weights go through the proximal operator of
``lr · λ · penalty``: proximal gradient descent (Parikh and Boyd 2014, section 4.2) for SGD, and for adaptive optimizers
the form decoupled from their moments, as AdamW decouples its decay (Loshchilov and Hutter, arXiv 1711.05101). Weights
become exactly 0, which subgradients of the loss never achieve; and neither the scale of a loss in half precision, nor
accumulation, nor clipping can change what is taken.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from td_plugin.errors import TdError
from td_plugin.gates.spreading import along, unit_sums
from td_plugin.units import Slice


class Penalty(ABC):
    """What weights cost, by how it shrinks them."""

    @abstractmethod
    def shrink_(self, weights: Sequence[Tensor], slices: Sequence[Slice], rate: float) -> None:
        """Apply the proximal operator of `rate` times the penalty, in place.

        Args:
            weights: ``[*w]`` each, the ranked tensors of one target.
            slices: where their units are.
            rate: the learning rate.
        """


def _check(strength: float, name: str) -> None:
    if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not 0 <= strength < math.inf:
        raise TdError("the strength of a penalty is a number of at least 0", where=name, got=strength, fix="1e-4")


@dataclass(frozen=True)
class L1(Penalty):
    """``λ Σ |w|`` over the ranked weights: ``w <- sign(w)·max(|w| - lr·λ, 0)``, soft thresholding.

    Parikh and Boyd 2014, Proximal Algorithms, section 6.5.2; for pruning: Han et al., arXiv 1506.02626, section 3.1.

    Attributes:
        strength: λ.

    Raises:
        TdError: a negative `strength`.
    """

    strength: float = 1e-4

    def __post_init__(self) -> None:
        _check(self.strength, "L1")

    def shrink_(self, weights: Sequence[Tensor], slices: Sequence[Slice], rate: float) -> None:
        """Soft thresholding of every weight."""
        with torch.no_grad():
            for weight in weights:
                weight.copy_(torch.nn.functional.softshrink(weight, rate * self.strength))


@dataclass(frozen=True)
class GroupL1(Penalty):
    """``λ Σ_u √n_u ‖w_u‖₂``, n weights to a unit: ``w_u <- w_u·max(1 - lr·λ·√n_u/‖w_u‖₂, 0)``, whole units become 0.

    The group lasso of Yuan and Lin 2006; for networks: Wen et al., arXiv 1608.03665. A unit is what the
    recipe drops whole, over all its ranked tensors; for recipes of single weights, an output of the layer.

    Attributes:
        strength: λ.

    Raises:
        TdError: a negative `strength`.
    """

    strength: float = 1e-4

    def __post_init__(self) -> None:
        _check(self.strength, "GroupL1")

    def shrink_(self, weights: Sequence[Tensor], slices: Sequence[Slice], rate: float) -> None:
        """Soft thresholding of the norm of every unit."""
        with torch.no_grad():
            norms = unit_sums([weight.float().square() for weight in weights], slices).sqrt()
            sizes = unit_sums([torch.ones_like(weight, dtype=torch.float32) for weight in weights], slices)
            factor = (1 - rate * self.strength * sizes.sqrt() / norms).clamp_min(0)
            for weight, slice_ in zip(weights, slices, strict=True):
                kept = along(factor.to(weight.device) - 1, slice_, weight.shape) + 1  # 1 for entries of no unit
                weight.mul_(kept.to(weight.dtype))
