"""γ of targets that are given it together, from the importances of all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from td_plugin.ranking import Ranking
from td_plugin.rates import Rates


class Pool:
    """The rankings that share one γ among them, in training or in evaluation.

    Each of them is told to rank anew, one after the other; what is common to all is found once for the whole round: by
    the first, and again when one that has had its share asks a second time.
    """

    def __init__(self, rates: Rates, rankings: Sequence[Ranking]) -> None:
        self._rates, self._rankings = rates, list(rankings)
        self._levels: list[float] = []
        self._key: tuple[object, ...] | None = None
        self._served: set[int] = set()

    def expire(self, place: int) -> None:
        """The weights of the target at `place` may have changed."""
        if place in self._served:
            self._key = None
            self._served.clear()

    def level(self, place: int, asked: Callable[[], list[float]], seed: int) -> float:
        """γ of the target at `place`, when all together are asked for `asked`.

        Raises:
            TdError: what is asked for cannot be had, or an importance is not finite.
        """
        levels = asked()
        key = (tuple(levels), seed, tuple(ranking.versions() for ranking in self._rankings))
        if key != self._key:
            self._levels = self._rates.levels(levels, [ranking.importance(seed) for ranking in self._rankings])
            self._key = key
            self._served.clear()
        self._served.add(place)
        return self._levels[place]


class Shared(Protocol):
    """A target, as far as a pool is concerned."""

    @property
    def place(self) -> int:
        """Its index among the targets."""
        ...

    def asked(self, training: bool) -> float:
        """γ of its config, for training or for what ships."""
        ...

    def ranking(self, training: bool) -> Ranking:
        """The ranking of training, or of what ships."""
        ...


class Together:
    """The two pools of the targets of one sparsifier: of training and of what ships."""

    def __init__(self, rates: Rates, targets: Sequence[Shared]) -> None:
        self._targets = list(targets)
        self._pools = {training: Pool(rates, [t.ranking(training) for t in targets]) for training in (True, False)}

    def expire(self, target: Shared, training: bool) -> None:
        """The weights of `target` may have changed."""
        self._pools[training].expire(target.place)

    def level(self, target: Shared, training: bool, seed: int) -> float:
        """γ of `target`: its share of what all targets together are asked for."""
        pool = self._pools[training]
        return pool.level(target.place, lambda: [other.asked(training) for other in self._targets], seed)
