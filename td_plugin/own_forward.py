"""The forward of a model without the autocast that accelerate, and so the Trainer, puts on it for mixed precision.

It stays on the model after training. Traced, it is one operator with everything in it; exported or compared, it
computes in half precision what the weights hold in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

_OWN = "_original_forward"
"""Where accelerate keeps it (`Accelerator.prepare_model`)."""


@contextmanager
def own_forward(model: nn.Module) -> Iterator[None]:
    """The model's own forward inside, what was put on it back afterwards."""
    held = vars(model)
    put_on = held.get("forward")
    if put_on is None or _OWN not in held:
        yield
        return
    held["forward"] = held[_OWN]
    try:
        yield
    finally:
        held["forward"] = put_on


def unwrap(model: nn.Module) -> None:
    """Take it off for good: for a copy that is ours to give."""
    held = vars(model)
    if _OWN in held:
        own = held.pop(_OWN)
        held.pop("forward", None)
        if getattr(own, "__func__", None) is not type(model).forward:
            held["forward"] = own
