"""The report in a browser: headless Chromium with the network off."""

import json
import re
import shutil
import subprocess

import pytest

from results_zoo import align_result, routing_result
from test_reports import HOSTILE, Page, written

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed"),
]


def opened(page, profile, *options):
    """Document after loading, and what the console said."""
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--user-data-dir={profile}",
        "--virtual-time-budget=20000",
        "--enable-logging=stderr",
        "--v=0",
        *options,
        "--dump-dom",
        page.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=170, check=True)
    return done.stdout, re.findall(r"CONSOLE.*", done.stderr)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    written(folder, routing_result(domains=(*HOSTILE, "maths"), layers=3), align_result())
    return folder / "report.html"


@pytest.mark.parametrize(
    ("width", "scheme"), [(1200, "light"), (390, "light"), (1200, "dark")], ids=str
)
def test_charts_are_drawn_without_a_word_on_the_console(page, tmp_path, width, scheme):
    preferred = {"dark": 0, "light": 1}[scheme]
    document, console = opened(
        page,
        tmp_path,
        f"--window-size={width},2000",
        f"--blink-settings=preferredColorScheme={preferred}",
    )
    assert console == []
    assert 'data-charts="drawn"' in document
    seen = Page(document)
    boxes = [a["data-figure"] for _, a in seen.elements if "data-figure" in a]
    assert len([tag for tag, _ in seen.elements if tag == "svg"]) == len(boxes) == 11
    assert "could not be drawn" not in seen.text
    axis_labels = {"dark": "#b4bbc3", "light": "#4a525b"}[scheme]
    assert document.count(f'fill="{axis_labels}"') > 50


def test_hostile_labels_are_labels(page, tmp_path):
    document, _ = opened(page, tmp_path, "--window-size=1200,2000")
    seen = Page(document)
    assert "img" not in {tag for tag, _ in seen.elements}
    assert not any(name.startswith("on") for _, a in seen.elements for name in a)
    assert HOSTILE[0] in [text.strip() for text in seen.texts]  # the heading of a panel


PROBE = """
<!doctype html><meta charset="utf-8"><iframe src="{page}" width="{width}" height="3000"></iframe>
<script>
const frame = document.querySelector("iframe");
function hover(mark) {{
  const box = mark.getBoundingClientRect();
  const place = {{ bubbles: true, clientX: box.x + 2, clientY: box.y + 2 }};
  for (const type of ["pointerover", "pointermove"])
    mark.dispatchEvent(new PointerEvent(type, place));
}}
async function probe() {{
  const page = frame.contentDocument;
  if (page.documentElement.dataset.charts !== "drawn") return setTimeout(probe, 100);
  const root = page.documentElement;
  const found = {{ wide: root.scrollWidth, room: root.clientWidth }};
  const table = page.querySelector("figure table");
  const column = [...table.tHead.rows[0].cells].findIndex((c) => c.textContent === "score");
  const button = table.tHead.rows[0].cells[column].querySelector("button");
  for (const turn of ["first", "second"]) {{
    button.click();
    const cells = [...table.tBodies[0].rows].map((row) => row.cells[column]);
    found[turn] = [button.parentElement.ariaSort, cells.map((c) => c.dataset.value ?? null)];
  }}
  const marks = [...page.querySelectorAll("#routing-shares path")];
  const hostile = marks.find((m) => m.__data__?.tooltip?.domain?.startsWith("<img"));
  hover(hostile);
  await new Promise((done) => setTimeout(done, 300));
  const tooltip = page.getElementById("vg-tooltip-element");
  found.tooltip = [tooltip.className, tooltip.textContent, tooltip.querySelectorAll("img").length];
  document.body.dataset.found = JSON.stringify(found);
}}
frame.addEventListener("load", probe);
</script>
"""


@pytest.fixture(scope="module")
def probed(page, tmp_path_factory):
    folder = tmp_path_factory.mktemp("probe")
    probe = folder / "probe.html"
    probe.write_text(PROBE.format(page=page.as_uri(), width=360), encoding="utf-8")
    document, console = opened(probe, folder / "profile", "--allow-file-access-from-files")
    assert console == []
    body = next(a for tag, a in Page(document).elements if tag == "body")
    return json.loads(body["data-found"])


def test_a_phone_does_not_scroll_sideways(probed):
    assert probed["wide"] <= probed["room"] <= 360


def test_tables_sort_and_keep_missing_values_last(probed):
    for turn, state, direction in (("first", "ascending", 1), ("second", "descending", -1)):
        said, values = probed[turn]
        assert said == state
        numbers = [float(value) for value in values if value is not None]
        assert values[len(numbers) :] == [None] * 5
        assert numbers == sorted(numbers)[::direction]


def test_a_tooltip_shows_hostile_text_as_text(probed):
    state, text, images = probed["tooltip"]
    assert "visible" in state
    assert HOSTILE[0] in text
    assert images == 0
