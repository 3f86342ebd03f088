"""Evidence from the user's own training steps: gradients and activations, gathered without touching the loss.

What a `Measured` criterion needs is gathered by hooks while the user's forwards and backwards run:

* `observers.Products` (Taylor, movement) sees the gradient of the *masked* weight before it is masked, so it knows that
  of dropped weights too: without it nothing that was dropped could ever come back. The mask of a layer under
  observation is applied by autograd's own operations, not by `td_plugin.masked_linear`.
* `observers.Examples` (Fisher) tells the examples of a batch apart, from what a layer reads and the gradient of what it
  writes. The gradient of a dropped weight is known as well. A unit is seen in the steps that keep it, through what its
  consumers read.
* `observers.Activity` (ARD) sees what a layer reads.

A step ends when the masks are drawn for the next one; gradients of its micro-batches add up until then, so it makes no
difference how a batch is cut. Losses may be divided by the number of micro-batches: all scores get the same factor.
Gradients under a `GradScaler` have a factor that changes: `use_scaler` takes it off; under the Trainer nothing is to be
done. With several processes the sums are joined where a step ends. Before the first step has ended nothing is dropped.

Cost: 4 bytes per weight (per unit, for units) for the total and 4 for the step that runs; Fisher of layers that read
sequences or images takes one product per example in place of one per batch. Activation checkpoints do not save the
inputs that are looked at. `torch.compile` does not run these hooks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from td_plugin.contract import Evidence, Measured, Recipe
from td_plugin.errors import TdError
from td_plugin.mask import TensorMask
from td_plugin.members import Member
from td_plugin.running import RULES, Running, processes
from td_plugin.units import Slice

if TYPE_CHECKING:
    from td_plugin.sparsifier import TargetedDropout


class Scaler(Protocol):
    """`torch.amp.GradScaler`, as far as it is needed here."""

    def get_scale(self) -> float:
        """What the loss is multiplied by before the backward."""
        ...


@dataclass
class Sight:
    """What all observers of one sparsifier share.

    Attributes:
        scaler: of the user's mixed-precision loop; None if gradients come as they are.
        seen: whether any of them has seen anything.
        observers: in the order of the targets.
    """

    scaler: Scaler | None = None
    seen: bool = False
    observers: list[Observer] = field(default_factory=list)

    def begin(self) -> None:
        """Nothing has been seen of a model that is prepared now."""
        self.seen, self.observers = False, []

    @property
    def scale(self) -> float:
        """What gradients have been multiplied by."""
        return 1.0 if self.scaler is None else float(self.scaler.get_scale())


@dataclass(frozen=True)
class Scene:
    """The tensors of one target, as an observer sees them.

    Attributes:
        recipe: its criterion is `Measured`.
        members: masked ones, ranked ones first.
        masks: of the members.
        readers: the modules that read the units, with the slice of their weight that does; empty for single weights.
        units: how many there are; 0 for single weights.
    """

    recipe: Recipe
    members: Sequence[Member]
    masks: Sequence[TensorMask]
    readers: Sequence[tuple[nn.Module, Slice]]
    units: int

    @property
    def first(self) -> Member:
        """The first ranked member; the only one for single weights."""
        return self.members[0]

    @property
    def measured(self) -> Measured:
        """The criterion."""
        if not isinstance(self.recipe.criterion, Measured):
            raise TdError("the criterion needs no evidence", where=self.first.fqn, got=self.recipe.name)
        return self.recipe.criterion

    @property
    def shape(self) -> torch.Size:
        """Of the evidence."""
        return torch.Size([self.units]) if self.units else self.first.parameter.shape


class Observer(ABC):
    """Gathers the evidence of one target.

    Attributes:
        running: the sums.
    """

    gradients = True

    def __init__(self, scene: Scene, sight: Sight, shape: torch.Size | None = None) -> None:
        self.scene, self.sight = scene, sight
        self.running = Running(RULES[scene.measured.need], scene.measured.decay, shape or scene.shape)
        self._waited = 0
        sight.observers.append(self)

    @abstractmethod
    def listen(self) -> None:
        """Put the hooks on; once more after a deep copy, whose hooks are deaf."""

    def flush(self) -> None:  # noqa: B027 (most have nothing to do)
        """Put what a micro-batch has left into the sum of the step."""

    def shaped(self, value: Tensor) -> Tensor:
        """The evidence as its criterion takes it."""
        return value

    @property
    def ready(self) -> bool:
        """Whether there is evidence."""
        return self.running.value is not None

    @property
    def version(self) -> int:
        """Changes when the evidence does."""
        return self.running.version

    def evidence(self, seed: int) -> Evidence:
        """What the criterion looks at: the weight, or the gates of the units, and what has been gathered."""
        scene = self.scene
        weight = scene.first.parameter.detach()
        if scene.units:
            weight = torch.ones(scene.units, device=weight.device)
        value, need = self.running.value, scene.measured.need
        value = None if value is None else self.shaped(value.to(weight.device))
        return Evidence(
            weight,
            scene.first.fqn,
            seed,
            squared_gradient=value if need == "squared_gradient" else None,
            squared_product=value if need == "squared_product" else None,
            movement=value if need == "movement" else None,
            activation=value if need == "activation" else None,
        )

    def end_step(self, alone: bool = False) -> None:
        """The step is over: its sums go into the totals.

        Args:
            alone: this process asks by itself, as in an evaluation; with several processes nothing happens then.
        """
        if not alone or processes() == 1:
            self.flush()
            self.running.fold(self.scene.first.parameter.device)

    def begin_step(self) -> None:
        """`end_step` of all, before masks are drawn for the next.

        Raises:
            TdError: a step has gone by and no gradient has come.
        """
        if self is self.sight.observers[0]:  # all of them first: a γ for all tensors needs the evidence of all
            for observer in self.sight.observers:
                observer.end_step()
        self._waited += 1
        frozen = self.gradients and not any(member.parameter.requires_grad for member in self.scene.members)
        if not self.ready and (frozen or (self._waited > 1 and not self.sight.seen)):
            self.require()

    def require(self) -> None:
        """End the step that runs; there must be evidence then.

        Raises:
            TdError: there is none.
        """
        self.end_step()
        if self.ready:
            return
        frozen = not any(member.parameter.requires_grad for member in self.scene.members)
        what = "gradients" if self.gradients else "activations"
        raise TdError(
            f"{self.scene.recipe.name} ranks by {what}, and none has come",
            where=self.scene.first.fqn,
            got="the tensor is frozen" if frozen and self.gradients else "no training forward and backward reached it",
            fix="unfreeze it, or leave it out of the config"
            if frozen and self.gradients
            else "after step(): forward in training mode and loss.backward(); a layer that never runs: leave it out",
        )

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on from what `snapshot` gave.

        Raises:
            TdError: damaged, or of another tensor.
        """
        self.running.restore(saved, self.scene.first.fqn)

    def snapshot(self) -> dict[str, Any]:
        """JSON-able. Ends the step that runs: with several processes, all must call it."""
        self.end_step()
        return self.running.snapshot()


def evidence_of(sparsifier: TargetedDropout) -> dict[str, Evidence]:
    """What has been gathered so far, by target name; the step that runs is ended.

    Raises:
        TdError: not prepared, a recipe that needs no evidence, or a target that has none.
    """
    observers = {target.name: target.observer for target in sparsifier._targets}
    if not observers or None in observers.values():
        raise TdError("the sparsifier gathers no evidence", got=repr(sparsifier), fix="prepare it with fisher()")
    found = {}
    for name, observer in observers.items():
        if observer is not None:
            observer.require()
            found[name] = observer.evidence(sparsifier.seed)
    return found


def use_scaler(sparsifier: TargetedDropout, scaler: Scaler) -> None:
    """For loops with a `torch.amp.GradScaler`: gradients are divided by what it multiplies the loss by, from now on."""
    sparsifier._switches.sight.scaler = scaler
