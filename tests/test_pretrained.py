"""Shrunk checkpoints come back bit for bit as stock classes; damaged or foreign ones are one error each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import DISTIL, IMAGE, TEXT
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    PreTrainedModel,
    RobertaConfig,
    RobertaForTokenClassification,
    ViTConfig,
    ViTForImageClassification,
)

import td_plugin as td
from td_plugin.errors import TdError
from td_plugin.export import load_pretrained, save_pretrained, shrink
from td_plugin.structure import unit_groups

MODELS: dict[str, tuple[type[PreTrainedModel], Any]] = {
    "bert": (BertForSequenceClassification, BertConfig(**TEXT)),
    "bert tied": (BertForMaskedLM, BertConfig(**TEXT)),
    "bert untied": (BertForMaskedLM, BertConfig(**TEXT, tie_word_embeddings=False)),
    "bert base": (BertModel, BertConfig(**TEXT)),
    "roberta": (RobertaForTokenClassification, RobertaConfig(**TEXT)),
    "distilbert": (DistilBertForSequenceClassification, DistilBertConfig(**DISTIL)),
    "vit": (ViTForImageClassification, ViTConfig(**IMAGE)),
}


def pruned(case: str, neurons: tuple[int, ...] = (3, 30, 11), heads: tuple[int, ...] = (1, 4, 2)) -> PreTrainedModel:
    """A shrunk model with these many units per layer."""
    torch.manual_seed(0)
    cls, config = MODELS[case]
    model = cls(type(config)(**config.to_dict())).eval()
    left = {"neurons": list(neurons), "heads": list(heads)}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        for group in unit_groups(model):
            keep = left[group.kind].pop(0)
            for part in group.ranked + group.carried:
                model.get_parameter(part.fqn).narrow(part.dim, 0, (group.units - keep) * part.span).zero_()
    return shrink(model)


def same(one: nn.Module, other: nn.Module) -> bool:
    """Names, shapes, precision and every bit of every tensor are equal."""
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def outputs(model: PreTrainedModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        if isinstance(model, ViTForImageClassification):
            result = model(torch.randn(2, 1, 8, 8, generator=generator).to(model.dtype))
        else:
            result = model(torch.randint(3, 40, (2, 6), generator=generator))
    return result[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", MODELS)
def test_round_trip_is_bit_exact(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    small = pruned(case).to(dtype)
    save_pretrained(small, tmp_path / "one")
    loaded = load_pretrained(tmp_path / "one")
    assert type(loaded) is MODELS[case][0]
    assert not loaded.training
    assert same(loaded, small)
    assert torch.equal(outputs(loaded), outputs(small))
    assert [g.units for g in unit_groups(loaded)] == [3, 1, 30, 4, 11, 2]
    for group in unit_groups(loaded):
        for size in group.sizes:
            assert getattr(loaded.get_submodule(size.module), size.attribute) == group.units * size.per_unit
    tied = case == "bert tied"
    if tied:
        assert loaded.cls.predictions.decoder.weight is loaded.bert.embeddings.word_embeddings.weight

    save_pretrained(loaded, tmp_path / "two")  # saving again gives the same checkpoint, with or without our help
    loaded.save_pretrained(tmp_path / "three")
    assert same(load_pretrained(tmp_path / "two"), small)
    assert same(load_pretrained(tmp_path / "three"), small)
    assert sorted(file.name for file in (tmp_path / "two").iterdir()) == ["config.json", "model.safetensors"]


def test_the_configuration_states_the_widths_per_layer(tmp_path: Path) -> None:
    small = pruned("distilbert")
    save_pretrained(small, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    record = config["td_pruning"]
    assert record["layers"] == {"0": {"hidden_dim": 3, "n_heads": 1}, "2": {"hidden_dim": 11, "n_heads": 2}}
    assert record["tensors"]["distilbert.transformer.layer.2.ffn.lin1.weight"] == [11, 24]
    assert record["attributes"]["distilbert.transformer.layer.0.attention.n_heads"] == 1
    assert not [name for part in ("tensors", "attributes") for name in record[part] if "layer.1." in name]
    assert (config["hidden_dim"], config["n_heads"]) == (30, 4)
    assert "td_pruning" not in small.config.to_dict()


@pytest.mark.parametrize("case", ["bert", "distilbert", "vit"])
def test_a_dense_model_is_saved_as_stock(case: str, tmp_path: Path) -> None:
    cls, config = MODELS[case]
    dense = cls(config).eval()
    save_pretrained(dense, tmp_path)
    assert "td_pruning" not in json.loads((tmp_path / "config.json").read_text())
    assert same(load_pretrained(tmp_path), dense)
    assert same(cls.from_pretrained(tmp_path), dense)


@pytest.mark.parametrize(
    ("case", "heads"),
    [("bert", (4, 4, 4)), ("distilbert", (4, 4, 4)), ("roberta", (4, 4, 4)), ("vit", (4, 4, 4)), ("vit", (3, 3, 3))],
)
def test_equal_widths_load_with_stock_transformers(case: str, heads: tuple[int, ...], tmp_path: Path) -> None:
    small = pruned(case, neurons=(7, 7, 7), heads=heads)
    save_pretrained(small, tmp_path)
    assert "td_pruning" not in json.loads((tmp_path / "config.json").read_text())
    stock = type(small).from_pretrained(tmp_path)
    assert same(stock, small)
    assert torch.equal(outputs(stock), outputs(small))
    assert same(load_pretrained(tmp_path), small)


def test_equal_heads_that_the_configuration_cannot_express(tmp_path: Path) -> None:
    small = pruned("bert", neurons=(7, 7, 7), heads=(2, 2, 2))
    save_pretrained(small, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["intermediate_size"], config["num_attention_heads"]) == (7, 4)
    assert config["td_pruning"]["layers"] == {str(layer): {"num_attention_heads": 2} for layer in range(3)}
    assert not [name for name in config["td_pruning"]["tensors"] if "intermediate" in name]
    assert same(load_pretrained(tmp_path), small)


def test_shrinking_a_loaded_model_again(tmp_path: Path) -> None:
    save_pretrained(pruned("bert"), tmp_path / "one")
    loaded = load_pretrained(tmp_path / "one")
    with torch.no_grad():
        layer = loaded.bert.encoder.layer[1].intermediate.dense
        layer.weight[5:] = 0
        layer.bias[5:] = 0
    smaller = shrink(loaded)
    save_pretrained(smaller, tmp_path / "two")
    assert same(load_pretrained(tmp_path / "two"), smaller)
    assert [g.units for g in unit_groups(load_pretrained(tmp_path / "two"))] == [3, 1, 5, 4, 11, 2]


def test_an_encoder_decoder_pair_counts_its_layers_through(tmp_path: Path) -> None:
    config = EncoderDecoderConfig.from_encoder_decoder_configs(BertConfig(**TEXT), BertConfig(**TEXT))
    model = EncoderDecoderModel(config).eval()
    with torch.no_grad():
        for name in ("encoder.encoder.layer.1", "decoder.bert.encoder.layer.2"):
            dense = model.get_submodule(f"{name}.intermediate.dense")
            dense.weight[3:] = 0
            dense.bias[3:] = 0
    small = shrink(model)
    save_pretrained(small, tmp_path)
    assert same(load_pretrained(tmp_path), small)
    record = json.loads((tmp_path / "config.json").read_text())["td_pruning"]
    assert [layer["intermediate_size"] for layer in record["layers"].values()] == [30, 3, 30, 30, 30, 3]


def chain(hidden: int = 8) -> nn.Sequential:
    convolution = [nn.Conv1d(2, 6, 3), nn.BatchNorm1d(6), nn.Sigmoid(), nn.Conv1d(6, 5, 3, bias=False), nn.Flatten()]
    return nn.Sequential(*convolution, nn.Linear(30, hidden), nn.ReLU(), nn.Linear(hidden, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_ordinary_module_comes_back_in_its_dense_form_cut(dtype: torch.dtype, tmp_path: Path) -> None:
    model = chain()
    with torch.no_grad():
        model[0].weight[:2] = 0  # sigmoid(shift) remains: folding gives the second convolution a bias
        model[5].weight[3] = 0
        model[5].bias[3] = 0
    small = shrink(model.eval()).to(dtype)
    save_pretrained(small, tmp_path)
    dense = chain()
    loaded = load_pretrained(tmp_path, module=dense)
    assert same(loaded, small)
    assert torch.equal(loaded(torch.ones(2, 2, 10, dtype=dtype)), small(torch.ones(2, 2, 10, dtype=dtype)))
    assert (loaded[0].out_channels, loaded[3].in_channels, loaded[5].out_features) == (4, 4, 7)
    assert (dense[0].out_channels, dense[3].bias) == (6, None)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.safetensors", "td_pruning.json"]


def test_a_class_that_transformers_does_not_have_is_an_ordinary_module(tmp_path: Path) -> None:
    class MyBert(BertForMaskedLM):
        pass

    config = BertConfig(**TEXT)
    model = MyBert(config)
    save_pretrained(model, tmp_path)
    loaded = load_pretrained(tmp_path, module=MyBert(config))
    assert same(loaded, model)
    assert loaded.cls.predictions.decoder.weight is loaded.bert.embeddings.word_embeddings.weight


def edit_config(directory: Path, **changes: object) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_record(directory: Path, **changes: object) -> None:
    record = json.loads((directory / "config.json").read_text())["td_pruning"]
    edit_config(directory, td_pruning=record | changes)


def truncate(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def scramble(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(b"not a tensor file")


DAMAGE = {
    "config missing": (lambda d: (d / "config.json").unlink(), "has no config.json"),
    "config no JSON": (lambda d: (d / "config.json").write_text("{"), "cannot be read"),
    "config no object": (lambda d: (d / "config.json").write_text("[]"), "not a JSON object"),
    "config of a wrong type": (lambda d: edit_config(d, hidden_size="wide"), "cannot be loaded"),
    "architecture unknown": (lambda d: edit_config(d, architectures=["MyNet"]), "unknown architecture"),
    "architecture is no model": (lambda d: edit_config(d, architectures=["BertTokenizer"]), "unknown architecture"),
    "architecture missing": (lambda d: edit_config(d, architectures=None), "unknown architecture"),
    "another head": (lambda d: edit_config(d, architectures=["BertForMaskedLM"]), "not those of the model"),
    "another width": (lambda d: edit_config(d, hidden_size=48), "cannot be loaded"),
    "fewer layers": (lambda d: edit_config(d, num_hidden_layers=2), "no such module"),
    "more layers": (lambda d: edit_config(d, num_hidden_layers=4), "missing_keys"),
    "record missing": (lambda d: edit_config(d, td_pruning=None), "cannot be loaded"),
    "record no object": (lambda d: edit_config(d, td_pruning=[3]), "td_pruning; got: not a record"),
    "record of a later format": (lambda d: edit_record(d, format=3), "not a record of format 2"),
    "record empty": (lambda d: edit_config(d, td_pruning={"format": 2}), "cannot be loaded"),
    "weights missing": (lambda d: (d / "model.safetensors").unlink(), "cannot be loaded"),
    "weights truncated": (truncate, "cannot be loaded"),
    "weights scrambled": (scramble, "cannot be loaded"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_or_foreign_checkpoint_is_one_error(case: str, tmp_path: Path) -> None:
    save_pretrained(pruned("bert"), tmp_path)
    damage, message = DAMAGE[case]
    damage(tmp_path)
    with pytest.raises(TdError, match=message) as error:
        load_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value)


MODULE_DAMAGE = {
    "weights truncated": (truncate, "weights cannot be loaded"),
    "weights missing": (lambda d: (d / "model.safetensors").unlink(), "weights cannot be loaded"),
    "record no JSON": (lambda d: (d / "td_pruning.json").write_text("}"), "cannot be read"),
    "record of a later format": (lambda d: (d / "td_pruning.json").write_text('{"format": 3}'), "unknown or damaged"),
    "record without content": (lambda d: (d / "td_pruning.json").write_text('{"format": 2}'), "modules; got: missing"),
}


@pytest.mark.parametrize("case", MODULE_DAMAGE)
def test_a_damaged_module_checkpoint_is_one_error(case: str, tmp_path: Path) -> None:
    save_pretrained(chain(), tmp_path)
    damage, message = MODULE_DAMAGE[case]
    damage(tmp_path)
    with pytest.raises(TdError, match=message):
        load_pretrained(tmp_path, module=chain())


def test_a_module_that_does_not_fit(tmp_path: Path) -> None:
    save_pretrained(chain(), tmp_path / "module")
    with pytest.raises(TdError, match="needs the dense module"):
        load_pretrained(tmp_path / "module")
    with pytest.raises(TdError, match="does not fit Linear"):
        load_pretrained(tmp_path / "module", module=nn.Linear(3, 4))
    with pytest.raises(TdError, match="does not fit the module"):
        load_pretrained(tmp_path / "module", module=chain(hidden=7))
    save_pretrained(pruned("bert"), tmp_path / "bert")
    with pytest.raises(TdError, match="does not fit BertModel"):
        load_pretrained(tmp_path / "bert", module=BertModel(BertConfig(**TEXT)))


def test_no_directory_and_no_place_to_write(tmp_path: Path) -> None:
    with pytest.raises(TdError, match="no such directory"):
        load_pretrained(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(TdError, match="cannot be"):
        save_pretrained(chain(), tmp_path / "file" / "model")
    with pytest.raises(TdError, match="a file is there"):
        save_pretrained(pruned("bert"), tmp_path / "file")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_directory_holds_one_kind_of_checkpoint(tmp_path: Path) -> None:
    save_pretrained(chain(), tmp_path)
    with pytest.raises(TdError, match="another kind"):
        save_pretrained(pruned("bert"), tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.safetensors", "td_pruning.json"]


def test_a_masked_model_is_not_saved(tmp_path: Path) -> None:
    model = BertForSequenceClassification(BertConfig(**TEXT))
    sparsifier = td.TargetedDropout(td.recipes.targeted_unit(drop_rate=0.9), sparsity_level=0.5)
    sparsifier.prepare(model)
    with pytest.raises(TdError, match="carries masks"):
        save_pretrained(model, tmp_path / "masked")
    assert not (tmp_path / "masked").exists()


def test_a_failed_save_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_pretrained(pruned("bert"), tmp_path / "model")
    before = {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()}

    def fail(self: object, directory: Path) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(BertConfig, "save_pretrained", fail)
    with pytest.raises(OSError, match="no space"):
        save_pretrained(pruned("bert", heads=(2, 2, 2)), tmp_path / "model")
    assert {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()} == before
    assert [item.name for item in tmp_path.iterdir()] == ["model"]
