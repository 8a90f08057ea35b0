"""What may be put around layers, times form, ranks and dtype: trained like one process.

`matrix` has the cells; the end of the run shows a table of them, and `--matrix FILE`
writes it.
"""

import itertools

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from matrix import CLOSE, FEATURES, FORMS, INDUCTOR, outcomes_in, run_cells  # noqa: E402
from matrix_table import PROPERTY, outcomes_of, page_of, said_of, table_of  # noqa: E402
from ranks import run_on_ranks  # noqa: E402

BOTH = (False, True)
QUICK = [name for name in FEATURES if name not in INDUCTOR]


@pytest.fixture
def check(tmp_path, record_property):
    """Runs cells on ranks of a device; hands them in for the table."""

    def run(num_ranks, cells, device="cpu"):
        cells = [tuple(cell) for cell in cells]
        run_on_ranks(num_ranks, run_cells, cells, device, str(tmp_path), device=device)
        outcomes = [
            outcome | {"device": device} for outcome in outcomes_in(tmp_path, num_ranks)
        ]
        record_property(PROPERTY, outcomes)
        assert len(outcomes) == len(cells)
        wrong = [outcome for outcome in outcomes if outcome["wrong"]]
        if wrong:
            pytest.fail("\n\n".join(map(said_of, wrong)), pytrace=False)

    return run


def test_every_way_trains_like_one_process(check):
    cells = itertools.product(QUICK, FORMS, ["float32"], [True])
    check(2, cells)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("names", [QUICK, *([name] for name in INDUCTOR)])
@pytest.mark.parametrize("dtype", list(CLOSE))
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_every_way_in_every_dtype(check, num_ranks, dtype, names):
    check(num_ranks, itertools.product(names, FORMS, [dtype], BOTH))


@pytest.mark.gpu
@pytest.mark.timeout(600)
@pytest.mark.parametrize("dtype", list(CLOSE))
@pytest.mark.parametrize(("device", "num_ranks"), [("cuda", 1), ("cuda", 2)])
def test_every_way_on_gpus(check, monkeypatch, device, num_ranks, dtype):
    """A process for each test pays here: `-n 6`."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for defined memory
    quick = itertools.product(QUICK, FORMS, [dtype], BOTH)
    compiled = itertools.product(INDUCTOR, FORMS, [dtype], [True])
    check(num_ranks, [*quick, *compiled], device)


def test_the_table_names_what_ran_and_what_went_wrong():
    class Report:
        when = "call"
        user_properties = (
            (
                PROPERTY,
                [
                    _outcome("plain", "float32", bias=True),
                    _outcome("plain", "float32", bias=False),
                    _outcome("plain", "bfloat16", bias=True, ranks=2),
                    _outcome("export", "float16", bias=False, wrong="rank 1: no"),
                ],
            ),
            ("other", "value"),
        )

    outcomes = outcomes_of([Report(), object()])
    page = page_of(outcomes)
    assert "\n\n4 cells, 1 wrong\n\n{'feature': 'export', " in page
    assert page.endswith("}\nrank 1: no\n")
    assert table_of(outcomes) == [
        "| feature | device | exact, 1 rank | exact, 2 ranks |",
        "| --- | --- | --- | --- |",
        "| plain | cpu | f32 | bf16+b |",
        "| export | cpu | f16 FAILS | - |",
    ]


def _outcome(feature, dtype, *, bias, ranks=1, wrong=""):
    return {
        "feature": feature,
        "form": "exact",
        "dtype": dtype,
        "bias": bias,
        "ranks": ranks,
        "device": "cpu",
        "wrong": wrong,
    }
