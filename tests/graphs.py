"""ONNX files built by hand, as from another exporter: no metadata of ours, and answers that are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def text_graph(path: Path, table: np.ndarray, *, per_token: bool, name: str = "scores") -> Path:
    """The logits of token i are ``table[input_ids[i]]``; of a text their sum over the tokens that are not padding."""
    inputs = [helper.make_tensor_value_info(n, TensorProto.INT64, ["b", "s"]) for n in ("input_ids", "attention_mask")]
    shape = ["b", "s", table.shape[1]] if per_token else ["b", table.shape[1]]
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["tokens"]),
        helper.make_node("Cast", ["attention_mask"], ["weights"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["weights", "last"], ["columns"]),
        helper.make_node("Mul", ["tokens", "columns"], ["kept"]),
        helper.make_node("Identity", ["tokens"], [name])
        if per_token
        else helper.make_node("ReduceSum", ["kept", "middle"], [name], keepdims=0),
    ]
    constants = [
        numpy_helper.from_array(table.astype(np.float32), "table"),
        numpy_helper.from_array(np.array([2]), "last"),
        numpy_helper.from_array(np.array([1]), "middle"),
    ]
    output = helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
    return _saved(path, nodes, inputs, output, constants)


def linear_graph(path: Path, weight: np.ndarray, batch: int | str = "b") -> Path:
    """``x @ weight``."""
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, weight.shape[0]])
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, weight.shape[1]])
    constant = numpy_helper.from_array(weight.astype(np.float32), "weight")
    return _saved(path, [helper.make_node("MatMul", ["x", "weight"], ["y"])], [given], output, [constant])


def _saved(path: Path, nodes: list, inputs: list, output: object, constants: list) -> Path:
    graph = helper.make_graph(nodes, "by hand", inputs, [output], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    onnx.save(model, str(path))
    return path
