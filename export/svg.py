"""Small pictures as SVG elements for a page: no library, no script, every word escaped."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

import torch

# Told apart by colour-blind readers, and in print.
COLOURS = ("#4d4d4d", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31")
_WIDTH = 860.0
_LABEL = 240.0  # left of the picture, for names
_BINS = 90
_ROW = 54.0


def distributions(seconds: Mapping[str, Sequence[float]]) -> str:
    """Name -> timings, each as a hill over one logarithmic axis of milliseconds, with lines at p50 and p90.

    On a logarithmic axis equal distances are equal speed-ups. The slowest half per cent is cut off.
    """
    values = {name: torch.tensor(list(timed), dtype=torch.float64) * 1e3 for name, timed in seconds.items()}
    low = min(timed.min().item() for timed in values.values()) * 0.93
    high = max(timed.quantile(0.995).item() for timed in values.values()) * 1.07
    height = _ROW * len(values) + 34
    parts = [_axis(low, high, height - 30)]
    for index, (name, timed) in enumerate(values.items()):
        base = _ROW * (index + 1) - 4
        colour = COLOURS[index % len(COLOURS)]
        parts.append(f'<path d="{_hill(timed, low, high, base)}" fill="{colour}" fill-opacity="0.55"/>')
        for percent, dash in ((50, ""), (90, ' stroke-dasharray="3 3"')):
            value = timed.quantile(percent / 100).item()
            parts.append(
                f'<line x1="{_x(value, low, high):.1f}" x2="{_x(value, low, high):.1f}" y1="{base - _ROW + 12:.1f}" '
                f'y2="{base:.1f}" stroke="{colour}" stroke-width="1.5"{dash}>'
                f"<title>p{percent} {value:.2f} ms</title></line>"
            )
        parts.append(_text(_LABEL - 10, base - 8, name, "end"))
    return _svg(height, parts, "distribution of the latencies, in milliseconds")


def paired_bars(widths: Mapping[str, tuple[int, int]]) -> str:
    """Name -> before and after: a grey bar and, on it, what is left of it."""
    row, right = 19.0, 110.0
    most = max((before for before, _ in widths.values()), default=1) or 1
    scale = (_WIDTH - _LABEL - right) / most
    parts = []
    for index, (name, (before, after)) in enumerate(widths.items()):
        top = row * index + 3
        parts.append(f'<rect x="{_LABEL}" y="{top}" width="{before * scale:.1f}" height="13" fill="#d9d9d9"/>')
        parts.append(f'<rect x="{_LABEL}" y="{top}" width="{after * scale:.1f}" height="13" fill="{COLOURS[1]}"/>')
        parts.append(_text(_LABEL - 10, top + 11, name, "end"))
        parts.append(_text(_LABEL + max(before, after) * scale + 8, top + 11, f"{before:,} → {after:,}", "start"))
    return _svg(row * len(widths) + 6, parts, "units per layer, before and after")


def _svg(height: float, parts: Sequence[str], label: str) -> str:
    box = f'viewBox="0 0 {_WIDTH:.0f} {height:.0f}" width="{_WIDTH:.0f}" height="{height:.0f}"'
    return f'<svg {box} role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'


def _text(x: float, y: float, words: str, anchor: str) -> str:
    shown = words if len(words) <= 36 else f"…{words[-35:]}"
    title = f"<title>{escape(words)}</title>" if shown != words else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{title}{escape(shown)}</text>'


def _x(value: float, low: float, high: float) -> float:
    share = math.log(value / low) / math.log(high / low)
    return _LABEL + (_WIDTH - _LABEL - 10) * min(max(share, 0.0), 1.0)


def _hill(timed: torch.Tensor, low: float, high: float, base: float) -> str:
    """Outline of a histogram with bins of equal width on the logarithmic axis."""
    edges = torch.logspace(math.log10(low), math.log10(high), _BINS + 1, dtype=torch.float64)
    counts = torch.histogram(timed.clamp(low, high), edges).hist
    heights = counts / counts.max().clamp_min(1) * (_ROW - 16)
    points = [f"M{_LABEL:.1f} {base:.1f}"]
    for index, height in enumerate(heights.tolist()):
        for edge in (index, index + 1):
            points.append(f"L{_x(edges[edge].item(), low, high):.1f} {base - height:.1f}")
    return " ".join([*points, f"L{_WIDTH - 10:.1f} {base:.1f}Z"])


def _axis(low: float, high: float, bottom: float) -> str:
    steps = [digit * 10.0**power for power in range(-5, 7) for digit in (1, 2, 3, 5, 7)]
    ticks = [step for step in steps if low <= step <= high] or [low, high]
    lines = [
        f'<line x1="{_x(tick, low, high):.1f}" x2="{_x(tick, low, high):.1f}" y1="0" y2="{bottom:.1f}" '
        f'stroke="#e4e4e4"/>' + _text(_x(tick, low, high), bottom + 16, f"{tick:.3g} ms", "middle")
        for tick in ticks
    ]
    return "".join(lines)
