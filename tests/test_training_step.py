"""`with sparsifier.training_step():` against the same loop with `step()` and `redraw()` called by hand."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import MODELS, build
from torch import Tensor, nn

import td_plugin as td

RECIPES: dict[str, tuple[td.Recipe, dict[str, Any]]] = {
    "weight": (td.recipes.targeted_weight(0.5), {}),
    "unit": (td.recipes.targeted_unit(0.5), {}),
    "rarely ranked": (td.recipes.targeted_weight(0.5), {"refresh_every": 3}),
    "surgery": (td.recipes.network_surgery(0.5), {}),
    "iterative": (td.recipes.iterative_magnitude(3, 0.0, 0.9, quality=1.0), {}),
    "fisher": (td.recipes.fisher(), {}),
    "gate": (td.gates.hard_concrete(), {}),
}
BATCHES = 8
pytestmark = pytest.mark.filterwarnings("ignore:recipe .* ramps, but nothing drives it")


class Run:
    """A loop that is interrupted anywhere; what a checkpoint holds is all that a new one gets."""

    def __init__(self, recipe: str, seed: int = 0) -> None:
        value, options = RECIPES[recipe]
        self.model = build("mlp", seed)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.sparsifier = td.TargetedDropout(value, 0.6, seed=5 + seed, **options)
        self.sparsifier.prepare(self.model)

    def backward(self, index: int) -> None:
        batch = MODELS["mlp"].inputs(4 + index % 3)
        nn.functional.cross_entropy(self.model(batch), torch.arange(len(batch)) % 3).backward()

    def train(self, first: int, end: int, accumulation: int = 3) -> Run:
        for index in range(first, end):
            with self.sparsifier.training_step(accumulation) as micro:
                assert (micro.index, micro.first) == (index % accumulation, index % accumulation == 0)
                self.backward(index)
            if micro.last:
                self.step()
        return self

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def checkpoint(self) -> tuple[Any, ...]:
        gradients = [None if p.grad is None else p.grad.clone() for p in self.model.parameters()]
        states = copy.deepcopy([self.model.state_dict(), self.optimizer.state_dict()])
        return (*states, gradients, json.dumps(self.sparsifier.state_dict()))

    def restore(self, checkpoint: tuple[Any, ...]) -> Run:
        model, optimizer, gradients, ours = checkpoint
        self.model.load_state_dict(model)
        self.optimizer.load_state_dict(optimizer)
        for parameter, gradient in zip(self.model.parameters(), gradients, strict=True):
            parameter.grad = gradient
        self.sparsifier.load_state_dict(json.loads(ours))
        return self


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_block_is_step_and_redraw(accumulation: int) -> None:
    blocks, calls = Run("weight").train(0, BATCHES, accumulation), Run("weight")
    for index in range(BATCHES):
        calls.sparsifier.redraw() if index % accumulation else calls.sparsifier.step()
        calls.backward(index)
        if index % accumulation == accumulation - 1:
            calls.step()
    assert same(blocks.model, calls.model)
    assert blocks.sparsifier.step_count == calls.sparsifier.step_count == -(-BATCHES // accumulation)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("at", [3, 4, 5])
def test_a_resumed_accumulation_is_exact(recipe: str, at: int) -> None:
    """Batch 3 opens the second optimizer step; the gradients of 4 and 5 come along with the checkpoint."""
    whole = Run(recipe).train(0, at)
    checkpoint = whole.checkpoint()
    whole.train(at, BATCHES + 1)
    resumed = Run(recipe, seed=1).restore(checkpoint).train(at, BATCHES + 1)
    assert same(whole.model, resumed.model)
    assert whole.sparsifier.state_dict() == resumed.sparsifier.state_dict()


def kept(run: Run) -> list[Tensor]:
    return [m.weight.detach().clone() for m in run.model.modules() if isinstance(m, nn.Linear)]


@pytest.mark.parametrize("at", [3, 4])
def test_what_an_exception_ends_is_begun_again_with_the_same_masks(at: int) -> None:
    smooth, rough = Run("weight").train(0, BATCHES), Run("weight").train(0, at)
    seen = []
    for _ in range(2):
        with pytest.raises(MemoryError), rough.sparsifier.training_step(3) as micro:
            assert micro.index == at % 3
            seen.append(kept(rough))
            raise MemoryError
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
    checkpoint = rough.checkpoint()
    rough.train(at, BATCHES)
    assert same(smooth.model, rough.model)
    assert same(smooth.model, Run("weight", seed=1).restore(checkpoint).train(at, BATCHES).model)


def test_the_last_of_an_epoch_closes_a_step() -> None:
    run = Run("weight")
    lasts = []
    for index in range(5):  # epochs of five batches, three a step
        with run.sparsifier.training_step(3, last=True if index == 4 else None) as micro:
            run.backward(index)
        lasts.append(micro.last)
    assert lasts == [False, False, True, False, True]
    with run.sparsifier.training_step(3) as micro:
        assert micro.first and not micro.last
    assert run.sparsifier.step_count == 3


def nested(run: Run) -> None:
    with run.sparsifier.training_step(), run.sparsifier.training_step():
        pass


def inside(call: Callable[[td.TargetedDropout], object]) -> Callable[[Run], None]:
    def use(run: Run) -> None:
        with run.sparsifier.training_step():
            call(run.sparsifier)

    return use


def evaluating(run: Run) -> None:
    run.model.eval()
    inside(repr)(run)


def by(accumulation: Any) -> Callable[[Run], None]:
    def use(run: Run) -> None:
        with run.sparsifier.training_step(accumulation):
            pass

    return use


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (nested, "inside training_step.*end the first block"),
        (inside(lambda s: s.step()), "step.* inside training_step.*leave it out"),
        (inside(lambda s: s.state_dict()), "state_dict.* inside training_step.*between two blocks"),
        (inside(lambda s: s.load_state_dict({})), "load_state_dict.* inside training_step.*between two blocks"),
        (evaluating, r"evaluation mode.*0\.weight.*model.train\(\)"),
        (by(0), "accumulation"),
        (by(2.0), "accumulation"),
        (by(True), "accumulation"),
    ],
    ids=["nested", "step", "save", "load", "eval", "zero", "float", "bool"],
)
def test_misuse_is_said_and_leaves_the_run_as_it_was(use: Callable[[Run], None], message: str) -> None:
    run = Run("weight").train(0, 3)
    with pytest.raises(td.TdError, match=message):
        use(run)
    run.model.train()
    smooth = Run("weight").train(0, BATCHES)
    assert same(smooth.model, run.train(3, BATCHES).model)


def test_a_block_needs_a_model() -> None:
    with pytest.raises(td.TdError, match="call prepare"), td.TargetedDropout(RECIPES["weight"][0]).training_step():
        pass


def test_a_copy_made_in_a_block_is_in_none() -> None:
    run = Run("weight")
    with run.sparsifier.training_step():
        twin = copy.deepcopy(run.model)
    assert twin is not None
    other = Run("weight")
    with other.sparsifier.training_step():
        copied = copy.deepcopy(other.sparsifier)
    with copied.training_step(2) as micro:
        assert micro.first


def test_states_from_before_training_step_load() -> None:
    run = Run("weight").train(0, 3)
    state = run.sparsifier.state_dict()
    del state["accumulation"]
    run.sparsifier.load_state_dict(state)
    assert same(Run("weight").train(0, BATCHES).model, run.train(3, BATCHES).model)
