"""What a run says about its pruning in every log, whatever the training library."""

from __future__ import annotations

from td_plugin.churn import Change, Churn
from td_plugin.sparsifier import TargetedDropout


class RunValues:
    """The values of one run.

    Args:
        groups: whether the sparsity of every target is one of them.

    Attributes:
        change: of the candidates, between the last two looks.
    """

    def __init__(self, groups: bool) -> None:
        self._groups, self._churn = groups, Churn()
        self.change: Change | None = None

    def begin(self) -> None:
        """Another run, or another model."""
        self._churn, self.change = Churn(), None

    def of(self, sparsifier: TargetedDropout) -> dict[str, float]:
        """γ, α, the share of scalars dropped now, the sparsity the model would ship with, churn; a look is taken."""
        groups, report = sparsifier.groups, sparsifier.report()
        values = {
            "td_sparsity_level": sum(g["sparsity_level"] for g in groups) / len(groups),
            "td_drop_rate": sum(g["drop_rate"] for g in groups) / len(groups),
            "td_dropped": report.dropped_share,
            "td_sparsity": report.sparsity,
        }
        self.change = sparsifier.change(self._churn) or self.change
        if self.change is not None:
            values |= {"td_churn": self.change.churn, "td_survival": self.change.survival}
        if self._groups:
            values |= {f"td_sparsity/{row.tensor}": row.zeros / max(row.elements, 1) for row in report.rows}
        return values
