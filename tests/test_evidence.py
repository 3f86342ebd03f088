"""Evidence from training steps, against loops over examples and recomputed sums."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_hf import assert_equal, make_model, make_trainer, weights
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import td_plugin as td
from td_plugin.criteria import fisher_information
from td_plugin.evidence import evidence_of, use_scaler
from td_plugin.granularity import OutputRow, Units, WholeTensor
from td_plugin.integrations.hf import TargetedDropoutCallback

UNITS = Units(members="producers")


def mlp(activation: Callable[[], nn.Module] = nn.ReLU, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 8), activation(), nn.Linear(8, 6), activation(), nn.Linear(6, 3))


def constant(recipe: td.Recipe, drop_rate: float = 1.0) -> td.Recipe:
    """The recipe without its ramp."""
    return td.Recipe(recipe.criterion, recipe.granularity, drop_rate, name=recipe.name)


def prepared(model: nn.Module, recipe: td.Recipe, level: float = 0.5, **options: Any) -> td.TargetedDropout:
    sparsifier = td.TargetedDropout(recipe, level)
    sparsifier.prepare(model.train(), **options)
    return sparsifier


def batch(n: int, *shape: int, seed: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, *shape, generator=generator), torch.randint(0, 3, (n,), generator=generator)


def effective(model: nn.Module, masks: dict[str, Tensor]) -> nn.Module:
    """A plain copy that computes with the masked weights; its gradients know nothing of masks."""
    plain = copy.deepcopy(model)
    td.parametrization.bake(plain)
    with torch.no_grad():
        for name, tensor in plain.named_parameters():
            dense = dict(model.named_parameters())[name]
            tensor.copy_(dense * masks[name] if name in masks else dense)
    return plain


def sampled(sparsifier: td.TargetedDropout) -> dict[str, Tensor]:
    """The masks of the forward to come."""
    found: dict[str, Tensor] = {}
    assert sparsifier.model is not None
    for module_name, module in sparsifier.model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            value = getattr(module, name)
            if value is not parameter:
                found[f"{module_name}.{name}"] = (value != 0).float()
    return found


def squared_gradients(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Mean over examples of the squared gradient, one forward and backward per example."""
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for n in range(len(x)):
        loss = nn.functional.cross_entropy(model(x[n : n + 1]), y[n : n + 1])
        for name, grad in zip(total, torch.autograd.grad(loss, list(model.parameters())), strict=True):
            total[name] += grad.square() / len(x)
    return total


