"""When a run ramps and freezes: the value, the held mask, the scheduler and the Trainer."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_hf import assert_equal, make_model, make_trainer, weights
from torch import Tensor, nn

import td_plugin as td
from td_plugin.granularity import Units
from td_plugin.integrations.hf import TargetedDropoutCallback
from td_plugin.ramp import Moment, Ramp

RECIPES: dict[str, Callable[[], td.Recipe]] = {
    "weight": lambda: td.recipes.targeted_weight(0.5),
    "unit": lambda: td.recipes.targeted_unit(0.5),
    "ramping": lambda: td.recipes.ramping_targeted_weight(0.9),
    "surgery": lambda: td.recipes.network_surgery(0.5),
    "gate": td.gates.hard_concrete,
    "fisher of units": lambda: td.recipes.fisher(Units(members="producers"), 0.8),
    "global": lambda: td.recipes.gradual_magnitude(rates=td.rates.Global()),
    "blocks": lambda: td.recipes.block(2, 2),
    "dropconnect": lambda: td.recipes.dropconnect(0.3),
}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 2))


def train(model: nn.Module, sparsifier: td.TargetedDropout | None, steps: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for i in range(steps):
        if sparsifier is not None:
            sparsifier.step()
        x = torch.randn(5, 8, generator=torch.Generator().manual_seed(i))
        model.train()(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    ("ramp", "steps"),
    [
        (Ramp(), (0, 40, None)),
        (Ramp(0.1, 0.6, 0.8), (4, 24, 32)),
        (Ramp(0.1, freeze=0.8), (4, 32, 32)),
        (Ramp(3, 17, unit="steps"), (3, 17, None)),
        (Ramp(1, 2.5, 3, unit="epochs"), (11, 28, 33)),
        (Ramp(0.01, 0.33), (1, 14, None)),
    ],
    ids=str,
)
def test_a_ramp_is_a_line_between_two_steps(ramp: Ramp, steps: tuple[int, int, int | None]) -> None:
    assert ramp.in_steps(40, 11) == steps
    start, end, freeze = steps
    for step in range(60):
        moment = ramp.at(step, 40, 11)
        assert moment.frozen == (freeze is not None and step >= freeze)
        if step < start:
            assert moment.progress is None
        else:
            assert moment.progress == pytest.approx(np.interp(step, [start, end], [0.0, 1.0]))


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"unit": "hours"}, "unknown unit"),
        ({"start": -0.1}, "start of a ramp in share"),
        ({"start": True}, "start of a ramp"),
        ({"start": None}, "start of a ramp"),
        ({"end": 100}, r"end of a ramp in share is a number in \[0, 1\].*unit='steps'"),
        ({"end": float("nan")}, "end of a ramp"),
        ({"freeze": "late"}, "freeze of a ramp"),
        ({"start": 0.5, "end": 0.5}, "ends after it starts"),
        ({"start": 0.5, "freeze": 0.4}, "ends after it starts"),
        ({"end": 0.5, "freeze": 0.4}, "frozen before the ramp ends"),
    ],
    ids=str,
)
def test_what_cannot_be_a_ramp_is_said(options: dict[str, Any], what: str) -> None:
    with pytest.raises(td.TdError, match=what):
        Ramp(**options)


def test_a_number_that_is_not_known_is_said() -> None:
    with pytest.raises(td.TdError, match="the length of an epoch is not known"):
        Ramp(0, 2, unit="epochs").at(0, 40)
    with pytest.raises(td.TdError, match="the length of the run is not known"):
        Ramp().at(0)
    with pytest.raises(td.TdError, match="ends with the run, whose length is not known"):
        Ramp(unit="steps").at(0)
    assert Ramp(2, 4, unit="steps").at(3) == Moment(0.5)


def test_a_run_that_is_too_short_is_said() -> None:
    with pytest.warns(UserWarning, match="takes 50 steps, the run 40: training never reaches the target"):
        Ramp(0, 50, unit="steps").warn_if_longer(40)
    with pytest.warns(UserWarning, match="freezes at step 44, the run ends at 40"):
        Ramp(0, 2, 4, unit="epochs").warn_if_longer(40, 11)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Ramp().warn_if_longer(40)
        Ramp(0, 40, unit="steps").warn_if_longer(40)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_held_mask_is_that_of_the_weights_then(recipe: str) -> None:
    model, x = net(), torch.randn(3, 8)
    sparsifier = td.TargetedDropout(RECIPES[recipe](), 0.5)
    sparsifier.prepare(model)
    sparsifier.set_progress(1.0)
    train(model, sparsifier, 3)
    before = {name: entry["mask"].clone() for name, entry in sparsifier.state.items()}
    sparsifier.hold()
    assert sparsifier.held and sparsifier.remembers
    train(model, sparsifier, 4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))  # nothing is as it was
    assert all(torch.equal(entry["mask"], before[name]) for name, entry in sparsifier.state.items())
    expected, plain = net(), dict(model.named_parameters())
    gates = {name: entry["gate"] for name, entry in sparsifier.state.items() if "gate" in entry}
    with torch.no_grad():
        for name, parameter in expected.named_parameters():
            parameter.copy_(plain[name] * before.get(name, torch.tensor(True)) * gates.get(name, 1.0))
    for _ in range(2):
        sparsifier.step()
        if recipe != "gate":  # whose samples go on
            assert torch.equal(model.train()(x), expected(x))
    assert torch.allclose(model.eval()(x), expected(x))
    sparsifier.squash_mask()
    assert_equal(weights(model), weights(expected))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_held_mask_goes_on_in_a_new_process(recipe: str) -> None:
    def fresh() -> tuple[nn.Sequential, td.TargetedDropout]:
        model = net()
        sparsifier = td.TargetedDropout(RECIPES[recipe](), 0.5)
        sparsifier.prepare(model)
        return model, sparsifier

    model, sparsifier = fresh()
    sparsifier.set_progress(1.0)
    train(model, sparsifier, 3)
    sparsifier.hold()
    train(model, sparsifier, 2)
    saved = json.loads(json.dumps(sparsifier.state_dict()))
    other, resumed = fresh()
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(saved)
    assert resumed.held and resumed.report() == sparsifier.report()
    train(model, sparsifier, 3)
    train(other, resumed, 3)
    assert_equal(weights(model), weights(other))
    assert resumed.state_dict() == sparsifier.state_dict()
    resumed.release()
    assert not resumed.held and resumed.groups[0]["drop_rate"] == resumed.groups[0]["target_drop_rate"]


def test_held_masks_that_do_not_fit_are_said() -> None:
    model = net()
    sparsifier = td.TargetedDropout(td.recipes.targeted_weight(0.5), 0.5)
    sparsifier.prepare(model)
    sparsifier.hold()
    saved = sparsifier.state_dict()
    saved["groups"][0]["held"]["shape"] = [1, 96]
    with pytest.raises(td.TdError, match="held mask is of another shape.*where: 0.weight"):
        sparsifier.load_state_dict(saved)
    saved["groups"][0]["held"] = {"shape": [12, 8], "dropped": "damaged"}
    with pytest.raises(td.TdError, match="memory of the ranking is damaged"):
        sparsifier.load_state_dict(saved)


def test_weights_with_nan_are_not_shipped_under_a_held_mask() -> None:
    model = net()
    sparsifier = td.TargetedDropout(td.recipes.targeted_weight(0.5), 0.5)
    sparsifier.prepare(model)
    sparsifier.hold()
    with torch.no_grad():
        dict(model.named_parameters())["0.weight"][0, 0] = torch.nan
    with pytest.raises(td.TdError, match="NaN"):
        sparsifier.squash_mask()


@pytest.mark.parametrize("recipe", ["weight", "ramping", "dropconnect"])
def test_a_warm_up_is_dense(recipe: str) -> None:
    model, plain = net(), net()
    sparsifier = td.TargetedDropout(RECIPES[recipe](), 0.5)
    sparsifier.prepare(model)
    sparsifier.follow(Ramp(10, 20, unit="steps").at(3))
    train(model, sparsifier, 4)
    train(plain, None, 4)
    assert_equal(weights(model), weights(plain))
    sparsifier.follow(Ramp(10, 20, unit="steps").at(20))
    assert [g["sparsity_level"] for g in sparsifier.groups] == [g["target_sparsity_level"] for g in sparsifier.groups]


def test_the_scheduler_follows_a_ramp_and_resumes() -> None:
    def fresh() -> tuple[nn.Sequential, td.TargetedDropout, td.TargetedDropoutScheduler]:
        model = net()
        sparsifier = td.TargetedDropout(td.recipes.ramping_targeted_weight(0.9), 0.5)
        sparsifier.prepare(model)
        ramp = Ramp(0.2, 0.6, 0.8)
        return model, sparsifier, td.TargetedDropoutScheduler(sparsifier, ramp, total_steps=10)

    def run(model: nn.Module, sparsifier: td.TargetedDropout, scheduler: td.TargetedDropoutScheduler, n: int) -> None:
        for _ in range(n):
            train(model, sparsifier, 1)
            levels.append(sparsifier.groups[0]["sparsity_level"])
            scheduler.step()

    levels: list[float] = []
    model, sparsifier, scheduler = fresh()
    run(model, sparsifier, scheduler, 10)
    schedule = sparsifier.recipe.sparsity_schedule
    assert levels[:7] == pytest.approx([0, 0, 0, *(0.5 * schedule(p) for p in (0.25, 0.5, 0.75, 1.0))])
    assert sparsifier.held and scheduler.recipe_steps == 6
    for stop in (1, 4, 9):
        half = fresh()
        run(*half, stop)
        resumed = fresh()
        resumed[0].load_state_dict(half[0].state_dict())
        resumed[1].load_state_dict(json.loads(json.dumps(half[1].state_dict())))
        resumed[2].load_state_dict(json.loads(json.dumps(half[2].state_dict())))
        run(*resumed, 10 - stop)
        assert_equal(weights(resumed[0]), weights(model))
    with pytest.warns(UserWarning, match="takes 12 steps, the run 10"):
        td.TargetedDropoutScheduler(sparsifier, 12, total_steps=10)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("weight", "unit", "rarely ranked")]


@pytest.mark.parametrize("recipe", ["ramping", "surgery", *SLOW])
def test_a_frozen_run_of_the_trainer_resumes_bit_exact(tmp_path: Path, recipe: str) -> None:
    def make() -> TargetedDropoutCallback:
        chosen = RECIPES.get(recipe, td.recipes.ramping_targeted_weight)()
        every = 4 if recipe == "rarely ranked" else 1
        return TargetedDropoutCallback(chosen, 0.5, ramp=Ramp(1, 1.5, 2, unit="epochs"), refresh_every=every)

    whole = make_trainer(tmp_path / "whole", make_model(), make(), logging_steps=1)
    whole.train()
    assert whole.state.max_steps == 12
    levels = [entry["td_drop_rate"] for entry in whole.state.log_history if "td_drop_rate" in entry]
    assert levels[:4] == [0.0] * 4 and levels[8:] == [1.0] * 4 and 0 < levels[5] <= 1  # logged at the end of each step
    for step in (8, 10):  # at the freeze, behind it
        resumed = make_trainer(tmp_path / f"resumed{step}", make_model(seed=9), make())
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert_equal(weights(whole.model), weights(resumed.model))


def test_the_best_checkpoint_may_be_older_than_the_frozen_mask(tmp_path: Path) -> None:
    def zeros(model: nn.Module) -> dict[str, Tensor]:
        return {name: tensor == 0 for name, tensor in model.named_parameters() if "intermediate.dense.weight" in name}

    hook = TargetedDropoutCallback(td.recipes.targeted_weight(0.5), 0.5, ramp=Ramp(end=0.5, freeze=0.5))
    options = {"eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "loss", "greater_is_better": True}
    trainer = make_trainer(tmp_path, make_model(), hook, load_best_model_at_end=True, max_steps=8, **options)
    trainer.train()
    best = str(trainer.state.best_model_checkpoint)
    model = make_model()
    model.load_state_dict(type(model).from_pretrained(best).state_dict())
    if "td_plugin" not in json.loads(Path(best, "trainer_state.json").read_text())["stateful_callbacks"]:
        ranked = td.TargetedDropout(td.recipes.targeted_weight(0.5), 0.5)
        ranked.prepare(model)
        ranked.squash_mask()
        assert_equal(zeros(trainer.model), zeros(model))  # those of the weights then, not of the mask held later
    else:
        raise AssertionError("choose data for which the best checkpoint lies before the freeze")


def test_the_trainer_is_told_what_the_ramp_cannot_do(tmp_path: Path) -> None:
    with pytest.raises(td.TdError, match="both recipe_steps and ramp"):
        TargetedDropoutCallback(td.recipes.targeted_weight(0.5), 0.5, recipe_steps=3, ramp=Ramp())
    hook = TargetedDropoutCallback(td.recipes.ramping_targeted_weight(0.9), 0.5, recipe_steps=50)
    with pytest.warns(UserWarning, match="takes 50 steps, the run 2: training never reaches"):
        make_trainer(tmp_path, make_model(), hook, max_steps=2, save_strategy="no").train()
