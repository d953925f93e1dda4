"""The report on disk: complete, escaped, asking the network for nothing."""

import json
import re
from html.parser import HTMLParser

import pandas as pd
import pytest

from moescope.errors import MoEScopeError
from moescope.reports.registry import chapter, figures
from moescope.reports.write import report
from moescope.runs import Finding, Result
from results_zoo import align_result, routing_result

HOSTILE = (
    "<img src=x onerror=alert(1)>",
    "</script><script>alert(2)</script>",
    "{{constructor.constructor('alert(3)')()}}",
    '"><svg/onload=alert(4)><!--',
)


class Page(HTMLParser):
    """Elements, attributes and texts of a page, as a browser would see them."""

    def __init__(self, source):
        super().__init__()
        self.elements, self.texts, self.scripts = [], [], []
        self._inside = []
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag in ("script", "style"):
            self._inside.append(tag)

    def handle_endtag(self, tag):
        if self._inside and tag == self._inside[-1]:
            self._inside.pop()

    def handle_data(self, data):
        if self._inside:
            self.scripts.append(data)
        else:
            self.texts.append(data)

    @property
    def text(self):
        return " ".join(self.texts)


def written(folder, *results):
    for result in results:
        result.save(folder / "results")
    path = report(folder)
    assert path == folder / "report.html"
    return path.read_text(encoding="utf-8")


def embedded(source, name):
    return json.loads(re.search(rf'id="{name}">(.*?)</script>', source, re.S)[1])


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    source = written(folder, routing_result(), align_result())
    return folder, source


def test_page_is_small_and_asks_for_nothing(both):
    _, source = both
    assert len(source.encode()) < 5_000_000
    page = Page(source)
    addresses = [
        value
        for _, attributes in page.elements
        for name, value in attributes.items()
        if name in ("src", "href", "srcset", "action", "data", "poster")
    ]
    assert addresses
    assert all(address.startswith("#") or address == "data:," for address in addresses)
    assert "http" not in json.dumps(embedded(source, "specifications"))
    assert "@import" not in source
    policy = next(a["content"] for _, a in page.elements if "http-equiv" in a)
    assert "default-src 'none'" in policy
    assert "unsafe-eval" not in policy
    assert "script-src 'unsafe-inline'" not in policy


def test_scripts_are_embedded_once_for_all_charts(both):
    _, source = both
    scripts = [e for e in Page(source).elements if e[0] == "script"]
    assert len(scripts) == 4  # two of data, the library, the page's own
    assert source.count("window.vegaEmbed") == 1


def test_findings_come_first_and_provenance_last(both):
    _, source = both
    order = re.findall(r'<section id="([^"]+)"', source)
    assert order == ["findings", "result-routing", "result-align", "provenance"]
    text = Page(source).text
    for result in (routing_result(), align_result()):
        for finding in result.findings:
            assert finding.text in text
    assert "model_fingerprint" in text


def test_figures_are_written_as_svg_and_png(both):
    folder, source = both
    names = re.findall(r'data-figure="([^"]+)"', source)
    assert len(names) == len(set(names)) == 11
    for name in names:
        assert "<svg" in (folder / "figures" / f"{name}.svg").read_text(encoding="utf-8")
        png = (folder / "figures" / f"{name}.png").read_bytes()
        assert png.startswith(b"\x89PNG")
        assert int.from_bytes(png[16:20], "big") > 600  # pixels wide
    assert not list(folder.rglob(".*.partial"))


def test_every_figure_asks_says_how_to_read_it_and_what_it_does_not_say():
    for result in (routing_result(), align_result()):
        for figure in chapter(result.name).draw(result):
            assert figure.title.endswith("?")
            assert len(figure.how_to_read) > 40
            assert len(figure.limits) > 40


def test_tables_are_written_whole(both):
    folder, _ = both
    for result in (routing_result(), align_result()):
        for table, frame in result.tables.items():
            name = result.name if table == result.name else f"{result.name}.{table}"
            pd.testing.assert_frame_equal(
                pd.read_parquet(folder / "tables" / f"{name}.parquet"), frame
            )
            assert len(pd.read_csv(folder / "tables" / f"{name}.csv")) == len(frame)


def test_same_results_make_the_same_page(tmp_path):
    result = routing_result(layers=2)
    assert written(tmp_path / "a" / "run", result) == written(tmp_path / "b" / "run", result)


