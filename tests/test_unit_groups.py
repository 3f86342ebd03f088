"""Unit dropout on general groups: given by hand, with owners, ranked by all their members, of every kind."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import td_plugin as td
from td_plugin.criteria import magnitude
from td_plugin.granularity import Units
from td_plugin.parametrization import masked_tensors
from td_plugin.structure import FixedGroup, Slice, Structure, UnitGroup

ALL = td.Recipe(magnitude, Units(), 0.5, name="all members")
PRODUCERS = td.recipes.targeted_unit(0.5)


def group(name: str, kind: Any, units: int, ranked: Any, carried: Any = (), consumers: Any = ()) -> UnitGroup:
    return UnitGroup(name, kind, units, tuple(ranked), tuple(carried), tuple(consumers), (), (), None)


def prepare(model: nn.Module, recipe: td.Recipe, level: float = 0.5, **options: Any) -> td.TargetedDropout:
    sparsifier = td.TargetedDropout(recipe, level)
    sparsifier.prepare(model, **options)
    return sparsifier


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def dropped_units(model: nn.Module, name: str) -> list[int]:
    weight = model.eval().get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return [unit for unit, row in enumerate(weight) if not row.any()]


# ---- importance


@pytest.mark.parametrize(("recipe", "reads"), [(ALL, True), (PRODUCERS, False)], ids=["all", "producers"])
def test_importance_sums_squares_over_the_members(recipe: td.Recipe, reads: bool) -> None:
    model = mlp()
    first, second, last = (model.get_parameter(f"{i}.weight").detach().double().numpy() for i in (0, 2, 4))
    prepare(model, recipe)
    for name, rows, columns in (("0", first, second), ("2", second, last)):
        importance = (rows**2).sum(1) + reads * (columns**2).sum(0)
        assert dropped_units(model, name) == sorted(np.argsort(importance)[:4])


def test_recipes_that_cite_the_paper_rank_by_producers_and_the_axis_by_all() -> None:
    for recipe in (td.recipes.targeted_unit(), td.recipes.ramping_targeted_unit()):
        assert recipe.granularity == Units(members="producers")
    assert td.recipes.targeted_unit(members="all").granularity == Units() == Units(members="all")
    assert Units().kinds == ("neurons", "channels", "heads")


def test_what_reads_the_units_is_evidence_only() -> None:
    model = mlp()
    sparsifier = prepare(model, ALL, config=[{"tensor_fqn": "0.weight"}])
    assert masked_tensors(model) == ["0.weight", "0.bias"] and set(sparsifier.state) == {"0.weight", "0.bias"}
    assert sparsifier.report().rows[0].elements == 6 * 8 + 8
    sparsifier.step()
    assert (model[2].weight != 0).all()


def test_evidence_is_dense_where_another_target_masks_it() -> None:
    """The second layer's rows are masked by its own units; the first's columns in it count in full all the same."""
    model = mlp()
    with torch.no_grad():
        model[0].weight.fill_(1.0), model[2].weight.fill_(0.01)
        model[2].weight[0, :4] = 0.5  # in a row that is small by itself: candidates are rows without it
        model[2].weight[1:] += 1.0
        model[4].weight.fill_(0.1)
    prepare(model, ALL, 0.5)
    assert 0 in dropped_units(model, "2")
    assert dropped_units(model, "0") == [4, 5, 6, 7]


def test_evaluation_follows_the_weights_that_read_the_units() -> None:
    model = mlp()
    prepare(model, ALL, config=[{"tensor_fqn": "0.weight"}])
    before = dropped_units(model, "0")
    with torch.no_grad():
        model[2].weight[:, before] += 10.0
    assert not set(dropped_units(model, "0")) & set(before)


def test_weights_that_read_the_units_and_are_not_finite_are_an_error() -> None:
    model = mlp()
    sparsifier = prepare(model, ALL, config=[{"tensor_fqn": "0.weight"}])
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")
    with pytest.raises(td.TdError, match=r"NaN.*0\.weight"):
        sparsifier.step()


# ---- groups given by hand


class Attention(nn.Module):
    """Heads of a packed projection: query, key and value of head 0, then of head 1, ... lie 4 heads apart."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 3)

    def heads(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 2)).permute(2, 0, 3, 1, 4)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.heads(x).transpose(1, 2).flatten(2))
        return out


