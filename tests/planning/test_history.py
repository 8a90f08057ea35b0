"""The course of a solve is kept whole where it is short, thinned where it is long."""

from moetuner.planning.progress import MAX_POINTS, History
from moetuner.solver import ProgressEvent


def event(incumbent=None, bound=None, stage="ilp1"):
    return ProgressEvent(
        solver="ilp1", stage=stage, done=0, total=1, incumbent=incumbent, bound=bound
    )


def test_only_news_are_kept_and_everything_is_passed_on():
    told = []
    history = History(forward=told.append)
    for news in (event(), event(3.0), event(3.0), event(3.0, 1.0), event(2.0, 1.0)):
        history(news)
    points = history.points()
    assert [(p.incumbent, p.bound) for p in points] == [
        (3.0, None),
        (3.0, 1.0),
        (2.0, 1.0),
    ]
    assert [p.seconds for p in points] == sorted(p.seconds for p in points)
    assert len(told) == 5


def test_stages_stand_one_after_the_other():
    history = History()
    for number in range(4):
        history(event(float(number), stage="ab"[number % 2]))
    assert [p.stage for p in history.points()] == ["a", "a", "b", "b"]


def test_a_long_solve_keeps_its_beginning_its_end_and_few_points():
    history = History()
    for number in range(10_000):
        history(event(float(-number)))
    incumbents = [p.incumbent for p in history.points()]
    assert len(incumbents) <= MAX_POINTS
    assert (incumbents[0], incumbents[-1]) == (0.0, -9999.0)
    assert incumbents == sorted(incumbents, reverse=True)
