"""The candidates of one target: found where its pools are cut, and kept as that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from td_plugin import kernels
from td_plugin.bits import pack, unpack
from td_plugin.contract import Evidence, Recipe
from td_plugin.criteria import magnitude
from td_plugin.errors import TdError
from td_plugin.evidence import Observer
from td_plugin.gates.state import GateState
from td_plugin.masks import Cut, cut
from td_plugin.members import Member
from td_plugin.memory import Memory
from td_plugin.sharded import is_sharded, version, whole

T = TypeVar("T")
Seen = tuple[dict[str, nn.Parameter | None], str, nn.Parameter, int, int]
"""Where a parameter is held, its name there, itself, its version and its place in memory."""


class Ranking:
    """Ranks the groups of a target's members and remembers where the candidates end, until the weights change.

    For single weights only the thresholds are kept, a few bytes per pool, and the set is derived when asked for; for
    units the set itself, one flag per unit.

    Attributes:
        generation: counts how often the candidates were found anew.
        memory: what training dropped last, for recipes that remember it; None for the others.
        learns: whether what is found here goes into `memory`, as it does in training.
        observer: has the evidence that the criterion needs besides the weights; None for most. As long as it has none,
            there are no candidates.
    """

    def __init__(self, recipe: Recipe, members: Sequence[Member], memory: Memory | None, learns: bool) -> None:
        self.gate: GateState | None = None
        self._recipe, self._members = recipe, members
        self.memory, self.learns = memory, learns
        self.observer: Observer | None = None
        self._cut: Cut | None = None
        self._found: Tensor | None = None
        self._key: tuple[object, ...] | None = None
        self._seen: list[Seen] | None = None
        self.generation = 0

    def expire(self) -> None:
        """Find the candidates anew when they are next needed."""
        self._key = self._seen = None

    def unchanged(self) -> bool:
        """Whether weights alone decide, and are what they were when candidates were found. False: ask `cut`.

        `cut` finds out, too, at several times the price; this is asked for every layer and generated token.
        """
        if self._key is None or self._seen is None:
            return False
        for parameters, name, parameter, count, place in self._seen:
            if parameters.get(name) is not parameter or parameter._version != count or parameter.data_ptr() != place:
                return False
        return True

    def _look(self) -> list[Seen] | None:
        """What `unchanged` compares with; None where more than plain weights decides, and in training: they change."""
        if self.learns or self.gate is not None or self.observer is not None or self.memory is not None:
            return None
        seen: list[Seen] = []
        for member in self._members:
            parameters, name, parameter = member.module._parameters, member.slice.tensor, member.parameter
            if parameters.get(name) is not parameter or is_sharded(parameter) or parameter.is_inference():
                return None
            seen.append((parameters, name, parameter, *version(parameter)))
        return seen

    @torch.no_grad()
    def importance(self, seed: int) -> Tensor:
        """``[pools, groups]`` float32, from the dense weights.

        Raises:
            TdError: an importance is not finite.
        """
        if self.observer is not None and self.observer.ready and self.observer.scene.units:
            groups = self._recipe.criterion(self.observer.evidence(seed)).unsqueeze(0)
        else:
            scores = [self._score(member, seed) for member in self._members]
            if self.gate is not None and not self.gate.per_unit:
                scores = [self.gate.importance(score) for score in scores]
            groups = self._recipe.granularity.to_groups(scores, [m.slice for m in self._members])
        if self.gate is not None and self.gate.per_unit:
            groups = self.gate.importance(groups)
        if not torch.isfinite(groups.sum()):  # one pass; a sum of magnitudes hides no NaN
            raise self._not_finite()
        return groups if self.memory is None else self.memory.handicapped(groups, self._recipe.regrowth)

    def _score(self, member: Member, seed: int) -> Tensor:
        if self._recipe.criterion is magnitude and self._recipe.granularity.kinds:
            return whole(member.parameter)  # the norm of a unit does not see signs: no copy to take them off
        if self.observer is not None:
            ready = self.observer.ready
            return self._recipe.criterion(self.observer.evidence(seed)) if ready else member.parameter.detach().float()
        return self._recipe.criterion(Evidence(whole(member.parameter), member.fqn, seed))

    def mark(self) -> tuple[Tensor | None, ...]:
        """What differs where candidates do: where the pools are cut, and for units which they are."""
        return (*(() if self._cut is None else (self._cut.kth, self._cut.last)), self._found)

    def _rows(self) -> tuple[Tensor, bool] | None:
        """The weights as ``[pools, groups]`` if the compiled loops can rank them as they lie in memory, else None.

        And whether pools lie there as they do in the tensor, one after the other.
        """
        weight, known = whole(self._members[0].parameter), self._recipe.criterion is magnitude
        learned = self.memory is not None or self.gate is not None
        if not known or not self._recipe.granularity.single or learned or not kernels.serves(weight):
            return None
        rows = self._recipe.granularity.to_groups([weight], [self._members[0].slice]).contiguous()
        return rows, rows.data_ptr() == weight.data_ptr()

    def _now(self, level: float, seed: int) -> tuple[object, ...]:
        """What the candidates depend on."""
        # What is learned here is found again from itself.
        remembered = 0 if self.memory is None or self.learns else self.memory.version
        return (level, seed, remembered, self.versions())

    def versions(self) -> tuple[object, ...]:
        """What changes when the weights do."""
        parameters: list[Tensor] = [m.parameter for m in self._members]
        parameters += [] if self.gate is None else [self.gate.phi]
        if self.observer is not None and not self.learns:
            self.observer.end_step(alone=True)  # evaluation sees all that training has seen
        seen = () if self.observer is None else (self.observer.version,)
        return (*seen, *(version(p) for p in parameters))

    @property
    def settled(self) -> bool:
        """Whether candidates have been found since `expire`."""
        return self._key is not None

    def _valid(self, level: float, seed: int, hold: bool) -> bool:
        return self._key is not None and (hold or self._key == self._now(level, seed))

    def _keep(self, found: Cut, level: float, seed: int) -> Cut:
        self._cut, self._key, self._seen = found, self._now(level, seed), self._look()
        self.generation += 1
        return found

    def cut(self, level: float, seed: int, hold: bool = False) -> Cut:
        """Where the candidates at `level` end.

        Args:
            level: γ.
            seed: of criteria that are random.
            hold: go on with the cut that was found last, whatever has become of the weights, until `expire`.

        Raises:
            TdError: an importance is not finite.
        """
        if self.observer is not None:
            self.versions()
            level = level if self.observer.ready else 0.0
        if self._cut is not None and self._valid(level, seed, hold):
            return self._cut
        found_rows = self._rows()
        if found_rows is None:
            importance = self.importance(seed)
            found = kernels.cut_importances(importance, level, self._cut) or cut(importance, level)
            self._found = self._with_closed(found.candidates(importance), importance)
            if self.memory is not None and self.learns:
                self.memory.set(self._found)
            return self._keep(found, level, seed)
        return self._keep(self._finite(kernels.cut(found_rows[0], level, self._cut)), level, seed)

    def sample(self, level: float, seed: int, hold: bool, rate: float, key: int) -> Tensor | None:
        """What the draw `key` keeps of the tensor, packed, by the compiled loops; None where they do not serve.

        Raises:
            TdError: a weight is not finite.
        """
        found_rows = self._rows()
        if found_rows is None:
            return None
        rows, in_place = found_rows
        if self._cut is not None and self._valid(level, seed, hold):
            kept = kernels.keep(rows, self._cut, rate, key)
        else:
            found, kept = self._finite(kernels.sample(rows, level, self._cut, rate, key))
            self._keep(found, level, seed)
        (member,) = self._members
        if in_place:
            return kept  # pools lie in the tensor one after the other
        return pack(self._recipe.granularity.to_mask(unpack(kept, rows.shape), member.slice, member.parameter.shape))

    def candidates(self, where: Cut, seed: int) -> Tensor:
        """``[pools, groups]`` bool, True = candidate; `where` is what `cut` has just returned."""
        found = self._found
        if not self._recipe.granularity.kinds:
            self._found = None  # good for one use: a flag per weight is not kept
        if found is not None:
            return found
        importance = self.importance(seed)
        return self._with_closed(where.candidates(importance), importance)

    def _with_closed(self, candidates: Tensor, importance: Tensor) -> Tensor:
        """What a gate has closed is 0 in evaluation, whatever γ says."""
        return candidates if self.gate is None else candidates | (importance == 0)

    def _finite(self, found: T | None) -> T:
        if found is None:
            raise self._not_finite()
        return found

    def _not_finite(self) -> TdError:
        return TdError(
            "the weights hold NaN or infinity, so they cannot be ranked",
            where=self._members[0].fqn,
            fix="lower the learning rate or check the loss; the run has diverged",
        )
