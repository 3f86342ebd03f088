"""Widths under a budget: costs against models that were really cut, budgets met, and the way through the sparsifier."""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import td_plugin as td
from td_plugin.budget import Budget, flops_left, parameters_left, widths
from td_plugin.errors import TdError
from td_plugin.export import shrink
from td_plugin.export.shrink import cut
from td_plugin.granularity import Units
from td_plugin.masks import count
from td_plugin.structure import Slice, Structure, UnitGroup, Work, survey
from td_plugin.widths import Row, possible_widths, runtime_width

TEXT = {"vocab_size": 40, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 30}


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(7, 12), nn.ReLU(), nn.Linear(12, 10), nn.GELU(), nn.Linear(10, 3))


def conv() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3, bias=False), nn.ReLU(),
        nn.Flatten(), nn.Linear(6 * 4, 9), nn.ReLU(), nn.Linear(9, 2),
    )  # fmt: skip


BUILD = {
    "mlp": mlp,
    "conv": conv,
    "bert": lambda: BertForSequenceClassification(BertConfig(**TEXT)),
    "bert with a tied head": lambda: BertForMaskedLM(BertConfig(**TEXT)),
}


def build(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return BUILD[name]().eval()


MODELS = {name: build(name) for name in BUILD}
SURVEYS = {name: survey(model) for name, model in MODELS.items()}


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())  # tied ones once


def group(name: str, kind: Any, units: int, ranked: tuple[Slice, ...], *others: Slice) -> UnitGroup:
    return UnitGroup(name, kind, units, ranked, (), others, (), (), None)


def chain_work(model: nn.Sequential, batch: int) -> tuple[Work, ...]:
    """The products of a chain of Linear layers."""
    layers = [(name, layer) for name, layer in model.named_children() if isinstance(layer, nn.Linear)]
    return tuple(
        Work(f"{n}.weight", 2 * batch * x.weight.numel(), ((f"{n}.weight", 0), (f"{n}.weight", 1))) for n, x in layers
    )


def measured(model: nn.Module, *example: Tensor, **named: Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*example, **named)
    return counter.get_total_flops()


# ---------------------------------------------------------------------------------------------------------- costs


@pytest.mark.parametrize("name", BUILD)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_parameters_are_those_of_the_cut_model(name: str, data: st.DataObject) -> None:
    groups = SURVEYS[name].groups
    kept = {g.name: data.draw(st.integers(1, g.units), label=g.name) for g in groups}
    small = copy.deepcopy(MODELS[name])
    for g in groups:
        cut(small, g, torch.arange(kept[g.name]))
    assert parameters_left(MODELS[name], groups, kept) == size(small)
    assert parameters_left(MODELS[name], groups, {}) == size(MODELS[name])


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_flops_are_those_of_the_cut_model(data: st.DataObject) -> None:
    model, example = build("mlp"), torch.randn(5, 7)
    structure = dataclasses.replace(survey(model), work=chain_work(model, 5))
    kept = {g.name: data.draw(st.integers(1, g.units), label=g.name) for g in structure.groups}
    assert flops_left(structure, {}) == measured(model, example)
    for g in structure.groups:
        cut(model, g, torch.arange(kept[g.name]))
    assert flops_left(structure, kept) == measured(model, example)


def concatenation() -> tuple[nn.Module, tuple[UnitGroup, ...]]:
    """Two layers whose outputs are concatenated behind 2 fixed columns, a third read twice by every other row."""
    model = nn.ModuleDict({"a": nn.Linear(5, 4), "b": nn.Linear(5, 3), "c": nn.Linear(9, 6), "d": nn.Linear(3, 2)})
    a = group("a", "neurons", 4, (Slice("a", "weight", 0),), Slice("a", "bias", 0),
              Slice("c", "weight", 1, owners=(-1, -1, 0, 1, 2, 3, -1, -1, -1)))  # fmt: skip
    b = group("b", "neurons", 3, (Slice("b", "weight", 0),), Slice("b", "bias", 0),
              Slice("c", "weight", 1, owners=(-1,) * 6 + (0, 1, 2)))  # fmt: skip
    c = group("c", "neurons", 3, (Slice("c", "weight", 0, owners=(0, 1, 1, 1, 2, -1)),),
              Slice("c", "bias", 0, owners=(0, 1, 1, 1, 2, -1)), Slice("d", "weight", 1))  # fmt: skip
    return model, (a, b, c)


