"""Weights that hold no plain floating-point numbers, as a quantized model's: nothing to rank or drop."""

from __future__ import annotations

from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_BUFFER = "qweight"  # of GPTQ's and AWQ's layers


def packed(parameter: nn.Parameter) -> str:
    """How a parameter stores its numbers if not as plain floating-point ones; empty if it does."""
    if not parameter.is_floating_point():  # bitsandbytes: uint8 or int8
        return f"quantized: stored as {str(parameter.dtype).removeprefix('torch.')}"
    stored: object = parameter
    if not is_traceable_wrapper_subclass(stored):
        return ""
    from torch.distributed.tensor import DTensor  # slow to load, and rarely asked for

    # torchao's say that they are of floating point.
    reason = f"quantized, or packed otherwise: stored as {type(parameter).__name__}"
    return "" if isinstance(parameter, DTensor) else reason


def packed_layers(model: nn.Module) -> dict[str, str]:
    """The layers that keep a quantized weight in a buffer, by the buffer's name, and why they are left alone."""
    return {
        f"{name}.{_BUFFER}".lstrip("."): f"quantized: {type(module).__name__} keeps its weight in a buffer"
        for name, module in model.named_modules()
        if module._buffers.get(_BUFFER) is not None
    }
