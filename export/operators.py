"""Where the time of a run went, operator by operator, as values and as one table for several files."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import Any

from td_plugin.errors import TdError
from td_plugin.report import table

OUTSIDE = "outside operators"
# Other names for the same work: which of them a graph has depends on its number format and on what was fused.
_FAMILIES = {
    "matrix products": (
        "MatMul", "FusedMatMul", "Gemm", "FusedGemm", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul",
        "QLinearMatMul", "QGemm", "MatMulNBits", "DynamicQuantizeLinear", "QuantizeLinear", "DequantizeLinear",
    ),
    "convolutions": ("Conv", "FusedConv", "ConvInteger", "QLinearConv"),
    "normalization": (
        "LayerNormalization", "SkipLayerNormalization", "SimplifiedLayerNormalization", "RMSNormalization",
        "SkipSimplifiedLayerNormalization", "EmbedLayerNormalization", "BatchNormalization", "GroupNorm",
    ),
    "activations": ("Gelu", "BiasGelu", "FastGelu", "QuickGelu", "Erf", "Relu", "Tanh", "Sigmoid"),
}  # fmt: skip
_FAMILY = {operator: family for family, operators in _FAMILIES.items() for operator in operators}
_SMALL = 0.005  # of the run, in every file: such rows of the table are put together


@dataclass(frozen=True)
class OperatorTime:
    """All nodes of one operator.

    Attributes:
        operator: as the optimized graph calls it; ``"outside operators"`` is what the run takes beside its nodes.
        seconds: in one run, median over the runs.
        share: of the whole run.
        nodes: how many there are.
    """

    operator: str
    seconds: float
    share: float
    nodes: int


@dataclass(frozen=True)
class FormProfile:
    """One file.

    Attributes:
        name: what the caller calls it.
        seconds: of one run while it is recorded, which is slower than one that is not.
        operators: the slowest first.
        flops: of one run; None where they could not be counted.
    """

    name: str
    seconds: float
    operators: tuple[OperatorTime, ...]
    flops: int | None

    def families(self) -> dict[str, float]:
        """Kind of work -> seconds, without what lies outside operators."""
        found = defaultdict[str, float](float)
        for row in self.operators:
            if row.operator != OUTSIDE:
                found[_FAMILY.get(row.operator, row.operator)] += row.seconds
        return dict(found)

    def row(self, operator: str) -> OperatorTime | None:
        """That of an operator; None if the file has none of it."""
        return next((row for row in self.operators if row.operator == operator), None)


@dataclass(frozen=True)
class Rest:
    """Operators of a smaller model that do one kind of work, beside those of the larger one.

    Attributes:
        operator: the operator, or what several have in common: "matrix products" of whatever number format.
        before: seconds in the larger model.
        after: seconds in the smaller one.
        excess: seconds over what it would take if its time had fallen as the FLOPs of the whole model did: where the
            speed-up that is missing went. Below 0 where it gained more.
    """

    operator: str
    before: float
    after: float
    excess: float


@dataclass(frozen=True)
class OperatorReport:
    """Files whose operators were timed; `str()` is one table for all.

    Attributes:
        forms: in the order in which they were given.
        threads: threads inside one operator.
        runs: recorded of each.
    """

    forms: tuple[FormProfile, ...]
    threads: int
    runs: int

    def form(self, name: str) -> FormProfile:
        """The one of this name.

        Raises:
            TdError: it was not recorded.
        """
        for form in self.forms:
            if form.name == name:
                return form
        raise TdError("no such file in this report", got=name, fix=f"one of {[form.name for form in self.forms]}")

    def rest(self, name: str, over: str) -> tuple[Rest, ...]:
        """Where the time of `name` exceeds that of `over` divided by the FLOP ratio; the largest excess first.

        What lies outside operators is left out: part of it is the recording itself.

        Raises:
            TdError: one of them was not recorded, or its FLOPs are not known.
        """
        after, before = self.form(name), self.form(over)
        if not after.flops or not before.flops:
            raise TdError("FLOPs are not known", got=f"{over}: {before.flops}, {name}: {after.flops}")
        ratio = before.flops / after.flops
        was, now = before.families(), after.families()
        pairs = {family: (was.get(family, 0.0), now.get(family, 0.0)) for family in {**was, **now}}
        rows = [Rest(family, old, new, new - old / ratio) for family, (old, new) in pairs.items()]
        return tuple(sorted(rows, key=lambda row: -row.excess))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {**asdict(self), "rest": {name: [asdict(row) for row in rows] for name, rows in self._rests()}}

    def _rests(self) -> list[tuple[str, tuple[Rest, ...]]]:
        first, *others = self.forms
        return [(form.name, self.rest(form.name, first.name)) for form in others if first.flops and form.flops]

    def __str__(self) -> str:
        header = ["operator", *(f"{form.name} {unit}" for form in self.forms for unit in ("ms", "%"))]
        rows = [[name, *columns(cells)] for name, cells in self.rows()]
        rows.append(["all", *(cell for form in self.forms for cell in (f"{form.seconds * 1e3:.2f}", "100"))])
        about = f"median of {self.runs} recorded runs, threads {self.threads}; recording makes them slower"
        return "\n".join([table(header, rows), *self.sentences(), about])

    def rows(self) -> list[tuple[str, list[OperatorTime | None]]]:
        """Operator -> its times in every file, the slowest first, those of no weight put together."""
        names = dict.fromkeys(row.operator for form in self.forms for row in form.operators)
        found = {name: [form.row(name) for form in self.forms] for name in names}
        small = [name for name, cells in found.items() if all(cell is None or cell.share < _SMALL for cell in cells)]
        large = [(name, cells) for name, cells in found.items() if name not in small]
        large.sort(key=lambda pair: -sum(cell.seconds for cell in pair[1] if cell))
        if small:
            title = f"{len(small)} others"
            large.append((title, [_together(title, [form.row(name) for name in small]) for form in self.forms]))
        return large

    def sentences(self) -> list[str]:
        """Of each file but the first, where the speed-up went that the FLOPs would let one expect."""
        said = []
        for name, rows in self._rests():
            least = _SMALL * self.form(name).seconds
            worst = [f"{row.operator} +{row.excess * 1e3:.2f} ms" for row in rows[:3] if row.excess > least]
            total = sum(row.excess for row in rows) * 1e3
            said.append(
                f"{name}: {abs(total):.2f} ms {'more' if total > 0 else 'less'} in its operators than those of "
                f"{self.forms[0].name} over the FLOP ratio" + (f"; most over it: {', '.join(worst)}" if worst else "")
            )
        return said


def _together(title: str, rows: list[OperatorTime | None]) -> OperatorTime:
    found = [row for row in rows if row is not None]
    return OperatorTime(
        title, sum(row.seconds for row in found), sum(row.share for row in found), sum(row.nodes for row in found)
    )


def columns(cells: list[OperatorTime | None]) -> list[str]:
    """Milliseconds and per cent of one line of the table, dashes where a file has none of the operator."""
    pairs = [("-", "-") if row is None else (f"{row.seconds * 1e3:.2f}", f"{row.share * 100:.0f}") for row in cells]
    return [cell for pair in pairs for cell in pair]
