"""γ, α and what takes part, by names and regular expressions; and γ over all layers under the Trainer."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_hf import make_model, make_trainer
from torch import nn
from torch.ao.pruning import CubicSL, LambdaSL

import td_plugin as td
from td_plugin.integrations.hf import TargetedDropoutCallback
from td_plugin.recipes import targeted_unit, targeted_weight


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(11)]
    return nn.Sequential(*layers, nn.Linear(8, 2))


def levels(model: nn.Module, layers: td.Layers, recipe: td.Recipe | None = None) -> dict[str, float]:
    sparsifier = td.TargetedDropout(recipe or targeted_weight(0.5), 0.5)
    sparsifier.prepare(model, layers)
    return {group["tensor_fqn"]: group["sparsity_level"] for group in sparsifier.groups}


def test_names_win_over_expressions_and_the_longer_over_the_shorter() -> None:
    patterns = {r"\.0\.weight": 0.1, "1": 0.2, "1.0.weight": 0.3, r"^\d\d": 0.4}
    found = levels(net(), td.Layers(patterns))
    assert found["1.0.weight"] == 0.3  # the tensor over the module, and both over the expressions
    assert found["10.0.weight"] == 0.1  # "1" is the name of another module; the first expression comes first
    assert found["2.0.weight"] == 0.1
    assert levels(net(), td.Layers({"1": 0.2, r"weight": 0.1}))["1.0.weight"] == 0.2
    assert levels(net(), td.Layers(dict(reversed(patterns.items()))))["10.0.weight"] == 0.4


def test_exclude_wins_over_include_and_both_are_reported() -> None:
    model, sparsifier = net(), td.TargetedDropout(targeted_weight(0.5), 0.5)
    sparsifier.prepare(model, td.Layers({"3": 0.25}, {"3": 1.0}, include=["3", r"^[45]\."], exclude=["5", "11"]))
    rows = sparsifier.report()
    assert [(r.tensor, r.sparsity_level, r.drop_rate) for r in rows.rows] == [
        ("3.0.weight", 0.25, 1.0),
        ("4.0.weight", 0.5, 0.5),
    ]
    assert rows.skipped["5.0.weight"] == "excluded by '5'"
    assert rows.skipped["6.0.weight"] == "no pattern of include fits it"
    assert rows.skipped["11.weight"] == "makes the logits"  # a pattern may exclude what is left alone anyhow
    model.eval()
    x = torch.randn(2, 8)
    sparsifier.squash_mask()
    zeros = [(p == 0).float().mean().item() for p in model.parameters() if p.dim() == 2]
    assert zeros == [0, 0, 0, 0.25, 0.5, 0, 0, 0, 0, 0, 0, 0] and model(x).shape == (2, 2)


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_any_ranked_tensor_names_the_units(name: str) -> None:
    model = make_model()
    found = levels(model, td.Layers({rf"layer\.0.*{name}": 0.25}), targeted_unit(0.5))
    first, second = (level for fqn, level in found.items() if "attention" in fqn)
    assert (first, second) == (0.25, 0.5)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"sparsity_level": {"12": 0.3}}, r"a level fits no target; where: '12'; fix: nearest: '.*weight'"),
        ({"drop_rate": {"encoder": 0.3}}, "a level fits no target"),
        ({"include": ["encoder"]}, "include fits no target"),
        ({"exclude": ["encoder"]}, "exclude fits no target"),
        ({"include": ["11"]}, "fits only what is left alone; where: '11'; got: 11.weight: makes the logits"),
        ({"sparsity_level": {"5": 0.3}, "exclude": ["5"]}, "only what is left alone.*excluded by '5'"),
        ({"exclude": ["weight"]}, "nothing to prune.*excluded by 'weight'"),
        ({"sparsity_level": {"5": 1.0}}, r"fraction in \[0, 1\); where: 5"),
        ({"sparsity_level": 0.5}, "by layer is a mapping"),
        ({"include": "encoder"}, "include is a list of patterns"),
        ({"exclude": None}, "exclude is a list of patterns"),
        ({"exclude": ["("]}, "not a regular expression"),
    ],
    ids=str,
)
def test_a_pattern_without_effect_is_an_error(options: dict[str, Any], what: str) -> None:
    model = net()
    with pytest.raises(td.TdError, match=what):
        td.TargetedDropout(targeted_weight(0.5), 0.5).prepare(model, td.Layers(**options))
    assert type(model[0][0]) is nn.Linear  # type: ignore[index]


def test_patterns_are_also_a_list() -> None:
    layers = td.Layers({"3": 0.25}, include=["3", "4"])
    expected = [{"tensor_fqn": "3.0.weight", "sparsity_level": 0.25}, {"tensor_fqn": "4.0.weight"}]
    assert td.layerwise.matching(net(), targeted_weight(0.5), layers) == expected


@pytest.mark.parametrize("scheduler", ["lambda", "cubic"])
def test_schedulers_of_torch_ramp_each_layer_to_its_own(scheduler: str) -> None:
    sparsifier = td.TargetedDropout(targeted_weight(0.5), 0.5)
    sparsifier.prepare(net(), td.Layers({"3": 0.2}, include=["3", "4"]))
    made = (
        LambdaSL(sparsifier, lambda t: min(t / 4, 1.0))
        if scheduler == "lambda"
        else CubicSL(sparsifier, init_sl=0.0, delta_t=1, total_t=4)  # type: ignore[no-untyped-call]
    )
    found = []
    for _ in range(6):
        sparsifier.step()
        found.append([group["sparsity_level"] for group in sparsifier.groups])
        made.step()
    share = [min(t / 4, 1.0) if scheduler == "lambda" else 1 - (1 - min(t / 4, 1.0)) ** 3 for t in range(6)]
    np.testing.assert_allclose(found, np.outer(share, [0.2, 0.5]))


def zeros(model: nn.Module) -> dict[str, float]:
    return {n: float((p == 0).float().mean()) for n, p in model.named_parameters() if (p == 0).float().mean() > 0.1}


def test_the_trainer_takes_patterns_and_functions(tmp_path: Path) -> None:
    def run(config: Any, recipe: td.Recipe) -> tuple[nn.Module, TargetedDropoutCallback]:
        hook = TargetedDropoutCallback(recipe, 0.5, config=config)
        trainer = make_trainer(tmp_path, make_model(), hook, max_steps=2, save_strategy="no")
        trainer.train()
        return trainer.model, hook

    layers = td.Layers({r"layer\.0\..*intermediate": 0.25}, include=["intermediate"])
    model, _ = run(layers, targeted_weight(0.5))
    found = {name.split("layer.")[1]: share for name, share in zeros(model).items()}
    assert found == {"0.intermediate.dense.weight": 0.25, "1.intermediate.dense.weight": 0.5}
    model, hook = run(partial(td.layerwise.erk, level=0.75), td.recipes.magnitude())
    assert hook.sparsifier is not None
    by_erk = {entry["tensor_fqn"]: entry["sparsity_level"] for entry in td.layerwise.erk(make_model(), 0.75)}
    for row in hook.sparsifier.report().rows:
        assert row.sparsity_level == by_erk[row.tensor]
    assert len(set(by_erk.values())) > 1


def test_one_budget_over_all_layers_under_the_trainer(tmp_path: Path) -> None:
    model = make_model()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layer.0.intermediate.dense.weight" in name:
                parameter.mul_(0.01)  # the least important of all
    recipe = td.recipes.gradual_magnitude(rates=td.rates.Global(floor=0.1))
    hook = TargetedDropoutCallback(recipe, 0.5, recipe_steps=0.5)
    trainer = make_trainer(tmp_path, model, hook, max_steps=4, save_strategy="no", learning_rate=1e-6)
    trainer.train()
    assert hook.sparsifier is not None
    rows = hook.sparsifier.report().rows
    shares = {row.tensor: row.zeros / row.elements for row in rows}
    assert sum(row.zeros for row in rows) == sum(row.elements // 2 for row in rows)  # together what γ says
    assert (
        max(shares.values()) == pytest.approx(0.9, abs=0.01) == shares["bert.encoder.layer.0.intermediate.dense.weight"]
    )
    assert min(shares.values()) < 0.5
