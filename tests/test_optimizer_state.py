"""The optimizer goes on after a cut: the kept parameters move as they would have in the whole model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from transformers.optimization import Adafactor

import td_plugin as td
from td_plugin.export.optimizer_state import Kept, carry_over

Parameters = Iterable[nn.Parameter] | list[dict[str, object]]
Maker = Callable[[Parameters], torch.optim.Optimizer]

DEAD = {"0": [1, 4, 5], "2": [0, 3]}  # by the layer that computes them
ALIVE = {"0": torch.tensor([0, 2, 3, 6, 7]), "2": torch.tensor([1, 2, 4, 5])}
KEPT: Kept = {
    "0.weight": {0: ALIVE["0"]},
    "0.bias": {0: ALIVE["0"]},
    "2.weight": {0: ALIVE["2"], 1: ALIVE["0"]},
    "2.bias": {0: ALIVE["2"]},
    "4.weight": {1: ALIVE["2"]},
}
OPTIMIZERS: dict[str, Maker] = {
    "AdamW": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1),
    "AMSGrad": lambda p: torch.optim.Adam(p, 1e-2, amsgrad=True, foreach=True),
    "SGD": lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9, nesterov=True, weight_decay=0.1),
    "plain SGD": lambda p: torch.optim.SGD(p, 1e-2),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 1e-2, momentum=0.5, centered=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 1e-2, initial_accumulator_value=0.1),
    "Rprop": lambda p: torch.optim.Rprop(p, 1e-2),
}


def silenced(bias: bool = True) -> nn.Sequential:
    """Units that are dead and stay so: no weights, and no gradient reaches them."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3, bias=bias)
    ).double()  # fmt: skip
    for layer, units in DEAD.items():
        for parameter in model.get_submodule(layer).parameters():
            alive = torch.ones_like(parameter)
            alive[units] = 0
            with torch.no_grad():
                parameter.mul_(alive)
            parameter.register_hook(alive.mul)
    return model


def cut(model: nn.Module, kept: Kept = KEPT) -> Any:
    """A copy with the parameters cut; independent of `shrink`."""
    small = copy.deepcopy(model)
    for name, dims in kept.items():
        module, _, tensor = name.rpartition(".")
        value = small.get_parameter(name).detach()
        for dim, index in dims.items():
            value = value.index_select(dim, index)
        setattr(small.get_submodule(module), tensor, nn.Parameter(value))
    return small


def train(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    x, y = (torch.randn(16, n, generator=generator, dtype=torch.float64) for n in (5, 3))
    optimizer.zero_grad()
    mse_loss(model(x), y).backward()
    optimizer.step()


def expect_alike(model: nn.Module, small: nn.Module, kept: Kept = KEPT) -> None:
    for name, parameter in small.named_parameters():
        whole = model.get_parameter(name).detach()
        for dim, index in kept.get(name, {}).items():
            whole = whole.index_select(dim, index)
        torch.testing.assert_close(parameter.detach(), whole, atol=1e-9, rtol=0, msg=name)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_the_small_model_trains_on_as_the_whole_one_does(make: Maker) -> None:
    model = silenced()
    optimizer = make(model.parameters())
    for step in range(4):
        train(model, optimizer, step)
    whole = silenced()
    whole.load_state_dict(model.state_dict())
    other = make(whole.parameters())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    small = cut(model)
    carry_over(optimizer, model, small, KEPT)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in small.parameters()]
    assert not set(optimizer.state) & set(model.parameters())
    for step in range(4, 9):
        train(whole, other, step)
        train(small, optimizer, step)
        expect_alike(whole, small)


def test_groups_their_options_and_the_schedule_go_on() -> None:
    model = silenced()
    named = dict(model.named_parameters())
    weights = [p for n, p in named.items() if n.endswith("weight")]
    biases = [p for n, p in named.items() if n.endswith("bias")]

    def make(decayed: list[nn.Parameter], plain: list[nn.Parameter]) -> torch.optim.Optimizer:
        groups = [{"params": decayed, "weight_decay": 0.3}, {"params": plain, "weight_decay": 0.0, "lr": 5e-2}]
        return torch.optim.AdamW(groups, 1e-2)

    optimizer, reference = make(weights, biases), silenced()
    twin = make([reference[i].weight for i in (0, 2, 4)], [reference[i].bias for i in (0, 2, 4)])
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)) for o in (optimizer, twin)]
    small: nn.Module = model
    for step in range(8):
        if step == 3:
            small = cut(model)
            carry_over(optimizer, model, small, KEPT)
        train(reference, twin, step)
        train(small, optimizer, step)
        for schedule in schedules:
            schedule.step()
        expect_alike(reference, small, KEPT if step >= 3 else {})
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2 / 9, 5e-2 / 9]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    assert [tuple(p.shape) for p in optimizer.param_groups[1]["params"]] == [(5,), (4,), (3,)]


