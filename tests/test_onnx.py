"""Export, verification and int8: parity at sizes the exporter never saw, and refusals that leave nothing behind."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2Model,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.pytorch_utils import Conv1D

from td_plugin.contract import TdError
from td_plugin.export.graph_widths import width_changes
from td_plugin.export.probes import make_probe_batches
from td_plugin.export.provenance import width_changes_of
from td_plugin.export.quantize import quantize
from td_plugin.export.quiet import quiet
from td_plugin.export.to_onnx import to_onnx
from td_plugin.export.verify import verify
from td_plugin.recipes import targeted_unit
from td_plugin.sparsifier import TargetedDropout

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def text(rows: int, length: int, seed: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(1, 99, (rows, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}


def bert(cls: type[PreTrainedModel] = BertForSequenceClassification, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    # A wide initialisation: with the usual one all logits are so small that any error would be within the tolerance.
    return cls(BertConfig(vocab_size=99, max_position_embeddings=32, initializer_range=0.3, num_labels=3, **SIZES))


def cut(linear: nn.Linear, rows: int, columns: int) -> nn.Linear:
    small = nn.Linear(columns, rows)
    small.weight.data = linear.weight.data[:rows, :columns].clone()
    small.bias.data = linear.bias.data[:rows].clone()
    return small


@pytest.fixture(scope="module")
def model() -> Any:
    return bert().train()


@pytest.fixture(scope="module")
def exported(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bert") / "model.onnx"
    return to_onnx(model, path, {**text(2, 32), "labels": torch.tensor([0, 1])}, metadata={"recipe": "dense"})


@pytest.fixture(scope="module")
def int8(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize(exported, tmp_path_factory.mktemp("int8") / "model.int8.onnx")


def metadata(path: Path) -> dict[str, str]:
    return {entry.key: entry.value for entry in onnx.load(path, load_external_data=False).metadata_props}


def axes(path: Path) -> dict[str, list[str | int]]:
    graph = onnx.load(path).graph
    return {
        value.name: [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }


class TestExport:
    @pytest.mark.parametrize("rows", [1, 5])
    @pytest.mark.parametrize("length", [1, 7, 32])
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_parity_at_other_sizes_and_paddings(self, model: Any, exported: Path, rows: int, length: int, side: str):
        batch = text(rows, length, seed=rows)
        padded = slice(0, length // 3) if side == "left" else slice(length - length // 3, length)
        batch["attention_mask"][0, padded] = 0
        session = ort.InferenceSession(str(exported))
        logits = session.run(["logits"], {name: value.numpy() for name, value in batch.items()})[0]
        with torch.no_grad():
            expected = model.eval()(**batch).logits
        model.train()
        assert expected.abs().max() > 0.05
        torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-5, atol=1e-5)

    def test_names(self, exported: Path):
        tokens = ["batch", "sequence"]
        assert axes(exported) == {**dict.fromkeys(text(1, 1), tokens), "logits": ["batch", 3]}

    def test_every_dynamic_size_is_named(self, exported: Path):
        sizes = {d.dim_param for v in onnx.load(exported).graph.value_info for d in v.type.tensor_type.shape.dim}
        assert {"batch", "sequence"} <= sizes <= {"batch", "sequence", ""} | {s for s in sizes if "sequence" in s}

    def test_one_file_without_masks_and_stages(self, exported: Path, model: Any):
        assert [file.name for file in exported.parent.iterdir()] == ["model.onnx"]
        weights = sum(parameter.numel() * 4 for parameter in model.parameters())
        assert weights < exported.stat().st_size < weights + 120_000
        onnx.checker.check_model(str(exported), full_check=True)

    def test_no_paths_of_this_machine(self, exported: Path):
        assert str(Path(torch.__file__).parents[1]).encode() not in exported.read_bytes()

    def test_metadata(self, exported: Path, model: Any):
        found = ort.InferenceSession(str(exported)).get_modelmeta().custom_metadata_map
        assert found["recipe"] == "dense"
        assert found["td-plugin.model_class"] == "BertForSequenceClassification"
        assert found["td-plugin.parameters"] == str(sum(parameter.numel() for parameter in model.parameters()))
        assert found["torch.version"] == torch.__version__

    def test_the_model_stays_as_it_was(self, tmp_path: Path):
        model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 4)).train()
        model[1].eval()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        to_onnx(model, tmp_path / "m.onnx", torch.randn(2, 8))
        assert [module.training for module in model.modules()] == [True, True, False, True]
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())

    def test_quiet(self, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
        monkeypatch.chdir(tmp_path)
        model = DistilBertForSequenceClassification(
            DistilBertConfig(vocab_size=99, dim=32, hidden_dim=64, n_layers=1, n_heads=4, max_position_embeddings=32)
        )
        example = {name: value for name, value in text(1, 1).items() if name != "token_type_ids"}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            path = to_onnx(model, "out/m.onnx", example)  # one row, one token: nothing may become a constant
        assert capfd.readouterr() == ("", "")
        assert sorted(p.name for p in tmp_path.rglob("*")) == ["m.onnx", "out"]
        assert verify(model, path, [text(4, 9)]).batches == 1

    def test_other_messages_get_through(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
        records: list[str] = []
        logger = logging.getLogger("torch.onnx._internal.exporter._registration")
        handler = logging.Handler()
        monkeypatch.setattr(handler, "emit", lambda record: records.append(record.getMessage()))
        logger.addHandler(handler)
        with pytest.warns(FutureWarning, match="something else"), quiet():
            logger.warning("torchvision is not installed. Skipping")
            logger.warning("news")
            print("[torch.onnx] Optimize the ONNX graph...")
            print("hello")
            warnings.warn("something else", FutureWarning, stacklevel=1)
        logger.removeHandler(handler)
        assert records == ["news"]
        assert capsys.readouterr().out == "hello\n"

    def test_images(self, tmp_path: Path):
        torch.manual_seed(0)
        vit = ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, initializer_range=0.3, **SIZES))
        path = to_onnx(vit, tmp_path / "vit.onnx", {"pixel_values": torch.randn(1, 3, 8, 8)})
        assert axes(path) == {"pixel_values": ["batch", 3, 8, 8], "logits": ["batch", 2]}
        report = verify(vit, path, [{"pixel_values": torch.randn(5, 3, 8, 8)}])
        assert report.max_abs < 1e-5

    def test_conv_net_with_batch_norm(self, tmp_path: Path):
        net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
        net(torch.randn(4, 3, 8, 8))  # statistics other than the initial ones
        path = to_onnx(net, tmp_path / "conv.onnx", (torch.randn(1, 3, 8, 8),))
        assert axes(path) == {"input": ["batch", 3, 8, 8], "logits": ["batch", 5]}
        assert verify(net, path, [{"input": torch.randn(7, 3, 8, 8)}]).max_abs < 1e-5

    def test_token_level_outputs_and_several_of_them(self, tmp_path: Path):
        model = bert(BertModel)
        path = to_onnx(model, tmp_path / "base.onnx", text(3, 12))
        assert axes(path)["last_hidden_state"] == ["batch", "sequence", 32]
        assert axes(path)["pooler_output"] == ["batch", 32]

    def test_unequal_widths_and_heads_per_layer(self, tmp_path: Path):
        model = bert()
        for layer, heads, neurons in zip(model.bert.encoder.layer, (3, 1), (48, 17), strict=True):
            attention, width = layer.attention.self, heads * 8
            attention.query, attention.key, attention.value = (
                cut(linear, width, 32) for linear in (attention.query, attention.key, attention.value)
            )
            attention.num_attention_heads, attention.all_head_size = heads, width
            layer.attention.output.dense = cut(layer.attention.output.dense, 32, width)
            layer.intermediate.dense = cut(layer.intermediate.dense, neurons, 32)
            layer.output.dense = cut(layer.output.dense, 32, neurons)
        path = to_onnx(model, tmp_path / "unequal.onnx", text(2, 16))
        assert verify(model, path, [text(3, 29)]).max_abs < 1e-5
        # The configuration still says how wide the dense layers are: the file tells, and so do its forms.
        told = json.loads(metadata(path)["td-plugin.widths"])
        layer = "bert.encoder.layer.{}.{}"
        assert told == {
            **{layer.format(0, f"attention.self.{name}"): [32, 24] for name in ("query", "key", "value")},
            **{layer.format(1, f"attention.self.{name}"): [32, 8] for name in ("query", "key", "value")},
            **{layer.format(index, "intermediate.dense"): [64, width] for index, width in enumerate((48, 17))},
        }
        small = quantize(path, tmp_path / "int8.onnx")
        assert width_changes({"int8": small}) == {"int8": {name: tuple(pair) for name, pair in told.items()}}

    def test_widths_that_nothing_states(self, exported: Path):
        assert "td-plugin.widths" not in metadata(exported)
        assert width_changes_of(nn.Sequential(nn.Linear(3, 4))) == {}
        convolutions = ResNetForImageClassification(
            ResNetConfig(embedding_size=8, hidden_sizes=(16, 16), depths=(1, 1))
        )
        assert width_changes_of(convolutions) == {}
        convolutions.resnet.embedder.embedder.convolution = nn.Conv2d(3, 5, 7)
        assert width_changes_of(convolutions) == {"resnet.embedder.embedder.convolution": (8, 5)}
        decoder = GPT2Model(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=9))
        decoder.h[0].mlp.c_fc = Conv1D(7, 8)
        assert width_changes_of(decoder) == {"h.0.mlp.c_fc": (32, 7)}

    def test_masks_are_baked_not_exported(self, tmp_path: Path):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 4))
        dense = to_onnx(model, tmp_path / "dense.onnx", torch.randn(2, 64))
        TargetedDropout(targeted_unit(drop_rate=0.9), sparsity_level=0.5).prepare(model)
        masked = to_onnx(model, tmp_path / "masked.onnx", torch.randn(2, 64))
        assert type(model[0]) is not nn.Linear  # still masked: training can go on
        assert masked.stat().st_size < dense.stat().st_size + 2000
        assert not any(node.op_type in ("Mul", "Where") for node in onnx.load(masked).graph.node)
        assert verify(model, masked, [{"input": torch.randn(9, 64)}]).max_abs < 1e-5
        with pytest.raises(TdError, match="does not compute"):
            verify(model, dense, [{"input": torch.randn(9, 64)}])


class TestRefusals:
    """Every refusal leaves the target as it was and nothing beside it."""

    MLP = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))

    def refused(self, tmp_path: Path, export: Callable[[Path], object], match: str) -> None:
        target = tmp_path / "model.onnx"
        target.write_bytes(b"what was there")
        with pytest.raises(TdError, match=match):
            export(target)
        assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
        assert target.read_bytes() == b"what was there"

    def test_a_file_that_differs(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        from td_plugin.export.to_onnx import _export

        def perturbed(*args: Any) -> Any:
            graph = _export(*args)
            bias = graph.graph.initializers["2.bias"]
            import onnx_ir

            bias.const_value = onnx_ir.tensor(bias.const_value.numpy() + 0.01, name=bias.name)
            return graph

        monkeypatch.setitem(to_onnx.__globals__, "_export", perturbed)
        self.refused(
            tmp_path,
            lambda path: to_onnx(self.MLP, path, torch.randn(2, 8)),
            r"does not compute.*model\.onnx; got: max difference 0\.01.*'logits'.*1x8.*tolerance is 0\.0001",
        )

    @pytest.mark.parametrize(
        ("example", "match"),
        [
            (torch.randn(2, 9), r"cannot be exported.*Sequential.*9"),
            ((torch.randn(2, 8), torch.randn(2, 8)), r"forward names 1 input"),
            ({"wrong": torch.randn(2, 8)}, r"cannot be exported.*wrong"),
            ({"input": [1.0]}, r"not a batch of tensors; where: input"),
            ({}, r"share one batch size"),
        ],
    )
    def test_inputs_that_do_not_fit(self, tmp_path: Path, example: Any, match: str):
        self.refused(tmp_path, lambda path: to_onnx(self.MLP, path, example), match)

    def test_half_precision(self, tmp_path: Path):
        model = nn.Sequential(nn.Linear(8, 4)).bfloat16()
        self.refused(tmp_path, lambda path: to_onnx(model, path, torch.randn(2, 8)), r"0\.weight.*bfloat16")

    def test_metadata_of_another_type(self, tmp_path: Path):
        metadata: Any = {"gamma": 0.5}
        self.refused(
            tmp_path, lambda path: to_onnx(self.MLP, path, torch.randn(2, 8), metadata=metadata), "strings.*gamma"
        )


class TestVerify:
    def test_report(self, model: Any, exported: Path):
        report = verify(model, exported, [text(2, 5), {**text(3, 8), "labels": torch.zeros(3)}])
        assert model.training
        assert report.batches == 2 and report.precision == "fp32" and report.tolerance == 1e-4
        assert 0 < report.mean_abs <= report.max_abs < 1e-5 and report.top1 == 1
        assert [row.shape for row in report.rows] == ["2x5", "3x8"]
        assert "3x8" in str(report) and report.to_dict()["max_abs"] == report.max_abs

    def test_another_model(self, exported: Path):
        with pytest.raises(TdError, match=r"max difference.*batch 0 of shape 2x5.*tolerance is 0\.0001"):
            verify(bert(seed=1), exported, [text(2, 5)])

    def test_tolerance(self, model: Any, exported: Path):
        with pytest.raises(TdError, match="tolerance is 1e-12"):
            verify(model, exported, [text(2, 5)], tolerance=1e-12)
        assert verify(bert(seed=1), exported, [text(2, 5)], tolerance=100).max_abs > 0.01

    def test_values_at_padding_do_not_count(self, tmp_path: Path):
        class Tokens(nn.Module):
            def __init__(self, at_padding: float) -> None:
                super().__init__()
                self.embed, self.at_padding = nn.Embedding(9, 4), at_padding

            def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
                return self.embed(input_ids).masked_fill(attention_mask[..., None] == 0, self.at_padding)

        model = Tokens(0.0)
        inputs = {"input_ids": torch.randint(9, (2, 6)), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
        path = to_onnx(model, tmp_path / "m.onnx", inputs)
        model.at_padding = 7.0
        inputs["attention_mask"][0, 4:] = 0
        assert verify(model, path, [inputs]).max_abs == 0
        with torch.no_grad():
            model.embed.weight[inputs["input_ids"][0, 0]] += 0.1
        with pytest.raises(TdError, match="does not compute"):
            verify(model, path, [inputs])

    @pytest.mark.parametrize("size", [0, 100, 5000])
    def test_truncated(self, model: Any, exported: Path, tmp_path: Path, size: int):
        broken = tmp_path / "broken.onnx"
        broken.write_bytes(exported.read_bytes()[:size])
        with pytest.raises(TdError, match=r"cannot load.*broken\.onnx.*export it again"):
            verify(model, broken, [text(2, 5)])

    def test_missing(self, model: Any, tmp_path: Path):
        with pytest.raises(TdError, match="no such ONNX file"):
            verify(model, tmp_path / "absent.onnx", [text(2, 5)])

    def test_a_batch_that_the_model_cannot_take(self, model: Any, exported: Path):
        with pytest.raises(TdError, match=r"model cannot run.*BertFor.*RuntimeError.*'input_ids': \[1, 40\]"):
            verify(model, exported, [text(1, 40)])  # it has 32 positions

    def test_nothing_but_padding(self, tmp_path: Path):
        """Nothing to compare is no difference, and no crash."""
        net = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 3))

        class Tokens(nn.Module):
            def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
                return net(input_ids) * attention_mask[..., None]

        batch = {"input_ids": torch.ones(2, 6, dtype=torch.long), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
        path = to_onnx(Tokens(), tmp_path / "m.onnx", batch)
        report = verify(Tokens(), path, [{**batch, "attention_mask": torch.zeros_like(batch["attention_mask"])}])
        assert (report.max_abs, report.top1) == (0, None)

    def test_inputs_of_another_graph(self, model: Any, exported: Path):
        with pytest.raises(TdError, match=r"attention_mask, token_type_ids; where.*got: input_ids"):
            verify(model, exported, [{"input_ids": text(2, 5)["input_ids"]}])
        with pytest.raises(TdError, match="no batches"):
            verify(model, exported, [])

    def test_not_finite(self, tmp_path: Path):
        model = nn.Sequential(nn.Linear(2, 2))
        path = to_onnx(model, tmp_path / "m.onnx", torch.randn(2, 2))
        with pytest.raises(TdError, match=r"the model's output 'logits' is not finite.*batch 1"):
            verify(model, path, [{"input": torch.zeros(1, 2)}, {"input": torch.full((1, 2), torch.nan)}])


class TestProbes:
    def test_sizes_and_padding(self):
        batches = make_probe_batches(text(2, 12))
        assert [list(batch["input_ids"].shape) for batch in batches] == [[1, 4], [1, 12], [3, 4], [3, 12]]
        assert batches[3]["attention_mask"].sum(1).tolist() == [8, 8, 12]
        assert batches[3]["attention_mask"][0, -1] == 0 and batches[3]["attention_mask"][1, 0] == 0

    def test_one_token_and_images(self):
        assert {batch["input_ids"].shape[1] for batch in make_probe_batches(text(1, 1))} == {1, 2}
        assert [len(batch["x"]) for batch in make_probe_batches({"x": torch.randn(2, 3, 4, 4)})] == [1, 3]

    def test_the_example_is_not_touched(self):
        example = text(3, 6)
        make_probe_batches(example)
        assert example["attention_mask"].all()


class TestQuantize:
    def test_smaller_and_close(self, model: Any, exported: Path, int8: Path):
        assert int8.stat().st_size < exported.stat().st_size
        report = verify(model, int8, [text(16, 12, seed=seed) for seed in range(4)])
        assert report.precision == "int8"
        assert max(row.relative for row in report.rows) < 0.15
        assert report.top1 is not None and report.top1 > 0.9

    def test_another_model_is_not_close(self, int8: Path):
        with pytest.raises(TdError, match=r"relative.*tolerance is 0\.15"):
            verify(bert(seed=1), int8, [text(2, 5)])

    def test_metadata_and_names_are_kept(self, exported: Path, int8: Path):
        before, after = (ort.InferenceSession(str(p)).get_modelmeta().custom_metadata_map for p in (exported, int8))
        assert after == {**before, "td-plugin.precision": "int8"}
        assert axes(int8) == axes(exported)

    def test_no_stray_files_and_no_noise(
        self, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ):
        monkeypatch.chdir(tmp_path)
        quantize(exported, "q.onnx")
        assert [file.name for file in tmp_path.iterdir()] == ["q.onnx"]
        assert [file.name for file in exported.parent.iterdir()] == ["model.onnx"]
        assert caplog.messages == []

    def test_refusals(self, exported: Path, int8: Path, tmp_path: Path):
        broken, target = tmp_path / "broken.onnx", tmp_path / "new.onnx"
        broken.write_bytes(exported.read_bytes()[:5000])
        for source, match in [
            (broken, "cannot load"),
            (tmp_path / "absent.onnx", "no such ONNX file"),
            (int8, "already quantized"),
        ]:
            with pytest.raises(TdError, match=match):
                quantize(source, target)
        with pytest.raises(TdError, match="same file"):
            quantize(exported, exported)
        assert [file.name for file in tmp_path.iterdir()] == ["broken.onnx"]

    def test_nothing_to_quantize(self, tmp_path: Path):
        path = to_onnx(nn.Sequential(nn.Conv2d(3, 4, 3)), tmp_path / "conv.onnx", torch.randn(2, 3, 8, 8))
        with pytest.raises(TdError, match="nothing in the graph"):
            quantize(path, tmp_path / "q.onnx")
        assert [file.name for file in tmp_path.iterdir()] == ["conv.onnx"]
