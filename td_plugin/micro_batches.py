"""Gradient accumulation in plain loops: which micro-batch opens an optimizer step, and which one closes it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from td_plugin.errors import TdError

if TYPE_CHECKING:
    from td_plugin.steps import Steps
    from td_plugin.target import Target


@dataclass(frozen=True)
class MicroBatch:
    """One forward and backward of an optimizer step.

    Attributes:
        index: its place in the step, from 0.
        last: whether the optimizer steps after its backward.
    """

    index: int
    last: bool

    @property
    def first(self) -> bool:
        """Whether it opens the step."""
        return self.index == 0


class Accumulation:
    """How far the optimizer step that runs has come; part of the sparsifier's state.

    Attributes:
        done: how many of its micro-batches have been completed.
        drawn: whether the next one has its masks already: it was begun, and an exception ended it.
        inside: whether a block is open.
    """

    def __init__(self) -> None:
        self.done, self.drawn, self.inside = 0, False, False

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "inside": False}  # a copy is in no block

    def refuse_inside(self, what: str, fix: str) -> None:
        """Raise if a block is open.

        Raises:
            TdError: it is.
        """
        if self.inside:
            raise TdError(f"{what} inside training_step()", got=f"micro-batch {self.done} runs", fix=fix)

    def snapshot(self) -> dict[str, Any]:
        """JSON-able.

        Raises:
            TdError: a block is open, so that nobody can say whether its micro-batch counts.
        """
        self.refuse_inside("state_dict()", "save between two blocks")
        return {"done": self.done, "drawn": self.drawn}

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on from what `snapshot` gave; from the start of a step where there is nothing."""
        self.done, self.drawn = int(saved.get("done", 0)), bool(saved.get("drawn", False))

    @contextmanager
    def block(self, sparsifier: Steps, size: int, last: bool | None) -> Iterator[MicroBatch]:
        """One micro-batch.

        Args:
            sparsifier: draws the masks: for a new step, for the next micro-batch of it, or those of now once more.
            size: micro-batches of a step.
            last: whether this one closes the step; None: if it is the `size`-th.

        Raises:
            TdError: as `training_step` says.
        """
        sparsifier._prepared()
        self.refuse_inside("training_step()", "end the first block before the next forward")
        refuse_evaluation(sparsifier._targets)
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise TdError("accumulation must be a whole number of micro-batches", got=repr(size), fix="1: no more")
        micro = MicroBatch(self.done, self.done + 1 >= size if last is None else bool(last))
        if self.drawn:
            sparsifier._draw_again()
        elif self.done:
            sparsifier.redraw()
        else:
            sparsifier.step()
        self.drawn = self.inside = True
        try:
            yield micro
        finally:
            self.inside = False
        self.done, self.drawn = 0 if micro.last else micro.index + 1, False


def refuse_evaluation(targets: Sequence[Target]) -> None:
    """Raise if no masked module is in training mode.

    Raises:
        TdError: none is, so that no draw would be seen.
    """
    if not any(member.module.training for target in targets for member in target.members):
        raise TdError(
            "training_step() on a model in evaluation mode: it would be trained as it is pruned, without a draw",
            where=targets[0].name,
            fix="model.train()",
        )