PACKED = tuple(range(4)) * 3  # of heads; two rows each
OWNERS = tuple(owner for owner in PACKED for _ in range(2))
HEADS = group(
    "attention",
    "heads",
    4,
    [Slice("qkv", "weight", 0, owners=OWNERS)],
    [Slice("qkv", "bias", 0, owners=OWNERS)],
    [Slice("out", "weight", 1, 2)],
)


def test_packed_heads_given_by_hand_fall_silent_together() -> None:
    torch.manual_seed(0)
    model, x = Attention(), torch.randn(2, 5, 8)
    weight, out = (t.detach().double().numpy() for t in (model.qkv.weight, model.out.weight))
    norms = [(weight[np.array(OWNERS) == h] ** 2).sum() + (out[:, 2 * h : 2 * h + 2] ** 2).sum() for h in range(4)]
    gone = sorted(np.argsort(norms)[:2])
    with torch.no_grad():
        before = model.heads(x)
    sparsifier = prepare(model, ALL, groups=[HEADS])
    row = sparsifier.report().rows[0]
    assert (row.groups, row.dropped, row.zeros, row.elements) == (4, 2, 12 * 9, 24 * 9)
    after = model.eval().heads(x)
    assert not after[:, gone].any()
    kept = [head for head in range(4) if head not in gone]
    torch.testing.assert_close(after[:, kept], before[:, kept])
    sparsifier.squash_mask()
    assert torch.equal(model.heads(x), after)


def test_a_given_group_answers_to_the_names_of_its_tensors() -> None:
    model = Attention()
    sparsifier = prepare(model, ALL, config=[{"tensor_fqn": "qkv.weight", "drop_rate": 0.25}], groups=[HEADS])
    assert masked_tensors(model) == ["qkv.weight", "qkv.bias"]
    assert sparsifier.groups[0]["drop_rate"] == 0.25


def with_ranked(part: Slice) -> UnitGroup:
    return replace(HEADS, ranked=(part,))


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([], "not groups of units; where: groups"),
        (HEADS, "not groups of units"),
        (["qkv"], "not groups of units"),
        ([replace(HEADS, kind="filters")], r"group 'attention' has an unknown kind; got: filters"),
        ([replace(HEADS, ranked=())], "needs units and at least one ranked tensor"),
        ([replace(HEADS, units=0)], "needs units and at least one ranked tensor"),
        ([with_ranked(Slice("qvk", "weight", 0, 6))], r"no tensor of the model; where: qvk\.weight.*'qkv\.weight'"),
        ([with_ranked(Slice("qkv", "weight", 2, 6))], r"dimension that is not there; where: qkv\.weight"),
        ([with_ranked(Slice("qkv", "weight", -1, 2))], "dimension that is not there"),
        ([with_ranked(Slice("qkv", "weight", 0, 5))], r"do not divide among the units.*4 units of 5, 24 entries"),
        ([with_ranked(Slice("qkv", "weight", 0, owners=OWNERS[:-1]))], r"owners do not fit.*23 owners up to 3 for 24"),
        ([with_ranked(Slice("qkv", "weight", 0, owners=(4,) * 24))], r"owners do not fit.*-1 to 3"),
        ([with_ranked(Slice("qkv", "weight", 0, owners=(0,) * 24))], r"computes some units; got: \[1, 2, 3\]"),
        ([with_ranked(Slice("", "table", 0))], "masks what is no floating-point parameter; where: table"),
        ([replace(HEADS, consumers=(Slice("aut", "weight", 1, 2),))], r"no tensor of the model.*'out\.weight'"),
        ([replace(HEADS, sizes=(td.structure.Size("att", "heads"),))], "names no module of the model; where: att"),
        ([HEADS, HEADS], r"asked for twice; where: qkv\.weight; fix: name every tensor, or every unit, once"),
    ],
)
def test_wrong_groups_are_named_and_leave_the_model_alone(groups: Any, message: str) -> None:
    model = Attention()
    model.register_buffer("table", torch.ones(4))
    with pytest.raises(td.TdError, match=message):
        prepare(model, ALL, groups=groups)
    assert masked_tensors(model) == []


