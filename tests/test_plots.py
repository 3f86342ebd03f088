"""Pictures hold every curve they are given."""

from __future__ import annotations

from pathlib import Path

import pytest

from td_plugin.export.plots import _canvas, plot_tradeoff


@pytest.mark.parametrize("count", [1, 4, 5, 20])
def test_every_curve_is_drawn_in_its_own_way_and_named(count: int, tmp_path: Path) -> None:
    curves = {f"method {index}": [(1.0, 0.9), (2.0, 0.9 - index / 100)] for index in range(count)}
    figure, axes = _canvas(curves, "")
    drawn = {line.get_label(): (line.get_color(), line.get_marker()) for line in axes.lines}
    assert list(drawn) == list(curves) and len(set(drawn.values())) == count
    (legend,) = figure.legends or [axes.get_legend()]
    assert {text.get_text() for text in legend.get_texts()} == set(curves)
    figure.draw_without_rendering()
    box, plot = legend.get_window_extent(), axes.get_window_extent()
    assert count <= 4 or box.y1 < plot.y0, "a long legend lies beside the curves"
    assert plot_tradeoff(curves, tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
