"""What the checks over all families share: which outputs count, generation in three ways, units zeroed by hooks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

TOKENS = 4  # generated per row
CACHES: tuple[dict[str, Any], ...] = ({}, {"cache_implementation": "static"}, {"use_cache": False})


def logits(output: Any) -> dict[str, Tensor]:
    """The floating point tensors of a model's output that are no states in between, by name."""
    if isinstance(output, Tensor):
        return {"output": output}
    found = {name: value for name, value in output.items() if isinstance(value, Tensor)}
    return {name: value for name, value in found.items() if value.is_floating_point() and value.ndim > 0}


def generate_equal(first: nn.Module, second: nn.Module, inputs: Mapping[str, Any]) -> bool:
    """Whether both generate the same tokens, greedily, with a growing cache, with one of fixed size and without."""
    return all(torch.equal(generated(first, inputs, way), generated(second, inputs, way)) for way in CACHES)


def generated(model: Any, inputs: Mapping[str, Any], way: Mapping[str, Any]) -> Tensor:
    """Tokens ``[batch, prompt + new]``, with one of `CACHES`."""
    given = {name: value for name, value in inputs.items() if name != "use_cache"}
    with torch.no_grad():
        tokens = model.generate(
            **given, **way, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, num_beams=1,
            disable_compile=True,
        )  # fmt: skip
    assert isinstance(tokens, Tensor)
    return tokens


def logits_without(model: nn.Module, inputs: Mapping[str, Any], gone: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """The outputs of `model` with features of its modules set to zero as they leave them: no mask, no shrinking.

    Args:
        model: in evaluation mode.
        inputs: as it is called, by name.
        gone: fully qualified name of a module -> which of its output features, the last dimension, or the second of
            a convolution's or batch norm's.
    """
    with torch.no_grad(), zeroed(model, gone):
        return logits(model(**inputs))


@contextmanager
def zeroed(model: nn.Module, gone: Mapping[str, Sequence[int]]) -> Iterator[None]:
    """While open, `model` computes without these output features of its modules."""
    with ExitStack() as stack:
        for name, units in gone.items():
            stack.enter_context(_hook(model.get_submodule(name), list(units)))
        yield


@contextmanager
def _hook(module: nn.Module, units: list[int]) -> Iterator[None]:
    channels = isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm))

    def zero(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        return output.index_fill(1 if channels else -1, torch.tensor(units, device=output.device), 0.0)

    handle = module.register_forward_hook(zero)
    try:
        yield
    finally:
        handle.remove()
