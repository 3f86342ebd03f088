"""The contract of every family, last part: the ONNX file of a shrunk model is the masked model; so are its forms."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import pytest
import torch
from family_cases import FAMILIES
from family_checks import logits
from test_families import Pruned
from torch import Tensor, nn

from td_plugin.export import to_onnx
from td_plugin.export.forms import Form, derive
from td_plugin.model_inputs import model_inputs

FORMS: tuple[Form, ...] = ("fused", "int8")
CLOSE = 1e-4  # of one plus the value, as to_onnx and verify judge a float32 file
FAST = ("bert", "gpt2", "llama", "vit", "resnet", "own_mobilenet", "own_densenet", "own_vit", "own_lstm")
"""One of each way a file is made and fused: an encoder, decoders without and with shared heads, images, no family."""
FOLDED = "relative_position_bias_table"  # Swin's, looked up at constant places: the graph has what was found there


def other_inputs(pruned: Pruned) -> dict[str, Any]:
    """Drawn anew, with another batch size than the export's, and other lengths where there is a text."""
    if pruned.given is None:
        waveform = "input_values" in pruned.inputs  # the number of its samples stays the example's
        found = model_inputs(pruned.dense, batch=3, length=7 if waveform else 5, seed=1)
        assert found is not None
        return found
    draws = [pruned.case.inputs(pruned.dense, seed) for seed in (1, 2)]
    return {name: torch.cat([draw[name] for draw in draws]) for name in draws[0]}


def run(path: Path, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feed = {entry.name: inputs[entry.name].numpy() for entry in session.get_inputs()}
    names = [entry.name for entry in session.get_outputs()]
    return {name: torch.from_numpy(value) for name, value in zip(names, session.run(names, feed), strict=True)}


def sizes(tensor: Any) -> tuple[int, ...]:
    """Of a weight, in whatever order the graph has them: a linear layer's are the other way round there."""
    return tuple(sorted(size for size in tensor.shape if size > 1))


def weights(model: nn.Module) -> set[tuple[int, ...]]:
    kept = (tensor for name, tensor in model.named_parameters() if not name.endswith(FOLDED))
    return {found for tensor in kept if len(found := sizes(tensor)) > 1}


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES])
def test_the_file_is_the_masked_model(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pruned = Pruned(name, ("neurons", "channels", "heads"))
    capfd.readouterr()
    path = to_onnx(pruned.small, tmp_path / "small.onnx", pruned.inputs)
    assert capfd.readouterr() == ("", "")

    graph = onnx.load(path).graph
    assert {entry.name for entry in graph.input} == {n for n, v in pruned.inputs.items() if isinstance(v, Tensor)}
    assert {entry.type.tensor_type.shape.dim[0].dim_param for entry in graph.input} == {"batch"}

    inputs = other_inputs(pruned)
    actual = run(path, inputs)
    with torch.no_grad():
        expected = logits(pruned.masked(**inputs))
    expected = {"logits": expected["output"]} if expected.keys() == {"output"} else expected
    assert expected.keys() <= actual.keys()
    for key, values in expected.items():
        torch.testing.assert_close(actual[key], values, rtol=CLOSE, atol=CLOSE)

    stored = {sizes(onnx.numpy_helper.to_array(weight)) for weight in graph.initializer}
    assert weights(pruned.small) <= stored
    assert not stored & (weights(pruned.dense) - weights(pruned.small))
    check_forms(path, {name: value for name, value in inputs.items() if isinstance(value, Tensor)})


def check_forms(path: Path, inputs: Mapping[str, Tensor]) -> None:
    """Fused, or not and a reason; int8; both within the tolerance of their precision."""
    fused, int8 = (derive(path, path.with_suffix(f".{form}"), form, example_inputs=[inputs]) for form in FORMS)
    assert (fused.problem, int8.problem, int8.form) == ("", "", "int8")
    assert (fused.form == "fp32") == any(note.startswith("written unfused: ") for note in fused.notes)
    assert fused.parity is not None and int8.parity is not None and int8.parity.relative > fused.parity.relative
