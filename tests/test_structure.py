"""Units found in a model, and the reasons for those that are refused."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertForTokenClassification,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from td_plugin.structure import refused_groups, unit_groups

TEXT = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 20}
DISTIL = {"vocab_size": 40, "dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 20}
IMAGE = {"image_size": 8, "patch_size": 4, "num_channels": 1}
IMAGE |= {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 20}


@pytest.mark.parametrize(
    ("model", "prefix", "neurons", "heads"),
    [
        (
            BertForSequenceClassification(BertConfig(**TEXT)),
            "bert.encoder.layer.1.",
            "intermediate.dense",
            "attention.self",
        ),
        (BertForMaskedLM(BertConfig(**TEXT)), "bert.encoder.layer.1.", "intermediate.dense", "attention.self"),
        (BertModel(BertConfig(**TEXT)), "encoder.layer.1.", "intermediate.dense", "attention.self"),
        (
            RobertaForSequenceClassification(RobertaConfig(**TEXT)),
            "roberta.encoder.layer.1.",
            "intermediate.dense",
            "attention.self",
        ),
        (
            DistilBertForTokenClassification(DistilBertConfig(**DISTIL)),
            "distilbert.transformer.layer.1.",
            "ffn.lin1",
            "attention",
        ),
        (ViTForImageClassification(ViTConfig(**IMAGE)), "vit.layers.1.", "mlp.fc1", "attention"),
        (ViTModel(ViTConfig(**IMAGE)), "layers.1.", "mlp.fc1", "attention"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_families_have_neurons_and_heads_in_every_layer(
    model: PreTrainedModel, prefix: str, neurons: str, heads: str
) -> None:
    groups = {group.name: group for group in unit_groups(model)}
    assert refused_groups(model) == {}
    assert len(groups) == 4
    assert (groups[prefix + neurons].kind, groups[prefix + neurons].units) == ("neurons", 20)
    assert (groups[prefix + heads].kind, groups[prefix + heads].units) == ("heads", 4)
    assert [part.span for part in groups[prefix + heads].slices] == [4] * 7  # q, k, v with biases, and the consumer
    state = model.state_dict()
    for group in groups.values():
        for part in group.slices:
            assert state[part.fqn].shape[part.dim] == group.units * part.span
        for size in group.sizes:
            module = model.get_submodule(size.module)
            assert getattr(module, size.attribute) == group.units * size.per_unit


def test_silencing_a_unit_changes_nothing_else() -> None:
    """What belongs to a unit is exactly what its output depends on: the other units' outputs stay as they were."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3)).eval()
    x = torch.randn(2, 2, 5, 5)
    before = model[:3](x)
    (group,) = unit_groups(model)
    assert group.kind == "channels"
    with torch.no_grad():
        for part in group.ranked + group.carried:
            model.get_parameter(part.fqn).select(part.dim, 1).zero_()
    after = model[:3](x)
    assert after[:, 1].abs().max() == 0
    assert torch.equal(after[:, [0, 2, 3]], before[:, [0, 2, 3]])
    assert group.consumers[0].span == 9


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x)


class OddLinear(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).flip(-1)


def test_chains_inside_a_custom_module_and_nested_containers() -> None:
    residual = nn.Sequential(nn.Linear(3, 4), Residual(), nn.Linear(4, 2))
    assert [group.name for group in unit_groups(residual)] == ["1.body.0"]
    assert "Residual is neither elementwise" in refused_groups(residual)["0"]
    nested = nn.Sequential(nn.Sequential(nn.Linear(3, 4), nn.Tanh()), nn.Sequential(nn.Dropout(), nn.Linear(4, 2)))
    assert [group.name for group in unit_groups(nested)] == ["0.0"]


def test_the_last_layer_is_no_group_and_unknown_models_have_none() -> None:
    assert unit_groups(nn.Sequential(nn.Linear(3, 2))) == []
    assert refused_groups(nn.Sequential(nn.ReLU(), nn.Linear(3, 2), nn.ReLU())) == {}
    assert unit_groups(nn.LSTM(3, 4)) == []
    assert unit_groups(nn.Linear(3, 4)) == []


SHARED = nn.Linear(4, 4)
TIED = nn.Linear(4, 4)
TIED.weight = SHARED.weight


@pytest.mark.parametrize(
    ("chain", "reason"),
    [
        ([nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)], "LayerNorm is neither elementwise"),
        ([nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4), nn.Conv2d(4, 2, 1)], "GroupNorm is neither elementwise"),
        ([nn.Linear(4, 4), nn.Softmax(-1), nn.Linear(4, 2)], "Softmax is neither elementwise"),
        ([nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(4, 2, 1)], "grouped"),
        ([nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, groups=4)], "1 reads it: its convolution is grouped"),
        ([nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 2)], "running statistics"),
        ([nn.Linear(4, 4), nn.BatchNorm1d(7), nn.Linear(4, 2)], "does not normalise the units"),
        ([nn.Conv2d(1, 4, 3), nn.Flatten(2), nn.Linear(9, 2)], "keeps other dimensions"),
        ([nn.Conv2d(1, 4, 3), nn.Linear(4, 2)], "no flatten"),
        ([nn.Conv2d(1, 4, 3), nn.AvgPool2d(3, padding=1), nn.Conv2d(4, 2, 1)], "averages its zero padding in"),
        ([nn.Conv2d(1, 4, 3), nn.AvgPool2d(3, divisor_override=2), nn.Conv2d(4, 2, 1)], "divisor"),
        ([nn.Linear(4, 4), nn.AvgPool1d(2), nn.Linear(2, 2)], "pools over units"),
        ([nn.Linear(4, 4), nn.Flatten(), nn.Linear(12, 2)], "mixes units"),
        ([nn.Conv1d(4, 4, 1), nn.PReLU(4), nn.Conv1d(4, 2, 1)], "slope per channel"),
        ([OddLinear(4, 4), nn.ReLU(), nn.Linear(4, 2)], "forward of its own"),
        ([nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.ReLU(), nn.Linear(4, 2)], "parametrization"),
        ([SHARED, nn.ReLU(), SHARED, nn.Linear(4, 2)], "shared with another module"),
        ([SHARED, nn.ReLU(), TIED], "shared with another module"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused_with_a_reason(chain: list[nn.Module], reason: str) -> None:
    model = nn.Sequential(*chain)
    assert unit_groups(model) == []
    assert reason in refused_groups(model)["0"]


def test_a_shared_activation_is_no_obstacle() -> None:
    act = nn.ReLU()
    model = nn.Sequential(nn.Linear(4, 5), act, nn.Linear(5, 6), act, nn.Linear(6, 2))
    assert [(group.name, group.residue.through) for group in unit_groups(model)] == [("0", ("1",)), ("2", ("3",))]


def test_structure_knows_no_transformers_class() -> None:
    assert "transformers" not in vars(sys.modules["td_plugin.structure"])
    assert "transformers" not in vars(sys.modules["td_plugin.families"])
