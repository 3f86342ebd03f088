"""Every form against the fp32 file it came from, and the refusals: nothing half-written, one clear error each."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import form_models
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from td_plugin.errors import TdError
from td_plugin.export import form_makers, fusion, quantize, to_onnx
from td_plugin.export.forms import FORMS, Form, FormReport, derive
from td_plugin.export.graph_nodes import Heads
from td_plugin.export.parity import precision_of

Feeds = dict[str, Tensor]

# Largest relative difference of the outputs (Frobenius norms), some three times what these models show.
CLOSE: dict[Form, float] = {
    **{"fp32": 0.0, "fused": 1e-5, "bf16": 0.02, "fp16": 0.005},
    **{"int8-weight": 0.05, "int8": 0.1, "int8-static": 0.15, "int4": 0.5},
}
PRECISIONS = {"fused": "fp32", "int8-weight": "int8", "int8-static": "int8"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("forms")


class Files:
    """The exports, made when first asked for, and the forms of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sources: dict[str, Path] = {}
        self.reports: dict[tuple[str, str], FormReport] = {}

    def source(self, name: str) -> Path:
        if name not in self.sources:
            example = form_models.inputs(name)
            example = {key: value.clamp_min(1) if "mask" in key else value for key, value in example.items()}
            model = form_models.MODELS[name]()
            self.sources[name] = to_onnx(model, self.folder / f"{name}.onnx", example, metadata={"recipe": "cut"})
        return self.sources[name]

    def report(self, name: str, form: Form) -> FormReport:
        if (name, form) not in self.reports:
            data = [form_models.inputs(name, seed=seed) for seed in range(1, 5)] if form == "int8-static" else None
            target = self.folder / form / f"{name}.onnx"
            self.reports[name, form] = derive(self.source(name), target, form, calibration=data)
        return self.reports[name, form]


@pytest.fixture(scope="module")
def files(folder: Path) -> Files:
    return Files(folder)


def run(path: Path, feeds: Feeds) -> dict[str, np.ndarray]:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    given = {entry.name: feeds[entry.name].numpy() for entry in session.get_inputs()}
    names = [entry.name for entry in session.get_outputs()]
    return dict(zip(names, session.run(names, given), strict=True))


def relative(path: Path, other: Path, feeds: Feeds) -> float:
    ours, theirs = run(path, feeds)["logits"], run(other, feeds)["logits"]
    if ours.ndim == 3:  # what is computed at padding means nothing
        real = feeds["attention_mask"].numpy() != 0
        ours, theirs = ours[real], theirs[real]
    return float(np.linalg.norm(theirs - ours) / np.linalg.norm(ours))


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def heads(path: Path, operator: str) -> list[int]:
    nodes = [node for node in onnx.load(path).graph.node if node.op_type == operator]
    return [entry.i for node in nodes for entry in node.attribute if entry.name == "num_heads"]


def ordered(graph: Any) -> bool:
    """Whether every node comes after what it reads, as the standard wants it."""
    known = {"", *(tensor.name for tensor in graph.initializer), *(entry.name for entry in graph.input)}
    for node in graph.node:
        if not set(node.input) <= known:
            return False
        known |= set(node.output)
    return True


def weights(path: Path) -> dict[str, TensorProto]:
    return {tensor.name: tensor for tensor in onnx.load(path).graph.initializer}


@pytest.mark.parametrize("name", form_models.MODELS)
@pytest.mark.parametrize("form", FORMS)
class TestEveryForm:
    def test_it_computes_what_its_source_computes(self, files: Files, name: str, form: Form) -> None:
        report = files.report(name, form)
        feeds = form_models.inputs(name, rows=5, length=13, seed=9)
        assert relative(files.source(name), report.path, feeds) <= CLOSE[form]
        assert (report.asked, report.form, report.problem) == (form, form, "")
        assert report.parity is not None and report.parity.relative <= CLOSE[form]
        assert report.max_abs == report.parity.max_abs

    def test_it_says_what_it_is(self, files: Files, name: str, form: Form) -> None:
        report = files.report(name, form)
        session = ort.InferenceSession(str(report.path))
        found, source = session.get_modelmeta().custom_metadata_map, ort.InferenceSession(str(files.source(name)))
        kept = source.get_modelmeta().custom_metadata_map
        assert kept["recipe"] == "cut" and found.items() >= kept.items()
        stated = {"td-plugin.precision": PRECISIONS.get(form, form), "td-plugin.form": form}
        assert {key: text for key, text in found.items() if key not in kept}.items() <= stated.items()
        assert precision_of(onnx.load(report.path)) == PRECISIONS.get(form, form)
        assert [(i.name, i.shape, i.type) for i in session.get_inputs()] == [
            (i.name, i.shape, i.type) for i in source.get_inputs()
        ]
        assert [(o.name, o.type) for o in session.get_outputs()] == [(o.name, o.type) for o in source.get_outputs()]
        assert ordered(onnx.load(report.path).graph)
        assert report.bytes == report.path.stat().st_size
        assert json.loads(json.dumps(report.to_dict()))["form"] == form
        assert str(report.path) in str(report)

    def test_nothing_lies_beside_it(self, files: Files, name: str, form: Form) -> None:
        beside = {file.name for file in files.report(name, form).path.parent.iterdir()}
        assert beside <= {f"{other}.onnx" for other in form_models.MODELS}


