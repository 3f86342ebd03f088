"""A target: the tensors whose groups are ranked, dropped and kept together; one entry of `sparsifier.groups`."""

from __future__ import annotations

import weakref
from typing import Any, cast

import torch
from torch import Tensor

from td_plugin.bits import flags_of, pack
from td_plugin.contract import Recipe, check_fraction
from td_plugin.evidence import Observer
from td_plugin.gates.mask import make_masks
from td_plugin.gates.state import GateState
from td_plugin.holding import Held
from td_plugin.mask import TensorMask
from td_plugin.masks import draw
from td_plugin.members import Member, keeps_of
from td_plugin.memory import Memory
from td_plugin.parametrization import attach
from td_plugin.pool import Together
from td_plugin.ranking import Ranking
from td_plugin.switches import Switches

LEVELS = ("sparsity_level", "eval_sparsity_level", "drop_rate", "target_drop_rate")
"""What schedulers and users write into the config of a target."""


class Target:
    """Ranks the groups of its members, draws which candidates are dropped, and keeps their masks up to date.

    Attributes:
        config: the live entry of `sparsifier.groups`; schedulers write `sparsity_level` into it.
        members: the masked ones, ranked ones first.
        owner: the sparsifier, weakly.
        place: its index among the targets.
        memory: what its ranking remembers, for recipes that have it remember.
        together: gives the targets their γ, for recipes with `rates`.
        held: what stays dropped, in training and evaluation, whatever becomes of the weights; None: it is ranked.
        observer: gathers what the criterion needs besides the weights; None for most.
    """

    def __init__(self, recipe: Recipe, config: dict[str, Any], members: list[Member], switches: Switches) -> None:
        self.recipe, self.config, self.switches = recipe, config, switches
        self.owner: weakref.ref[object] | None = None
        self.members = [m for m in members if m.masked]
        ranked = [m for m in members if m.ranked]
        self.place, self.together = 0, cast("Together | None", None)
        self.memory = Memory() if recipe.regrowth < 1 else None
        self.held: Held | None = None
        self._settled_at: tuple[object, ...] = ()
        # Two, because evaluation must not move the thresholds of training.
        self._sampled = Ranking(recipe, ranked, self.memory, learns=True)
        self._shipped = Ranking(recipe, ranked, self.memory, learns=False)
        self.gate = None if recipe.gate is None else GateState(recipe.gate, members, bool(recipe.granularity.kinds))
        self._sampled.gate = self._shipped.gate = self.gate
        self.masks = make_masks(self, recipe, self.members, self.gate)
        for member, mask in zip(self.members, self.masks, strict=True):
            for module, name in ((member.module, member.slice.tensor), *member.tied):
                attach(module, name, mask)
        self.observer: Observer | None = None

    def watch(self, observer: Observer | None) -> None:
        """Rank by what `observer` gathers, too."""
        self.observer = self._sampled.observer = self._shipped.observer = observer

    def claim(self, owner: object) -> None:
        """Belong to the sparsifier `owner`, whose training is observed from here on."""
        self.owner = weakref.ref(owner)
        if self.observer is not None:
            self.observer.listen()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "owner": None}

    @property
    def name(self) -> str:
        """Fully qualified name of the first ranked tensor."""
        return self.members[0].fqn

    @property
    def dense(self) -> bool:
        """Whether masks are switched off."""
        return self.switches.dense

    @property
    def dense_eval(self) -> bool:
        """Whether evaluation runs the dense model."""
        return self.switches.eval_mask == "dense"

    def level(self, key: str) -> float:
        """A fraction of the config, checked: schedulers write there without a check of their own."""
        closed = key.endswith("drop_rate") and not self.recipe.uninformed
        return check_fraction(self.config[key], key, self.name, closed)

    def asked(self, training: bool) -> float:
        """γ of the config: of training, or of what ships, which is the target where that has been chosen."""
        aimed = not training and self.config["eval_sparsity_level"] is not None
        level = self.level("eval_sparsity_level" if aimed else "sparsity_level")
        if training or self.switches.eval_mask != "expected":
            return level
        return level * self.level("target_drop_rate" if aimed else "drop_rate")

    def ranking(self, training: bool) -> Ranking:
        """The ranking of training, or of what ships."""
        return self._sampled if training else self._shipped

    def gamma(self, training: bool, hold: bool = False) -> float:
        """Where the pools are cut: what is asked for, or this target's share of what all are asked for together."""
        asked = self.asked(training)
        if self.together is None or (hold and self._sampled.settled):
            return asked
        if self.memory is not None and self._final(asked):
            return self.memory.share
        return self.together.level(self, training, self.switches.seed)

    def _final(self, asked: float) -> bool:
        """Whether nothing that was dropped comes back, so that nothing more goes before γ moves."""
        return self.memory is not None and self.recipe.regrowth == 0 and self.memory.asked == asked

    def settle(self) -> int:
        """Bring the shipped candidates up to date; the result changes whenever they are found anew."""
        if self.held is not None:
            return -id(self.held)
        # What has been compared once need not be computed again: a token asks this of every layer.
        levels = (*map(self.config.get, LEVELS), self.switches.eval_mask, self.switches.seed)
        if levels != self._settled_at or self.together is not None or not self._shipped.unchanged():
            self._shipped.cut(self.gamma(False), self.switches.seed)
            self._settled_at = levels
        return self._shipped.generation

    def expire(self, training: bool = False) -> None:
        """Find the shipped candidates, or those of training, anew when they are next needed."""
        self.ranking(training).expire()
        if self.together is not None:
            self.together.expire(self, training)

    def keep_mask(self, mask: TensorMask) -> Tensor:
        """The deterministic keep-mask of one member, as `masking.select` takes it."""
        with torch.inference_mode(False):  # an inference tensor could not serve a later forward with gradients
            return self.shipped()[self.masks.index(mask)]

    def shipped(self) -> list[Tensor]:
        """Every member's deterministic keep-mask, as `masking.select` takes it."""
        if self.held is not None:
            return keeps_of(self.members, self.recipe.granularity, self.candidates())
        return self._keeps(self._shipped, self.gamma(False), False, 1.0, 0)

    def candidates(self) -> Tensor:
        """``[pools, groups]`` bool, what evaluation drops."""
        if self.held is not None:
            return self.held.dropped(self.members[0].parameter.device)
        level, seed = self.gamma(False), self.switches.seed
        return self._shipped.candidates(self._shipped.cut(level, seed), seed)

    def hold(self, held: Held) -> None:
        """Drop just `held` from here on, in training and evaluation, until `release`."""
        self.held, self.config["drop_rate"] = held, 1.0
        self.forget()
        for mask, keep in zip(self.masks, self.shipped(), strict=True):
            mask.keep, mask.scale = keep, 1.0

    def _follow_device(self, held: Held) -> None:
        """Hold again, if the model has moved."""
        if self.masks[0].keep is None or self.masks[0].keep.device != self.members[0].parameter.device:
            self.hold(held)

    def release(self) -> None:
        """Rank again, if the mask is held."""
        if self.held is not None:
            self.held, self.config["drop_rate"] = None, self.config["target_drop_rate"]
            self.forget()

    def _keeps(self, ranking: Ranking, level: float, hold: bool, rate: float, key: int) -> list[Tensor]:
        """Every member's keep-mask when the draw `key` drops candidates at `rate`, as `masking.select` takes it."""
        seed = self.switches.seed
        kept = ranking.sample(level, seed, hold, rate, key)
        if kept is not None:
            return [kept]
        dropped = ranking.candidates(ranking.cut(level, seed, hold), seed)
        if rate < 1:
            dropped = dropped & draw(dropped.shape, rate, key, dropped.device)
        return keeps_of(self.members, self.recipe.granularity, dropped)

    def keep_masks(self) -> dict[str, Tensor]:
        """The deterministic keep-mask of every member, of its full shape, by fully qualified tensor name."""
        return {
            m.fqn: flags_of(self.keep_mask(k), m.parameter.shape).expand(m.parameter.shape)
            for m, k in zip(self.members, self.masks, strict=True)
        }

    def forget(self) -> None:
        """Derive everything anew when it is next needed: the weights may have been edited unseen."""
        for mask in self.masks:
            mask.train()

    def finish(self) -> None:
        """`forget`, before the masks are baked in; a `TdError` if weights hold NaN or the evidence has never come."""
        if self.observer is not None:
            self.observer.require()
        self.forget()
        if self.held is not None:
            self._shipped.importance(self.switches.seed)

    def draw(self, step: int, micro_step: int, fresh: bool, learn: bool = True) -> None:
        """Replace every member's training mask by a new sample.

        Args:
            step: index of the training step; with `micro_step`, the seed and the name it is the whole state.
            micro_step: index of the forward within the step.
            fresh: rank the weights anew, whatever their version counters say.
            learn: whether the ranking may remember what it finds. After a restore it has yet to be made by `step`.
        """
        if self.gate is not None:
            self.gate.draw(self.switches.key(step, micro_step, self.name, "gate"))
        if fresh and learn and self.observer is not None:
            self.observer.begin_step()
        if self.held is not None:
            self._follow_device(self.held)
            return
        every, rate = self.switches.refresh_every, self.level("drop_rate")
        never = rate == 0 and self.level("target_drop_rate") == 0
        if never or (rate == 1 and self._sampled.settled and self._final(self.asked(True))):
            return  # no mask and no ranking, or the masks stay as they are
        # After a state was taken every draw ranks anew: what a resumed run ranks first is what is found here.
        if self.switches.refresh_now or (fresh and step % every == 0):
            self.expire(training=True)
        self._sampled.learns = learn
        level = 1.0 if self.recipe.uninformed else self.gamma(True, every > 1)
        key = self.switches.key(step, micro_step, self.name)
        by_group, before = self.recipe.sampler != "weight", self._sampled.generation
        keeps = self._keeps(self._sampled, level, every > 1, rate if by_group else 1.0, key)
        if self.memory is not None and self._sampled.generation != before and learn:
            self.memory.asked = self.asked(True)
        for member, mask, keep in zip(self.members, self.masks, keeps, strict=True):
            mask.keep = keep
            if not by_group:
                key, shape = self.switches.key(step, micro_step, member.fqn), member.parameter.shape
                mask.keep = pack(flags_of(keep, shape) | ~draw(shape, rate, key, keep.device))
            if self.recipe.uninformed and member.module is self.members[-1].module:
                mask.scale = 1.0 / (1.0 - rate)
