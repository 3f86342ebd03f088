"""Sums that run along with the training: what the current step has given, and what all steps before it have."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed

from td_plugin.contract import Need
from td_plugin.errors import TdError


@dataclass(frozen=True)
class Rule:
    """How the sums of one kind of evidence grow.

    Attributes:
        fold: what is made of the sum of one step before it is added to the total.
        by_step: whether a step counts once, and its sum is a gradient, which processes average; else every example
            counts, and processes add theirs.
        mean: whether the evidence is the total divided by the count.
    """

    fold: Callable[[Tensor], Tensor]
    by_step: bool
    mean: bool = True


def _same(recent: Tensor) -> Tensor:
    return recent


RULES: dict[Need, Rule] = {
    "squared_gradient": Rule(_same, by_step=False),
    "squared_product": Rule(torch.square, by_step=True),
    "movement": Rule(torch.neg, by_step=True, mean=False),
    "activation": Rule(_same, by_step=False),
}


def processes() -> int:
    """How many processes train together."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """Which of them this one is."""
    return distributed.get_rank() if processes() > 1 else 0


class Running:
    """One sum: of the step that runs, and of all before it. Float32, where the weights are.

    Memory: 4 bytes per entry, and another 4 between the backward and the next `fold`.

    Attributes:
        version: counts how often the total has changed.
    """

    def __init__(self, rule: Rule, decay: float, shape: torch.Size) -> None:
        self._rule, self._decay, self._shape = rule, decay, shape
        self._recent: Tensor | None = None
        self._recent_count: Tensor | None = None
        self._total: Tensor | None = None
        self._count = torch.zeros(())
        self.version = 0

    @property
    def value(self) -> Tensor | None:
        """The mean or the sum of all steps that have been folded in; None before the first."""
        if self._total is None or not self._rule.mean:
            return self._total
        return self._total / self._count.to(self._total.device).clamp_min(torch.finfo(torch.float32).tiny)

    def add(self, value: Tensor, count: Tensor | float = 1.0) -> None:
        """Add `value`, float32 of the sum's shape, made of `count` examples (by entry, or all), to the step."""
        count = torch.as_tensor(count, dtype=torch.float32, device=value.device)
        if self._recent is None or self._recent_count is None:
            self._recent, self._recent_count = value, count
        else:
            self._recent, self._recent_count = self._recent + value, self._recent_count + count

    def fold(self, device: torch.device) -> bool:
        """End the step: put it into the total. With several processes, all must call this, in the same order.

        A step whose sum is not finite is left out, as a gradient scaler leaves out its gradients.

        Returns:
            whether the total has changed.
        """
        recent, count = self._recent, self._recent_count
        self._recent, self._recent_count = None, None
        if processes() > 1:
            recent, count = self._of_all(recent, count, device)
        if recent is None or count is None or not bool(torch.isfinite(recent.sum())):
            return False
        new, count = self._rule.fold(recent), count.clamp_max(1.0) if self._rule.by_step else count
        total = torch.zeros_like(new) if self._total is None else self._total.to(new.device)
        before, fresh = self._count.to(new.device), count > 0
        if not bool(fresh.any()):
            return False
        # What has not been seen in this step keeps its evidence undiminished: it may not be seen for long.
        self._total = torch.where(fresh, self._decay * total + new, total)
        self._count = torch.where(fresh, self._decay * before + count, before)
        self.version += 1
        return True

    def _of_all(
        self, recent: Tensor | None, count: Tensor | None, device: torch.device
    ) -> tuple[Tensor | None, Tensor | None]:
        together = recent if recent is not None else torch.zeros(self._shape, device=device)
        counts = torch.zeros(self._shape, device=device) + (0.0 if count is None else count)
        together = together.contiguous().clone()
        distributed.all_reduce(together)
        distributed.all_reduce(counts)
        together = together / processes() if self._rule.by_step else together
        return (together, counts) if bool(counts.any()) else (None, None)

    def snapshot(self) -> dict[str, Any]:
        """JSON-able, bit for bit: total and count in base64, 5.4 bytes an entry; empty before the first step.

        Call it between steps: what the step that runs has given is not in it.
        """
        if self._total is None:
            return {}
        return {"total": _text(self._total), "count": _text(self._count), "shape": list(self._shape)}

    def restore(self, saved: dict[str, Any], where: str) -> None:
        """Go on from `saved`.

        Raises:
            TdError: not what `snapshot` gave, or of another shape.
        """
        self._recent, self._recent_count, self._total = None, None, None
        self._count = torch.zeros(())
        self.version += 1
        if not saved:
            return
        problem, fix = "the saved evidence is damaged or belongs to another tensor", "load another checkpoint"
        try:
            shape, total, count = list(saved["shape"]), _numbers(saved["total"]), _numbers(saved["count"])
        except (KeyError, ValueError, TypeError) as error:
            raise TdError(problem, where=where, got=repr(error), fix=fix) from error
        if shape != list(self._shape) or len(total) != self._shape.numel() or len(count) not in (1, len(total)):
            raise TdError(problem, where=where, got=f"{len(total)} of {shape}", fix=f"{list(self._shape)} is needed")
        self._total = total.view(self._shape)
        self._count = count.view(self._shape) if len(count) > 1 else count.view(())


def _text(numbers: Tensor) -> str:
    return base64.b64encode(numbers.detach().cpu().contiguous().numpy().astype("<f4").tobytes()).decode()


def _numbers(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text, validate=True)), dtype=torch.float32).clone()
