"""Training that happens when the user's optimizer steps: gates learn, penalties shrink weights.

torch calls global hooks before and after the step of every `torch.optim.Optimizer`. That is the one moment at which the
gradients are whole (all micro-batches are in), unscaled and clipped, and a step that a gradient scaler throws away does
not come to it. So neither the user's loss nor the loop has to know.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from td_plugin.contract import Recipe
from td_plugin.errors import TdError
from td_plugin.gates.state import GateState
from td_plugin.members import Member

Learner = tuple[list[Member], GateState | None]
"""A target as far as training is concerned: its masked tensors, ranked ones first, and its gate."""


class Training:
    """Trains the gates, and applies the penalty, of one sparsifier's targets."""

    def __init__(self, recipe: Recipe, learners: Sequence[Learner]) -> None:
        self._recipe = recipe
        self._depth: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()
        self._learners = list(learners) if recipe.gate is not None or recipe.penalty is not None else []

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_depth": weakref.WeakKeyDictionary()}

    def listen(self) -> None:
        """Act from here on, as long as this object lives."""
        if self._learners:
            _listening.add(self)
            if not _handles:
                _handles.extend([register_optimizer_step_pre_hook(_before), register_optimizer_step_post_hook(_after)])

    def close(self) -> None:
        """Act no more; the hooks go with the last."""
        self._learners = []
        _listening.discard(self)
        while not _listening and _handles:
            _handles.pop().remove()

    def before(self, optimizer: Optimizer) -> None:
        """The optimizer is about to step: train the gates of the weights that it holds."""
        # An optimizer that calls the step it inherits comes here once for each of the two.
        self._depth[optimizer] = self._depth.get(optimizer, 0) + 1
        if self._depth[optimizer] > 1 or _overflows(optimizer):
            return
        held = _held(optimizer)
        # A fused optimizer under a gradient scaler divides by the scale in its step.
        scale: Tensor | float | None = getattr(optimizer, "grad_scale", None)
        for members, gate in self._learners:
            if gate is not None and id(members[0].parameter) in held:
                gate.learn(1.0 if scale is None else scale)

    def after(self, optimizer: Optimizer) -> None:
        """The optimizer has stepped: shrink the weights that it holds, as far as its learning rate says.

        Raises:
            TdError: the optimizer has no learning rate that one could read.
        """
        self._depth[optimizer] = self._depth.get(optimizer, 1) - 1
        penalty = self._recipe.penalty
        if penalty is None or self._depth[optimizer] > 0 or _overflows(optimizer):
            return
        held = _held(optimizer)
        for members, _ in self._learners:
            mine = [member for member in members if member.ranked]
            if id(mine[0].parameter) not in held:
                continue
            rate = held[id(mine[0].parameter)]
            if rate is None:
                got = type(optimizer).__name__
                raise TdError("a penalty needs the learning rate", where=mine[0].fqn, got=got, fix="set its lr")
            penalty.shrink_([member.parameter for member in mine], [member.slice for member in mine], float(rate))


def _overflows(optimizer: Optimizer) -> bool:
    """Whether a gradient scaler has told a fused optimizer, which it lets step, that it must change nothing."""
    found: Tensor | None = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found.item())


def _held(optimizer: Optimizer) -> dict[int, float | Tensor | None]:
    """Learning rate by parameter id."""
    return {id(p): group.get("lr") for group in optimizer.param_groups for p in group["params"]}


_listening: weakref.WeakSet[Training] = weakref.WeakSet()
_handles: list[Any] = []


def _before(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for training in list(_listening):
        training.before(optimizer)


def _after(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for training in list(_listening):
        training.after(optimizer)
