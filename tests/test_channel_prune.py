"""Channel pruning: against numpy's least squares, never worse than removing, and the small model is the masked one."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from cases import build
from torch import Tensor, nn
from torch.nn.functional import unfold

import td_plugin as td
from td_plugin import TdError
from td_plugin.export import channel_prune, reconstruct_channels, shrink
from td_plugin.export.activations import sample, sampling
from td_plugin.export.least_squares import Samples, plain, rank_by_lasso, reconstruct


def images(count: int = 6, batch: int = 8, size: int = 8, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, 3, size, size, generator=generator) for _ in range(count)]


def vectors(count: int = 4, batch: int = 64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, 8, generator=generator) for _ in range(count)]


def net() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU(),
        nn.Conv2d(12, 10, 3, stride=2, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(10, 8, (2, 1), padding=(1, 0), dilation=(1, 2), padding_mode="circular"), nn.GELU(),
        nn.Flatten(), nn.Linear(8 * 6, 20), nn.ReLU(), nn.Linear(20, 4),
    )  # fmt: skip
    for batch in images(4, 32, seed=9):
        model(batch)  # running statistics
    return model.train()


class Inception(nn.Module):
    """Two branches whose channels one layer reads, beside each other; traced, not a chain."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 6, 1)
        self.after, self.head = nn.Conv2d(14, 6, 3), nn.Linear(6, 3)

    def forward(self, pixels: Tensor) -> Tensor:
        both = torch.cat([self.left(pixels).relu(), self.right(pixels).relu()], 1)
        return self.head(self.after(both).relu().mean((2, 3)))


def traced() -> tuple[nn.Module, list[dict[str, Tensor]]]:
    torch.manual_seed(0)
    return Inception(), [{"pixels": batch} for batch in images()]


def cases() -> dict[str, tuple[nn.Module, list, tuple[str, ...]]]:
    torch.manual_seed(0)
    tokens = [torch.randint(1, 20, (8, 6)) for _ in range(4)]
    return {
        "conv": (net(), images(), ("channels", "neurons")),
        "mlp": (build("mlp"), vectors(), ("neurons",)),
        "inception": (*traced(), ("channels",)),
        "bert": (build("bert"), [{"input_ids": ids} for ids in tokens], ("neurons", "heads")),
    }


def outputs(model: nn.Module, batch: Tensor | dict[str, Tensor]) -> Tensor:
    found = model(batch) if isinstance(batch, Tensor) else model(**batch)
    return found if isinstance(found, Tensor) else found.logits


@pytest.mark.parametrize("name", ["conv", "mlp", "inception", "bert"])
def test_the_small_model_is_the_masked_one_and_the_model_stays(name: str) -> None:
    model, batches, kinds = cases()[name]
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    done = reconstruct_channels(model, batches, 0.5, kinds=kinds, round_to=1, samples=600)
    small = channel_prune(model, batches, 0.5, kinds=kinds, round_to=1, samples=600)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert model.training == small.training and type(small) is type(model)
    assert not any(module._forward_hooks for module in model.modules())
    assert sum(p.numel() for p in small.parameters()) < 0.75 * sum(p.numel() for p in model.parameters())
    assert {row.kind for row in done.layers} == set(kinds)
    with torch.no_grad():
        expected, found = (outputs(m.eval(), batches[0]) for m in (done.model, small))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for row in done.layers:
        assert row.kept == row.units - int(0.5 * row.units)
        assert row.reconstructed <= row.removed and row.rows <= 608


def removed_alone(model: nn.Module, name: str, kept: int) -> nn.Module:
    """The model without the smallest channels of one layer, by hand."""
    import copy

    plain_one = copy.deepcopy(model)
    layer = plain_one.get_submodule(name)
    gone = layer.weight.detach().flatten(1).norm(dim=1).argsort(descending=True, stable=True)[kept:]
    with torch.no_grad():
        layer.weight[gone] = 0
        if layer.bias is not None:
            layer.bias[gone] = 0
        if name == "0":
            plain_one[1].weight[gone], plain_one[1].bias[gone] = 0, 0
    return plain_one


@pytest.mark.parametrize(("name", "reader"), [("0", "3"), ("3", "6"), ("6", "9"), ("9", "11")])
def test_reported_errors_are_those_of_the_models(name: str, reader: str) -> None:
    model, batches = net().eval(), images()
    done = reconstruct_channels(model, batches, {name: 0.5}, samples=10**6, round_to=1)
    (row,) = done.layers
    x = torch.cat(batches)

    @torch.no_grad()
    def computed(m: nn.Module) -> Tensor:
        return m[: int(reader) + 1].eval()(x).double()

    dense = computed(model)

    def error(m: nn.Module) -> float:
        return float((computed(m) - dense).square().sum() / dense.square().sum())

    assert row.removed == pytest.approx(error(removed_alone(model, name, row.kept)), rel=1e-4)
    assert row.reconstructed == pytest.approx(error(done.model), rel=1e-4)
    assert row.reconstructed < row.removed
    assert row.rows == dense.numel() // dense.shape[1]


