"""`inspect_model`: counted by hand, and against the models that `shrink` really makes; and the tree that it prints."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel, PreTrainedModel

import td_plugin as td
from td_plugin.export import shrink
from td_plugin.export.inspection import ModelInspection, inspect_model
from td_plugin.export.inspection_rows import scaled
from td_plugin.export.module_tree import draw, grow
from td_plugin.structure import survey

BATCH = 5


class Named(nn.Module):
    """A multilayer perceptron whose forward has an argument to be named."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


class Branching(Named):
    """Does what the data says, so that it has no single graph."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 0 else x[:, :3]


def bert() -> PreTrainedModel:
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=20, hidden_size=24, num_hidden_layers=3, num_attention_heads=4, intermediate_size=36,
            max_position_embeddings=16,
        )
    )  # fmt: skip


def gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=20, n_positions=16, n_embd=24, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config)


@pytest.fixture(scope="module")
def perceptron() -> ModelInspection:
    return inspect_model(Named(), {"x": torch.randn(BATCH, 8)}, sparsity_level=0.5)


def tree(*entries: tuple[str, tuple[str, str]]) -> list[str]:
    return list(draw(grow(entries)))


class TestNumbers:
    def test_what_goes_with_a_group(self, perceptron: ModelInspection) -> None:
        rows = {row.layer: row for row in perceptron.rows}
        first, second = rows["layers.0"], rows["layers.2"]
        assert (first.kind, first.units, first.silent) == ("neurons", 12, 0)
        assert first.parameters == 8 * 12 + 12 + 12 * 10  # its rows, its bias, the columns that read it
        assert second.parameters == 12 * 10 + 10 + 10 * 3  # the middle matrix counts in both
        assert first.flops == 2 * BATCH * (8 * 12 + 12 * 10)
        assert second.flops == 2 * BATCH * (12 * 10 + 10 * 3)

    def test_totals(self, perceptron: ModelInspection) -> None:
        assert perceptron.parameters == (8 + 1) * 12 + (12 + 1) * 10 + (10 + 1) * 3
        assert perceptron.flops == 2 * BATCH * (8 * 12 + 12 * 10 + 10 * 3)
        assert perceptron.inputs == {"x": (BATCH, 8)}
        assert (perceptron.source, perceptron.untraced) == ("graph", "")

    def test_what_is_fixed(self, perceptron: ModelInspection) -> None:
        [row] = [row for row in perceptron.fixed if row.layer == "layers.4"]
        assert row.size == 3 and set(row.tensors) == {"layers.4.weight", "layers.4.bias"}
        assert row.parameters == 10 * 3 + 3
        assert row.flops == 2 * BATCH * 10 * 3
        assert "output" in row.reason and perceptron.refused["layers.4"] == row.reason

    def test_two_dimensions_that_begin_at_one_layer(self) -> None:
        found = inspect_model(gpt2())
        reasons = [row.reason for row in found.fixed if row.layer == "lm_head"]
        assert len(reasons) == 2 and found.refused["lm_head"] == "; ".join(reasons)

    def test_what_would_remain(self, perceptron: ModelInspection) -> None:
        assert [row.left for row in perceptron.rows] == [6, 5]
        remainder = perceptron.remainder
        assert remainder is not None and remainder.kinds == ("neurons",)
        assert remainder.parameters == (8 + 1) * 6 + (6 + 1) * 5 + (5 + 1) * 3
        assert remainder.flops == 2 * BATCH * (8 * 6 + 6 * 5 + 5 * 3)

    @pytest.mark.parametrize("build", [bert, gpt2])
    def test_what_would_remain_is_what_shrink_leaves(self, build: Callable[[], PreTrainedModel]) -> None:
        model = build()
        asked = inspect_model(model, sparsity_level=0.4)
        remainder = asked.remainder
        assert asked.parameters == model.num_parameters() and remainder is not None
        sparsifier = td.TargetedDropout(td.recipes.targeted_unit(), sparsity_level=0.4)
        sparsifier.prepare(model)
        sparsifier.squash_mask()
        pruned = inspect_model(model)
        assert all(row.silent == int(0.4 * row.units) for row in pruned.rows if row.kind in remainder.kinds)
        small = inspect_model(shrink(model))
        assert (small.parameters, small.flops) == (remainder.parameters, remainder.flops)
        assert {row.layer: row.units for row in small.rows} == {r.layer: r.left or r.units for r in asked.rows}

    def test_widths_are_rounded_as_shrink_does(self) -> None:
        wide = nn.Sequential(nn.Linear(4, 300), nn.ReLU(), nn.Linear(300, 2))
        assert [row.left for row in inspect_model(wide, sparsity_level=0.5).rows] == [160]  # a multiple of 16

    def test_kinds(self) -> None:
        found = inspect_model(gpt2(), sparsity_level=0.5, kinds=("layers",))
        assert {row.kind: row.left for row in found.rows} == {"layers": 1, "heads": None, "neurons": None}
        layers = next(row for row in found.rows if row.kind == "layers")
        assert found.remainder is not None and found.remainder.kinds == ("layers",)
        assert found.parameters - found.remainder.parameters == layers.parameters // 2


class TestSources:
    def test_known_families_are_not_traced_unless_asked(self) -> None:
        known = inspect_model(bert(), source="known", sparsity_level=0.5)
        assert (known.source, known.flops, known.untraced, known.inputs) == ("table", None, "", {})
        assert all(row.flops is None for row in known.rows) and "FLOPs" not in str(known)
        traced = inspect_model(bert(), source="graph")
        by_layer = {row.layer: (row.kind, row.units, row.parameters) for row in traced.rows}
        assert {row.layer: (row.kind, row.units, row.parameters) for row in known.rows}.items() <= by_layer.items()

    def test_the_default_shows_what_training_drops_and_counts_flops(self) -> None:
        found, traced = inspect_model(bert()), inspect_model(bert(), source="graph")
        assert [row.layer for row in found.rows] == [group.name for group in survey(bert()).groups]
        assert (found.source, found.flops, found.inputs) == ("table", traced.flops, traced.inputs)
        by_layer = {row.layer: row for row in traced.rows}
        assert all(row == by_layer[row.layer] for row in found.rows)
        only_traced = by_layer.keys() - {row.layer for row in found.rows}
        assert only_traced == {"bert.pooler.dense"} and "by default" in found.refused["bert.pooler.dense"]

    def test_a_model_that_cannot_be_traced(self) -> None:
        inputs = {"x": torch.ones(2, 8)}
        found = inspect_model(Branching(), inputs)
        assert found.source == "chains" and found.flops is None
        assert "Branching" in found.untraced and found.untraced in str(found)
        assert [row.layer for row in found.rows] == [group.name for group in survey(Branching(), source="known").groups]
        with pytest.raises(td.TdError, match="Branching"):
            inspect_model(Branching(), inputs, source="graph")

    def test_without_inputs(self) -> None:
        found = inspect_model(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)))
        assert [(row.units, row.parameters) for row in found.rows] == [(6, 4 * 6 + 6 + 6 * 2)]
        assert "without inputs" in found.untraced

    def test_nothing_known(self) -> None:
        assert "no units known" in str(inspect_model(nn.Linear(3, 3), source="known"))


class TestMistakes:
    @pytest.mark.parametrize(
        ("level", "kinds", "word"), [(1.0, ("neurons",), "γ"), (0.5, ("neuron",), "kinds"), (0.5, ("hidden",), "kinds")]
    )
    def test_level_and_kinds(self, level: float, kinds: tuple[str, ...], word: str) -> None:
        with pytest.raises(td.TdError, match=word):
            inspect_model(bert(), source="known", sparsity_level=level, kinds=kinds)

    def test_no_units(self) -> None:
        with pytest.raises(td.TdError, match="no units known"):
            inspect_model(nn.Linear(3, 3), sparsity_level=0.5)


class TestText:
    def test_the_whole_of_it(self, perceptron: ModelInspection) -> None:
        lines = str(perceptron).splitlines()
        assert lines[0] == "Named: 271 parameters, 0 of them zero (0.0%); 2,460 FLOPs in one forward of x 5×8"
        assert lines[1:4] == [
            "├─ layers",
            "│  ├─ neurons 12 → 6 · 0 · 228 parameters · 2,160 FLOPs",
            "│  └─ neurons 10 → 5 · 2 · 160 parameters · 1,500 FLOPs",
        ]
        assert "└─ fixed" in lines
        assert lines[-1] == "γ = 0.5 of neurons leaves 107 of 271 parameters (39.5%) and 930 of 2,460 FLOPs (37.8%)"

    def test_layers_alike_are_one_and_others_are_not(self) -> None:
        model = bert()
        assert "encoder.layer.0…2 (3 alike)" in str(inspect_model(model, source="known"))
        with torch.no_grad():
            model.get_parameter("bert.encoder.layer.1.intermediate.dense.weight")[:7] = 0
        text = str(inspect_model(model, source="known"))
        assert "0,2 (2 alike)" in text and text.count("(7 silent)") == 1

    def test_json(self, perceptron: ModelInspection) -> None:
        found = json.loads(json.dumps(perceptron.to_dict()))
        assert {"model", "parameters", "zeros", "sparsity", "rows", "refused", "fixed", "remainder"} <= found.keys()
        assert found["rows"][0] == {
            "layer": "layers.0", "kind": "neurons", "units": 12, "silent": 0, "left": 6,
            "parameters": 228, "flops": 2160,
        }  # fmt: skip

    @pytest.mark.parametrize(
        ("number", "text"),
        [
            (0, "0 a"),
            (999_999, "999,999 a"),
            (2_362_368, "2.36 M a"),
            (85_054_464, "85.1 M a"),
            (7 * 10**9, "7.00 G a"),
        ],
    )
    def test_scaled(self, number: int, text: str) -> None:
        assert scaled(number, " a") == text


class TestTree:
    def test_chains_are_one_line(self) -> None:
        assert tree(("a.b.c", ("x", "y"))) == ["└─ x · a.b.c · y"]
        assert tree(("", ("x", "y"))) == ["└─ x · y"]

    def test_modules_with_entries_of_their_own(self) -> None:
        entries = (("a", ("x", "")), ("a.b", ("", "y")), ("c", ("z", "")))
        assert tree(*entries) == ["├─ a", "│  ├─ x", "│  └─ b · y", "└─ z · c"]

    @pytest.mark.parametrize(
        ("numbers", "text"),
        [
            ("0", "0"),
            ("01", "0,1 (2 alike)"),
            ("123", "1…3 (3 alike)"),
            ("0246", "0,2…6 (4 alike)"),
            ("014", "0,1,4 (3 alike)"),
        ],
    )
    def test_numbered_siblings(self, numbers: str, text: str) -> None:
        entries = [(f"a.{n}.{m}", (m, "")) for n in numbers for m in ("up", "down")]
        assert tree(*entries) == [f"└─ a.{text}", "   ├─ up · up", "   └─ down · down"]

    def test_names_are_never_merged(self) -> None:
        assert len(tree(("a.up", ("x", "")), ("a.gate", ("x", "")))) == 3

    def test_other_texts_are_shown(self) -> None:
        entries = [(f"a.{n}", (str(n // 2), "")) for n in range(4)]
        assert tree(*entries) == ["└─ a", "   ├─ 0 · 0,1 (2 alike)", "   └─ 1 · 2,3 (2 alike)"]

    def test_layers_within_layers(self) -> None:
        entries = [(f"a.{n}.b.{m}.c", ("x", "")) for n in range(3) for m in range(4)]
        assert tree(*entries) == ["└─ x · a.0…2.b.0…3.c (12 alike)"]
