"""A target: the tensors whose groups are ranked, dropped and kept together; one entry of `sparsifier.groups`."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from td_plugin.choices import Choice
from td_plugin.contract import Evidence, Recipe, check_fraction
from td_plugin.errors import TdError
from td_plugin.masks import bottom_k, draw, draw_key
from td_plugin.members import Member, holders_of, members_of
from td_plugin.parametrization import Mask, attach
from td_plugin.report import SparsityRow
from td_plugin.units import Slice


@dataclass
class Switches:
    """What all targets of one sparsifier share; plain flags, so that a deep copy of the model keeps its own."""

    seed: int = 0
    dense: bool = False
    dense_eval: bool = False


class Target:
    """Ranks the groups of its members, draws which candidates are dropped, and keeps their masks up to date.

    Attributes:
        config: the live entry of `sparsifier.groups`; schedulers write `sparsity_level` into it.
        members: the masked ones, ranked ones first.
        owner: the sparsifier, weakly.
    """

    def __init__(self, recipe: Recipe, config: dict[str, Any], members: list[Member], switches: Switches) -> None:
        self.recipe, self.config, self.switches = recipe, config, switches
        self.owner: weakref.ref[object] | None = None
        self.members = [m for m in members if m.masked]
        self._ranked = [m for m in members if m.ranked]
        self._candidates: Tensor | None = None
        self._key: tuple[object, ...] | None = None
        self._generation = 0
        self.masks = [Mask(self, m.fqn) for m in self.members]
        for member, mask in zip(self.members, self.masks, strict=True):
            for module, name in ((member.module, member.slice.tensor), *member.tied):
                attach(module, name, mask)

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
        return self.switches.dense_eval

    def level(self, key: str) -> float:
        """A fraction of the config, checked: schedulers write there without a check of their own."""
        return check_fraction(self.config[key], key, where=self.name)

    @property
    def shipped_level(self) -> float:
        """γ of evaluation and of `squash_mask`: the target where one is set, else what the schedule is at."""
        return self.level("sparsity_level" if self.config["eval_sparsity_level"] is None else "eval_sparsity_level")

    @torch.no_grad()
    def importance(self) -> Tensor:
        """``[pools, groups]`` float32, from the dense weights.

        Raises:
            TdError: an importance is not finite.
        """
        seed = self.switches.seed
        scores = [self.recipe.criterion(Evidence(m.parameter.detach(), m.fqn, seed)) for m in self._ranked]
        groups = self.recipe.granularity.to_groups(scores, [m.slice for m in self._ranked])
        if not torch.isfinite(groups.sum()):  # one pass; a sum of magnitudes hides no NaN
            raise TdError(
                "the weights hold NaN or infinity, so they cannot be ranked",
                where=self.name,
                fix="lower the learning rate or check the loss; the run has diverged",
            )
        return groups

    def _select(self, level: float) -> Tensor:
        """The candidates at `level`, ``[pools, groups]`` bool; recomputed when the weights or the level changed."""
        versions = tuple(0 if p.is_inference() else p._version for p in (m.parameter for m in self._ranked))
        key = (level, versions, tuple(m.parameter.data_ptr() for m in self._ranked))
        if self._candidates is None or key != self._key:
            self._candidates, self._key = bottom_k(self.importance(), level), key
            self._generation += 1
        return self._candidates

    def settle(self) -> int:
        """Bring the candidates up to date; the result changes whenever they are recomputed."""
        self._select(self.shipped_level)
        return self._generation

    def expire(self) -> None:
        """Recompute the candidates when they are next needed."""
        self._key = None

    def keep_mask(self, mask: Mask) -> Tensor:
        """The deterministic keep-mask of one member, bool, broadcastable to it."""
        member = self.members[self.masks.index(mask)]
        with torch.inference_mode(False):  # an inference tensor could not serve a later forward with gradients
            dropped = self._select(self.shipped_level)
            return ~self.recipe.granularity.to_mask(dropped, member.slice, member.parameter.shape)

    def keep_masks(self) -> dict[str, Tensor]:
        """The deterministic keep-mask of every member, of its full shape, by fully qualified tensor name."""
        return {
            m.fqn: self.keep_mask(k).expand(m.parameter.shape) for m, k in zip(self.members, self.masks, strict=True)
        }

    def forget(self) -> None:
        """Derive everything anew when it is next needed: the weights may have been edited unseen."""
        for mask in self.masks:
            mask.train()

    def draw(self, step: int, micro_step: int, fresh: bool) -> None:
        """Replace every member's training mask by a new sample.

        Args:
            step: index of the training step; with `micro_step`, the seed and the name it is the whole state.
            micro_step: index of the forward within the step.
            fresh: rank the weights anew, whatever their version counters say.
        """
        if fresh:
            self.expire()
        candidates = self._select(self.level("sparsity_level"))
        rate = self.level("drop_rate")
        device = candidates.device
        if self.recipe.sampler == "group":
            key = draw_key(self.switches.seed, step, micro_step, self.name)
            candidates = candidates & draw(candidates.shape, rate, key, device)
        for member, mask in zip(self.members, self.masks, strict=True):
            shape = member.parameter.shape
            dropped = self.recipe.granularity.to_mask(candidates, member.slice, shape)
            if self.recipe.sampler == "weight":
                key = draw_key(self.switches.seed, step, micro_step, member.fqn)
                dropped = dropped & draw(shape, rate, key, device)
            mask.keep = ~dropped

    def row(self) -> SparsityRow:
        """What the deterministic mask drops."""
        candidates = self._select(self.shipped_level)
        pairs = [(member.parameter, mask) for member, mask in zip(self.members, self.masks, strict=True)]
        return SparsityRow(
            tensor=self.name,
            kind="units" if self.recipe.granularity.kinds else "weights",
            groups=candidates.numel(),
            dropped=int(candidates.sum()),
            elements=sum(_owned(member) for member in self.members),
            zeros=sum(_zeros(self.keep_mask(mask), parameter) for parameter, mask in pairs),
            sampled=sum(_zeros(mask.keep, parameter) for parameter, mask in pairs if mask.keep is not None),
            sparsity_level=self.config["sparsity_level"],
            drop_rate=self.config["drop_rate"],
        )


def _owned(member: Member) -> int:
    """How many scalars of the tensor belong to the groups: all of it, but for concatenations and packed projections."""
    owners, numel = member.slice.owners, member.parameter.numel()
    return numel * sum(owner >= 0 for owner in owners) // len(owners) if owners else numel


def _zeros(keep: Tensor, parameter: Tensor) -> int:
    # A mask of one entry per unit stands for equally many scalars each.
    return int((~keep).sum()) * parameter.numel() // keep.numel()


def make_targets(
    model: nn.Module, recipe: Recipe, choices: Sequence[Choice], defaults: dict[str, Any], switches: Switches
) -> list[Target]:
    """Put masks on the tensors of `choices`; each config holds torch.ao's keys, the levels now and their targets.

    Args:
        model: the whole model.
        recipe: how to rank and draw.
        choices: from `td_plugin.selection.select`.
        defaults: γ and α where a choice has none of its own.
        switches: shared by all targets of a sparsifier.
    """
    holders = holders_of(model)
    targets = []
    for choice in choices:
        config = _config(model, choice.ranked[0], {**defaults, **choice.overrides})
        targets.append(Target(recipe, config, members_of(model, choice, holders), switches))
    return targets


def _config(model: nn.Module, first: Slice, levels: dict[str, Any]) -> dict[str, Any]:
    return {
        "module": model.get_submodule(first.module),
        "module_fqn": first.module,
        "tensor_name": first.tensor,
        "tensor_fqn": first.fqn,
        "sparsity_level": levels["sparsity_level"],
        "drop_rate": levels["drop_rate"],
        "target_sparsity_level": levels["sparsity_level"],
        "target_drop_rate": levels["drop_rate"],
        "eval_sparsity_level": None,
    }
