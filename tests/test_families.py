"""The contract of every family: what is masked in training, shrunk, saved and generated is one model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from family_cases import FAMILIES, family_rows
from family_checks import generate_equal, logits
from torch import Tensor, nn
from transformers import PreTrainedModel

import td_plugin as td
from td_plugin.budget import parameters_left
from td_plugin.errors import TdError
from td_plugin.export import load_into, load_pretrained, save_pretrained, shrink
from td_plugin.structure import survey
from td_plugin.units import UnitGroup

LEVELS = (0.5, 0.3, 0.75)
"""γ of one group after the other: layers end up with different widths."""

TABLE = ("bert", "bert_decoder", "roberta", "distilbert", "vit")
HIDDEN = ("llama", "llama_mha", "qwen2", "qwen3", "mixtral")
DEPTH = ("vit", "deit", "modernbert", "swin", "convnext", "gpt2", "opt", "llama", "qwen3", "t5", "whisper", "clip")


class Pruned:
    """A model with masks on, and what `shrink` makes of it."""

    def __init__(self, name: str, kinds: tuple[str, ...]) -> None:
        self.case = FAMILIES[name]
        self.dense = self.case.build()
        self.inputs = self.case.inputs(self.dense)
        self.masked = copy.deepcopy(self.dense)
        self.given = None if isinstance(self.dense, PreTrainedModel) else self.inputs
        recipe = td.recipes.targeted_unit(drop_rate=0.5, kinds=kinds)
        self.sparsifier = td.TargetedDropout(recipe, sparsity_level=0.5)
        self.sparsifier.prepare(self.masked, example_inputs=self.given)
        for index, group in enumerate(self.sparsifier.groups):
            group["sparsity_level"] = LEVELS[index % len(LEVELS)]
        self.entries = [dict(entry) for entry in self.sparsifier.groups]
        self.sparsifier.step()
        self.masked.eval()
        self.small = shrink(self.masked, round_to=1, example_inputs=self.given)

    def groups(self) -> dict[str, UnitGroup]:
        """What the sparsifier masks, by the tensors it names."""
        known = survey(self.dense, self.given).groups
        found = {part.fqn: group for group in known for part in group.ranked}
        return {str(entry["tensor_fqn"]): found[str(entry["tensor_fqn"])] for entry in self.sparsifier.groups}


def left(group: UnitGroup, entry: Mapping[str, Any]) -> int:
    """Units that stay: exactly int(γ·n) go; fused experts keep rows of 16 bytes, four of float32."""
    keep = group.units - int(entry["sparsity_level"] * group.units)
    return -(-keep // 4) * 4 if group.name.endswith("experts") else keep


def loaded_from(directory: Path, pruned: Pruned) -> nn.Module:
    if isinstance(pruned.small, PreTrainedModel):
        return load_pretrained(directory)
    return load_into(directory, pruned.case.build)


def outputs(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    with torch.no_grad():
        return logits(model(**inputs))


def difference(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Of the largest output, where that is above one."""
    assert one.keys() == other.keys() and one
    return max(float((one[name] - other[name]).abs().max() / one[name].abs().max().clamp(min=1)) for name in one)


def parameters(model: nn.Module) -> int:
    return sum(tensor.numel() for tensor in model.parameters())


@pytest.mark.parametrize("name", family_rows())
def test_masked_is_shrunk_is_reloaded(name: str, tmp_path: Path) -> None:
    pruned = Pruned(name, ("neurons", "channels", "heads"))
    expected = outputs(pruned.masked, pruned.inputs)
    assert difference(expected, outputs(pruned.dense, pruned.inputs)) > 1e-3  # the mask does something
    assert difference(expected, outputs(pruned.small, pruned.inputs)) < 1e-5
    assert type(pruned.small) is type(pruned.dense)

    groups = pruned.groups()
    kept = {group.name: left(group, entry) for group, entry in zip(groups.values(), pruned.entries, strict=True)}
    assert parameters(pruned.small) == parameters_left(pruned.dense, list(groups.values()), kept)

    save_pretrained(pruned.small, tmp_path / "small")
    loaded = loaded_from(tmp_path / "small", pruned)
    assert difference(outputs(loaded, pruned.inputs), outputs(pruned.small, pruned.inputs)) == 0
    assert loaded.state_dict().keys() == pruned.small.state_dict().keys()
    if pruned.case.generates:
        assert generate_equal(pruned.masked, loaded, pruned.inputs)
    with pytest.raises(TdError, match="nothing to remove|keeps every zero unit"):
        shrink(loaded, round_to=1, example_inputs=pruned.given)


@pytest.mark.parametrize("name", HIDDEN)
def test_the_width_of_the_stream(name: str, tmp_path: Path) -> None:
    pruned = Pruned(name, ("hidden",))
    assert difference(outputs(pruned.masked, pruned.inputs), outputs(pruned.small, pruned.inputs)) < 1e-5
    assert parameters(pruned.small) < 0.6 * parameters(pruned.dense)
    assert generate_equal(pruned.masked, pruned.small, pruned.inputs)
    save_pretrained(pruned.small, tmp_path / "small")
    loaded = loaded_from(tmp_path / "small", pruned)
    assert difference(outputs(loaded, pruned.inputs), outputs(pruned.small, pruned.inputs)) == 0


@pytest.mark.parametrize("name", family_rows(DEPTH))
def test_whole_layers(name: str, tmp_path: Path) -> None:
    pruned = Pruned(name, ("layers",))
    assert difference(outputs(pruned.masked, pruned.inputs), outputs(pruned.small, pruned.inputs)) < 1e-5
    assert len(list(pruned.small.modules())) < len(list(pruned.dense.modules()))
    if pruned.case.generates:
        assert generate_equal(pruned.masked, pruned.small, pruned.inputs)
    save_pretrained(pruned.small, tmp_path / "small")
    loaded = loaded_from(tmp_path / "small", pruned)
    assert difference(outputs(loaded, pruned.inputs), outputs(pruned.small, pruned.inputs)) == 0


@pytest.mark.parametrize("name", TABLE)
def test_the_graph_finds_what_the_table_says(name: str) -> None:
    model = FAMILIES[name].build()
    traced = {frozenset(part.fqn for part in group.ranked): group for group in survey(model, source="graph").groups}
    listed = survey(model).groups
    assert listed
    for group in listed:
        twin = traced[frozenset(part.fqn for part in group.ranked)]
        assert (twin.kind, twin.units) == (group.kind, group.units)
        assert set(twin.slices) == set(group.slices)