def test_layers_are_mended_for_what_the_pruned_model_gives_them() -> None:
    """With all layers pruned the last one still reconstructs the dense output: errors do not pile up unseen."""
    model, batches = build("mlp").eval(), vectors()
    done = reconstruct_channels(model, batches, 0.5, samples=10**6)
    x = torch.cat(batches)
    with torch.no_grad():
        dense, found = model(x).double(), done.model(x).double()
    error = float((found - dense).square().sum() / dense.square().sum())
    assert done.layers[-1].reconstructed == pytest.approx(error, rel=1e-4)


def reader(rows: int, units: int, span: int, outputs: int, bias: bool, seed: int = 0) -> Samples:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, units * span, generator=generator, dtype=torch.float64).relu() + 0.1
    weight = torch.randn(outputs, units * span, generator=generator, dtype=torch.float64)
    offset = torch.randn(outputs, generator=generator, dtype=torch.float64) if bias else None
    y = x @ weight.T + (0 if offset is None else offset)
    return Samples(x, y, weight, offset, torch.arange(units * span) // span)


@pytest.mark.parametrize("bias", [True, False])
def test_least_squares_are_those_of_numpy(bias: bool) -> None:
    one = reader(200, 10, 3, 5, bias)
    keep = torch.tensor([1, 4, 7])
    weight, offset = reconstruct(one, keep, torch.float64)
    mask = one.kept(keep)
    assert not weight[:, ~mask].any() and int(mask.sum()) == 9
    x = one.x[:, mask].numpy()
    design = np.concatenate([x, np.ones((200, 1))], 1) if bias else x
    solution, *_ = np.linalg.lstsq(design, one.y.numpy(), rcond=None)
    np.testing.assert_allclose(weight[:, mask].numpy().T, solution[:9], rtol=1e-3, atol=1e-4)
    left = np.square(design @ solution - one.y.numpy()).sum() / np.square(one.y.numpy()).sum()
    assert one.error(weight, offset) == pytest.approx(left, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_few_rows_are_never_worse_than_removing_and_change_little(rows: int, dtype: torch.dtype) -> None:
    one = reader(rows, 10, 3, 5, True)
    keep = torch.tensor([0, 2, 3, 5])
    weight, bias = reconstruct(one, keep, dtype)
    assert one.error(weight, bias) <= one.error(plain(one, keep), one.bias)
    if rows == 1:  # one row decides one direction of 12
        change = (weight - plain(one, keep))[:, one.kept(keep)]
        assert int(torch.linalg.matrix_rank(change.float(), atol=0.05)) <= 1 + (dtype is torch.bfloat16) * 4


def test_lasso_is_the_plain_one_on_all_rows() -> None:
    """On few units the explicit regression, rows × outputs long, chooses the same."""
    from sklearn.linear_model import lasso_path

    for seed in range(5):
        one = reader(60, 6, 2, 4, False, seed)
        columns = []
        for unit in range(6):
            own = one.owners == unit
            weight = one.weight[:, own] / one.weight[:, own].norm()
            columns.append((one.x[:, own] @ weight.T).reshape(-1))
        design, wanted = torch.stack(columns, 1).numpy(), one.y.reshape(-1).numpy()
        penalties = np.abs(design.T @ wanted).max() / len(wanted) * np.geomspace(1, 1e-4, 1000)
        _, path, _ = lasso_path(design, wanted, alphas=penalties)
        for keep in (2, 3, 4):
            used = [set(np.flatnonzero(beta)) for beta in path.T]
            last = max((i for i, found in enumerate(used) if len(found) <= keep), default=0)
            ours = rank_by_lasso([one], torch.arange(6), keep)[:keep].tolist()
            if len(used[last]) == keep:
                assert set(ours) == used[last]


def test_useless_units_go_first_and_copies_are_not_both_kept() -> None:
    one = reader(300, 6, 1, 4, True)
    x = one.x.clone()
    x[:, 2] = 0  # never active
    x[:, 5] = x[:, 0]  # a copy
    y = x @ one.weight.T + one.bias
    some = Samples(x, y, one.weight, one.bias, one.owners)
    kept = rank_by_lasso([some], torch.arange(6), 4)[:4].tolist()
    assert 2 not in kept and not {0, 5} <= set(kept)
    weight, bias = reconstruct(some, torch.tensor(kept), torch.float64)
    assert some.error(weight, bias) < 1e-9 < some.error(plain(some, torch.tensor(kept)), one.bias)


@pytest.mark.parametrize("index", [0, 3, 6])
def test_patches_are_those_of_unfold(index: int) -> None:
    model, plan = net().eval(), sampling(images(2), 10**6, 0)
    name = str(index)
    x, y = (sample(model, [name], plan, what)[name] for what in ("inputs", "outputs"))
    layer = model[index]
    flat = x @ layer.weight.detach().flatten(1).T + (0 if layer.bias is None else layer.bias.detach())
    torch.testing.assert_close(flat, y, rtol=1e-4, atol=1e-5)
    if index == 0:
        expected = unfold(torch.cat(plan.batches), 3, padding=1).movedim(1, 2).reshape(-1, 27)
        assert torch.equal(x.sum(1).sort().values, expected.sum(1).sort().values)


def test_a_quarter_of_the_samples_is_random_and_repeats() -> None:
    model = net()
    few = sampling(images(2), 20, 3)
    one, two, other = (sample(model, ["3"], sampling(images(2), 20, seed), "inputs")["3"] for seed in (3, 3, 4))
    assert len(one) == 20 == 2 * few.per_batch and torch.equal(one, two) and not torch.equal(one, other)
    first = channel_prune(model, images(2), 0.5, samples=50, seed=1).state_dict()
    second = channel_prune(model, images(2), 0.5, samples=50, seed=1).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_masks_of_another_method_are_baked_and_widths_rounded() -> None:
    model = build("mlp")
    sparsifier = td.TargetedDropout(td.recipes.targeted_unit(), 0.25)
    sparsifier.prepare(model)
    done = reconstruct_channels(model, vectors(), 0.5, round_to=8, samples=100)
    assert [(row.units, row.kept) for row in done.layers] == [(12, 8), (10, 8)]  # of 6 and 5, rounded up
    small = channel_prune(model, vectors(), {"0": 0.5, "2": 0.2}, round_to=1, samples=100)
    assert [layer.out_features for layer in small if isinstance(layer, nn.Linear)] == [6, 8, 3]
    assert sparsifier.groups  # still masked
    sparsifier.squash_mask()
    assert shrink(model, round_to=1)[0].out_features == 9
    assert "error, only removed" in str(done) and done.to_dict()["layers"][0]["units"] == 12


class TestRefusals:
    def test_samples(self) -> None:
        model = net()
        for batches in ([], iter(())):
            with pytest.raises(TdError, match="there are no samples to reconstruct from"):
                channel_prune(model, batches)
        broken = images(3)
        broken[1][2, 0, 3, 3] = float("nan")
        with pytest.raises(TdError, match=r"the samples are not finite; where: batch 1, 'input'; got: NaN"):
            channel_prune(model, broken)
        with pytest.raises(TdError, match="several batches are asked for"):
            channel_prune(model, images()[0])
        with pytest.raises(TdError, match="not what a model is called with; where: batch 0; got: list"):
            channel_prune(model, [[1.0]])
        with pytest.raises(TdError, match="samples must be a positive whole number; got: 0"):
            channel_prune(model, images(), samples=0)
        with pytest.raises(TdError, match="the model does not run with this batch; where: batch 1"):
            channel_prune(model, [images()[0], torch.ones(2, 5)])

    def test_activations_that_overflow(self) -> None:
        model = build("mlp")
        with torch.no_grad():
            model[2].bias[0] = float("inf")
        with pytest.raises(TdError, match="the samples are not finite; where: batch 0, what 2 computes; got: infinity"):
            channel_prune(model, vectors())

    def test_what_is_to_go(self) -> None:
        model = build("mlp")
        with pytest.raises(TdError, match=r"nothing to remove; where: Sequential; got: 0: γ and rounding leave all"):
            channel_prune(model, vectors(), 0.0)
        with pytest.raises(TdError, match="must be a fraction"):
            channel_prune(model, vectors(), 1.5)
        with pytest.raises(TdError, match="no units of that name; where: 7; "):
            channel_prune(model, vectors(), {"7": 0.5})
        with pytest.raises(TdError, match="units that no layer's input"):
            channel_prune(model, vectors(), kinds=("hidden",))
        with pytest.raises(TdError, match="nothing to remove"):
            channel_prune(model, vectors(), kinds=("channels",))

    def test_without_scikit_learn(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "sklearn", None)
        with pytest.raises(TdError, match=r"pip install 'td-plugin\[lasso\]'"):
            channel_prune(build("mlp"), vectors())
