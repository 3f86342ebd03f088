"""Han et al.'s measures between prunings: dropout rates, phases, dead neurons."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import td_plugin as td
from td_plugin.export import shrink
from td_plugin.retraining import adjust_dropout, adjusted_rate, by_kind, only, silence_dead


def lenet() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten(),
        nn.Dropout(0.5), nn.Linear(96, 20), nn.ReLU(), nn.Dropout(0.4), nn.Linear(20, 10), nn.Dropout(0.1),
    )  # fmt: skip


def images(n: int = 5) -> Tensor:
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def test_the_rate_shrinks_with_the_root_of_what_is_left() -> None:
    assert adjusted_rate(0.5, 100, 25) == 0.25 and adjusted_rate(0.5, 7, 7) == 0.5 and adjusted_rate(0.5, 7, 0) == 0
    for wrong in ((1.5, 4, 2), (0.5, 4, 5), (0.5, 0, 0), (0.5, 4, -1)):
        with pytest.raises(td.TdError, match="fix: "):
            adjusted_rate(*wrong)


def test_each_dropout_follows_the_layer_behind_it() -> None:
    model, rates = lenet(), {"5": 0.5, "8": 0.4, "10": 0.1}
    sparsifier = td.TargetedDropout(td.recipes.magnitude(), 0.75)
    sparsifier.prepare(model, [{"tensor_fqn": "6.weight"}, {"tensor_fqn": "9.weight", "sparsity_level": 0.36}])
    for _ in range(2):  # from the rates of the dense model, so a second time changes nothing
        adjust_dropout(model, rates, sparsifier.state)
        found = [m.p for m in model if isinstance(m, nn.Dropout)]
        assert found == pytest.approx([0.5 * math.sqrt(0.25), 0.4 * math.sqrt(0.64), 0.1])
    adjust_dropout(model, rates, {})
    assert [m.p for m in model if isinstance(m, nn.Dropout)] == [0.5, 0.4, 0.1]
    with pytest.raises(td.TdError, match=r"no such dropout; where: 4"):
        adjust_dropout(model, {"4": 0.1}, {})


def test_convolutions_and_linear_layers_take_turns_and_what_was_pruned_stays_so() -> None:
    model, x = lenet(), images()
    configs = by_kind(model)
    assert [c["tensor_fqn"] for c in configs["conv"]] == ["0.weight", "2.weight"]
    assert [c["tensor_fqn"] for c in configs["linear"]] == ["6.weight"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    zeros: dict[str, Tensor] = {}
    for kind in ("conv", "linear"):
        optimizer.zero_grad()
        sparsifier = td.TargetedDropout(td.recipes.iterative_magnitude(2, 0.0, 1.0), 0.8)
        sparsifier.prepare(model, configs[kind])  # type: ignore[index]
        other = "6.weight" if kind == "conv" else "2.weight"
        before = dict(model.named_parameters())[other].detach().clone()
        with only(model, kind):  # type: ignore[arg-type]
            for step in range(3):
                sparsifier.set_progress(step / 2)
                sparsifier.step()
                model(x).square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
        sparsifier.squash_mask()
        assert torch.equal(dict(model.named_parameters())[other], before)
        zeros |= {c["tensor_fqn"]: dict(model.named_parameters())[c["tensor_fqn"]] == 0 for c in configs[kind]}  # type: ignore[index]
    for name, mask in zeros.items():
        parameter = dict(model.named_parameters())[name]
        assert torch.equal(parameter == 0, mask) and int(mask.sum()) == int(0.8 * mask.numel())
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(td.TdError, match="no conv layers"), only(nn.Sequential(nn.Linear(2, 2)), "conv"):
        pass
    with pytest.raises(td.TdError, match="unknown kind"), only(model, "fc"):  # type: ignore[arg-type]
        pass


def test_units_that_nobody_reads_go_and_take_those_that_fed_only_them() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 3)).eval()
    with torch.no_grad():
        model[4].weight[:, 2] = 0  # unit 2 of the second layer is unread
        model[2].weight[[i for i in range(7) if i != 2], 5] = 0  # unit 5 of the first is read by that one alone
        model[0].weight[1] = 0  # nothing enters unit 1
    x, plain = torch.randn(9, 6), copy.deepcopy(model)
    assert silence_dead(model) == (8 + 1) + (6 + 1) and silence_dead(model) == 0
    torch.testing.assert_close(model(x), plain(x), rtol=0, atol=0)
    small = shrink(model, round_to=1)
    assert [(small[i].in_features, small[i].out_features) for i in (0, 2, 4)] == [(6, 6), (6, 6), (6, 3)]
    torch.testing.assert_close(small(x), plain(x))


def test_dead_channels_are_silenced_with_their_norm() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)
    ).eval()  # fmt: skip
    with torch.no_grad():
        model[3].weight[:, 1] = 0
    x = images()
    before = model(x)
    assert silence_dead(model) == 9 + 1 + 1  # the filter, its bias, the scale; the shift was 0
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)


def test_a_masked_model_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    td.TargetedDropout(td.recipes.magnitude()).prepare(model)
    with pytest.raises(td.TdError, match=r"carries masks; where: 0\.weight.*squash"):
        silence_dead(model)
