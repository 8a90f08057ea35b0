"""The pool of child processes: order, news, deaths, lateness, Ctrl-C."""

import os
import subprocess
import sys
import time

import pytest
from moetuner._workers import Ended, run_tasks

LATER = 600.0


def run(handler, tasks, *, seconds=LATER, threads=1, **options):
    deadline = time.monotonic() + seconds
    return run_tasks(
        f"worker_handlers:{handler}",
        tasks,
        deadline=deadline,
        threads=threads,
        **options,
    )


def is_gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize("threads", [1, 2])
def test_results_come_in_the_order_of_the_tasks(threads):
    news, ended = [], []
    tasks = [("a", 1), ("b", 2), ("c", 3)]
    outcomes = run(
        "Counting",
        tasks,
        threads=threads,
        on_news=lambda index, told: news.append((index, told)),
        on_end=lambda index, outcome: ended.append((index, outcome)),
    )
    assert [outcome.ended for outcome in outcomes] == [Ended.DONE] * 3
    assert [outcome.result["task"] for outcome in outcomes] == tasks
    assert sorted(news) == [(i, ("begun", task)) for i, task in enumerate(tasks)]
    assert sorted(ended, key=lambda pair: pair[0]) == list(enumerate(outcomes))
    assert all(outcome.seconds > 0 for outcome in outcomes)
    pids = [outcome.result["pid"] for outcome in outcomes]
    assert len(set(pids)) <= threads
    assert all(is_gone(pid) for pid in pids)
    if threads == 1:  # one handler did them all, in turn
        assert [outcome.result["number"] for outcome in outcomes] == [1, 2, 3]


def test_each_gets_its_share_of_the_time_and_the_last_what_is_left():
    began = time.time()
    first, last = run("Counting", ["a", "b"])
    assert first.result["until"] < began + 0.6 * LATER
    assert last.result["until"] > began + 0.9 * LATER


def test_no_task_needs_no_child():
    assert run("Unmade", []) == []


def test_a_child_that_dies_costs_its_own_task_alone():
    exited, raised, done = run("Failing", ["exit", "raise", "work"])
    assert (exited.ended, exited.last_words) == (Ended.DIED, "exit code 3")
    assert (raised.ended, raised.last_words) == (
        Ended.DIED,
        "ValueError: no such task",
    )
    assert (done.ended, done.result) == (Ended.DONE, "work")


@pytest.mark.parametrize(
    ("handler", "words"),
    [
        ("Unmade", "RuntimeError: nothing works here"),
        ("Missing", "has no attribute 'Missing'"),
    ],
)
def test_children_that_do_not_start_are_not_tried_again(handler, words):
    outcomes = run(handler, ["a", "b", "c"])
    assert [outcome.ended for outcome in outcomes] == [Ended.NOT_STARTED] * 3
    assert all(words in outcome.last_words for outcome in outcomes)


def test_a_child_that_does_not_start_says_why_while_it_listens():
    """A thread that waits for a task made the interpreter's own end fail."""
    command = "from moetuner._workers import serve; serve('nowhere:Handler')"
    with subprocess.Popen(
        [sys.executable, "-c", command], stdin=subprocess.PIPE, stderr=subprocess.PIPE
    ) as child:
        assert child.wait(timeout=100) == 1
        assert child.stderr.read().decode().endswith("No module named 'nowhere'\n")


def test_a_child_that_hangs_is_ended_and_what_did_not_begin_is_late():
    pids = []
    hung, waiting = run(
        "Failing",
        ["hang", "work"],
        seconds=0.2,
        grace=0.0,
        on_news=lambda _, pid: pids.append(pid),
    )
    assert (hung.ended, waiting.ended) == (Ended.LATE, Ended.LATE)
    assert hung.seconds > 0
    assert waiting.seconds == 0
    assert all(is_gone(pid) for pid in pids)


def test_beyond_its_share_a_child_is_replaced():
    """The first of two hangs, and is ended long before its 20 seconds are over."""
    hung, done = run("Failing", ["hang", "work"], seconds=40.0, patience=-19.9)
    assert hung.ended is Ended.LATE
    assert (done.ended, done.result) == (Ended.DONE, "work")


def test_ctrl_c_keeps_what_is_done_and_leaves_no_child():
    pids = []

    def stop(_, pid):
        pids.append(pid)
        raise KeyboardInterrupt

    outcomes = run("Failing", ["work", "hang", "work"], on_news=stop)
    assert [outcome.ended for outcome in outcomes] == [
        Ended.DONE,
        Ended.INTERRUPTED,
        Ended.INTERRUPTED,
    ]
    assert len(pids) == 1
    assert is_gone(pids[0])
