"""Greedy decoding on ONNX graphs: with a cache, with an encoder, or from scratch for each token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from td_plugin.errors import TdError, first_line
from td_plugin.export.probes import Batch, tensors_of

PAST, PRESENT = "past_key_values.", "present."
"""How the inputs and outputs of a cached graph begin: ``past_key_values.0.key`` becomes ``present.0.key``."""

Step = Callable[[Tensor], Tensor]
"""Tokens to append ``[rows, tokens]`` -> logits of the token after them ``[rows, vocabulary]``."""


def greedy(
    session: Any,
    inputs: Batch,
    max_new_tokens: int,
    start: int | None = None,
    end: int | None = None,
    *,
    where: str = "",
) -> tuple[Tensor, Tensor]:
    """Append the most likely token, again and again.

    Args:
        session: an open session; its input names tell what kind of graph it is.
        inputs: ``input_ids [rows, tokens]`` and ``attention_mask``; prompts of a decoder are padded on the left.
        max_new_tokens: how many.
        start: the token that an encoder-decoder's output begins with.
        end: a row that has chosen it goes on with it; when all have, decoding ends early.
        where: what errors call the file.

    Returns:
        Tokens ``[rows, new]`` and the logits they were chosen from ``[rows, new, vocabulary]``.

    Raises:
        TdError: the graph is of another kind, or onnxruntime cannot run it.
    """
    names = [entry.name for entry in session.get_inputs()]
    if "input_ids" not in names or "input_ids" not in inputs:
        raise TdError("a graph that generates takes input_ids", where=where, got=", ".join(names))
    prompt = tensors_of(inputs)["input_ids"].cpu()
    if any(name.startswith(PAST) for name in names):
        step, fed = _cached(session, inputs, where), prompt
    elif "decoder_input_ids" in names:
        if start is None:
            raise TdError("an encoder-decoder needs the token to start from", where=where, fix="decoder_start_token_id")
        step, fed = _with_encoder(session, inputs, where), torch.full((len(prompt), 1), start)
    else:
        step, fed = _from_scratch(session, inputs, where), prompt[:, :0]
    chosen, seen = [], []
    ended = torch.zeros(len(prompt), dtype=torch.bool)
    for _ in range(max_new_tokens):
        logits = step(fed)
        token = logits.argmax(-1)
        if end is not None:
            token[ended] = end
            ended |= token == end
        chosen.append(token)
        seen.append(logits)
        if ended.all():
            break
        fed = token[:, None]
    return torch.stack(chosen, 1), torch.stack(seen, 1)


def _run(session: Any, feeds: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    taken = [entry.name for entry in session.get_inputs()]
    missing = [name for name in taken if name not in feeds]
    if missing:
        raise TdError("the graph needs inputs that decoding does not make", where=where, got=", ".join(missing))
    try:
        values = session.run(None, {name: feeds[name].numpy() for name in taken})
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise TdError("onnxruntime cannot run the graph", where=where, got=first_line(error)) from error
    names = (entry.name for entry in session.get_outputs())
    return {name: torch.from_numpy(value) for name, value in zip(names, values, strict=True)}


def _mask(inputs: Batch) -> Tensor:
    given = tensors_of(inputs)
    return given.get("attention_mask", torch.ones_like(given["input_ids"])).cpu()


def _cached(session: Any, inputs: Batch, where: str) -> Step:
    """Each run is fed the new tokens and the keys and values of all before them; before the prompt there are none."""
    mask = _mask(inputs)
    past = {
        entry.name: torch.zeros(len(mask), entry.shape[1], 0, entry.shape[3])
        for entry in session.get_inputs()
        if entry.name.startswith(PAST)
    }

    def step(tokens: Tensor) -> Tensor:
        nonlocal mask, past
        held = next(iter(past.values())).shape[2]
        if held:  # the prompt's mask was given
            mask = torch.cat([mask, torch.ones_like(tokens)], 1)
        places = (mask.cumsum(1) - 1).clamp_min(0)[:, held:]  # as generate counts: padding takes no place
        outputs = _run(session, {"input_ids": tokens, "attention_mask": mask, "position_ids": places, **past}, where)
        past = {name: outputs[PRESENT + name.removeprefix(PAST)] for name in past}
        return outputs["logits"][:, -1]

    return step


def _with_encoder(session: Any, inputs: Batch, where: str) -> Step:
    given = {name: value.cpu() for name, value in tensors_of(inputs).items() if name != "labels"}
    written = torch.zeros(len(given["input_ids"]), 0, dtype=torch.long)

    def step(tokens: Tensor) -> Tensor:
        nonlocal written
        written = torch.cat([written, tokens], 1)
        feeds = {**given, "decoder_input_ids": written, "decoder_attention_mask": torch.ones_like(written)}
        return _run(session, feeds, where)["logits"][:, -1]

    return step


def _from_scratch(session: Any, inputs: Batch, where: str) -> Step:
    """Row by row without padding: such a graph counts its positions from the first token, padding or not."""
    prompts = tensors_of(inputs)["input_ids"].cpu()
    rows = [row[kept != 0][None] for row, kept in zip(prompts, _mask(inputs), strict=True)]

    def step(tokens: Tensor) -> Tensor:
        nonlocal rows
        rows = [torch.cat([row, new[None]], 1) for row, new in zip(rows, tokens, strict=True)]
        found = [_run(session, {"input_ids": row, "attention_mask": torch.ones_like(row)}, where) for row in rows]
        return torch.cat([outputs["logits"][:, -1] for outputs in found])

    return step
