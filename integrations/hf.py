"""Targeted dropout for the Hugging Face Trainer: one callback.

The callback keeps no state of its own: the step is the Trainer's `global_step`, the masks follow from the weights, the
seed and the step, and what a recipe remembers besides goes through `td_plugin.integrations.hf_state`. So a resumed run
continues bit for bit, `restore_callback_states_from_checkpoint` has nothing to restore, and checkpoints carry the keys
of the plain model.
"""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any, Literal

from torch import nn

from td_plugin.attachment import attached_sparsifier
from td_plugin.contract import Recipe
from td_plugin.errors import TdError
from td_plugin.evidence import use_scaler
from td_plugin.ramp import Ramp, ramp_of
from td_plugin.selection import Config
from td_plugin.sparsifier import TargetedDropout
from td_plugin.switches import EvalMask, RankPolicy

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.utils import logging
except ImportError as error:
    raise TdError("transformers is not installed", got=error, fix="pip install 'td-plugin[hf]'") from error

from td_plugin.integrations import hf_names, hf_settings, hf_state
from td_plugin.integrations.distillation import Distillation, Teaching
from td_plugin.integrations.hf_logging import RunLog, go_before_reporters
from td_plugin.integrations.hf_ramp import steps_of_epoch
from td_plugin.integrations.settings import settings_of

logger = logging.get_logger("td_plugin")

# Which callback drives a sparsifier: two of them would draw twice per step. Weak on both sides: a callback holds its
# sparsifier.
_DRIVERS: weakref.WeakKeyDictionary[TargetedDropout, weakref.ref[TargetedDropoutCallback]] = weakref.WeakKeyDictionary()


