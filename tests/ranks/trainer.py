"""Checks that run in two processes under the Trainer of transformers, which wraps the model for them itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from loops.cells import Cell, make_model, rows
from safetensors.torch import load_file
from torch import Tensor, distributed, nn
from transformers import Trainer, TrainingArguments

import td_plugin as td
from td_plugin.integrations.distillation import Distillation
from td_plugin.integrations.hf import TargetedDropoutCallback


def _trained(directory: Path, recipe: td.Recipe, **options: Any) -> nn.Module:
    model = make_model(0)
    arguments = TrainingArguments(
        output_dir=str(directory),
        max_steps=4,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        save_strategy="steps",
        save_steps=2,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    assert arguments.world_size == 2
    callback = TargetedDropoutCallback(recipe, 0.5, seed=7, **options)
    data = rows(Cell("unit", "fp32", 1))
    Trainer(model, arguments, train_dataset=data, callbacks=[callback]).train()
    distributed.barrier()
    return model


def _assert_same(model: nn.Module) -> None:
    for name, value in model.state_dict().items():
        found = [torch.empty_like(value) for _ in range(2)]
        distributed.all_gather(found, value.contiguous())
        assert torch.equal(*found), name


def a_teacher_a_checkpoint_and_a_smaller_file(directory: Path) -> None:
    from td_plugin.export import shrink, to_onnx, verify

    ended: list[dict[str, Tensor]] = []
    for name, distillation in (("taught", Distillation()), ("alone", None)):
        place = directory / name
        model = _trained(place, td.recipes.targeted_unit(0.5), distillation=distillation)
        _assert_same(model)
        ended.append({key: value.clone() for key, value in model.state_dict().items()})
        saved = load_file(place / "checkpoint-2" / "model.safetensors")
        assert saved.keys() == make_model(1).state_dict().keys()
    assert any(not torch.equal(ended[0][key], value) for key, value in ended[1].items())
    if distributed.get_rank() == 0:
        example = {"input_ids": torch.randint(1, 50, (2, 6)), "attention_mask": torch.ones(2, 6, dtype=torch.int64)}
        small = shrink(model.eval())
        torch.testing.assert_close(small(**example).logits, model(**example).logits, atol=1e-5, rtol=1e-4)
        assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
        path = directory / "small.onnx"
        to_onnx(small, path, example)
        assert verify(small, path, [example]).batches == 1
    distributed.barrier()


def evidence_and_gates_are_those_of_all_processes(directory: Path) -> None:
    for name, recipe in {
        "fisher": td.recipes.fisher(),
        "taylor": td.recipes.taylor(),
        "movement": td.recipes.movement(),
        "ard": td.recipes.ard(0.5),
        "gate": td.gates.hard_concrete(),
        "surgery": td.recipes.network_surgery(),
    }.items():
        _assert_same(_trained(directory / name, recipe))


def independent_masks_are_an_option_of_the_callback(directory: Path) -> None:
    shared = _trained(directory / "shared", td.recipes.targeted_weight(0.5)).state_dict()
    model = _trained(directory / "own", td.recipes.targeted_weight(0.5), rank_policy="independent")
    _assert_same(model)
    assert any(not torch.equal(shared[key], value) for key, value in model.state_dict().items())
