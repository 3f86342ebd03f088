"""Runs in turn: random order within a round, sessions opened anew, and more rounds while the answer is not steady."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from td_plugin.errors import TdError
from td_plugin.export.progress import Bar
from td_plugin.export.speedup import paired_speedup

Run = Callable[[int], float]
"""Run the example of this index once and say how many seconds that took."""

Opener = Callable[[Sequence[str]], Mapping[str, Run]]
"""Open these, in this order, and warm them up."""

STEADY = 0.04  # width of an interval, as a share of its median, below which two runs agree within 3 %
_SITTING = 25  # rounds between two openings


@dataclass(frozen=True)
class Plan:
    """How long to time.

    Attributes:
        least: rounds in any case.
        most: rounds at which it ends, however wide the intervals are.
        examples: how many inputs there are; each round draws one, all equally often.
        seed: of the orders, the draws and the bootstrap.
    """

    least: int
    most: int
    examples: int = 1
    seed: int = 0

    @classmethod
    def of(cls, rounds: int | tuple[int, int], examples: int, seed: int) -> Plan:
        """From one number of rounds, or the least and the most.

        Raises:
            TdError: a number is below 1 or the two are the wrong way round.
        """
        least, most = (rounds, rounds) if isinstance(rounds, int) else rounds
        if least < 1 or most < least:
            raise TdError("nothing to time", got=f"rounds={rounds}", fix="one round at least: 100, or (100, 400)")
        return cls(least, most, examples, seed)

    def sittings(self) -> list[range]:
        """Rounds that share their sessions: of about equal size up to `least`, then of the same size up to `most`."""
        count = max(1, round(self.least / _SITTING))
        ends = [self.least * i // count for i in range(count + 1)]
        step = max(1, self.least // count)
        ends += [*range(self.least + step, self.most, step), *([self.most] if self.most > self.least else [])]
        return [range(start, end) for start, end in pairwise(ends)]


@dataclass(frozen=True)
class Timings:
    """What was timed.

    Attributes:
        seconds: name -> one timing per round.
        cpu_share: CPU seconds of this process per second of the clock, while it timed.
        sessions: how often each file was opened.
    """

    seconds: dict[str, tuple[float, ...]]
    cpu_share: float
    sessions: int


def time_in_turn(names: Sequence[str], open_all: Opener, plan: Plan, bar: Bar) -> Timings:
    """Time all `names` in every round, the first being what the others are compared with.

    Where memory lies makes a session up to 2 % faster or slower as long as it is open, so the files are opened anew, in
    another order, about every 25 rounds, unless opening takes longer than the rounds did. After `plan.least` rounds
    it goes on until every interval is narrower than `STEADY`, or to `plan.most`.
    """
    orders = interleaved(names, plan.most, plan.seed)
    examples = _draws(plan)
    generator = random.Random(plan.seed + 1)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    runs: Mapping[str, Run] = {}
    cpu = wall = opening = timed = 0.0
    sessions = 0
    for sitting in plan.sittings():
        if not runs or opening <= timed:
            runs, started = {}, time.perf_counter()  # the old ones are given up first: both may not fit
            runs = open_all(generator.sample(names, len(names)))
            opening, sessions = time.perf_counter() - started, sessions + 1
        before = sum(map(sum, seconds.values()))
        cpu_start, wall_start = time.process_time(), time.perf_counter()
        for index in sitting:
            for name in orders[index]:
                seconds[name].append(runs[name](examples[index]))
            bar.advance()
        cpu, wall = cpu + time.process_time() - cpu_start, wall + time.perf_counter() - wall_start
        timed = sum(map(sum, seconds.values())) - before
        if sitting.stop >= plan.least:
            if sitting.stop == plan.most or widest(seconds, plan.seed)[1] <= STEADY:
                break
            bar.expect(min(2 * sitting.stop - sitting.start, plan.most))
    return Timings({name: tuple(values) for name, values in seconds.items()}, cpu / wall if wall else 1.0, sessions)


def widest(seconds: Mapping[str, Sequence[float]], seed: int) -> tuple[str, float]:
    """Which file's speed-up over the first has the widest interval, and how wide it is; 0 for a lone file."""
    first, *others = seconds
    widths = {name: paired_speedup(seconds[first], seconds[name], seed=seed).width for name in others}
    name = max(widths, key=lambda other: widths[other], default=first)
    return name, widths.get(name, 0.0)


def interleaved(names: Sequence[str], rounds: int, seed: int) -> list[tuple[str, ...]]:
    """One order of all `names` per round: random, and over every ``len(names)`` rounds each takes each place once."""
    generator = random.Random(seed)
    orders: list[tuple[str, ...]] = []
    while len(orders) < rounds:
        shuffled = generator.sample(names, len(names))
        block = [tuple(shuffled[turn:] + shuffled[:turn]) for turn in range(len(names))]
        orders += generator.sample(block, len(block))
    return orders[:rounds]


def _draws(plan: Plan) -> list[int]:
    """Of each round the example that all files run; every ``plan.examples`` rounds have each of them once."""
    generator = random.Random(plan.seed)
    drawn: list[int] = []
    while len(drawn) < plan.most:
        drawn += generator.sample(range(plan.examples), plan.examples)
    return drawn[: plan.most]
