"""The page in a real browser: no console message, no overflow, numbers under a finger.

Runs where a Chromium is found. The page reports on itself: a script that is added for
the test writes what it measured into the document, which the browser then prints.
"""

import dataclasses
import html
import json
import re
import shutil
import subprocess

import pytest
from moetuner.report.html import render_page
from moetuner.report.html.palette import PALETTE

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")

DESKTOP, PHONE = (1200, 900), (390, 844)
MEASURE = """
const root = document.documentElement;
const seen = (what) => [...document.querySelectorAll(what)].filter(
  (e) => e.checkVisibility());
const result = {
  wider: root.scrollWidth - root.clientWidth,
  width: root.clientWidth,
  empty: seen('section, figure > svg').filter(
    (e) => e.getBoundingClientRect().height < 20).map((e) => e.outerHTML),
  small: seen('figure > svg text:not(.cell)').map((t) =>
    parseFloat(getComputedStyle(t).fontSize) * t.ownerSVGElement.getScreenCTM().a
  ).reduce((a, b) => Math.min(a, b), 99),
  outside: seen('figure > svg text').filter((t) => {
    const own = t.getBoundingClientRect();
    const all = t.ownerSVGElement.getBoundingClientRect();
    return own.left < all.left - 2 || own.right > all.right + 2;
  }).map((t) => t.textContent),
  cut: seen('.value').filter((e) => e.scrollWidth > e.clientWidth)
    .map((e) => e.textContent),
  hiddenGains: [...document.querySelectorAll('#scores tr')].filter((row) =>
    row.children[1].getBoundingClientRect().right >
    row.closest('.wide').getBoundingClientRect().right + 1).length,
  columns: new Set([...document.querySelectorAll('#load figure')].map(
    (f) => Math.round(f.getBoundingClientRect().left))).size,
};
const tip = document.getElementById('tip');
const point = (svg, x, y) => {
  const [left, top, w, h] = svg.dataset.area.split(' ').map(Number);
  const at = new DOMPoint(left + x * w, top + y * h).matrixTransform(
    svg.getScreenCTM());
  svg.dispatchEvent(new PointerEvent('pointerdown', {
    bubbles: true, clientX: at.x, clientY: at.y }));
  return tip.hidden ? null : tip.textContent;
};
const select = document.querySelector('select[data-shows]');
result.first = select.value;
select.value = '2';
select.dispatchEvent(new Event('change'));
result.chosen = seen('#together figcaption').map((c) => c.textContent);
result.tips = ['load', 'traffic', 'together'].map(
  (name) => point(seen(`#${name} svg[data-area]`)[1], 0.99, 0.01));
result.saves = document.querySelectorAll('.numbers button').length;
const kept = document.createElement('script');
kept.type = 'application/json';
kept.id = 'measured';
kept.textContent = JSON.stringify(result);
parent.document.body.append(kept);
"""


