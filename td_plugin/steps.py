"""What a loop calls between `prepare` and `squash_mask`: the steps of the sparsifier."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from td_plugin.agreement import agree
from td_plugin.churn import Change, Churn
from td_plugin.contract import Recipe
from td_plugin.errors import TdError
from td_plugin.holding import Held, zero_groups
from td_plugin.micro_batches import Accumulation, MicroBatch
from td_plugin.notices import warn_if_not_driven
from td_plugin.ramp import Moment
from td_plugin.state import clear_levels, set_levels
from td_plugin.switches import Switches
from td_plugin.target import Target


class Steps(ABC):
    """The part of `TargetedDropout` that runs in every training step; the attributes are those of that class."""

    model: nn.Module | None
    recipe: Recipe
    groups: list[dict[str, Any]]
    enable_mask_update: bool
    step_count: int
    micro_step: int
    _targets: list[Target]
    _switches: Switches
    _accumulation: Accumulation
    _driven: bool

    @abstractmethod
    def update_mask(self, module: nn.Module, tensor_name: str, target: Target, **config: Any) -> None:
        """Rank and draw one target."""

    def _prepared(self) -> nn.Module:
        if self.model is None or not self.groups:
            raise TdError("the sparsifier has no model", fix="call prepare(model) first")
        return self.model

    def step(self, use_path: bool = True) -> None:
        """Rank the weights anew and draw this step's masks. Call it before the forward. `use_path` is torch.ao's.

        Raises:
            TdError: not prepared, a γ or α outside [0, 1) (a scheduler may set one), weights with NaN, inside of
                `training_step`, which calls it.
        """
        self._prepared()
        self._accumulation.refuse_inside("step()", "leave it out: the block has called it")
        if not self.enable_mask_update:
            return
        if self.recipe.ramps and not self._driven and self.step_count == 1:
            warn_if_not_driven(self.recipe.name, vars(self))
        self.micro_step = 0
        problem, compared = None, self._switches.compares(self.step_count)
        try:
            for target in self._targets:
                self.update_mask(target=target, **target.config)
        except TdError as error:
            if not compared:
                raise
            problem = error  # other processes would wait for this one in vain
        if compared:
            agree(self._targets, problem)
        self._switches.refresh_now, self.step_count = False, self.step_count + 1

    def redraw(self) -> None:
        """Draw anew within the current step, for the next micro-batch: the weights, so the candidates, are the same.

        Raises:
            TdError: before `prepare` or the first `step`.
        """
        self._prepared()
        if self.step_count == 0:
            raise TdError("redraw() before the first step()", fix="call step() before the first forward")
        self.micro_step += self.enable_mask_update
        for target in self._targets if self.enable_mask_update else ():
            target.draw(self.step_count - 1, self.micro_step, fresh=False)

    def _draw_again(self) -> None:
        """The masks of now, from what the state says: as of a resumed run."""
        for target in self._targets if self.step_count else ():
            target.draw(self.step_count - 1, self.micro_step, fresh=True, learn=False)

    def training_step(self, accumulation: int = 1, *, last: bool | None = None) -> AbstractContextManager[MicroBatch]:
        """Put it around forward and backward of one micro-batch; the optimizer may step inside or behind it.

        By its own count it is `step()` before the first micro-batch of an optimizer step, `redraw()` before the others.
        A micro-batch that an exception ends does not count: the next block is the same one, with the same masks.

        Args:
            accumulation: micro-batches of an optimizer step.
            last: whether the optimizer steps after this one, where counting does not say so: at the end of an epoch
                with a remainder, or under accelerate, ``last=accelerator.sync_gradients``.

        Returns:
            a context that gives a `MicroBatch`, whose `last` says when the optimizer is to step.

        Raises:
            TdError: not prepared, a block inside a block, no masked module in training mode, `accumulation` below 1.

        Example:
            >>> for batch in loader:
            ...     with sparsifier.training_step(accumulation=4) as micro:
            ...         (loss_of(model, batch) / 4).backward()
            ...     if micro.last:
            ...         optimizer.step()
            ...         optimizer.zero_grad()
        """
        return self._accumulation.block(self, accumulation, last)

    def set_progress(self, progress: float) -> None:
        """Set γ and α of every group to what the recipe says when the share `progress` of the ramp is done.

        A held mask stays as it is.
        """
        self._driven = True
        if self.held:
            return
        set_levels(self.groups, self.recipe, min(max(progress, 0.0), 1.0))

    def follow(self, moment: Moment) -> None:
        """Do what `Ramp.at` says for the step that comes: `set_progress`, nothing dropped before the ramp, `hold`."""
        self._driven = True
        if moment.frozen:
            self.hold()
        elif moment.progress is None and not self.held:
            clear_levels(self.groups)
        else:
            self.set_progress(moment.progress or 0.0)

    @property
    def held(self) -> bool:
        """Whether the mask is held."""
        return any(target.held is not None for target in self._targets)

    def hold(self) -> None:
        """Drop exactly what evaluation drops now, in training and evaluation, whatever becomes of the weights (α = 1).

        A held mask is part of `state_dict()`: a bit per weight or unit, compressed. What is dropped is neither ranked
        nor drawn any more; a second call changes nothing.

        Raises:
            TdError: not prepared, weights with NaN.
        """
        self._prepared()
        if self.held:
            return
        for target in self._targets:
            target.forget()
        self._hold([Held.of(target.candidates()) for target in self._targets])  # all before the first changes

    def hold_zeros(self) -> None:
        """`hold`, but of what is exactly zero: single weights, or units whose weights and biases all are.

        For training a pruned model further: its zeros stay zero under any optimizer, and nothing else is dropped,
        whatever γ says. Zeros that are to be learned, as of a layer that starts from zero, are held like all others.

        Raises:
            TdError: not prepared, a mask is held already, nothing is zero.
        """
        self._prepared()
        if self.held:
            raise TdError("the mask is held already", fix="call release() first")
        zeros = [zero_groups(target.members, self.recipe.granularity) for target in self._targets]
        if not any(bool(found.any()) for found in zeros):
            what = "unit" if self.recipe.granularity.kinds else "weight"
            raise TdError(
                f"no {what} is zero, so there is nothing to hold",
                where=f"{len(zeros)} targets, first: {self._targets[0].name}",
                fix="start from a pruned model, and with the granularity it was pruned with",
            )
        self._hold([Held.of(found) for found in zeros])

    def _hold(self, candidates: list[Held]) -> None:
        self._driven = True
        for target, held in zip(self._targets, candidates, strict=True):
            target.hold(held)

    def change(self, churn: Churn) -> Change | None:
        """What has become of the candidates since the last look of `churn`."""
        return churn.look(self._targets)

    def release(self) -> None:
        """End `hold`: the next `step()` ranks and draws again, with the γ and α of the last `set_progress`."""
        for target in self._targets:
            target.release()

    def evaluate_at_target(self) -> None:
        """From here on evaluation and `squash_mask` use the target γ, wherever a ramp is: what will ship is judged."""
        for group in self.groups:
            group["eval_sparsity_level"] = group["target_sparsity_level"]

    def dense(self) -> AbstractContextManager[None]:
        """All masks off inside the block: forwards are dense, and in-place edits reach the parameters."""
        return self._switches.off(self._targets)