def entries_left(model: nn.Module, groups: tuple[UnitGroup, ...], kept: Mapping[str, list[int]]) -> int:
    """By brute force: an entry stays unless one of its dimensions belongs to a unit that goes."""
    total = 0
    for name, tensor in model.named_parameters():
        alive = torch.ones(tensor.shape, dtype=torch.bool)
        for g in groups:
            for part in (s for s in g.slices if s.fqn == name):
                owners = part.owners or [i // part.span for i in range(tensor.shape[part.dim])]
                gone = [i for i, owner in enumerate(owners) if owner >= 0 and owner not in kept[g.name]]
                alive.index_fill_(part.dim, torch.tensor(gone, dtype=torch.int64), False)
        total += int(alive.sum())
    return total


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_concatenated_and_unequal_units(data: st.DataObject) -> None:
    model, groups = concatenation()
    kept = {g.name: sorted(data.draw(st.sets(st.integers(0, g.units - 1), min_size=1))) for g in groups}
    named = {name: torch.tensor(units) for name, units in kept.items()}
    assert parameters_left(model, groups, {}, named) == entries_left(model, groups, kept)


def test_the_mean_is_taken_of_units_that_are_not_named() -> None:
    model, groups = concatenation()
    choices = [parameters_left(model, groups, {}, {"c": torch.tensor([unit])}) for unit in range(3)]
    assert len(set(choices)) == 2
    assert parameters_left(model, groups, {"c": 1}) == round(sum(choices) / 3)


def layered() -> tuple[nn.Module, tuple[UnitGroup, ...], tuple[Work, ...]]:
    """Three residual layers of 6 -> 4 -> 6, their neurons, the depth and the residual stream; an embedding tied."""
    layers = [nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 6)) for _ in range(3)]
    embed, head = nn.Embedding(9, 6), nn.Linear(6, 9, bias=False)
    head.weight = embed.weight
    model = nn.ModuleDict({"body": nn.ModuleList(layers), "embed": embed, "head": head})
    ups, downs = [f"body.{i}.0" for i in range(3)], [f"body.{i}.2" for i in range(3)]
    neurons = [
        group(up, "neurons", 4, (Slice(up, "weight", 0),), Slice(up, "bias", 0), Slice(down, "weight", 1))
        for up, down in zip(ups, downs, strict=True)
    ]
    depth = group(
        "body", "layers", 3, tuple(Slice(down, "weight", 0, owners=(i,) * 6) for i, down in enumerate(downs)),
        *(Slice(down, "bias", 0, owners=(i,) * 6) for i, down in enumerate(downs)),
    )  # fmt: skip
    stream = group(
        "embed", "hidden", 6, (Slice("embed", "weight", 1), *(Slice(d, "weight", 0) for d in downs)),
        *(Slice(d, "bias", 0) for d in downs), *(Slice(u, "weight", 1) for u in ups), Slice("head", "weight", 1),
    )  # fmt: skip
    products = [Work(f"{m}.weight", 48, ((f"{m}.weight", 0), (f"{m}.weight", 1))) for m in (*ups, *downs)]
    attention = [Work(f"body.{i}", 100, ()) for i in range(3)]  # a product of two activations, known by its module
    logits = Work("head.weight", 108, (("head.weight", 1),))
    return model, (*neurons, depth, stream), (*products, *attention, logits)


@pytest.mark.parametrize("layers", [[0], [2], [0, 2], [0, 1, 2]])
@pytest.mark.parametrize(("hidden", "neurons"), [(6, 4), (5, 3), (1, 1)])
def test_layers_go_whole_and_tied_tensors_count_once(layers: list[int], hidden: int, neurons: int) -> None:
    model, groups, work = layered()
    kept = {f"body.{i}.0": neurons for i in range(3)} | {"embed": hidden}
    one_layer = 2 * hidden * neurons + neurons + hidden
    which = {"body": torch.tensor(layers)}
    assert parameters_left(model, groups, kept, which) == 9 * hidden + len(layers) * one_layer
    assert parameters_left(model, groups, kept | {"body": len(layers)}) == 9 * hidden + len(layers) * one_layer
    structure = Structure(groups, (), "graph", work)
    flops = 18 * hidden + len(layers) * (4 * hidden * neurons + 100)
    assert flops_left(structure, kept, which) == flops
    assert flops_left(structure, kept | {"body": len(layers)}) == flops


