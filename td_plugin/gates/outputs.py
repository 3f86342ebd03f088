"""Layers under a gate that draws their outputs in place of their weights."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import linear

from td_plugin.mask import Product, TensorMask


def drawn_output(
    base: type[nn.Module], module: nn.Module, masks: dict[str, list[TensorMask]], x: Tensor
) -> Tensor | None:
    """What `module` gives for `x` in training; None if it has to go the way of all layers.

    Args:
        base: the class of the module without masks.
        module: in training or not.
        masks: by the name of the tensor.
        x: the module's one argument.
    """
    found, dense = masks.get("weight", []), module._parameters.get("weight")
    if not module.training or dense is None or len(found) != 1:
        return None
    (mask,) = found
    others = masks.get("bias", [])
    if any(other.source is not mask.source for other in others):
        return None
    product, channel = _product(base, module)
    if product is None:
        return None
    # A unit's noise multiplies its bias, too: the dense one goes in. Single weights leave the bias alone.
    return mask.output(product, x, dense, module._parameters.get("bias"), channel)


def _product(base: type[nn.Module], module: nn.Module) -> tuple[Product | None, int]:
    """What the layer does to input, weight and bias, and the dimension its outputs have in the result."""
    if base.forward is nn.Linear.forward:
        return linear, -1
    if base.forward is nn.Conv1d.forward and isinstance(module, nn.Conv1d):
        return module._conv_forward, -2
    if base.forward is nn.Conv2d.forward and isinstance(module, nn.Conv2d):
        return module._conv_forward, -3
    return None, 0
