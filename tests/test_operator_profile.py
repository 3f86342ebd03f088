"""FLOPs against counts by hand, and profiles: made-up events with known sums, and real ones of small graphs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from td_plugin.contract import TdError
from td_plugin.export.flops import count_flops
from td_plugin.export.graph_widths import layer_widths, width_changes
from td_plugin.export.node_events import NodeEvent, RunEvents, parse
from td_plugin.export.operator_profile import _profile, profile_operators
from td_plugin.export.operators import OUTSIDE, FormProfile, OperatorReport, OperatorTime
from td_plugin.export.quantize import quantize
from td_plugin.export.to_onnx import to_onnx

DOMAINS = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]


def weight(name: str, *shape: int) -> Any:
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    return numpy_helper.from_array(values, name)


def save(path: Path, nodes: Sequence[Any], inputs: dict[str, Sequence[Any]], weights: Sequence[Any]) -> Path:
    stated = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()]
    outputs = [helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, None)]
    graph = helper.make_graph(nodes, "graph", stated, outputs, weights)
    onnx.save(helper.make_model(graph, opset_imports=DOMAINS, ir_version=10), path)
    return path


def mlp(path: Path, inner: int = 16) -> Path:
    """x [b, 8] -> MatMul [8, inner] -> Relu -> Gemm, transposed [4, inner]."""
    nodes = [
        helper.make_node("MatMul", ["x", "up"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Gemm", ["r", "down", "bias"], ["y"], transB=1),
    ]
    return save(path, nodes, {"x": ["b", 8]}, [weight("up", 8, inner), weight("down", 4, inner), weight("bias", 4)])


def arrays(**shapes: tuple[int, ...]) -> dict[str, Any]:
    generator = np.random.default_rng(1)
    return {name: generator.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


class TestFlops:
    @pytest.mark.parametrize("rows", [1, 3, 17])
    def test_of_two_layers(self, tmp_path: Path, rows: int) -> None:
        counted = count_flops(mlp(tmp_path / "m.onnx"), arrays(x=(rows, 8)))
        assert counted.operators == {"MatMul": 2 * rows * 8 * 16, "Gemm": 2 * rows * 16 * 4}
        assert counted.total == 2 * rows * (8 * 16 + 16 * 4) and counted.uncounted == {}
        assert not [path for path in tmp_path.iterdir() if path.name != "m.onnx"]  # no profile is left

    def test_of_int8_is_that_of_what_it_stands_for(self, tmp_path: Path) -> None:
        dense = to_onnx(
            nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8)), tmp_path / "d", torch.randn(2, 32)
        )
        int8 = quantize(dense, tmp_path / "q")
        feeds = {"input": torch.randn(5, 32).numpy()}
        assert count_flops(int8, feeds).total == count_flops(dense, feeds).total == 2 * 5 * (32 * 64 + 64 * 8)

    @pytest.mark.parametrize(
        ("operator", "weights", "attributes", "flops"),
        [
            ("Conv", [("w", (5, 3, 3, 3))], {"pads": [1] * 4}, 2 * (2 * 5 * 8 * 8) * 27),
            ("Conv", [("w", (6, 1, 3, 3))], {"group": 3, "strides": [2, 2]}, 2 * (2 * 6 * 3 * 3) * 9),
            ("ConvTranspose", [("w", (3, 4, 2, 2))], {}, 2 * (2 * 3 * 8 * 8) * (4 * 4)),
        ],
    )
    def test_of_convolutions(
        self, tmp_path: Path, operator: str, weights: Any, attributes: dict[str, Any], flops: int
    ) -> None:
        node = helper.make_node(operator, ["x", "w"], ["y"], **attributes)
        path = save(tmp_path / "c.onnx", [node], {"x": ["b", 3, 8, 8]}, [weight(name, *s) for name, s in weights])
        assert count_flops(path, arrays(x=(2, 3, 8, 8))).total == flops

    @pytest.mark.parametrize(("operator", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
    def test_of_recurrent_layers(self, tmp_path: Path, operator: str, gates: int) -> None:
        node = helper.make_node(operator, ["x", "w", "r"], ["y"], hidden_size=6)
        weights = [weight("w", 1, gates * 6, 5), weight("r", 1, gates * 6, 6)]
        path = save(tmp_path / "r.onnx", [node], {"x": ["s", "b", 5]}, weights)
        assert count_flops(path, arrays(x=(7, 2, 5))).total == 2 * 7 * 2 * (gates * 6 * 5 + gates * 6 * 6)

    def test_of_fused_attention(self, tmp_path: Path) -> None:
        b, s, h = 2, 7, 12
        projections, scores = 2 * b * s * h * 3 * h, 2 * (2 * b * s * s * h)
        fused = helper.make_node("Attention", ["x", "w", "b"], ["y"], domain="com.microsoft", num_heads=3)
        path = save(tmp_path / "a.onnx", [fused], {"x": ["b", "s", h]}, [weight("w", h, 3 * h), weight("b", 3 * h)])
        assert count_flops(path, arrays(x=(b, s, h))).total == projections + scores
        many = helper.make_node("MultiHeadAttention", ["q", "k", "v"], ["y"], domain="com.microsoft", num_heads=3)
        path = save(tmp_path / "m.onnx", [many], {name: ["b", f"s{name}", h] for name in "qkv"}, [])
        feeds = arrays(q=(b, 3, h), k=(b, s, h), v=(b, s, h))
        assert count_flops(path, feeds).total == 2 * (2 * b * 3 * s * h)

    def test_of_a_product_of_two_inputs_with_more_dimensions(self, tmp_path: Path) -> None:
        path = save(
            tmp_path / "p.onnx", [helper.make_node("MatMul", ["a", "b"], ["y"])], {"a": [2, 3, 4, 5], "b": [5, 6]}, []
        )
        assert count_flops(path, arrays(a=(2, 3, 4, 5), b=(5, 6))).total == 2 * 2 * 3 * 4 * 5 * 6

    def test_a_loop_counts_as_often_as_it_runs(self, tmp_path: Path) -> None:
        values = [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("h", TensorProto.FLOAT, [2, 8]),
        ]
        outputs = [
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("h2", TensorProto.FLOAT, [2, 8]),
        ]
        inner = [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("MatMul", ["h", "w"], ["h2"])]
        body = helper.make_graph(inner, "body", values, outputs)
        loop = helper.make_node("Loop", ["times", "", "x"], ["y"], body=body)
        times = numpy_helper.from_array(np.array(3, np.int64), "times")
        path = save(tmp_path / "l.onnx", [loop], {"x": [2, 8]}, [weight("w", 8, 8), times])
        assert count_flops(path, arrays(x=(2, 8))).total == 3 * 2 * 2 * 8 * 8

    def test_what_is_not_counted_is_named(self, tmp_path: Path) -> None:
        node = helper.make_node("Einsum", ["a", "b"], ["y"], equation="ij,jk->ik")
        path = save(tmp_path / "e.onnx", [node], {"a": [2, 3], "b": [3, 4]}, [])
        assert count_flops(path, arrays(a=(2, 3), b=(3, 4))).uncounted == {"Einsum": 1}

    def test_a_graph_that_cannot_run(self, tmp_path: Path) -> None:
        with pytest.raises(TdError, match=r"no FLOPs.*m\.onnx"):
            count_flops(mlp(tmp_path / "m.onnx"), arrays(x=(2, 9)))


def event(name: str, operator: str, start: int, micros: int) -> dict[str, Any]:
    args = {"op_name": operator, "input_type_shape": [{"float": [1, 2]}], "output_type_shape": [{"float": [1, 3]}]}
    return {"cat": "Node", "name": f"{name}_kernel_time", "ts": start, "dur": micros, "args": args}


class TestParse:
    def test_nodes_fall_into_the_run_they_ran_in(self) -> None:
        events = [
            {"cat": "Session", "name": "model_loading_uri", "ts": 0, "dur": 9},
            event("early", "MatMul", 5, 100),  # before any run
            event("b", "Add", 130, 7),
            event("a", "MatMul", 110, 20),
            {"cat": "Session", "name": "model_run", "ts": 200, "dur": 80},
            {"cat": "Session", "name": "model_run", "ts": 100, "dur": 50},
            {"cat": "Node", "name": "a_fence_before", "ts": 105, "dur": 1, "args": {"op_name": "MatMul"}},
            event("loop", "Loop", 210, 60),  # its body is recorded itself
            event("inside", "Add", 220, 40),
        ]
        first, second = parse(events)
        assert first == RunEvents(
            50e-6,
            (
                NodeEvent("MatMul", "a", 20e-6, ((1, 2),), ((1, 3),)),
                NodeEvent("Add", "b", 7e-6, ((1, 2),), ((1, 3),)),
            ),
        )
        assert [node.node for node in second.nodes] == ["inside"]

    def test_medians_over_runs(self) -> None:
        def run(*seconds: float) -> RunEvents:
            nodes = [NodeEvent("MatMul", "", s, (), ()) for s in seconds[:2]] + [
                NodeEvent("Add", "", seconds[2], (), ())
            ]
            return RunEvents(seconds[3], tuple(nodes))

        form = _profile("f", [run(1, 1, 1, 5), run(2, 2, 1, 6), run(9, 9, 9, 60)], flops=7)
        assert form.seconds == 6 and form.flops == 7
        assert form.operators == (
            OperatorTime("MatMul", 4, 4 / 6, 2),
            OperatorTime(OUTSIDE, 2, 2 / 6, 0),
            OperatorTime("Add", 1, 1 / 6, 1),
        )


def form(name: str, flops: int | None, **operators: float) -> FormProfile:
    total = sum(operators.values())
    rows = [OperatorTime(operator.replace("_", " "), s, s / total, 1) for operator, s in operators.items()]
    return FormProfile(name, total, tuple(rows), flops)


class TestReport:
    DENSE = form("dense", 300, MatMul=0.09, LayerNormalization=0.009, Tiny=1e-5, Small=1e-5, outside_operators=0.001)
    PRUNED = form("pruned", 100, MatMul=0.030, LayerNormalization=0.009, Tiny=1e-5, outside_operators=0.001)
    INT8 = form("int8", 100, DynamicQuantizeMatMul=0.008, MatMulInteger=0.002, LayerNormalization=0.009)

    def test_the_rest_is_time_over_what_the_flops_say(self) -> None:
        report = OperatorReport((self.DENSE, self.PRUNED, self.INT8), threads=1, runs=3)
        rest = {row.operator: row for row in report.rest("pruned", over="dense")}
        assert rest["normalization"].excess == pytest.approx(0.009 - 0.009 / 3)
        assert rest["matrix products"].excess == pytest.approx(0)
        assert OUTSIDE not in rest
        assert next(iter(rest)) == "normalization"
        int8 = {row.operator: row for row in report.rest("int8", over="dense")}
        assert (int8["matrix products"].before, int8["matrix products"].after) == (0.09, pytest.approx(0.01))
        text = str(report)
        assert "pruned: 6.00 ms more" in text and "normalization +6.00 ms" in text and "int8: 14.01 ms less" in text
        assert "2 others" in text and "Tiny" not in text
        values = report.to_dict()
        assert list(values["rest"]) == ["pruned", "int8"] and values["forms"][0]["name"] == "dense"

    def test_unknown_flops_and_names(self) -> None:
        report = OperatorReport((self.DENSE, form("gpu", None, MatMul=0.1)), threads=1, runs=3)
        assert "gpu:" not in str(report) and report.to_dict()["rest"] == {}
        with pytest.raises(TdError, match="FLOPs are not known"):
            report.rest("gpu", over="dense")
        with pytest.raises(TdError, match="no such file"):
            report.form("other")


class TestProfileOperators:
    def test_of_two_files(self, tmp_path: Path) -> None:
        files = {"dense": mlp(tmp_path / "d.onnx", 512), "pruned": mlp(tmp_path / "p.onnx", 64)}
        report = profile_operators(files, arrays(x=(64, 8)), runs=5, progress=True)
        dense, pruned = report.forms
        assert (dense.flops, pruned.flops) == (2 * 64 * 12 * 512, 2 * 64 * 12 * 64)
        for profile in report.forms:
            assert {row.operator for row in profile.operators} >= {"MatMul", OUTSIDE}
            for row in profile.operators:
                assert row.seconds >= 0 and row.share == pytest.approx(row.seconds / profile.seconds)
        assert "dense ms" in str(report) and "median of 5 recorded runs" in str(report)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["d.onnx", "p.onnx"]

    @pytest.mark.parametrize(
        ("change", "message"),
        [({"runs": 0}, "nothing to record"), ({"threads": 0}, "nothing to record")],
    )
    def test_counts(self, tmp_path: Path, change: dict[str, int], message: str) -> None:
        with pytest.raises(TdError, match=message):
            profile_operators({"m": mlp(tmp_path / "m.onnx")}, arrays(x=(1, 8)), **change)

    def test_inputs_that_the_graph_cannot_run(self, tmp_path: Path) -> None:
        path = save(
            tmp_path / "m.onnx", [helper.make_node("MatMul", ["a", "w"], ["y"])], {"a": ["b", "c"]}, [weight("w", 3, 4)]
        )
        with pytest.raises(TdError, match=r"onnxruntime cannot run the graph.*m\.onnx"):
            profile_operators({"m": path}, arrays(a=(2, 5)))


def named(path: Path, metadata: dict[str, str]) -> Path:
    model = onnx.load(path)
    helper.set_model_props(model, metadata)
    onnx.save(model, path)
    return path


class TestWidths:
    def test_of_an_exported_model(self, tmp_path: Path) -> None:
        def net(channels: int, inner: int) -> nn.Module:
            flat = nn.Sequential(nn.Conv2d(3, channels, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
            return nn.Sequential(flat, nn.Linear(channels, inner), nn.ReLU(), nn.Linear(inner, 2))

        def make(name: str, *sizes: int) -> Path:
            return to_onnx(net(*sizes), tmp_path / name, torch.randn(2, 3, 8, 8))

        paths = {"dense": make("d", 16, 32), "pruned": make("p", 8, 24)}
        assert layer_widths(onnx.load(paths["dense"])) == {"0.0": 16, "1": 32, "3": 2}
        assert width_changes(paths) == {"pruned": {"0.0": (16, 8), "1": (32, 24)}}

    def test_metadata_comes_first_and_nonsense_in_it_says_nothing(self, tmp_path: Path) -> None:
        told = named(mlp(tmp_path / "a"), {"td-plugin.widths": '{"encoder.0": [64, 16]}'})
        assert width_changes({"told": told}) == {"told": {"encoder.0": (64, 16)}}
        for text in ("{", "[1]", '{"a": 3}', '{"a": ["x", 1]}'):
            odd = named(mlp(tmp_path / "b", 4), {"td-plugin.widths": text})
            assert width_changes({"dense": mlp(tmp_path / "d"), "odd": odd}) == {}
