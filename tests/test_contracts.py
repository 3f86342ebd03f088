"""One battery, run for every recipe on every model shape of `cases.py`."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from cases import MATRIX, MODELS, RECIPES, build
from torch import Tensor, nn

import td_plugin as td
from td_plugin.parametrization import bake, masked_tensors

LEVEL = 0.6


def rows() -> list[Any]:
    """The matrix; every recipe runs on one model in the fast suite, and the models take turns."""
    shapes = {recipe: [shape for other, shape in MATRIX if other == recipe] for recipe in RECIPES}
    fast = {(recipe, found[index % len(found)]) for index, (recipe, found) in enumerate(shapes.items())}
    assert {shape for _, shape in fast} == set(MODELS)
    return [pytest.param(*row, id="-".join(row), marks=[] if row in fast else pytest.mark.slow) for row in MATRIX]


pytestmark = pytest.mark.parametrize(("recipe", "shape"), rows())


class Run:
    """A training run in a plain loop: model, AdamW, sparsifier, scheduler; everything that a checkpoint holds."""

    def __init__(self, recipe: str, shape: str, *, seed: int = 0, masks_seed: int = 5) -> None:
        self.case, self.model = MODELS[shape], build(shape, seed)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.sparsifier = td.TargetedDropout(RECIPES[recipe], LEVEL, seed=masks_seed)
        self.sparsifier.prepare(self.model)
        self.scheduler = td.TargetedDropoutScheduler(self.sparsifier, recipe_steps=5)

    def train(self, steps: int) -> Run:
        """Two micro-batches a step."""
        self.model.train()
        for _ in range(steps):
            for micro in range(2):
                self.sparsifier.redraw() if micro else self.sparsifier.step()
                batch = self.case.inputs(4 + micro)
                loss = nn.functional.cross_entropy(self.case.logits(self.model, batch), torch.arange(len(batch)) % 3)
                loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.scheduler.step()
        return self

    def checkpoint(self) -> tuple[dict[str, Any], dict[str, Any], str]:
        """A snapshot; what is ours goes through JSON."""
        ours = json.dumps([self.sparsifier.state_dict(), self.scheduler.state_dict()])
        return copy.deepcopy(self.model.state_dict()), copy.deepcopy(self.optimizer.state_dict()), ours

    def restore(self, checkpoint: tuple[dict[str, Any], dict[str, Any], str]) -> Run:
        self.model.load_state_dict(checkpoint[0])
        self.optimizer.load_state_dict(checkpoint[1])
        sparsifier, scheduler = json.loads(checkpoint[2])
        self.scheduler.load_state_dict(scheduler)
        self.sparsifier.load_state_dict(sparsifier)
        return self

    @torch.no_grad()
    def evaluate(self, model: nn.Module | None = None) -> Tensor:
        model = model or self.model
        return self.case.logits(model.eval(), self.case.inputs(6).clone())


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)


def test_eval_is_deterministic(recipe: str, shape: str) -> None:
    run = Run(recipe, shape).train(3)
    logits = run.evaluate()
    torch.manual_seed(99)
    assert torch.equal(run.evaluate(), logits)
    run.model.train()
    run.sparsifier.step()  # another sample, the same weights
    assert torch.equal(run.evaluate(), logits)
    with run.sparsifier.dense():
        assert not torch.equal(run.evaluate(), logits)
    assert torch.equal(run.evaluate(), logits)


def test_keys_are_plain(recipe: str, shape: str) -> None:
    plain = build(shape)
    run = Run(recipe, shape)
    assert equal(plain.state_dict(), run.model.state_dict())
    assert [name for name, _ in plain.named_parameters()] == [name for name, _ in run.model.named_parameters()]
    run.train(2)
    plain.load_state_dict(run.model.state_dict())
    assert equal(plain.state_dict(), run.model.state_dict())
    with run.sparsifier.dense():
        assert torch.equal(run.evaluate(), run.evaluate(plain))


def test_resume_is_exact(recipe: str, shape: str) -> None:
    whole = Run(recipe, shape).train(3)
    checkpoint = whole.checkpoint()
    whole.train(3)
    resumed = Run(recipe, shape, seed=1, masks_seed=6)
    torch.manual_seed(123)  # masks do not come from the global generator
    resumed.restore(checkpoint).train(3)
    assert equal(whole.model.state_dict(), resumed.model.state_dict())
    assert whole.sparsifier.state_dict() == resumed.sparsifier.state_dict()
    assert torch.equal(whole.evaluate(), resumed.evaluate())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_to_dtype(recipe: str, shape: str, dtype: torch.dtype) -> None:
    run = Run(recipe, shape).train(2)
    before = {name: entry["mask"].clone() for name, entry in run.sparsifier.state.items()}
    run.model.to(dtype)
    if dtype == torch.float64:  # the narrower type makes ties and near-ties
        assert equal(before, {name: entry["mask"] for name, entry in run.sparsifier.state.items()})
    assert all(e["mask"].sum() == before[name].sum() for name, e in run.sparsifier.state.items())
    run.sparsifier.step()
    batch = run.case.inputs(4)
    batch = batch.to(dtype) if batch.is_floating_point() else batch
    run.case.logits(run.model.train(), batch).float().sum().backward()
    assert all(p.grad is None or (p.grad.dtype == dtype and p.grad.isfinite().all()) for p in run.model.parameters())
    with torch.no_grad():
        assert run.case.logits(run.model.eval(), batch).dtype == dtype


def test_deepcopies_are_independent(recipe: str, shape: str) -> None:
    run = Run(recipe, shape).train(2)
    logits = run.evaluate()
    twin = copy.deepcopy(run.model)
    masked = masked_tensors(run.model)
    assert masked_tensors(twin) == masked and torch.equal(run.evaluate(twin), logits)
    assert bake(twin) == len(masked) and masked_tensors(twin) == []
    assert masked_tensors(run.model) == masked and torch.equal(run.evaluate(), logits)
    other = copy.deepcopy(run.model)
    run.sparsifier.squash_mask()
    assert masked_tensors(other) == masked and torch.equal(run.evaluate(other), logits)
    assert torch.equal(run.evaluate(twin), logits)


def test_squash_leaves_the_evaluated_model(recipe: str, shape: str) -> None:
    run = Run(recipe, shape).train(3)
    logits = run.evaluate()
    masks = {name: entry["mask"].clone() for name, entry in run.sparsifier.state.items()}
    gates = {name: entry["gate"].clone() for name, entry in run.sparsifier.state.items() if "gate" in entry}
    dense = copy.deepcopy(run.model.state_dict())
    run.model.train()
    run.sparsifier.step()
    zeros = run.sparsifier.report().zeros
    run.sparsifier.squash_mask()
    assert torch.equal(run.evaluate(), logits)
    plain = build(shape)
    assert [type(m) for m in run.model.modules()] == [type(m) for m in plain.modules()]
    gated = {key: value * gates[key] if key in gates else value for key, value in dense.items()}
    expected = {key: value * masks[key] if key in masks else value for key, value in gated.items()}
    assert equal(run.model.state_dict(), expected)
    assert sum(int((~mask).sum()) for mask in masks.values()) == zeros > 0
    plain.load_state_dict(run.model.state_dict())
    assert torch.equal(run.evaluate(plain), logits)
