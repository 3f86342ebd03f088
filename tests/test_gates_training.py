"""How gates and penalties are trained: by the user's optimizer, whatever happens between the backward and its step."""

from __future__ import annotations

import copy
import gc
import json
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

import td_plugin as td
from td_plugin.export import shrink
from td_plugin.gates.hard_concrete import open_chance, sample
from td_plugin.gates.state import GateState
from td_plugin.gates.training import _handles, _listening
from td_plugin.granularity import Units
from td_plugin.penalties import L1, GroupL1

X = torch.randn(12, 6, generator=torch.Generator().manual_seed(1))
Y = torch.arange(12) % 3


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3))


def states(sparsifier: td.TargetedDropout) -> list[GateState]:
    return [target.gate for target in sparsifier._targets if target.gate is not None]


def prepared(recipe: td.Recipe, level: float = 0.5) -> tuple[nn.Sequential, td.TargetedDropout, torch.optim.Optimizer]:
    model = net()
    sparsifier = td.TargetedDropout(recipe, level)
    sparsifier.prepare(model)
    return model, sparsifier, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


GATES = {
    "hard_concrete": td.gates.hard_concrete(strength=1e-3),
    "hard_concrete, units": td.gates.hard_concrete(Units(), strength=1e-3),
    "variational": td.gates.variational(strength=1e-3, log_variance=-5.0, warm_up=0),
    "variational, units": td.gates.variational(Units(), strength=1e-3, log_variance=-5.0, warm_up=0),
    "smallify": td.gates.smallify(strength=1e-2),
    "smallify, units": td.gates.smallify(Units(), strength=1e-2),
}


def test_gates_learn_as_if_their_penalty_were_in_the_loss() -> None:
    """An explicit copy of the method: log α a parameter like any other, the penalty in the loss, torch's Adam."""
    model, sparsifier, optimizer = prepared(GATES["hard_concrete, units"])
    (gate,) = states(sparsifier)
    plain = net()
    log_alpha = nn.Parameter(gate.phi.detach().clone())
    ours = torch.optim.Adam([log_alpha], lr=0.02)
    theirs = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    for _ in range(12):
        sparsifier.step()
        nn.functional.cross_entropy(model(X), Y).backward()
        optimizer.step()
        optimizer.zero_grad()
        z = sample(log_alpha, gate.noise())
        hidden = nn.functional.gelu(nn.functional.linear(X, plain[0].weight * z[:, None], plain[0].bias * z))
        loss = nn.functional.cross_entropy(plain[2](hidden), Y) + 1e-3 * (open_chance(log_alpha) * 6).sum()
        loss.backward()
        for other in (ours, theirs):
            other.step()
            other.zero_grad()
        assert torch.allclose(gate.phi, log_alpha, atol=1e-5)
    assert gate.updates == 12 and not torch.allclose(gate.phi, torch.full((8,), math.log(19)), atol=0.01)
    for mine, reference in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(mine, reference, atol=1e-5)


@pytest.mark.parametrize("warm_up", [0, 8])
def test_the_variational_penalty_reaches_the_weights(warm_up: int) -> None:
    recipe = td.gates.variational(strength=1e-3, log_variance=-5.0, warm_up=warm_up)
    model, sparsifier, optimizer = prepared(recipe)
    (gate,) = states(sparsifier)
    gate.updates = 2
    sparsifier.step()
    nn.functional.cross_entropy(model(X), Y).backward()
    weight = model[0]._parameters["weight"]
    before, value, variance = weight.grad.clone(), weight.detach().clone(), gate.phi.detach().clone()
    optimizer.step()
    value.requires_grad_()
    log_alpha = variance - (value.square() + 1e-8).log()
    loss = 0.63576 * torch.sigmoid(-1.8732 - 1.48695 * log_alpha) + 0.5 * torch.log1p(torch.exp(-log_alpha))
    (expected,) = torch.autograd.grad(1e-3 * (2 / 8 if warm_up else 1) * loss.sum(), value)
    assert torch.allclose(weight.grad - before, expected, atol=1e-7) and expected.abs().max() > 1e-4


