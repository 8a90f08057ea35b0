import pytest
from moetuner.report.outputs import PLOT_SUFFIXES
from moetuner.report.plot import plot_plan

pytest.importorskip("matplotlib")


def test_png_has_the_expected_size_and_many_colours(make_report, tmp_path):
    from matplotlib.image import imread

    plot_plan(make_report(), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    pixels = imread(tmp_path / "plot.png")
    assert pixels.shape[:2] == (1200, 1650)
    assert len({tuple(pixel) for pixel in pixels[::7, ::7, :3].reshape(-1, 3)}) > 50


@pytest.mark.parametrize("suffix", PLOT_SUFFIXES)
def test_every_suffix_on_offer_can_be_written(make_report, tmp_path, suffix):
    plot_plan(make_report(), tmp_path / f"plot{suffix}")
    assert [file.name for file in tmp_path.iterdir()] == [f"plot{suffix}"]


def svg_text(report, path):
    from matplotlib import rc_context

    with rc_context({"svg.fonttype": "none"}):
        plot_plan(report, path)
    return path.read_text()


def test_labels_name_both_placements_and_their_scores(make_report, tmp_path):
    report = make_report()
    text = svg_text(report, tmp_path / "plot.svg")
    for candidate in (report.baseline, report.result):
        assert f"{candidate.name}: load per rank" in text
        assert f"max/mean {candidate.evaluation.imbalance_mean:.2f}" in text
        assert f"{candidate.evaluation.remote_ranks_per_token:.2f} remote" in text


@pytest.mark.parametrize("ranks", [1, 2, 16, 64])
def test_any_number_of_ranks_is_drawn_without_warnings(make_report, tmp_path, ranks):
    report = make_report(ranks=ranks, per_node=min(ranks, 8), experts=64)
    plot_plan(report, tmp_path / "plot.png")
