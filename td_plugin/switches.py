"""What all targets of one sparsifier share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, get_args

from td_plugin.errors import TdError
from td_plugin.evidence import Sight
from td_plugin.masks import draw_key
from td_plugin.running import rank

if TYPE_CHECKING:
    from td_plugin.target import Target

EvalMask = Literal["pruned", "expected", "dense"]
"""What evaluation drops: the share γ of every pool, the share γ·α that training drops on average, or nothing."""

RankPolicy = Literal["shared", "independent"]
"""Whether processes that train together drop the same candidates in a step, or each draws its own."""


@dataclass
class Switches:
    """What all targets of one sparsifier share; plain values, so that a deep copy of the model keeps its own.

    Attributes:
        dense: masks are switched off.
        refresh_now: the next step ranks the weights anew, whatever `refresh_every` says.
        agreed: whether the processes have been compared since this one began.
        sight: what the observers of recipes that need evidence share.
    """

    seed: int = 0
    eval_mask: EvalMask = "pruned"
    refresh_every: int = 1
    rank_policy: RankPolicy = "shared"
    agree_every: int = 100
    dense: bool = False
    refresh_now: bool = False
    agreed: bool = False
    sight: Sight = field(default_factory=Sight)

    def __post_init__(self) -> None:
        every = self.refresh_every
        if self.eval_mask not in get_args(EvalMask):
            raise TdError("unknown eval_mask", got=self.eval_mask, fix="'pruned', 'expected' or 'dense'")
        if self.rank_policy not in get_args(RankPolicy):
            raise TdError("unknown rank_policy", got=self.rank_policy, fix="'shared' or 'independent'")
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise TdError("refresh_every must be a whole number of steps", got=repr(every), fix="1: every step")
        if isinstance(self.agree_every, bool) or not isinstance(self.agree_every, int) or self.agree_every < 0:
            fix = "100; 0: never"
            raise TdError("agree_every must be a whole number of steps", got=repr(self.agree_every), fix=fix)

    def key(self, step: int, micro_step: int, *names: str) -> int:
        """Of the draw `names` in this step; the first process always draws what one process alone would."""
        own = rank() if self.rank_policy == "independent" else 0
        return draw_key(self.seed, step, micro_step, *names, *((f"rank {own}",) if own else ()))

    def compares(self, step: int) -> bool:
        """Whether the processes compare their masks in this step: the first of a run, and every n-th."""
        due = bool(self.agree_every) and (not self.agreed or step % self.agree_every == 0)
        self.agreed |= due
        return due

    @contextmanager
    def off(self, targets: Iterable[Target]) -> Iterator[None]:
        """`dense` inside the block; what `targets` have derived from their weights is forgotten after it."""
        before, self.dense = self.dense, True
        try:
            yield
        finally:
            self.dense = before
            for target in targets:
                target.forget()
