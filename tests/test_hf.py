"""The Trainer callback: one test per pitfall of the Trainer that concerns it, then its own behaviour."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    Trainer,
    TrainingArguments,
    set_seed,
)

import td_plugin as td
from td_plugin.integrations.hf import TargetedDropoutCallback
from td_plugin.parametrization import masked_tensors
from td_plugin.rates import Global

ROWS, BATCH, ACCUMULATE = 22, 2, 3  # 11 batches an epoch: three full steps and a remainder


def make_model(dropout: float = 0.1, seed: int = 0) -> BertForSequenceClassification:
    set_seed(seed)
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=24,
        max_position_embeddings=16,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return BertForSequenceClassification(config)


def rows(n: int = ROWS) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 50, (n, 6), generator=generator)
    return [{"input_ids": x, "attention_mask": torch.ones_like(x), "labels": (x[0] > 25).long()} for x in ids]


def make_trainer(
    out: Path,
    model: nn.Module | None,
    callback: TargetedDropoutCallback | None,
    cls: type[Trainer] = Trainer,
    **options: Any,
) -> Trainer:
    settings: dict[str, Any] = {
        "num_train_epochs": 3,
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": ACCUMULATE,
        "learning_rate": 1e-2,
        "save_strategy": "steps",
        "save_steps": 2,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    }
    model_init = options.pop("model_init", None)
    arguments = TrainingArguments(output_dir=str(out), **{**settings, **options})
    callbacks = [] if callback is None else [callback]
    data = rows()
    return cls(
        model=model, args=arguments, train_dataset=data, eval_dataset=data, callbacks=callbacks, model_init=model_init
    )


def callback(level: float = 0.5, **options: Any) -> TargetedDropoutCallback:
    return TargetedDropoutCallback(td.recipes.ramping_targeted_unit(0.9), level, **options)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def test_pitfall_1_checkpoints_carry_the_plain_keys(tmp_path: Path) -> None:
    plain = set(make_model().state_dict())
    trainer = make_trainer(tmp_path, make_model(), callback())
    trainer.train()
    saved = sorted(tmp_path.glob("checkpoint-*"))
    assert len(saved) >= 3
    for checkpoint in saved:
        assert set(load_file(checkpoint / "model.safetensors")) == plain
        _, info = BertForSequenceClassification.from_pretrained(checkpoint, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]


@pytest.mark.parametrize("recipe", ["weight", "unit", "ramping", "rarely ranked", "surgery", "iterative"])
@pytest.mark.parametrize("mode", [{}, {"bf16": True}, {"activation_checkpointing": True}], ids=str)
def test_pitfall_2_resume_mid_epoch_is_bit_exact(tmp_path: Path, recipe: str, mode: dict[str, Any]) -> None:
    def make() -> TargetedDropoutCallback:
        value = {
            "weight": td.recipes.targeted_weight(0.5),
            "unit": td.recipes.targeted_unit(0.5),
            "ramping": td.recipes.ramping_targeted_unit(0.9),
            "rarely ranked": td.recipes.ramping_targeted_weight(0.9),
            "surgery": td.recipes.network_surgery(0.5),
            "iterative": td.recipes.iterative_magnitude(3, 0.0, 0.9, quality=1.0),
        }[recipe]
        return TargetedDropoutCallback(value, 0.5, recipe_steps=8, refresh_every=4 if recipe == "rarely ranked" else 1)

    whole = make_trainer(tmp_path / "whole", make_model(), make(), **mode)
    whole.train()
    assert whole.state.max_steps == 12
    # Step 6 lies inside the second epoch. A new process has a model of its own and another state of the generator.
    resumed = make_trainer(tmp_path / "resumed", make_model(seed=9), make(), **mode)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    assert_equal(weights(whole.model), weights(resumed.model))


@pytest.mark.parametrize(
    "recipe",
    [
        td.recipes.magnitude(),
        td.recipes.gradual_magnitude(rates=Global()),
        td.recipes.iterative_magnitude(),
        td.recipes.network_surgery(),
        td.recipes.dropconnect(),
        td.recipes.unit_dropout(),
        td.recipes.n_m(),
        td.recipes.block(),
        td.recipes.xtreme(),
    ],
    ids=lambda recipe: recipe.name,
)
def test_every_method_is_one_argument(tmp_path: Path, recipe: td.Recipe) -> None:
    trainer = make_trainer(tmp_path, make_model(), TargetedDropoutCallback(recipe), max_steps=4, save_strategy="no")
    trainer.train()
    (callback,) = [c for c in trainer.callback_handler.callbacks if isinstance(c, TargetedDropoutCallback)]
    assert callback.sparsifier is not None and not masked_tensors(trainer.model)
    report = callback.sparsifier.report()
    expected = {"dropconnect": 0.0, "unit_dropout": 0.0, "xtreme": 1 - 3 * 200 / 3456}.get(recipe.name, 0.5)
    assert report.sparsity == pytest.approx(expected, abs=0.03)


def test_the_best_checkpoint_comes_with_what_was_remembered_then(tmp_path: Path) -> None:
    options = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "learning_rate": 5e-2}
    recipe = td.recipes.network_surgery(0.5)
    mine = TargetedDropoutCallback(recipe, squash=False)
    trainer = make_trainer(tmp_path, make_model(), mine, metric_for_best_model="loss", **options)
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    last = max(int(path.name.split("-")[1]) for path in tmp_path.glob("checkpoint-*"))
    assert best.name != f"checkpoint-{last}", "the case needs a best checkpoint that is not the last one"
    assert mine.sparsifier is not None
    saved = json.loads((best / "trainer_state.json").read_text(encoding="utf-8"))["stateful_callbacks"]["td_plugin"]
    now = {group["tensor_fqn"]: group["memory"] for group in mine.sparsifier.state_dict()["groups"]}
    assert now == {group["tensor_fqn"]: group["memory"] for group in saved["groups"]}


def test_pitfall_2_the_best_checkpoint_is_loaded_and_then_pruned(tmp_path: Path) -> None:
    options = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "learning_rate": 5e-2}
    trainer = make_trainer(tmp_path, make_model(), callback(), metric_for_best_model="loss", **options)
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    last = max(int(path.name.split("-")[1]) for path in tmp_path.glob("checkpoint-*"))
    assert best.name != f"checkpoint-{last}", "the case needs a best checkpoint that is not the last one"
    reference = BertForSequenceClassification.from_pretrained(best)
    sparsifier = td.TargetedDropout(td.recipes.targeted_unit(), 0.5)
    sparsifier.prepare(reference)
    sparsifier.squash_mask()
    assert_equal(weights(trainer.model), weights(reference))
    # What was judged during training is what is there now: eval runs the model pruned at the target.
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, abs=1e-6)


def test_pitfall_3_a_plain_checkpoint_resumes_with_the_callback_added(tmp_path: Path) -> None:
    make_trainer(tmp_path / "plain", make_model(), None, max_steps=4).train()
    trainer = make_trainer(tmp_path / "masked", make_model(seed=5), callback(recipe_steps=4))
    trainer.train(resume_from_checkpoint=str(tmp_path / "plain" / "checkpoint-4"))
    assert trainer.state.global_step == 12
    assert float((trainer.model.bert.encoder.layer[0].intermediate.dense.weight == 0).float().mean()) == 0.5


def test_pitfall_4_restored_callback_states_do_not_stack_masks(tmp_path: Path) -> None:
    whole = make_trainer(tmp_path / "whole", make_model(), callback())
    whole.train()
    mine = callback()
    resumed = make_trainer(tmp_path / "resumed", make_model(seed=9), mine, restore_callback_states_from_checkpoint=True)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    assert mine.sparsifier is not None, "the user's own object must be the one that runs"
    assert_equal(weights(whole.model), weights(resumed.model))


def test_pitfall_5_two_callbacks_are_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, make_model(), callback())
    trainer.add_callback(callback())
    with pytest.raises(td.TdError, match="two TargetedDropoutCallbacks"):
        trainer.train()


def test_pitfall_5_what_we_keep_in_the_trainer_state_does_not_grow(tmp_path: Path) -> None:
    make_trainer(tmp_path, make_model(), callback()).train()
    states = [json.loads((path / "trainer_state.json").read_text()) for path in tmp_path.glob("checkpoint-*")]
    assert len(states) >= 3
    kept = [state["stateful_callbacks"] for state in states]
    assert {name for names in kept for name in names} == {"TrainerControl", "td_plugin_settings"}
    assert all(names["td_plugin_settings"] == kept[0]["td_plugin_settings"] for names in kept)


class TestPitfall6:
    def test_model_init_makes_a_new_model_and_that_one_is_masked(self, tmp_path: Path) -> None:
        mine = callback(squash=False)
        trainer = make_trainer(tmp_path, None, mine, model_init=lambda: make_model(seed=1))
        trainer.train()
        assert mine.sparsifier is not None and mine.sparsifier.model is trainer.model
        assert masked_tensors(trainer.model)

    def test_a_second_train_prepares_again(self, tmp_path: Path) -> None:
        trainer = make_trainer(tmp_path, make_model(), callback(), max_steps=2)
        trainer.train()
        trainer.train()
        assert not masked_tensors(trainer.model)


def test_pitfall_7_tied_weights_are_left_alone(tmp_path: Path) -> None:
    set_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=16,
    )  # fmt: skip
    model = BertForMaskedLM(config)
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    mine = TargetedDropoutCallback(td.recipes.targeted_weight(0.5), 0.75)
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, report_to="none", use_cpu=True, disable_tqdm=True, per_device_train_batch_size=2
    )
    data = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in rows(8)]
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[mine])
    trainer.train()
    assert mine.sparsifier is not None
    assert "tied" in mine.sparsifier.report().skipped["cls.predictions.decoder.weight"]
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    assert not (model.bert.embeddings.word_embeddings.weight[1:] == 0).any()
    trainer.save_model(str(tmp_path / "out"))
    _, info = BertForMaskedLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]


class TwoForwards(Trainer):
    """R-Drop: two forwards, one backward; with a redraw in between when asked."""

    redraw = False

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], **_: Any) -> Tensor:  # type: ignore[override]
        first = model(**inputs)
        if self.redraw:
            sparsifier = next(c.sparsifier for c in self.callback_handler.callbacks if hasattr(c, "sparsifier"))
            sparsifier.redraw()
        return first.loss + model(**inputs).loss


@pytest.mark.parametrize("redraw", [False, True])
def test_pitfall_9_two_forwards_before_one_backward(tmp_path: Path, redraw: bool) -> None:
    cls = type("Loop", (TwoForwards,), {"redraw": redraw})
    trainer = make_trainer(tmp_path, make_model(), callback(), cls=cls, max_steps=3)
    trainer.train()
    assert all(torch.isfinite(tensor).all() for tensor in trainer.model.state_dict().values())


class EditsInPlace(Trainer):
    """A training loop with a weight clip, written as users write it."""

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(model, *args, **kwargs)
        model.bert.encoder.layer[0].intermediate.dense.weight.data.clamp_(-0.01, 0.01)
        return loss


def test_pitfall_14_an_edit_of_the_masked_value_is_an_error_not_a_loss(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, make_model(), callback(), cls=EditsInPlace, max_steps=2)
    with pytest.raises(td.TdError, match=r"would be lost.*layer\.0\.intermediate\.dense\.weight"):
        trainer.train()


def test_pitfall_15_evaluation_in_between_changes_nothing(tmp_path: Path) -> None:
    quiet = make_trainer(tmp_path / "a", make_model(dropout=0.0), callback())
    quiet.train()
    judged = make_trainer(tmp_path / "b", make_model(dropout=0.0), callback(), eval_strategy="steps", eval_steps=1)
    judged.train()
    assert_equal(weights(quiet.model), weights(judged.model))


def test_pitfall_15_dense_is_undone_after_an_exception(tmp_path: Path) -> None:
    mine = callback(squash=False)
    trainer = make_trainer(tmp_path, make_model(), mine, max_steps=2)
    trainer.train()
    sparsifier = mine.sparsifier
    assert sparsifier is not None
    before = trainer.evaluate()["eval_loss"]
    with pytest.raises(KeyError), sparsifier.dense():
        assert trainer.evaluate()["eval_loss"] != before
        raise KeyError
    assert trainer.evaluate()["eval_loss"] == before


def test_one_draw_per_micro_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("step", "redraw"):
        method = getattr(td.TargetedDropout, name)
        monkeypatch.setattr(
            td.TargetedDropout, name, lambda self, name=name, method=method: (calls.append(name), method(self))[1]
        )
    make_trainer(tmp_path, make_model(), callback(), num_train_epochs=1).train()
    # 11 batches, three a step: every batch has a draw of its own, the last step holds the two that remain.
    assert calls == ["step", "redraw", "redraw"] * 3 + ["step", "redraw"]
    calls.clear()
    make_trainer(tmp_path, make_model(), callback(mask_every="step"), num_train_epochs=1).train()
    assert calls == ["step"] * 4


def test_logs_gamma_alpha_and_sparsity(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, make_model(), callback(recipe_steps=6), eval_strategy="epoch")
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 12
    recipe = td.recipes.ramping_targeted_unit(0.9)
    for entry in logs:
        done = min((entry["step"] - 1) / 6, 1.0)  # the log of step k follows the forward that ran with the ramp at k-1
        assert entry["td_sparsity_level"] == pytest.approx(0.5 * recipe.sparsity_schedule(done))
        assert entry["td_drop_rate"] == pytest.approx(0.9 * done)
        assert entry["td_sparsity"] == pytest.approx(0.5)
        assert 0.0 <= entry["td_dropped"] <= entry["td_sparsity_level"]
    assert logs[0]["td_dropped"] == 0.0 and logs[-1]["td_dropped"] > 0.3


def test_a_prepared_model_is_adopted(tmp_path: Path) -> None:
    model = make_model()
    sparsifier = td.TargetedDropout(td.recipes.targeted_weight(0.5), 0.25, seed=7)
    sparsifier.prepare(model)
    mine = callback(squash=False)
    make_trainer(tmp_path, model, mine, max_steps=2).train()
    assert mine.sparsifier is sparsifier
    assert sparsifier.report().sparsity == pytest.approx(0.25, abs=0.01)


def test_masks_of_a_lost_sparsifier_are_refused(tmp_path: Path) -> None:
    model = make_model()
    td.TargetedDropout(td.recipes.targeted_weight(0.5), 0.25).prepare(model)
    with pytest.raises(td.TdError, match="is gone"):
        make_trainer(tmp_path, model, callback(), max_steps=2).train()


def test_the_end_leaves_a_plain_pruned_model(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, make_model(), callback(0.75), max_steps=3)
    trainer.train()
    layer = trainer.model.bert.encoder.layer[0]
    assert type(layer.intermediate.dense) is nn.Linear
    assert int((layer.intermediate.dense.weight == 0).all(1).sum()) == int(0.75 * 24)
    assert int((layer.intermediate.dense.bias == 0).sum()) >= int(0.75 * 24)
    heads = layer.attention.self.query.weight.view(4, -1)
    assert int((heads == 0).all(1).sum()) == 3
    shutil.rmtree(tmp_path)
    trainer.save_model(str(tmp_path))
    again = BertForSequenceClassification.from_pretrained(tmp_path)
    assert_equal(weights(trainer.model), weights(again))


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"level": 1.0}, "sparsity_level"),
        ({"level": -0.1}, "sparsity_level"),
        ({"recipe_steps": 0}, "recipe_steps"),
        ({"recipe_steps": 1.5}, "recipe_steps"),
        ({"mask_every": "epoch"}, "mask_every"),
        ({"eval_mask": "both"}, "eval_mask"),
    ],
)
def test_wrong_options_are_said_before_training(options: dict[str, Any], what: str) -> None:
    with pytest.raises(td.TdError, match=what):
        callback(**options)
