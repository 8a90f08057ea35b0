import pytest
from moetuner.report.progress import ProgressLine, format_event
from moetuner.solver import ProgressEvent


def event(**fields):
    return ProgressEvent(solver="ilp2", stage="ilp1", done=3, total=26, **fields)


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({}, "ilp1 3/26  0 s"),
        ({"incumbent": 2.0, "seconds": 7.4}, "ilp1 3/26  incumbent 2  7 s"),
        (
            {"incumbent": 2.0, "bound": 1.5},
            "ilp1 3/26  incumbent 2  bound 1.5 gap 25.00%  0 s",
        ),
        (
            {"incumbent": 0.0, "bound": 0.0},
            "ilp1 3/26  incumbent 0  bound 0 gap 0.00%  0 s",
        ),
    ],
)
def test_an_event_is_one_line(fields, wanted):
    assert format_event(event(**fields)) == wanted


def test_without_a_terminal_news_come_at_most_every_few_seconds(capsys):
    with ProgressLine() as line:
        for _ in range(100):
            line.update(event(incumbent=1.0, bound=0.5))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "ilp1 3/26  incumbent 1  bound 0.5 gap 50.00%  0 s\n"


def test_no_news_print_nothing(capsys):
    with ProgressLine():
        pass
    assert capsys.readouterr().err == ""
