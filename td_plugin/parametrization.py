"""The mask on a tensor: reading ``module.weight`` gives the masked value, everything else stays the plain module.

`torch.nn.utils.parametrize` moves the parameter (its keys in every checkpoint change, the optimizer's order changes)
and deletes a property from a class that deep copies share. Here a masked module's class is swapped for a subclass
whose ``weight`` is a property over the untouched ``_parameters["weight"]``: names, order and identity of the
parameters, `state_dict`, strict loads, `tie_weights` and deep copies are those of the unmodified module.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from td_plugin import masked_linear
from td_plugin.errors import TdError
from td_plugin.hooks import unhook
from td_plugin.mask import TensorMask
from td_plugin.masked_view import masked_view
from td_plugin.remaking import Remaking
from td_plugin.sharded import home, move_out, reshard

_STATE = "_td_masks"
_NOTHING = nullcontext()


class _ModuleMasks:
    """What one masked module carries besides its own attributes; `base` is the class it gets back."""

    def __init__(self, base: type[nn.Module]) -> None:
        self.base = base
        # Several masks on one tensor belong to groups that share none of its entries.
        self.by_name: dict[str, list[TensorMask]] = {}
        self.inside_forward = 0
        self.draws_outputs = False


def _property(name: str) -> property:
    def read(module: nn.Module) -> Tensor | None:
        masks: _ModuleMasks = module.__dict__[_STATE]
        if name not in module._parameters:  # moved away by another parametrization
            raise AttributeError(name)
        dense = module._parameters[name]
        if dense is None:
            return None
        first, *others = masks.by_name[name]
        value = first.apply(dense, module.training)
        for other in others:
            value = other.apply_after(value, module.training)
        if value is dense or masks.inside_forward or torch.compiler.is_compiling():
            return value
        return masked_view(value, first.fqn)

    def write(module: nn.Module, value: object) -> None:
        # A Parameter never comes here: nn.Module keeps it with the others. A replica of nn.DataParallel does.
        raise TdError(
            "a masked tensor cannot be replaced by anything but a Parameter",
            where=module.__dict__[_STATE].by_name[name][0].fqn,
            got=type(value).__name__,
            fix="train on several GPUs with one process each (torchrun, accelerate), not with nn.DataParallel",
        )

    return property(read, write)


_CLASSES: dict[tuple[type[nn.Module], tuple[str, ...]], type[nn.Module]] = {}


def _masked_class(base: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """The masked subclass of `base`; one per class and names, so that compiled code and copies share it."""
    if (base, names) not in _CLASSES:
        _CLASSES[base, names] = _make_masked_class(base, names)
    return _CLASSES[base, names]


def _make_masked_class(base: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """A subclass of `base` that reads `names` through their masks."""
    is_linear = base.forward is nn.Linear.forward

    @wraps(base.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return base.forward(self, *args, **kwargs)
        masks: _ModuleMasks = self.__dict__[_STATE]
        # Where nothing is saved for a backward the short way will do: `generate` comes here for every token.
        short = not (self.training or masks.draws_outputs or torch.is_grad_enabled())
        if not short and len(args) == 1 and (is_linear or masks.draws_outputs):
            done = _by_other_means(base, self, masks, args[0])
            if done is not None:
                return done
        masks.inside_forward += 1
        try:
            with _NOTHING if short else Remaking():
                return base.forward(self, *args, **kwargs)
        finally:
            masks.inside_forward -= 1

    def train(self: nn.Module, mode: bool = True) -> nn.Module:
        base.train(self, mode)
        for _, name, mask in _masks(self):
            dense = self._parameters[name]
            if mode:
                mask.train()
            elif dense is not None:
                mask.evaluate(dense)
        return self

    def reduce(self: nn.Module, protocol: Any) -> Any:
        return _rebuild, (base, names), self.__dict__

    body = {"forward": forward, "train": train, "__reduce_ex__": reduce, "__module__": base.__module__}
    return type(f"Masked{base.__name__}", (base,), {**body, **{name: _property(name) for name in names}})


def _linear(module: nn.Module, masks: _ModuleMasks, x: Tensor) -> Tensor | None:
    """What a masked `nn.Linear` gives, at a lower price; None if it has to go the way of all layers."""
    dense, found = module._parameters.get("weight"), masks.by_name.get("weight", [])
    if dense is None or len(found) != 1 or not found[0].plain or not masked_linear.serves(x, dense):
        return None
    keep = found[0].keep_of(dense, module.training)
    if keep is None:
        return None
    bias, of_bias = module._parameters.get("bias"), masks.by_name.get("bias", [])
    if bias is None or (len(of_bias) == 1 and of_bias[0].plain):
        keep_bias = keep.flatten() if bias is None else of_bias[0].keep_of(bias, module.training)
        if masked_linear.silences(dense, keep, keep_bias):
            if masked_linear.spares(x, dense, keep):
                return masked_linear.sparing_linear(x, dense, keep, bias)
            return masked_linear.silenced_linear(x, dense, keep, bias) if masked_linear.exact(x, dense) else None
    if not masked_linear.exact(x, dense):
        return None
    return masked_linear.masked_linear(x, dense, keep, module.bias)  # type: ignore[arg-type]


def _by_other_means(base: type[nn.Module], module: nn.Module, masks: _ModuleMasks, x: Tensor) -> Tensor | None:
    """What the module gives without its masked weight being made; None if it has to be."""
    if not masks.draws_outputs:
        return _linear(module, masks, x)
    from td_plugin.gates.outputs import drawn_output  # only where there are gates

    return drawn_output(base, module, masks.by_name, x)


def _rebuild(base: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    cls = _masked_class(base, names)
    return cls.__new__(cls)


def attach(module: nn.Module, name: str, mask: TensorMask) -> None:
    """Put `mask` on the parameter `name` of `module`. Parameter, keys and order do not change."""
    masks: _ModuleMasks = module.__dict__.setdefault(_STATE, _ModuleMasks(type(module)))
    masks.by_name[name] = [*masks.by_name.get(name, []), mask]
    masks.draws_outputs |= mask.draws_outputs
    module.__class__ = _masked_class(masks.base, tuple(sorted(masks.by_name)))


def detach(module: nn.Module) -> None:
    """Take all masks off `module` and give it back its class; parameters keep their dense values."""
    module.__class__ = module.__dict__.pop(_STATE).base
    move_out(module)


def masks_of(model: nn.Module) -> list[tuple[nn.Module, str, TensorMask]]:
    """Every mask in `model`, as (module, parameter name, mask)."""
    return [found for module in model.modules() if _STATE in module.__dict__ for found in _masks(module)]


def _masks(module: nn.Module) -> list[tuple[nn.Module, str, TensorMask]]:
    by_name: dict[str, list[TensorMask]] = module.__dict__[_STATE].by_name
    return [(module, name, mask) for name, masks in by_name.items() for mask in masks]


def masked_tensors(model: nn.Module) -> list[str]:
    """The fully qualified names of the tensors that carry a mask."""
    return list(dict.fromkeys(mask.fqn for _, _, mask in masks_of(model)))


def refuse_masked(model: nn.Module) -> None:
    """Raise if `model` carries masks: two methods on one model would each see the other's zeros as weights.

    Raises:
        TdError: it does.
    """
    if found := masked_tensors(model):
        raise TdError("the model carries masks already", where=found[0], fix="squash the other sparsifier first")


def bake(model: nn.Module, settled: bool = False) -> int:
    """Zero what the deterministic masks drop, in place, and remove every trace of the masks.

    Args:
        model: masked or not, in any mode.
        settled: whether the weights have been ranked since they last changed.

    Returns:
        the number of tensors that carried a mask.

    Raises:
        TdError: a ranked weight is not finite; nothing has been changed then.
    """
    found = masks_of(model)
    for _, _, mask in () if settled else found:
        mask.train()  # in-place edits through `.data` leave no other sign
    # All masks first: zeroing one tensor changes the ranking that others share.
    keeps = [mask.source.keep_mask(mask) for _, _, mask in found]
    with torch.no_grad():
        for (module, name, mask), keep in zip(found, keeps, strict=True):
            dense = home(module, name)
            if dense is not None:
                mask.write_(dense, keep)
    reshard(list(model.modules()))
    for module in {id(module): module for module, _, _ in found}.values():
        detach(module)
    unhook(model.modules())
    return len(found)
