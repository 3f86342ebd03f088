"""Bytes of sparse weights: encoded by a loop that follows the paper, written files opened again, sizes counted anew."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from graphs import linear_graph
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from td_plugin.contract import TdError
from td_plugin.export import storage, storage_forms
from td_plugin.export.benchmark import file_size
from td_plugin.export.gap_coding import decode_bitmask, decode_gaps, encode_bitmask, encode_gaps
from td_plugin.export.storage import storage_table


def sparse(shape: tuple[int, ...], zeros: float, seed: int = 0, dtype: str = "float32") -> np.ndarray:
    generator = np.random.default_rng(seed)
    return (generator.standard_normal(shape) * (generator.random(shape) >= zeros)).astype(dtype)


def by_the_paper(values: np.ndarray, bits: int) -> tuple[list[int], list[float]]:
    """Index differences one after the other, and a filler zero whenever one is beyond what `bits` can tell."""
    gaps, kept, last = [], [], -1
    for place, value in enumerate(values.reshape(-1)):
        if value != 0 or place - last == 2**bits:
            gaps.append(place - last - 1)
            kept.append(value)
            last = place
    while kept and kept[-1] == 0:  # the shape tells the zeros at the end
        gaps.pop(), kept.pop()
    return gaps, kept


def unpacked(gaps: np.ndarray, bits: int, count: int) -> list[int]:
    digits = "".join(f"{byte:08b}" for byte in gaps)
    assert len(gaps) == -(-count * bits // 8)
    return [int(digits[at * bits : (at + 1) * bits], 2) for at in range(count)]


class TestGaps:
    @settings(max_examples=150, deadline=None)
    @given(
        shape=st.lists(st.integers(0, 40), min_size=0, max_size=3).map(tuple),
        zeros=st.sampled_from([0.0, 0.3, 0.9, 0.99, 1.0]),
        bits=st.sampled_from([1, 2, 3, 5, 8, 9, 16]),
        dtype=st.sampled_from(["float16", "float32", "float64", "int8"]),
        seed=st.integers(0, 99),
    )
    def test_equals_the_paper_and_comes_back(self, shape, zeros, bits, dtype, seed):
        values = np.asarray(sparse(shape, zeros, seed, "float32") * 5).astype(dtype)
        values = np.where(values == 0, np.zeros((), dtype), values)  # no negative zeros
        code = encode_gaps(values, bits)
        gaps, kept = by_the_paper(values, bits)
        assert unpacked(code.gaps, bits, len(code.values)) == gaps
        assert code.values.tolist() == kept
        assert code.bytes == code.gaps.nbytes + values.itemsize * len(kept)
        decoded = decode_gaps(code)
        assert decoded.dtype == values.dtype and decoded.shape == values.shape
        assert decoded.tobytes() == values.tobytes()

    def test_a_long_gap_by_hand(self):
        values = np.zeros(30, np.float32)
        values[[1, 5, 23]] = [3, 4, 5]
        code = encode_gaps(values, 3)
        # 1 zero, 3 zeros, then two steps of 8 places (7 zeros and a filler) and 1 zero: places 13, 21 and 23.
        assert unpacked(code.gaps, 3, 5) == [1, 3, 7, 7, 1]
        assert code.values.tolist() == [3, 4, 0, 0, 5]

    def test_nan_and_infinity_come_back_and_negative_zeros_as_zeros(self):
        values = np.array([np.nan, -0.0, np.inf, 0.0, -np.inf, -0.0], np.float32)
        code = encode_gaps(values, 5)
        assert len(code.values) == 3
        expected = np.where(values == 0, np.float32(0), values)
        assert decode_gaps(code).tobytes() == expected.tobytes()

    @pytest.mark.parametrize("bits", [0, 17, -1])
    def test_bits_out_of_range(self, bits):
        with pytest.raises(TdError, match="a gap takes 1 to 16 bits"):
            encode_gaps(np.ones(3, np.float32), bits)

    @settings(max_examples=50, deadline=None)
    @given(shape=st.lists(st.integers(0, 30), max_size=3).map(tuple), zeros=st.floats(0, 1))
    def test_a_bitmask_comes_back(self, shape, zeros):
        values = np.asarray(sparse(shape, zeros))
        values = np.where(values == 0, np.float32(0), values)
        mask, kept = encode_bitmask(values)
        assert mask.nbytes == -(-values.size // 8) and kept.size == np.count_nonzero(values)
        assert decode_bitmask(mask, kept, values.shape).tobytes() == values.tobytes()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return linear_graph(tmp_path_factory.mktemp("storage") / "model.onnx", sparse((300, 400), 0.9))


class TestTable:
    def test_every_size_is_counted(self, path):
        report = storage_table(path)
        values = numpy_helper.to_array(onnx.load(str(path)).graph.initializer[0])
        kept, size = np.count_nonzero(values), path.stat().st_size
        assert report.weights == values.size and report.zeros == values.size - kept
        assert report.row("as it is").bytes == size == file_size(path)
        assert report.row("bitmask + values").bytes == size - values.nbytes + values.size // 8 + 4 * kept
        for bits in (8, 5):
            code = encode_gaps(values, bits)
            told = -(-len(code.values) * bits // 8) + 4 * len(code.values)
            assert report.row(f"{bits}-bit gaps + values").bytes == size - values.nbytes + told
        assert 0 < report.row("sparse initializers").bytes - (size - values.nbytes + 12 * kept) < 200
        assert report.row("fp16 values, zip").bytes < report.row("zip").bytes < size
        assert [row.lossless for row in report.rows].count(False) == 1

    def test_a_zip_is_a_zip(self, path, tmp_path):
        with zipfile.ZipFile(tmp_path / "own.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.write(path, path.name)
        assert storage_table(path).row("zip").bytes == (tmp_path / "own.zip").stat().st_size

    def test_the_sparse_file_is_valid_and_computes_the_same(self, path, tmp_path):
        rows = storage_forms.sparse_rows(storage_forms.read_weights(path), tmp_path)
        written = tmp_path / path.name
        assert rows[0].bytes == written.stat().st_size
        onnx.checker.check_model(str(written))  # its shape inference knows no sparse initializers
        graph = onnx.load(str(written)).graph
        assert not graph.initializer and graph.sparse_initializer[0].indices.data_type == TensorProto.INT64
        x = np.random.default_rng(0).standard_normal((3, 300)).astype(np.float32)
        found, expected = (ort.InferenceSession(str(file)).run(None, {"x": x})[0] for file in (written, path))
        assert (found == expected).all()

    @pytest.mark.parametrize(
        ("form", "least"),
        [("sparse initializers", 2 / 3), ("8-bit gaps + values", 0.2), ("5-bit gaps + values", 5 / 37)]
        + [("bitmask + values", 1 / 32)],
    )
    def test_below_its_share_a_form_is_larger_and_not_taken(self, form, least, tmp_path):
        for step, taken in ((-0.02, 0), (0.02, 1)):
            values = np.ones(40_000, np.float32)
            values[: round((least + step) * values.size)] = 0
            # Evenly spread, no gap is too long: the share is exact without fillers.
            values = np.random.default_rng(0).permutation(values).reshape(200, 200)
            report = storage_table(linear_graph(tmp_path / "m.onnx", values))
            assert report.row(form).pays_above == pytest.approx(least)
            assert report.row(form).tensors == taken
            assert (report.row(form).bytes < report.rows[0].bytes) == bool(taken)

    def test_a_dense_file_stays_as_it_is(self, tmp_path):
        report = storage_table(linear_graph(tmp_path / "m.onnx", sparse((50, 60), 0)))
        size = report.rows[0].bytes
        assert all(row.bytes == size for row in report.rows if row.tensors == 0 and "zip" not in row.form)
        assert report.sparsity == 0

    def test_the_table_says_what_is_not_gained(self, path):
        text = str(storage_table(path))
        assert (
            "onnxruntime makes sparse initializers dense while it loads them: they save no time and no memory" in text
        )
        assert "90." in text and "66.7%" in text and "1/1" in text

    def test_json(self, path):
        told = json.loads(json.dumps(storage_table(path).to_dict()))
        assert told["path"] == str(path) and len(told["rows"]) == 8
        assert told["sparsity"] == pytest.approx(0.9, abs=0.01)

    def test_negative_zeros_are_told(self, tmp_path):
        values = sparse((50, 60), 0)
        values[:25] = -0.0
        report = storage_table(linear_graph(tmp_path / "m.onnx", values))
        assert report.zeros == 25 * 60
        assert "1,500 of the zeros are negative" in str(report)

    def test_weights_beside_the_file_count(self, path, tmp_path):
        graph = onnx.load(str(path))
        options = {"save_as_external_data": True, "location": "weights.data", "size_threshold": 0}
        onnx.save(graph, str(tmp_path / "m.onnx"), **options)
        report, whole = storage_table(tmp_path / "m.onnx"), storage_table(path)
        sizes = [(tmp_path / name).stat().st_size for name in ("m.onnx", "weights.data")]
        assert report.rows[0].bytes == sum(sizes)
        assert report.row("sparse initializers").bytes == whole.row("sparse initializers").bytes
        assert sorted(file.name for file in tmp_path.iterdir()) == ["m.onnx", "weights.data"]

    def test_what_one_message_cannot_hold_is_left_out(self, path, monkeypatch):
        monkeypatch.setattr(storage, "LIMIT", 1000)
        report = storage_table(path)
        assert "not tried: sparse initializers and fp16" in str(report)
        assert [row.form for row in report.rows if "sparse" in row.form or "fp16" in row.form] == []

    def test_an_unknown_form(self, path):
        with pytest.raises(TdError, match="no such form; got: zap; fix: one of as it is, zip"):
            storage_table(path).row("zap")


class TestRefusals:
    def test_missing(self, tmp_path):
        with pytest.raises(TdError, match="there is no such ONNX file"):
            storage_table(tmp_path / "none.onnx")

    def test_damaged(self, path, tmp_path):
        (tmp_path / "m.onnx").write_bytes(path.read_bytes()[:1000])
        with pytest.raises(TdError, match="cannot be read"):
            storage_table(tmp_path / "m.onnx")

    def test_weights_outside_its_directory(self, path, tmp_path):
        graph = onnx.load(str(path))
        onnx.external_data_helper.set_external_data(graph.graph.initializer[0], "../secret", 0, 4)
        graph.graph.initializer[0].ClearField("raw_data")
        (tmp_path / "m.onnx").write_bytes(graph.SerializeToString())
        with pytest.raises(TdError, match="outside its directory"):
            storage_table(tmp_path / "m.onnx")

    def test_no_float_constants(self, tmp_path):
        entry = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b"])
        result = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b"])
        graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "by hand", [entry], [result])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        onnx.save(model, str(tmp_path / "m.onnx"))
        with pytest.raises(TdError, match="no float constants"):
            storage_table(tmp_path / "m.onnx")