class TestFused:
    def test_each_attention_keeps_its_heads(self, files: Files) -> None:
        for name in ("bert", "vit"):
            path = files.report(name, "fused").path
            assert heads(path, "Attention") == list(form_models.HEADS)
            assert operators(path)["SkipLayerNormalization"] == 4 and operators(path)["BiasGelu"] == 2
            sizes = [a.ints for n in onnx.load(path).graph.node for a in n.attribute if a.name == "qkv_hidden_sizes"]
            assert [list(size) for size in sizes] == [[h * form_models.SIZE] * 3 for h in form_models.HEADS]

    def test_a_decoder(self, files: Files) -> None:
        path = files.report("llama", "fused").path
        queries_and_keys = [count for head in form_models.HEADS for count in (2 * head, head)]
        assert heads(path, "RotaryEmbedding") == queries_and_keys
        assert operators(path)["SkipSimplifiedLayerNormalization"] == 4

    def test_on_a_gpu_a_decoder_gets_fused_attention(self, files: Files) -> None:
        graph, counts = fusion.fuse(onnx.load(files.source("llama")), "cuda")
        found = [a.i for n in graph.graph.node if n.op_type == "MultiHeadAttention" for a in n.attribute]
        assert counts["MultiHeadAttention"] == 2 and sorted(found) == sorted(2 * head for head in form_models.HEADS)

    def test_a_row_without_any_token(self, files: Files) -> None:
        feeds = form_models.inputs("bert", rows=3)
        feeds["attention_mask"][1] = 0
        logits = [run(path, feeds)["logits"] for path in (files.source("bert"), files.report("bert", "fused").path)]
        np.testing.assert_allclose(logits[1], logits[0], atol=1e-5)

    def unfused(self, files: Files, tmp_path: Path, match: str) -> None:
        report = derive(files.source("bert"), tmp_path / "m.onnx", "fused")
        assert (report.asked, report.form) == ("fused", "fp32") and report.max_abs == 0
        assert any(note.startswith("written unfused: ") and match in note for note in report.notes)
        assert operators(report.path) == operators(files.source("bert"))
        assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]

    def test_wrong_heads_fall_back(self, files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        rules = fusion._rules

        def wrong(program: Any, provider: str) -> None:
            rules(program, provider)
            import onnx_ir

            attention = next(node for node in program.graph if node.op_type == "Attention")
            attention.attributes["num_heads"] = onnx_ir.AttrInt64("num_heads", 6)  # divides 24 as well: it would run

        monkeypatch.setattr(fusion, "_rules", wrong)
        self.unfused(files, tmp_path, "6 heads of 4 where the graph has 1 of 8, 3 of 8")

    def test_another_function_falls_back(self, files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def other(graph: Any) -> Any:
            fused, counts = fusion.fuse(graph)
            bias = next(tensor for tensor in fused.graph.initializer if list(tensor.dims) == [3])
            bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + 0.01, bias.name))
            return fused, counts

        monkeypatch.setattr(form_makers, "fuse", other)
        self.unfused(files, tmp_path, "computes something else: a value differs by 0.01, 0.0001 is allowed")

    def test_rules_that_fail_fall_back(self, files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(program: Any, provider: str) -> None:
            raise IndexError("no such thing")

        monkeypatch.setattr(fusion, "_rules", fail)
        self.unfused(files, tmp_path, "IndexError: no such thing")

    def test_nothing_to_fuse(self, tmp_path: Path) -> None:
        report = derive(linear(tmp_path / "a.onnx", np.eye(4)), tmp_path / "b.onnx", "fused")
        assert report.form == "fp32" and "written unfused: there is nothing to fuse in this graph" in report.notes

    @pytest.mark.parametrize(
        ("after", "match"),
        [
            ([Heads(3, 8, True)], "2 attentions became 1"),
            ([Heads(3, 8, True), Heads(3, 8, True)], "3 heads of 8"),
            ([Heads(3, 8, True), Heads(2, 8, True)], "2 heads of 8"),
            ([Heads(1, 8, True), Heads(3, -1, True)], "3 heads of -1"),
        ],
    )
    def test_heads_that_do_not_fit(self, after: list[Heads], match: str) -> None:
        with pytest.raises(fusion.FusionError, match=match):
            fusion.check_heads([Heads(3, 8, False), Heads(1, 8, False)], after)

    def test_heads_that_fit(self) -> None:
        fusion.check_heads([Heads(3, 8, False), Heads(1, 8, False)], [Heads(1, None, True), Heads(3, 8, False)])
        fusion.check_heads([Heads(None, None, False)], [Heads(4, 8, True)])  # the source says nothing: outputs decide

    def test_int8_is_not_made_of_it(self, files: Files, tmp_path: Path) -> None:
        for form in ("int8", "int4"):
            with pytest.raises(TdError, match=r"fused attention would stay fp32.*start from the unfused"):
                derive(files.report("bert", "fused").path, tmp_path / "m.onnx", form)
        assert not list(tmp_path.iterdir())


class TestStatic:
    def test_the_layers_that_make_the_logits_stay_float(self, files: Files) -> None:
        report = files.report("bert", "int8-static")
        assert report.left_out.keys() == {"classifier", "bert.pooler.dense"}
        stored = weights(report.path)
        assert all(stored[f"{layer}.weight"].data_type == TensorProto.FLOAT for layer in report.left_out)
        floats = [t.name for t in stored.values() if t.data_type == TensorProto.FLOAT and len(t.dims) > 1]
        assert sorted(floats) == ["bert.pooler.dense.weight", "classifier.weight"]
        assert files.report("llama", "int8-static").left_out.keys() == {"lm_head"}
        assert "classifier" in files.report("vit", "int8-static").left_out
        assert "scales from 4 batches" in report.notes

    def test_per_channel_and_constants_only(self, files: Files) -> None:
        graph = onnx.load(files.report("bert", "int8-static").path).graph
        stored = {tensor.name: tensor for tensor in graph.initializer}
        scales = [stored[n.input[1]] for n in graph.node if n.op_type == "DequantizeLinear" and n.input[0] in stored]
        per_channel = [tensor for tensor in scales if tensor.dims and tensor.dims[0] > 1]
        assert len(per_channel) >= 12
        before = operators(files.source("bert"))
        assert operators(files.report("bert", "int8-static").path)["MatMul"] == before["MatMul"]

    def test_convolutions(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(24, 5)]
        source = to_onnx(nn.Sequential(*layers).eval(), tmp_path / "a.onnx", torch.randn(2, 3, 6, 6))
        data = [{"input": torch.randn(4, 3, 6, 6)} for _ in range(3)]
        first = next(node.name for node in onnx.load(source).graph.node if node.op_type == "Conv")
        for keep, kernels in (([], [TensorProto.INT8] * 2), ([first], [TensorProto.FLOAT, TensorProto.INT8])):
            report = derive(source, tmp_path / "b.onnx", "int8-static", calibration=iter(data), keep=keep)
            stored = [entry for entry in weights(report.path).values() if len(entry.dims) == 4]
            assert sorted(entry.data_type for entry in stored) == kernels and not report.problem
            assert list(report.left_out.values()).count("as asked") == len(keep)
            assert list(report.left_out.values())[-1].startswith("makes the output")

    @pytest.mark.parametrize(
        ("spoil", "match"),
        [
            (
                lambda x: x.index_fill(0, torch.tensor(1), torch.nan),
                r"not finite; where: batch 2, input 'pixel_values'; got: NaN",
            ),
            (lambda x: x / 0, r"not finite; where: batch 2"),
            (lambda x: x.double(), r"another dtype.*"),
            (lambda x: x[:, :2], r"another shape than the graph; where: .*calibration batch 2"),
        ],
    )
    def test_data_that_are_no_good(self, files: Files, tmp_path: Path, spoil: Any, match: str) -> None:
        data = [form_models.inputs("vit", seed=seed) for seed in range(3)]
        data[2]["pixel_values"] = spoil(data[2]["pixel_values"])
        self.refused(files, tmp_path, data, match)

    def test_no_data(self, files: Files, tmp_path: Path) -> None:
        self.refused(files, tmp_path, None, r"fixed beforehand need data.*calibration=")
        self.refused(files, tmp_path, [], r"no batches to calibrate on")
        self.refused(files, tmp_path, [{"x": torch.ones(1)}], r"needs inputs that were not given: pixel_values")

    def refused(self, files: Files, tmp_path: Path, data: Any, match: str) -> None:
        target = tmp_path / "m.onnx"
        target.write_bytes(b"what was there")
        with pytest.raises(TdError, match=match):
            derive(files.source("vit"), target, "int8-static", calibration=data)
        assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"] and target.read_bytes() == b"what was there"

    def test_quiet_and_nothing_left_where_it_runs(
        self,
        files: Files,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        source = files.source("vit").resolve()
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("TMPDIR", str(tmp_path / "absent"))
        for form in FORMS:
            derive(source, f"{form}.onnx", form, calibration=[form_models.inputs("vit")])
        assert sorted(file.name for file in tmp_path.iterdir()) == sorted(f"{form}.onnx" for form in FORMS)
        assert caplog.messages == [] and capfd.readouterr() == ("", "")


class TestSixteenBits:
    def test_fp16_where_it_is_safe(self, files: Files) -> None:
        graph = onnx.load(files.report("llama", "fp16").path).graph
        stored = {tensor.name: tensor.data_type for tensor in graph.initializer}
        made = {name: node for node in graph.node for name in node.output}
        for node in graph.node:
            if node.op_type in ("Pow", "ReduceMean", "Sqrt", "Reciprocal", "Cos", "Sin"):
                assert all(stored.get(name) != TensorProto.FLOAT16 for name in node.input)
        squares = [made[node.input[0]] for node in graph.node if node.op_type == "ReduceMean"]
        assert squares and all(node.op_type == "Pow" for node in squares)  # not narrowed in between
        for node in graph.node:
            if node.op_type in ("Cos", "Sin"):  # and all that angles are made of
                pending, seen = list(node.input), set()
                while pending:
                    name = pending.pop()
                    assert stored.get(name) != TensorProto.FLOAT16
                    if name in made and name not in seen:
                        seen.add(name)
                        assert not any(a.name == "to" and a.i == TensorProto.FLOAT16 for a in made[name].attribute)
                        pending += made[name].input
        products = [n for n in graph.node if n.op_type == "MatMul" and n.input[1] in stored]
        assert products and all(stored[node.input[1]] == TensorProto.FLOAT16 for node in products)
        assert {"Pow", "ReduceMean", "Cos", "Sin"} <= files.report("llama", "fp16").left_out.keys()

    def test_late_positions_keep_their_angles(self, files: Files) -> None:
        feeds = form_models.inputs("llama", rows=1, length=2600)
        feeds["attention_mask"][:] = 1
        ours, theirs = (
            run(p, feeds)["logits"][:, -9:] for p in (files.source("llama"), files.report("llama", "fp16").path)
        )
        assert np.linalg.norm(theirs - ours) / np.linalg.norm(ours) < 0.005

    def test_masks_become_numbers_that_fp16_has(self, files: Files) -> None:
        constants = [numpy_helper.to_array(t) for t in weights(files.report("bert", "fp16").path).values()]
        halves = [values for values in constants if values.dtype == np.float16]
        assert halves and all(np.isfinite(values).all() for values in halves)
        assert any(values.size == 1 and values.item() == -32768 for values in halves)

    def test_a_weight_that_does_not_fit(self, tmp_path: Path) -> None:
        source = linear(tmp_path / "a.onnx", np.diag([1.0, 2.0, 3.0, 1e5]))
        with pytest.raises(TdError, match=r"beyond what fp16 can hold; where: weight; got: 100000.*use bf16"):
            derive(source, tmp_path / "b.onnx", "fp16")
        assert not derive(source, tmp_path / "b.onnx", "bf16").problem

    def test_bf16_is_fp32_with_rounded_matrices(self, files: Files) -> None:
        rounded = onnx.load(files.source("bert"))
        for tensor in rounded.graph.initializer:
            values = numpy_helper.to_array(tensor)
            if values.dtype == np.float32 and values.ndim > 1 and values.size >= 256:
                tensor.CopyFrom(numpy_helper.from_array(torch.tensor(values).bfloat16().float().numpy(), tensor.name))
        onnx.save(rounded, files.folder / "rounded.onnx")
        feeds, path = form_models.inputs("bert"), files.report("bert", "bf16").path
        assert np.array_equal(run(path, feeds)["logits"], run(files.folder / "rounded.onnx", feeds)["logits"])

    @pytest.mark.parametrize("form", ["bf16", "fp16"])
    def test_half_the_file(self, tmp_path: Path, form: Form) -> None:
        source = linear(tmp_path / "a.onnx", np.random.default_rng(0).standard_normal((256, 256)))
        assert derive(source, tmp_path / "b.onnx", form).bytes < 0.51 * source.stat().st_size


class TestWeightOnly:
    @pytest.mark.parametrize(("form", "bits"), [("int8-weight", [8, 8]), ("int4", [4, 8])])
    def test_blocks_of_few_bits(self, tmp_path: Path, form: Form, bits: list[int]) -> None:
        weight = np.random.default_rng(0).standard_normal((64, 48)).astype(np.float32)
        source = linear(tmp_path / "a.onnx", weight, weight.T.copy())
        path = derive(source, tmp_path / "b.onnx", form).path
        stored, found = weights(path), []
        for node, original in zip(onnx.load(path).graph.node, (weight, weight.T), strict=True):
            found.append(next(entry.i for entry in node.attribute if entry.name == "bits"))  # the last makes the output
            packed, scales = (numpy_helper.to_array(stored[name]) for name in node.input[1:3])
            nibbles = np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:2], -1)
            values = (packed if found[-1] == 8 else nibbles).astype(float) - 2 ** (found[-1] - 1)
            blocks = values * scales.reshape(*packed.shape[:2], 1)  # [outputs, blocks, 32 inputs]
            decoded = blocks.reshape(len(packed), -1)[:, : len(original)].T
            assert np.abs(decoded - original).max() <= np.abs(original).max() / 2 ** (found[-1] - 1)
        assert found == bits

    def test_linear_layers_of_every_kind(self, files: Files) -> None:
        found = operators(files.report("bert", "int4").path)
        assert found["MatMulNBits"] == 14 and found["Gemm"] == 0  # 2 layers of 6, the pooler and the classifier
        assert files.report("llama", "int4").left_out["lm_head"].startswith("8 bits")
        assert "model.embed_tokens" in files.report("llama", "int8-weight").left_out

    def test_logging_of_the_process_stays_as_it_is(self, files: Files, tmp_path: Path) -> None:
        root = logging.getLogger()
        before = list(root.handlers), root.level
        root.handlers.clear()
        try:
            derive(files.source("vit"), tmp_path / "m.onnx", "int4")
            assert root.handlers == []
        finally:
            root.handlers[:] = before[0]
        assert root.level == before[1]


