"""What a run says about its pruning: churn and survival, the reporters of the Trainer, the words at the end."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_hf import callback, make_model, make_trainer, weights
from torch import nn

import td_plugin as td
from td_plugin.churn import Change, Churn
from td_plugin.integrations.hf import TargetedDropoutCallback
from td_plugin.integrations.hf_logging import trends


def lowest(weight: NDArray[np.float32]) -> set[tuple[int, int]]:
    """The half of each row with the smallest magnitudes."""
    order = np.argsort(np.abs(weight), axis=1, kind="stable")[:, : weight.shape[1] // 2]
    return {(row, int(column)) for row, columns in enumerate(order) for column in columns}


def test_churn_and_survival_are_shares_of_sets() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 2))
    sparsifier = td.TargetedDropout(td.recipes.targeted_weight(0.5), 0.5)
    sparsifier.prepare(model, [{"tensor_fqn": "0.weight"}])
    generator = np.random.default_rng(0)
    sets, churn = [], Churn()
    parameter = dict(model.named_parameters())["0.weight"]
    for i in range(5):
        value = generator.normal(size=(8, 6)).astype(np.float32) if i != 3 else parameter.detach().numpy() * 2
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(value))
        sets.append(lowest(value))
        change = sparsifier.change(churn)
        if i == 0:
            assert change is None
            continue
        assert change is not None
        assert change.churn == pytest.approx(len(sets[i] - sets[i - 1]) / 24)
        assert change.survival == pytest.approx(len(sets[i] & sets[0]) / 24)
        assert (change.churn == 0) == (i == 3)


def test_the_first_look_is_the_first_with_candidates() -> None:
    sparsifier = td.TargetedDropout(td.recipes.ramping_targeted_unit(0.9), 0.5)
    sparsifier.prepare(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)))
    churn, found = Churn(), []
    for progress in (0.0, 0.0, 0.5, 0.5, 1.0):
        sparsifier.set_progress(progress)
        found.append(sparsifier.change(churn))
    # 3 of 8 units at 95 % of the way, then 4: the one that came is a quarter of the larger set
    assert found == [None, None, None, Change(0.0, 1.0), Change(0.25, 1.0)]


@pytest.mark.parametrize("recipe", [td.recipes.ramping_targeted_weight(0.9), td.recipes.ramping_targeted_unit(0.9)])
def test_a_held_mask_has_no_churn(tmp_path: Path, recipe: td.Recipe) -> None:
    hook = TargetedDropoutCallback(recipe, 0.5, ramp=td.Ramp(end=0.5, freeze=0.5))
    trainer = make_trainer(tmp_path, make_model(), hook, max_steps=8, save_strategy="no")
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert "td_churn" not in logs[0]  # nothing to compare with
    assert [entry["td_churn"] for entry in logs[4:]] == [0.0] * 4
    assert {entry["td_survival"] for entry in logs[4:]} == {logs[-1]["td_survival"]} and logs[-1]["td_survival"] < 1


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    (file,) = folder.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.mark.parametrize("late", [False, True], ids=["given", "added"])
def test_tensorboard_gets_what_the_history_has(tmp_path: Path, late: bool) -> None:
    hook = callback(log_groups=True)
    settings = {"max_steps": 4, "save_strategy": "no", "report_to": "tensorboard", "eval_strategy": "no"}
    trainer = make_trainer(tmp_path, make_model(), None if late else hook, **settings)
    if late:
        trainer.add_callback(hook)
    before = [type(c).__name__ for c in trainer.callback_handler.callbacks]
    trainer.train()
    after = [type(c).__name__ for c in trainer.callback_handler.callbacks]
    assert sorted(after) == sorted(before) and after[0] == before[0]
    found = scalars(tmp_path)
    names = [name for entry in trainer.state.log_history for name in entry if name.startswith("td_")]
    assert {"td_sparsity_level", "td_drop_rate", "td_dropped", "td_sparsity", "td_churn", "td_survival"} < set(names)
    assert sum(name.startswith("td_sparsity/") for name in set(names)) == 4
    for name in set(names):
        expected = [(e["step"], pytest.approx(e[name])) for e in trainer.state.log_history if name in e]
        assert found[f"train/{name}"] == expected


def test_looking_changes_nothing(tmp_path: Path) -> None:
    runs = []
    for steps in (1, 100):
        trainer = make_trainer(tmp_path, make_model(), callback(), max_steps=4, save_strategy="no", logging_steps=steps)
        trainer.train()
        runs.append(weights(trainer.model))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"recipe_steps": 2}, "trained 4 of 4 steps, at the target γ from step 2 on"),
        ({}, "trained 4 of 4 steps, at the target γ never: the ramp ends at step 4"),
    ],
    ids=str,
)
def test_the_end_in_words(tmp_path: Path, options: dict[str, Any], line: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="td_plugin"):
        hook = callback(**options)
        make_trainer(tmp_path, make_model(), hook, max_steps=4, save_strategy="no").train()
    assert hook.sparsifier is not None
    (text,) = [r.getMessage() for r in caplog.records if "at the target γ" in r.getMessage()]
    assert line in text and str(hook.sparsifier.report()) in text
    assert "of the candidates between two logs" in text


def test_the_trend_of_evaluation() -> None:
    entries = [{"step": s, "eval_accuracy": v, "eval_runtime": 3.0} for s, v in ((2, 0.5), (4, 0.9), (6, 0.75))]
    expected = "eval_accuracy: 0.5000 in step 2, 0.7500 in step 6, from 0.5000 to 0.9000 in 3 evaluations"
    assert trends([{"step": 1, "loss": 0.3}, *entries]) == [expected] and trends([]) == []
