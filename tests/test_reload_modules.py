"""Checkpoints of ordinary modules of any structure, and records that are damaged or made up."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import TEXT
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM

from td_plugin.errors import TdError
from td_plugin.export import load_into, load_pretrained, save_pretrained


class Recurrent(nn.Module):
    """An LSTM and a GRU of any hidden size; the head reads both."""

    def __init__(self, hidden: int = 12, gated: int = 10) -> None:
        super().__init__()
        self.lstm = nn.LSTM(5, hidden, num_layers=2, batch_first=True, bidirectional=True)
        self.gru = nn.GRU(2 * hidden, gated, batch_first=True, bias=False)
        self.head = nn.Linear(gated, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden, _ = self.gru(self.lstm(x)[0])
        out: Tensor = self.head(hidden)
        return out


class Blocks(nn.Module):
    """Residual convolutions with batch norm and groups, in a list; one table is used twice."""

    def __init__(self, channels: int = 8, hidden: tuple[int, ...] = (12, 12, 12)) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels, width, 1, bias=False),
                nn.BatchNorm2d(width),
                nn.GELU(),
                nn.Conv2d(width, width, 3, padding=1, groups=width),
                nn.GroupNorm(width // 2, width),
                nn.Conv2d(width, channels, 1),
            )
            for width in hidden
        )
        self.norm = nn.LayerNorm(channels)
        self.one = nn.Linear(channels, channels)
        self.other = nn.Linear(channels, channels)
        self.other.weight = self.one.weight
        self.register_buffer("scale", torch.rand(channels))
        self.register_buffer("offset", torch.zeros(4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        x = self.norm(x.mean((2, 3)) * self.scale)
        out: Tensor = self.other(torch.relu(self.one(x)))
        return out


INPUTS = {"recurrent": torch.randn(2, 4, 5), "blocks": torch.randn(2, 3, 6, 6)}
MODULES: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    "recurrent": (lambda: Recurrent(7, 3), Recurrent),
    "blocks": (lambda: Blocks(8, (4, 12, 6)), Blocks),
    "fewer blocks, narrower stream": (lambda: Blocks(6, (12, 2)), Blocks),
}


def randomized(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor))
    model.get_buffer("offset").zero_() if isinstance(model, Blocks) else None
    return model


@pytest.mark.parametrize("case", MODULES)
def test_a_module_of_other_sizes_comes_back_from_its_dense_form(case: str, tmp_path: Path) -> None:
    build, factory = MODULES[case]
    small, inputs = randomized(build()).eval(), INPUTS["recurrent" if case == "recurrent" else "blocks"]
    save_pretrained(small, tmp_path)
    dense = factory()
    for loaded in (load_into(tmp_path, factory), load_pretrained(tmp_path, module=dense)):
        assert not loaded.training
        assert torch.equal(loaded(inputs), small(inputs))
        assert str(loaded) == str(small)  # every width that the modules state
        a, b = loaded.state_dict(), small.state_dict()
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
        assert all(p.requires_grad for p in loaded.parameters())
        if isinstance(loaded, Blocks):
            assert loaded.one.weight is loaded.other.weight
        loaded(inputs).sum().backward()
    assert str(dense) == str(factory())
    assert load_pretrained(tmp_path, module=factory(), dtype=torch.float64)(inputs.double()).dtype is torch.float64


def test_biases_gained_and_lost(tmp_path: Path) -> None:
    gained = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2, bias=False))
    gained[2].bias = nn.Parameter(torch.randn(2))
    gained[0].bias = None
    save_pretrained(gained, tmp_path)
    loaded = load_into(tmp_path, lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2, bias=False)))
    assert loaded[0].bias is None
    assert torch.equal(loaded[2].bias, gained[2].bias)


def test_the_kinds_of_layers_are_compared(tmp_path: Path) -> None:
    """A chain that lost its first layer has other kinds at the same places: never loaded as if it had lost the last."""
    layers = [nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)]
    save_pretrained(nn.Sequential(*layers[2:]), tmp_path)
    with pytest.raises(TdError, match="1: Tanh where the dense model has ReLU"):
        load_into(tmp_path, lambda: nn.Sequential(*layers))


def test_a_module_that_is_no_smaller_form(tmp_path: Path) -> None:
    save_pretrained(Recurrent(7, 3), tmp_path / "recurrent")
    with pytest.raises(TdError, match="does not fit Blocks"):
        load_into(tmp_path / "recurrent", Blocks)
    with pytest.raises(TdError, match=r"does not fit the module.*at most \[6, 24\]"):
        load_into(tmp_path / "recurrent", lambda: Recurrent(12, 2))
    cut = Blocks()
    cut.offset = torch.zeros(3)
    save_pretrained(cut, tmp_path / "cut")
    with pytest.raises(TdError, match="offset: a buffer that checkpoints do not hold is cut"):
        load_into(tmp_path / "cut", Blocks)
    with pytest.raises(TdError, match=r"has no td_pruning.json"):
        load_into(tmp_path, Blocks)


def test_options_of_transformers_are_refused_for_modules(tmp_path: Path) -> None:
    for options in ({"auto_map": True}, {"max_shard_size": "1MB"}):
        with pytest.raises(TdError, match="an option of transformers checkpoints"):
            save_pretrained(Recurrent(), tmp_path / "model", **options)
    assert not (tmp_path / "model").exists()
    save_pretrained(Recurrent(), tmp_path)
    with pytest.raises(TdError, match="device_map"):
        load_pretrained(tmp_path, module=Recurrent(), device_map="cpu")


RECORDS: dict[str, tuple[dict[str, Any], str]] = {
    "part of a wrong type": ({"tensors": [1]}, "td_pruning: tensors; got: of a wrong type"),
    "unknown tensor": ({"tensors": {"bert.nothing": [3]}}, "tensors.bert.nothing; got: no such tensor"),
    "unknown module": ({"tensors": {"nowhere.weight": [3]}}, "tensors.nowhere.weight; got: no such module"),
    "a module's method as module": ({"tensors": {"bert.forward.x": [3]}}, "no such module"),
    "size below zero": ({"tensors": {"bert.embeddings.LayerNorm.bias": [-1]}}, r"\[-1\] is no shape"),
    "size of a wrong type": ({"tensors": {"bert.embeddings.LayerNorm.bias": ["24"]}}, "is no shape"),
    "shape no list": ({"tensors": {"bert.embeddings.LayerNorm.bias": 24}}, "24 is no shape"),
    "size too large": ({"tensors": {"bert.embeddings.LayerNorm.bias": [10**15]}}, r"at most \[24\]"),
    "another number of dimensions": ({"tensors": {"bert.embeddings.LayerNorm.bias": [24, 1]}}, r"at most \[24\]"),
    "unknown attribute": ({"attributes": {"bert.embeddings.nothing": 3}}, "got: no such attribute"),
    "attribute of an unknown module": ({"attributes": {"bert.nothing.size": 3}}, "got: no such module"),
    "private attribute": ({"attributes": {"bert._modules": 3}}, "got: no such attribute"),
    "a method": ({"attributes": {"forward": 3}}, "got: no such attribute"),
    "a mode": ({"attributes": {"training": True}}, "got: no such attribute"),
    "an object": ({"attributes": {"config": 3}}, "an attribute that is BertConfig"),
    "object for a number": ({"attributes": {"bert.embeddings.LayerNorm.eps": {"a": 1}}}, "an attribute that is float"),
    "text for a number": ({"attributes": {"bert.embeddings.LayerNorm.eps": "1"}}, "an attribute that is float"),
    "number for a truth value": (
        {"attributes": {"bert.embeddings.LayerNorm.elementwise_affine": 1}},
        "an attribute that is bool",
    ),
    "no shape for a shape": ({"attributes": {"bert.embeddings.LayerNorm.normalized_shape": [-2]}}, "is no shape"),
    "longer list": ({"lengths": {"bert.encoder.layer": 4}}, "lengths.bert.encoder.layer; got: 4; at most 3"),
    "length below zero": ({"lengths": {"bert.encoder.layer": -1}}, "got: -1; at most 3"),
    "length of no list": ({"lengths": {"bert.encoder": 1}}, "got: no such list"),
    "unknown module removed": ({"removed": ["bert.nothing"]}, "removed.bert.nothing; got: no such"),
    "removed of a wrong type": ({"removed": {"bert": 1}}, "td_pruning: removed; got: of a wrong type"),
    "tensor removed": ({"removed": ["bert.embeddings.LayerNorm.bias"]}, "unexpected_keys"),
}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bert")
    save_pretrained(BertForMaskedLM(BertConfig(**TEXT)), directory)
    return directory


@pytest.mark.parametrize("case", RECORDS)
def test_a_made_up_record_is_one_error(case: str, bert: Path) -> None:
    record, message = RECORDS[case]
    file = bert / "config.json"
    config = json.loads(file.read_text()) | {"td_pruning": {"format": 2} | record}
    file.write_text(json.dumps(config))
    with pytest.raises(TdError, match=message) as error:
        load_pretrained(bert)
    assert str(bert) in str(error.value)


MODULE_RECORDS: dict[str, tuple[str, str, Any, str]] = {
    "class of another type": ("modules", "lstm", 3, "modules.lstm; got: 3"),
    "length no number": ("lengths", "blocks", "2", "lengths.blocks"),
    "size below zero": ("tensors", "head.weight", [-1, 3], "tensors.head.weight"),
    "size of a wrong type": ("tensors", "head.weight", [3.0, 3], "tensors.head.weight"),
    "attribute an object": ("attributes", "head.in_features", {}, "attributes.head.in_features"),
    "attribute unknown": ("attributes", "head.colour", 3, r"\['head.colour'\]"),
    "attribute of a wrong type": ("attributes", "head.in_features", [3], "for|an attribute that is int"),
    "tensor unknown": ("tensors", "head.colour", [3], "tensors.head.colour: no such tensor"),
    "module unknown": ("modules", "neck", "Linear", "Linear where the dense model has nothing"),
}


@pytest.mark.parametrize("case", MODULE_RECORDS)
def test_a_made_up_record_of_a_module_is_one_error(case: str, tmp_path: Path) -> None:
    part, name, value, message = MODULE_RECORDS[case]
    save_pretrained(Recurrent(7, 3), tmp_path)
    record = json.loads((tmp_path / "td_pruning.json").read_text())
    record[part][name] = value
    (tmp_path / "td_pruning.json").write_text(json.dumps(record))
    with pytest.raises(TdError, match=message):
        load_into(tmp_path, Recurrent)
