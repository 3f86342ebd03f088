"""What an ONNX file says about the model it was made of."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping

import torch
from torch import nn

from td_plugin.errors import TdError
from td_plugin.export.graph_widths import KEY as WIDTHS_KEY
from td_plugin.export.stated_widths import blank_model
from td_plugin.export.stock_checkpoint import stock_class

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def check_exportable(model: nn.Module) -> None:
    """Nothing, if the dtypes of `model` are those that graphs are written in.

    Raises:
        TdError: a parameter is of half precision.
    """
    for name, parameter in model.named_parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16):
            fix = "model.float(); for a smaller file then optimize='bf16' or 'fp16', or quantize(path, target)"
            raise TdError("onnxruntime's CPU kernels do not cover this dtype", where=name, got=parameter.dtype, fix=fix)


def provenance(model: nn.Module, metadata: Mapping[str, str]) -> dict[str, str]:
    """Versions, class, parameters, zeros and widths of `model`; the caller's entries come last.

    Raises:
        TdError: an entry of the caller is no text.
    """
    for key, text in metadata.items():
        if not (isinstance(key, str) and isinstance(text, str)):
            raise TdError("metadata maps strings to strings", where=str(key), got=type(text).__name__, fix="json.dumps")
    zeros = {
        name: round(1 - parameter.count_nonzero().item() / max(1, parameter.numel()), 4)
        for name, parameter in model.named_parameters()
        if parameter.ndim > 1
    }
    versions = {f"{name}.version": _version(name) for name in ("td-plugin", "torch", "transformers", "onnx")}
    widths = width_changes_of(model)
    return {
        **{name: version for name, version in versions.items() if version},
        "td-plugin.model_class": type(model).__name__,
        "td-plugin.parameters": str(sum(parameter.numel() for parameter in model.parameters())),
        "td-plugin.sparsity": json.dumps({name: share for name, share in zeros.items() if share}),
        **({WIDTHS_KEY: json.dumps(widths)} if widths else {}),
        **metadata,
    }


def width_changes_of(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Layer -> outputs that its configuration states, and those it has, where they differ.

    Only a model of transformers says how wide it was: until it is saved its configuration is the dense model's, and
    afterwards as far as it cannot state the widths that all layers share.
    """
    cls = stock_class(model)
    if cls is None:
        return {}
    try:
        dense = blank_model(cls, model.config)  # type: ignore[arg-type]
    except (ValueError, TypeError, RuntimeError, AttributeError, LookupError):  # a configuration edited by hand
        return {}
    before, now = _layer_outputs(dense), _layer_outputs(model)
    return {layer: (before[layer], width) for layer, width in now.items() if before.get(layer, width) != width}


def _layer_outputs(model: nn.Module) -> dict[str, int]:
    """Layer -> outputs of its linear map or convolution."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, *_CONVOLUTIONS)):
            found[name] = module.weight.shape[0]
        elif isinstance(module, _TRANSPOSED) or type(module).__name__ == "Conv1D":  # of transformers
            found[name] = module.weight.shape[1]
    return found


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:  # optional, or td_plugin run from a bare checkout
        return ""
