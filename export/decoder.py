"""From a decoder to one ONNX file that keeps its keys and values, for generating token by token."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from td_plugin.errors import TdError, first_line
from td_plugin.export.decoding import PAST, PRESENT
from td_plugin.export.external_data import LIMIT, save_program, staged_graph
from td_plugin.export.provenance import check_exportable, provenance
from td_plugin.export.quiet import quiet
from td_plugin.export.session import require
from td_plugin.export.verify_decoding import verify_decoding
from td_plugin.own_forward import unwrap
from td_plugin.parametrization import bake

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CACHE = re.compile(r"(?:(?:input|output)\.)?past_key_values\.layers\.(\d+)\.(key|value)s")
_NO_CACHE = "only decoders whose whole state is the keys and values of each layer are supported"


def to_cached_onnx(
    model: PreTrainedModel,
    path: str | os.PathLike[str],
    *,
    opset: int = 20,
    tolerance: float | None = None,
    metadata: Mapping[str, str] | None = None,
    limit: int = LIMIT,
) -> Path:
    """Write a decoder as one ONNX file for both the prompt and the tokens after it.

    Inputs: ``input_ids [batch, sequence]``, ``attention_mask [batch, past_sequence + sequence]``, ``position_ids``
    where the model takes them, and ``past_key_values.0.key``, ``.value`` ... ``[batch, heads, past_sequence, size]``,
    of no tokens before the prompt. Outputs: ``logits`` and ``present.0.key`` ..., the next call's past. These are the
    names that optimum and its users know. Heads may differ from layer to layer. The file is compared with ``generate``
    token by token, on prompts with and without padding, and moved into place only if it agrees.

    Args:
        model: a causal language model, float32; masks of td_plugin are baked into a copy.
        path: the file to write.
        opset: of the ONNX standard operators.
        tolerance: of the logits; see `verify_decoding`.
        metadata: written into the file, as `to_onnx` does.
        limit: bytes of weights beyond which they are put in a file beside the graph, ``<name>.data``.

    Raises:
        TdError: the model does not generate, has another cache than keys and values, cannot be exported, or the file
            differs from it; `path` is left as it was.
    """
    require("onnxscript")
    if not model.can_generate() or model.config.is_encoder_decoder:
        raise TdError(_NO_CACHE, where=type(model).__name__, fix="to_onnx writes a graph without a cache")
    ready = copy.deepcopy(model).cpu()
    unwrap(ready)
    bake(ready)
    ready.train(False).requires_grad_(False)
    check_exportable(ready)
    properties = provenance(ready, metadata or {})
    prompts = example_prompts(ready)
    with staged_graph(path) as staged:
        graph = _export(ready, prompts, opset)
        _rename(graph, str(path))
        graph.metadata_props.update(properties)
        save_program(graph, staged, limit=limit)
        for given in (prompts, {name: value[1:, 2:] for name, value in prompts.items()}):
            verify_decoding(ready, staged, given, new_tokens=6, tolerance=tolerance)
    return Path(path)


def example_prompts(model: PreTrainedModel) -> dict[str, Tensor]:
    """Three rows of made-up tokens, the first padded on the left, for `verify_decoding`."""
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(min(10, vocabulary), (3, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _export(model: PreTrainedModel, prompts: dict[str, Tensor], opset: int) -> Any:
    """The `onnx_ir.Model` of one call with a cache, of any number of tokens."""
    from transformers import GenerationConfig
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter
    from transformers.exporters.utils import decompose_for_generation

    where = type(model).__name__
    try:
        with quiet(), torch.no_grad():
            settings = GenerationConfig(pad_token_id=0, do_sample=False)  # type: ignore[no-untyped-call]
            # Two tokens after the prompt: one would become a constant of the graph.
            stages = decompose_for_generation(model, dict(prompts), settings, multi_token_decode=True)
            _, inputs = stages["decode"]
            config = OnnxConfig(dynamic=True, dynamic_shapes=_axes(inputs), opset_version=opset)
            exporter = OnnxExporter()  # type: ignore[no-untyped-call]
            return exporter.export(model, inputs, config).program
    except Exception as error:  # the model's own code and two compilers are in there
        got = f"{type(error).__name__}: {first_line(error)}"
        raise TdError("the model cannot be exported with a cache", where=where, got=got) from error


def _axes(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Which sizes vary: of a cache's tensors ``[batch, heads, tokens, size]`` the first and the third."""
    auto = torch.export.Dim.AUTO  # lengths depend on each other, which is for torch to find out
    axes: dict[str, Any] = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            axes[name] = dict.fromkeys(range(value.ndim), auto)
        elif name == "past_key_values":
            axes[name] = [{0: auto, 2: auto} for _ in range(2 * len(value.layers))]
    return axes


def _rename(graph: Any, where: str) -> None:
    """Names of optimum, readable axes, and no traces of this machine."""
    ir = require("onnx_ir")
    for value, prefix in [*((v, PAST) for v in graph.graph.inputs), *((v, PRESENT) for v in graph.graph.outputs)]:
        found = _CACHE.fullmatch(value.name)
        if found:
            value.name = f"{prefix}{found[1]}.{found[2]}"
            axes = ["batch", None, "past_sequence" if prefix == PAST else "past_sequence + sequence", None]
            value.shape = ir.Shape([axis or int(str(size)) for axis, size in zip(axes, value.shape, strict=True)])
        elif value.name in ("input_ids", "position_ids", "attention_mask"):
            length = "past_sequence + sequence" if value.name == "attention_mask" else "sequence"
            value.shape = ir.Shape(["batch", length])
        elif value.name == "logits":
            value.shape = ir.Shape(["batch", "sequence", value.shape[-1]])
        else:
            raise TdError(_NO_CACHE, where=where, got=value.name)
    if not any(value.name.startswith(PAST) for value in graph.graph.inputs):
        raise TdError(_NO_CACHE, where=where, got=[value.name for value in graph.graph.inputs])
    for node in graph.graph.all_nodes():
        for key in set(node.metadata_props) - {"namespace"}:  # viewers group nodes by it
            del node.metadata_props[key]
