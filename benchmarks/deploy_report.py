"""What `deploy.py` found, as JSON and as Markdown."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from deploy_measure import AGAIN, BASE, ratios
from deploy_models import STORED, TIMED, TORCH, key
from deploy_plot import TITLES, plot

from td_plugin.export.repeats import AGREEMENT
from td_plugin.files import staged_file

EFFICIENCY, INT8 = 0.95, 4.5
"""What half of the heads and of the FFN of BERT-base are to reach on one thread, and with int8 over dense fp32."""


def write(works: list[Any], command: str, args: argparse.Namespace) -> str:
    """Write all files, from what has been measured so far; the Markdown."""
    models = {work.subject.name: found for work in works if (found := collected(work)) is not None}
    found = {"command": command, "quick": args.quick, "models": models}
    found = rounded(found)  # so that the tables can be made again from the file
    text = markdown(found)
    with staged_file(args.output / "deploy.json") as path:
        path.write_text(json.dumps(found) + "\n", encoding="utf-8")
    with staged_file(args.output / "deploy.md") as path:
        path.write_text(text, encoding="utf-8")
    for name, model in models.items():
        if model["settings"]:
            with staged_file(args.output / f"deploy_{name}.png") as path:
                plot(model, path)
    return text


def rounded(value: Any) -> Any:
    """Four digits of every number but accuracies, which are counts: no clock here knows more."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {name: entry if name == "accuracy" else rounded(entry) for name, entry in value.items()}
    return [rounded(entry) for entry in value] if isinstance(value, list) else value


def collected(work: Any) -> dict[str, Any] | None:
    """One model's parts, put together; None before its files are made."""
    levels = [read(work.part(f"forms-{level:g}")) for level in work.levels]
    if not all(levels):
        return None
    settings = []
    for setting in work.settings:
        parts = [read(work.part(f"{setting.name}-run{run}")) for run in range(work.args.repeat)]
        done = [part for part in parts if part]
        if done:
            settings.append(summary(done, levels))
    forms = {key(level["level"], form): row for level in levels for form, row in level["rows"].items()}
    about = [{name: level[name] for name in ("level", "parameters", "flops")} for level in levels]
    profile = read(work.part("profile"))
    return {
        "title": work.subject.title,
        "levels": about,
        "forms": forms,
        "settings": settings,
        "repeats": repeats(settings),
        "profile": profile,
    }


