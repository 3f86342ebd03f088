"""Models that are saved under other names than they have, as ViT, resume and load their best checkpoint anyway."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_hf import assert_equal, callback, make_model, weights
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

import td_plugin as td
from td_plugin.integrations.hf_names import translate_loads


def make_vit(seed: int = 0) -> ViTForImageClassification:
    set_seed(seed)
    config = ViTConfig(
        image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24,
        num_labels=2,
    )  # fmt: skip
    return ViTForImageClassification(config)


def trainer(out: Path, model: ViTForImageClassification | None, **options: Any) -> Trainer:
    generator = torch.Generator().manual_seed(0)
    data = [{"pixel_values": torch.randn(3, 8, 8, generator=generator), "labels": i % 2} for i in range(12)]
    model_init = options.pop("model_init", None)
    arguments = TrainingArguments(
        str(out), max_steps=6, save_steps=2, per_device_train_batch_size=2, report_to="none", use_cpu=True,
        disable_tqdm=True, learning_rate=5e-2, seed=3, **options,
    )  # fmt: skip
    return Trainer(
        model, arguments, train_dataset=data, eval_dataset=data, callbacks=[callback(0.5)], model_init=model_init
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    run = trainer(tmp_path_factory.mktemp("whole"), make_vit())
    run.train()
    return run


def test_pitfall_18_a_vit_resumes_bit_for_bit(tmp_path: Path, whole: Trainer) -> None:
    checkpoint = Path(whole.args.output_dir) / "checkpoint-4"
    saved = load_file(checkpoint / "model.safetensors").keys()
    assert saved != whole.model.state_dict().keys(), "the case needs a model that is saved under other names"
    resumed = trainer(tmp_path, make_vit(seed=9))
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_equal(weights(whole.model), weights(resumed.model))


def test_pitfall_18_a_vit_loads_its_best_checkpoint(tmp_path: Path) -> None:
    options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    run = trainer(tmp_path, make_vit(), metric_for_best_model="loss", greater_is_better=True, **options)
    run.train()
    best = str(run.state.best_model_checkpoint)
    reference = ViTForImageClassification.from_pretrained(best)
    sparsifier = td.TargetedDropout(td.recipes.targeted_unit(), 0.5)
    sparsifier.prepare(reference)
    sparsifier.squash_mask()
    assert_equal(weights(run.model), weights(reference))
    assert run.evaluate()["eval_loss"] == pytest.approx(run.state.best_metric, abs=1e-6)


def test_pitfall_18_what_was_not_loaded_is_an_error(tmp_path: Path, whole: Trainer) -> None:
    run = trainer(tmp_path, None, model_init=lambda: make_vit(seed=9))
    with pytest.raises(td.TdError, match=r"not loaded; where: vit\.layers.*got: vit\.encoder.*not model_init"):
        run.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / "checkpoint-4"))


def test_names_of_ones_own_still_load() -> None:
    source, target = make_vit(1), make_vit(2)
    translate_loads(target)
    assert not target.load_state_dict(source.state_dict()).missing_keys
    assert_equal(weights(source), weights(target))
    bert = make_model()
    translate_loads(bert)
    assert not bert._load_state_dict_pre_hooks, "saved under its own names"