def test_layers_may_be_given_tensor_by_tensor_and_share_some() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2), "c": nn.Linear(2, 2)})
    model["b"].bias = model["a"].bias  # goes with neither
    tensors = [(name, tensor, unit) for unit, name in enumerate("ab") for tensor in ("weight", "bias")]
    depth = group("depth", "layers", 2, tuple(Slice(m, t, 0, owners=(unit, unit)) for m, t, unit in tensors))
    assert parameters_left(model, (depth,), {"depth": 1}) == size(model) - 4


def test_costs_refuse_what_does_not_fit() -> None:
    model, groups = MODELS["mlp"], SURVEYS["mlp"].groups
    with pytest.raises(TdError, match="give example_inputs"):
        flops_left(SURVEYS["mlp"], {})
    with pytest.raises(TdError, match=r"no such group.*where: 7"):
        parameters_left(model, groups, {"7": 1})
    for width in (0, 13, -1):
        with pytest.raises(TdError, match="keep 1 to 12"):
            parameters_left(model, groups, {"0": width})
    for units in ([12], [-1, 0], []):
        with pytest.raises(TdError, match="keep 1 to 12"):
            parameters_left(model, groups, {}, {"0": torch.tensor(units, dtype=torch.int64)})
    with pytest.raises(TdError, match="twice"):
        parameters_left(model, groups, {}, {"0": torch.tensor([1, 1])})
    with pytest.raises(TdError, match="does not fit the model"):
        parameters_left(nn.Sequential(nn.Linear(7, 3)), groups, {})
    stray = group("0", "neurons", 2, (Slice("0", "weight", 0, owners=tuple(range(12))),))
    with pytest.raises(TdError, match="does not have"):
        parameters_left(model, (stray,), {})


# ---------------------------------------------------------------------------------------------------------- rates


def test_one_rate_for_every_group_with_floors_rounding_and_exceptions() -> None:
    model, structure = MODELS["bert"], SURVEYS["bert"]
    neurons, heads = "bert.encoder.layer.{}.intermediate.dense", "bert.encoder.layer.{}.attention.self"
    found = widths(model, structure, Budget(0.7, round_to=1))
    assert dict(found) == {neurons.format(i): 9 for i in (0, 1)} | {heads.format(i): 2 for i in (0, 1)}
    budget = Budget(0.7, floors={"heads": 3}, round_to=4, overrides={r".*\.0\.intermediate.*": 0.0, r".*self": 0.99})
    found = widths(model, structure, budget)
    assert (found[neurons.format(0)], found[neurons.format(1)], found[heads.format(1)]) == (30, 12, 3)
    assert widths(model, structure, Budget(0.99, floors={"heads": 9}))[heads.format(0)] == 4
    assert dict(widths(model, structure, Budget(0.99, round_to={"heads": 2})))[heads.format(0)] == 2
    assert set(widths(model, structure, Budget(0.5), granularity=Units(("heads",)))) == {
        heads.format(i) for i in (0, 1)
    }


def test_rates_need_no_weights() -> None:
    with torch.device("meta"):
        model = mlp()
    found = widths(model, survey(model), Budget(0.5, round_to=1))
    assert dict(found) == {"0": 6, "2": 5}
    assert found.parameters == (12 * 8 + 10 * 13 + 33, 6 * 8 + 5 * 7 + 18)


def test_runtime_widths_are_possible_widths() -> None:
    big = group("x", "neurons", 1100, (Slice("x", "weight", 0),))
    found = possible_widths(big, 1, None)
    assert found[0] == 1100 and found[-1] == 64 and 1024 not in found and 1040 in found
    assert found == sorted({runtime_width("neurons", keep, 1100) for keep in range(1, 1101)}, reverse=True)
    assert all(width % 16 == 0 for width in found[1:])
    heads = group("x", "heads", 12, (Slice("x", "weight", 0),))
    assert possible_widths(heads, 3, 8) == list(range(12, 2, -1))
    assert possible_widths(heads, 99, None) == [12]


