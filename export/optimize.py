"""What `to_onnx` makes of the fp32 file before it puts it in place."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import cast

from td_plugin.errors import TdError
from td_plugin.export.auto_form import best_form
from td_plugin.export.external_data import data_path, move_pair
from td_plugin.export.forms import FORMS, UNFUSED, Form, derive
from td_plugin.export.probes import Batch


def check_optimize(optimize: str) -> None:
    """Nothing, if `to_onnx` can do this.

    Raises:
        TdError: it is no form, or one that needs data.
    """
    if optimize in ("none", "auto"):
        return
    if optimize not in FORMS:
        raise TdError("no such form", where="optimize", got=optimize, fix=f"none, auto, or one of {', '.join(FORMS)}")
    if optimize == "int8-static":
        fix = "derive(path, target, 'int8-static', calibration=...) from the fp32 file"
        raise TdError("this form needs calibration data", where="optimize", got=optimize, fix=fix)


def optimize_staged(staged: Path, optimize: str, example_inputs: Batch, limit: int) -> None:
    """Replace an fp32 file that nobody reads yet by a form of it; warn where that is not had, or not close."""
    if optimize == "none":
        return
    place = staged.parent / "optimized" / staged.name
    if optimize == "auto":
        best_form(staged, place, example_inputs, limit=limit)
    else:
        report = derive(staged, place, cast(Form, optimize), example_inputs=example_inputs, limit=limit)
        for problem in (*(note for note in report.notes if note.startswith(UNFUSED)), report.problem):
            if problem:
                warnings.warn(problem, stacklevel=3)
    data_path(staged).unlink(missing_ok=True)
    move_pair(place, staged)
