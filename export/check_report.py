"""Which bars hold: the outcome of a check, as values, as text, as Markdown and as JUnit XML."""

from __future__ import annotations

import platform
import re
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from typing import Any
from xml.etree import ElementTree

from td_plugin.export.latency import LatencyReport
from td_plugin.export.latency_table import machine, workload
from td_plugin.export.scores import Score
from td_plugin.report import table

RULE = (
    "Times and speed-ups are measured: of their 95 % interval the end that speaks against the file is held against the "
    "bar. Sizes, scores and differences come out the same every time and are compared as they are."
)


@dataclass(frozen=True)
class BarResult:
    """One bar.

    Attributes:
        name: as in `Bars`.
        limit: the bar.
        value: what was found; None if it could not be judged.
        compared: the number held against the limit: `value`, or the end of its interval that speaks against the file;
            None if the bar could not be judged.
        low: lower end of the 95 % interval of `value`; None where there is none.
        high: its upper end.
        note: what else to know; why it could not be judged.
    """

    name: str
    limit: float
    value: float | None = None
    compared: float | None = None
    low: float | None = None
    high: float | None = None
    note: str = ""

    @property
    def judged(self) -> bool:
        """Whether there was something to compare."""
        return self.compared is not None

    @property
    def passed(self) -> bool:
        """Whether the bar holds; one that could not be judged does not."""
        if self.compared is None:
            return False
        slack = 1e-9 * abs(self.limit)  # 0.9 - 0.89 is not 0.01 in binary
        if self.name.startswith("min_"):
            return self.compared >= self.limit - slack
        return self.compared <= self.limit + slack

    @property
    def verdict(self) -> str:
        """``"yes"``, ``"NO"`` or ``"not judged"``."""
        return "yes" if self.passed else "NO" if self.judged else "not judged"

    @property
    def measured(self) -> str:
        """Value and interval."""
        if self.value is None:
            return "-"
        interval = "" if self.low is None or self.high is None else f" [{self.low:.4g}, {self.high:.4g}]"
        return f"{self.value:.4g}{interval}"

    def __str__(self) -> str:
        found = self.measured if self.judged else "not judged"
        return f"{self.name} {self.limit:g}: {found}" + (f" ({self.note})" if self.note else "")


@dataclass(frozen=True)
class CheckReport:
    """A file held against its bars; `str()` is a table.

    Attributes:
        file: its path.
        results: one per bar.
        against: path of the file it was compared with; empty without one.
        scores: ``model`` and ``against`` -> score on the data.
        latency: one report per session of timing.
        facts: what the file says of itself.
        unknown: what it does not say.
        seconds: the check took.
    """

    file: str
    results: tuple[BarResult, ...]
    against: str = ""
    scores: dict[str, Score] = field(default_factory=dict)
    latency: tuple[LatencyReport, ...] = ()
    facts: dict[str, str] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether every bar holds."""
        return all(result.passed for result in self.results)

    @property
    def missed(self) -> tuple[BarResult, ...]:
        """The bars that do not hold."""
        return tuple(result for result in self.results if not result.passed)

    @property
    def summary(self) -> str:
        """One line."""
        held = f"{len(self.results) - len(self.missed)} of {len(self.results)} bars hold"
        return held + (f"; missed: {', '.join(result.name for result in self.missed)}" if self.missed else "")

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        results = [{**asdict(r), "passed": r.passed, "judged": r.judged} for r in self.results]
        return {
            "file": self.file,
            "against": self.against,
            "passed": self.passed,
            "bars": results,
            "scores": {name: score.to_dict() for name, score in self.scores.items()},
            "latency": [report.to_dict() for report in self.latency],
            "facts": self.facts,
            "unknown": list(self.unknown),
            "seconds": self.seconds,
        }

    def __str__(self) -> str:
        rows = [[r.name, f"{r.limit:g}", r.measured, _number(r.compared), r.verdict] for r in self.results]
        lines = [f"{self.file}" + (f" against {self.against}" if self.against else "")]
        lines += [table(["bar", "limit", "measured", "compared", "holds"], rows), self.summary]
        lines += [f"{r.name}: {r.note}" for r in self.results if r.note]
        lines += [f"{name}: {score}" for name, score in self.scores.items()]
        return "\n".join([*lines, *self.conditions, RULE])

    @property
    def conditions(self) -> tuple[str, ...]:
        """Under which it was timed, and what the file does not say."""
        found = []
        if self.latency:
            known = self.latency[-1].conditions
            times = f" each of {len(self.latency)} times" if len(self.latency) > 1 else ""
            found.append(f"{workload(known)}{times}; {machine(known)}")
            found += [note for report in self.latency for note in report.notes]
        if self.unknown:
            found.append(f"not written by td_plugin; unknown: {', '.join(self.unknown)}")
        return tuple(found)

    def markdown(self) -> str:
        """A section for a job summary or a comment."""
        verdict = "passed" if self.passed else "**missed**"
        lines = [f"### td-plugin check: {verdict}", "", f"`{_cell(self.file)}`"]
        lines[-1] += f" against `{_cell(self.against)}`" if self.against else ""
        lines += ["", "| bar | limit | measured [95 % interval] | compared | holds |", "|---|---:|---:|---:|---|"]
        lines += [
            f"| {r.name} | {r.limit:g} | {r.measured} | {_number(r.compared)} | {r.verdict} |" for r in self.results
        ]
        notes = [f"{r.name}: {r.note}" for r in self.results if r.note]
        notes += [f"{name}: {score}" for name, score in self.scores.items()]
        return "\n".join([*lines, "", *(f"- {_cell(note)}" for note in [*notes, *self.conditions]), "", RULE, ""])

    def junit(self) -> str:
        """JUnit XML: one test case per bar; a missed bar is a failure, one that could not be judged an error."""
        unjudged = sum(not result.judged for result in self.results)
        counts = {
            "tests": str(len(self.results)),
            "failures": str(len(self.missed) - unjudged),
            "errors": str(unjudged),
            "time": f"{self.seconds:.3f}",
        }
        root = ElementTree.Element("testsuites", {"name": "td-plugin check", **counts})
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        about = {"name": _clean(self.file), "skipped": "0", "timestamp": now, "hostname": platform.node()}
        suite = ElementTree.SubElement(root, "testsuite", {**about, **counts})
        properties = ElementTree.SubElement(suite, "properties")
        for name, value in self.facts.items():
            ElementTree.SubElement(properties, "property", {"name": _clean(name), "value": _clean(value)})
        for result in self.results:
            place = {"classname": "td-plugin.check", "name": result.name, "time": "0.000"}
            case = ElementTree.SubElement(suite, "testcase", place)
            if not result.passed:
                kind, what = ("failure", "BarMissed") if result.judged else ("error", "NotJudged")
                ElementTree.SubElement(case, kind, {"message": _clean(str(result)), "type": what}).text = RULE
            ElementTree.SubElement(case, "system-out").text = _clean(str(result))
        ElementTree.SubElement(suite, "system-out").text = _clean(str(self))
        ElementTree.indent(root)
        return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _clean(text: str) -> str:
    """Without the control characters that XML cannot hold."""
    return re.sub(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "?", text)