def test_groups_are_for_unit_recipes() -> None:
    with pytest.raises(td.TdError, match=r"drops single weights; where: recipe 'targeted_weight'"):
        prepare(Attention(), td.recipes.targeted_weight(), groups=[HEADS])


# ---- what the survey says


def test_the_survey_is_asked_once_and_given_the_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, str]] = []

    def survey(model: nn.Module, example_inputs: Mapping[str, Any] | None = None, *, source: str) -> Structure:
        asked.append((example_inputs, source))
        fixed = (FixedGroup("out", ("out.weight",), 3, "they are the model's outputs"),)
        return Structure((HEADS,), fixed, "graph")

    monkeypatch.setattr("td_plugin.selection.survey", survey)
    inputs = {"x": torch.zeros(1, 5, 8)}
    for config in (None, [{"tensor_fqn": "qkv.weight"}]):
        sparsifier = prepare(Attention(), ALL, config=config, example_inputs=inputs)
        assert [row.tensor for row in sparsifier.report().rows] == ["qkv.weight"]
    assert [(given is inputs, source) for given, source in asked] == [(True, "auto")] * 2
    prepare(Attention(), td.recipes.targeted_weight(), example_inputs=inputs)
    prepare(Attention(), ALL, groups=[HEADS], example_inputs=inputs)
    assert len(asked) == 2
    neurons = td.recipes.targeted_unit(kinds=("neurons",))
    with pytest.raises(td.TdError, match=r"qkv\.weight: its units are heads, which the recipe does not drop"):
        prepare(Attention(), neurons)
    with pytest.raises(td.TdError, match="nothing to prune"):
        prepare(Attention(), td.recipes.targeted_unit(kinds=("hidden",)))
    assert asked[-1] == (None, "graph")  # families and chains do not tell


def test_a_model_that_cannot_be_traced_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    fixed = (FixedGroup("Attention", (), 0, "aten.odd is not known"),)
    monkeypatch.setattr("td_plugin.selection.survey", lambda *_, source: Structure((), fixed, "chains"))
    with pytest.raises(td.TdError, match=r"qkv\.weight: aten\.odd is not known"):
        prepare(Attention(), ALL)


# ---- the width of the residual stream, whole layers


