"""One palette for the page: by day and by night, and easy to read."""

import re
from pathlib import Path

import moetuner.report.html
import numpy as np
import pytest
from moetuner.report.html.colors import contrast, luminance
from moetuner.report.html.palette import AFTER, BEFORE, OTHER, PALETTE, variables

FOLDER = Path(moetuner.report.html.__file__).parent
INKS = {ink.name: ink for ink in PALETTE}
HEX = re.compile(r"#[0-9a-fA-F]{3,8}\b")
SURFACES = ("paper", "ground", "good", "even", "bad")
WRITING = [
    *((text, behind) for text in ("ink", "soft") for behind in SURFACES),
    *(("blue", behind) for behind in ("paper", "ground")),
    *(("on-sign", behind) for behind in ("soft", "blue", "orange")),
    ("tip-ink", "tip"),
]


def light_of(color):
    return luminance(np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]))


def contrast_of(one, other, scheme):
    lights = [light_of(getattr(ink, scheme)) for ink in (one, other)]
    return contrast(max(lights), min(lights))


@pytest.mark.parametrize("scheme", ["day", "night"])
def test_all_writing_has_the_contrast_that_wcag_asks_for(scheme):
    for text, behind in WRITING:
        assert contrast_of(INKS[text], INKS[behind], scheme) >= 4.5, (text, behind)


@pytest.mark.parametrize("scheme", ["day", "night"])
def test_lines_of_drawings_stand_out_from_the_paper(scheme):
    for ink in (BEFORE, AFTER, OTHER):
        assert contrast_of(ink, INKS["paper"], scheme) >= 3, ink


def test_no_file_but_the_palette_and_the_scales_holds_a_colour():
    for path in FOLDER.rglob("*"):
        named = path.name in ("palette.py", "colors.py")
        if path.suffix in (".py", ".css", ".js") and not named:
            assert HEX.findall(path.read_text("utf-8")) == [], path


def test_every_variable_that_is_used_is_there_by_day_and_by_night():
    sheet = (FOLDER / "style.css").read_text("utf-8")
    used = set(re.findall(r"var\(--([a-z0-9-]+)\)", sheet))
    assert used <= set(INKS)
    day, night = variables().split("@media screen and (prefers-color-scheme: dark)")
    for block in (day, night):
        assert set(re.findall(r"--([a-z0-9-]+):", block)) == set(INKS)
