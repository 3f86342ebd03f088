"""The learned mask of one tensor: what a layer computes with under a gate."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from td_plugin.contract import Recipe
from td_plugin.gates.spreading import along, spread
from td_plugin.gates.state import GateState
from td_plugin.gates.variational import deviation
from td_plugin.mask import Mask, MaskSource, Product, TensorMask
from td_plugin.masking import select, zero_
from td_plugin.members import Member
from td_plugin.sharded import ShardedMask, is_sharded


class _Through:
    """The source of the mask behind a gate: the target, which knows the gate alone."""

    def __init__(self, source: MaskSource, gate: GateMask) -> None:
        self._source, self._gate = source, gate

    @property
    def dense(self) -> bool:
        return self._source.dense

    @property
    def dense_eval(self) -> bool:
        return self._source.dense_eval

    def settle(self) -> int:
        return self._source.settle()

    def expire(self) -> None:
        self._source.expire()

    def keep_mask(self, mask: TensorMask) -> Tensor:
        return self._source.keep_mask(self._gate)


class GateMask:
    """A gate on one tensor, and the mask of what is dropped behind it.

    Attributes:
        source: the target it belongs to.
        fqn: fully qualified name of the tensor.
        state: φ; shared by all tensors of the target.
    """

    def __init__(self, source: MaskSource, member: Member, state: GateState) -> None:
        self.source, self.fqn, self.state = source, member.fqn, state
        self._slice = member.slice
        owners = member.slice.owners
        # Which entries are the target's, where some are not.
        self._mine = torch.tensor([owner >= 0 for owner in owners]) if owners and min(owners) < 0 else None
        self._mask = Mask(_Through(source, self), member.fqn)
        self._cached: tuple[Tensor | None, tuple[int, int], Tensor] | None = None

    @property
    def keep(self) -> Tensor | None:
        """What this step's draw keeps besides the gate; None unless the recipe has a drop rate, too."""
        return self._mask.keep

    @keep.setter
    def keep(self, keep: Tensor | None) -> None:
        self._mask.keep = keep

    @property
    def scale(self) -> float:
        """What training multiplies the rest by."""
        return self._mask.scale

    @scale.setter
    def scale(self, scale: float) -> None:
        self._mask.scale = scale

    @property
    def plain(self) -> bool:
        """No: a gate has a gradient of its own."""
        return False

    @property
    def draws_outputs(self) -> bool:
        """Whether `output` may take the place of a layer's forward."""
        return self.state.gate.local

    def _spread(self, values: Tensor, dense: Tensor) -> Tensor:
        values = values.to(dense.device)
        return along(values, self._slice, dense.shape) if self.state.per_unit else values

    def _owned(self, value: Tensor, dense: Tensor) -> Tensor:
        """`value` for the entries of the target's units, `dense` for those of no unit or of another group's."""
        if self._mine is None:
            return value
        sizes = [-1 if d == self._slice.dim else 1 for d in range(dense.dim())]
        return torch.where(self._mine.to(dense.device).view(sizes), value, dense)

    def apply(self, dense: Tensor, training: bool) -> Tensor:
        """The value the layer computes with, ``[*w]``."""
        if self.source.dense:
            return dense
        if training:
            return self._mask.apply(self._sampled(dense), True)
        keep = self._mask.keep_of(dense, False)
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return self._settled(dense, keep)
        versions = (0 if dense.is_inference() else dense._version, self.state.phi._version)
        cached = self._cached
        if cached is None or cached[0] is not keep or cached[1] != versions or cached[2].is_inference():
            cached = self._cached = (keep, versions, self._settled(dense, keep))
        return cached[2]

    def apply_after(self, value: Tensor, training: bool) -> Tensor:
        """`apply` to what another mask of the same tensor gave; nothing is remembered of it."""
        if self.source.dense:
            return value
        if training:
            return self._mask.apply_after(self._sampled(value), True)
        return self._mask.apply_after(self._gated(value), False)

    def _sampled(self, dense: Tensor) -> Tensor:
        state = self.state
        if state.key is None:
            return dense
        phi = self._spread(state.phi, dense)
        if state.gate.noise == "normal" and torch.compiler.is_compiling():
            noise: Tensor | None = torch.randn_like(phi)
        else:
            noise = state.noise()
            noise = None if noise is None else self._spread(noise, dense)
        size = self._spread(state.size(), dense) if state.per_unit and state.gate.pulls_weights else None
        return self._owned(state.gate.forward(dense, phi, noise, size), dense)

    def value(self, dense: Tensor) -> Tensor | None:
        """What evaluation multiplies `dense` with, broadcastable to it; None for 1."""
        found = self.state.gate.value(self.state.phi.detach())
        if found is None:
            return None
        found = self._spread(found, dense).to(dense.dtype)
        return found if self._mine is None else self._owned(found, torch.ones_like(dense))

    def _gated(self, dense: Tensor) -> Tensor:
        value = self.value(dense)
        return dense if value is None else dense * value

    def _settled(self, dense: Tensor, keep: Tensor | None) -> Tensor:
        gated = self._gated(dense)
        return gated if keep is None else select(keep, gated)

    def keep_of(self, dense: Tensor, training: bool) -> Tensor | None:
        """What the layer keeps of `dense` besides the gate."""
        return self._mask.keep_of(dense, training)

    def train(self) -> None:
        """Enter training: nothing derived from the weights may be reused."""
        self._mask.train()
        self._cached = None

    def evaluate(self, dense: Tensor) -> None:
        """Enter evaluation: settle the mask now; a compiled forward needs it ready."""
        self._cached = None
        self._mask.evaluate(dense)

    def write_(self, dense: Tensor, keep: Tensor) -> None:
        """Write what evaluation computes with into `dense`, in place."""
        value = self.value(dense)
        if value is not None:
            dense.mul_(value)
        zero_(dense, keep)

    def output(self, product: Product, x: Tensor, dense: Tensor, bias: Tensor | None, channel: int) -> Tensor | None:
        """The layer's outputs, drawn in place of its weights (local reparametrisation); None where they are not.

        Args:
            product: of the layer.
            x: its input.
            dense: ``[outputs, ...]``.
            bias: ``[outputs]``.
            channel: the dimension of the outputs in the result.
        """
        state = self.state
        if self.source.dense or state.key is None or self.keep is not None:
            return None
        mean = product(x, dense, bias)
        if state.per_unit:
            ratio = (state.phi / 2).exp() / state.size().clamp_min(1e-8)
            sizes = [-1 if d == channel % mean.dim() else 1 for d in range(mean.dim())]
            spread_ = mean * spread(ratio, self._slice, dense.shape[0]).view(sizes).to(mean.dtype)
        else:
            spread_ = deviation(product, x, dense, state.phi)
        return mean + spread_ * state.normal(mean.shape, self.fqn).to(mean.dtype)


def make_masks(
    source: MaskSource, recipe: Recipe, members: Sequence[Member], state: GateState | None
) -> list[TensorMask]:
    """The masks of the members of one target.

    A gate must scale a unit once. Where a norm lies behind it, which would undo a scaling of the weights before it, the
    gate scales the norm; else the weights and their biases. What is dropped is zeroed in all of them.
    """
    ranked = {id(member.module) for member in members if member.ranked}
    norms = [member for member in members if id(member.module) not in ranked]
    through = recipe.gradient == "all"
    return [
        ShardedMask(source, member.fqn, member.parameter, through) if is_sharded(member.parameter)
        else Mask(source, member.fqn, through) if state is None or (norms and member not in norms)
        else GateMask(source, member, state)
        for member in members
    ]  # fmt: skip