@pytest.mark.parametrize(
    "result", [routing_result(layers=1), align_result(experts=2)], ids=lambda r: r.name
)
def test_one_result_alone(tmp_path, result):
    source = written(tmp_path, result)
    assert source.count('<section id="result-') == 1


def test_no_results_is_a_clear_error(tmp_path):
    with pytest.raises(MoEScopeError, match=r"no result to report.*no results.*Run an analysis"):
        report(tmp_path)
    with pytest.raises(MoEScopeError, match="no folder of this name"):
        report(tmp_path / "absent")
    assert not (tmp_path / "report.html").exists()


def test_unknown_analysis_shows_findings_and_tables(tmp_path):
    table = pd.DataFrame({"name": ["a", "b"], "value": [0.5, float("nan")]})
    finding = Finding(text="Something < something else.")
    source = written(
        tmp_path, Result(name="tail_share", tables={"tail_share": table}, findings=[finding])
    )
    text = Page(source).text
    assert "Something < something else." in text
    assert "Tail share" in text
    assert '<td data-value="0.5">0.5000</td>' in source
    assert '<td class="none">' in source
    assert (tmp_path / "tables" / "tail_share.csv").exists()


def test_result_without_findings_or_rows(tmp_path):
    source = written(tmp_path, Result(name="empty", tables={"empty": pd.DataFrame()}))
    assert "states no finding" in source


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    routing = routing_result(domains=HOSTILE, layers=2)
    findings = [Finding(text=text) for text in HOSTILE]
    provenance = {"model": HOSTILE[0], "options": {HOSTILE[1]: HOSTILE[2]}}
    folder = tmp_path_factory.mktemp("run")
    source = written(
        folder,
        Result(name="routing", tables=routing.tables, findings=findings, provenance=provenance),
    )
    return folder, source


def test_hostile_text_stays_text(hostile):
    folder, source = hostile
    page = Page(source)
    assert {tag for tag, _ in page.elements}.isdisjoint({"img", "svg", "iframe", "object"})
    assert not any(name.startswith("on") for _, a in page.elements for name in a)
    assert len([tag for tag, _ in page.elements if tag == "script"]) == 4
    for text in HOSTILE:
        assert text in page.text
    assert "<" not in re.search(r'id="specifications">(.*?)</script>', source, re.S)[1]
    values = json.dumps(embedded(source, "specifications"))
    assert all(json.dumps(text)[1:-1] in values for text in HOSTILE)
    drawing = (folder / "figures" / "routing-shares.svg").read_text(encoding="utf-8")
    assert "<script" not in drawing
    assert "<img" not in drawing


def test_status_is_shown_in_place_of_a_score(tmp_path):
    result = align_result()
    table = result.table.copy()
    table.loc[table.status == "undefined", ["score", "score_low", "score_high"]] = 123.5
    table.loc[0, "status"] = "few_documents"
    shown = Result(name="align", tables={**result.tables, "align": table})
    score, *_ = chapter("align").draw(shown)
    assert "5 of 16 pairs have no score: 4 too few tokens, 1 undefined." in score.limits
    assert "1 of 16 pairs have a weak score: 1 few documents." in score.limits
    assert "123.5" not in json.dumps(score.chart.to_dict())


def test_alignment_without_any_number():
    result = align_result()
    table = result.table.copy()
    numbers = [c for c in table.columns if c.startswith(("fvu", "mse", "score", "published"))]
    table[numbers] = float("nan")
    table["status"] = "too_few_tokens"
    tables = {"align": table, "curves": result.tables["curves"].head(0)}
    drawn = chapter("align").draw(Result(name="align", tables=tables))
    assert [figure.name for figure in drawn] == ["align-score", "align-controls"]


def test_alignment_in_which_every_pair_has_its_numbers():
    whole = align_result()
    pairs = whole.table[whole.table["fvu"].notna()].reset_index(drop=True)
    result = Result(name="align", tables={**whole.tables, "align": pairs})
    (controls,) = [f for f in chapter("align").draw(result) if f.name == "align-controls"]
    for rows in controls.specification()["datasets"].values():
        assert all(row.get("pair", "") is not None for row in rows)


@pytest.fixture(scope="module")
def all_layers(tmp_path_factory):
    """What a model of six layers with eight experts gives, every option switched on."""
    align = align_result(experts=8, layer_pairs=tuple((n, n + 1) for n in range(5)), curves=True)
    folder = tmp_path_factory.mktemp("run")
    return written(folder, routing_result(), align), align


