"""The picture of a prompt in a browser: places can be chosen, and tokens stay text."""

import json

import pandas as pd
import pytest

from moescope.runs import Result
from test_reports import HOSTILE, Page, written
from test_reports_browser import CHROMIUM, opened

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed"),
]

PROBE = """
<!doctype html><meta charset="utf-8"><iframe src="{page}" width="1200" height="3000"></iframe>
<script>
const frame = document.querySelector("iframe");
const wait = () => new Promise((done) => setTimeout(done, 300));
async function probe() {{
  const page = frame.contentDocument;
  if (page.documentElement.dataset.charts !== "drawn") return setTimeout(probe, 100);
  const figure = page.querySelector("[data-figure=lens-prompt]");
  const texts = () => [...figure.querySelectorAll("svg text")].map((t) => t.textContent);
  const select = figure.querySelector("select");
  const found = {{ places: [...select.options].map((o) => o.textContent) }};
  found.chosen = select.selectedIndex;
  found.last = texts();
  select.selectedIndex = 0;
  select.dispatchEvent(new Event("change", {{ bubbles: true }}));
  await wait();
  found.first = texts();
  const marks = [...figure.querySelectorAll("path")];
  const mark = marks.find((m) => m.__data__?.tooltip);
  const box = mark.getBoundingClientRect();
  const place = {{ bubbles: true, clientX: box.x + 2, clientY: box.y + 2 }};
  for (const type of ["pointerover", "pointermove"])
    mark.dispatchEvent(new PointerEvent(type, place));
  await wait();
  found.tooltip = page.getElementById("vg-tooltip-element").textContent;
  found.images = page.querySelectorAll("img").length;
  document.body.dataset.found = JSON.stringify(found);
}}
frame.addEventListener("load", probe);
</script>
"""


def lens_result():
    """Two places, two layers and two columns; the cells of the first place are hostile."""
    place = {"stack": "decoder", "rank": 0}
    columns = {"r": "residual", "layer output": "output"}
    means = [
        place | {"layer": layer, "column": column, "kind": kind, "domain": "all", "status": "ok"}
        for layer in (0, 1)
        for column, kind in columns.items()
    ]
    values = {f"{name}{end}": 0.5 for name in ("kl", "agreement") for end in ("", "_low", "_high")}
    table = pd.DataFrame(means).assign(translated=False, n_tokens=9, n_documents=3, **values)
    cells = pd.DataFrame(
        row | {"position": position, "token": token, "top_1": said}
        for position, token, said in ((0, HOSTILE[0], HOSTILE[0]), (1, "b", "after"))
        for row in means
    )
    cells = cells.assign(
        experts="3 (0.75)",
        kl=0.25,
        **{f"top_{n}": f"token{n}" for n in range(2, 6)},
        **{f"p_{n}": 1 / 2**n for n in range(1, 6)},
    )
    return Result(name="lens", tables={"lens": table, "prompt": cells}, findings=[], provenance={})


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    written(folder, lens_result())
    probe = folder / "probe.html"
    page = (folder / "report.html").as_uri()
    probe.write_text(PROBE.format(page=page), encoding="utf-8")
    document, console = opened(probe, folder / "profile", "--allow-file-access-from-files")
    assert console == []
    body = next(a for tag, a in Page(document).elements if tag == "body")
    return json.loads(body["data-found"])


def test_the_last_place_is_shown_first_and_another_can_be_chosen(found):
    assert found["places"] == [f"0: {HOSTILE[0]}", "1: b"]
    assert found["chosen"] == 1
    assert found["last"].count("after") == 4
    assert "after" not in found["first"]


def test_tooltips_name_experts_and_five_tokens(found):
    for said in ("3 (0.75)", "token2 0.250", "token5 0.031", "0.25"):
        assert said in found["tooltip"]


def test_hostile_tokens_stay_text(found):
    assert HOSTILE[0][:20] in found["tooltip"]
    assert found["images"] == 0
