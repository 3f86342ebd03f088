"""Resuming with something else than before is said; what cannot run is refused."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_hf import assert_equal, callback, make_model, make_trainer, weights

import td_plugin as td
from td_plugin.integrations import hf_settings
from td_plugin.integrations.hf import TargetedDropoutCallback

LAYER = "bert.encoder.layer.{}.intermediate.dense.weight"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """At step 2 of 4, of the callback as `callback()` makes it."""
    out = tmp_path_factory.mktemp("run")
    make_trainer(out, make_model(), callback(recipe_steps=4), max_steps=4).train()
    return str(out / "checkpoint-2")


def resumed(out: Path, checkpoint: str, mine: TargetedDropoutCallback, **options: Any) -> dict[str, Any]:
    """The settings in the checkpoint that the resumed run leaves."""
    trainer = make_trainer(out, make_model(seed=9), mine, **{"max_steps": 4, **options})
    trainer.train(resume_from_checkpoint=checkpoint)
    state = json.loads((out / f"checkpoint-{trainer.state.max_steps}" / "trainer_state.json").read_text())
    return dict(state["stateful_callbacks"]["td_plugin_settings"])


def test_the_same_settings_say_nothing(tmp_path: Path, checkpoint: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed(tmp_path, checkpoint, callback(recipe_steps=4))


def unit(alpha: float = 0.9, **options: Any) -> td.Recipe:
    return td.recipes.ramping_targeted_unit(alpha, **options)


@pytest.mark.parametrize(
    ("mine", "options", "told"),
    [
        ((unit(), 0.75), {}, r"sparsity_level 0\.5 -> 0\.75"),
        ((unit(0.6), 0.5), {}, r"drop_rate 0\.9 -> 0\.6"),
        ((unit(), 0.5), {"seed": 7}, r"seed 0 -> 7"),
        ((unit(), 0.5), {"recipe_steps": 0.5}, r"ramp Ramp\(.*end=4.* -> Ramp\(.*end=0\.5"),
        ((unit(), 0.5), {"mask_every": "step"}, r"mask_every micro_batch -> step"),
        ((td.recipes.targeted_unit(0.9), 0.5), {}, r"recipe ramping_targeted_unit -> targeted_unit.*drop_schedule"),
        ((unit(kinds=("neurons",)), 0.5), {}, r"granularity .*targets 4 -> 2"),
    ],
    ids=["gamma", "alpha", "seed", "ramp", "mask_every", "recipe", "kinds"],
)
def test_other_settings_are_named(
    tmp_path: Path, checkpoint: str, mine: tuple[td.Recipe, float], options: dict[str, Any], told: str
) -> None:
    with pytest.warns(UserWarning, match=rf"resumed at step 2 with other settings.*{told}"):
        kept = resumed(tmp_path, checkpoint, TargetedDropoutCallback(*mine, **{"recipe_steps": 4, **options}))
    assert (kept["recipe"], kept["sparsity_level"]) == (mine[0].name, mine[1]), "a second resume compares with these"


@pytest.mark.parametrize("options", [{"max_steps": 6}, {"max_steps": -1, "num_train_epochs": 2}], ids=str)
def test_another_length_of_the_run_is_named(tmp_path: Path, checkpoint: str, options: dict[str, Any]) -> None:
    steps = max(options["max_steps"], 4 * options.get("num_train_epochs", 0))
    with pytest.warns(UserWarning, match=rf"max_steps 4 -> {steps}"):
        resumed(tmp_path, checkpoint, callback(recipe_steps=4), **options)


def test_levels_of_single_tensors_are_named(tmp_path: Path, checkpoint: str) -> None:
    entries = [{"tensor_fqn": LAYER.format(0), "sparsity_level": 0.25}, {"tensor_fqn": LAYER.format(1)}]
    with pytest.warns(UserWarning, match=rf"γ and α of {LAYER.format(0)} as all -> \[0\.25, 0\.9\]"):
        resumed(tmp_path, checkpoint, callback(recipe_steps=4, config=entries))


@pytest.mark.parametrize("record", [None, 3], ids=["without", "damaged"])
def test_a_checkpoint_without_a_record_resumes_quietly(tmp_path: Path, checkpoint: str, record: object) -> None:
    file = Path(checkpoint, "trainer_state.json")
    before = file.read_text()
    state = json.loads(before)
    if record is None:
        del state["stateful_callbacks"]["td_plugin_settings"]
    else:
        state["stateful_callbacks"]["td_plugin_settings"] = record
    file.write_text(json.dumps(state))
    kept = resumed(tmp_path, checkpoint, callback(recipe_steps=4))
    file.write_text(before)
    assert kept["sparsity_level"] == 0.5


@pytest.mark.slow
def test_the_new_levels_hold_where_the_checkpoint_remembers_others(tmp_path: Path) -> None:
    make_trainer(tmp_path / "a", make_model(), TargetedDropoutCallback(td.recipes.network_surgery(0.5), 0.5)).train()
    mine = TargetedDropoutCallback(td.recipes.network_surgery(0.5), 0.75, squash=False)
    with pytest.warns(UserWarning, match=r"sparsity_level 0\.5 -> 0\.75"):
        resumed(tmp_path / "b", str(tmp_path / "a" / "checkpoint-6"), mine, max_steps=12)
    assert mine.sparsifier is not None
    assert {group["sparsity_level"] for group in mine.sparsifier.groups} == {0.75}
    assert mine.sparsifier.report().sparsity == pytest.approx(0.75, abs=0.03)


def test_pitfall_4_restored_callback_states_say_the_same(tmp_path: Path, checkpoint: str) -> None:
    options = {"restore_callback_states_from_checkpoint": True}
    with pytest.warns(UserWarning, match=r"seed 0 -> 7"):
        resumed(tmp_path, checkpoint, callback(recipe_steps=4, seed=7), **options)


def test_pitfall_3_a_checkpoint_of_ours_resumes_without_the_callback_and_with_it_again(
    tmp_path: Path, checkpoint: str
) -> None:
    make_trainer(tmp_path, make_model(seed=9), None, max_steps=4).train(resume_from_checkpoint=checkpoint)
    again = make_trainer(tmp_path, make_model(seed=8), callback(recipe_steps=4), max_steps=4)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert again.state.global_step == 4


def test_pitfall_21_zero_3_is_refused_with_the_reason(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, make_model(), callback(), max_steps=2)
    before = weights(trainer.model)
    trainer.args.deepspeed_plugin = SimpleNamespace(zero_stage=3)
    with pytest.raises(td.TdError, match=r"ZeRO-3.*empty tensor.*fix: ZeRO-1 or ZeRO-2"):
        hf_settings.refuse_zero3(trainer.args)
    with pytest.raises(td.TdError, match="ZeRO-3"):
        callback().on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)
    assert_equal(before, weights(trainer.model))
    trainer.args.deepspeed_plugin = SimpleNamespace(zero_stage=2)
    hf_settings.refuse_zero3(trainer.args)


def test_a_frozen_backbone_is_said_and_pruned_all_the_same(tmp_path: Path) -> None:
    model = make_model()
    for parameter in model.bert.parameters():
        parameter.requires_grad_(False)
    trainer = make_trainer(tmp_path, model, callback(0.75), max_steps=2, save_strategy="no")
    before = weights(model)
    with pytest.warns(UserWarning, match=r"4 of 4 targets are frozen.*do not learn to do without"):
        trainer.train()
    weight = trainer.model.get_parameter(LAYER.format(0))
    assert float((weight == 0).all(1).float().mean()) == 0.75
    kept = (weight != 0).any(1)
    assert (weight[kept] == before[LAYER.format(0)][kept]).all()