def test_all_pairs_of_layers_fit_on_one_page(all_layers):
    source, _ = all_layers
    assert len(source.encode()) < 2_000_000
    specs = embedded(source, "specifications")
    assert len(specs["align-score"]["concat"]) == 5
    titles = [side["title"] for side in specs["align-published"]["concat"]]
    assert len(titles) == 15
    assert titles[3] == "Published: raw error, layer 1 \u2192 layer 2"
    assert "1 \u2192 2" in json.dumps(specs["align-layers"], ensure_ascii=False)
    assert "Experts are named layer.expert" in Page(source).text


def test_capacity_is_drawn_with_its_summaries(all_layers):
    source, align = all_layers
    spec = embedded(source, "specifications")["align-capacity"]
    headings = spec["facet"]["sort"]
    assert headings[0].endswith("advantage +0.200, 6.5 times smaller")
    assert headings[5].endswith("advantage -0.020")
    rows = next(iter(spec["datasets"].values()))
    capacity = align.tables["capacity"]
    one = capacity[(capacity.source_layer == 0) & (capacity["rank"] == 4)]
    one = one[(one.source_expert == 0) & (one.target_expert == 2) & (one.kind == "random")]
    (drawn,) = [
        row
        for row in rows
        if row["heading"] == headings[0] and row["rank"] == 4 and "random" in row["target"]
    ]
    assert drawn["value"] == pytest.approx(one.fvu.mean(), rel=1e-3)
    assert drawn["high"] - drawn["low"] == pytest.approx(2 * one.fvu.std(), rel=0.05)
    text = Page(source).text
    measured = align.table.fvu.notna().sum()
    assert f"Over {measured} pairs the advantage is -0.020 to +0.200 (median -0.020)" in text
    assert "5 reach what random experts reach" in text


def test_learning_shows_the_best_pair_of_each_imitated_expert(all_layers):
    source, align = all_layers
    spec = embedded(source, "specifications")["align-learning"]
    assert spec["facet"]["sort"][0] == "0.0 \u2192 1.2"  # the planted one
    rows = next(iter(spec["datasets"].values()))
    drawn = [r for r in rows if r["heading"] == "0.0 \u2192 1.2" and r["curve"] == "pair"]
    learning = align.tables["learning"]
    wanted = learning[(learning.source_layer == 0) & (learning.source_expert == 0)]
    wanted = wanted[wanted.target_expert == 2].sort_values("n_train")
    assert [row["n_train"] for row in drawn] == wanted.n_train.tolist()
    assert [row["value"] for row in drawn] == pytest.approx(wanted.fvu.tolist(), rel=1e-3)


def test_summary_of_layers_holds_their_medians(all_layers):
    source, align = all_layers
    spec = embedded(source, "specifications")["align-layers"]
    rows = [row for data in spec["datasets"].values() for row in data]
    scored = align.table[align.table.score.notna() & (align.table.source_layer == 3)]
    (pair,) = [r for r in rows if r.get("curve") == "pair" and r["layers"] == "3 \u2192 4"]
    assert pair["value"] == pytest.approx(scored.fvu.median(), rel=1e-3)
    (spread,) = [r for r in rows if "median" in r and r["layers"] == "3 \u2192 4"]
    assert spread["max"] == pytest.approx(scored.score.max(), rel=1e-3)
    assert spread["count"] == len(scored)


def test_what_a_page_leaves_out_is_said(tmp_path):
    align = align_result(experts=3, layer_pairs=tuple((n, n + 1) for n in range(8)))
    text = Page(written(tmp_path, align)).text
    assert "Shown: the first 6 of 8 pairs of layers." in text
    assert "further imitated experts are in the table" in text


@pytest.mark.slow
def test_many_experts_and_layer_pairs_stay_readable(tmp_path):
    routing = routing_result(layers=3, experts=64, top_k=6)
    align = align_result(experts=12, layer_pairs=((1, 2), (2, 3)))
    source = written(tmp_path, routing, align)
    assert len(source.encode()) < 5_000_000
    specs = embedded(source, "specifications")
    assert len(specs["align-score"]["concat"]) == 2
    assert "best pair of 24 imitated experts" in source
    assert "the first 187 are shown" in source  # 1,500 cells of 8 columns


def test_a_name_is_registered_once():
    chapter("align")
    with pytest.raises(MoEScopeError, match="registered twice"):
        figures("align", title="", question="", columns={})(lambda result: [])
