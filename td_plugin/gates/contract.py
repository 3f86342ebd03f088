"""What a learned mask has to say of itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor

from td_plugin.contract import Granularity, Recipe
from td_plugin.criteria import magnitude
from td_plugin.errors import TdError
from td_plugin.granularity import WholeTensor

WHOLE_TENSOR = WholeTensor()
"""Where gates of single weights are ranked unless another granularity is given."""

ONCE: tuple[str, ...] = ("neurons", "channels", "heads")
"""Kinds of units that a gate may scale: the others run through many tensors, and would be scaled in each of them."""


class Gate(ABC):
    """A mask with a parameter φ per weight or per unit that is trained by gradients, as a frozen value.

    A gate keeps no tensors: `td_plugin.gates.state.GateState` holds φ and hands it in. All tensors are float32 and of
    one shape, that of the groups, ``[*w]`` for single weights or ``[units]``, unless said otherwise.

    Attributes:
        strength: λ, what the penalty is multiplied with before it is added to the user's loss.
        learning_rate: of φ, which Adam trains (Kingma and Ba, arXiv 1412.6980).
    """

    strength: float
    learning_rate: float

    @property
    @abstractmethod
    def noise(self) -> Literal["", "uniform", "normal"]:
        """What a training forward draws for every group."""

    @property
    def pulls_weights(self) -> bool:
        """Whether the penalty has a gradient in the weights, too."""
        return False

    @property
    def local(self) -> bool:
        """Whether layers draw their outputs in place of their weights where they can."""
        return False

    @abstractmethod
    def initial(self, shape: torch.Size) -> Tensor:
        """φ before training."""

    @abstractmethod
    def forward(self, weight: Tensor, phi: Tensor, noise: Tensor | None, size: Tensor | None) -> Tensor:
        """``[*w]``: the weight that a training forward computes with, differentiable.

        Args:
            weight: ``[*w]``, dense.
            phi: broadcasts to `weight`.
            noise: likewise; as `noise` names it.
            size: root mean square of the weights of the unit, likewise; None for single weights.
        """

    @abstractmethod
    def value(self, phi: Tensor) -> Tensor | None:
        """What evaluation multiplies the weight with; None for 1."""

    @abstractmethod
    def importance(self, magnitude: Tensor, phi: Tensor) -> Tensor:
        """Higher = keep; 0: closed, so dropped whatever γ says. `magnitude` is ``|w|`` or the norm of the unit."""

    @abstractmethod
    def penalty(self, phi: Tensor, square: Tensor, count: Tensor) -> Tensor:
        """The penalty, a scalar, summed over the groups; λ comes later.

        Args:
            phi: differentiable.
            square: mean square of the weights of each group, differentiable.
            count: how many weights each group has.
        """

    def warmth(self, updates: int) -> float:
        """The share of λ that counts after so many updates of φ."""
        return 1.0

    def memory(self, phi: Tensor) -> dict[str, Tensor]:
        """What is remembered of the training besides φ, by name."""
        return {}

    def settle(self, phi: Tensor, memory: dict[str, Tensor]) -> None:
        """After an update: edit φ and `memory` in place."""
        return


def gated(gate: Gate, granularity: Granularity, name: str) -> Recipe:
    """The recipe that trains with `gate` and prunes by its importance.

    Raises:
        TdError: a negative strength, a learning rate that is not positive, or units that a gate cannot scale.
    """
    where = f"gate {name!r}"
    if gate.strength < 0 or gate.learning_rate <= 0:
        got = f"strength={gate.strength}, learning_rate={gate.learning_rate}"
        raise TdError("a gate learns with a positive rate and a strength of at least 0", where=where, got=got)
    if stray := sorted(set(granularity.kinds) - set(ONCE)):
        fix = f"Units(kinds={ONCE})"
        raise TdError("a gate cannot scale units that run through many tensors", where=where, got=stray, fix=fix)
    return Recipe(
        magnitude, granularity, drop_rate=0.0, gate=gate, name=name if not granularity.kinds else f"{name}_unit"
    )