def train(
    gate: td.Recipe, backward: Callable[[nn.Module, torch.optim.Optimizer], None], steps: int = 4
) -> list[Tensor]:
    model, sparsifier, optimizer = prepared(gate)
    for _ in range(steps):
        sparsifier.step()
        backward(model, optimizer)
        optimizer.zero_grad()
    return [state.phi.detach() for state in states(sparsifier)] + [p.detach() for p in model.parameters()]


def whole(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    nn.functional.cross_entropy(model(X), Y).backward()
    optimizer.step()


def accumulated(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for part in range(3):
        rows = slice(4 * part, 4 * part + 4)
        (nn.functional.cross_entropy(model(X)[rows], Y[rows]) / 3).backward()
    optimizer.step()


def scaled_by_hand(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    (1024 * nn.functional.cross_entropy(model(X), Y)).backward()
    for parameter in model.parameters():
        parameter.grad /= 1024
    optimizer.step()


def scaler_of_torch(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for part in range(3):
        rows = slice(4 * part, 4 * part + 4)
        scaler.scale(nn.functional.cross_entropy(model(X)[rows], Y[rows]) / 3).backward()
    scaler.step(optimizer)


@pytest.mark.parametrize("way", [accumulated, scaled_by_hand, scaler_of_torch])
@pytest.mark.parametrize("gate", GATES)
def test_accumulation_and_loss_scaling_change_nothing(gate: str, way: Callable[..., None]) -> None:
    for one, other in zip(train(GATES[gate], whole), train(GATES[gate], way), strict=True):
        assert torch.allclose(one, other, atol=2e-5)


def test_a_fused_optimizer_divides_by_the_scale_itself() -> None:
    results = []
    for fused in (False, True):
        model, sparsifier, optimizer = prepared(GATES["variational"])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=fused)
        for _ in range(3):
            sparsifier.step()
            scaler.scale(nn.functional.cross_entropy(model(X), Y)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        results.append([*[s.phi.detach() for s in states(sparsifier)], *[p.detach() for p in model.parameters()]])
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, atol=2e-5)


def test_gates_are_clipped_with_the_weights_and_a_step_that_overflows_is_not_theirs() -> None:
    model, sparsifier, optimizer = prepared(GATES["smallify"])
    (gate,) = states(sparsifier)
    sparsifier.step()
    whole_gradient = nn.functional.cross_entropy(model(X), Y)
    whole_gradient.backward()
    arrived = gate.phi.grad.clone()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    optimizer.step()
    seen = gate._moments[0] / 0.1
    assert torch.allclose(seen, arrived * 0.01 / norm + 1e-2 * torch.ones_like(arrived), atol=1e-6)

    before, scaler = gate.phi.detach().clone(), torch.amp.GradScaler("cpu", init_scale=2.0)
    optimizer.zero_grad()
    sparsifier.step()
    scaler.scale(nn.functional.cross_entropy(model(X), Y) * math.inf).backward()
    scaler.step(optimizer)  # skipped
    scaler.update()
    optimizer.zero_grad()
    assert torch.equal(gate.phi, before) and gate.updates == 1
    sparsifier.step()
    assert gate.phi.grad is None
    whole(model, optimizer)
    assert gate.updates == 2 and gate.phi.isfinite().all()


def test_optimizers_of_other_weights_train_no_gate() -> None:
    model, sparsifier, _ = prepared(GATES["smallify"])
    (gate,) = states(sparsifier)
    sparsifier.step()
    nn.functional.cross_entropy(model(X), Y).backward()
    torch.optim.SGD(model[2].parameters(), lr=0.1).step()
    assert gate.updates == 0 and gate.phi.grad is not None
    torch.optim.SGD(model[0].parameters(), lr=0.1).step()
    assert gate.updates == 1 and gate.phi.grad is None


def test_a_loop_without_a_torch_optimizer_is_told_that_gates_do_not_learn() -> None:
    model, sparsifier, _ = prepared(GATES["smallify"])
    with pytest.warns(UserWarning, match=r"gates do not learn") as told:
        for _ in range(25):
            sparsifier.step()
            nn.functional.cross_entropy(model(X), Y).backward()
            model.zero_grad()
    assert "'0.weight'" in str(told[0].message) and len(told) == 1


def test_hooks_go_with_the_last_mask() -> None:
    gc.collect()
    others = len(_listening)
    _, one, _ = prepared(GATES["smallify"])
    _, two, _ = prepared(td.recipes.targeted_weight())
    assert len(_listening) == others + 1 and len(_handles) == 2
    two.step()
    two.squash_mask()
    assert len(_listening) == others + 1
    one.step()
    one.squash_mask()
    assert len(_listening) == others and (others or not _handles)


def test_copies_learn_apart() -> None:
    model, sparsifier, optimizer = prepared(GATES["hard_concrete"])
    twin_model, twin, _ = copy.deepcopy((model, sparsifier, None))
    twin_optimizer = torch.optim.SGD(twin_model.parameters(), lr=0.1, momentum=0.9)
    for part in ((sparsifier, model, optimizer), (twin, twin_model, twin_optimizer)):
        part[0].step()
        whole(part[1], part[2])
        assert states(part[0])[0].updates == 1
    assert torch.equal(states(sparsifier)[0].phi, states(twin)[0].phi)
    assert states(sparsifier)[0].phi is not states(twin)[0].phi


def test_what_a_gate_has_closed_goes_whatever_the_level_says() -> None:
    model, sparsifier, _ = prepared(td.gates.hard_concrete(Units(), strength=1e-4), level=0.25)
    (gate,) = states(sparsifier)
    with torch.no_grad():
        gate.phi[[0, 2, 3, 7]] = -5.0
    rows = sparsifier.report().rows
    assert rows[0].dropped == 4 and rows[0].groups == 8
    model.eval()
    with torch.no_grad():
        logits = model(X)
        with sparsifier.dense():
            assert not torch.allclose(model(X), logits)
    small = shrink(model, round_to=1, example_inputs={"input": X})
    assert small[0].out_features == 4
    with torch.no_grad():
        assert torch.allclose(small(X), logits, atol=1e-6)
    sparsifier.squash_mask()
    with torch.no_grad():
        assert torch.equal(model(X), logits)


@pytest.mark.parametrize("gate", [name for name in GATES if "units" in name])
def test_masked_squashed_and_shrunk_compute_the_same(gate: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6, 3)
    )
    sparsifier = td.TargetedDropout(GATES[gate], 0.5)
    sparsifier.prepare(model)
    assert [mask.fqn for t in sparsifier._targets for mask in t.masks if not mask.plain] == [
        "1.weight",
        "1.bias",
        "3.weight",
        "3.bias",
    ]  # fmt: skip - behind a norm the norm alone is scaled
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    images = torch.randn(9, 3, 5, 5)
    for _ in range(5):
        sparsifier.step()
        nn.functional.cross_entropy(model(images), torch.arange(9) % 3).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        logits = model.eval()(images)
        small = shrink(model, round_to=1)
        assert torch.allclose(small(images), logits, atol=1e-5)
        assert small[0].out_channels == 4 and small[3].out_channels == 3
        sparsifier.squash_mask()
        assert torch.equal(model(images), logits)


@pytest.mark.parametrize("gate", [name for name in GATES if "variational" not in name])
def test_a_compiled_forward_is_the_same_and_learns(gate: str) -> None:
    results = []
    for compiled in (False, True):
        model, sparsifier, optimizer = prepared(GATES[gate])
        run = torch.compile(model, backend="eager") if compiled else model
        for _ in range(3):
            sparsifier.step()
            whole(run, optimizer)
            optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            results.append([*[s.phi.detach() for s in states(sparsifier)], run(X)])
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("gate", GATES)
def test_half_precision_and_activation_checkpoints(gate: str) -> None:
    results = []
    for saved in (False, True):
        model, sparsifier, optimizer = prepared(GATES[gate])
        for _ in range(3):
            sparsifier.step()
            with torch.autocast("cpu", torch.bfloat16):
                run = torch.utils.checkpoint.checkpoint(model, X, use_reentrant=False) if saved else model(X)
            nn.functional.cross_entropy(run.float(), Y).backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append([s.phi.detach() for s in states(sparsifier)])
        assert all(state.updates == 3 and state.phi.isfinite().all() for state in states(sparsifier))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_a_gate_and_targeted_dropout_compose() -> None:
    model, sparsifier, optimizer = prepared(replace(GATES["hard_concrete"], drop_rate=0.9))
    for _ in range(3):
        sparsifier.step()
        assert sparsifier.report().rows[0].sampled > 0
        whole(model, optimizer)
    assert states(sparsifier)[0].updates == 3
    weight = model.train()[0].weight.as_subclass(Tensor)
    assert 0.2 < (weight == 0).float().mean() < 0.7


def test_the_state_is_text_and_a_damaged_one_is_refused() -> None:
    model, sparsifier, optimizer = prepared(GATES["smallify"])
    sparsifier.step()
    whole(model, optimizer)
    state = json.loads(json.dumps(sparsifier.state_dict()))
    _, other, _ = prepared(GATES["smallify"])
    other.load_state_dict(state)
    assert torch.equal(states(other)[0].phi, states(sparsifier)[0].phi)
    state["groups"][0]["gate"]["phi"] = "AAAA"
    with pytest.raises(td.TdError, match="another tensor.*0.weight, phi of the gate"):
        other.load_state_dict(state)
    del state["groups"][0]["gate"]
    with pytest.raises(td.TdError, match="damaged.*0.weight"):
        other.load_state_dict(state)


class Siamese(nn.Module):
    """Two layers of one weight, whose units are removed together."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.last = nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(5, 3)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.one(x)) + torch.relu(self.two(x)))


class Twice(torch.optim.SGD):
    """Calls the step it inherits, so torch calls its hooks for both."""

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        super().step(closure)


@pytest.mark.parametrize("name", ["variational", "penalty"])
def test_an_optimizer_that_inherits_its_step_counts_once(name: str) -> None:
    recipe = replace(td.recipes.targeted_weight(), penalty=L1(0.1)) if name == "penalty" else GATES[name]
    results = []
    for kind in (torch.optim.SGD, Twice):
        model, sparsifier, _ = prepared(recipe)
        optimizer = kind(model.parameters(), lr=0.1)
        torch.optim.SGD(model.parameters(), lr=0.1)  # torch wraps the step of a class when it is first made
        for _ in range(3):
            sparsifier.step()
            whole(model, optimizer)
            optimizer.zero_grad()
        results.append([p.detach() for p in model.parameters()] + [s.phi.detach() for s in states(sparsifier)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_mistakes_are_named() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3))
    model[1].weight = model[0].weight
    sparsifier = td.TargetedDropout(td.gates.hard_concrete())
    with pytest.raises(td.TdError, match=r"tied.*where: 0.weight.*fix: .*untie"):
        sparsifier.prepare(model, [{"tensor_fqn": "0.weight"}])
    units = td.TargetedDropout(td.gates.hard_concrete(Units()))
    with pytest.raises(td.TdError, match=r"gate on a tied weight.*where: two.weight.*fix: untie"):
        units.prepare(Siamese(), example_inputs={"x": X})
    other = net()
    td.TargetedDropout(td.gates.smallify()).prepare(other)
    with pytest.raises(td.TdError, match=r"carries masks already.*0.weight.*squash"):
        td.TargetedDropout(td.recipes.targeted_weight()).prepare(other)
    with pytest.raises(td.TdError, match=r"run through many tensors.*hidden"):
        td.gates.smallify(Units(kinds=("hidden",)))
    with pytest.raises(td.TdError, match=r"positive rate.*strength=-1"):
        td.gates.variational(strength=-1)
    with pytest.raises(td.TdError, match="warm_up.*-1"):
        td.gates.variational(warm_up=-1)
    with pytest.raises(td.TdError, match="dropout"):
        td.gates.hard_concrete(dropout=0.0)
    with pytest.raises(td.TdError, match="threshold"):
        td.gates.smallify(threshold=1.5)
    with pytest.raises(td.TdError, match="L1.*-1"):
        L1(-1)


def soft(w: np.ndarray, amount: float) -> np.ndarray:
    return np.sign(w) * np.maximum(np.abs(w) - amount, 0)


def test_l1_is_soft_thresholding_after_each_step() -> None:
    results = []
    for penalty in (None, L1(0.2)):
        model, sparsifier, optimizer = prepared(replace(td.recipes.targeted_weight(0.0), penalty=penalty))
        sparsifier.step()
        whole(model, optimizer)
        results.append([p.detach().clone().numpy() for p in model.parameters()])
    (w, *rest), (shrunk, *same) = results
    assert np.allclose(shrunk, soft(w, 0.1 * 0.2), atol=1e-7) and (shrunk == 0).any()
    assert all(
        np.array_equal(a, b) for a, b in zip(rest, same, strict=True)
    )  # biases and the logits' layer pay nothing


@pytest.mark.parametrize("units", [True, False])
def test_group_l1_shrinks_the_norm_of_every_unit(units: bool) -> None:
    recipe = td.recipes.targeted_unit(0.0) if units else td.recipes.targeted_weight(0.0)
    results = []
    for penalty in (None, GroupL1(1.3)):
        model, sparsifier, optimizer = prepared(replace(recipe, penalty=penalty))
        sparsifier.step()
        whole(model, optimizer)
        results.append(model[0]._parameters["weight"].detach().clone().numpy())
    w, shrunk = results
    norms = np.linalg.norm(w, axis=1, keepdims=True)
    assert np.allclose(shrunk, w * np.maximum(1 - 0.1 * 1.3 * math.sqrt(6) / norms, 0), atol=1e-6)


@pytest.mark.parametrize("way", [accumulated, scaled_by_hand, scaler_of_torch])
def test_penalties_do_not_see_scales_or_accumulation(way: Callable[..., None]) -> None:
    recipe = replace(td.recipes.targeted_unit(0.5), penalty=GroupL1(0.1))
    for one, other in zip(train(recipe, whole), train(recipe, way), strict=True):
        assert torch.allclose(one, other, atol=2e-5)


@pytest.mark.parametrize("fused", [True, False])
def test_a_penalty_is_taken_in_every_step(fused: bool) -> None:
    """Fused optimizers change weights without changing their version counters."""
    model, sparsifier, _ = prepared(replace(td.recipes.targeted_weight(0.0), penalty=L1(0.5)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, fused=fused)
    weight = model[0]._parameters["weight"]
    expected = weight.detach().numpy().copy()
    for _ in range(5):
        sparsifier.step()
        nn.functional.cross_entropy(model(X), Y).backward()
        expected = soft(expected - 0.01 * weight.grad.numpy(), 0.01 * 0.5)
        optimizer.step()
        optimizer.zero_grad()
    assert np.allclose(weight.detach().numpy(), expected, atol=1e-6)


def test_a_penalty_drives_weights_to_zero_exactly() -> None:
    model, sparsifier, optimizer = prepared(replace(td.recipes.targeted_weight(0.0), penalty=L1(0.05)))
    for _ in range(100):
        sparsifier.step()
        whole(model, optimizer)
        optimizer.zero_grad()
    assert (model[0]._parameters["weight"] == 0).float().mean() > 0.3
