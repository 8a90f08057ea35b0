"""The table of cells that the tests of a run went through, and what became of them.

Tests hand in outcomes by `record_property(PROPERTY, [...])`, so that those of other
processes arrive too. An outcome names feature, form, ranks, device, dtype, bias and
what went wrong, empty where nothing did.
"""

from collections import defaultdict

PROPERTY = "matrix"
SHORT = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


def outcomes_of(reports):
    """All outcomes that the reports of a run carry."""
    return [
        outcome
        for report in reports
        if getattr(report, "when", "") == "call"  # others carry the same
        for name, outcomes in getattr(report, "user_properties", ())
        if name == PROPERTY
        for outcome in outcomes
    ]


def table_of(outcomes):
    """Markdown lines: a row for each feature and device, a column for form and ranks.

    A cell names its dtypes: ``f32`` with and without biases, ``f32+b`` and ``f32-b``
    with one of the two alone, ``f32 FAILS`` where one of its runs went wrong.
    """
    rows = defaultdict(lambda: defaultdict(list))
    for outcome in outcomes:
        row = outcome["feature"], outcome["device"]
        rows[row][outcome["form"], outcome["ranks"]].append(outcome)
    columns = sorted({column for row in rows.values() for column in row})
    heads = [f"{form}, {n} rank{'s' * (n > 1)}" for form, n in columns]
    lines = [["feature", "device", *heads], ["---"] * (len(heads) + 2)]
    for row, found in rows.items():
        lines.append([*row, *(_cell(found[column]) for column in columns)])
    return [f"| {' | '.join(line)} |" for line in lines]


def page_of(outcomes):
    """The table, and behind it what went wrong in each cell where something did."""
    lines = [*table_of(outcomes), "", summary_of(outcomes)]
    for outcome in outcomes:
        if outcome["wrong"]:
            lines += ["", said_of(outcome)]
    return "\n".join([*lines, ""])


def said_of(outcome):
    """One cell by its names, and what went wrong."""
    named = {name: value for name, value in outcome.items() if name != "wrong"}
    return f"{named}\n{outcome['wrong']}"


def summary_of(outcomes):
    """How many there are, and how many went wrong."""
    wrong = sum(bool(outcome["wrong"]) for outcome in outcomes)
    return f"{len(outcomes)} cells, {wrong} wrong"


def _cell(outcomes):
    words = []
    for dtype, short in SHORT.items():
        same = [outcome for outcome in outcomes if outcome["dtype"] == dtype]
        biases = {outcome["bias"] for outcome in same}
        if any(outcome["wrong"] for outcome in same):
            words.append(f"{short} FAILS")
        elif same:
            words.append(short + {(True,): "+b", (False,): "-b"}.get((*biases,), ""))
    return " ".join(words) or "-"
