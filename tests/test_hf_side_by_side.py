"""Dense and pruned in one evaluation: right numbers, every callback once, and training as without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_hf import assert_equal, callback, make_model, make_trainer, rows, weights
from torch import nn
from transformers import EarlyStoppingCallback, EvalPrediction, Trainer, TrainerCallback

from td_plugin.integrations.side_by_side import SideBySide


class Counts(TrainerCallback):
    """What an evaluation fires."""

    def __init__(self) -> None:
        self.evaluated: list[dict[str, float]] = []
        self.logged: list[dict[str, float]] = []

    def on_evaluate(self, *_: Any, metrics: dict[str, float], **__: Any) -> None:
        self.evaluated.append(dict(metrics))

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        if any(name.startswith("eval_") for name in logs):
            self.logged.append(dict(logs))


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def judged(out: Path, cls: type[Trainer] = SideBySide, **options: Any) -> Trainer:
    settings: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "no"}
    return make_trainer(out, make_model(), callback(0.75, squash=False), cls=cls, **{**settings, **options})


def plain_loss(model: nn.Module) -> float:
    """Of the weights as they are, without the Trainer and without us."""
    bare = make_model().eval()
    bare.load_state_dict(model.state_dict())
    batch = rows()
    with torch.inference_mode():
        inputs = {name: torch.stack([row[name] for row in batch]) for name in batch[0]}
        return float(bare(**inputs).loss)


def test_one_event_reports_both_and_the_numbers_are_right(tmp_path: Path) -> None:
    trainer, counts = judged(tmp_path), Counts()
    trainer.add_callback(counts)
    trainer.compute_metrics = accuracy
    trainer.train()
    assert len(counts.evaluated) == len(counts.logged) == 12 // 2
    names = {"eval_loss", "eval_accuracy", "eval_dense_loss", "eval_dense_accuracy", "eval_dense_runtime"}
    assert all(names <= metrics.keys() for metrics in (*counts.evaluated, *counts.logged))
    assert sum("eval_dense_loss" in entry for entry in trainer.state.log_history) == 6
    found = trainer.evaluate()
    assert found["eval_dense_loss"] == pytest.approx(plain_loss(trainer.model), rel=1e-5)
    (mine,) = [c for c in trainer.callback_handler.callbacks if isinstance(c, type(callback()))]
    mine.sparsifier.squash_mask()
    assert found["eval_loss"] == pytest.approx(plain_loss(trainer.model), rel=1e-5)
    assert found["eval_loss"] != pytest.approx(found["eval_dense_loss"], rel=1e-4)
    assert not [name for name in trainer.evaluate() if "dense" in name], "there is but one model now"


def test_training_does_not_change_by_a_bit(tmp_path: Path) -> None:
    twice = judged(tmp_path / "a", max_steps=4)
    twice.train()
    once = judged(tmp_path / "b", cls=Trainer, max_steps=4)
    once.train()
    assert_equal(weights(twice.model), weights(once.model))
    names = [{name: value for name, value in entry.items() if "loss" in name} for entry in once.state.log_history]
    shown = [entry.items() for entry in twice.state.log_history]
    assert all(wanted.items() <= entry for wanted, entry in zip(names, shown, strict=True))


@pytest.mark.parametrize(("metric", "strategy"), [("loss", "steps"), ("dense_loss", "best")])
def test_either_may_choose_the_best_checkpoint(tmp_path: Path, metric: str, strategy: str) -> None:
    options = {"save_strategy": strategy, "load_best_model_at_end": True, "max_steps": 6, "learning_rate": 5e-2}
    trainer = judged(tmp_path, metric_for_best_model=metric, **options)
    trainer.train()
    full = f"eval_{metric}"
    history = [entry[full] for entry in trainer.state.log_history if full in entry]
    assert len(history) == 3 and trainer.state.best_metric == min(history)
    assert trainer.evaluate()[full] == pytest.approx(min(history), abs=1e-6)


def test_early_stopping_counts_one_evaluation_once(tmp_path: Path) -> None:
    options = {"metric_for_best_model": "eval_dense_loss", "greater_is_better": True, "eval_steps": 1}
    trainer = judged(
        tmp_path, load_best_model_at_end=True, save_strategy="best", learning_rate=1e-3, max_steps=12, **options
    )
    trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=3, early_stopping_threshold=10.0))
    trainer.train()
    # Only the first evaluation can be an improvement by 10; three more run out of patience.
    assert trainer.state.global_step == 4
    assert sum("eval_dense_loss" in entry for entry in trainer.state.log_history) == 4


def test_several_evaluation_sets(tmp_path: Path) -> None:
    trainer, counts = judged(tmp_path, max_steps=2), Counts()
    trainer.add_callback(counts)
    trainer.eval_dataset = {"a": rows(), "b": rows(6)}
    trainer.train()
    assert len(counts.evaluated) == 2, "one for every set, as without us"
    found = trainer.evaluate()
    assert {"eval_a_loss", "eval_a_dense_loss", "eval_b_loss", "eval_b_dense_loss"} <= found.keys()
    assert found["eval_a_dense_loss"] == pytest.approx(plain_loss(trainer.model), rel=1e-5)


@pytest.mark.parametrize("call", [1, 2], ids=["in the pruned pass", "in the dense pass"])
def test_an_exception_leaves_the_masks_on(tmp_path: Path, call: int) -> None:
    trainer = judged(tmp_path, max_steps=2)
    trainer.train()
    before, calls, generator = trainer.evaluate(), [], torch.get_rng_state()

    def fail(_: EvalPrediction) -> dict[str, float]:
        calls.append(1)
        if len(calls) == call:
            raise KeyError
        return {}

    trainer.compute_metrics = fail
    with pytest.raises(KeyError):
        trainer.evaluate()
    trainer.compute_metrics = None
    assert len(calls) == call
    torch.set_rng_state(generator)
    again = trainer.evaluate()
    assert (again["eval_loss"], again["eval_dense_loss"]) == (before["eval_loss"], before["eval_dense_loss"])


def test_predict_runs_once(tmp_path: Path) -> None:
    trainer = judged(tmp_path, max_steps=2)
    trainer.train()
    found = trainer.predict(rows())
    assert "test_loss" in found.metrics and not [name for name in found.metrics if "dense" in name]