@pytest.mark.parametrize("name", ["AdamW", "SGD", "Adagrad"])
def test_a_bias_made_by_folding_joins_its_weight_and_trains(name: str) -> None:
    model = silenced(bias=False)
    optimizer = OPTIMIZERS[name]([{"params": [p]} for p in model.parameters()])
    train(model, optimizer, 0)
    small = cut(model)
    small[4].bias = nn.Parameter(torch.full((3,), 0.5, dtype=torch.float64))
    carry_over(optimizer, model, small, KEPT)
    last = optimizer.param_groups[-1]["params"]
    assert [id(p) for p in last] == [id(p) for p in small[4].parameters()]
    train(small, optimizer, 1)
    assert (small[4].bias != 0.5).all()


class Stream(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(layers))
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x).tanh()
        out: Tensor = self.head(x)
        return out


def test_removed_layers_leave_and_those_behind_move_up() -> None:
    torch.manual_seed(0)
    model, small = Stream(3).double(), Stream(2).double()
    with torch.no_grad():
        for parameter in model.layers[1].parameters():
            parameter.zero_()
            parameter.register_hook(torch.zeros_like)
    reference = copy.deepcopy(model)
    for parameter in reference.layers[1].parameters():
        parameter.register_hook(torch.zeros_like)
    optimizer, twin = (torch.optim.AdamW(m.named_parameters(), 1e-2) for m in (model, reference))
    for step in range(3):
        train(model, optimizer, step), train(reference, twin, step)
    small.layers[0].load_state_dict(model.layers[0].state_dict())
    small.layers[1].load_state_dict(model.layers[2].state_dict())
    small.head.load_state_dict(model.head.state_dict())
    renamed = {f"layers.2.{tensor}": f"layers.1.{tensor}" for tensor in ("weight", "bias")}
    carry_over(optimizer, model, small, {}, renamed)
    assert optimizer.param_groups[0]["param_names"] == [name for name, _ in small.named_parameters()]
    assert len(optimizer.state) == 6
    for step in range(3, 6):
        train(small, optimizer, step), train(reference, twin, step)
        for name, parameter in small.named_parameters():
            whole = reference.get_parameter(name.replace("layers.1", "layers.2"))
            torch.testing.assert_close(parameter, whole, atol=1e-9, rtol=0)


def test_a_group_whose_layers_are_all_gone_stays_empty_in_its_place() -> None:
    model, small = Stream(2), Stream(1)
    optimizer = torch.optim.Adam([{"params": list(m.parameters())} for m in (*model.layers, model.head)], 1e-2)
    carry_over(optimizer, model, small, {})
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 0, 2]
    small.double()
    train(small, optimizer, 0)


def test_tied_parameters_are_one_under_any_name() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    keep = torch.tensor([0, 2, 3])
    small = nn.Sequential(nn.Linear(4, 3), nn.Linear(4, 3))
    small[1].weight = small[0].weight
    momentum = optimizer.state[model[0].weight]["momentum_buffer"].clone()
    carry_over(optimizer, model, small, {"1.weight": {0: keep}, "0.bias": {0: keep}, "1.bias": {0: keep}})
    assert len(optimizer.param_groups[0]["params"]) == 3
    assert torch.equal(optimizer.state[small[0].weight]["momentum_buffer"], momentum[keep])


def test_a_master_copy_keeps_its_digits_but_for_what_folding_has_changed() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 3))
    exact = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model.bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for name, parameter in model.named_parameters():
        optimizer.state[parameter] = {"master": exact[name]}
    kept: Kept = {"0.weight": {0: ALIVE["0"]}, "0.bias": {0: ALIVE["0"]}, "1.weight": {1: ALIVE["0"]}}
    small = cut(model, kept)
    with torch.no_grad():
        small[1].bias[1] += 1
    carry_over(optimizer, model, small, kept)
    masters = {name: optimizer.state[parameter]["master"] for name, parameter in small.named_parameters()}
    assert torch.equal(masters["0.weight"], exact["0.weight"][ALIVE["0"]])
    bias = small[1].bias.detach().float()
    assert masters["1.bias"][1] == bias[1] and torch.equal(masters["1.bias"][::2], exact["1.bias"][::2])
    assert all(value.dtype == torch.float32 for value in masters.values())