class Stream(nn.Module):
    """A residual stream of width 6 between an embedding and a head that is tied to it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(10, 6), nn.Linear(6, 10, bias=False)
        self.up = nn.ModuleList(nn.Linear(6, 8) for _ in range(3))
        self.down = nn.ModuleList(nn.Linear(8, 6) for _ in range(3))
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor, silent: Tensor | None = None) -> Tensor:
        def heard(x: Tensor) -> Tensor:
            return x if silent is None else x * ~silent

        x = heard(self.embed(tokens))
        for up, down in zip(self.up, self.down, strict=True):
            x = x + heard(down(up(x).tanh()))
        out: Tensor = self.head(x)
        return out


HIDDEN = group(
    "embed",
    "hidden",
    6,
    [Slice("embed", "weight", 1), *(Slice(f"down.{i}", "weight", 0) for i in range(3))],
    [Slice(f"down.{i}", "bias", 0) for i in range(3)],
    [*(Slice(f"up.{i}", "weight", 1) for i in range(3)), Slice("head", "weight", 1)],
)
LAYERS = group(
    "down",
    "layers",
    3,
    [Slice(f"down.{i}", "weight", 0, owners=(i,) * 6) for i in range(3)],
    [Slice(f"down.{i}", "bias", 0, owners=(i,) * 6) for i in range(3)],
)
TOKENS = torch.arange(10).view(2, 5)


def stream() -> Stream:
    torch.manual_seed(0)
    return Stream()


def test_the_width_of_a_tied_residual_stream() -> None:
    model = stream()
    dense = copy.deepcopy(model)
    columns = dense.embed.weight.detach().double().numpy()
    squares = (columns**2).sum(0)  # once, though it is the embedding and the head
    for up, down in zip(dense.up, dense.down, strict=True):
        squares += (down.weight.detach().double().numpy() ** 2).sum(1) + (up.weight.detach().double().numpy() ** 2).sum(
            0
        )
    sparsifier = prepare(model, td.Recipe(magnitude, Units(("hidden",)), 0.5, name="hidden"), groups=[HIDDEN])
    silent = torch.zeros(6, dtype=torch.bool)
    silent[np.argsort(squares)[:3].copy()] = True
    out = model.eval()(TOKENS)
    torch.testing.assert_close(out, dense(TOKENS, silent))
    assert torch.equal(model.head.weight, model.embed.weight) and not model.head.weight[:, silent].any()
    model.train(), sparsifier.step()
    drawn = ~model.embed.weight.any(0)
    torch.testing.assert_close(model(TOKENS), dense(TOKENS, drawn))
    assert torch.equal(model.head.weight, model.embed.weight)
    model.eval(), sparsifier.squash_mask()
    assert torch.equal(model(TOKENS), out) and type(model.head) is nn.Linear
    assert model.head.weight is model.embed.weight


def test_the_width_of_a_residual_stream_is_found_in_the_traced_graph() -> None:
    model = stream()
    dense = copy.deepcopy(model)
    recipe = td.recipes.targeted_unit(kinds=("hidden",), members="all")
    sparsifier = prepare(model, recipe, example_inputs={"tokens": TOKENS})
    assert [row.groups for row in sparsifier.report().rows] == [6]
    assert set(sparsifier.report().skipped) == {f"up.{i}.weight" for i in range(3)}
    silent = ~model.eval().embed.weight.any(0)
    assert silent.sum() == 3
    torch.testing.assert_close(model(TOKENS), dense(TOKENS, silent))


def test_whole_layers_of_a_residual_stream() -> None:
    model = stream()
    with torch.no_grad():
        model.down[1].weight.mul_(0.1)
    dense = copy.deepcopy(model)
    sparsifier = prepare(model, td.recipes.targeted_unit(kinds=("layers",)), 0.34, groups=[HIDDEN, LAYERS])
    row = sparsifier.report().rows[0]
    assert (row.groups, row.dropped, row.zeros) == (3, 1, 6 * 9)
    del dense.up[1], dense.down[1]
    torch.testing.assert_close(model.eval()(TOKENS), dense(TOKENS))


def test_two_kinds_that_share_tensors_need_two_recipes() -> None:
    message = (
        r"asked for twice; where: down\.0\.weight; got: by the hidden of embed\.weight and by the layers of "
        r"down\.0\.weight; fix: one recipe for one kind: kinds=\('hidden',\) or kinds=\('layers',\)"
    )
    with pytest.raises(td.TdError, match=message):
        prepare(stream(), td.recipes.targeted_unit(kinds=("hidden", "layers")), groups=[HIDDEN, LAYERS])


def test_units_of_a_buffer_cannot_be_masked_and_the_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Attention()
    model.register_buffer("table", torch.ones(4))
    heads = replace(HEADS, carried=(*HEADS.carried, Slice("", "table", 0)))
    monkeypatch.setattr("td_plugin.selection.survey", lambda *_, source: Structure((heads,), (), "graph"))
    with pytest.raises(td.TdError, match=r"nothing to prune.*qkv\.weight: table belongs to its units"):
        prepare(model, ALL)
    with pytest.raises(td.TdError, match=r"cannot be masked; where: qkv\.weight; got: table belongs"):
        prepare(model, ALL, config=[{"tensor_fqn": "qkv.weight"}])
