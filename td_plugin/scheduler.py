"""TargetedDropoutScheduler: γ and α by the recipe's schedules, in loops written against torch.ao."""

from __future__ import annotations

from typing import Any

from torch.ao.pruning.scheduler.base_scheduler import BaseScheduler

from td_plugin.errors import TdError
from td_plugin.ramp import Ramp
from td_plugin.sparsifier import TargetedDropout


class TargetedDropoutScheduler(BaseScheduler):
    """Ramps γ and α of every group to their targets over `recipe_steps` calls of `step()`, or as a `Ramp` says.

    As with any torch.ao scheduler, call `sparsifier.step()` before `scheduler.step()`. The targets are those given to
    the sparsifier, not the γ it happens to be at, so building the scheduler before or after restoring a checkpoint
    gives the same run.

    Args:
        sparsifier: prepared.
        recipe_steps: length of the ramp, in calls of `step()`; or a `Ramp`, whose steps are those calls.
        last_epoch: index of the last call made; -1 to start.
        verbose: print each change, as torch.ao does.
        total_steps: calls in the whole run, where the `Ramp` needs it.
        steps_per_epoch: calls in an epoch, where the `Ramp` needs it.

    Raises:
        TdError: not a prepared `TargetedDropout`, a ramp without length, or one that needs a number not given.
    """

    def __init__(
        self,
        sparsifier: TargetedDropout,
        recipe_steps: int | Ramp,
        last_epoch: int = -1,
        verbose: bool = False,
        *,
        total_steps: int | None = None,
        steps_per_epoch: int | None = None,
    ) -> None:
        if not isinstance(sparsifier, TargetedDropout) or not sparsifier.groups:
            raise TdError("the scheduler needs a prepared TargetedDropout", got=repr(sparsifier), fix="prepare() first")
        self._ramp = _in_steps(recipe_steps, total_steps, steps_per_epoch)
        if total_steps is not None:
            self._ramp.warn_if_longer(total_steps)
        self._target = sparsifier
        super().__init__(sparsifier, last_epoch, verbose)  # type: ignore[no-untyped-call]
        self.base_sl = [group["target_sparsity_level"] for group in sparsifier.groups]

    def get_sl(self) -> list[float]:
        """γ of every group at the current step; sets α as well. Called by `step()`."""
        self._target.follow(self._ramp.at(self.last_epoch))
        return [group["sparsity_level"] for group in self._target.groups]

    @property
    def recipe_steps(self) -> int:
        """The call in which γ and α reach their targets."""
        return self._ramp.in_steps()[1]

    def state_dict(self) -> dict[str, Any]:
        """The call, and the ramp in calls; everything else follows. A frozen mask is in the state of the sparsifier."""
        start, end, freeze = self._ramp.in_steps()
        more = {} if start == 0 and freeze is None else {"start": start, "freeze": freeze}
        return {"last_epoch": self.last_epoch, "recipe_steps": end, **more}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict()` was taken; γ and α of the groups are set at once.

        Load the sparsifier's state before: where the mask is frozen, that says which one.

        Raises:
            TdError: not a state of this class.
        """
        if not {"last_epoch", "recipe_steps"} <= set(state_dict) <= {"last_epoch", "recipe_steps", "start", "freeze"}:
            raise TdError(
                "not a state of TargetedDropoutScheduler", got=sorted(state_dict), fix="pass its state_dict()"
            )
        self.last_epoch = int(state_dict["last_epoch"])
        start, end = int(state_dict.get("start", 0)), int(state_dict["recipe_steps"])
        self._ramp = Ramp(start, end, state_dict.get("freeze"), "steps")
        self._last_sl = self.get_sl()


def _in_steps(length: int | Ramp, total: int | None, per_epoch: int | None) -> Ramp:
    if isinstance(length, Ramp):
        start, end, freeze = length.in_steps(total, per_epoch)
        return Ramp(start, end, freeze, "steps")
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise TdError("recipe_steps must be a positive whole number", got=length, fix="the length of the ramp")
    return Ramp(end=length, unit="steps")
