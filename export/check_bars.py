"""What a model must reach to be released: bars, as values and as a file."""

from __future__ import annotations

import difflib
import importlib
import json
import math
import os
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from td_plugin.errors import TdError

_SHARES = ("max_accuracy_drop", "min_accuracy")


@dataclass(frozen=True)
class Bars:
    """Limits; None is no limit.

    Attributes:
        min_speedup: times faster than the other file.
        min_efficiency: that speed-up over the ratio of the FLOPs; 1 where time falls as the work does.
        max_p50_ms: median latency in milliseconds.
        max_p95_ms: latency that 95 % of the runs do not exceed.
        max_p99_ms: the same of 99 %.
        max_size_mb: the file and its weights beside it, in units of 1,000,000 bytes.
        max_accuracy_drop: how much worse the score may be than the other file's on the same rows: absolute, in [0, 1];
            of a perplexity the relative increase.
        min_accuracy: least score, in [0, 1], whatever its metric; not for perplexity.
        max_perplexity: highest perplexity.
        max_difference: largest absolute difference of any output from the model that the file shall equal.
    """

    min_speedup: float | None = None
    min_efficiency: float | None = None
    max_p50_ms: float | None = None
    max_p95_ms: float | None = None
    max_p99_ms: float | None = None
    max_size_mb: float | None = None
    max_accuracy_drop: float | None = None
    min_accuracy: float | None = None
    max_perplexity: float | None = None
    max_difference: float | None = None

    def __post_init__(self) -> None:
        for name, limit in self.given.items():
            number = isinstance(limit, (int, float)) and not isinstance(limit, bool)
            if not number or not math.isfinite(limit) or limit < 0:
                raise TdError("a bar is a number of at least 0", where=name, got=repr(limit))
            if name in _SHARES and limit > 1:
                raise TdError("this bar is a share of 1", where=name, got=limit, fix="0.01 is one percent")

    @property
    def given(self) -> dict[str, float]:
        """Name -> limit of the bars that are set."""
        return {name: limit for name, limit in asdict(self).items() if limit is not None}

    def uses(self, *names: str) -> bool:
        """Whether any of these bars is set."""
        return any(name in self.given for name in names)


BAR_NAMES = tuple(field.name for field in fields(Bars))


def known_keys(values: Mapping[str, Any], known: Collection[str], where: str) -> dict[str, Any]:
    """`values` with underscores for the hyphens in their keys.

    Raises:
        TdError: a key is not among `known`; the nearest one is named.
    """
    found = {key.replace("-", "_"): value for key, value in values.items()}
    for key in found:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1)
            raise TdError("no such key", where=where, got=key, fix=nearest[0] if nearest else f"one of {sorted(known)}")
    return found


def read_bar_file(path: str | os.PathLike[str], known: Collection[str] = BAR_NAMES) -> dict[str, Any]:
    """The keys of a TOML or JSON file, flat, by their names in `Bars` or as options of ``td-plugin check``.

    Python reads TOML itself from 3.11 on; under 3.10 either `tomli` is installed or the same keys stand in a JSON file.

    Raises:
        TdError: the file is missing, is neither, holds an unknown key, or cannot be read by this Python.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TdError("the bar file cannot be read", where=str(path), got=error) from error
    try:
        values = json.loads(text) if file.suffix == ".json" else _toml().loads(text)
    except ValueError as error:  # both decoders' errors are
        if isinstance(error, TdError):
            raise
        kind = "JSON" if file.suffix == ".json" else "TOML"
        raise TdError(f"the bar file is no {kind}", where=str(path), got=error) from error
    if not isinstance(values, dict):
        raise TdError("the bar file holds no keys", where=str(path), got=type(values).__name__)
    return known_keys(values, known, str(path))


def _toml() -> Any:
    for name in ("tomllib", "tomli"):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise TdError("Python 3.10 does not read TOML", fix="pip install tomli, or write the bars as a .json file")
