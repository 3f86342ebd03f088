"""How far a derived form is from the file it came from, on whatever inputs can be had."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from td_plugin.errors import TdError
from td_plugin.export.decoding import PAST
from td_plugin.export.parity import Precision, Tolerance
from td_plugin.export.probes import Batch, make_parity_batches
from td_plugin.export.session import fit_inputs, open_session
from td_plugin.export.verify_forms import FormParity, verify_forms

_ROWS, _TOKENS = 4, 16  # of inputs made up
_MASKS = ("attention_mask", "decoder_attention_mask")
_CACHED = ((2, 0, 5), (3, 4, 1), (1, 3, 2))  # rows, tokens in the cache, new tokens


def comparison_batches(
    path: str | os.PathLike[str], example_inputs: Batch | Sequence[Batch] | None, seen: Sequence[Batch] = ()
) -> list[dict[str, Any]]:
    """Inputs that two forms of one graph are compared on.

    Args:
        path: the graph.
        example_inputs: as the model is called; one example is varied in size, padding and length, several are taken as
            they are. None: `seen`, or inputs made up from what the graph says of its inputs.
        seen: batches of the user's data, if any were read.

    Raises:
        TdError: none fits the graph, or none can be made up.
    """
    session, where = open_session(path), str(path)
    wanted = session.get_inputs()
    if isinstance(example_inputs, Sequence) or (example_inputs is None and seen):
        given = [dict(batch) for batch in (example_inputs if isinstance(example_inputs, Sequence) else seen)]
    elif keeps_cache(wanted):
        given = [{**cached_inputs(wanted, *sizes)} for sizes in _CACHED]
        given += [dict(example_inputs)] if isinstance(example_inputs, Mapping) else []
    elif example_inputs is not None:
        given = make_parity_batches(example_inputs)
    else:
        from td_plugin.export.example_inputs import inputs_for_graph

        given = make_parity_batches(inputs_for_graph(path, _ROWS, _TOKENS))
    return _fitting(wanted, given, where)


def _fitting(wanted: Sequence[Any], batches: list[dict[str, Any]], where: str) -> list[dict[str, Any]]:
    """Those that the graph takes: another exporter may have fixed some sizes."""
    found, problem = [], TdError("no batches to compare on", where=where)
    for batch in batches:
        try:
            fitted = fit_inputs(wanted, batch, where)
        except TdError as error:
            problem = error
            continue
        if all(mask.any() for name, mask in fitted.items() if name in _MASKS):  # else there is nothing to compare
            found.append({**fitted})
    if not found:
        raise problem
    return found


def keeps_cache(wanted: Sequence[Any]) -> bool:
    """Whether the inputs of a graph are those of a decoder with a cache, such as `to_cached_onnx` writes."""
    return any(entry.name.startswith(PAST) for entry in wanted)


def cached_inputs(wanted: Sequence[Any], rows: int, held: int, new: int) -> dict[str, Tensor]:
    """A prompt, or tokens after others, for a decoder with a cache; of several rows all but the last are padded.

    Args:
        wanted: the inputs of the graph, as a session gives them.
        rows: how many texts.
        held: tokens in the cache.
        new: tokens after them.
    """
    generator = torch.Generator().manual_seed(held)
    mask = torch.ones(rows, held + new, dtype=torch.long)
    mask[: rows - 1, 0] = 0
    made = {
        "input_ids": torch.randint(1, 10, (rows, new), generator=generator),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp_min(0)[:, held:],
    }
    for entry in wanted:
        if entry.name.startswith(PAST):
            made[entry.name] = torch.randn(rows, entry.shape[1], held, entry.shape[3], generator=generator)
    return made


def beyond(found: FormParity) -> str:
    """Why a form is not within the tolerance of its precision; empty if it is."""
    parity, allowed = found.parity, found.tolerance.bound
    if not found.problem or not math.isfinite(parity.max_abs):
        return found.problem
    if parity.precision == "fp32":
        return f"a value differs by {parity.max_abs:.2g}, {allowed:g} is allowed"
    return f"relative difference {parity.relative:.2g}, {allowed:g} is allowed for {parity.precision}"


def compare_files(
    source: Path,
    other: Path,
    batches: Sequence[Batch],
    tolerances: Mapping[Precision, Tolerance] | None = None,
    name: str = "form",
) -> FormParity:
    """`verify_forms` of two files.

    Raises:
        TdError: one of them cannot run.
    """
    return verify_forms({}, {"source": source, name: other}, batches, tolerances=tolerances).forms[0]
