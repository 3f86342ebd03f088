"""The shrunk model computes what the model with silenced units computes, in fewer parameters."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from cases import DISTIL, IMAGE, TEXT
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    PreTrainedModel,
    RobertaConfig,
    RobertaForTokenClassification,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.pytorch_utils import Conv1D

import td_plugin as td
from td_plugin.errors import TdError
from td_plugin.export import shrink
from td_plugin.export.shrink import runtime_width
from td_plugin.structure import Residue, Size, Slice, UnitGroup, refused_groups, unit_groups

CASES: dict[str, tuple[type[PreTrainedModel], Any, int]] = {
    # class, configuration, width of the residual stream
    "bert": (BertForSequenceClassification, BertConfig(**TEXT), 24),
    "bert tied": (BertForMaskedLM, BertConfig(**TEXT), 24),
    "roberta": (RobertaForTokenClassification, RobertaConfig(**TEXT), 24),
    "distilbert": (DistilBertForSequenceClassification, DistilBertConfig(**DISTIL), 24),
    "vit": (ViTForImageClassification, ViTConfig(**IMAGE), 24),
    "vit without qkv bias": (ViTForImageClassification, ViTConfig(**IMAGE, qkv_bias=False), 24),
}
KEPT = {"neurons": [[0, 3, 29], list(range(1, 30)), [7]], "heads": [[1], [0, 2, 3], [2, 3]]}


def build(case: str, attention: str = "sdpa") -> PreTrainedModel:
    torch.manual_seed(0)
    cls, config, _ = CASES[case]
    config = copy.deepcopy(config)
    config._attn_implementation = attention
    model = cls(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # transformers starts biases at zero and weights tiny
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    if isinstance(model, ViTForImageClassification):
        return {"pixel_values": torch.randn(3, 1, 8, 8, generator=generator)}
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[1, 4:] = 0
    return {"input_ids": torch.randint(3, 40, (3, 7), generator=generator), "attention_mask": mask}


def kept_units(model: nn.Module) -> dict[str, list[int]]:
    """Another set of units for every layer."""
    counts = {"neurons": 0, "heads": 0}
    kept = {}
    for group in unit_groups(model):
        kept[group.name] = KEPT[group.kind][counts[group.kind]]
        counts[group.kind] += 1
    return kept


def silence(model: nn.Module, kept: dict[str, list[int]], biases: bool = True) -> nn.Module:
    """A copy with every unit outside `kept` zeroed."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for group in unit_groups(model):
            gone = [unit for unit in range(group.units) if unit not in kept[group.name]]
            for part in group.ranked + (group.carried if biases else ()):
                tensor = model.get_parameter(part.fqn).movedim(part.dim, 0)
                tensor.reshape(group.units, part.span, *tensor.shape[1:])[gone] = 0
    return model


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("case", CASES)
def test_transformers_shrunk_equals_masked(case: str, attention: str) -> None:
    dense = build(case, attention)
    batch, kept = inputs(dense), kept_units(dense)
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    masked = silence(dense, kept)
    small = shrink(masked)

    # The oracle: the dense model, whose dropped units are zeroed where they are read.
    hooks = []
    for group in unit_groups(dense):
        (reader,) = group.consumers
        keep = torch.zeros(group.units).index_fill(0, torch.tensor(kept[group.name]), 1).repeat_interleave(reader.span)
        hooks.append(
            dense.get_submodule(reader.module).register_forward_pre_hook(lambda _, args, keep=keep: args[0] * keep)
        )
    with torch.no_grad():
        expected = dense(**batch).logits
        assert (masked(**batch).logits - expected).abs().max() < 1e-5
        assert (small(**batch).logits - expected).abs().max() < 1e-5
    for hook in hooks:
        hook.remove()
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.state_dict().items())

    assert type(small) is type(dense)
    assert [type(module) for module in small.modules()] == [type(module) for module in dense.modules()]
    assert small.state_dict().keys() == dense.state_dict().keys()
    head, width = 6, CASES[case][2]
    biases = 0 if case == "vit without qkv bias" else 3
    dropped = {group.name: group.units - len(kept[group.name]) for group in unit_groups(dense)}
    fewer = sum(
        count * (head * (4 * width + biases) if "attention" in name else 2 * width + 1)
        for name, count in dropped.items()
    )
    assert dense.num_parameters() - small.num_parameters() == fewer


@pytest.mark.parametrize("case", CASES)
def test_attributes_that_state_widths_follow(case: str) -> None:
    small = shrink(silence(build(case), kept_units(build(case))))
    assert [group.units for group in unit_groups(small) if group.kind == "heads"] == [1, 3, 2]
    for group in unit_groups(small):
        for size in group.sizes:
            assert getattr(small.get_submodule(size.module), size.attribute) == group.units * size.per_unit


