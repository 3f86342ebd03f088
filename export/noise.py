"""Signs that other work on the machine got in the way of a measurement."""

from __future__ import annotations

from dataclasses import dataclass

from td_plugin.export.timing import STEADY

_SHARE = 0.9  # of the clock that one undisturbed thread gets
_SPARE = 0.5  # of a core: what a machine that does nothing else shows as load


@dataclass(frozen=True)
class Signs:
    """What was seen while timing.

    Attributes:
        widest: the file whose speed-up has the widest interval, and its width as a share of the median.
        rounds: timings per file.
        cpu_share: CPU seconds per second of the clock; None where that says nothing: several threads, or a GPU.
        load: processes that wanted to run in the minute before; None where it is not known.
        threads: that the measurement used.
        cores: that there are.
    """

    widest: tuple[str, float]
    rounds: int
    cpu_share: float | None
    load: float | None
    threads: int
    cores: int

    def notes(self) -> tuple[str, ...]:
        """One line per sign of a noisy machine."""
        found = []
        name, width = self.widest
        if width > STEADY:
            found.append(
                f"the interval of {name} is {width:.0%} wide after {self.rounds} rounds, and another run may differ by "
                "as much: end other work, or time more rounds"
            )
        if self.cpu_share is not None and self.cpu_share < _SHARE:
            found.append(f"the process got {self.cpu_share:.0%} of the clock: other work ran on its core")
        if self.load is not None and self.load + self.threads > self.cores + _SPARE:
            found.append(
                f"load {self.load:.1f} before the start, on {self.cores} cores of which this took {self.threads}: "
                "other work was running"
            )
        return tuple(found)
