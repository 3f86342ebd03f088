"""The demo, cut short: every file, one table, a picture; and the curve is that of the trained model."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

import td_plugin as td
from td_plugin.export.plots import plot_accuracy
from td_plugin.integrations import digits
from td_plugin.integrations.demo import DENSE, LEVELS, TARGETED, DemoConfig, prune, run_demo


def test_a_short_demo_writes_everything(tmp_path: Path) -> None:
    result = run_demo(DemoConfig(tmp_path / "out", epochs=1, rounds=5))
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["accuracy.png", "dense.onnx", "shrunk", "shrunk.onnx"]
    dense, targeted = result.rows
    assert targeted.parameters < dense.parameters / 3 and targeted.bytes < dense.bytes
    assert [level for level, _ in result.curves[TARGETED]] == list(LEVELS)
    # What ships, at γ, is on the curve of the trained model: masks, squashing and shrinking change nothing.
    for row in result.rows:
        curve = dict(result.curves[row.training])
        assert row.accuracy == curve[0.0] and row.pruned_accuracy == pytest.approx(curve[0.75], abs=1e-6)
    text = str(result)
    assert DENSE in text and TARGETED in text and "accuracy.png" in text
    assert result.to_dict()["verdict"] in ("faster", "slower", "no difference")


@pytest.mark.slow
def test_targeted_dropout_clearly_wins(tmp_path: Path) -> None:
    dense, targeted = run_demo(DemoConfig(tmp_path, rounds=5)).rows
    assert dense.accuracy > 0.95
    assert targeted.pruned_accuracy > 0.9
    assert targeted.pruned_accuracy > dense.pruned_accuracy + 0.3


def test_a_wrong_level_and_a_wrong_output_are_said_first(tmp_path: Path) -> None:
    with pytest.raises(td.TdError, match="sparsity_level"):
        run_demo(DemoConfig(tmp_path / "out", sparsity_level=1.0))
    (tmp_path / "file").write_text("")
    with pytest.raises(td.TdError, match="cannot be written"):
        run_demo(DemoConfig(tmp_path / "file"))
    assert not (tmp_path / "out").exists()


def test_the_split_is_fixed_and_stratified() -> None:
    first, second = digits.load(), digits.load()
    assert len(first.train) == 1347 and first.pixels.shape == (450, 1, 8, 8)
    assert first.labels.equal(second.labels) and first.labels.bincount().min() >= 43
    assert first.pixels.min() == -1 and first.pixels.max() == 1


def test_prune_leaves_the_model_as_it_was() -> None:
    model = digits.small_vit()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pruned = prune(model, 0.5)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert any((value == 0).sum() > (before[name] == 0).sum() for name, value in pruned.state_dict().items())


def test_the_plot_is_whole_or_absent(tmp_path: Path) -> None:
    curves = {"a": [(0.0, 1.0), (0.9, 0.2)], "b": [(0.0, 0.9), (0.9, 0.8)]}
    path = plot_accuracy(curves, tmp_path / "plot.png", title="t", trained_at=0.75)
    with Image.open(path) as picture:
        assert picture.format == "PNG" and picture.width > 800
    with pytest.raises(td.TdError):
        plot_accuracy(curves, tmp_path / "plot.png" / "below.png")