class Sequences(nn.Module):
    """Linear layers and transformers' Conv1D on sequences."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = nn.Linear(5, 8), Conv1D(6, 8), nn.Linear(6, 3)
        nn.init.normal_(self.second.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.second(torch.tanh(self.first(x)))).mean(1))


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1, padding_mode="circular"), nn.ReLU(inplace=True),
        nn.Conv2d(6, 4, 3, stride=2, groups=2, padding="valid"), nn.ReLU(inplace=True),
        nn.Flatten(), nn.Linear(4 * 4, 3),
    )  # fmt: skip


CASES = {"vectors": (mlp, (5,)), "sequences": (Sequences, (4, 5)), "images": (convolutions, (2, 6, 6))}


@pytest.mark.parametrize("case", CASES)
def test_fisher_is_the_mean_over_examples_one_by_one(case: str) -> None:
    build, shape = CASES[case]
    model = build()
    sparsifier = prepared(model, constant(td.recipes.fisher()))
    x, y = batch(9, *shape)
    for step in range(2):  # the second under a mask: gradients of dropped weights count, too
        sparsifier.step()
        masks = sampled(sparsifier)
        assert all(bool((mask == 0).any()) for mask in masks.values()) == (step == 1)
        expected = squared_gradients(effective(model, masks), x, y)
        before = {name: e.squared_gradient for name, e in evidence_of(sparsifier).items()} if step else {}
        nn.functional.cross_entropy(model(x), y).backward()
        found = evidence_of(sparsifier)
        assert len(found) == 2
        for name, evidence in found.items():
            want = expected[name] if step == 0 else (0.99 * before[name] + expected[name]) / 1.99
            assert torch.allclose(evidence.squared_gradient, want, rtol=1e-4, atol=1e-8)
            dense = dict(model.named_parameters())[name].detach()
            assert torch.allclose(fisher_information(evidence), 0.5 * dense**2 * want, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU, nn.Sigmoid])
def test_fisher_of_units_is_the_gradient_of_their_gates_one_by_one(activation: Callable[[], nn.Module]) -> None:
    model = mlp(activation)
    sparsifier = prepared(model, constant(td.recipes.fisher(UNITS)), 0.34)
    x, y = batch(7, 5)
    sparsifier.step()
    plain = copy.deepcopy(model)
    td.parametrization.bake(plain)
    want = [torch.zeros(8), torch.zeros(6)]
    for n in range(len(x)):
        gates = [torch.ones(8, requires_grad=True), torch.ones(6, requires_grad=True)]
        hidden = plain[1](plain[0](x[n : n + 1])) * gates[0]
        hidden = plain[3](plain[2](hidden)) * gates[1]
        loss = nn.functional.cross_entropy(plain[4](hidden), y[n : n + 1])
        for i, grad in enumerate(torch.autograd.grad(loss, gates)):
            want[i] += 0.5 * grad.square() / len(x)
    nn.functional.cross_entropy(model(x), y).backward()
    found = [fisher_information(e) for e in evidence_of(sparsifier).values()]
    assert all(torch.allclose(f, w, rtol=1e-4, atol=1e-9) for f, w in zip(found, want, strict=True))
    # Those of the least increase are dropped next; without gradient while they are, they keep what is known of them.
    sparsifier.step()
    masks = sampled(sparsifier)
    assert set(masks["0.bias"].argsort()[:2].tolist()) == set(want[0].argsort()[:2].tolist())
    nn.functional.cross_entropy(model(x), y).backward()
    again = fisher_information(evidence_of(sparsifier)["0.weight"])
    silent = masks["0.bias"] == 0
    assert torch.equal(again[silent], found[0][silent]) and not torch.equal(again[~silent], found[0][~silent])


def test_fisher_of_feature_maps_sums_over_positions_behind_a_norm() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(64, 3)
    )
    sparsifier = prepared(model, constant(td.recipes.fisher(UNITS)))
    x, y = batch(5, 2, 6, 6)
    sparsifier.step()
    plain = copy.deepcopy(model)
    td.parametrization.bake(plain)
    gates = torch.ones(5, 6, requires_grad=True)  # of every example its own: the norm mixes them in no later layer
    maps = plain[2](plain[1](plain[0](x))) * gates[:, :, None, None]
    nn.functional.cross_entropy(plain[5](plain[4](plain[3](maps))), y, reduction="sum").backward()
    assert gates.grad is not None
    nn.functional.cross_entropy(model(x), y).backward()
    found = fisher_information(evidence_of(sparsifier)["0.weight"])
    assert torch.allclose(found, 0.5 * gates.grad.square().mean(0), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("units", [False, True])
@pytest.mark.parametrize("name", ["taylor", "movement"])
def test_taylor_and_movement_are_the_sums_written_down(name: str, units: bool) -> None:
    method = getattr(td.recipes, name)
    model = mlp(nn.GELU)
    sparsifier = prepared(model, constant(method(UNITS) if units else method(), 0.7))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    totals = [np.zeros(8), np.zeros(6)] if units else [np.zeros((8, 5)), np.zeros((6, 8))]
    count = 0.0
    for step in range(4):
        x, y = batch(6, 5, seed=step)
        sparsifier.step()
        plain = effective(model, sampled(sparsifier))
        nn.functional.cross_entropy(plain(x), y).backward()
        count = 0.99 * count + 1
        for i, layer in enumerate((0, 2)):
            dense = model.get_submodule(str(layer))._parameters
            reached = plain.get_submodule(str(layer))
            product = dense["weight"].detach().numpy() * reached.weight.grad.numpy()
            if units:
                product = product.sum(1) + dense["bias"].detach().numpy() * reached.bias.grad.numpy()
            totals[i] = 0.99 * totals[i] + product**2 if name == "taylor" else totals[i] - product
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    found = [sparsifier.recipe.criterion(e).numpy() for e in evidence_of(sparsifier).values()]
    for one, total in zip(found, totals, strict=True):
        np.testing.assert_allclose(one, total / count if name == "taylor" else total, rtol=2e-4, atol=1e-7)


def test_ard_is_the_norm_of_the_weights_times_the_mean_activity() -> None:
    model = mlp()
    sparsifier = prepared(model, td.recipes.ard(0.5), 0.4)
    x, y = batch(6, 5)
    sparsifier.step()
    nn.functional.cross_entropy(model(x), y).backward()
    w = model[0]._parameters["weight"].detach().numpy()
    score = np.linalg.norm(w, axis=0) * np.abs(x.numpy()).mean(0)
    sparsifier.squash_mask()
    gone = np.flatnonzero((model[0].weight == 0).all(0).numpy())
    assert sorted(gone) == sorted(np.argsort(score)[:2])


@pytest.mark.parametrize(
    ("name", "units"),
    [*((name, units) for name in ("fisher", "taylor", "movement") for units in (False, True)), ("ard", False)],
)
def test_it_makes_no_difference_how_a_batch_is_cut(name: str, units: bool) -> None:
    scores = []
    for parts in (1, 3):
        model = mlp()
        method = getattr(td.recipes, name)
        sparsifier = prepared(model, constant(method(UNITS) if units else method(), 1.0))
        for step in range(3):
            x, y = batch(6, 5, seed=step)
            sparsifier.step()
            for one, other in zip(x.chunk(parts), y.chunk(parts), strict=True):
                (nn.functional.cross_entropy(model(one), other) / parts).backward()
        scores.append([sparsifier.recipe.criterion(e) for e in evidence_of(sparsifier).values()])
    factor = 9.0 if name == "fisher" else 1.0  # a constant one, of the division by the number of parts
    for whole, cut in zip(*scores, strict=True):
        assert torch.allclose(whole, cut * factor, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("name", ["fisher", "taylor", "movement"])
def test_a_gradient_scaler_leaves_no_trace(name: str) -> None:
    found = []
    for scaled in (False, True):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        sparsifier = prepared(model, constant(getattr(td.recipes, name)()))
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2, enabled=scaled)
        use_scaler(sparsifier, scaler)
        for step in range(5):
            x, y = batch(6, 5, seed=step)
            sparsifier.step()
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            if scaled and step == 3:  # an overflow, which the scaler answers with half the scale and no step
                scaler.scale(loss * torch.inf).backward()
            elif step != 3:
                scaler.scale(loss).backward()
            if step != 3 or scaled:
                scaler.step(optimizer)
                scaler.update()
        found.append(evidence_of(sparsifier))
    for name, plain in found[0].items():
        values = [getattr(e, sparsifier.recipe.criterion.need) for e in (plain, found[1][name])]
        assert torch.allclose(*values, rtol=1e-4, atol=1e-9)


def test_movement_brings_dropped_weights_back() -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Flatten(0))
    with torch.no_grad():
        layer[0].weight.copy_(torch.tensor([[1.0, 1.0]]))
    recipe = td.Recipe(td.criteria.movement, OutputRow(), 1.0, name="movement")
    sparsifier = prepared(layer, recipe, 0.5, config=[{"tensor_fqn": "0.weight"}])
    slopes = torch.tensor([[-1.0, -2.0], [-9.0, 0.0], [0.0, 0.0]])  # gradients of the two weights, step by step
    dropped = []
    for slope in slopes:
        sparsifier.step()
        (layer[0].weight * slope).sum().backward()
        dropped.append((layer[0].weight == 0).flatten().tolist())
    assert dropped == [[False, False], [True, False], [False, True]]


def test_nothing_is_dropped_before_the_first_gradient() -> None:
    model = mlp()
    sparsifier = prepared(model, constant(td.recipes.fisher()))
    x, y = batch(6, 5)
    dense = copy.deepcopy(model)
    td.parametrization.bake(dense)
    sparsifier.step()
    assert torch.equal(model(x), dense(x)) and sparsifier.report().zeros == 0
    nn.functional.cross_entropy(model(x), y).backward()
    assert torch.equal(model.eval()(x), dense(x)) is False and sparsifier.report().sparsity == 0.5


class TestErrors:
    def test_fisher_without_gradients(self) -> None:
        sparsifier = prepared(mlp(), constant(td.recipes.fisher()))
        with pytest.raises(td.TdError, match=r"fisher ranks by gradients, and none has come.*0\.weight.*backward"):
            sparsifier.squash_mask()
        sparsifier.step()
        with pytest.raises(td.TdError, match=r"none has come.*0\.weight"):
            sparsifier.step()

    def test_a_criterion_without_its_evidence(self) -> None:
        for criterion in (td.criteria.fisher, td.criteria.taylor, td.criteria.movement, td.criteria.ard):
            with pytest.raises(td.TdError, match=r"needs .* and has none.*some\.weight.*step\(\)"):
                criterion(td.Evidence(torch.ones(2, 2), "some.weight"))

    def test_a_frozen_tensor(self) -> None:
        model = mlp()
        model[2].weight.requires_grad_(False)
        with pytest.warns(UserWarning, match="1 of 2 targets are frozen"):
            sparsifier = prepared(model, constant(td.recipes.taylor()))
        with pytest.raises(td.TdError, match=r"2\.weight.*frozen.*unfreeze"):
            sparsifier.step()

    def test_a_layer_that_cannot_be_looked_into(self) -> None:
        model = nn.Sequential(nn.ConvTranspose1d(2, 3, 2), nn.Flatten(), nn.Linear(9, 3))
        with pytest.raises(td.TdError, match=r"0\.weight.*ConvTranspose1d.*taylor"):
            prepared(model, constant(td.recipes.fisher()), config=[{"tensor_fqn": "0.weight"}])

    def test_a_decay_above_one(self) -> None:
        with pytest.raises(td.TdError, match="decay"):
            td.contract.Measured(fisher_information, "squared_gradient", 1.5)

    def test_no_evidence_to_show(self) -> None:
        with pytest.raises(td.TdError, match="gathers no evidence"):
            evidence_of(prepared(mlp(), td.recipes.targeted_weight()))

    def test_damaged_state(self) -> None:
        model = mlp()
        sparsifier = prepared(model, constant(td.recipes.fisher()))
        sparsifier.step()
        nn.functional.cross_entropy(model(batch(4, 5)[0]), batch(4, 5)[1]).backward()
        state = sparsifier.state_dict()
        for key, value in {"total": "?", "shape": [1, 2], "count": ""}.items():
            broken = json.loads(json.dumps(state))
            broken["groups"][0]["evidence"][key] = value
            with pytest.raises(td.TdError, match=r"evidence.*0\.weight"):
                sparsifier.load_state_dict(broken)


@pytest.mark.parametrize("recipe", ["fisher", "fisher of units", "movement", "ard"])
def test_a_resumed_trainer_continues_bit_for_bit(tmp_path: Path, recipe: str) -> None:
    def make() -> TargetedDropoutCallback:
        value = {
            "fisher": td.recipes.fisher(drop_rate=0.7),
            "fisher of units": td.recipes.fisher(UNITS, 0.7),
            "movement": td.recipes.movement(WholeTensor(), 0.7),
            "ard": td.recipes.ard(),
        }[recipe]
        return TargetedDropoutCallback(value, 0.5, recipe_steps=8)

    whole = make_trainer(tmp_path / "whole", make_model(), make(), num_train_epochs=2)
    whole.train()
    resumed = make_trainer(tmp_path / "resumed", make_model(seed=9), make(), num_train_epochs=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    assert_equal(weights(whole.model), weights(resumed.model))
    state = json.loads((tmp_path / "whole" / "checkpoint-6" / "trainer_state.json").read_text())
    assert "evidence" in state["stateful_callbacks"]["td_plugin"]["groups"][0]


def test_activation_checkpoints_change_no_score(tmp_path: Path) -> None:
    found = []
    for option in (False, True):
        mine = TargetedDropoutCallback(td.recipes.fisher(UNITS), 0.5, squash=False)
        options = {"max_steps": 2, "activation_checkpointing": option}
        make_trainer(tmp_path / str(option), make_model(dropout=0.0), mine, **options).train()
        assert mine.sparsifier is not None
        found.append({name: e.squared_gradient for name, e in evidence_of(mine.sparsifier).items()})
    assert found[0].keys() == found[1].keys()
    assert all(torch.allclose(found[0][name], found[1][name], rtol=1e-4) for name in found[0])


def test_a_copy_of_the_model_is_not_looked_at_and_a_copy_of_the_sparsifier_is() -> None:
    model = mlp()
    sparsifier = prepared(model, constant(td.recipes.fisher(UNITS)))
    x, y = batch(6, 5)
    sparsifier.step()
    twin = copy.deepcopy(model)
    nn.functional.cross_entropy(twin(x), y).backward()
    with pytest.raises(td.TdError, match="none has come"):
        evidence_of(sparsifier)
    other = copy.deepcopy(sparsifier)
    assert other.model is not None
    nn.functional.cross_entropy(other.model(x), y).backward()
    assert len(evidence_of(other)) == 2
    nn.functional.cross_entropy(model(x), y).backward()
    sparsifier.step()
    sparsifier.squash_mask()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


SHARED = {"fisher of units": td.recipes.fisher(UNITS), "movement": td.recipes.movement()}


def _scores(name: str, rank: int | None) -> dict[str, Tensor]:
    """After three steps: of one process with the whole batch, or of one of two with its half."""
    model = mlp()
    sparsifier = prepared(model, constant(SHARED[name]))
    wrapped = model if rank is None else nn.parallel.DistributedDataParallel(model)
    for step in range(3):
        x, y = batch(6, 5, seed=step)
        if rank is not None:
            x, y = x.chunk(2)[rank], y.chunk(2)[rank]
        sparsifier.step()
        nn.functional.cross_entropy(wrapped(x), y).backward()
    return {f"{name} {key}": sparsifier.recipe.criterion(e) for key, e in evidence_of(sparsifier).items()}


def _rank(rank: int, path: str) -> None:
    torch.set_num_threads(1)
    meet = f"file://{path}/meet"
    torch.distributed.init_process_group(
        "gloo", init_method=meet, rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    save_file({key: s for name in SHARED for key, s in _scores(name, rank).items()}, f"{path}/{rank}.safetensors")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_see_what_one_does(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=2)
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    alone = {key: score for name in SHARED for key, score in _scores(name, None).items()}
    assert first.keys() == second.keys() == alone.keys() and len(alone) == 4
    for key, score in alone.items():
        assert torch.equal(first[key], second[key]) and torch.allclose(first[key], score, rtol=1e-4, atol=1e-8)
