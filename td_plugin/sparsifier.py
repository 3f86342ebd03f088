"""TargetedDropout: the sparsifier. It owns when and how many; the recipe owns which."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.ao.pruning.sparsifier.base_sparsifier import BaseSparsifier

from td_plugin.contract import Recipe
from td_plugin.errors import TdError
from td_plugin.gates.training import Training
from td_plugin.micro_batches import Accumulation
from td_plugin.notices import warn_of_frozen, warn_of_stuck_units
from td_plugin.parametrization import refuse_masked
from td_plugin.report import SparsityReport
from td_plugin.rows import row_of
from td_plugin.selection import Config, Groups, Inputs, select
from td_plugin.squashing import squash
from td_plugin.state import kept_params, merged_masks, remembers, restore, snapshot
from td_plugin.steps import Steps
from td_plugin.switches import EvalMask, RankPolicy, Switches
from td_plugin.target import Target
from td_plugin.targets import make_targets


class TargetedDropout(Steps, BaseSparsifier):
    """Training that expects to be pruned (Gomez et al., arXiv 1905.13678).

    In a training forward the least important γ of every pool are candidates and each is dropped with probability α; in
    evaluation all candidates are dropped, so what is evaluated is what `squash_mask` leaves and `shrink` ships. Put
    `with training_step():` around forward and backward, or call `step()` before each training forward (or once per
    optimizer step, and `redraw()` before the further micro-batches).

    Names, order and identity of the parameters and the keys of `model.state_dict()` do not change, so optimizers and
    checkpoints made before or after `prepare` fit. Masks follow from the dense weights and the step (and from what was
    dropped before, where `Recipe.regrowth` is below 1).

    Args:
        recipe: which method, from `td_plugin.recipes` or composed.
        sparsity_level: γ in [0, 1) of every pool, but for what the config of `prepare` or the recipe (2:4) says; None:
            0.5, or 0 where training needs no γ, so that evaluation is dense (`dropconnect`).
        seed: of the draws.
        eval_mask: ``"pruned"``: evaluation drops all candidates; ``"expected"``: it, and `squash_mask`, drops the share
            γ·α that training does on average (as tensor2tensor); ``"dense"``: it drops nothing.
        refresh_every: rank anew in every n-th step only, and in the first after `state_dict`, so that a resumed run
            does the same; in between the thresholds stay and the number of candidates drifts.
        rank_policy: of several processes: ``"shared"``: all drop the same; ``"independent"``: each draws its own masks.
            Evaluation is the same on all.
        agree_every: of several processes: in the first step and every n-th they compare what must be the same on all,
            and all raise if it is not; 0: never.

    Raises:
        TdError: γ outside [0, 1), an unknown `eval_mask` or `rank_policy`, `refresh_every` below 1,
            `agree_every` below 0.
    """

    def __init__(  # noqa: PLR0913 - all but the first two are options, by name only
        self,
        recipe: Recipe,
        sparsity_level: float | None = None,
        *,
        seed: int = 0,
        eval_mask: EvalMask = "pruned",
        refresh_every: int = 1,
        rank_policy: RankPolicy = "shared",
        agree_every: int = 100,
    ) -> None:
        if not isinstance(recipe, Recipe):
            raise TdError("not a recipe", got=repr(recipe), fix="for example td_plugin.recipes.targeted_weight()")
        self._switches = Switches(seed, eval_mask, refresh_every, rank_policy, agree_every)
        self._targets: list[Target] = []
        self._skipped: dict[str, str] = {}
        self._final_report: SparsityReport | None = None
        self._training = Training(recipe, [])
        self.model: nn.Module | None = None
        self.recipe = recipe
        self._driven, self.step_count, self.micro_step, self._accumulation = False, 0, 0, Accumulation()
        super().__init__({"sparsity_level": recipe.level(sparsity_level), "drop_rate": recipe.drop_rate})

    def __getstate__(self) -> dict[str, Any]:
        # A torch.ao scheduler replaces `step` by a wrapper tied to this very object: a copy must not carry it.
        return {key: value for key, value in self.__dict__.items() if key != "step"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._claim()

    def __repr__(self) -> str:
        prepared = f"{len(self.groups)} targets" if self.groups else "not prepared"
        return f"TargetedDropout({self.recipe.name}, {self.defaults}, step={self.step_count}, {prepared})"

    @property
    def seed(self) -> int:
        """Of the draws."""
        return self._switches.seed

    @property
    def remembers(self) -> bool:
        """Whether weights and step do not say all: `state_dict` must go into a checkpoint for a run to resume."""
        return any(remembers(target) for target in self._targets)

    @property
    def state(self) -> dict[str, dict[str, Tensor]]:
        """torch.ao's view: fully qualified tensor name -> ``{"mask": ...}``, the deterministic keep-mask, fresh."""
        return merged_masks(self._targets)

    @state.setter
    def state(self, value: dict[str, Any]) -> None:
        if value:  # the base class assigns an empty dict
            raise TdError("masks are derived from the weights and cannot be assigned", fix="use load_state_dict")

    def prepare(
        self, model: nn.Module, config: Config = None, *, example_inputs: Inputs = None, groups: Groups = None
    ) -> None:
        """Choose the targets and put masks on them, in place. Nothing is dropped before the first `step()`.

        Args:
            model: any module; its parameters keep their names, order and identity.
            config: list of ``{"tensor_fqn": ..., "sparsity_level": ..., "drop_rate": ...}``, the last two optional, a
                function that makes it of `model`, or patterns (`td_plugin.Layers`); None takes all the recipe can drop
                (`td_plugin.selection.select` says what is left out).
            example_inputs: as the model is called, by name, for `td_plugin.structure.survey`, which finds the units.
            groups: units given by hand, in place of those that `survey` finds.

        Raises:
            TdError: a second `prepare`, a model that carries masks already, a wrong name or group, nothing to prune.
        """
        if self.groups:
            raise TdError("prepare() was called before", got=f"{len(self.groups)} targets", fix="squash_mask() first")
        refuse_masked(model)
        selection = select(model, self.recipe, config, example_inputs, groups)
        self.model, self._skipped, self._final_report = model, selection.skipped, None
        self._accumulation = Accumulation()
        self._targets = make_targets(model, self.recipe, selection.choices, self.defaults, self._switches)
        self.groups = [target.config for target in self._targets]
        self._training = Training(self.recipe, [(target.members, target.gate) for target in self._targets])
        self._claim()
        learns = [any(m.parameter.requires_grad for m in target.members if m.ranked) for target in self._targets]
        names = [choice.ranked[0].fqn for choice in selection.choices]
        warn_of_frozen(list(zip(names, learns, strict=True)), model)
        warn_of_stuck_units([choice.ranked[0].fqn for choice in selection.choices if not choice.removable], model)

    def _claim(self) -> None:
        for target in self._targets:
            target.claim(self)
        self._training.listen()

    def update_mask(self, module: nn.Module, tensor_name: str, target: Target, **config: Any) -> None:  # type: ignore[override]
        """Rank and draw one target; torch.ao's hook, called by `step()` with the group's config."""
        target.draw(self.step_count, self.micro_step, fresh=True)

    def squash_mask(
        self,
        params_to_keep: tuple[str, ...] | None = None,
        params_to_keep_per_layer: dict[str, tuple[str, ...]] | None = None,
    ) -> None:
        """Zero what the deterministic mask drops, never a sample, and give every module its class back. Idempotent.

        Args:
            params_to_keep: torch.ao's: keys of the group's config to leave on the module as `sparse_params`.
            params_to_keep_per_layer: the same by module name.

        Raises:
            TdError: an unknown key; weights with NaN. The model is unchanged then.
        """
        if self._final_report is not None and not self.groups:
            return
        kept = kept_params(self.groups, params_to_keep, params_to_keep_per_layer)
        self._final_report = squash(self, self._prepared(), self._targets, kept)
        self._training.close()
        self.groups, self._targets = [], []

    def state_dict(self) -> dict[str, Any]:
        """A snapshot, JSON-able: the step, the seed, every group's γ and α, what a recipe remembers, a held mask.

        Raises:
            TdError: inside of `training_step`.
        """
        position, self._switches.refresh_now = self._accumulation.snapshot(), True
        return {**snapshot(self, self._targets), "accumulation": position}

    def load_state_dict(self, state_dict: dict[str, Any], strict: bool = True) -> None:
        """Go on where `state_dict()` was taken. Load the model's weights first: the masks are drawn from them.

        In the middle of an accumulation the gradients, which nobody else keeps, are yours to save and to load first.

        Args:
            state_dict: left unchanged.
            strict: raise when the groups differ; else those in common are loaded and the others named in a warning.

        Raises:
            TdError: not prepared, inside of `training_step`, no state of ours, or (strict) other groups or another
                recipe.
        """
        self._prepared()
        self._accumulation.refuse_inside("load_state_dict()", "load between two blocks")
        restore(self._targets, self.recipe.name, state_dict, strict)
        self._switches.seed, self._switches.refresh_now = int(state_dict["seed"]), True
        self.enable_mask_update = bool(state_dict["enable_mask_update"])
        self.step_count, self.micro_step = int(state_dict["step_count"]), int(state_dict["micro_step"])
        self._accumulation.restore(state_dict.get("accumulation", {}))
        self._draw_again()

    def report(self) -> SparsityReport:
        """What the deterministic masks drop, per target and in total; after `squash_mask` the last one."""
        if self._final_report is not None and not self.groups:
            return self._final_report
        self._prepared()
        rows = tuple(row_of(target) for target in self._targets)
        return SparsityReport(self.recipe.name, self.step_count, rows, dict(self._skipped))
