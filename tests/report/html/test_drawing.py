"""Pieces of the page by themselves: escaping, pictures, scales, ticks."""

import base64
import io
import re

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from moetuner.report.html.charts import Line, line_chart
from moetuner.report.html.colors import (
    STEPS,
    contrast,
    luminance,
    scale_around,
    scale_from_zero,
)
from moetuner.report.html.content import Numbers
from moetuner.report.html.frame import every, nice_ticks
from moetuner.report.html.markup import Markup, join, tag
from moetuner.report.html.png import png_uri
from moetuner.report.html.pooling import MAX_RANKS, node_lines, pooled, rank_labels

RNG = np.random.default_rng(11)


@given(text=st.text(), value=st.text())
def test_no_text_or_attribute_becomes_markup(parse, text, value):
    page = parse(tag("p", text, title=value))
    assert [name for name, _ in page.elements] == ["p"]
    # The parser reads line ends and NUL as HTML says; all else comes back.
    plain = page.text.replace("\r", "").replace("\x00", "").replace("\ufffd", "")
    wanted = text.replace("\r", "").replace("\x00", "").replace("\ufffd", "")
    assert plain == wanted


def test_markup_is_kept_and_nothing_is_left_out_of_none():
    assert join([Markup("<b>"), "<", None, 2, 1.50]) == "<b>&lt;21.5"
    assert tag("path", d="M0 0", fill=None) == '<path d="M0 0"/>'


def test_a_picture_has_the_pixels_it_was_given():
    image = pytest.importorskip("matplotlib.image")
    pixels = RNG.integers(0, 5, (7, 3), np.uint8)
    palette = RNG.integers(0, 256, (5, 3), np.uint8)
    uri = png_uri(pixels, palette)
    head, data = uri.split(",")
    assert head == "data:image/png;base64"
    read = image.imread(io.BytesIO(base64.b64decode(data)), format="png")
    np.testing.assert_array_equal(np.round(read[..., :3] * 255), palette[pixels])


def lightness(ramp):
    return ramp[:STEPS] @ np.array([0.2126, 0.7152, 0.0722])


def test_colours_tell_values_apart_by_lightness_alone():
    """So that nobody needs to tell hues apart; by night it is the other way round."""
    more = scale_from_zero(np.array([1.0]), label="").ramp
    around = scale_around(1.0, np.array([2.0]), label="").ramp
    half = STEPS // 2
    for sign, one, two in ((1, more.day, around.day), (-1, more.night, around.night)):
        rising, both = -sign * lightness(one), sign * lightness(two)
        assert (np.diff(rising) > -0.5).all()
        assert rising[-1] - rising[0] > 190
        assert (np.diff(both[:half]) > -0.5).all()
        assert (np.diff(both[half:]) < 0.5).all()
    assert lightness(around.day)[half] > 240
    assert lightness(around.night)[half] < 50


def test_numbers_are_easy_to_read_on_every_colour_of_a_scale():
    for scale in (
        scale_from_zero(np.array([1.0]), label=""),
        scale_around(1.0, np.array([2.0]), label=""),
    ):
        for value in np.linspace(scale.low, scale.high, 301):
            entry = int(scale.index(np.array([value]))[0])
            for night, ramp in ((False, scale.ramp.day), (True, scale.ramp.night)):
                behind = luminance(ramp[entry])
                white = scale.wants_white(value, night=night)
                found = contrast(1, behind) if white else contrast(behind, 0)
                assert found >= 4.5


def test_scales_put_their_ends_and_their_centre_where_they_say():
    scale = scale_around(1.0, np.array([0.5, 1.2, np.nan]), label="")
    assert (scale.low, scale.high) == (0.5, 1.5)
    assert scale.index(np.array([0.5, 1.0, 9.0, np.nan])).tolist() == [
        0,
        STEPS // 2,
        STEPS - 1,
        STEPS,
    ]
    assert scale_from_zero(np.array([0.0, 4.0]), label="").high == 4
    assert scale_from_zero(np.array([np.nan]), label="").high == 1
    assert not scale.wants_white(1.0)
    assert scale.wants_white(1.5)
    assert scale.wants_white(1.0, night=True)
    assert not scale.wants_white(1.5, night=True)


@given(
    low=st.floats(-1e6, 1e6),
    width=st.floats(1e-6, 1e6),
    count=st.integers(2, 9),
    whole=st.booleans(),
)
@example(low=3e-12, width=1e-6, count=2, whole=True)
def test_ticks_are_few_round_and_inside(low, width, count, whole):
    ticks = nice_ticks(low, low + width, count, whole=whole)
    assert len(ticks) <= count + 1
    slack = 1e-6 * (abs(low) + width)
    assert all(low - slack <= tick <= low + width + slack for tick in ticks)
    assert not whole or all(tick == round(tick) for tick in ticks)


@given(count=st.integers(1, 5000))
def test_labels_never_touch(count):
    assert 1 <= len(every(count)) <= 12
    assert every(count)[0] == 0


@pytest.mark.parametrize("ranks", [1, 8, 128, 131, 256, 1000, 4096])
def test_many_ranks_are_drawn_as_few_means(ranks):
    values = RNG.random((3, ranks))
    means = pooled(values, 1)
    assert means.shape == (3, len(rank_labels(ranks)))
    assert len(rank_labels(ranks)) <= MAX_RANKS
    np.testing.assert_allclose(means.mean(axis=1), values.mean(axis=1))
    assert all(
        0 < line < len(rank_labels(ranks))
        for line in node_lines(ranks, ranks // 4 or 1)
    )


def test_what_is_unknown_counts_in_no_mean():
    table = np.ones((256, 256))
    np.fill_diagonal(table, np.nan)
    np.testing.assert_array_equal(pooled(table, 0, 1), np.ones((128, 128)))


def test_tables_quote_what_would_break_them_and_run_nothing(parse):
    numbers = Numbers()
    drawn = numbers.table(
        "t",
        "T",
        ("a,b", '=1+"2"', "x"),
        [(1, 0.123456789, None), (2, float("nan"), "y")],
    )
    head, rows = parse(drawn).table("t")
    assert head == ["a,b", '\'=1+"2"', "x"]
    assert rows == [["1", "0.123457", ""], ["2", "", "y"]]


def test_tables_too_large_for_a_page_are_only_named():
    numbers = Numbers()
    drawn = numbers.table("t", "T", ("a",), ((i,) for i in range(200_000)))
    assert "200,001 numbers" in drawn
    assert numbers.tables == {}


@pytest.mark.parametrize(
    ("values", "name", "labels"),
    [
        ((0.00307, 0.00312), "y, 1e-3", ("3.08", "3.1")),
        ((3e6, 9e6), "y, 1e6", ("4", "8")),
        ((0.2, 1.4), "y", ("0.5", "1")),
        ((0.0, 0.0), "y", ("0",)),
    ],
)
def test_labels_of_small_and_large_values_stay_short(parse, values, name, labels):
    line = Line(x=(0.0, 1.0), y=values, color="#000")
    drawing = line_chart([line], x="x", y="y", name="chart")
    texts = list(re.findall(r"<text[^>]*>([^<]*)</text>", drawing))
    assert name in texts
    assert set(labels) <= set(texts)
    assert max(map(len, texts)) <= len("y, 1e-3")