# ---------------------------------------------------------------------------------------------------- whole model

BUDGETS = st.builds(
    Budget,
    level=st.floats(0, 0.5),
    of=st.just("parameters"),
    floors=st.dictionaries(st.sampled_from(["neurons", "heads", "channels"]), st.integers(1, 6)),
    round_to=st.one_of(st.integers(1, 7), st.none(), st.just({"neurons": 3, "channels": 2})),
)


@pytest.mark.parametrize("name", BUILD)
@settings(max_examples=25, deadline=None)
@given(budget=BUDGETS, seed=st.integers(0, 3))
def test_a_budget_is_met_as_closely_as_the_steps_allow(name: str, budget: Budget, seed: int) -> None:
    model = build(name, seed)
    structure = survey(model)
    possible = {g.name: possible_widths(g, budget.floors.get(g.kind, 1), budget.round_to) for g in structure.groups}
    dense = size(model)
    least = parameters_left(model, structure.groups, {n: steps[-1] for n, steps in possible.items()})
    most = dense - math.ceil(budget.level * dense - 1e-6)
    if least > most:
        with pytest.raises(TdError, match=r"cannot be removed.*at most"):
            widths(model, structure, budget)
        return
    found = widths(model, structure, budget)
    assert found.parameters == (dense, parameters_left(model, structure.groups, found))
    assert found.parameters[1] <= most
    for n, width in found.items():
        assert width in possible[n]
        if width != possible[n][0]:  # one step back anywhere would break the budget
            wider = dict(found) | {n: possible[n][possible[n].index(width) - 1]}
            assert parameters_left(model, structure.groups, wider) > most


def test_the_most_that_can_be_removed_is_named_and_can_be() -> None:
    model, structure = MODELS["bert"], SURVEYS["bert"]
    with pytest.raises(TdError, match="at most") as error:
        widths(model, structure, Budget(0.9, of="parameters", floors={"neurons": 3}, round_to=1))
    most = float(str(error.value).split("at most ")[1].split()[0])
    found = widths(model, structure, Budget(most, of="parameters", floors={"neurons": 3}, round_to=1))
    assert sum(found.values()) <= 2 * (3 + 1) + 1
    with pytest.raises(TdError, match="at most"):
        widths(model, structure, Budget(most + 2e-3, of="parameters", floors={"neurons": 3}, round_to=1))


