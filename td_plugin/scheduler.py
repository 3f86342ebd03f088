"""TargetedDropoutScheduler: γ and α by the recipe's schedules, in loops written against torch.ao."""

from __future__ import annotations

from typing import Any

from torch.ao.pruning.scheduler.base_scheduler import BaseScheduler

from td_plugin.errors import TdError
from td_plugin.sparsifier import TargetedDropout


class TargetedDropoutScheduler(BaseScheduler):
    """Ramps γ and α of every group to their targets over `recipe_steps` calls of `step()`.

    As with any torch.ao scheduler, call `sparsifier.step()` before `scheduler.step()`. The targets are those given to
    the sparsifier, not the γ it happens to be at, so building the scheduler before or after restoring a checkpoint
    gives the same run.

    Args:
        sparsifier: prepared.
        recipe_steps: length of the ramp, in calls of `step()`.
        last_epoch: index of the last call made; -1 to start.
        verbose: print each change, as torch.ao does.

    Raises:
        TdError: not a prepared `TargetedDropout`, or a ramp without length.
    """

    def __init__(
        self, sparsifier: TargetedDropout, recipe_steps: int, last_epoch: int = -1, verbose: bool = False
    ) -> None:
        if not isinstance(sparsifier, TargetedDropout) or not sparsifier.groups:
            raise TdError("the scheduler needs a prepared TargetedDropout", got=repr(sparsifier), fix="prepare() first")
        if isinstance(recipe_steps, bool) or not isinstance(recipe_steps, int) or recipe_steps < 1:
            raise TdError(
                "recipe_steps must be a positive whole number", got=recipe_steps, fix="the length of the ramp"
            )
        self.recipe_steps = recipe_steps
        self._target = sparsifier
        super().__init__(sparsifier, last_epoch, verbose)  # type: ignore[no-untyped-call]
        self.base_sl = [group["target_sparsity_level"] for group in sparsifier.groups]

    def get_sl(self) -> list[float]:
        """γ of every group at the current step; sets α as well. Called by `step()`."""
        self._target.set_progress(self.last_epoch / self.recipe_steps)
        return [group["sparsity_level"] for group in self._target.groups]

    def state_dict(self) -> dict[str, Any]:
        """Two whole numbers; everything else follows."""
        return {"last_epoch": self.last_epoch, "recipe_steps": self.recipe_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict()` was taken; γ and α of the groups are set at once.

        Raises:
            TdError: not a state of this class.
        """
        if set(state_dict) != {"last_epoch", "recipe_steps"}:
            raise TdError(
                "not a state of TargetedDropoutScheduler", got=sorted(state_dict), fix="pass its state_dict()"
            )
        self.last_epoch, self.recipe_steps = int(state_dict["last_epoch"]), int(state_dict["recipe_steps"])
        self._last_sl = self.get_sl()
