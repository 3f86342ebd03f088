"""State a model's sizes in its transformers configuration, as far as that can express them; no table of families.

Each candidate is an edit of the configuration. The stock class is built from it on the meta device, and it is accepted
if everything that it changes is then as in the model. Widths that differ between layers are never candidates.
"""

from __future__ import annotations

import copy
import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from itertools import combinations
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from td_plugin.export.checkpoint_record import Anatomy, anatomy

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

Place: TypeAlias = tuple[str, ...]
Edit: TypeAlias = dict[Place, Any]
"""Where in the configuration's JSON -> the new value."""

_MAX_BUILDS = 100  # about 30 ms each


def blank_model(cls: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """A `cls` on the meta device, built as `from_pretrained` builds it: untied."""
    with ExitStack() as contexts:
        for context in cls.get_init_context(torch.float32, False, True, None):
            contexts.enter_context(context)
        return cls(copy.deepcopy(config))


def stated_config(
    cls: type[PreTrainedModel], config: PreTrainedConfig, dense: Anatomy, small: Anatomy
) -> tuple[PreTrainedConfig, Anatomy]:
    """The configuration nearest to `small` that differs from `config` in widths only, and what `cls` builds from it.

    Args:
        cls: the stock class.
        config: states the widths of `dense`.
        dense: what `cls` builds from `config`.
        small: what the model has.
    """
    target, tried = _facts(small), set[str]()
    while True:
        content, facts = json.loads(config.to_json_string(use_diff=False)), _facts(dense)
        for edit in _candidates(content, _uniform_changes(facts, target)):
            if str(edit) in tried or len(tried) >= _MAX_BUILDS:
                continue
            tried.add(str(edit))
            built = _try_build(cls, config, _edited(content, edit))
            if built is not None and _is_right(facts, _facts(built[1]), target):
                config, dense = built
                break
        else:
            return config, dense


def _facts(sizes: Anatomy) -> dict[tuple[str, object], Any]:
    """One entry per tensor dimension, attribute, list length and module."""
    facts: dict[tuple[str, object], Any] = {(name, "class"): kind for name, kind in sizes.modules.items()}
    facts |= {(name, "length"): length for name, length in sizes.lengths.items()}
    facts |= {(name, "value"): (type(value), value) for name, value in sizes.attributes.items()}
    for name, shape in (sizes.tensors | sizes.unsaved).items():
        facts |= {(name, dim): size for dim, size in enumerate(shape)}
    return facts


def _is_right(
    before: Mapping[tuple[str, object], Any],
    after: Mapping[tuple[str, object], Any],
    target: Mapping[tuple[str, object], Any],
) -> bool:
    """Whether the edit changes something, all of it to what the model has, and not the width of a residual stream.

    A stream is told by its norms. Its width stays: forwards read it from the configuration, to scale by it.
    """
    changed = [key for key in before.keys() | after.keys() if before.get(key) != after.get(key)]
    resized = [name.rpartition(".")[0] for name, what in changed if type(what) is int and (name, what) in after]
    if any("Norm" in str(before.get((name, "class"))) for name in resized):
        return False
    return bool(changed) and all(after.get(key) == target.get(key) for key in changed)


def _uniform_changes(
    dense: Mapping[tuple[str, object], Any], target: Mapping[tuple[str, object], Any]
) -> list[tuple[int, int]]:
    """(dense size, size) of what changed alike in all layers, most frequent first."""
    alike: dict[tuple[str, object], list[tuple[int, int]]] = defaultdict(list)
    for (name, what), fact in dense.items():
        old, new = fact, target.get((name, what))
        if what == "value":
            old, new = old[1], new[1] if new else None
        if type(old) is int and type(new) is int:
            alike[re.sub(r"\b\d+\b", "*", name), what].append((old, new))
    counts: dict[tuple[int, int], int] = defaultdict(int)
    for changes in alike.values():
        if len(set(changes)) == 1 and changes[0][0] != changes[0][1]:
            counts[changes[0]] += len(changes)
    return sorted(counts, key=lambda change: -counts[change])


def _candidates(content: Mapping[str, Any], changes: list[tuple[int, int]]) -> Iterator[Edit]:
    """Edits to try: one setting, or settings of attention heads together."""
    sections = list(_sections(content, ()))
    for place, section in sections:
        settings = {key: value for key, value in section.items() if not key.endswith(("_id", "_ids"))}
        for old, new in changes:
            for key in (key for key, value in settings.items() if type(value) is int and value == old):
                yield {(*place, key): new}
                lists = {k: v[:new] for k, v in settings.items() if isinstance(v, list) and len(v) == old > new}
                if lists:  # such as layer_types
                    yield {(*place, key): new} | {(*place, name): value for name, value in lists.items()}
    for place, section in sections:
        yield from _head_edits(place, section, changes)
    for place, section in sections:
        unset = [key for key, value in section.items() if value is None and key.endswith(_WIDTHS)]
        yield from ({(*place, key): new} for _, new in changes for key in unset)


_WIDTHS = ("inner", "size", "dim", "heads", "head", "dims", "ff")  # what unset settings of a width are called


def _sections(content: Mapping[str, Any], place: Place) -> Iterator[tuple[Place, Mapping[str, Any]]]:
    """The configuration and those nested in it."""
    yield place, content
    for key, value in content.items():
        if isinstance(value, dict) and "model_type" in value:
            yield from _sections(value, (*place, key))


def _head_edits(place: Place, section: Mapping[str, Any], changes: list[tuple[int, int]]) -> Iterator[Edit]:
    """Numbers of heads scaled as a projection's width is, alone and in pairs, with and without the size of a head."""
    scaled: list[tuple[str, int, int]] = []
    for key in (key for key, value in section.items() if "head" in key and "dim" not in key and type(value) is int):
        for old, new in changes:
            heads = section[key]
            if heads > 0 and old % heads == 0 and new % (old // heads) == 0 and new > 0:
                scaled.append((key, new // (old // heads), old // heads))
    chosen = [(one,) for one in scaled] + [pair for pair in combinations(scaled, 2) if pair[0][0] != pair[1][0]]
    for group in chosen:
        edit: Edit = {(*place, key): heads for key, heads, _ in group}
        yield edit
        if section.get("head_dim") is None:
            yield edit | {(*place, "head_dim"): group[0][2]}


def _edited(content: Mapping[str, Any], edit: Edit) -> dict[str, Any]:
    edited: dict[str, Any] = copy.deepcopy(dict(content))
    for place, value in edit.items():
        section = edited
        for key in place[:-1]:
            section = section[key]
        section[place[-1]] = value
    return edited


def _try_build(
    cls: type[PreTrainedModel], config: PreTrainedConfig, content: dict[str, Any]
) -> tuple[PreTrainedConfig, Anatomy] | None:
    """The configuration after a round trip through what is written of it, and what `cls` builds; None if it cannot."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        edited = type(config).from_dict(copy.deepcopy(content))
        written = type(config).from_dict(json.loads(edited.to_json_string(use_diff=True)))
        return edited, anatomy(blank_model(cls, written))
    except (StrictDataclassError, ValueError, TypeError, RuntimeError, AttributeError, LookupError, ArithmeticError):
        return None  # a combination that the class refuses