def test_flops_and_parameters_are_different_budgets() -> None:
    """Two layers of 8 neurons: the first is as large as the second, but works on 50 times as many positions."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 6))
    torch.nn.init.constant_(model[0].weight, 0.1)
    torch.nn.init.constant_(model[2].weight, 0.1)
    first = Work("0.weight", 2 * 50 * 48, (("0.weight", 0), ("0.weight", 1)))
    structure = dataclasses.replace(survey(model), work=(first, *chain_work(model, 1)[1:]))
    by_flops = widths(model, structure, Budget(0.5, of="flops", round_to=1))
    assert by_flops.flops is not None
    assert by_flops.flops[1] == flops_left(structure, by_flops) <= by_flops.flops[0] / 2
    assert by_flops.flops[1] / by_flops.flops[0] > 0.3
    assert by_flops["0"] < by_flops["2"] == 8
    by_size = widths(model, structure, Budget(0.5, of="parameters", round_to=1))
    assert abs(by_size["0"] - by_size["2"]) <= 1
    with pytest.raises(TdError, match="give example_inputs"):
        widths(model, survey(model), Budget(0.5, of="flops"))


def test_kinds_compete_as_equals_and_scales_do_not_decide() -> None:
    """A head is as large as 9 neurons here, and the second layer's weights are ten times the first's."""
    model = build("bert")
    with torch.no_grad():
        for parameter in model.bert.encoder.layer[1].parameters():
            parameter.mul_(10)
    structure = survey(model)
    found = widths(model, structure, Budget(0.12, of="parameters", round_to=1))
    shares = {g.name: found[g.name] / g.units for g in structure.groups}
    assert max(shares.values()) - min(shares.values()) <= 0.3
    assert min(shares.values()) > 0.4 and max(shares.values()) < 1


def test_redundant_layers_lose_more_and_the_least_important_units_go() -> None:
    model = build("mlp")
    with torch.no_grad():
        model[2].weight[:7] *= 1e-3
    structure = survey(model)
    found = widths(model, structure, Budget(0.43, of="parameters", round_to=1))
    assert dict(found) == {"0": 12, "2": 3}
    with torch.no_grad():
        model[0].weight.zero_()
    assert (
        widths(model, structure, Budget(0.3, of="parameters", round_to=1))["2"] > 3
    )  # those of no weight at all first


def test_the_whole_structure_of_a_traced_model() -> None:
    model, groups, work = layered()
    structure = Structure(groups, (), "graph", work)
    for kinds in (("neurons", "hidden", "layers"), ("hidden", "layers"), ("layers",)):
        for of in ("parameters", "flops"):
            budget = Budget(0.5, of=of, round_to=1)
            found = widths(model, structure, budget, granularity=Units(kinds, "producers"))
            assert found.flops is not None
            before, after = found.parameters if of == "parameters" else found.flops
            assert after <= before / 2
            if "neurons" not in kinds:  # all layers are alike, so it does not matter which of them go
                assert parameters_left(model, groups, found) == found.parameters[1]
                assert flops_left(structure, found) == found.flops[1]


def test_unequal_units_are_counted_as_they_are_kept() -> None:
    model, groups = concatenation()
    structure = Structure(groups, (), "graph")
    for unit in range(3):
        with torch.no_grad():
            for row, owner in enumerate((0, 1, 1, 1, 2)):
                model["c"].weight[row] = 1.0 if owner == unit else 0.01
        found = widths(model, structure, Budget(0.6, overrides={"a|b": 0.0}, round_to=1))
        assert found["c"] == 2
        found = widths(model, structure, Budget(0.7, overrides={"a|b": 0.0}, round_to={"neurons": 1}))
        assert dict(found) == {"a": 4, "b": 3, "c": 1}
        assert found.parameters[1] == parameters_left(model, groups, {}, {"c": torch.tensor([unit])})


def test_a_large_model_takes_seconds() -> None:
    """150 thousand units in 64 groups of a model on the meta device; importances are made up."""
    with torch.device("meta"):
        layers = [(nn.Linear(512, 4600, bias=False), nn.ReLU(), nn.Linear(4600, 512, bias=False)) for _ in range(32)]
        model = nn.Sequential(*(layer for block in layers for layer in (*block, nn.Tanh())), nn.Linear(512, 2))
    structure = survey(model)
    assert sum(g.units for g in structure.groups) > 150_000
    generator = torch.Generator().manual_seed(0)
    start = time.perf_counter()
    found = widths(
        model, structure, Budget(0.4, of="parameters"),
        criterion=lambda e: torch.rand(e.weight.shape[0], 1, generator=generator),
    )  # fmt: skip
    assert time.perf_counter() - start < 10
    assert 0.399 <= 1 - found.parameters[1] / found.parameters[0] <= 0.402


# ------------------------------------------------------------------------------------------------------ the result


@settings(max_examples=300)
@given(st.integers(1, 200_000).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))))
def test_the_level_removes_exactly_as_many(units_kept: tuple[int, int]) -> None:
    units, kept = units_kept
    level = Row("x", "neurons", "x.weight", units, kept).sparsity_level
    assert 0 <= level < 1
    assert int(level * units) == units - kept == count(level, units)


@pytest.mark.parametrize("name", BUILD)
@pytest.mark.parametrize("budget", [Budget(0.3, of="parameters", round_to=1), Budget(0.45, round_to=1), Budget(0.2)])
def test_the_sparsifier_and_shrink_give_the_predicted_widths(name: str, budget: Budget) -> None:
    model = build(name)
    try:
        found = widths(model, survey(model), budget)
    except TdError:
        assert "tied" in name or name == "bert"  # mostly embeddings: a smaller share has to do
        found = widths(model, survey(model), dataclasses.replace(budget, level=0.15))
    sparsifier = td.TargetedDropout(td.recipes.targeted_unit(0.5), sparsity_level=0.0)
    sparsifier.prepare(model, config=found.config())
    sparsifier.step()
    sparsifier.squash_mask()
    small = shrink(model, round_to=1)
    assert {g.name: g.units for g in survey(small).groups} == dict(found)
    assert (size(model), size(small)) == found.parameters


@pytest.mark.parametrize("kinds", [("neurons", "heads"), ("hidden",), ("layers",)], ids=str)
def test_of_a_traced_model_too(kinds: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(**TEXT, num_key_value_heads=2, use_cache=False, tie_word_embeddings=True, pad_token_id=0)
    config._attn_implementation = "eager"  # the counter of FLOPs does not know attention fused for the CPU
    model = LlamaForCausalLM(config).eval()
    tokens = {"input_ids": torch.randint(1, 40, (2, 7))}
    structure = survey(model, tokens)
    found = widths(model, structure, Budget(0.25, of="flops", round_to=1), granularity=Units(kinds, "producers"))
    before = measured(model, **tokens)
    sparsifier = td.TargetedDropout(td.recipes.targeted_unit(0.5, kinds=kinds), sparsity_level=0.0)
    sparsifier.prepare(model, config=found.config(), example_inputs=tokens)
    sparsifier.step()
    sparsifier.squash_mask()
    small = shrink(model, round_to=1, example_inputs=tokens)
    assert (size(model), size(small)) == found.parameters
    assert (before, measured(small, **tokens)) == found.flops


def test_what_stays_whole_is_not_in_the_config() -> None:
    found = widths(MODELS["mlp"], SURVEYS["mlp"], Budget(0.5, round_to=1, overrides={"0": 0.0}))
    assert found.config() == [{"tensor_fqn": "2.weight", "sparsity_level": 0.5}]
    assert widths(MODELS["mlp"], SURVEYS["mlp"], Budget(0.0, of="parameters")).config() == []


def test_widths_are_a_frozen_mapping_and_a_table() -> None:
    model = build("mlp")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = widths(model, dataclasses.replace(survey(model), work=chain_work(model, 1)), Budget(0.5, round_to=1))
    assert dict(found) == {"0": 6, "2": 5} and len(found) == 2 and "1" not in found
    with pytest.raises(KeyError):
        found["1"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.rows = ()  # type: ignore[misc]
    lines = str(found).splitlines()
    assert lines[2].split() == ["0", "neurons", "6/12", "0.500"]
    assert lines[4].split() == ["parameters", "101/259", "0.610"]
    assert lines[5].split() == ["FLOPs", "174/468", "0.628"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"level": 1.0}, "fraction"),
        ({"level": 0.5, "of": "bytes"}, "unknown quantity"),
        ({"level": 0.5, "floors": {"rows": 1}}, "unknown kind"),
        ({"level": 0.5, "floors": {"heads": 0}}, "not a positive number"),
        ({"level": 0.5, "round_to": 0}, "positive multiple"),
        ({"level": 0.5, "round_to": {"neurons": True}}, "not a positive number"),
        ({"level": 0.5, "of": "flops", "overrides": {"x": 0.1}}, "no rates of its own"),
        ({"level": 0.5, "overrides": {"x": 1.5}}, r"fraction.*where: x"),
        ({"level": 0.5, "overrides": {"(": 0.5}}, "not a regular expression"),
    ],
)
def test_budgets_are_checked(arguments: dict[str, Any], problem: str) -> None:
    with pytest.raises(TdError, match=problem):
        Budget(**arguments)


def test_user_errors() -> None:
    model, structure = build("mlp"), SURVEYS["mlp"]
    with pytest.raises(TdError, match=r"no units of these kinds.*neurons"):
        widths(model, structure, Budget(0.5), granularity=Units(("heads",)))
    with pytest.raises(TdError, match="an override matches no group"):
        widths(model, structure, Budget(0.5, overrides={"layer.*": 0.1}))
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
    with pytest.raises(TdError, match=r"NaN.*where: 0"):
        widths(model, structure, Budget(0.2, of="parameters"))