class TestKeep:
    @pytest.mark.parametrize("form", ["int8", "int8-weight"])
    def test_layers_stay_as_asked(self, files: Files, tmp_path: Path, form: Form) -> None:
        report = derive(files.source("bert"), tmp_path / "m.onnx", form, keep=["classifier", "*.query"])
        asked = [layer for layer, reason in report.left_out.items() if reason == "as asked"]
        queries = [f"bert.encoder.layer.{index}.attention.self.query" for index in (0, 1)]
        assert sorted(asked) == sorted([*queries, "classifier"])
        all_of_it = files.report("bert", form)
        key = "MatMulInteger" if form == "int8" else "MatMulNBits"
        assert operators(report.path)[key] == operators(all_of_it.path)[key] - 3

    def test_a_name_that_fits_none(self, files: Files, tmp_path: Path) -> None:
        with pytest.raises(TdError, match=r"no layer of this name.*clasifier; fix: nearest: \['classifier'"):
            derive(files.source("bert"), tmp_path / "m.onnx", "int8", keep=["clasifier"])


class TestSources:
    def test_refusals(self, files: Files, tmp_path: Path) -> None:
        broken, empty = tmp_path / "broken.onnx", tmp_path / "empty.onnx"
        broken.write_bytes(files.source("vit").read_bytes()[:3000])
        empty.write_bytes(b"")
        for source, match in [
            (tmp_path / "absent.onnx", "no such ONNX file"),
            (broken, r"cannot load.*export it again"),
            (empty, "cannot load"),
            (files.report("vit", "int8").path, "already quantized"),
            (files.report("vit", "fp16").path, r"made of the fp32 file.*fp16"),
            (tmp_path / "m.onnx", "same file"),
        ]:
            for form in ("fused", "int8", "fp16"):
                with pytest.raises(TdError, match=match):
                    derive(source, tmp_path / "m.onnx", form)
        with pytest.raises(TdError, match="no such form; got: int2; fix: one of fp32, fused"):
            derive(files.source("vit"), tmp_path / "m.onnx", "int2")  # type: ignore[arg-type]
        assert sorted(file.name for file in tmp_path.iterdir()) == ["broken.onnx", "empty.onnx"]

    def test_an_operator_set_of_the_future(self, tmp_path: Path) -> None:
        path = linear(tmp_path / "a.onnx", np.eye(4))
        graph = onnx.load(path)
        graph.opset_import[0].version = 99
        onnx.save(graph, path)
        with pytest.raises(TdError, match=r"cannot run the operator set.*'ai.onnx': 99.*opset=20"):
            derive(path, tmp_path / "b.onnx", "fp32")

    @pytest.mark.parametrize("form", FORMS)
    def test_a_file_from_elsewhere(self, tmp_path: Path, form: Form) -> None:
        weight = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)
        source = linear(tmp_path / "a.onnx", weight, weight.T.copy())
        graph = onnx.load(source)
        for node in graph.graph.node:
            node.name = ""
        onnx.save(graph, source)
        data = [{"x": torch.randn(8, 64)} for _ in range(4)]
        report = derive(source, tmp_path / "b.onnx", form, calibration=data)
        assert report.form == ("fp32" if form == "fused" else form)
        assert report.notes[-1] == "not written by td-plugin: model class, parameters, sparsity unknown"
        assert report.parity is not None and not report.problem

    def test_inputs_that_cannot_be_made_up(self, tmp_path: Path) -> None:
        source = linear(tmp_path / "a.onnx", np.eye(4), shape=["b", "s", "t", 4])
        report = derive(source, tmp_path / "b.onnx", "bf16")
        assert report.parity is None and report.max_abs is None
        assert any("not compared with its source" in note for note in report.notes)
        report = derive(source, tmp_path / "b.onnx", "bf16", example_inputs={"x": torch.randn(2, 3, 5, 4)})
        assert report.max_abs == 0
        with pytest.raises(TdError, match="another shape"):
            derive(source, tmp_path / "b.onnx", "bf16", example_inputs={"x": torch.randn(2, 3, 5, 7)})

    def test_what_is_not_finite_is_not_written(self, tmp_path: Path) -> None:
        source = linear(tmp_path / "a.onnx", np.full((16, 16), 3.4e38))  # rounded up in bf16, that is infinite
        with pytest.raises(TdError, match="this form of the graph is not finite"):
            derive(source, tmp_path / "b.onnx", "bf16", example_inputs=[{"x": torch.full((2, 16), 1e-9)}])
        assert [file.name for file in tmp_path.iterdir()] == ["a.onnx"]

    def test_a_directory_as_target(self, tmp_path: Path) -> None:
        source = linear(tmp_path / "a.onnx", np.eye(4))
        (tmp_path / "out").mkdir()
        assert derive(source, tmp_path / "out", "bf16").path == tmp_path / "out" / "a.onnx"


