"""The text of a model card: Markdown made of facts, and "Not measured" where there are none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from td_plugin.export import latency_table
from td_plugin.export.graph_widths import Widths

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

    from td_plugin.export.latency import LatencyReport

BEGIN, END = "<!-- td-plugin: begin -->", "<!-- td-plugin: end -->"
"""What lies between is written anew by `write_card`; the rest of a README.md is its owner's."""

_UNMEASURED = "Not measured."
_FOLDED = 12  # rows of a table that are shown without a click


@dataclass(frozen=True)
class CardFacts:
    """All that the text of a card says.

    Attributes:
        name: of the model.
        base_model: the parent; empty where nobody says.
        task: what it is for; empty for one that is not served.
        onnx: names of the ONNX files.
        recorded: recipe, γ, versions and the like, as the file says.
        widths: layer -> units before and after.
        pruned: whether the file or the configuration says so.
        license: as the Hub calls it; empty where nobody says.
        license_files: copied from the parent.
    """

    name: str
    base_model: str = ""
    task: str = ""
    onnx: tuple[str, ...] = ()
    recorded: Mapping[str, str] = field(default_factory=dict)
    widths: Widths = field(default_factory=dict)
    pruned: bool = False
    license: str = ""
    license_files: tuple[str, ...] = ()


def card_text(
    facts: CardFacts, latency: LatencyReport | None, parity: object | None, results: Sequence[EvalResult]
) -> str:
    """The sections of a card, between `BEGIN` and `END`."""
    base = f"[{facts.base_model}](https://huggingface.co/{facts.base_model})" if facts.base_model else "another model"
    sections = {
        "": f"# {facts.name}\n\n{'Pruned' if facts.pruned else 'Written'} with td-plugin; it comes from {base}.",
        "Use": _use(facts),
        "What the file says": _pruning(facts),
        "Latency": _UNMEASURED if latency is None else _latency(latency),
        "Results": _results(results),
        "Agreement with the torch model": _UNMEASURED if parity is None else f"```text\n{parity}\n```",
        "License": _license(facts),
    }
    parts = [f"## {title}\n\n{text}" if title else text for title, text in sections.items() if text]
    return "\n\n".join([BEGIN, *parts, END])


def _use(facts: CardFacts) -> str:
    if not facts.onnx:
        call = 'from td_plugin.export import load_pretrained\n\nmodel = load_pretrained("this directory")'
        return f"```python\n{call}\n```"
    if not facts.task:
        return f"Open `{facts.onnx[0]}` with onnxruntime."
    given = '"an image.png"' if facts.task.startswith("image-") else '"a text"'
    call = f'from td_plugin.export import load_onnx\n\nmodel = load_onnx("this directory")\nmodel({given})'
    return f"Called as the `{facts.task}` pipeline of transformers:\n\n```python\n{call}\n```"


def _pruning(facts: CardFacts) -> str:
    lines = [f"- {name}: {_cell(text)}" for name, text in facts.recorded.items()]
    if not facts.widths:
        return "\n".join([*lines, "- widths: those of the configuration, or not recorded in the file"])
    rows = [[f"`{layer}`", str(before), str(after)] for layer, (before, after) in facts.widths.items()]
    widths = _table(["layer", "before", "after"], rows)
    if len(rows) > _FOLDED:
        widths = f"<details><summary>Widths of {len(rows)} layers</summary>\n\n{widths}\n\n</details>"
    return "\n".join([*lines, "", widths]).strip()


def _latency(report: LatencyReport) -> str:
    first = report.files[0].name
    header = ["file", "p50 ms", "p90 ms", "p99 ms", "size MB", f"over {_cell(first)}"]
    header += ["accuracy"] if report.accuracy else []
    rows = []
    for file in report.files:
        percentiles = file.percentiles()
        row = [_cell(file.name), *(latency_table.milliseconds(percentiles[percent]) for percent in (50, 90, 99))]
        row.append(latency_table.megabytes(file.bytes))
        row.append("" if file.name == first else _cell(str(report.speedup(file.name, over=first))))
        if report.accuracy:
            accuracy = report.accuracy.get(file.name)
            row.append("-" if accuracy is None else f"{accuracy:.4f}")
        rows.append(row)
    lines = [_table(header, rows), "", f"- {latency_table.workload(report.conditions)}"]
    lines.append(f"- {_cell(latency_table.machine(report.conditions))}")
    return "\n".join([*lines, *(f"- {_cell(note)}" for note in report.notes)])


def _results(results: Sequence[EvalResult]) -> str:
    if not results:
        return _UNMEASURED
    rows = []
    for result in results:
        split = f" ({result.dataset_split})" if result.dataset_split else ""
        rows.append([_cell(f"{result.dataset_name}{split}"), _cell(result.metric_type), _cell(_number(result))])
    return _table(["data", "metric", "value"], rows)


def _number(result: EvalResult) -> str:
    value: Any = result.metric_value
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _license(facts: CardFacts) -> str:
    files = ", ".join(f"`{name}`" for name in facts.license_files)
    if not facts.license:
        return "Unknown: the parent model's licence was not found. Find it out before you share this model."
    return f"{facts.license}, as the parent model" + (f"; the text: {files}." if files else ".")


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [list(header), ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
