"""Inputs as long as the user's own texts are."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from td_plugin.errors import TdError
from td_plugin.export.probes import flags_of, resized, sequence_axes
from td_plugin.export.runners import Inputs

_MASKS = ("attention_mask", "decoder_attention_mask")


def at_lengths(
    example_inputs: Inputs, lengths: Sequence[int], *, batch: int = 1, draws: int = 32, seed: int = 0
) -> list[dict[str, Any]]:
    """Examples for `benchmark` whose texts are as long as `lengths`, such as the token counts of a data set.

    The lengths are drawn evenly: sorted and cut into as many equal parts as are needed, of each of which one is drawn.
    So 32 draws stand for ten thousand texts better than 32 random ones. A batch is padded to its longest text, the
    attention mask being 0 there.

    Args:
        example_inputs: as the model is called; its rows and tokens are repeated or cut.
        lengths: tokens per text; every text of an encoder-decoder gets the same one.
        batch: rows per example.
        draws: examples; no more than there are lengths to fill them.
        seed: of the draw.

    Raises:
        TdError: no input is a text, a length is below 1, or a count is.
    """
    tensors = {
        name: value if isinstance(value, Tensor) else torch.tensor(value)
        for name, value in example_inputs.items()
        if name not in flags_of(example_inputs)
    }
    axes = sequence_axes(tensors)
    if not axes:
        raise TdError("no input is a text", got=", ".join(tensors), fix="only integer inputs of rank 2 have a length")
    if not lengths or min(lengths) < 1 or batch < 1 or draws < 1:
        got = f"{len(lengths)} lengths from {min(lengths, default=0)}, batch {batch}, {draws} draws"
        raise TdError("lengths, batch and draws are 1 at least", got=got)
    examples = []
    for drawn in _drawn(sorted(lengths), batch, min(draws, -(-len(lengths) // batch)), seed):
        example = resized(tensors, batch, dict.fromkeys(axes.values(), max(drawn)))
        for name in axes.keys() & set(_MASKS):
            example[name] = (torch.arange(max(drawn)) < torch.tensor(drawn)[:, None]).to(tensors[name].dtype)
        examples.append(example)
    return examples


def _drawn(lengths: Sequence[int], batch: int, draws: int, seed: int) -> list[list[int]]:
    """`draws` batches, together one length of each of ``batch * draws`` equal parts of the sorted `lengths`."""
    generator = random.Random(seed)
    count = batch * draws
    picks = [lengths[int((part + generator.random()) * len(lengths) / count)] for part in range(count)]
    generator.shuffle(picks)
    return [picks[start : start + batch] for start in range(0, count, batch)]
