"""`from_scratch`: the pruned architecture with fresh weights, the control that tells what pruning itself was worth."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from td_plugin.errors import TdError
from td_plugin.own_forward import unwrap
from td_plugin.parametrization import masked_tensors

Model = TypeVar("Model", bound=nn.Module)


@runtime_checkable
class _Resets(Protocol):
    """A module that knows how its own parameters begin."""

    def reset_parameters(self) -> None:
        """Draw them anew."""
        ...


def from_scratch(model: Model, seed: int = 0) -> Model:
    """A copy of `model` with new weights, of the same shapes, as an untrained model of its widths would have them.

    Train it on the budget of the pruned model, or on the same number of FLOPs: if it ends as good, the pruning found
    an architecture and not weights.

    Args:
        model: a shrunk model, or any other; it stays as it is. Models of transformers begin as their `_init_weights`
            says, other modules as their `reset_parameters` does. Frozen parameters that neither of them touches are
            taken for constants and kept, as are buffers; running statistics begin anew.
        seed: of the draw; torch's global generator is left where it was.

    Returns:
        the same classes, in the same mode, dtype and device.

    Raises:
        TdError: the model carries masks, or nobody knows how a parameter begins (it is named).

    Source: Liu, Sun, Zhou, Huang & Darrell, "Rethinking the Value of Network Pruning", arXiv 1810.05270.
    """
    if masked := masked_tensors(model):
        raise TdError("the model carries masks", where=masked[0], fix="squash_mask() and shrink(model) first")
    fresh = copy.deepcopy(model)
    unwrap(fresh)
    if absent := next((name for name, tensor in fresh.named_parameters() if tensor.is_meta), None):
        raise TdError("the weights are not there", where=absent, got="a tensor on the meta device", fix="load them")
    devices = sorted({tensor.device.index for tensor in fresh.parameters() if tensor.is_cuda})
    former = {name: tensor.detach().clone() for name, tensor in fresh.named_parameters() if not tensor.requires_grad}
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.manual_seed(seed)
        for tensor in _floats(fresh):
            tensor.fill_(float("nan"))  # what is still NaN afterwards has not been drawn
        _reset(fresh)
        for name, tensor in fresh.named_parameters():
            if tensor.is_floating_point() and bool(tensor.isnan().any()):
                if name not in former:
                    raise _unknown(fresh, name)
                tensor.copy_(former[name])
    return fresh


def _floats(model: nn.Module) -> Iterator[Tensor]:
    return (tensor for tensor in model.parameters() if tensor.is_floating_point())


def _reset(model: nn.Module) -> None:
    """Let every module draw its own parameters: children first, since some parents draw for them."""
    for module in reversed(list(model.modules())):
        if isinstance(module, _Resets):
            module.reset_parameters()
        elif isinstance(module, (nn.MultiheadAttention, nn.Transformer)):
            module._reset_parameters()
    for found in _of_transformers(model):
        for module in found.modules():
            # Marks of what from_pretrained has loaded: transformers would pass it over.
            for marked in (module, *module.parameters(recurse=False), *module.buffers(recurse=False)):
                vars(marked).pop("_is_hf_initialized", None)
        found.initialize_weights()


def _of_transformers(model: nn.Module) -> list[Any]:
    """The outermost models of transformers in `model`; nobody has one without having imported it."""
    library = sys.modules.get("transformers")
    if library is None:
        return []
    found: list[Any] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}." if outer else "") for outer, _ in found)
        if isinstance(module, library.PreTrainedModel) and not inside:
            found.append((name, module))
    return [module for _, module in found]


def _unknown(model: nn.Module, name: str) -> TdError:
    owner = type(model.get_submodule(name.rpartition(".")[0])).__name__
    fix = "give its module a reset_parameters() that draws its own parameters, or freeze it to keep it"
    return TdError("nobody knows how this parameter begins", where=name, got=f"a parameter of {owner}", fix=fix)
