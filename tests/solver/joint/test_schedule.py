"""How long rounds are, and which way the last one goes."""

import pytest
from moetuner.solver.base import Clock, SolveStatus
from moetuner.solver.joint.interruptible import Interruptible
from moetuner.solver.joint.schedule import GROWTH, Schedule


class FakeClock(Clock):
    """Time passes only where `spend` says so."""

    now: float = 0.0

    @property
    def seconds(self) -> float:
        return self.now

    @property
    def left(self) -> float:
        return max(self.time_limit - self.now, 0.0)


class Ways:
    """Rounds of so many ways at a millisecond per proposal."""

    placement = None

    def __init__(self, clock, number, better=True):
        self.clock, self.number, self.better = clock, number, better
        self.lengths = []

    def round(self, proposals, seconds):
        self.lengths.append((self.number, proposals))
        self.clock.now += min(1e-3 * proposals * self.number, seconds)
        return self.better

    def settle(self):
        number, self.number = self.number, 1
        return number


def schedule_of(clock, max_rounds=0, patience=3):
    reports = []
    schedule = Schedule(
        clock=clock,
        runner=Interruptible(),
        max_rounds=max_rounds,
        patience=patience,
        report=lambda done, better: reports.append((done, better)),
    )
    return schedule, reports


@pytest.fixture
def clock():
    return FakeClock(time_limit=100.0)


def test_all_ways_have_the_same_lengths_and_the_best_one_the_time_left(clock):
    rounds = Ways(clock, 2)
    schedule, reports = schedule_of(clock)
    assert schedule.run(rounds, 100, 1.0) is SolveStatus.TIME_LIMIT
    *grown, last = rounds.lengths
    assert grown == [(2, 100 * GROWTH**i) for i in range(len(grown))]
    assert last[0] == 1
    assert last[1] > GROWTH * grown[-1][1]
    assert 90 < clock.now <= 100
    assert reports == [(i + 1, True) for i in range(len(rounds.lengths))]


def test_a_share_of_the_time_is_a_limit(clock):
    clock.now = 20.0
    schedule_of(clock)[0].run(Ways(clock, 1), 100, 0.25)
    assert 38 < clock.now <= 40


def test_rounds_may_be_counted_instead(clock):
    rounds = Ways(clock, 2)
    status = schedule_of(clock, max_rounds=3)[0].run(rounds, 10, 1.0)
    assert status is SolveStatus.HEURISTIC
    assert rounds.lengths == [(2, 10), (2, 40), (2, 160)]


def test_what_improves_nothing_ends_early(clock):
    rounds = Ways(clock, 1, better=False)
    status = schedule_of(clock, patience=2)[0].run(rounds, 10, 1.0)
    assert status is SolveStatus.HEURISTIC
    assert len(rounds.lengths) == 2


def test_ctrl_c_ends_it(clock):
    schedule, _ = schedule_of(clock)
    schedule.runner.stop[0] = 1
    rounds = Ways(clock, 1)
    assert schedule.run(rounds, 10, 1.0) is SolveStatus.INTERRUPTED
    assert len(rounds.lengths) == 1


def test_what_every_round_takes_is_not_taken_for_proposals(clock):
    """Ten seconds each, whatever the length: the last round still fills the time."""

    class Slow(Ways):
        def round(self, proposals, seconds):
            self.clock.now += min(10.0, seconds)
            return super().round(proposals, seconds)

    clock.time_limit = 200.0
    rounds = Slow(clock, 1)
    schedule_of(clock)[0].run(rounds, 1000, 1.0)
    assert 170 < clock.now <= 200
    assert rounds.lengths[-1][1] > 100_000
