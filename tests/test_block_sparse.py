"""Matrices with blocks of zeros: numpy says what every rewritten product is; times are made up, never asserted."""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from td_plugin.contract import TdError
from td_plugin.export.benchmark import file_size
from td_plugin.export.block_graph import find_sites, replace
from td_plugin.export.block_layout import Layout, find_layouts
from td_plugin.export.block_rewrite import Product, dense_part, sparse_part, ways
from td_plugin.export.block_sparse import KEY, BlockSparseReport, block_sparse
from td_plugin.export.block_timing import fastest
from td_plugin.export.quantize import quantize
from td_plugin.export.speedup import Speedup
from td_plugin.export.to_onnx import to_onnx

WAYS = ("split", "gather", "rows")
TYPES = {"float16": TensorProto.FLOAT16, "float32": TensorProto.FLOAT, "float64": TensorProto.DOUBLE}
CLOSE = {"float16": 2e-2, "float32": 1e-5, "float64": 1e-12}


def blocky(shape: tuple[int, int], block: tuple[int, int], density: float, seed: int = 0) -> np.ndarray:
    """``[rows, columns]`` float32; whole blocks of zeros, those at the edges cut off."""
    generator = np.random.default_rng(seed)
    grid = [-(-size // step) for size, step in zip(shape, block, strict=True)]
    kept = generator.random(grid) < density
    mask = np.kron(kept, np.ones(block))[: shape[0], : shape[1]]
    return (generator.choice([-1, 1], shape) * generator.uniform(0.5, 1.5, shape) * mask).astype(np.float32)


def saved(
    path: Path, nodes: list, inputs: dict, outputs: dict, constants: dict, opset: int = 20, **options: Any
) -> Path:
    """An ONNX file; inputs and outputs are name -> shape, float32 unless the constants are something else."""
    dtype = next((str(v.dtype) for v in constants.values() if str(v.dtype) in TYPES), "float32")
    entries = [
        [helper.make_tensor_value_info(name, TYPES[dtype], shape) for name, shape in side.items()]
        for side in (inputs, outputs)
    ]
    tensors = [numpy_helper.from_array(np.ascontiguousarray(values), name) for name, values in constants.items()]
    graph = helper.make_graph(nodes, "by hand", *entries, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    onnx.checker.check_model(model)
    onnx.save(model, str(path), **options)
    return path


def one_product(path: Path, weight: np.ndarray, **options: Any) -> Path:
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    shapes = [["batch", "sequence", size] for size in weight.shape]
    return saved(path, [node], {"x": shapes[0]}, {"y": shapes[1]}, {"w": weight}, **options)


def answers(model: Any, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    session = ort.InferenceSession(str(model) if isinstance(model, Path) else model.SerializeToString())
    return session.run(None, dict(feeds))


def close(found: np.ndarray, expected: np.ndarray) -> bool:
    scale = max(1.0, np.abs(expected).max(initial=0))
    return found.shape == expected.shape and bool(np.allclose(found, expected, 0, CLOSE[str(found.dtype)] * scale))


class TestLayouts:
    @settings(max_examples=80, deadline=None)
    @given(
        shape=st.tuples(st.integers(1, 90), st.integers(1, 90)),
        block=st.tuples(st.integers(1, 40), st.integers(1, 40)),
        density=st.floats(0, 1),
        seed=st.integers(0, 99),
    )
    def test_a_given_block_keeps_exactly_the_blocks_that_are_not_zero(self, shape, block, density, seed):
        weight = blocky(shape, block, density, seed)
        weight[np.random.default_rng(seed).random(shape) < 0.3] = 0  # single zeros within blocks
        expected = np.zeros(shape, bool)
        for i in range(0, shape[0], block[0]):
            for j in range(0, shape[1], block[1]):
                expected[i : i + block[0], j : j + block[1]] = (weight[i : i + block[0], j : j + block[1]] != 0).any()
        for j in range(0, shape[1], block[1]):  # a product with no rows would be no product
            if not expected[:, j].any():
                expected[: block[0], j : j + block[1]] = True
        layouts = find_layouts(weight, block, 128)
        assert bool(layouts) == (not expected.all())
        for layout in layouts:
            assert (covered(layout) == expected).all()
            assert layout.density == pytest.approx(expected.mean())

    @settings(max_examples=60, deadline=None)
    @given(
        shape=st.tuples(st.integers(1, 200), st.integers(1, 200)),
        block=st.tuples(st.sampled_from([1, 4, 16, 32]), st.sampled_from([16, 32, 100])),
        density=st.floats(0, 0.6),
    )
    def test_what_is_found_covers_all_that_is_not_zero(self, shape, block, density):
        weight = blocky(shape, block, density)
        for layout in find_layouts(weight, None, 10**6):
            assert covered(layout)[weight != 0].all()
            assert layout.density < 1
            edges = [edge for group in layout.groups for edge in (group.start, group.stop)]
            assert edges == sorted(edges) and edges[0] == 0 and edges[-1] == shape[1]
            segments = layout.segments
            assert segments[0][0] == 0 and segments[-1][1] == shape[0]
            for group in layout.groups:
                kept = set(group.rows.tolist())
                assert all(len(kept & set(range(*segment))) in (0, segment[1] - segment[0]) for segment in segments)

    @pytest.mark.parametrize("block", [(16, 64), (32, 128), (64, 256)])
    def test_the_blocks_of_a_mask_are_found(self, block):
        best = find_layouts(blocky((768, 1024), block, 0.2), None, 128)[0]
        assert (best.height, best.width) == block

    def test_groups_of_odd_widths_are_found_where_they_lie(self):
        weight = np.concatenate([blocky((256, width), (16, width), 0.2, width) for width in (90, 70, 140)], axis=1)
        best = find_layouts(weight, None, 10**6)[0]
        assert [(group.start, group.stop) for group in best.groups] == [(0, 90), (90, 160), (160, 300)]

    def test_inputs_that_nobody_reads_make_one_group(self):
        weight = blocky((256, 192), (16, 192), 0.3)
        best = find_layouts(weight, None, 128)[0]
        assert len(best.groups) == 1 and best.density == pytest.approx((weight != 0).mean())

    @pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
    def test_single_zeros_are_no_blocks(self, share):
        weight = np.random.default_rng(0).standard_normal((256, 512)).astype(np.float32)
        weight[np.random.default_rng(1).random(weight.shape) < share] = 0
        assert find_layouts(weight, None, 128) == []


def covered(layout: Layout) -> np.ndarray:
    mask = np.zeros(layout.shape, bool)
    for group in layout.groups:
        mask[group.rows, group.start : group.stop] = True
    return mask


@st.composite
def cases(draw: Any) -> dict[str, Any]:
    """A MatMul or Gemm with a blocky weight, its input, and what numpy says it computes."""
    shape = draw(st.tuples(st.integers(1, 70), st.integers(1, 70)))
    block = draw(st.tuples(st.sampled_from([1, 3, 4, 8, 16]), st.sampled_from([1, 5, 16, 40])))
    weight = blocky(shape, block, draw(st.sampled_from([0.0, 0.2, 0.5])), draw(st.integers(0, 99)))
    weight = weight.astype(draw(st.sampled_from(["float32", "float32", "float64", "float16"])))
    generator = np.random.default_rng(0)
    if draw(st.booleans()):
        outer = draw(st.sampled_from([(3,), (2, 3), (1, 1), (2, 1, 3), ()]))
        x = generator.standard_normal((*outer, shape[0])).astype(weight.dtype)
        node = helper.make_node("MatMul", ["x", "w"], ["y"], name="n")
        return {"node": node, "x": x, "constants": {"w": weight}, "block": block, "y": _wide(x) @ _wide(weight)}
    flags = {name: draw(st.integers(0, 1)) for name in ("transA", "transB")}
    alpha, beta = (draw(st.sampled_from([1.0, 0.5, -2.0])) for _ in range(2))
    x = generator.standard_normal((5, shape[0])).astype(weight.dtype)
    bias_shape = draw(st.sampled_from([None, (), (1,), (shape[1],), (1, shape[1]), (5, shape[1]), (5, 1)]))
    constants = {"w": weight.T if flags["transB"] else weight}
    expected = alpha * (_wide(x) @ _wide(weight))
    if bias_shape is not None:
        constants["c"] = generator.standard_normal(bias_shape).astype(weight.dtype)
        expected = expected + beta * _wide(constants["c"])
    names = ["x", *constants]
    node = helper.make_node("Gemm", names, ["y"], name="n", alpha=alpha, beta=beta, **flags)
    return {"node": node, "x": x.T if flags["transA"] else x, "constants": constants, "block": block, "y": expected}


def _wide(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float64)


class TestRewrite:
    @settings(max_examples=120, deadline=None)
    @given(case=cases(), way=st.sampled_from(WAYS), opset=st.sampled_from([14, 18, 20]), own=st.booleans())
    def test_equals_numpy(self, tmp_path_factory, case, way, opset, own):
        path = tmp_path_factory.mktemp("case") / "model.onnx"
        shapes = [[None] * values.ndim for values in (case["x"], case["y"])]
        saved(path, [case["node"]], {"x": shapes[0]}, {"y": shapes[1]}, case["constants"], opset)
        graph = onnx.load(str(path))
        (site,) = find_sites(graph)
        layouts = find_layouts(site.product.weight, case["block"] if own else None, 10**6)
        for layout in layouts[:1]:
            if way == "gather" and layout.shape[0] % layout.height:
                continue  # not among `ways`
            replace(graph, {"n": (site, sparse_part(site.product, layout, way))})
            onnx.checker.check_model(graph, full_check=True)
            assert "w" not in {tensor.name for tensor in graph.graph.initializer}
            assert {node.domain for node in graph.graph.node} == {""}
            (found,) = answers(graph, {"x": np.ascontiguousarray(case["x"])})
            assert close(found, case["y"])

    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("outer", [(1, 1), (4, 7), (0, 3), (2, 0)])
    def test_any_number_of_rows(self, tmp_path, way, outer):
        weight = blocky((64, 96), (16, 32), 0.4)
        graph = onnx.load(str(one_product(tmp_path / "m.onnx", weight)))
        graph.graph.node[0].name = "n"
        (site,) = find_sites(graph)
        layout = find_layouts(weight, (16, 32), 128)[0]
        replace(graph, {"n": (site, sparse_part(site.product, layout, way))})
        x = np.random.default_rng(0).standard_normal((*outer, 64)).astype(np.float32)
        assert close(answers(graph, {"x": x})[0], x @ weight)

    def test_a_way_that_cannot_work_is_not_offered(self):
        weight = blocky((100, 64), (16, 32), 0.3)  # 100 rows are no multiple of 16
        (layout,) = find_layouts(weight, (16, 32), 128)
        assert "gather" not in ways(layout)

    def test_the_whole_constants_are_the_blocks(self):
        weight = blocky((64, 96), (16, 32), 0.4)
        (layout,) = find_layouts(weight, (16, 32), 128)
        for way in WAYS:
            part = sparse_part(Product("x", "y", weight, None, False, "w"), layout, way)
            floats = [values for values in part.constants.values() if values.dtype == np.float32]
            assert sum(values.size for values in floats) == round(layout.density * weight.size)
            assert sum(np.abs(values).sum() for values in floats) == pytest.approx(np.abs(weight).sum(), rel=1e-6)


class TestTiming:
    def test_one_of_the_parts_and_a_speedup(self):
        product = Product("x", "y", blocky((64, 96), (16, 32), 0.3), None, False, "w")
        (layout,) = find_layouts(product.weight, (16, 32), 128)
        parts = {way: sparse_part(product, layout, way) for way in ("split", "gather")}
        best, speedup = fastest(product, parts, 4)
        assert best in parts and 0 < speedup.low <= speedup.median <= speedup.high

    def test_a_part_that_computes_something_else_is_refused(self):
        product = Product("x", "y", blocky((64, 96), (16, 32), 0.3), None, False, "w")
        wrong = dense_part(Product("x", "y", product.weight * 1.01, None, False, "w"))
        with pytest.raises(TdError, match=r"wrong does not compute what the product does; where: w; got: max"):
            fastest(product, {"wrong": wrong}, 4)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the stage is told instead of a measurement; ``asked`` holds the rows it asked for, by weight."""
    told: dict[str, Any] = {"speedup": Speedup(2.0, 1.9, 2.1), "way": 0, "asked": {}}

    def answer(product: Product, parts: dict, rows: int, *, threads: int, opset: int) -> tuple[str, Speedup]:
        told["asked"][product.label] = rows
        return list(parts)[told["way"] % len(parts)], told["speedup"]

    stage = importlib.import_module("td_plugin.export.block_sparse")
    monkeypatch.setattr(stage, "fastest", answer)
    return told


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return one_product(tmp_path / "source.onnx", blocky((64, 96), (16, 32), 0.3))


def inputs(rows: int = 4, size: int = 64) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(1).standard_normal((2, rows, size)).astype(np.float32)}


def rewrite(source: Path, target: Path, **options: Any) -> BlockSparseReport:
    """With the block given: matrices as small as these are not worth trying otherwise."""
    return block_sparse(source, target, **{"block": (16, 32), **options})


class TestStage:
    def test_a_model_of_torch(self, tmp_path, timed):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64), nn.Linear(64, 3))
        for index in (0, 2):
            weight = model[index].weight.data
            weight.copy_(torch.from_numpy(blocky(weight.T.shape, (16, 32), 0.3, index).T.copy()))
        example = torch.randn(2, 5, 64)
        path = to_onnx(model, tmp_path / "dense.onnx", example, metadata={"note": "kept"})
        report = rewrite(path, tmp_path / "blocks.onnx", example_inputs={"input": example})
        assert [row.layers for row in report.rows] == [("0",), ("2",), ("3",)]
        assert [row.choice for row in report.rows] == ["split", "split", "dense"]
        assert [row.inputs for row in report.rows] == [10, 10, 10]
        assert report.rows[0].shape == (64, 96) and report.rows[0].block == (16, 32)
        assert report.rows[0].zeros == pytest.approx((model[0].weight == 0).double().mean())
        with torch.no_grad():
            expected = model(example).numpy()
        np.testing.assert_allclose(answers(report.path, {"input": example.numpy()})[0], expected, atol=1e-5)
        noted = {entry.key: entry.value for entry in onnx.load(str(report.path)).metadata_props}
        assert noted["note"] == "kept"
        assert list(json.loads(noted[KEY]).values()) == [
            ["split", 16, 32, round(r.density, 4)] for r in report.rows[:2]
        ]
        assert report.bytes == report.path.stat().st_size < report.source_bytes == path.stat().st_size
        assert report.parity is not None and report.parity.max_abs < 1e-5

    def test_the_report(self, source, tmp_path, timed):
        report = rewrite(source, tmp_path / "t.onnx")
        assert "2.00x [1.90, 2.10] faster at 128 rows" in str(report)
        assert "1 of 1 matrices rewritten, at 1.05x and more with 1 thread(s)" in str(report)
        told = json.loads(json.dumps(report.to_dict()))
        assert told["rewritten"] == 1 and told["rows"][0]["speedup"]["median"] == 2.0
        assert told["parity"]["batches"] == report.parity.batches

    @pytest.mark.parametrize("speedup", [Speedup(1.04, 1.035, 1.06), Speedup(1.3, 0.9, 1.6)])
    def test_what_does_not_win_stays_as_it_is(self, source, tmp_path, timed, speedup):
        timed["speedup"] = speedup
        with pytest.warns(UserWarning, match=r"no matrix is faster in blocks here \(the best: 1\.[03]"):
            report = rewrite(source, tmp_path / "t.onnx")
        assert report.rewritten == 0 and report.rows[0].choice == "dense" and report.rows[0].speedup == speedup
        assert [node.op_type for node in onnx.load(str(report.path)).graph.node] == ["MatMul"]
        assert (answers(report.path, inputs())[0] == answers(source, inputs())[0]).all()

    def test_a_gain_that_was_not_asked_for(self, source, tmp_path, timed):
        with pytest.warns(UserWarning, match="asked for: 3x"):
            assert rewrite(source, tmp_path / "t.onnx", min_gain=3).rewritten == 0

    @pytest.mark.parametrize("way", range(3))
    def test_a_weight_of_two_nodes_is_stored_once(self, tmp_path, timed, way):
        timed["way"] = way
        weight = blocky((64, 64), (16, 32), 0.3)
        nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("MatMul", ["h", "w"], ["y"])]
        shape = ["batch", "sequence", 64]
        path = saved(tmp_path / "s.onnx", nodes, {"x": shape}, {"y": shape}, {"w": weight})
        report = rewrite(path, tmp_path / "t.onnx")
        assert len(report.rows) == 1 and len(report.rows[0].layers) == 2
        stored = [t for t in onnx.load(str(report.path)).graph.initializer if t.data_type == TensorProto.FLOAT]
        assert sum(np.prod(t.dims) for t in stored) == round(report.rows[0].density * weight.size)
        assert close(answers(report.path, inputs())[0], inputs()["x"] @ weight @ weight)

    def test_a_weight_that_is_read_elsewhere_stays(self, tmp_path, timed):
        weight = blocky((64, 64), (16, 32), 0.3)
        branch = helper.make_graph(
            [helper.make_node("Identity", ["w"], ["inner"])],
            "branch",
            [],
            [helper.make_tensor_value_info("inner", TensorProto.FLOAT, [64, 64])],
        )
        nodes = [
            helper.make_node("MatMul", ["x", "w"], ["h"]),
            helper.make_node("If", ["yes"], ["again"], then_branch=branch, else_branch=branch),
            helper.make_node("MatMul", ["h", "again"], ["y"]),
        ]
        shape = ["batch", "sequence", 64]
        path = saved(tmp_path / "s.onnx", nodes, {"x": shape}, {"y": shape}, {"w": weight, "yes": np.array(True)})
        report = rewrite(path, tmp_path / "t.onnx")
        assert "w" in {tensor.name for tensor in onnx.load(str(report.path)).graph.initializer}
        assert close(answers(report.path, inputs())[0], inputs()["x"] @ weight @ weight)

    def test_a_weight_in_a_constant_node(self, tmp_path, timed):
        weight = blocky((64, 96), (16, 32), 0.3)
        constant = helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(weight))
        nodes = [constant, helper.make_node("MatMul", ["x", "w"], ["y"])]
        shapes = [["batch", "sequence", size] for size in weight.shape]
        path = saved(tmp_path / "s.onnx", nodes, {"x": shapes[0]}, {"y": shapes[1]}, {})
        report = rewrite(path, tmp_path / "t.onnx")
        assert report.rewritten == 1
        assert "Constant" not in {node.op_type for node in onnx.load(str(report.path)).graph.node}
        assert close(answers(report.path, inputs())[0], inputs()["x"] @ weight)

    def test_a_weight_that_a_caller_may_replace_is_left_alone(self, tmp_path, timed):
        weight = blocky((64, 96), (16, 32), 0.3)
        node = helper.make_node("MatMul", ["x", "w"], ["y"])
        shapes = {"x": ["batch", 64], "w": [64, 96]}
        path = saved(tmp_path / "s.onnx", [node], shapes, {"y": ["batch", 96]}, {"w": weight})
        with pytest.raises(TdError, match="no blocks of zeros"):
            rewrite(path, tmp_path / "t.onnx")

    def test_weights_outside_the_file(self, tmp_path, timed):
        weight = blocky((64, 96), (16, 32), 0.3)
        path = one_product(tmp_path / "s.onnx", weight, save_as_external_data=True, location="s.data", size_threshold=0)
        report = rewrite(path, tmp_path / "out" / "t.onnx")
        assert report.source_bytes == file_size(path)
        assert [file.name for file in (tmp_path / "out").iterdir()] == ["t.onnx"]
        assert close(answers(report.path, inputs())[0], inputs()["x"] @ weight)

    def test_it_is_measured_at_the_rows_of_the_example(self, source, tmp_path, timed):
        rewrite(source, tmp_path / "t.onnx", example_inputs=inputs(7))
        assert timed["asked"] == {"w": 14}
        rewrite(source, tmp_path / "t.onnx", example_inputs=[inputs(3), inputs(9)])
        assert timed["asked"] == {"w": 6}

    def test_it_can_be_quantized_afterwards(self, tmp_path, timed):
        weight = blocky((64, 96), (16, 32), 0.3)
        report = rewrite(one_product(tmp_path / "s.onnx", weight), tmp_path / "t.onnx")
        found = answers(quantize(report.path, tmp_path / "q.onnx"), inputs())[0]
        expected = inputs()["x"] @ weight
        assert np.linalg.norm(found - expected) < 0.02 * np.linalg.norm(expected)

    def test_twice(self, source, tmp_path, timed):
        first = rewrite(source, tmp_path / "t.onnx", block=(32, 32))
        second = rewrite(first.path, tmp_path / "u.onnx")  # what 32x32 was too coarse to see
        assert second.rewritten >= 1
        assert close(answers(second.path, inputs())[0], answers(source, inputs())[0])

    def test_no_time_is_made_up(self, source, tmp_path):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # whether it wins is not this test's matter
            report = rewrite(source, tmp_path / "t.onnx")
        (row,) = report.rows
        assert row.speedup is not None and (row.choice == "dense") == (report.rewritten == 0)
        assert close(answers(report.path, inputs())[0], answers(source, inputs())[0])


class TestRefusals:
    def refused(self, tmp_path: Path, match: str, path: Path, **options: Any) -> None:
        target = tmp_path / "t.onnx"
        target.write_bytes(b"what was there")
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(TdError, match=match):
            block_sparse(path, target, **options)
        assert target.read_bytes() == b"what was there" and sorted(tmp_path.rglob("*")) == before

    def test_no_blocks_of_zeros(self, tmp_path):
        weight = np.random.default_rng(0).standard_normal((64, 96)).astype(np.float32)
        weight[np.random.default_rng(1).random(weight.shape) < 0.5] = 0
        path = one_product(tmp_path / "s.onnx", weight)
        self.refused(tmp_path, "no blocks of zeros, or too small ones; .*got: 1 matrices; fix: single zeros", path)
        self.refused(tmp_path, "got: 1 matrices, blocks of 8x8", path, block=(8, 8))

    def test_a_quantized_file(self, tmp_path, source):
        path = quantize(source, tmp_path / "q.onnx")
        self.refused(tmp_path, "already quantized", path)

    def test_an_fp16_file(self, tmp_path):
        path = one_product(tmp_path / "s.onnx", blocky((64, 96), (16, 32), 0.3).astype(np.float16))
        self.refused(tmp_path, "forms are made of the fp32 file", path)

    def test_an_old_opset(self, tmp_path):
        path = one_product(tmp_path / "s.onnx", blocky((64, 96), (16, 32), 0.3), opset=13)
        self.refused(tmp_path, "the rewritten products take opset 14; .*got: 13", path)

    def test_a_missing_file(self, tmp_path):
        self.refused(tmp_path, "there is no such ONNX file", tmp_path / "none.onnx")

    def test_inputs_that_do_not_fit(self, tmp_path, source):
        self.refused(tmp_path, "needs inputs that were not given: x", source, example_inputs={"z": torch.zeros(1)})
        self.refused(tmp_path, "has another shape", source, example_inputs=inputs(size=63))

    def test_source_and_target_are_one_file(self, source):
        with pytest.raises(TdError, match="the same file"):
            block_sparse(source, source)

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"block": (0, 16)}, "a block has rows and columns"),
            ({"min_gain": 0.9}, "a gain below 1 is a loss"),
            ({"min_gain": float("nan")}, "a gain below 1 is a loss"),
            ({"threads": 0}, "threads=0"),
        ],
    )
    def test_arguments(self, tmp_path, source, options, match):
        self.refused(tmp_path, match, source, **options)

    def test_a_rewrite_that_is_wrong_is_not_written(self, tmp_path, source, timed, monkeypatch):
        stage = importlib.import_module("td_plugin.export.block_sparse")

        def wrong(product: Product, layout: Layout, way: Any) -> Any:
            part = sparse_part(product, layout, way)
            name = next(name for name, values in part.constants.items() if values.dtype == np.float32)
            part.constants[name] = part.constants[name] + 0.1
            return part

        monkeypatch.setattr(stage, "sparse_part", wrong)
        self.refused(tmp_path, "the rewritten graph computes something else", source, block=(16, 32))
