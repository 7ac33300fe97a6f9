"""The page in a real browser, without a network: it renders, says nothing to the console, and fits a phone."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from pipeline.report.write import write_report
from tests.jobs.test_report import usual
from tests.support.reports import PASSAGE, answered, at, failed, write_set

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")

# Files may look into files: the page is measured in a frame, since it runs no script itself.
OPTIONS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--allow-file-access-from-files",
    "--enable-logging=stderr",
]
MEASURE = """<!doctype html><iframe id="frame" src="%s" style="width: %dpx; height: 5000px; border: 0">
</iframe><pre id="out"></pre>
<script>
frame.onload = () => {
  const page = frame.contentDocument, found = {};
  page.querySelectorAll("details").forEach(element => { element.open = true; });
  found.overflow = page.documentElement.scrollWidth - page.documentElement.clientWidth;
  const seen = () => [...page.querySelectorAll(".example")].filter(e => e.offsetParent).length;
  found.examples = [seen()];
  page.querySelectorAll("input").forEach(button => { button.click(); found.examples.push(seen()); });
  found.background = frame.contentWindow.getComputedStyle(page.body).backgroundColor;
  found.charts = [...page.querySelectorAll(".chart")].map(e => Math.round(e.getBoundingClientRect().height));
  found.captions = [...page.querySelectorAll("caption")].map(e => Math.round(e.getBoundingClientRect().right));
  out.textContent = JSON.stringify(found);
};
</script>"""


def browse(page: Path, folder: Path, *options: str) -> str:
    """The page's document as the browser has it, once nothing was said to the console."""
    command = [str(BROWSER), *OPTIONS, f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=3000"]
    result = subprocess.run(
        [*command, *options, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    assert not re.findall(r".*CONSOLE.*", result.stderr)
    return result.stdout


def measured(page: Path, folder: Path, width: int, *options: str) -> dict:
    """What a page measures in a frame of this width, in CSS pixels, with everything opened."""
    frame = folder / "frame.html"
    frame.write_text(MEASURE % (page.as_uri(), width))
    found = re.search(r'<pre id="out">(.*?)</pre>', browse(frame, folder, *options), re.DOTALL)
    assert found
    return json.loads(found[1])


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With every section, and with texts and names that do not fit a line."""
    folder = tmp_path_factory.mktemp("set")
    word = "Donaudampfschifffahrtsgesellschaft" * 4
    passages = [{**PASSAGE, "title": word, "text": f"{word} Herbert. " * 40}]
    one = [answered(f"a{n}", n, task=word, query=word, answer=f"Herbert {word}", passages=passages) for n in range(6)]
    two = [*(answered(f"b{n}", n, task="qa") for n in range(6)), failed("c", "ValueError", word, task="qa")]
    times = [(1_750_000_000.0, 1_750_000_100.0), (1_750_003_700.0, 1_750_003_800.0)]
    write_set(folder / "set", one, two, times=times, settings={"model": {"name": f"/models/{word}"}})
    baseline = at(usual(folder / "before"))
    return Path(write_report(at(folder / "set"), baseline=baseline, price=4.5).path)


def test_page_renders_in_a_browser(page: Path, tmp_path: Path) -> None:
    document = browse(page, tmp_path)
    for words in ("Run report", "Generated tokens per second", "Where the time went", "have no answered id in common"):
        assert words in document


def test_page_fits_a_phone_screen(page: Path, tmp_path: Path) -> None:
    found = measured(page, tmp_path, 390)
    assert found["overflow"] == 0
    assert min(found["charts"]) >= 60
    assert max(found["captions"]) <= 390


def test_examples_are_filtered_by_task_without_scripts(page: Path, tmp_path: Path) -> None:
    everything, also_everything, one, other = measured(page, tmp_path, 1280)["examples"]
    assert everything == also_everything == one + other
    assert one > 0 < other


def test_page_follows_the_preferred_color_scheme(page: Path, tmp_path: Path) -> None:
    assert measured(page, tmp_path, 1280)["background"] == "rgb(252, 252, 251)"
    dark = measured(page, tmp_path, 1280, "--blink-settings=preferredColorScheme=0")
    assert dark["background"] == "rgb(22, 24, 27)"
