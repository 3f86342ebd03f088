"""A pruned model trained further: its zeros stay zeros, nothing else goes, and it shrinks as before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_hf import assert_equal, make_model, make_trainer, weights
from torch import Tensor, nn
from transformers import BertForSequenceClassification

import td_plugin as td
from td_plugin.export import shrink
from td_plugin.integrations.hf import TargetedDropoutCallback
from td_plugin.parametrization import masked_tensors

RECIPES = {
    "weight": td.recipes.magnitude,
    "unit": td.recipes.targeted_unit,
    "block": td.recipes.block,
    "2:4": td.recipes.n_m,
    "surgery": td.recipes.network_surgery,
}


def pruned(recipe: td.Recipe) -> BertForSequenceClassification:
    """With biases that are not zero but where the mask made them so."""
    model = make_model(dropout=0.0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(generator=generator)
    sparsifier = td.TargetedDropout(recipe, None if recipe.name == "n_m" else 0.5)
    sparsifier.prepare(model)
    sparsifier.squash_mask()
    return model


def zeros(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter == 0 for name, parameter in model.named_parameters() if parameter.dim() > 1}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD], ids=lambda cls: cls.__name__)
def test_zeros_stay_zeros_and_the_rest_learns(recipe: str, optimizer: type[torch.optim.Optimizer]) -> None:
    model = pruned(RECIPES[recipe]())
    batch = {"input_ids": torch.randint(1, 50, (4, 6)), "labels": torch.tensor([0, 1, 0, 1])}
    before, at = weights(model), zeros(model)
    with torch.no_grad():
        answer = model.eval()(**batch).logits
    sparsifier = td.TargetedDropout(RECIPES[recipe](), None if recipe == "2:4" else 0.25)
    sparsifier.prepare(model)
    sparsifier.hold_zeros()
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, answer), "what is dropped was zero"
        assert torch.equal(model.train()(**batch).logits, answer)
    options: dict[str, Any] = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
    steps = optimizer(model.parameters(), lr=1e-2, weight_decay=0.1, **options)  # type: ignore[call-arg]
    for _ in range(5):
        with sparsifier.training_step():
            model(**batch).loss.backward()
        steps.step()
        steps.zero_grad()
    masked = {fqn for fqn, _ in masked_names(model)}
    changed = 0
    sparsifier.squash_mask()
    for name, was in at.items():
        if name in masked:
            assert torch.equal(model.get_parameter(name) == 0, was), name
            changed += int((model.get_parameter(name) != before[name]).sum())
    assert changed > 100


def masked_names(model: nn.Module) -> list[tuple[str, str]]:
    return [(f"{name}.{tensor}", tensor) for name, module in model.named_modules() for tensor in module._parameters]


def test_units_are_held_whole_and_shrink_as_before(tmp_path: Path) -> None:
    model = pruned(td.recipes.targeted_unit())
    widths = [tuple(p.shape) for p in shrink(pruned(td.recipes.targeted_unit())).parameters()]
    mine = TargetedDropoutCallback(td.recipes.targeted_unit(), keep_zeros=True)
    trainer = make_trainer(tmp_path, model, mine, max_steps=4, weight_decay=0.1)
    trainer.train()
    assert not masked_tensors(trainer.model)
    small = shrink(trainer.model)
    assert [tuple(p.shape) for p in small.parameters()] == widths
    batch = {"input_ids": torch.randint(1, 50, (4, 6))}
    with torch.no_grad():
        assert torch.allclose(small.eval()(**batch).logits, trainer.model.eval()(**batch).logits, atol=1e-5)


@pytest.mark.parametrize("recipe", ["weight", pytest.param("unit", marks=pytest.mark.slow)])
def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path: Path, recipe: str) -> None:
    def make(out: Path, model: nn.Module) -> Any:
        mine = TargetedDropoutCallback(RECIPES[recipe](), keep_zeros=True)
        return make_trainer(out, model, mine, max_steps=6, weight_decay=0.1)

    start = pruned(RECIPES[recipe]())
    at = zeros(start)
    whole = make(tmp_path / "whole", start)
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    saved = load_file(checkpoint / "model.safetensors")
    assert all((saved[name][was] == 0).all() for name, was in at.items() if name.endswith("intermediate.dense.weight"))
    resumed = make(tmp_path / "resumed", make_model(0.0, seed=9))  # dense, until the Trainer loads the checkpoint
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_equal(weights(whole.model), weights(resumed.model))


def test_a_unit_whose_bias_is_left_is_no_zero() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight[:2] = 0
        model[0].bias.copy_(torch.tensor([0.0, 1.0, 1.0, 1.0]))
    sparsifier = td.TargetedDropout(td.recipes.targeted_unit(), 0.5)
    sparsifier.prepare(model, [{"tensor_fqn": "0.weight"}])
    sparsifier.hold_zeros()
    assert sparsifier.report().rows[0].dropped == 1


def test_nothing_to_hold_is_said() -> None:
    sparsifier = td.TargetedDropout(td.recipes.targeted_unit(), 0.5)
    with pytest.raises(td.TdError, match="no model"):
        sparsifier.hold_zeros()
    sparsifier.prepare(make_model())
    with pytest.raises(td.TdError, match="no unit is zero"):
        sparsifier.hold_zeros()
    sparsifier.hold()
    with pytest.raises(td.TdError, match="held already"):
        sparsifier.hold_zeros()
