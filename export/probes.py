"""Batches of other sizes and lengths, made of an example's rows."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

Batch = Mapping[str, Any]
"""Inputs by name, as the model is called: tensors whose first dimension is the batch, and flags (``use_cache``)."""

# Texts of an encoder-decoder have lengths of their own; transformers tells them apart by these beginnings.
_SIDES = ("decoder_", "encoder_")
# Floats with one row per token, as transformers calls them; the sizes of any other float are the model's own.
_STATES = ("inputs_embeds", "decoder_inputs_embeds", "encoder_hidden_states")
_MASKS = ("attention_mask", "decoder_attention_mask")
_MOST_TOKENS = 1024  # of a probe: attention takes their square, and a decoder may state a hundred thousand positions


def tensors_of(inputs: Batch) -> dict[str, Tensor]:
    """The inputs of a graph: those that are tensors."""
    return {name: value for name, value in inputs.items() if isinstance(value, Tensor)}


def flags_of(inputs: Batch) -> dict[str, Any]:
    """The inputs that a graph cannot have: booleans, numbers, strings and None are constants of the call."""
    return {
        name: value for name, value in inputs.items() if value is None or isinstance(value, (bool, int, float, str))
    }


def sequence_axes(inputs: Batch) -> dict[str, str]:
    """Name of each text input -> what its second dimension, the length of the text, is called.

    A text is of rank 2 and integer or bool, or hidden states by their name in transformers. Inputs of one text share
    an axis: ``sequence``, ``decoder_sequence`` or ``encoder_sequence``; another length on the same side gets its own.
    """
    known: dict[tuple[str, int], str] = {}
    axes = {}
    for name, tensor in tensors_of(inputs).items():
        if (tensor.ndim == 2 and not tensor.is_floating_point()) or (tensor.ndim == 3 and name in _STATES):
            side = next((side for side in _SIDES if name.startswith(side)), "")
            usual = f"{side}sequence"
            axis = usual if usual not in known.values() else f"{name}_sequence"
            axes[name] = known.setdefault((side, tensor.shape[1]), axis)
    return axes


def text_lengths(inputs: Batch) -> dict[str, int]:
    """Axis of `sequence_axes` -> tokens."""
    return {axis: inputs[name].shape[1] for name, axis in sequence_axes(inputs).items()}


def text_length(inputs: Batch) -> int | None:
    """Tokens of the first text; None where there are none."""
    return next(iter(text_lengths(inputs).values()), None)


def resized(inputs: Batch, rows: int, lengths: Mapping[str, int] | None = None) -> dict[str, Any]:
    """`inputs` cut or repeated to `rows` rows and, where `lengths` names their axis, to as many tokens."""
    axes, result = sequence_axes(inputs), dict(inputs)
    for name, tensor in tensors_of(inputs).items():
        result[name] = tensor[torch.arange(rows) % tensor.shape[0]]
        length = (lengths or {}).get(axes.get(name, ""))
        if length is not None:
            result[name] = result[name][:, torch.arange(length) % tensor.shape[1]]
    return result


def traced_example(inputs: Batch) -> dict[str, Any]:
    """An example in which no two dimensions can be taken for one another.

    torch.export turns a dimension of 1 into a constant. Two rows, and texts that are shorter than the longest probe
    and have no length in common with the batch or with each other, leave nothing to mix up.
    """
    return resized(inputs, 2, _apart({axis: max(3, length // 2) for axis, length in text_lengths(inputs).items()}, 1))


def make_probe_batches(example_inputs: Batch) -> list[dict[str, Any]]:
    """Batches made of the example's rows that a faithful ONNX file must get right.

    One and three rows; for text also two lengths (the example's and a third of it), and among three rows one padded
    on the right and one on the left. Two texts never have one length.

    Args:
        example_inputs: dict of tensors, first dimension the batch, and flags.
    """
    found = text_lengths(example_inputs)
    sizes: list[dict[str, int]] = [{}]
    if found:
        sizes = [
            {axis: max(least, length // share) for axis, length in found.items()} for least, share in ((1, 3), (2, 1))
        ]
    batches = [resized(example_inputs, rows, _apart(size, -1)) for rows in (1, 3) for size in sizes]
    for batch in batches:
        for name in sequence_axes(batch).keys() & set(_MASKS):
            mask = batch[name]
            padding = mask.shape[1] // 3 if len(mask) == 3 else 0
            mask[:1, mask.shape[1] - padding :] = 0
            mask[1:2, :padding] = 0
    return batches


def make_parity_batches(example_inputs: Batch, longest: int | None = None) -> list[dict[str, Any]]:
    """`make_probe_batches` and the ends of what a graph with dynamic sizes has to stand.

    Five rows; for text also one token alone, an odd length with padding on the left, on the right and on both sides,
    and two rows of the longest text, one of them half padding.

    Args:
        example_inputs: dict of tensors, first dimension the batch, and flags.
        longest: tokens of the longest text, as `longest_text` says, of which at most 1024 are tried; None: as
            many as the example has.
    """
    found = text_lengths(example_inputs)
    batches = make_probe_batches(example_inputs)
    if not found:
        return [*batches, resized(example_inputs, 5)]
    odd = {axis: max(3, length - 1 + length % 2) for axis, length in found.items()}
    most = {axis: length if longest is None else min(longest, _MOST_TOKENS) for axis, length in found.items()}
    single, padded, long = (
        resized(example_inputs, rows, _apart(lengths, step))
        for rows, lengths, step in ((1, dict.fromkeys(found, 1), 1), (5, odd, -1), (2, most, -1))
    )
    for batch in (single, padded, long):
        for name in sequence_axes(batch).keys() & set(_MASKS):
            mask = batch[name]
            mask[:] = 1
            if batch is single:
                continue
            share = mask.shape[1] // (3 if batch is padded else 2)
            mask[0, :share] = 0
            if batch is padded:
                mask[1, mask.shape[1] - share :] = 0
                mask[2, :share] = mask[2, mask.shape[1] - share :] = 0
    return [*batches, single, padded, long]


def longest_text(model: nn.Module) -> int | None:
    """Tokens that a model of transformers has positions for; None where it does not say, or counts without a limit."""
    library = sys.modules.get("transformers")
    if library is None or not isinstance(model, library.PreTrainedModel):
        return None
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(most, int) or most < 1:
        return None
    # RoBERTa and its kin number real tokens from the padding token's id on: the rows before are not for them.
    skipped = [
        table.padding_idx + 1
        for table in model.modules()
        if isinstance(table, nn.Embedding) and table.num_embeddings == most and table.padding_idx is not None
    ]
    return most - max(skipped, default=0) if most > max(skipped, default=0) else None


def _apart(lengths: Mapping[str, int], step: int) -> dict[str, int]:
    """Lengths of which no two are equal, as far as there are any: the later one gives way by `step`."""
    result: dict[str, int] = {}
    for axis, length in lengths.items():
        while length in result.values() and length + step > 0:
            length += step  # noqa: PLW2901
        result[axis] = length
    return result