@pytest.mark.parametrize("case", CASES)
def test_biases_left_by_other_pruners_are_folded(case: str) -> None:
    """A head without weights still emits its value bias, a neuron act(bias)."""
    dense = build(case)
    masked = silence(dense, kept_units(dense), biases=False)
    small = shrink(masked)
    with torch.no_grad():
        expected = masked(**inputs(dense)).logits
        assert (small(**inputs(dense)).logits - expected).abs().max() < 1e-5
    assert small.num_parameters() < dense.num_parameters()


def test_shrunk_transformer_trains() -> None:
    dense = build("bert")
    small = shrink(silence(dense, kept_units(dense))).train()
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1)
    before = {name: parameter.detach().clone() for name, parameter in small.named_parameters()}
    small(**inputs(dense), labels=torch.tensor([0, 1, 0])).loss.backward()
    assert all(parameter.grad is not None for parameter in small.parameters())
    optimizer.step()
    assert any(not torch.equal(parameter, before[name]) for name, parameter in small.named_parameters())


def test_from_the_sparsifier_masked_or_squashed() -> None:
    model = build("bert")
    sparsifier = td.TargetedDropout(td.recipes.targeted_unit(drop_rate=0.9), sparsity_level=0.5)
    sparsifier.prepare(model)
    sparsifier.step()
    model.eval()
    with torch.no_grad():
        expected = model(**inputs(model)).logits
    from_masked = shrink(model)
    sparsifier.squash_mask()
    from_squashed = shrink(model)
    for small in (from_masked, from_squashed):
        assert {group.units for group in unit_groups(small)} == {15, 2}
        assert [type(module) for module in small.modules()] == [type(module) for module in model.modules()]
        with torch.no_grad():
            assert (small(**inputs(model)).logits - expected).abs().max() < 1e-5


def warmed(*layers: nn.Module, shape: Sequence[int]) -> nn.Sequential:
    """A chain whose norms have seen data and have scales and shifts of their own."""
    model = nn.Sequential(*layers)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
        for _ in range(3):
            model(torch.randn(16, *shape) + 0.5)
    return model.eval()


def mlp(act: nn.Module, norm: bool = False, affine: bool = True, bias: bool = True) -> nn.Sequential:
    norms = [nn.BatchNorm1d(12, affine=affine), nn.BatchNorm1d(9, affine=affine)] if norm else [nn.Identity()] * 2
    return warmed(
        nn.Linear(6, 12, bias=bias), norms[0], act, nn.Dropout(0.5),
        nn.Sequential(nn.Linear(12, 9, bias=bias), norms[1], act), nn.Linear(9, 4, bias=bias), shape=(6,),
    )  # fmt: skip


MLPS = {
    "relu": lambda: mlp(nn.ReLU()),
    "gelu": lambda: mlp(nn.GELU()),
    "sigmoid": lambda: mlp(nn.Sigmoid()),
    "softplus, no bias": lambda: mlp(nn.Softplus(), bias=False),
    "in-place relu, norm": lambda: mlp(nn.ReLU(inplace=True), norm=True),
    "sigmoid, norm": lambda: mlp(nn.Sigmoid(), norm=True),
    "norm without scale": lambda: mlp(nn.ReLU(), norm=True, affine=False),
    "norm without scale, no bias": lambda: mlp(nn.Tanh(), norm=True, affine=False, bias=False),
    "prelu": lambda: mlp(nn.PReLU()),
}


@pytest.mark.parametrize("biases", [True, False], ids=["silenced", "weights only"])
@pytest.mark.parametrize("case", MLPS)
def test_mlp_shrunk_equals_masked(case: str, biases: bool) -> None:
    torch.manual_seed(2)
    dense = MLPS[case]()
    masked = silence(dense, {"0": [1, 2, 5, 11], "4.0": [0, 8]}, biases)
    small = shrink(masked)
    x = torch.randn(10, 6)
    assert (small(x) - masked(x)).abs().max() < 1e-5
    assert [small[0].out_features, small[4][0].in_features, small[4][0].out_features] == [4, 4, 2]
    assert (small[0].weight.shape, small[5].weight.shape) == ((4, 6), (4, 2))
    assert not small.training
    assert [type(module) for module in small.modules()] == [type(module) for module in dense.modules()]


