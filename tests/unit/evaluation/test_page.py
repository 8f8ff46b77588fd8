"""The page of an evaluation as a browser lays it out. Skipped where no Chromium is installed."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from eddyline.settings.loader import Settings
from evaluation import offline, page
from tests.unit.evaluation.small import make_bundle, make_items, make_log

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((path for name in NAMES if (path := shutil.which(name))), None)
# What the browser made of the page, written where --dump-dom shows it.
MEASURE = """<script>
const box = e => e.getBoundingClientRect();
const lines = cell => {
  const range = document.createRange(); range.selectNodeContents(cell);
  return new Set([...range.getClientRects()].map(r => r.top)).size;
};
const outside = [...document.querySelectorAll('svg *')].filter(e => {
  const a = box(e), b = box(e.closest('svg'));
  const wide = a.left < b.left - 1 || a.right > b.right + 1;
  return wide || a.top < b.top - 1 || a.bottom > b.bottom + 1;
});
const found = {
  requests: performance.getEntriesByType('resource').length,
  bars: [...document.querySelectorAll('svg rect')].map(e => box(e).width),
  curves: document.querySelectorAll('svg polyline').length,
  outside: outside.map(e => e.outerHTML),
  wrapped: [...document.querySelectorAll('td')].filter(e => lines(e) > 1).map(e => e.innerText),
  overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  hidden: [...document.querySelectorAll('h2, td, svg text')].filter(e => !box(e).height).length,
};
document.body.innerHTML = '<pre>' + JSON.stringify(found).replace(/</g, '&lt;') + '</pre>';
</script></body>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_a_browser_shows_the_whole_page(tmp_path: Path) -> None:
    report, _ = offline.evaluate(
        Settings(popular_limit=9),
        make_log(1),
        make_bundle(tmp_path, make_items()),
        name="<i>a & b</i>",
        split=0.5,
        keeps_repeats=True,
        seed=3,
    )
    path = tmp_path / "page.html"
    path.write_text(page.page(report).replace("</body>", MEASURE), encoding="utf-8")
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1000,900"]
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    shown = subprocess.run(
        [*command, profile, "--dump-dom", path.as_uri()],
        capture_output=True,
        encoding="utf-8",
        timeout=60,
        check=True,
    ).stdout
    text = re.search(r"<pre>(.*)</pre>", shown, re.DOTALL)
    assert text is not None, shown[:2_000]
    found = json.loads(html.unescape(text.group(1)))
    bars = found.pop("bars")
    assert len(bars) == len(report.rows)
    values = [row.metrics["hr_10"].value for row in report.rows]
    longest = max(range(len(bars)), key=values.__getitem__)
    for value, width in zip(values, bars, strict=True):
        assert width == pytest.approx(bars[longest] * value / values[longest], abs=1)
    assert found == {
        "requests": 0,
        "curves": 8,
        "outside": [],
        "wrapped": [],
        "overflow": 0,
        "hidden": 0,
    }