class TestQuantize:
    def test_modes(self, files: Files, tmp_path: Path) -> None:
        source, data = files.source("vit"), [form_models.inputs("vit")]
        assert operators(quantize(source, tmp_path / "a.onnx"))["MatMulInteger"]
        assert operators(quantize(source, tmp_path / "b.onnx", mode="static", calibration=data))["QuantizeLinear"]
        assert operators(quantize(source, tmp_path / "c.onnx", mode="weight"))["MatMulNBits"]
        with pytest.raises(TdError, match="no such mode; got: other"):
            quantize(source, tmp_path / "d.onnx", mode="other")  # type: ignore[arg-type]
        with pytest.raises(TdError, match="need data"):
            quantize(source, tmp_path / "d.onnx", mode="static")
        assert not (tmp_path / "d.onnx").exists()


def linear(path: Path, *weights: np.ndarray, shape: Any = None) -> Path:
    """``x @ weight @ ...``, as another exporter writes it."""
    nodes, constants, flowing = [], [], "x"
    for index, weight in enumerate(weights):
        name = "weight" if index == 0 else f"weight_{index}"
        constants.append(numpy_helper.from_array(weight.astype(np.float32), name))
        result = "logits" if index == len(weights) - 1 else f"hidden_{index}"
        nodes.append(helper.make_node("MatMul", [flowing, name], [result], name=f"product_{index}"))
        flowing = result
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape or ["b", weights[0].shape[0]])
    output = helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "by hand", [given], [output], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), str(path))
    return path
