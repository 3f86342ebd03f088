"""How the set of what is dropped moves while a model trains: two looks at it, compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from td_plugin.bits import ones, pack
from td_plugin.target import Target


@dataclass(frozen=True)
class Change:
    """What has become of the candidates: what evaluation drops, over all targets.

    Attributes:
        churn: the share of the candidates that changed since the last look, in [0, 1]: of the larger of both sets, what
            is not in both. With as many candidates as before it is the share that was replaced by others.
        survival: the share of the first look's candidates that are candidates now, in [0, 1]; in between they
            may have been none.
    """

    churn: float
    survival: float


class Churn:
    """Compares looks at the candidates of the same targets.

    It holds those of the first look and of the last, two bits per weight or unit; the sparsifier's own state and
    training are not touched. A run that is resumed starts with a new first look.
    """

    def __init__(self) -> None:
        self._first: list[Tensor] = []
        self._last: list[Tensor] = []

    def look(self, targets: Sequence[Target]) -> Change | None:
        """What has changed since the last look; None at the first, and as long as there are no candidates."""
        now = [pack(target.candidates()).cpu() for target in targets]
        last, self._last = self._last, now
        if not self._first:
            self._first = now if _count(now) else []
            return None
        most = max(_count(now), _count(last))
        churn = 1.0 - _common(now, last) / most if most else 0.0
        return Change(churn, _common(now, self._first) / _count(self._first))


def _count(sets: Sequence[Tensor]) -> int:
    return sum(ones(bits) for bits in sets)


def _common(one: Sequence[Tensor], other: Sequence[Tensor]) -> int:
    return sum(ones(a & b) for a, b in zip(one, other, strict=True))
