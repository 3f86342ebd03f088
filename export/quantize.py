"""int8 weights for an ONNX file."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Literal

from td_plugin.errors import TdError
from td_plugin.export.calibration import Calibration
from td_plugin.export.external_data import staged_graph
from td_plugin.export.form_makers import Order
from td_plugin.export.forms import make_form
from td_plugin.export.runners import Inputs
from td_plugin.export.source_graph import open_source

Mode = Literal["dynamic", "static", "weight"]
_FORMS = {"dynamic": "int8", "static": "int8-static", "weight": "int8-weight"}


def quantize(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    mode: Mode = "dynamic",
    calibration: Iterable[Inputs] | None = None,
    keep: Collection[str] = (),
) -> Path:
    """Write the int8 form of an fp32 ONNX file: weights per channel, activations quantized while it runs.

    Dynamic quantization needs no calibration data. Linear layers and embeddings become int8, convolutions stay fp32.
    The metadata of `source` is kept. Compare the result with ``verify(model, target, batches)`` on real data, or let
    `forms.derive` compare the two files.

    Args:
        source: what `to_onnx` wrote. Not a graph with fused attention: its weights would stay fp32.
        target: the file to write, another one than `source`.
        mode: ``"static"``: with scales from `calibration`; convolutions too, but not the layers that make the output.
            ``"weight"``: stored in 8 bits, computed in float.
        calibration: for ``"static"``: batches of the user's data.
        keep: layers that stay as they are: their names, or patterns such as ``"*.attention.*"``.

    Returns:
        `target`.

    Raises:
        TdError: `source` is missing, damaged or already quantized, has no linear layer or embedding, or is `target`;
            calibration data are missing, do not fit or are not finite.
    """
    if mode not in _FORMS:
        raise TdError("no such mode", got=mode, fix=f"one of {', '.join(_FORMS)}")
    origin = open_source(source, target)
    data = None if calibration is None else Calibration(calibration, str(source))
    with staged_graph(target) as staged:
        make_form(origin, staged, Order(_FORMS[mode], data, origin.selected(keep)))
    return Path(target)
