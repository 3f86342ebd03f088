"""The mask of one tensor: what a layer computes with, in training and in evaluation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from td_plugin.masking import masked, select, zero_
from td_plugin.remaking import note

Product = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]
"""What a layer computes of its input, weight and bias."""


class MaskSource(Protocol):
    """Where a mask comes from: the target that ranks the groups of one or several tensors together."""

    @property
    def dense(self) -> bool:
        """Whether masks are switched off, in training and in evaluation."""
        ...

    @property
    def dense_eval(self) -> bool:
        """Whether evaluation runs the dense model."""
        ...

    def settle(self) -> int:
        """Bring the deterministic candidates up to date with the weights; a number that changes when they do."""
        ...

    def expire(self) -> None:
        """Forget that the candidates are up to date: weights may change from here on."""
        ...

    def keep_mask(self, mask: TensorMask) -> Tensor:
        """The deterministic keep-mask of one tensor, as `masking.select` takes it."""
        ...


class TensorMask(Protocol):
    """What a masked module needs of each of its masks: `Mask`, or the gate of `td_plugin.gates.mask`."""

    source: MaskSource
    fqn: str

    @property
    def keep(self) -> Tensor | None:
        """What this training step keeps, as `masking.select` takes it; None for all of it."""
        ...

    @keep.setter
    def keep(self, keep: Tensor | None) -> None: ...

    @property
    def scale(self) -> float:
        """What training multiplies the rest by."""
        ...

    @scale.setter
    def scale(self, scale: float) -> None: ...

    @property
    def plain(self) -> bool:
        """Whether the masked value is the dense one or 0, and its gradient too."""
        ...

    @property
    def draws_outputs(self) -> bool:
        """Whether the layer's outputs may be drawn in place of its weights."""
        ...

    def keep_of(self, dense: Tensor, training: bool) -> Tensor | None:
        """What the layer keeps of `dense` now; None if all of it."""
        ...

    def apply(self, dense: Tensor, training: bool) -> Tensor:
        """The value the layer computes with, ``[*w]``."""
        ...

    def apply_after(self, value: Tensor, training: bool) -> Tensor:
        """`apply` to what another mask of the same tensor gave; nothing is remembered of it."""
        ...

    def train(self) -> None:
        """Enter training: the weights will change, so nothing derived from them may be reused."""
        ...

    def evaluate(self, dense: Tensor) -> None:
        """Enter evaluation: settle the mask now."""
        ...

    def value(self, dense: Tensor) -> Tensor | None:
        """What evaluation multiplies `dense` with before it drops; None for 1."""
        ...

    def output(self, product: Product, x: Tensor, dense: Tensor, bias: Tensor | None, channel: int) -> Tensor | None:
        """The layer's outputs, drawn in place of its weights; None where they are not."""
        ...

    def write_(self, dense: Tensor, keep: Tensor) -> None:
        """Write what evaluation computes with into `dense`, in place; `keep` is the source's `keep_mask`."""
        ...


class Mask:
    """The mask of one tensor.

    Attributes:
        source: the target it belongs to.
        fqn: fully qualified name of the tensor.
        keep: what this training step keeps, as `masking.select` takes it; None before the first draw. It is
            replaced, never edited: the graph of an earlier forward still holds the old one.
        scale: what training multiplies the rest by.
        through: whether dropped entries get the gradient of the masked ones.
        observe: is shown the gradient of the masked value in training, before it is masked; None: nobody looks.
    """

    def __init__(self, source: MaskSource, fqn: str, through: bool = False) -> None:
        self.source, self.fqn, self.through = source, fqn, through
        self.keep: Tensor | None = None
        self.scale = 1.0
        self.observe: Callable[[Tensor], None] | None = None
        self._eval_keep: Tensor | None = None
        self._cached: Tensor | None = None
        self._cache_key: tuple[object, ...] = ()

    @property
    def plain(self) -> bool:
        """Whether the masked value is the dense one or 0, its gradient too, and nobody looks at that."""
        return self.scale == 1.0 and not self.through and self.observe is None

    def keep_of(self, dense: Tensor, training: bool) -> Tensor | None:
        """What the layer keeps of `dense` now; None if all of it."""
        if self.source.dense or (not training and self.source.dense_eval):
            return None
        if training:
            return self.keep
        if torch.compiler.is_compiling():  # settled by `train(False)`, outside the graph
            return self._eval_keep
        return self._settled(dense)

    def apply(self, dense: Tensor, training: bool) -> Tensor:
        """The value the layer computes with, ``[*w]``; the gradient of a dropped entry is zero, but for `through`."""
        keep = self.keep_of(dense, training)
        if keep is None:
            return dense
        scale = self.scale if training else 1.0
        as_is = scale == 1.0 and not self.through
        if training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            value = select(keep, dense) if as_is else masked(keep, dense, scale, self.through)
            if torch.compiler.is_compiling():
                return value
            if as_is:
                note(value, dense, keep, self.fqn)
            if training and self.observe is not None and value.requires_grad:
                value.register_hook(self.observe)  # type: ignore[no-untyped-call]
            return value
        if self._cached is None or (self._cached.is_inference() and not torch.is_inference_mode_enabled()):
            self._cached = select(keep, dense)  # materialised once, so `generate` pays nothing per token
        return self._cached

    def _settled(self, dense: Tensor) -> Tensor:
        key = (self.source.settle(), dense.data_ptr(), dense.dtype, dense.device)
        if key != self._cache_key or self._eval_keep is None:
            self._eval_keep, self._cache_key, self._cached = self.source.keep_mask(self), key, None
        return self._eval_keep

    def apply_after(self, value: Tensor, training: bool) -> Tensor:
        """`apply` to what another mask of the same tensor gave; nothing is remembered of it."""
        if self.source.dense or (not training and self.source.dense_eval) or training:
            return self.apply(value, training)
        if torch.compiler.is_compiling():
            return self.apply(value, training)
        self.source.settle()
        return select(self.source.keep_mask(self), value)

    def train(self) -> None:
        """Enter training: the weights will change, so nothing derived from them may be reused."""
        self.source.expire()
        self._eval_keep, self._cached, self._cache_key = None, None, ()

    @property
    def draws_outputs(self) -> bool:
        """Never."""
        return False

    def value(self, dense: Tensor) -> Tensor | None:
        """Nothing."""
        return None

    def output(self, product: Product, x: Tensor, dense: Tensor, bias: Tensor | None, channel: int) -> Tensor | None:
        """None."""
        return None

    def write_(self, dense: Tensor, keep: Tensor) -> None:
        """Zero what is dropped, in place."""
        zero_(dense, keep)

    def evaluate(self, dense: Tensor) -> None:
        """Enter evaluation: settle the mask now; a compiled forward needs it ready."""
        if not (self.source.dense or self.source.dense_eval or dense.is_meta):
            self.train()
            self._settled(dense)
