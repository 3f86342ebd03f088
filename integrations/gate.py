"""What ``td-plugin check`` does: options and a bar file become a check, and its outcome becomes files for CI."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from td_plugin.errors import TdError
from td_plugin.export.check import check
from td_plugin.export.check_bars import BAR_NAMES, Bars, known_keys, read_bar_file
from td_plugin.export.check_latency import Timing
from td_plugin.export.check_report import CheckReport
from td_plugin.files import staged_file

if TYPE_CHECKING:
    from torch import nn

    from td_plugin.export.evaluation import Examples

_PATHS = ("against", "equal_to", "tokenizer")
_COUNTS = ("batch", "sequence", "threads", "rounds", "sessions", "max_length", "max_rows")
_TEXTS = ("data", "metric", "split", "text_column", "pair_column", "image_column", "label_column")
KEYS = (*BAR_NAMES, *_PATHS, *_COUNTS, *_TEXTS)
"""What a bar file may hold: the options of ``td-plugin check``."""


@dataclass(frozen=True)
class Gate:
    """A check that is all set.

    Attributes:
        model: the ONNX file.
        bars: its limits.
        settings: the other keys of `KEYS` that were given.
    """

    model: Path
    bars: Bars
    settings: Mapping[str, Any]


def read_gate(model: Path, options: Mapping[str, Any], bar_file: Path | None = None) -> Gate:
    """Options and the keys of a bar file; where both give one, the option counts.

    Paths in the file are seen from its directory.

    Raises:
        TdError: a key is unknown, a value of the wrong type, or the bar file cannot be read.
    """
    values = {} if bar_file is None else read_bar_file(bar_file, KEYS)
    where = str(bar_file)
    for name, value in values.items():
        if name in _PATHS or name in _TEXTS:
            values[name] = _text(name, value, where)
        if name in _PATHS or (name == "data" and bar_file is not None and (bar_file.parent / value).exists()):
            values[name] = str(Path(where).parent / value)
    values.update(known_keys({name: value for name, value in options.items() if value is not None}, KEYS, "options"))
    bars = Bars(**{name: value for name, value in values.items() if name in BAR_NAMES})
    return Gate(model, bars, {name: value for name, value in values.items() if name not in BAR_NAMES})


def _text(name: str, value: Any, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise TdError("a text is needed", where=f"{where}: {name}", got=repr(value))
    return value


def run_gate(gate: Gate, progress: bool = False) -> CheckReport:
    """Load what the check needs, and check.

    Raises:
        TdError: a file, the data, the tokenizer or the checkpoint cannot be read, or do not fit.
    """
    given = gate.settings
    timing = Timing(
        progress=progress, **{f.name: given[f.name] for f in fields(Timing) if f.name in given and f.name in _COUNTS}
    )
    return check(
        gate.model,
        gate.bars,
        against=given.get("against"),
        data=_examples(gate) if "data" in given else None,
        equal_to=_reference(given["equal_to"]) if "equal_to" in given else None,
        timing=timing,
    )


def _examples(gate: Gate) -> Examples:
    from td_plugin.integrations.evaluation_data import examples_of

    return examples_of(gate.settings, gate.model.parent)


def _reference(path: str | Path) -> nn.Module | Path:
    if not Path(path).is_dir():
        return Path(path)
    from td_plugin.integrations.checkpoints import load_checkpoint

    return load_checkpoint(Path(path))


def write_outcome(
    report: CheckReport, *, junit: Path | None = None, markdown: Path | None = None, job_summary: bool = False
) -> None:
    """Write the outcome for CI.

    Args:
        report: of the check.
        junit: JUnit XML.
        markdown: a section in Markdown.
        job_summary: append that section to the file that ``GITHUB_STEP_SUMMARY`` names.

    Raises:
        TdError: a file cannot be written, or there is no such variable.
    """
    for path, text in ((junit, report.junit), (markdown, report.markdown)):
        if path is not None:
            with staged_file(path) as staged:
                staged.write_text(text(), encoding="utf-8")
    if job_summary:
        summary = summary_file()
        try:
            with summary.open("a", encoding="utf-8") as file:
                file.write(report.markdown() + "\n")
        except OSError as error:
            raise TdError("the job summary cannot be written", where=str(summary), got=error) from error


def summary_file() -> Path:
    """The file of GitHub's job summary.

    Raises:
        TdError: this is no job of GitHub Actions.
    """
    path = os.environ.get("GITHUB_STEP_SUMMARY", "")
    if not path:
        raise TdError("GITHUB_STEP_SUMMARY is not set", fix="--markdown FILE, outside of GitHub Actions")
    return Path(path)
