"""The order of timing, when it ends, and what it says of the machine: with made-up seconds in place of sessions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest

from td_plugin.contract import TdError
from td_plugin.export.noise import Signs
from td_plugin.export.progress import Bar
from td_plugin.export.repeats import repeat
from td_plugin.export.timing import STEADY, Plan, Timings, time_in_turn, widest


class Stand:
    """Files whose seconds are drawn: `seconds[name] * load`, the load of a round being the same for all."""

    def __init__(self, noise: float, seconds: Mapping[str, float], seed: int = 0) -> None:
        self.seconds, self.noise = seconds, noise
        self.generator = np.random.default_rng(seed)
        self.opened: list[tuple[str, ...]] = []
        self.ran: list[tuple[str, int]] = []

    def open(self, names: Sequence[str]) -> dict[str, Callable[[int], float]]:
        self.opened.append(tuple(names))

        def run(name: str) -> Callable[[int], float]:
            def once(index: int) -> float:
                self.ran.append((name, index))
                return self.seconds[name] * float(np.exp(self.generator.normal(0, self.noise)))

            return once

        return {name: run(name) for name in names}

    def time(self, plan: Plan) -> Timings:
        return time_in_turn(list(self.seconds), self.open, plan, Bar())


FILES = {"dense": 0.2, "pruned": 0.1, "int8": 0.05}


class TestPlan:
    @pytest.mark.parametrize(("least", "most"), [(1, 1), (7, 7), (30, 30), (100, 400), (100, 101), (30, 77)])
    def test_sittings_cover_all_rounds_and_one_ends_at_the_least(self, least: int, most: int) -> None:
        sittings = Plan(least, most).sittings()
        assert [index for sitting in sittings for index in sitting] == list(range(most))
        assert least in [sitting.stop for sitting in sittings]
        assert max(map(len, sittings)) <= 38

    def test_of(self) -> None:
        assert Plan.of(50, 1, 3) == Plan(50, 50, 1, 3)
        assert Plan.of((50, 90), 2, 0) == Plan(50, 90, 2, 0)
        for wrong in (0, (0, 5), (5, 4)):
            with pytest.raises(TdError, match="nothing to time"):
                Plan.of(wrong, 1, 0)


class TestTimeInTurn:
    def test_every_round_runs_all_files_on_one_example(self) -> None:
        stand = Stand(0.001, FILES)
        timings = stand.time(Plan(60, 60, examples=4, seed=5))
        assert {name: len(values) for name, values in timings.seconds.items()} == dict.fromkeys(FILES, 60)
        rounds = [stand.ran[i : i + 3] for i in range(0, 180, 3)]
        assert all(
            sorted(name for name, _ in r) == sorted(FILES) and len({index for _, index in r}) == 1 for r in rounds
        )
        assert [sum(r[0][1] == index for r in rounds) for index in range(4)] == [15] * 4  # all equally often
        assert len({tuple(name for name, _ in r) for r in rounds}) == 6  # in every order
        again = Stand(0.001, FILES)
        again.time(Plan(60, 60, examples=4, seed=5))
        assert again.ran == stand.ran

    def test_files_are_opened_anew_in_other_orders(self) -> None:
        stand = Stand(0.001, FILES)
        timings = stand.time(Plan(200, 200))
        assert timings.sessions == len(stand.opened) == 8
        assert len(set(stand.opened)) > 1

    def test_files_that_take_long_to_open_stay_open(self) -> None:
        stand = Stand(0.001, {"tiny": 1e-9, "other": 1e-9})  # opening takes longer than 25 rounds of these
        assert stand.time(Plan(200, 200)).sessions == 1

    def test_it_ends_when_steady_and_goes_on_while_not(self) -> None:
        quiet, noisy, hopeless = (Stand(noise, FILES) for noise in (0.01, 0.08, 2.0))
        plan = Plan(40, 400)
        lengths = []
        for stand in (quiet, noisy, hopeless):
            seconds = stand.time(plan).seconds
            lengths.append(len(seconds["dense"]))
            assert widest(seconds, plan.seed)[1] <= STEADY or lengths[-1] == 400
        assert lengths[0] == 40 < lengths[1] < lengths[2] == 400

    def test_one_number_is_kept_to(self) -> None:
        assert len(Stand(2.0, FILES).time(Plan.of(40, 1, 0)).seconds["dense"]) == 40

    def test_a_lone_file_has_no_interval(self) -> None:
        timings = Stand(0.5, {"only": 0.1}).time(Plan(10, 400))
        assert len(timings.seconds["only"]) == 10 and widest(timings.seconds, 0) == ("only", 0.0)

    def test_two_runs_agree_where_load_hits_both_files_of_a_round(self) -> None:
        """The method against its alternative on the same made-up machine: load that lasts some rounds and goes."""
        apart = []
        for seed in range(10):
            generator = np.random.default_rng(seed)
            ratios = []
            for _ in range(2):
                load = np.repeat(np.exp(generator.normal(0, 0.4, 20)), 10)  # per round, bursts of ten
                dense, pruned = 0.2 * load * np.exp(generator.normal(0, 0.03, 200)), 0.1 * load
                ratios.append((np.median(dense / pruned), np.median(dense[:100]) / np.median(pruned[100:])))
            apart.append(np.abs(np.log(np.array(ratios[0]) / np.array(ratios[1]))))
        paired, sequential = np.max(apart, axis=0)
        assert paired < 0.03 < sequential


class TestSigns:
    QUIET = Signs(("pruned", 0.03), rounds=100, cpu_share=0.99, load=0.4, threads=1, cores=2)

    def test_a_quiet_machine_says_nothing(self) -> None:
        assert self.QUIET.notes() == ()
        assert replace(self.QUIET, cpu_share=None, load=None).notes() == ()

    @pytest.mark.parametrize(
        ("sign", "words"),
        [
            ({"widest": ("int8", 0.11)}, "interval of int8 is 11% wide after 100 rounds"),
            ({"cpu_share": 0.6}, "60% of the clock"),
            ({"load": 1.8}, "load 1.8 before the start, on 2 cores"),
        ],
    )
    def test_each_sign(self, sign: dict[str, object], words: str) -> None:
        (note,) = replace(self.QUIET, **sign).notes()
        assert words in note


class TestRepeats:
    def test_one_run_is_none(self) -> None:
        with pytest.raises(TdError, match="one run"):
            repeat(lambda seed: pytest.fail("not to be called"), times=1)
