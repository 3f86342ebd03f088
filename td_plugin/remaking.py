"""Masked weights are made again for the backward, not kept from the forward on.

A layer saves the weight it has multiplied with. Of a masked weight that would be a second copy of the model. What is
saved in its place is the parameter, which is there anyway, and the mask: the copy made in the forward is gone when the
layer is done, and its memory serves the next one.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
from torch import Tensor

from td_plugin.errors import TdError
from td_plugin.masking import select


@dataclass(frozen=True)
class _Made:
    """A masked weight, `value`, and what it is made of."""

    value: Tensor
    dense: Tensor
    keep: Tensor
    fqn: str


@dataclass(frozen=True)
class _Saved:
    """What stands in the graph for a tensor: the tensor itself, or, with a mask, what a masked weight is made of.

    Attributes:
        tensor: the dense one if there is a mask.
        version: of `tensor` when it was saved; torch leaves the check to those who save in other ways.
        view: size, stride and offset within the masked weight.
    """

    tensor: Tensor
    version: int
    fqn: str = ""
    keep: Tensor | None = None
    view: tuple[tuple[int, ...], tuple[int, ...], int] = ((), (), 0)


_running = threading.local()


class Remaking:
    """While it is entered, masked weights that `note` is told of are saved for the backward as what they are made of.

    Where gradients are off, or others decide how tensors are saved (activation checkpoints, offloading,
    `torch.func`), it does nothing.
    """

    def __init__(self) -> None:
        self._made: dict[int, _Made] = {}
        self._active = False

    def __enter__(self) -> None:
        hooks = torch._C._autograd
        self._active = (
            torch.is_grad_enabled()
            and hooks._saved_tensors_hooks_is_enabled()  # type: ignore[attr-defined]
            and hooks._top_saved_tensors_default_hooks(False) is None
            and torch._C._functorch.peek_interpreter_stack() is None
        )
        if self._active:
            hooks._push_saved_tensors_default_hooks(self._pack, self._unpack)
            _running.now = self

    def __exit__(self, *_: object) -> None:
        if self._active:
            torch._C._autograd._pop_saved_tensors_default_hooks()
            _running.now = None
            self._made = {}  # the graph holds our methods, and must not hold the weights

    def _pack(self, tensor: Tensor) -> _Saved:
        plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout is torch.strided
        made = self._made.get(tensor.untyped_storage()._cdata) if plain else None
        if made is None:
            return _Saved(tensor.detach(), tensor._version)
        view = (tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))
        return _Saved(made.dense.detach(), made.dense._version, made.fqn, made.keep, view)

    def _unpack(self, saved: _Saved) -> Tensor:
        if saved.tensor._version != saved.version:
            raise _changed(saved)
        if saved.keep is None:
            return saved.tensor
        with torch.no_grad():
            return select(saved.keep, saved.tensor).as_strided(*saved.view)


def note(value: Tensor, dense: Tensor, keep: Tensor, fqn: str) -> None:
    """Tell the `Remaking` that is entered in this thread, if one is, what `value` has been made of."""
    now: Remaking | None = getattr(_running, "now", None)
    if now is not None:
        now._made[value.untyped_storage()._cdata] = _Made(value, dense, keep, fqn)


def _changed(saved: _Saved) -> Exception:
    if saved.fqn:
        return TdError(
            "a masked weight was changed between the forward and the backward, so its gradient cannot be computed",
            where=saved.fqn,
            fix="step the optimizer after backward()",
        )
    return RuntimeError(
        "one of the variables needed for gradient computation has been modified by an inplace operation: a tensor of"
        f" shape {list(saved.tensor.shape)} saved by a masked layer is at version {saved.tensor._version}, expected"
        f" version {saved.version} (torch.autograd.set_detect_anomaly(True) shows which operation needs it)"
    )