def conv_chain(affine: bool, padding: int, bias: bool) -> nn.Sequential:
    return warmed(
        nn.Conv2d(2, 10, 3, padding=1, bias=bias), nn.BatchNorm2d(10, affine=affine), nn.ReLU(),
        nn.MaxPool2d(2, padding=1),
        nn.Conv2d(10, 8, 3, padding=padding, bias=bias), nn.BatchNorm2d(8, affine=affine), nn.SiLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(), nn.Linear(32, 7), nn.Tanh(), nn.Linear(7, 3),
        shape=(2, 8, 8),
    )  # fmt: skip


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("affine", "padding", "biases"), [(True, 1, True), (True, 0, False), (False, 0, True)])
def test_conv_chain_shrunk_equals_masked(affine: bool, padding: int, biases: bool, bias: bool) -> None:
    torch.manual_seed(3)
    dense = conv_chain(affine, padding, bias)
    masked = silence(dense, {"0": [0, 4, 9], "4": [1, 2, 3, 7], "10": [6, 2]}, biases)
    small = shrink(masked)
    x = torch.randn(5, 2, 8, 8)
    assert (small(x) - masked(x)).abs().max() < 1e-5
    widths = [small[0].out_channels, small[1].num_features, small[4].in_channels, small[4].out_channels]
    assert [*widths, small[10].in_features, small[10].out_features] == [3, 3, 3, 4, 16, 2]
    assert small[5].running_var.shape == (4,)


def test_conv1d_chain_with_circular_padding() -> None:
    torch.manual_seed(4)
    layers = [nn.Conv1d(2, 6, 3), nn.Sigmoid(), nn.Conv1d(6, 5, 3, padding=1, padding_mode="circular"), nn.ELU()]
    masked = silence(warmed(*layers, nn.Flatten(), nn.Linear(40, 3), shape=(2, 10)), {"0": [1], "2": [0, 3]})
    small, x = shrink(masked), torch.randn(4, 2, 10)
    assert (small(x) - masked(x)).abs().max() < 1e-5


def test_transposed_weights_are_cut_along_the_dimensions_a_group_names() -> None:
    """GPT-2's `Conv1D` keeps its weight as [in, out]; the cutting code knows only dimensions."""
    torch.manual_seed(6)
    model = nn.Sequential(Conv1D(7, 4), nn.Sigmoid(), Conv1D(3, 7)).eval()
    with torch.no_grad():
        model[0].weight[:, [0, 5]] = 0
        model[0].bias.add_(torch.randn(7))
    x = torch.randn(5, 4)
    group = UnitGroup(
        name="0",
        kind="neurons",
        units=7,
        ranked=(Slice("0", "weight", 1),),
        carried=(Slice("0", "bias", 0),),
        consumers=(Slice("2", "weight", 0),),
        statistics=(),
        sizes=(Size("0", "nf"), Size("2", "nx")),
        residue=Residue("0", ("1",)),
    )
    small = shrink(model, groups=[group], round_to=1)
    assert (small(x) - model(x)).abs().max() < 1e-5
    assert (small[0].weight.shape, small[2].weight.shape) == ((4, 5), (5, 3))
    assert (small[0].nf, small[2].nx) == (5, 5)


@pytest.mark.parametrize("padding", [1, "same"])
def test_a_constant_before_zero_padding_is_refused(padding: int | str) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Sigmoid(), nn.Conv2d(4, 2, 3, padding=padding))
    with torch.no_grad():
        model[0].weight[1], model[0].bias[1] = 0, 0
    with pytest.raises(TdError, match="pads with zeros"):
        shrink(model)
    assert shrink(nn.Sequential(model[0], nn.Tanh(), model[2]))[0].out_channels == 3


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_chain_any_units(data: st.DataObject) -> None:
    seed = data.draw(st.integers(0, 2**16))
    torch.manual_seed(seed)
    conv = data.draw(st.booleans())
    widths = data.draw(st.lists(st.integers(1, 9), min_size=3, max_size=5))
    acts = st.sampled_from([nn.ReLU, nn.GELU, nn.Sigmoid, nn.Softplus, nn.Identity])
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(widths):
        bias = data.draw(st.booleans())
        layers.append(nn.Conv1d(fan_in, fan_out, 2, bias=bias) if conv else nn.Linear(fan_in, fan_out, bias=bias))
        if data.draw(st.booleans()):
            layers.append(nn.BatchNorm1d(fan_out, affine=data.draw(st.booleans())))
        layers.append(data.draw(acts)())
    if conv:
        length = 12 - (len(widths) - 1)
        layers += [nn.Flatten(), nn.Linear(widths[-1] * length, 3)]
    shape = (widths[0], 12) if conv else (widths[0],)
    dense = warmed(*layers, shape=shape)
    kept = {
        group.name: sorted(data.draw(st.sets(st.integers(0, group.units - 1), min_size=1)))
        for group in unit_groups(dense)
    }
    masked = silence(dense, kept, data.draw(st.booleans()))
    assert refused_groups(dense) == {}
    if all(len(kept[group.name]) == group.units for group in unit_groups(dense)):
        return
    small, x = shrink(masked, round_to=1), torch.randn(4, *shape)
    scale = max(1.0, float(masked(x).detach().abs().max()))
    assert (small(x) - masked(x)).abs().max() < 1e-5 * scale
    assert [group.units for group in unit_groups(small)] == [len(units) for units in kept.values()]


