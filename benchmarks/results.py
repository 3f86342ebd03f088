"""Makes the tables and plots of docs/results/ anew, from the JSON files that lie there; nothing is measured.

    python benchmarks/results.py [--results docs/results] [--output docs/results]

Every file NAME.json that a benchmark has written gives NAME.md and its pictures. A file that no benchmark here knows is
an error: its table would grow old unseen.
"""

from __future__ import annotations

import argparse
import json
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "finetune"))
sys.path.insert(0, str(Path(__file__).parent / "reproduce"))

import ablation
import convnet
import decoder_report
import dependence
import deploy_plot
import deploy_report
import methods_report
import overhead
import overhead_report
import pareto_report as finetune_report
import reading
import refresh_report
import resnet
import scale_report
import sst2
import translation_report

from td_plugin.export.plots import plot_tradeoff
from td_plugin.files import staged_file

Found = Any
Render = Callable[[Found, Path], str]
"""``(content of the JSON file, picture to write without its suffix) -> Markdown``."""


def _overhead(found: Found, picture: Path) -> str:
    limit = overhead.LIMIT_COMPILED if "--compile" in found["command"] else overhead.LIMIT
    overhead_report.plot(found, picture.with_suffix(".png"), limit)
    return overhead_report.text(found)


def _methods(found: Found, picture: Path) -> str:
    methods_report.plot(found["rows"], picture.with_suffix(".png"))
    return methods_report.markdown(found["rows"])


def _refresh(found: Found, picture: Path) -> str:
    refresh_report.plot(found["rows"], picture.with_suffix(".png"))
    return refresh_report.markdown(found["rows"])


def _scale(found: Found, picture: Path) -> str:
    scale_report.plot(found, picture.with_suffix(".png"))
    return scale_report.markdown(found)


def _deploy(found: Found, picture: Path) -> str:
    for name, model in found["models"].items():
        if model["settings"]:
            deploy_plot.plot(model, picture.with_name(f"{picture.name}_{name}.png"))
    return deploy_report.markdown(found)


def _sst2(found: Found, picture: Path) -> str:
    if "models" not in found:  # a longer budget: accuracies alone
        return sst2.accuracy_table(found["runs"])
    title, conditions = "SST-2, 6-layer encoder", "onnxruntime, 1 thread, batch 1 × 128 tokens"
    curves = sst2.tradeoff(found["runs"], found)
    plot_tradeoff(curves, picture.with_suffix(".png"), title=title, conditions=conditions)
    tables = (sst2.accuracy_table(found["runs"]), sst2.model_table(found["models"]))
    return "\n\n".join((*tables, sst2.latency_table(found["latency"])))


def _finetune(found: Found, picture: Path) -> str:
    return finetune_report.render(found, picture.with_suffix(".png"))


RENDERS: dict[str, Render] = {
    "ablation": ablation.render,
    "convnet": convnet.render,
    "decoder": decoder_report.render,
    "dependence": dependence.render,
    "deploy": _deploy,
    "finetune": _finetune,
    "methods": _methods,
    "overhead": _overhead,
    "refresh": _refresh,
    "resnet": resnet.render,
    "scale": _scale,
    "sst2": _sst2,
    "translation": translation_report.render,
}
"""By the first word of the file's name."""


def make(source: Path, output: Path) -> None:
    """The table and the pictures of one file."""
    word, stem = source.stem.split("_")[0], output / source.stem
    if word == "reading":  # a picture alone
        reading.draw(Namespace(history=source, picture=stem.with_suffix(".png")))
        return
    if word not in RENDERS:
        sys.exit(f"{source}: no benchmark here writes such a file; there are {', '.join((*RENDERS, 'reading'))}")
    text = RENDERS[word](json.loads(source.read_text(encoding="utf-8")), stem)
    with staged_file(stem.with_suffix(".md")) as path:
        path.write_text(text.rstrip() + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """All files of the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    results = Path("docs/results")
    parser.add_argument("--results", type=Path, default=results, help="where the JSON files are")
    parser.add_argument("--output", type=Path, default=results, help="where tables and pictures go")
    args = parser.parse_args(arguments)
    args.output.mkdir(parents=True, exist_ok=True)
    for source in sorted(args.results.glob("*.json")):
        make(source, args.output)
        print(args.output / source.stem, flush=True)


if __name__ == "__main__":
    main()