def step_once(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    inputs = next(model.parameters()).shape[1]
    model(torch.randn(4, inputs)).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("rows", [6, 5], ids=["square", "oblong"])
@pytest.mark.parametrize("family", ["torch", "transformers"])
def test_factored_state_is_cut_along_the_dimension_it_has(family: str, rows: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, rows, bias=False))
    make = torch.optim.Adafactor if family == "torch" else Adafactor
    optimizer: torch.optim.Optimizer = make(model.parameters())
    step_once(optimizer, model)
    before = copy.deepcopy(optimizer.state[model[0].weight])
    row, column = torch.tensor([0, 2, 3]), torch.tensor([1, 2, 4, 5])
    kept: Kept = {"0.weight": {0: row, 1: column}}
    small = cut(model, kept)
    carry_over(optimizer, model, small, kept)
    after = optimizer.state[small[0].weight]
    names = ("row_var", "col_var") if family == "torch" else ("exp_avg_sq_row", "exp_avg_sq_col")
    assert torch.equal(after[names[0]].flatten(), before[names[0]].flatten()[row])
    assert torch.equal(after[names[1]].flatten(), before[names[1]].flatten()[column])
    assert after["step"] == before["step"]
    step_once(optimizer, small)


@pytest.mark.parametrize("value", [torch.zeros(7), [torch.zeros(2)]], ids=["tensor", "list"])
def test_state_of_unknown_shape_starts_anew_and_the_tensor_is_named(value: object) -> None:
    model = silenced()
    optimizer = OPTIMIZERS["AdamW"](model.parameters())
    train(model, optimizer, 0)
    optimizer.state[model[0].weight]["blocks"] = value
    small = cut(model)
    with pytest.warns(UserWarning, match=r"state of 0\.weight starts anew: 'blocks'") as caught:
        carry_over(optimizer, model, small, KEPT)
    assert caught[0].filename == __file__
    assert [len(optimizer.state[p]) for p in small.parameters()] == [0, 3, 3, 3, 3, 3]
    train(small, optimizer, 1)


def test_parameters_of_other_modules_and_frozen_ones_stay_as_they_are() -> None:
    model, other = silenced(), nn.Linear(2, 2)
    model[4].requires_grad_(False)
    optimizer = torch.optim.SGD([*model[0].parameters(), *other.parameters(), *model[2].parameters()], 0.1)
    small = cut(model)
    carry_over(optimizer, model, small, KEPT)
    expected = [*small[0].parameters(), *other.parameters(), *small[2].parameters()]
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in expected]


def test_the_state_dict_fits_an_optimizer_built_for_the_small_model() -> None:
    model = silenced(bias=False)
    optimizer = OPTIMIZERS["AdamW"](model.parameters())
    train(model, optimizer, 0)
    small = cut(model)
    small[4].bias = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    carry_over(optimizer, model, small, KEPT)
    twin = copy.deepcopy(small)
    fresh = OPTIMIZERS["AdamW"](twin.parameters())
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(3):
        train(small, optimizer, step), train(twin, fresh, step)
    expect_alike(twin, small, {})


def test_wrong_arguments_leave_the_optimizer_as_it_was() -> None:
    model = silenced()
    optimizer, small = OPTIMIZERS["AdamW"](model.parameters()), cut(model)
    before = [id(p) for p in optimizer.param_groups[0]["params"]]
    wrong: list[tuple[Kept, str]] = [
        ({}, r"does not explain the small model; where: 0\.weight"),
        ({**KEPT, "0.wieght": {}}, r"no such parameter; where: 0\.wieght; fix: nearest: '0\.weight'"),
        ({**KEPT, "4.weight": {2: ALIVE["2"]}}, r"does not fit the tensor; where: 4\.weight"),
        ({**KEPT, "0.bias": {0: ALIVE["0"] + 1}}, r"does not fit the tensor; where: 0\.bias"),
        ({**KEPT, "0.bias": {0: ALIVE["0"].float()}}, r"does not fit the tensor; where: 0\.bias"),
    ]
    for kept, message in wrong:
        with pytest.raises(td.TdError, match=message):
            carry_over(optimizer, model, small, kept)
    with pytest.raises(td.TdError, match="drives no parameter of the model"):
        carry_over(optimizer, small, model, {})
    with pytest.raises(td.TdError, match="LBFGS"):
        carry_over(torch.optim.LBFGS(model.parameters()), model, small, KEPT)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == before