def browse(tmp_path, *arguments, page):
    """Standard output of the browser, and what the page wrote to the console."""
    done = subprocess.run(
        [
            *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu"),
            *("--hide-scrollbars", "--enable-logging=stderr"),
            *(f"--user-data-dir={tmp_path / 'profile'}", *arguments, page.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout, re.findall(r"CONSOLE.*", done.stderr)


def measure(tmp_path, text, size):
    """The page in a frame of that size: a window cannot be as narrow as a phone."""
    own = text.replace("</body>", f"<script>{MEASURE}</script></body>")
    size = f'width="{size[0]}" height="{size[1]}"'
    page = tmp_path / "page.html"
    page.write_text(f'<iframe {size} srcdoc="{html.escape(own)}"></iframe>')
    out, console = browse(tmp_path, "--dump-dom", page=page)
    found = re.search(r'id="measured">(.*?)</script>', out, re.DOTALL)
    return json.loads(html.unescape(found[1])) if found else None, console


CONTRAST = """
const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
const light = (c) => c.slice(0, 3).map((v) => v / 255).map(
  (v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4
).reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const behind = (e) => {
  for (let at = e; at; at = at.parentElement) {
    const c = rgb(getComputedStyle(at).backgroundColor);
    if (c.length === 3 || c[3] === 1) return c;
  }
  return [255, 255, 255];
};
const bad = [];
let count = 0;
for (const e of document.querySelectorAll('body *')) {
  const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
  // Numbers in cells lie on a picture; a test of the scales looks at them.
  if (!own || !e.checkVisibility() || e.matches('script, title, .cell')) continue;
  const style = getComputedStyle(e);
  const color = rgb(e instanceof SVGElement ? style.fill : style.color);
  const [a, b] = [light(color), light(behind(e))].sort((x, y) => x - y);
  count += 1;
  const found = (b + 0.05) / (a + 0.05);
  if (found < 4.5) bad.push([e.outerHTML.slice(0, 90), found.toFixed(2)]);
}
const pictures = [...document.querySelectorAll('svg image')];
const kept = document.createElement('script');
kept.type = 'application/json';
kept.id = 'measured';
kept.textContent = JSON.stringify({
  bad, count, paper: getComputedStyle(document.querySelector('section + section'))
    .backgroundColor,
  shown: [...new Set(pictures.filter((p) => p.getBoundingClientRect().width > 0)
    .map((p) => p.getAttribute('class')))],
  colors: [...new Set([...document.querySelectorAll('svg .line')].map(
    (p) => getComputedStyle(p).stroke))],
});
document.body.append(kept);
"""
DARK = "--blink-settings=preferredColorScheme=0"


@pytest.mark.parametrize("scheme", ["day", "night"])
def test_all_writing_is_easy_to_read_by_day_and_by_night(demo, tmp_path, scheme):
    page = tmp_path / "page.html"
    text = render_page(demo).replace("</body>", f"<script>{CONTRAST}</script></body>")
    page.write_text(text)
    dark = [DARK] if scheme == "night" else []
    out, console = browse(tmp_path, "--dump-dom", *dark, page=page)
    found = re.search(r'id="measured">(.*?)</script>', out, re.DOTALL)
    seen = json.loads(html.unescape(found[1]))
    assert console == []
    assert seen["count"] > 200
    assert seen["bad"] == []
    assert seen["shown"] == [scheme]
    inks = {getattr(ink, scheme) for ink in PALETTE}
    for color in (seen["paper"], *seen["colors"]):
        assert "#" + "".join(f"{int(n):02x}" for n in re.findall(r"\d+", color)) in inks


def test_a_console_message_would_be_seen(tmp_path):
    page = tmp_path / "page.html"
    page.write_text("<script>throw new Error('on purpose')</script>")
    _, console = browse(tmp_path, "--dump-dom", page=page)
    assert "on purpose" in console[0]


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_the_page_works_at_this_size(demo, parse, tmp_path, size):
    text = render_page(demo)
    seen, console = measure(tmp_path, text, size)
    assert console == []
    assert size[0] - 20 <= seen["width"] <= size[0]
    assert seen["wider"] <= 0
    assert seen["empty"] == []
    assert seen["outside"] == []
    assert seen["small"] >= 10  # pixels: readable at arm's length
    assert seen["hiddenGains"] == 0
    assert seen["cut"] == []
    assert seen["columns"] == (1 if size == PHONE else 2)
    assert seen["chosen"][:2] == ["contiguous, layer 2", "ilp2, layer 2"]
    assert seen["saves"] == len(parse(text).tables)


def test_a_phone_shows_gains_beside_names_of_any_length(demo, tmp_path):
    name = "placement_of_last_week_for_the_whole_cluster_v2"
    gain = dataclasses.replace(demo.result.gain, gain=-0.483, low=-0.607, high=-0.358)
    named = [
        dataclasses.replace(c, name=f"{name}_{i}", gain=c.gain and gain)
        for i, c in enumerate(demo.candidates)
    ]
    report = dataclasses.replace(demo, candidates=tuple(named), result=named[-1])
    seen, console = measure(tmp_path, render_page(report), PHONE)

    assert console == []
    assert seen["hiddenGains"] == 0
    assert seen["wider"] <= 0


def test_a_pointed_cell_shows_the_number_of_the_table(demo, parse, tmp_path):
    text = render_page(demo)
    seen, _ = measure(tmp_path, text, DESKTOP)
    page = parse(text)
    load, traffic, together = seen["tips"]
    rows = {tuple(row[:2]): row[3] for row in page.table("load")[1]}
    assert load == f"layer 11, rank 0: {rows['11', '0']}"
    rows = {tuple(row[:2]): row[3] for row in page.table("traffic")[1]}
    assert traffic == f"home rank 0, computing rank 7: {rows['0', '7']}"
    slots = demo.result.placement.slot_experts[2]
    first, last = slots[0], slots[-1]
    count = demo.statistics.coactivation[2, first, last]
    assert together == f"experts {first} and {last}: {count} tokens"


def test_the_page_prints_on_few_sheets(demo, tmp_path):
    page, sheets = tmp_path / "page.html", tmp_path / "page.pdf"
    page.write_text(render_page(demo))
    _, console = browse(tmp_path, f"--print-to-pdf={sheets}", page=page)
    assert console == []
    count = len(re.findall(rb"/Type\s*/Page\b", sheets.read_bytes()))
    assert 3 <= count <= 8