@pytest.mark.parametrize(
    ("kind", "keep", "dense", "width"),
    [
        ("neurons", 101, 255, 101),
        ("neurons", 101, 256, 112),
        ("neurons", 5, 256, 64),
        ("neurons", 1020, 3072, 1040),
        ("neurons", 1020, 1024, 1024),
        ("neurons", 2048, 3072, 2064),
        ("neurons", 250, 256, 256),
        ("channels", 17, 31, 17),
        ("channels", 17, 32, 32),
        ("channels", 17, 64, 32),
        ("heads", 5, 12, 5),
    ],
)
def test_runtime_width(kind: str, keep: int, dense: int, width: int) -> None:
    assert runtime_width(kind, keep, dense) == width


@pytest.mark.parametrize(("stay", "width"), [(1, 16), (17, 32), (33, 48), (48, 48), (50, 64)])
def test_channels_are_kept_in_blocks_of_sixteen(stay: int, width: int) -> None:
    """What onnxruntime's convolutions compute in; the outputs are those of the masked model all the same."""
    layers = [nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 24, 3)]
    dense = warmed(*layers, shape=(3, 8, 8))
    masked, x = silence(dense, {"0": list(range(5, 5 + stay))}), torch.randn(2, 3, 8, 8)
    if stay == 50:
        with pytest.raises(TdError, match="rounding up keeps every zero unit"):
            shrink(masked)
        return
    small = shrink(masked)
    assert (small[0].out_channels, small[3].in_channels, small[3].out_channels) == (width, width, 24)
    assert (small(x) - masked(x)).abs().max() < 1e-5


@pytest.mark.parametrize(("round_to", "width"), [(None, 64), (1, 50), (8, 56), (100, 100)])
def test_rounding_keeps_some_zero_units_and_the_outputs(round_to: int | None, width: int) -> None:
    torch.manual_seed(5)
    dense = nn.Sequential(nn.Linear(6, 300), nn.Sigmoid(), nn.Linear(300, 9), nn.ReLU(), nn.Linear(9, 2))
    masked = silence(dense, {"0": list(range(3, 53)), "2": [0, 1]})
    small, x = shrink(masked, round_to=round_to), torch.randn(4, 6)
    assert small[0].out_features == width
    assert (small(x) - masked(x)).abs().max() < 1e-5


def test_at_least_one_unit_stays() -> None:
    dense = build("bert")
    masked = silence(dense, {group.name: [] for group in unit_groups(dense)})
    small = shrink(masked)
    assert {group.units for group in unit_groups(small)} == {1}
    assert (small(**inputs(dense)).logits - masked(**inputs(dense)).logits).abs().max() < 1e-5


def test_mode_dtype_and_requires_grad_are_kept() -> None:
    masked = silence(mlp(nn.Sigmoid()).to(torch.float64), {"0": [1], "4.0": [2, 3]})
    masked.train()
    masked[2].eval()
    masked[0].weight.requires_grad_(False)
    masked[5].bias.requires_grad_(False)
    small = shrink(masked)
    assert [module.training for module in small.modules()] == [module.training for module in masked.modules()]
    assert {parameter.dtype for parameter in small.parameters()} == {torch.float64}
    flags = {name: parameter.requires_grad for name, parameter in masked.named_parameters()}
    assert {name: parameter.requires_grad for name, parameter in small.named_parameters()} == flags


def test_nothing_to_remove_is_an_error_with_the_reason() -> None:
    dense = build("bert")
    with pytest.raises(TdError, match="no unit is zero"):
        shrink(dense)
    with pytest.raises(TdError, match="no unit is zero"):
        shrink(shrink(silence(dense, kept_units(dense))))
    with pytest.raises(TdError, match=r"no units of a known structure.*LSTM"):
        shrink(nn.LSTM(3, 4))
    with pytest.raises(TdError, match="1 is behind it: LayerNorm is neither"):
        shrink(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)))
    model = silence(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), {"0": [0, 1, 2]})
    with pytest.raises(TdError, match=r"rounding up keeps every zero unit.*round_to=1"):
        shrink(model, round_to=4)
    with pytest.raises(TdError, match=r"round_to.*got: 0"):
        shrink(model, round_to=0)
