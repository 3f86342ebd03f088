"""What layers read and compute on a user's batches, sampled at random places: the evidence of `channel_prune`."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from td_plugin.chains import layer_fault
from td_plugin.errors import TdError, first_line
from td_plugin.export.modes import evaluating
from td_plugin.masks import draw_key

Batch = Tensor | Mapping[str, Any]
"""As the model is called: by name, or its only input."""

_MODES = {"zeros": "constant"}  # torch.nn.functional.pad's name for it; the others have the same


@dataclass(frozen=True)
class Sampling:
    """Where activations are taken.

    Attributes:
        batches: as the model is called, each of them.
        per_batch: places of every batch; all of them where there are fewer.
        seed: of the places: the same for every run over the same batches.
    """

    batches: tuple[Batch, ...]
    per_batch: int
    seed: int


def sampling(batches: Iterable[Batch], samples: int, seed: int) -> Sampling:
    """Check the batches and share `samples` places out among them.

    Raises:
        TdError: there are no batches, one is not what a model is called with or not finite, or `samples` is below 1.
    """
    if isinstance(batches, (Tensor, Mapping)):
        raise TdError("several batches are asked for", where="batches", fix="a list, if there is one only: [batch]")
    kept: tuple[Any, ...] = tuple(batches)
    if not kept:
        fix = "give some hundred rows of the training data; a generator can be read once only"
        raise TdError("there are no samples to reconstruct from", where="batches", got="an empty iterable", fix=fix)
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise TdError("samples must be a positive whole number", got=repr(samples), fix="5000 is the paper's order")
    for index, batch in enumerate(kept):
        if not isinstance(batch, (Tensor, Mapping)):
            fix = "a dict of tensors by the names of the model's arguments, or one tensor"
            raise TdError("not what a model is called with", where=f"batch {index}", got=type(batch).__name__, fix=fix)
        named = batch.items() if isinstance(batch, Mapping) else [("input", batch)]
        for name, value in named:
            if isinstance(value, Tensor):
                check_finite(value, f"batch {index}, {name!r}")
    return Sampling(kept, math.ceil(samples / len(kept)), seed)


def check_finite(tensor: Tensor, where: str) -> None:
    """Refuse values that would make every reconstructed weight NaN.

    Raises:
        TdError: one is NaN or infinite.
    """
    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
        got = "NaN" if bool(tensor.isnan().any()) else "infinity"
        raise TdError("the samples are not finite", where=where, got=got, fix="leave these rows out")


def reader_fault(module: nn.Module) -> str:
    """Why what `module` computes cannot be reconstructed; empty if it can."""
    return "" if _is_transposed(module) else layer_fault(module)


def _is_transposed(module: nn.Module) -> bool:
    """Whether it is a Conv1D of transformers, a linear layer of weight ``[in, out]``."""
    transformers = sys.modules.get("transformers.pytorch_utils")
    return transformers is not None and isinstance(module, transformers.Conv1D)


def matrix_of(module: nn.Module) -> Tensor:
    """``[out, in · kernel]`` float64 on the CPU: the weight, as it meets the rows of `sample`."""
    weight: Tensor = module._parameters["weight"]  # type: ignore[assignment]
    return (weight.T if _is_transposed(module) else weight.flatten(1)).detach().double().cpu()


@torch.no_grad()
def write_matrix(module: nn.Module, matrix: Tensor) -> None:
    """Put back what `matrix_of` gave."""
    weight: Tensor = module._parameters["weight"]  # type: ignore[assignment]
    weight.copy_((matrix.T if _is_transposed(module) else matrix).reshape(weight.shape))


@torch.no_grad()
def sample(
    model: nn.Module, names: Sequence[str], plan: Sampling, what: Literal["inputs", "outputs"]
) -> dict[str, Tensor]:
    """Run all batches in evaluation mode and keep what layers read, or what they compute.

    Args:
        model: its mode is put back.
        names: of layers that `reader_fault` lets pass.
        plan: the places are the same in every run over models whose layers have the same output sizes.
        what: ``"inputs"``: the patch behind each output, ``[rows, in · kernel]``; ``"outputs"``: ``[rows, out]``.

    Returns:
        by layer, float32 or the model's dtype, on the CPU; a layer that is never called as a module is missing.

    Raises:
        TdError: the model does not run with a batch, or an activation is not finite.
    """
    found: dict[str, list[Tensor]] = {}
    calls: dict[str, int] = {}

    def keep(name: str, module: nn.Module, x: Tensor, y: Tensor) -> None:
        check_finite(x, f"batch {batch_index}, what {name} reads")
        check_finite(y, f"batch {batch_index}, what {name} computes")
        calls[name] = call = calls.get(name, -1) + 1
        seed = draw_key("places", plan.seed, batch_index, call)
        rows = _inputs if what == "inputs" else _outputs
        found.setdefault(name, []).append(rows(module, x, y, _places(module, y, plan.per_batch, seed)).cpu())

    def hook(name: str) -> Any:
        return lambda module, args, kwargs, y: keep(name, module, args[0] if args else kwargs["input"], y)

    handles = [model.get_submodule(name).register_forward_hook(hook(name), with_kwargs=True) for name in names]
    try:
        with evaluating(model):
            for batch_index, batch in enumerate(plan.batches):
                calls.clear()
                _call(model, batch, batch_index)
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


def _call(model: nn.Module, batch: Batch, index: int) -> None:
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    try:
        if isinstance(batch, Tensor):
            model(batch.to(device))
        else:
            model(**{name: x.to(device) if isinstance(x, Tensor) else x for name, x in batch.items()})
    except TdError:
        raise
    except Exception as error:  # whatever the model's own code raises
        fix = "give batches as the model is called: dicts by the names of its arguments, or single tensors"
        raise TdError(
            "the model does not run with this batch", where=f"batch {index}", got=first_line(error), fix=fix
        ) from error


def _places(module: nn.Module, y: Tensor, count: int, seed: int) -> Tensor:
    """``[rows]``: indices into all places of one output, the batch first."""
    width = y.shape[1] if isinstance(module, (nn.Conv1d, nn.Conv2d)) else y.shape[-1]
    return torch.randperm(y.numel() // width, generator=torch.Generator().manual_seed(seed))[:count]


def _outputs(module: nn.Module, x: Tensor, y: Tensor, places: Tensor) -> Tensor:
    flat = y.movedim(1, -1) if isinstance(module, (nn.Conv1d, nn.Conv2d)) else y
    return flat.reshape(-1, flat.shape[-1])[places.to(y.device)]


def _inputs(module: nn.Module, x: Tensor, y: Tensor, places: Tensor) -> Tensor:
    if not isinstance(module, (nn.Conv1d, nn.Conv2d)):
        return x.reshape(-1, x.shape[-1])[places.to(x.device)]
    padded = pad(x, module._reversed_padding_repeated_twice, _MODES.get(module.padding_mode, module.padding_mode))
    if isinstance(module, nn.Conv1d):
        padded, y = padded.unsqueeze(2), y.unsqueeze(2)
    (kernel_y, kernel_x), (step_y, step_x), (wide_y, wide_x) = (
        ((1,) * (2 - len(sizes)) + tuple(sizes)) for sizes in (module.kernel_size, module.stride, module.dilation)
    )
    height, width = y.shape[-2:]
    image, row, column = places // (height * width), places // width % height, places % width
    rows = row[:, None] * step_y + torch.arange(kernel_y) * wide_y
    columns = column[:, None] * step_x + torch.arange(kernel_x) * wide_x
    # Indices on both sides of the slice come first: [places, kernel_y, kernel_x, in].
    patches = padded[image[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return patches.movedim(-1, 1).flatten(1)
