"""The rows of an inspection: what can shrink, what is fixed and why, what γ would leave; in numbers and in words."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class UnitRow:
    """One group of units.

    Attributes:
        layer: fully qualified name of the layer whose units these are.
        kind: neurons, heads, channels, hidden or layers.
        units: how many there are.
        silent: how many of them have no weights left: `shrink` removes those.
        parameters: what would go with all of its units; a tensor between two groups counts in both.
        flops: the same, in one forward of the example inputs; None without a traced forward.
        left: units that stay at the γ asked for; None if it was not asked of their kind.
    """

    layer: str
    kind: str
    units: int
    silent: int
    parameters: int
    flops: int | None = None
    left: int | None = None

    @property
    def about(self) -> tuple[str, str]:
        """What the tree says before and after the name."""
        units = f"{self.kind} {self.units:,}"
        units += f" → {self.left:,}" if self.left is not None else ""
        units += f" ({self.silent:,} silent)" if self.silent else ""
        return units, amounts(self.parameters, self.flops)


@dataclass(frozen=True)
class FixedRow:
    """Dimensions that cannot shrink.

    Attributes:
        layer: fully qualified name of the layer that they begin at.
        size: how many entries there are; 0 if the layer was refused before that was known.
        reason: why they stay.
        tensors: fully qualified names of the tensors that they run through.
        parameters: of these tensors.
        flops: of the multiplications by these tensors; None without a traced forward.
    """

    layer: str
    size: int
    reason: str
    tensors: tuple[str, ...]
    parameters: int
    flops: int | None

    @property
    def about(self) -> tuple[str, str]:
        """What the tree says before and after the name."""
        if not self.tensors:
            return "", self.reason
        over = f"over {len(self.tensors)} tensor{'s' if len(self.tensors) > 1 else ''}"
        return f"{self.size:,} {over}", f"{amounts(self.parameters, self.flops)}: {self.reason}"


@dataclass(frozen=True)
class Remainder:
    """What is left of a model when every group loses the share γ of its units.

    Attributes:
        sparsity_level: γ.
        kinds: the kinds of units that were removed.
        parameters: left.
        flops: left in one forward of the example inputs; None without a traced forward.
    """

    sparsity_level: float
    kinds: tuple[str, ...]
    parameters: int
    flops: int | None

    def lines(self, parameters: int, flops: int | None) -> list[str]:
        """In words, given what the dense model has."""
        kinds = " and ".join(self.kinds)
        line = f"γ = {self.sparsity_level:g} of {kinds} leaves {_of(self.parameters, parameters, ' parameters')}"
        if flops is not None and self.flops is not None:
            line += f" and {_of(self.flops, flops, 'FLOPs')}"
        return [line]


def amounts(parameters: int, flops: int | None) -> str:
    """Parameters, and FLOPs if they are known."""
    return scaled(parameters, " parameters") + ("" if flops is None else f" · {scaled(flops, 'FLOPs')}")


def scaled(number: int, unit: str) -> str:
    """``"2.36 M parameters"``: three digits from a million on, exact below."""
    for prefix, size in (("G", 10**9), ("M", 10**6)):
        if number >= size:
            value = number / size
            return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {prefix}{unit}"
    return f"{number:,} {unit.lstrip()}"


def _of(left: int, dense: int, unit: str) -> str:
    return f"{scaled(left, '').strip()} of {scaled(dense, unit)} ({left / max(dense, 1):.1%})"
