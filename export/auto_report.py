"""What `best_form` tried, what it took, and why nothing else."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from td_plugin.export.forms import Form
from td_plugin.export.latency import LatencyReport
from td_plugin.report import table


@dataclass(frozen=True)
class Candidate:
    """A form that was tried.

    Attributes:
        form: its name.
        bytes: of its file; 0 where there is none.
        relative: largest relative difference from the source; None where there is none.
        score: on the task; None where it was not judged.
        seconds: median of one run; None where it was not timed.
        speedup: over fp32, with its interval, as text.
        rejected: why it was not taken; empty for the one that was.
    """

    form: Form
    bytes: int = 0
    relative: float | None = None
    score: float | None = None
    seconds: float | None = None
    speedup: str = ""
    rejected: str = ""


@dataclass(frozen=True)
class AutoReport:
    """The form taken, and why no other; `str()` is a table.

    Attributes:
        form: the one that was taken.
        path: where it was written.
        candidates: all that were tried, the most exact first.
        latency: how they were timed; None where only one was left to take.
    """

    form: Form
    path: Path
    candidates: tuple[Candidate, ...]
    latency: LatencyReport | None = None

    @property
    def rejected(self) -> dict[Form, str]:
        """Form -> why it was not taken."""
        return {one.form: one.rejected for one in self.candidates if one.rejected}

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "form": self.form,
            "path": str(self.path),
            "candidates": [asdict(one) for one in self.candidates],
            "latency": None if self.latency is None else self.latency.to_dict(),
        }

    def __str__(self) -> str:
        header = ["form", "MB", "p50 ms", "over fp32", "difference", "score"]
        rows = [
            [one.form, f"{one.bytes / 1e6:.2f}" if one.bytes else "-", _shown(one.seconds, "{:.2f}", 1e3), one.speedup]
            + [_shown(one.relative, "{:.1e}"), _shown(one.score, "{:.4g}")]
            for one in self.candidates
        ]
        lines = [table(header, rows), f"taken: {self.form}"]
        lines += [f"not {form}: {reason}" for form, reason in self.rejected.items()]
        return "\n".join([*lines, *(f"note: {note}" for note in (self.latency.notes if self.latency else ()))])


def _shown(value: float | None, form: str, scale: float = 1.0) -> str:
    return "-" if value is None else form.format(value * scale)
