"""An ONNX file as transformers knows a model, so that its own pipelines and its own `generate` run it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import ModelOutput

from td_plugin.errors import TdError
from td_plugin.export.decoding import PAST, PRESENT
from td_plugin.export.session import DTYPES, fit_inputs
from td_plugin.export.verify import graph_outputs

MADE_UP = ("attention_mask", "token_type_ids", "position_ids")
"""Inputs that a graph gets although no tokenizer gave them: what the torch model takes in their place."""

_NAMED = ("logits", "last_hidden_state")


@dataclass(frozen=True)
class ServedGraph:
    """An open session, and what of it every call needs.

    Attributes:
        session: of onnxruntime; several threads may run it at a time.
        where: what errors call the file.
        inputs: what the graph takes, as the session states it.
        longest: tokens that the model was made for; None where nobody says.
        generates: whether it is a decoder that writes texts.
    """

    session: Any
    where: str
    inputs: tuple[Any, ...]
    longest: int | None = None
    generates: bool = False

    @property
    def past(self) -> list[Any]:
        """The inputs that are keys and values of earlier tokens; empty for a graph without a cache."""
        return [entry for entry in self.inputs if entry.name.startswith(PAST)]

    def run(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs by name. Inputs that the graph lacks are left out, dtypes are made the graph's.

        Raises:
            TdError: an input is missing or does not fit, the text is too long, or onnxruntime fails.
        """
        ready = {entry.name: _as_stated(given[entry.name], entry) for entry in self.inputs if entry.name in given}
        try:
            return graph_outputs(self.session, fit_inputs(self.inputs, ready, self.where), self.where)
        except TdError as error:
            tokens = given["input_ids"].shape[1] if "input_ids" in given else 0
            if self.longest is None or tokens <= self.longest:
                raise
            raise TdError(
                "the text is longer than the model can take",
                where=self.where,
                got=f"{tokens} tokens, at most {self.longest}",
                fix=f"call with truncation=True, max_length={self.longest}",
            ) from error


class OnnxModel(PreTrainedModel, GenerationMixin):
    """A graph that is called, and generates, as the torch model it was made of; it has no parameters."""

    main_input_name = "input_ids"

    def __init__(self, config: PreTrainedConfig, graph: ServedGraph) -> None:
        super().__init__(config)  # type: ignore[no-untyped-call]
        self.graph = graph

    @property
    def device(self) -> torch.device:
        """Where inputs are taken from; a provider for another device copies them there."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Of the answers."""
        return torch.float32

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        **inputs: Any,  # pixel_values and the like, and the flags that transformers passes to every model
    ) -> ModelOutput:
        """Run the graph; the keys and values of a cache come back as a new cache.

        Args:
            input_ids: ``[batch, tokens]``.
            attention_mask: ``[batch, tokens]``, with a cache that of the earlier tokens too.
            position_ids: ``[batch, tokens]``.
            past_key_values: of the earlier tokens.
            use_cache: asked of a graph without a cache, an error.
            inputs: tensors by name; others are left out.

        Raises:
            TdError: as `ServedGraph.run`.
        """
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids, **inputs}
        tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
        if self.graph.past:
            return _with_cache(self.graph, tensors, past_key_values)
        if use_cache and self.graph.generates:
            fix = "leave out use_cache, or write the file with to_cached_onnx"
            raise TdError("the graph has no cache", where=self.graph.where, got="use_cache=True", fix=fix)
        tensors = {**_made_up(tensors), **tensors}
        if self.graph.generates and not bool(tensors["attention_mask"].all()):
            return _row_by_row(self.graph, tensors)
        return ModelOutput(**_named(self.graph.run(tensors)))  # type: ignore[no-untyped-call]


def _as_stated(value: Tensor, entry: Any) -> Tensor:
    """`value` in the dtype of the graph, if that is of the same kind."""
    wanted = DTYPES.get(entry.type)
    same = wanted is not None and wanted.is_floating_point == value.is_floating_point() and wanted is not torch.bool
    return value.to(wanted) if same else value


def _made_up(given: Mapping[str, Tensor], earlier: int = 0) -> dict[str, Tensor]:
    """`MADE_UP` for a text: nothing is padding, all is of the first segment; positions leave padding out."""
    if "input_ids" not in given:
        return {}
    ids = given["input_ids"]
    mask = given.get("attention_mask", torch.ones(len(ids), earlier + ids.shape[1], dtype=torch.long))
    places = (mask.long().cumsum(1) - 1).clamp_min(0)[:, earlier:]
    return dict(zip(MADE_UP, (mask, torch.zeros_like(ids), places), strict=True))


def _with_cache(graph: ServedGraph, given: dict[str, Tensor], cache: Cache | None) -> CausalLMOutputWithPast:
    ids = given["input_ids"]
    earlier = 0 if cache is None else int(cache.get_seq_length())
    feeds = {**_made_up(given, earlier), **given}
    for entry in graph.past:
        if cache is None or not earlier:
            shape = (len(ids), entry.shape[1], 0, entry.shape[3])
            feeds[entry.name] = torch.zeros(shape, dtype=DTYPES.get(entry.type))
        else:
            layer, kind = _place(entry.name)
            held: Any = cache.layers[layer]
            feeds[entry.name] = held.keys if kind == "key" else held.values
    outputs = graph.run(feeds)
    layers = 1 + max(_place(entry.name)[0] for entry in graph.past)
    pairs = [(outputs[f"{PRESENT}{index}.key"], outputs[f"{PRESENT}{index}.value"]) for index in range(layers)]
    return CausalLMOutputWithPast(logits=outputs["logits"].float(), past_key_values=DynamicCache(pairs))


def _place(name: str) -> tuple[int, str]:
    """``past_key_values.3.key`` -> 3, key."""
    layer, kind = name.removeprefix(PAST).split(".")
    return int(layer), kind


def _row_by_row(graph: ServedGraph, given: Mapping[str, Tensor]) -> ModelOutput:
    """Without padding: a graph without a cache counts its positions from the first token, padding or not."""
    last = []
    for ids, kept in zip(given["input_ids"], given["attention_mask"], strict=True):
        row = {"input_ids": ids[kept != 0][None]}
        last.append(_named(graph.run({**_made_up(row), **row}))["logits"][:, -1:])
    return ModelOutput(logits=torch.cat(last))  # type: ignore[no-untyped-call]


def _named(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What half precision computed as float32, and the first output as logits where it has a name of another tool."""
    found = {name: value.float() if value.is_floating_point() else value for name, value in outputs.items()}
    if any(name in found for name in _NAMED):
        return found
    first, *others = found
    return {"logits": found[first], **{name: found[name] for name in others}}