class TargetedDropoutCallback(TrainerCallback):
    """Trains with targeted dropout and leaves the model pruned.

    Training forwards sample masks, one draw per micro-batch; evaluation runs the model pruned at the target γ, at any
    moment of the ramp, so `eval_*` and `load_best_model_at_end` judge what will ship. At the end the mask is baked in:
    `trainer.save_model()` writes a plain checkpoint, `td_plugin.export.shrink(trainer.model)` makes it smaller.

    A model that the user has prepared already is adopted, with its recipe, γ and seed.

    Args:
        recipe: which method, from `td_plugin.recipes` or composed.
        sparsity_level: γ in [0, 1), as of `TargetedDropout`.
        seed: of the draws.
        config: as of `TargetedDropout.prepare`: which tensors, with which γ and α, by name, by pattern
            (`td_plugin.Layers`) or by a function of the model; None takes all the recipe can drop.
        recipe_steps: length of the ramp of a ramping recipe: optimizer steps (int), or the share of the run (float in
            (0, 1]); None: the whole run. After the ramp γ and α stay at their targets.
        ramp: in place of `recipe_steps`: its start, its end, and from when the mask is held (`td_plugin.Ramp`).
        mask_every: ``"micro_batch"`` draws before every forward (the paper), ``"step"`` once per optimizer step.
        eval_mask: ``"pruned"``, ``"expected"`` as of `TargetedDropout`, or ``"dense"`` to evaluate without masks.
        refresh_every: as of `TargetedDropout`: optimizer steps from one ranking of the weights to the next.
        rank_policy: as of `TargetedDropout`: whether several processes drop the same.
        distillation: learn from the dense model, too (`td_plugin.integrations.distillation`).
        log_groups: log the sparsity of every target, too.
        squash: bake the masks in at the end; False leaves them on, for `callback.sparsifier.squash_mask()` later.
        on_trial: recipe and γ of a trial of `hyperparameter_search`, from the values of its search space by name; they
            take the place of `recipe` and `sparsity_level` there.
        keep_zeros: train a pruned model further with its mask held: what is zero when training starts (weights or
            units, as of the recipe) stays zero, nothing else is dropped, γ and α mean nothing.

    Attributes:
        sparsifier: the sparsifier, once training has started.

    Raises:
        TdError: a fraction outside its range or an unknown option, at once; a wrong tensor name or a model with nothing
            to prune, when training starts.

    Example:
        >>> trainer = Trainer(..., callbacks=[TargetedDropoutCallback(recipes.ramping_targeted_unit(), 0.75)])
    """

    def __init__(  # noqa: PLR0913 - all but the first two are options, by name only
        self,
        recipe: Recipe,
        sparsity_level: float | None = None,
        *,
        seed: int = 0,
        config: Config = None,
        recipe_steps: float | None = None,
        ramp: Ramp | None = None,
        mask_every: Literal["micro_batch", "step"] = "micro_batch",
        eval_mask: EvalMask = "pruned",
        refresh_every: int = 1,
        rank_policy: RankPolicy = "shared",
        distillation: Distillation | None = None,
        squash: bool = True,
        log_groups: bool = False,
        on_trial: hf_settings.OnTrial | None = None,
        keep_zeros: bool = False,
    ) -> None:
        if mask_every not in ("micro_batch", "step"):
            raise TdError("unknown mask_every", got=mask_every, fix="'micro_batch' or 'step'")
        self._new = partial(
            TargetedDropout, seed=seed, eval_mask=eval_mask, refresh_every=refresh_every, rank_policy=rank_policy
        )
        self._method = (recipe, sparsity_level)
        self._new(*self._method)  # a wrong γ is said now, not hours later
        self._config, self._ramp, self._squash = config, ramp_of(recipe_steps, ramp), squash
        self._mask_every, self._on_trial, self._keep_zeros = mask_every, on_trial, keep_zeros
        self._teaching = None if distillation is None else Teaching(distillation)
        self.sparsifier: TargetedDropout | None = None
        self._per_epoch: int | None = None
        self._log = RunLog(log_groups)

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module | None = None,
        **_: Any,
    ) -> None:
        """Copy the teacher before a checkpoint is loaded into the model, and see that it can be."""
        hf_names.translate_loads(model)
        go_before_reporters(self, args)
        if self._teaching is not None:
            self._teaching.meet(model)

    def on_train_begin(  # type: ignore[override]
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        optimizer: Any = None,
        train_dataloader: Any = None,
        **_: Any,
    ) -> None:
        """Prepare the model that really trains, or adopt what it carries; runs again after a restart of the loop."""
        go_before_reporters(self, args)
        self._log.begin()
        hf_settings.refuse_zero3(args)
        hf_names.translate_loads(model, loaded=state.global_step > 0)
        if self._teaching is not None:
            self._teaching.begin(model, state.global_step > 0, hf_settings.autocast(args))
        sparsifier = attached_sparsifier(model)
        if sparsifier is None:
            sparsifier = self._asked_for(state)
            sparsifier.prepare(model, self._config)
            if self._keep_zeros:
                sparsifier.hold_zeros()
        elif sparsifier in _DRIVERS and _DRIVERS[sparsifier]() not in (self, None):
            raise TdError("two TargetedDropoutCallbacks drive one model", where=type(model).__name__, fix="keep one")
        _DRIVERS[sparsifier] = weakref.ref(self)
        self.sparsifier = sparsifier
        scaler = getattr(optimizer, "scaler", None)  # of accelerate's wrapper, under fp16
        if scaler is not None:
            use_scaler(sparsifier, scaler)
        hf_state.resume(state, sparsifier)
        asked = settings_of(sparsifier, str(self._ramp), self._mask_every, state.max_steps)
        hf_settings.compare(state, asked)
        sparsifier.evaluate_at_target()
        self._per_epoch = steps_of_epoch(args, train_dataloader)
        self._ramp.warn_if_longer(state.max_steps, self._per_epoch)
        self._set_progress(state)
        report = sparsifier.report()
        logger.info(
            f"targeted dropout on {len(report.rows)} targets, {len(report.skipped)} tensors left alone\n{report}"
        )

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Rank and draw for the first micro-batch."""
        sparsifier = self._active()
        self._set_progress(state)
        sparsifier.step_count = state.global_step
        sparsifier.step()

    def on_substep_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Draw for the next micro-batch; its predecessor's backward is done."""
        if self._mask_every == "micro_batch":
            self._active().redraw()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Transformers' own callback for SIGTERM is asked before this one, and saves at the end of the step."""
        if args.enable_jit_checkpoint:
            self.on_step_end(args, state, control)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """What the recipe remembers goes into a checkpoint that follows."""
        if self.sparsifier is not None and self.sparsifier.groups:  # an evaluation may come before or after training
            hf_state.keep(args, state, control, self.sparsifier)

    on_epoch_end = on_evaluate = on_step_end

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The next step ranks anew, as the first of a resumed run does."""
        self._active().state_dict()
        hf_state.forget(state)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Log γ, α, the share of scalars dropped in this step, the sparsity the model would ship with, and churn."""
        if logs is not None and self.sparsifier is not None and self.sparsifier.groups and "loss" in logs:
            self._log.add(logs, state, self.sparsifier)

    def on_train_end(  # type: ignore[override]
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: nn.Module, **_: Any
    ) -> None:
        """Bake the deterministic masks in; the best checkpoint, if asked for, has been loaded by now."""
        sparsifier = self._active()
        if self._teaching is not None:
            self._teaching.end()
        hf_state.load_best(args, state, sparsifier)
        sparsifier.set_progress(1.0)
        report = sparsifier.report()
        end = self._ramp.in_steps(state.max_steps, self._per_epoch)[1] if sparsifier.recipe.ramps else 0
        logger.info(self._log.summary(report, end, state))
        if self._squash:
            sparsifier.squash_mask()

    def _set_progress(self, state: TrainerState) -> None:
        self._active().follow(self._ramp.at(state.global_step, state.max_steps, self._per_epoch))

    def _asked_for(self, state: TrainerState) -> TargetedDropout:
        trial = None if self._on_trial is None else state.trial_params
        return self._new(*(self._method if trial is None or self._on_trial is None else self._on_trial(trial)))

    def _active(self) -> TargetedDropout:
        if self.sparsifier is None or not self.sparsifier.groups:
            raise TdError(
                "the callback has no masked model",
                got="masks were squashed while training" if self.sparsifier else "training has not begun",
                fix="squash after training only",
            )
        return self.sparsifier
