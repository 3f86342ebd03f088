"""What all targets of one sparsifier share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, get_args

from td_plugin.errors import TdError
from td_plugin.evidence import Sight

if TYPE_CHECKING:
    from td_plugin.target import Target

EvalMask = Literal["pruned", "expected", "dense"]
"""What evaluation drops: the share γ of every pool, the share γ·α that training drops on average, or nothing."""


@dataclass
class Switches:
    """What all targets of one sparsifier share; plain values, so that a deep copy of the model keeps its own.

    Attributes:
        dense: masks are switched off.
        refresh_now: the next step ranks the weights anew, whatever `refresh_every` says.
        sight: what the observers of recipes that need evidence share.
    """

    seed: int = 0
    eval_mask: EvalMask = "pruned"
    refresh_every: int = 1
    dense: bool = False
    refresh_now: bool = False
    sight: Sight = field(default_factory=Sight)

    def __post_init__(self) -> None:
        every = self.refresh_every
        if self.eval_mask not in get_args(EvalMask):
            raise TdError("unknown eval_mask", got=self.eval_mask, fix="'pruned', 'expected' or 'dense'")
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise TdError("refresh_every must be a whole number of steps", got=repr(every), fix="1: every step")

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
