"""README.md as the Hub wants it: where a model comes from, its licence, how it was pruned, and what was measured."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from td_plugin.errors import TdError
from td_plugin.export.card_text import BEGIN, END, CardFacts, card_text
from td_plugin.export.companions import licence_files
from td_plugin.export.graph_widths import Widths, width_changes
from td_plugin.export.origin import CARD, UNKNOWN_LICENCE, Origin, origin_of, read_card
from td_plugin.export.serving_files import CONFIG, MODEL, task_of
from td_plugin.export.session import read_graph, stated_inputs
from td_plugin.files import staged_file

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

    from td_plugin.export.latency import LatencyReport

# Metadata entry -> what the card calls it; entries under other names are the recipe's own.
_SHOWN = {
    "td-plugin.model_class": "class",
    "td-plugin.parameters": "parameters",
    "td-plugin.version": "td-plugin",
    "torch.version": "torch",
    "transformers.version": "transformers",
    "onnx.version": "onnx",
}
_ASKED = {"recipe": "recipe", "sparsity_level": "γ"}  # said to be missing where they are
_NOT_RECORDED = "not recorded in the file"


def write_card(
    directory: str | os.PathLike[str],
    *,
    origin: Origin | None = None,
    latency: LatencyReport | None = None,
    parity: object | None = None,
    results: Sequence[EvalResult] = (),
) -> Path:
    """Write ``README.md`` for what `save_onnx` or `save_pretrained` put into `directory`.

    What is not given is called not measured, also if an earlier card told it: the files may have changed since.
    A text around our own stays as it is, and so do other entries of the card's metadata.

    Args:
        directory: with ``config.json`` and the model.
        origin: parent, licence, data; what it leaves empty is read from the card that is there.
        latency: of `benchmark`.
        parity: of `verify`, `verify_forms` or `verify_decoding`; anything whose `str()` is a table.
        results: `huggingface_hub.EvalResult`, which become the card's ``model-index``.

    Raises:
        TdError: there is no configuration, the metadata of the card there cannot be read, or it cannot be written.
    """
    path = Path(directory)
    return write_named_card(
        path, path.resolve().name, (origin or Origin()).over(origin_of(path)), latency, parity, results
    )


def write_named_card(
    path: Path,
    name: str,
    origin: Origin,
    latency: LatencyReport | None = None,
    parity: object | None = None,
    results: Sequence[EvalResult] = (),
) -> Path:
    """`write_card` for a directory that will have another name, with all that is known of its origin."""
    from huggingface_hub import ModelCardData

    facts = _facts(path, name, origin, latency)
    if not origin.license:
        warnings.warn(UNKNOWN_LICENCE.format(directory=name), stacklevel=3)
    old = read_card(path)
    kept: dict[str, Any] = {} if old is None else old.data.to_dict()  # type: ignore[no-untyped-call]
    told = [field.name for field in fields(Origin)]  # `origin` knows them better
    for entry in ("model-index", "metrics", *told):  # results of another file, or of an earlier measurement
        kept.pop(entry, None)
    data = ModelCardData(**{**kept, **_metadata(facts, origin, results, kept)})
    text = _merged("" if old is None else old.text, card_text(facts, latency, parity, results))
    with staged_file(path / CARD) as staged:
        staged.write_text(f"---\n{data.to_yaml()}\n---\n\n{text}\n", encoding="utf-8")
    return path / CARD


def _metadata(facts: CardFacts, origin: Origin, results: Sequence[EvalResult], kept: dict[str, Any]) -> dict[str, Any]:
    tags = [tag for tag in kept.get("tags") or [] if isinstance(tag, str)]
    tags += ["td-plugin", *(["pruned"] if facts.pruned else []), *(["onnx", "onnxruntime"] if facts.onnx else [])]
    found: dict[str, Any] = {**origin.entries(), "library_name": "onnx" if facts.onnx else "transformers"}
    found["tags"] = list(dict.fromkeys(tags))
    if facts.task:
        found["pipeline_tag"] = facts.task
    if results:
        metrics = list(dict.fromkeys(result.metric_type for result in results))
        found |= {"metrics": metrics, "model_name": facts.name, "eval_results": list(results)}
    return found


def _merged(old: str, section: str) -> str:
    """`section` in place of an earlier one, else after what somebody else wrote."""
    before, found, rest = old.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if found and ended:
        return f"{before}{section}{after}".strip()
    return f"{old.strip()}\n\n{section}".strip()


def _facts(path: Path, name: str, origin: Origin, latency: LatencyReport | None) -> CardFacts:
    files = sorted(path.glob("*.onnx"))
    graph = path / MODEL if (path / MODEL).is_file() else next(iter(files), None)
    widths, told, images = _configured_widths(path), dict[str, str](), False
    if graph is not None:
        proto = read_graph(graph)
        told = {entry.key: entry.value for entry in proto.metadata_props}
        widths = width_changes({"": graph}).get("", {}) or widths
        images = any(entry.name == "pixel_values" for entry in stated_inputs(proto))
    if not widths and latency is not None and len(latency.widths) == 1:
        (widths,) = latency.widths.values()
    recorded = {shown: told.get(key, _NOT_RECORDED) for key, shown in _ASKED.items()}
    recorded |= {shown: told[key] for key, shown in _SHOWN.items() if key in told}
    recorded |= {key: text for key, text in told.items() if key not in (*_ASKED, *_SHOWN) and "." not in key}
    return CardFacts(
        name=name,
        base_model=origin.base_model,
        task=task_of(path, images),
        onnx=tuple(file.name for file in files),
        recorded=recorded,
        widths=widths,
        pruned=bool(widths) or told.get("recipe", "none") not in ("none", "dense"),
        license=(origin.license_name or "other") if origin.license == "other" else origin.license,
        license_files=tuple(file.name for file in licence_files(path)),
    )


def _configured_widths(path: Path) -> Widths:
    """Widths that differ between layers, from the record that `save_pretrained` leaves in the configuration."""
    file = path / CONFIG
    if not file.is_file():
        fix = "write the directory with save_onnx or save_pretrained"
        raise TdError(f"the directory has no {CONFIG}", where=str(path), fix=fix)
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        layers = config.get("td_pruning", {}).get("layers", {})
        return {
            f"layer {layer}, {setting}": (config[setting], units)
            for layer, settings in layers.items()
            for setting, units in settings.items()
            if isinstance(config.get(setting), int) and isinstance(units, int)
        }
    except (ValueError, AttributeError) as error:
        raise TdError(f"{CONFIG} cannot be read", where=str(file), got=error) from error
