"""The observers of `td_plugin.evidence`: gradients of weights, of single examples, and activations."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from td_plugin.contract import Measured, Need, Recipe
from td_plugin.errors import TdError
from td_plugin.evidence import Observer, Scene, Sight
from td_plugin.hooks import After, Before, listen
from td_plugin.mask import Mask, TensorMask
from td_plugin.members import Member
from td_plugin.per_example import (
    by_unit,
    channel_dim,
    check_layer,
    gate_gradients,
    is_convolution,
    is_linear,
    is_transposed,
    squared_gradients,
)
from td_plugin.units import Slice


def _over(tensor: Tensor, dim: int) -> Tensor:
    """``[*w] -> [entries]``: the sum over all dimensions but `dim`."""
    rest = [d for d in range(tensor.dim()) if d != dim % tensor.dim()]
    return tensor.sum(rest) if rest else tensor


class Products(Observer):
    """``Σ w·g`` of the step, g the gradient of the masked weight; of a unit the sum over all its tensors."""

    def listen(self) -> None:
        """Have the masks show the gradients of their values."""
        for index, mask in enumerate(self.scene.masks):
            if not isinstance(mask, Mask):
                fix = "a gate has an importance of its own: leave the criterion at magnitude"
                raise TdError("the gradient behind a gate is not that of the weight", where=mask.fqn, fix=fix)
            mask.observe = partial(self._saw, index)

    def _saw(self, index: int, grad: Tensor) -> None:
        member, units = self.scene.members[index], self.scene.units
        product = member.parameter.detach().float() * grad.detach().float() / self.sight.scale
        if units:
            product = by_unit(_over(product, member.slice.dim), member.slice, units)
            product = product.to(self.scene.first.parameter.device)
        self.sight.seen = True
        self.running.add(product)


class Examples(Observer):
    """Sum over examples of the squared gradient of a weight."""

    def listen(self) -> None:
        """Look at what the layer reads and at the gradient of what it writes."""
        listen(self.scene.first.module, After(self._forward))

    def _forward(self, x: Tensor, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(partial(self._saw, x.detach()))  # type: ignore[no-untyped-call]

    def _saw(self, x: Tensor, grad: Tensor) -> None:
        if x.dim() == 1:  # one example, without a batch
            x, grad = x.unsqueeze(0), grad.unsqueeze(0)
        of_examples = grad.detach().float() * (len(grad) / self.sight.scale)
        self.sight.seen = True
        self.running.add(squared_gradients(self.scene.first.module, x, of_examples), float(len(grad)))


class GatesOfExamples(Observer):
    """Sum over examples of the squared gradient of a unit's gate, from what the layers that read the units read.

    Where they are not known, from what the layers that compute the units write. Examples are counted in the
    micro-batches that keep the unit: what is silent has no gradient there, and keeps its evidence.
    """

    def __init__(self, scene: Scene, sight: Sight) -> None:
        super().__init__(scene, sight)
        self._readers = [
            (module, part) for module, part in scene.readers if is_linear(module) or is_convolution(module)
        ]
        self._gates: Tensor | None = None
        self._kept: Tensor | None = None

    def listen(self) -> None:
        """Look at what is read, or written, and at its gradient."""
        for module, part in self._readers:
            listen(module, Before(partial(self._before, channel_dim(module), part)))
        for member in () if self._readers else self.scene.members:
            if member.ranked:
                listen(member.module, After(partial(self._after, channel_dim(member.module), member.slice)))

    def _before(self, dim: int, part: Slice, x: Tensor) -> Tensor:
        # Other readers of the same tensor have gradients of their own.
        return self._look(dim, part, x.view_as(x)) if self._fits(dim, part, x) else x

    def _after(self, dim: int, part: Slice, _: Tensor, output: Tensor) -> None:
        if self._fits(dim, part, output):
            self._look(dim, part, output)

    def _fits(self, dim: int, part: Slice, value: Tensor) -> bool:
        if not value.requires_grad or value.dim() < 2:
            return False
        entries = value.shape[dim]
        whole = entries % part.span == 0 and entries // part.span <= self.scene.units
        return entries == len(part.owners) if part.owners else whole

    def _look(self, dim: int, part: Slice, value: Tensor) -> Tensor:
        if self._gates is not None:  # of an earlier micro-batch
            self.flush()
        look = partial(self._saw, dim, part, value.detach(), self._kept_units())
        value.register_hook(look)  # type: ignore[no-untyped-call]
        return value

    def _kept_units(self) -> Tensor:
        """``[units]`` float32: 1 where the masks of this micro-batch keep the unit."""
        member, keep = self.scene.first, self.scene.masks[0].keep
        device = member.parameter.device
        if keep is None or keep.dtype == torch.uint8:  # nothing is dropped, or single weights of the units are
            return torch.ones(self.scene.units, device=device)
        return (by_unit(keep.flatten().float().to(device), member.slice, self.scene.units) > 0).float()

    def _saw(self, dim: int, part: Slice, value: Tensor, kept: Tensor, grad: Tensor) -> None:
        entries = gate_gradients(value, grad.detach().float() * (len(grad) / self.sight.scale), dim)
        gates = by_unit(entries, part, self.scene.units).to(kept.device)
        fits = self._gates is not None and len(self._gates) == len(gates)
        self._gates = gates + self._gates if fits and self._gates is not None else gates
        self._kept, self.sight.seen = kept, True

    def flush(self) -> None:
        """Square what all readers have given for each example."""
        if self._gates is not None and self._kept is not None:
            self.running.add(self._gates.square().sum(0) * self._kept, self._kept * len(self._gates))
        self._gates, self._kept = None, None


class Activity(Observer):
    """Sum over examples and positions of the magnitude of what a layer reads."""

    gradients = False

    def __init__(self, scene: Scene, sight: Sight) -> None:
        weight = scene.first.parameter
        module = scene.first.module
        self._groups = module.groups if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) else 1
        inputs = weight.shape[0 if is_transposed(scene.first.module) else 1] * self._groups
        super().__init__(scene, sight, torch.Size([inputs]))

    def listen(self) -> None:
        """Look at what the layer reads."""
        listen(self.scene.first.module, After(self._saw))

    def _saw(self, x: Tensor, _: Tensor) -> None:
        dim = channel_dim(self.scene.first.module)
        self.sight.seen = True
        self.running.add(_over(x.detach().float().abs(), dim), x.numel() / x.shape[dim])

    def shaped(self, value: Tensor) -> Tensor:
        """``[inputs]``, broadcastable to the weight."""
        module, weight = self.scene.first.module, self.scene.first.parameter
        if is_transposed(module):
            return value.unsqueeze(1)
        if is_linear(module):
            return value
        rows = value.view(self._groups, -1).repeat_interleave(weight.shape[0] // self._groups, 0)
        return rows.view(*rows.shape, *[1] * (weight.dim() - 2))


class _Makes(Protocol):
    def __call__(self, scene: Scene, sight: Sight) -> Observer: ...


_WEIGHTS: dict[Need, _Makes] = {
    "squared_gradient": Examples,
    "squared_product": Products,
    "movement": Products,
    "activation": Activity,
}
_UNITS: dict[Need, _Makes] = {**_WEIGHTS, "squared_gradient": GatesOfExamples}


def observer_of(
    recipe: Recipe,
    members: Sequence[Member],
    masks: Sequence[TensorMask],
    readers: Sequence[tuple[nn.Module, Slice]],
    sight: Sight,
) -> Observer | None:
    """What gathers the evidence that the recipe's criterion needs for one target; None if the weights are enough.

    Raises:
        TdError: a layer that cannot be looked at.
    """
    if not isinstance(recipe.criterion, Measured):
        return None
    units = 0
    if recipe.granularity.kinds:
        ranked = [member for member in members if member.ranked]
        weights = [member.parameter.detach() for member in ranked]
        units = recipe.granularity.to_groups(weights, [member.slice for member in ranked]).shape[1]
    scene = Scene(recipe, members, masks, readers, units)
    return (_UNITS if units else _WEIGHTS)[recipe.criterion.need](scene, sight)


def refuse_unseen(recipe: Recipe, members: Sequence[Member]) -> None:
    """Refuse a target that the observer of the recipe's criterion could not look at; before anything is masked.

    Raises:
        TdError: one of its ranked layers is neither linear nor a convolution.
    """
    if isinstance(recipe.criterion, Measured) and recipe.criterion.need in ("squared_gradient", "activation"):
        for member in members:
            if member.ranked and member.masked:
                check_layer(member.module, member.fqn, recipe.name)
