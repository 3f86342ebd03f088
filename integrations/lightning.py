"""Targeted dropout for Lightning: one callback.

The sparsifier's state travels with the other callbacks' in Lightning's checkpoints, as plain numbers and text; the
weights there carry the keys of the plain module. A resumed run continues bit for bit.
"""

from __future__ import annotations

import math
import warnings
from functools import partial
from typing import Any, Literal

from torch import nn

from td_plugin.attachment import attached_sparsifier
from td_plugin.contract import Recipe
from td_plugin.errors import TdError
from td_plugin.evidence import use_scaler
from td_plugin.integrations.run_values import RunValues
from td_plugin.integrations.settings import changes, settings_of
from td_plugin.ramp import Moment, Ramp, ramp_of
from td_plugin.running import processes
from td_plugin.selection import Config, Inputs
from td_plugin.sparsifier import TargetedDropout
from td_plugin.state import LEVELS
from td_plugin.switches import EvalMask, RankPolicy

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.plugins.precision import MixedPrecision
    from lightning.pytorch.trainer.states import TrainerFn
except ImportError as error:
    raise TdError("lightning is not installed", got=error, fix="pip install 'td-plugin[lightning]'") from error


class TargetedDropoutCallback(Callback):
    """Trains with targeted dropout and leaves the module pruned.

    Training forwards sample masks, one draw per batch; validation runs the module pruned at the target γ, at any moment
    of the ramp, so `ModelCheckpoint` and early stopping judge what will ship. When `fit` ends the masks are baked in.
    Checkpoints hold dense weights: ``trainer.test(ckpt_path="best")`` with this callback prunes what it loads.

    With manual optimization a step begins with the first batch after any optimizer has stepped, and a ramp is given in
    steps. A module that the user has prepared already is adopted, with its recipe, γ and seed.

    Args:
        recipe: which method, from `td_plugin.recipes` or composed.
        sparsity_level: γ in [0, 1), as of `TargetedDropout`.
        seed: of the draws.
        config: as of `TargetedDropout.prepare`: which tensors, with which γ and α, by name, by pattern
            (`td_plugin.Layers`) or by a function of the module; None takes all the recipe can drop.
        module: dotted name, within the LightningModule, of what is pruned, such as ``"model"``; names in `config` are
            relative to it. Empty: all of it.
        example_inputs: as of `TargetedDropout.prepare`: what `module` is called with, where its units must be traced.
        recipe_steps: length of the ramp of a ramping recipe: optimizer steps (int), or the share of the run (float in
            (0, 1]); None: the whole run. After the ramp γ and α stay at their targets.
        ramp: in place of `recipe_steps`: its start, its end, and from when the mask is held (`td_plugin.Ramp`).
        mask_every: ``"micro_batch"`` draws before every forward (the paper), ``"step"`` once per optimizer step.
        eval_mask: ``"pruned"``, ``"expected"`` as of `TargetedDropout`, or ``"dense"`` to evaluate without masks.
        refresh_every: as of `TargetedDropout`: optimizer steps from one ranking of the weights to the next.
        rank_policy: as of `TargetedDropout`: whether several processes drop the same.
        squash: bake the masks in at the end; False leaves them on, for `callback.sparsifier.squash_mask()` later.
        log_groups: log the sparsity of every target, too.

    Attributes:
        sparsifier: the sparsifier, once `fit` has started.

    Raises:
        TdError: a fraction outside its range or an unknown option, at once; a wrong name, nothing to prune, or a ramp
            over a run of unknown length, when `fit` starts.

    Example:
        >>> trainer = Trainer(callbacks=[TargetedDropoutCallback(recipes.ramping_targeted_unit(), 0.75)])
    """

    def __init__(  # noqa: PLR0913 - all but the first two are options, by name only
        self,
        recipe: Recipe,
        sparsity_level: float | None = None,
        *,
        seed: int = 0,
        config: Config = None,
        module: str = "",
        example_inputs: Inputs = None,
        recipe_steps: float | None = None,
        ramp: Ramp | None = None,
        mask_every: Literal["micro_batch", "step"] = "micro_batch",
        eval_mask: EvalMask = "pruned",
        refresh_every: int = 1,
        rank_policy: RankPolicy = "shared",
        squash: bool = True,
        log_groups: bool = False,
    ) -> None:
        if mask_every not in ("micro_batch", "step"):
            raise TdError("unknown mask_every", got=mask_every, fix="'micro_batch' or 'step'")
        options: dict[str, Any] = {"seed": seed, "eval_mask": eval_mask, "refresh_every": refresh_every}
        self._new = partial(TargetedDropout, recipe, sparsity_level, rank_policy=rank_policy, **options)
        self._new()  # a wrong γ is said now, not hours later
        self._module, self._config, self._inputs = module, config, example_inputs
        self._ramp, self._squash, self._mask_every = ramp_of(recipe_steps, ramp), squash, mask_every
        self._lengths: tuple[int | None, int | None] = (None, None)  # optimizer steps of the run and of an epoch
        self._settings: dict[str, Any] = {}
        self._values = RunValues(log_groups)
        self._drawn_for: int | None = None  # the optimizer steps done when masks were drawn for the next one
        self._saved: dict[str, Any] | None = None
        self.sparsifier: TargetedDropout | None = None

    # What a checkpoint carries.

    def state_dict(self) -> dict[str, Any]:
        """Plain data: the sparsifier's state and the optimizer step that its masks were drawn for."""
        if self.sparsifier is None or not self.sparsifier.groups:
            return {}
        return {"sparsifier": self.sparsifier.state_dict(), "drawn_for": self._drawn_for, "settings": self._settings}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Kept until the weights have been loaded, too."""
        self._saved = state_dict

    # Training.

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prepare the module, or adopt what it carries."""
        self._attach(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on from the checkpoint, whose weights have been loaded by now."""
        sparsifier = self._active()
        self._lengths = _lengths(trainer, pl_module)
        total, per_epoch = self._lengths
        if total is not None:
            self._ramp.warn_if_longer(total, per_epoch)
        self._settings = settings_of(sparsifier, str(self._ramp), self._mask_every, total or 0)
        self._values.begin()
        self._drawn_for = None
        if self._saved is None:
            sparsifier.step_count = trainer.global_step  # a checkpoint of a run without this callback
        else:
            self._restore(sparsifier)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Draw for this batch; rank as well if it is the first of an optimizer step."""
        sparsifier = self._active()
        if trainer.global_step != self._drawn_for:
            sparsifier.follow(self._moment(sparsifier))
            sparsifier.step()
            self._drawn_for = trainer.global_step
        elif self._mask_every == "micro_batch":
            sparsifier.redraw()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log γ, α, the share of scalars dropped in this step, the sparsity the module would ship with, and churn."""
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by a connector
        stepped = trainer.global_step if pl_module.automatic_optimization else trainer.fit_loop.total_batch_idx + 1
        if every and stepped % every == 0 and trainer.global_step != self._drawn_for:
            pl_module.log_dict(self._values.of(self._active()), on_step=True, on_epoch=False)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Where processes have to talk for it, bake in now: when `fit` has ended the module is on the CPU."""
        self._active().set_progress(1.0)
        if self._active().remembers and processes() > 1:
            self._bake()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bake the deterministic masks in, after `ModelCheckpoint` has saved its last."""
        self._bake()

    # Evaluation of a checkpoint, outside of `fit`.

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prune what a checkpoint of this callback has brought."""
        if trainer.state.fn != TrainerFn.FITTING and self._saved is not None:
            self._attach(trainer, pl_module)
            self._restore(self._active())

    on_validation_start = on_predict_start = on_test_start

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave it pruned."""
        if trainer.state.fn != TrainerFn.FITTING:
            self._bake()

    on_validation_end = on_predict_end = on_test_end

    def _attach(self, trainer: Trainer, pl_module: LightningModule) -> None:
        try:
            model: nn.Module = pl_module.get_submodule(self._module)
        except AttributeError as error:
            names = [name for name, _ in pl_module.named_children()]
            raise TdError("the LightningModule has no such part", where=self._module, got=names) from error
        sparsifier = attached_sparsifier(model)
        if sparsifier is None:
            sparsifier = self._new()
            sparsifier.prepare(model, self._config, example_inputs=self._inputs)
        self.sparsifier = sparsifier
        precision = trainer.precision_plugin
        if isinstance(precision, MixedPrecision) and precision.scaler is not None:
            use_scaler(sparsifier, precision.scaler)
        sparsifier.evaluate_at_target()

    def _restore(self, sparsifier: TargetedDropout) -> None:
        saved, self._saved = self._saved or {}, None
        state = dict(saved["sparsifier"])
        changed = changes(saved["settings"], self._settings) if self._settings else []
        if changed:
            levels = {group["tensor_fqn"]: {key: group[key] for key in LEVELS} for group in sparsifier.groups}
            state["groups"] = [{**group, **levels.get(group["tensor_fqn"], {})} for group in state["groups"]]
            state["seed"] = sparsifier.seed
        sparsifier.load_state_dict(state)
        if changed:
            warnings.warn(
                "resumed with other settings than the checkpoint was trained with: "
                f"{'; '.join(changed)}. The new ones hold from here on, so the run is not the one that was interrupted",
                stacklevel=2,
            )
        self._drawn_for = saved["drawn_for"]

    def _moment(self, sparsifier: TargetedDropout) -> Moment:
        if self._ramp == Ramp() and not sparsifier.recipe.ramps:  # where no length is known, none is needed
            return Moment(1.0)
        return self._ramp.at(sparsifier.step_count, *self._lengths)

    def _bake(self) -> None:
        if self._squash and self.sparsifier is not None and self.sparsifier.groups:
            self.sparsifier.squash_mask()

    def _active(self) -> TargetedDropout:
        if self.sparsifier is None or not self.sparsifier.groups:
            raise TdError(
                "the callback has no masked module",
                got="masks were squashed while training" if self.sparsifier else "training has not begun",
                fix="squash after training only",
            )
        return self.sparsifier


def _lengths(trainer: Trainer, pl_module: LightningModule) -> tuple[int | None, int | None]:
    """Optimizer steps of the run and of an epoch; None where nobody can say."""
    if not pl_module.automatic_optimization:
        return None, None
    total, batches = trainer.estimated_stepping_batches, trainer.num_training_batches
    per_epoch = math.ceil(batches / trainer.accumulate_grad_batches) if batches < math.inf else None
    return (int(total) if 0 < total < math.inf else None), per_epoch
