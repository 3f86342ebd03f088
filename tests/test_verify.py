"""One function or not: masked, shrunk, ONNX and the forms of it, on every size that a graph has to stand."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from graphs import linear_graph, text_graph
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model, RobertaConfig, RobertaModel, T5Config, T5Model

from td_plugin.contract import TdError
from td_plugin.export.evaluation import Examples
from td_plugin.export.example_inputs import inputs_for_model
from td_plugin.export.parity import TOLERANCES, Tolerance, precision_of
from td_plugin.export.probes import longest_text, make_parity_batches, resized
from td_plugin.export.quantize import quantize
from td_plugin.export.shrink import shrink
from td_plugin.export.to_onnx import to_onnx
from td_plugin.export.verify import verify
from td_plugin.export.verify_forms import FormsReport, verify_forms
from td_plugin.recipes import targeted_unit
from td_plugin.sparsifier import TargetedDropout

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


class TestSizes:
    def test_the_ends_of_what_a_graph_takes(self):
        ids = torch.arange(1, 25).reshape(2, 12)
        batches = make_parity_batches({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, longest=40)
        shapes = [tuple(batch["input_ids"].shape) for batch in batches]
        assert shapes == [(1, 4), (1, 12), (3, 4), (3, 12), (1, 1), (5, 11), (2, 40)]
        padded, long = (batch["attention_mask"] for batch in batches[-2:])
        assert padded[0].tolist() == [0] * 3 + [1] * 8 and padded[1].tolist() == [1] * 8 + [0] * 3
        assert padded[2].tolist() == [0] * 3 + [1] * 5 + [0] * 3 and padded[3:].all()
        assert long[0].tolist() == [0] * 20 + [1] * 20 and long[1].all()

    def test_an_example_that_begins_with_padding(self):
        mask = torch.tensor([[0, 0, 1, 1]] * 2)
        single = make_parity_batches({"input_ids": torch.ones(2, 4, dtype=torch.long), "attention_mask": mask})[4]
        assert single["attention_mask"].tolist() == [[1]] and mask.sum() == 4

    def test_a_bound_for_the_longest(self):
        ids = {"input_ids": torch.ones(2, 8, dtype=torch.long)}
        assert make_parity_batches(ids, longest=10**6)[-1]["input_ids"].shape == (2, 1024)
        assert make_parity_batches(ids)[-1]["input_ids"].shape == (2, 8)
        assert [len(batch["x"]) for batch in make_parity_batches({"x": torch.zeros(2, 3)})] == [1, 3, 5]

    @pytest.mark.parametrize(
        "model",
        [
            BertModel(BertConfig(vocab_size=30, max_position_embeddings=24, **SIZES)),
            RobertaModel(RobertaConfig(vocab_size=30, max_position_embeddings=24, **SIZES)),
            GPT2Model(GPT2Config(vocab_size=30, n_positions=24, n_embd=16, n_layer=1, n_head=2)),
        ],
        ids=lambda model: type(model).__name__,
    )
    def test_the_model_runs_at_its_longest_and_no_further(self, model: Any):
        longest = longest_text(model)
        assert longest is not None
        example = inputs_for_model(model)
        for batch in make_parity_batches(example, longest):
            model(**batch)
        with pytest.raises((IndexError, RuntimeError)):
            model(**resized(example, 1, {"sequence": longest + 1}))

    def test_models_that_do_not_say(self):
        t5 = T5Model(T5Config(vocab_size=30, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8))
        assert longest_text(t5) is None and longest_text(nn.Linear(2, 2)) is None


def graph(kind: int, op: str = "MatMul", dims: tuple[int, ...] = (2, 2), **attributes: Any) -> Any:
    node = helper.make_node(op, ["x", "w"], ["y"], **attributes)
    tensor = TensorProto(data_type=kind, dims=dims, name="w")
    return helper.make_model(helper.make_graph([node], "g", [], [], [tensor]))


@pytest.mark.parametrize(
    ("model", "precision"),
    [
        (graph(TensorProto.FLOAT), "fp32"),
        (graph(TensorProto.FLOAT16), "fp16"),
        (graph(TensorProto.FLOAT16, dims=()), "fp32"),  # a constant, no weight
        (graph(TensorProto.BFLOAT16), "bf16"),
        (graph(TensorProto.INT8, "MatMulInteger"), "int8"),
        (graph(TensorProto.FLOAT16, "MatMulNBits", bits=4), "int4"),
        (graph(TensorProto.UINT8, "MatMulNBits", bits=8), "int8"),
        (graph(TensorProto.INT4, "DequantizeLinear"), "int4"),
    ],
)
def test_precision(model: Any, precision: str):
    assert precision_of(model) == precision


def test_lower_precisions_may_differ_more():
    for weaker, stronger in zip(list(TOLERANCES.values())[1:], TOLERANCES.values(), strict=False):
        assert weaker.bound > stronger.bound and weaker.drop > stronger.drop


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, nn.Module], dict[str, Path]]:
    """A classifier whose hidden units are half silent, what shrink makes of it, its file, and its int8 file."""
    folder = tmp_path_factory.mktemp("forms")
    torch.manual_seed(0)
    masked = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 4))
    sparsifier = TargetedDropout(targeted_unit(), sparsity_level=0.5)
    sparsifier.prepare(masked)
    sparsifier.squash_mask()
    small = shrink(masked)
    path = to_onnx(small, folder / "small.onnx", torch.randn(2, 8))
    return {"masked": masked, "shrunk": small}, {"onnx": path, "int8": quantize(path, folder / "small.int8.onnx")}


def rows(count: int, seed: int = 0) -> dict[str, Tensor]:
    return {"input": torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))}


class TestForms:
    def test_all_are_the_masked_model(self, forms: Any):
        models, files = forms
        batches = [rows(1), rows(5), rows(3)]
        with torch.no_grad():
            labels = models["masked"](rows(64, 1)["input"]).argmax(-1)
        report = verify_forms(models, files, batches, examples=Examples([{**rows(64, 1), "labels": labels}]))
        assert report.passed and report.require() is report and report.reference == "masked"
        assert [form.name for form in report.forms] == ["shrunk", "onnx", "int8"]
        assert [form.parity.precision for form in report.forms] == ["fp32", "fp32", "int8"]
        assert [row.shape for row in report.forms[1].parity.rows] == ["1x8", "5x8", "3x8"]
        shrunk, exact, coarse = (form.parity for form in report.forms)
        assert shrunk.max_abs < 1e-5 and exact.max_abs < 1e-5 < coarse.max_abs
        assert exact.top1 == 1 and report.score is not None and report.score.value == 1
        assert all(form.drop is not None and abs(form.drop.value) <= 0.02 for form in report.forms)
        text = str(report)
        assert all(word in text for word in ("masked", "int8", "top-1", "accuracy on 64 rows")) and " no" not in text
        assert json.loads(json.dumps(report.to_dict()))["forms"][2]["passed"]

    def test_it_says_which_form_breaks_and_goes_on(self, forms: Any):
        models, files = forms
        other = copy.deepcopy(models["shrunk"])
        with torch.no_grad():
            other[2].bias += 0.5
        report = verify_forms({**models, "other": other}, files, [rows(3)])
        assert [bool(form.problem) for form in report.forms] == [False, True, False, False]
        assert "batch 0 of shape 3x8" in report.forms[1].problem and "does not compute" in str(report)
        with pytest.raises(TdError, match=r"'other' does not agree with 'masked'.*max difference 0\.5"):
            report.require()

    def test_tolerances(self, forms: Any):
        models, files = forms
        int8 = {"fp32": files["onnx"], "int8": files["int8"]}
        assert verify_forms({}, int8, [rows(9)]).passed  # files alone: the first is the reference
        tight = {"int8": Tolerance(1e-6, 0.02)}
        assert not verify_forms({}, int8, [rows(9)], tolerances=tight).passed
        assert not verify_forms(models, {}, [rows(9)], tolerances={"fp32": Tolerance(0.0, 0.0)}).passed

    def test_a_score_may_drop_by_so_much(self, tmp_path: Path):
        table = np.zeros((10, 2))
        table[:, 1] = np.linspace(-1e-5, 1e-5, 10)  # so close to a tie that a difference within tolerance decides
        shifted = table.copy()
        shifted[:, 0] += 5e-6
        files = {
            name: text_graph(tmp_path / f"{name}.onnx", values, per_token=True)
            for name, values in (("a", table), ("b", shifted))
        }
        ids = torch.arange(10)[None]
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        labels = torch.tensor(table).argmax(-1)[None]
        report = verify_forms({}, files, [batch], examples=Examples([{**batch, "labels": labels}]))
        assert report.forms[0].parity.max_abs < 1e-5  # as outputs go they agree
        assert "accuracy 0.8 on 1 rows is 0.2000 worse than 'a'; 0.002 is allowed" in report.forms[0].problem

    def test_refusals(self, forms: Any, tmp_path: Path):
        models, files = forms
        for given in (({}, {}), ({"a": models["masked"]}, {}), ({"onnx": models["masked"]}, files)):
            with pytest.raises(TdError, match="nothing to compare"):
                verify_forms(*given, [rows(1)])
        with pytest.raises(TdError, match="nothing to compare"):
            verify_forms(models, files, [])
        with pytest.raises(TdError, match=r"no such ONNX file.*absent\.onnx"):
            verify_forms(models, {"absent": tmp_path / "absent.onnx"}, [rows(1)])
        broken = tmp_path / "broken.onnx"
        broken.write_bytes(files["onnx"].read_bytes()[:500])
        with pytest.raises(TdError, match=r"cannot load.*broken\.onnx"):
            verify_forms(models, {"broken": broken}, [rows(1)])
        with pytest.raises(TdError, match="needs inputs that were not given: x"):
            verify_forms(models, {"other": linear_graph(tmp_path / "other.onnx", np.ones((8, 4)))}, [rows(1)])
        with pytest.raises(TdError, match=r"given by name.*got: Tensor; fix: a dict with x"):
            verify(nn.Identity(), tmp_path / "other.onnx", [torch.ones(1, 8)])  # type: ignore[list-item]

    def test_a_file_of_another_exporter(self, forms: Any, tmp_path: Path):
        """Other names of inputs and outputs: the batch holds both names, the order of the outputs tells them apart."""
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 4, bias=False))
        file = linear_graph(tmp_path / "x.onnx", model[0].weight.detach().numpy().T)

        class Named(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return model(x)

        report: FormsReport = verify_forms({"torch": Named()}, {"file": file}, [{"x": torch.randn(3, 8)}])
        assert report.passed and report.forms[0].parity.max_abs < 1e-5

    def test_nothing_but_padding(self, tmp_path: Path):
        path = text_graph(tmp_path / "m.onnx", np.eye(3), per_token=True)
        padding = {name: torch.zeros(2, 2, dtype=torch.long) for name in ("input_ids", "attention_mask")}
        report = verify_forms({}, {"a": path, "b": path}, [padding])
        assert report.passed and report.forms[0].parity.max_abs == 0 and report.forms[0].parity.top1 is None

    def test_not_finite_is_no_agreement(self, forms: Any, tmp_path: Path):
        weight = np.full((8, 4), np.inf)
        files = {"a": linear_graph(tmp_path / "a.onnx", weight), "b": linear_graph(tmp_path / "b.onnx", weight)}
        report = verify_forms({}, files, [{"x": torch.ones(1, 8)}])
        assert "not finite" in report.forms[0].problem


def test_half_precision_is_told_and_close(tmp_path: Path):
    weight = np.random.default_rng(0).normal(size=(8, 4))
    full = linear_graph(tmp_path / "full.onnx", weight)
    model = onnx.load(full)
    half = numpy_helper.from_array(weight.astype(np.float16), "half")
    model.graph.initializer[0].CopyFrom(half)
    model.graph.node.insert(0, helper.make_node("Cast", ["half"], ["weight"], to=TensorProto.FLOAT))
    onnx.save(model, str(tmp_path / "half.onnx"))
    report = verify_forms({}, {"full": full, "half": tmp_path / "half.onnx"}, [{"x": torch.randn(4, 8)}])
    (form,) = report.forms
    assert form.parity.precision == "fp16" and report.passed and 1e-5 < form.parity.relative < 1e-3