def read(path: Path) -> Any:
    """A part; None if it is missing."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def summary(parts: list[dict[str, Any]], levels: list[dict[str, Any]]) -> dict[str, Any]:
    """A setting without its single times."""
    first = parts[0]
    rows = ratios(parts)
    shape = f"{first['batch']}x{first['sequence']}"
    dense = levels[0]["flops"][shape]
    for level in levels[1:]:
        row, ratio = rows[key(level["level"], "fp32")], dense / level["flops"][shape]
        bounds = {name: row["speedup"][name] / ratio for name in ("median", "low", "high")}
        row["efficiency"] = {"flop_ratio": ratio, **bounds}
    kept = ("run", "rounds", "sittings", "load", "cpu_share", "minutes", "machine")
    return {
        **{name: first[name] for name in ("batch", "sequence", "threads")},
        "measured": [{name: part[name] for name in kept} for part in parts],
        "rows": rows,
    }


def repeats(settings: list[dict[str, Any]]) -> dict[str, Any]:
    """How far the runs lie apart, by threads; of settings that were measured more than once."""
    found = {}
    for threads in dict.fromkeys(setting["threads"] for setting in settings):
        apart = {
            f"{setting['batch']}x{setting['sequence']} {name}": row["apart"]
            for setting in settings
            if setting["threads"] == threads
            for name, row in setting["rows"].items()
            if name != BASE and len(row["runs"]) > 1
        }
        if apart:
            values = sorted(apart.values())
            within = sum(value <= AGREEMENT for value in values)
            worst = max(apart, key=lambda name: apart[name])
            found[str(threads)] = {
                "ratios": len(values),
                "within": within,
                "median": values[len(values) // 2],
                "worst": {"of": worst, "apart": apart[worst]},
            }
    return found


def title(name: str) -> str:
    """Of a row."""
    if name == AGAIN:
        return "dense, onnxruntime fp32, again"
    level, form = name.split("/")
    return f"{'dense' if level == '0' else f'γ = {level}'}, {TITLES[form]}"


def names(model: dict[str, Any]) -> list[str]:
    """The timed rows: by form, then by γ."""
    levels = [level["level"] for level in model["levels"]]
    return [key(level, form) for form in (*TORCH, *TIMED) for level in levels]


def table(header: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *rows])


def markdown(found: dict[str, Any]) -> str:
    """All tables."""
    parts = [f"`{found['command']}`"]
    if found["quick"]:
        parts.insert(0, "Quick run: shows that the script runs; the numbers mean nothing.")
    for name, model in found["models"].items():
        parts += [f"### {model['title']}", answers_and_times(model)]
        for threads in dict.fromkeys(setting["threads"] for setting in model["settings"]):
            parts.append(speedups(model, threads))
        parts += [
            efficiencies(model),
            targets(model) if name == "bert" else "",
            stored(model),
            agreement(model),
            conditions(model),
        ]
        parts += [f"```\n{model['profile']['text']}\n```"] if model["profile"] else []
    return "\n\n".join(part for part in parts if part) + "\n"


def answers_and_times(model: dict[str, Any]) -> str:
    """What each form answers, weighs and takes."""
    settings = model["settings"]
    header = ["", "accuracy %", "same answers %", "relative difference", "MB"]
    header += [f"{s['batch']}×{s['sequence']}, {s['threads']} thr." for s in settings]
    lines = [[*cells(name, model), *(f"{s['rows'][name]['p50_ms']:.1f}" for s in settings)] for name in names(model)]
    return f"p50 in ms, batch × sequence:\n\n{table(header, lines)}"


def cells(name: str, model: dict[str, Any]) -> list[str]:
    """Of a row, all but its times."""
    row = model["forms"][name]
    accuracy = "–" if row["accuracy"] is None else f"{100 * row['accuracy']:.1f}"
    mark = " (not fused)" if row.get("written", "fused") != "fused" and name.endswith("/fused") else ""
    return [
        title(name) + mark + (" (beyond its tolerance)" if row.get("problem") else ""),
        accuracy,
        f"{100 * row['agreement']:.1f}",
        f"{row['relative']:.1e}",
        f"{row['bytes'] / 1e6:.1f}",
    ]


def speedups(model: dict[str, Any], threads: int) -> str:
    """Over the dense fp32 file, with intervals."""
    settings = [setting for setting in model["settings"] if setting["threads"] == threads]
    lines = []
    for name in [AGAIN, *(name for name in names(model) if name != BASE)]:
        found = [setting["rows"][name]["speedup"] for setting in settings]
        lines.append([title(name), *(f"{s['median']:.2f} [{s['low']:.2f}, {s['high']:.2f}]" for s in found)])
    header = [f"speed-up, threads {threads}", *(f"{s['batch']}×{s['sequence']}" for s in settings)]
    return table(header, lines)


def efficiencies(model: dict[str, Any]) -> str:
    """Speed-up over FLOP ratio of the fp32 files."""
    lines = []
    for setting in model["settings"]:
        for level in model["levels"][1:]:
            found = setting["rows"][key(level["level"], "fp32")]["efficiency"]
            lines.append(
                [
                    f"{setting['batch']}×{setting['sequence']}, threads {setting['threads']}",
                    f"{level['level']:g}",
                    f"{found['flop_ratio']:.2f}",
                    f"{found['median']:.2f} [{found['low']:.2f}, {found['high']:.2f}]",
                ]
            )
    return table(["", "γ", "FLOP ratio", "efficiency"], lines) if lines else ""


def targets(model: dict[str, Any]) -> str:
    """Whether BERT-base reaches what it is to reach."""
    lines = []
    for setting in (s for s in model["settings"] if s["threads"] == 1):
        efficiency = setting["rows"]["0.5/fp32"]["efficiency"]["median"]
        faster = max(setting["rows"][f"0.5/{form}"]["speedup"]["median"] for form in ("int8", "int8-static"))
        answers = ["yes" if reached else "no" for reached in (efficiency >= EFFICIENCY, faster >= INT8)]
        shape = f"{setting['batch']}×{setting['sequence']}"
        lines.append([shape, f"{efficiency:.2f}: {answers[0]}", f"{faster:.2f}: {answers[1]}"])
    header = ["γ = 0.5, one thread", f"efficiency at least {EFFICIENCY}", f"the faster int8 at least {INT8}×"]
    return table(header, lines) if lines else ""


def stored(model: dict[str, Any]) -> str:
    """Forms that are not timed."""
    levels = [level["level"] for level in model["levels"]]
    lines = [cells(key(level, form), model) for form in STORED for level in levels]
    return table(["not timed", "accuracy %", "same answers %", "relative difference", "MB"], lines)


def agreement(model: dict[str, Any]) -> str:
    """How well two runs agree."""
    return "\n".join(
        f"* Threads {threads}: {row['within']} of {row['ratios']} ratios within {AGREEMENT:.0%} of the other run, "
        f"median {row['median']:.1%}, worst {row['worst']['apart']:.1%} ({row['worst']['of']})."
        for threads, row in model["repeats"].items()
    )


def conditions(model: dict[str, Any]) -> str:
    """Rounds, load and machine."""
    if not model["settings"]:
        return ""
    lines = []
    for setting in model["settings"]:
        runs = setting["measured"]
        loads = [load for run in runs for load in run["load"] if load is not None]
        lines.append(
            [
                f"{setting['batch']}×{setting['sequence']}, threads {setting['threads']}",
                " + ".join(str(run["rounds"]) for run in runs),
                f"{min(loads):.1f}–{max(loads):.1f}" if loads else "",
                ", ".join(f"{run['cpu_share']:.0%}" for run in runs),
            ]
        )
    facts = model["settings"][0]["measured"][0]["machine"]
    machine = ", ".join(f"{name} {value}" for name, value in facts.items() if name != "load")
    return f"{table(['', 'rounds', 'load', 'CPU per clock'], lines)}\n\n{machine}"
