"""The page is whole, escaped, fetches nothing; JSON has no NaN; plots are accessible SVG."""

import html.parser
import json
import re

import numpy as np
import pytest
from PIL import Image

from spcxr.errors import SpcxrError
from spcxr.evaluate import mask_pages, metrics, pages, plots
from spcxr.evaluate.delong import delong_paired
from spcxr.evaluate.intervals import Interval, bootstrap, paired_bootstrap
from spcxr.evaluate.metrics import auroc
from spcxr.evaluate.overlays import (
    SHADE,
    best_median_worst,
    grid,
    legend_of,
    overlay,
    structure_colours,
    with_legend,
)
from spcxr.evaluate.report import (
    NOT_A_DEVICE,
    PHANTOMS,
    Fact,
    Picture,
    Report,
    Section,
    render,
    write_json,
    write_report,
)
from spcxr.evaluate.summary import subgroups, summarise_classes, summarise_masks

NAMES = ("covid", "no <finding>", "absent")
VOID = {"meta", "img", "br"}


class Reader(html.parser.HTMLParser):
    """Collects ids and addresses, and checks that HTML elements are closed in order."""

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.addresses, self.unnamed = [], [], [], []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.ids += [given["id"]] if "id" in given else []
        self.addresses += [given[k] for k in ("href", "src", "xlink:href") if k in given]
        if (tag == "img" and not given.get("alt")) or (
            tag == "svg" and not given.get("aria-label")
        ):
            self.unnamed.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def classes():
    rng = np.random.default_rng(0)
    labels = np.eye(3)[rng.integers(0, 2, 80)]
    labels[:5] = np.nan
    scores = (rng.random((80, 3)) + 0.5 * np.nan_to_num(labels)) / 1.5
    patients = rng.integers(0, 40, 80)
    made = summarise_classes(labels, scores, patients, NAMES, multilabel=False, n=100)
    return made, labels, scores, patients


@pytest.fixture(scope="module")
def report(classes):
    summary, labels, scores, patients = classes
    tile = np.random.default_rng(0).integers(0, 256, (32, 32)).astype(np.uint8)
    mask = np.zeros((32, 32), bool)
    mask[8:20, 8:20] = True
    interval = Interval(0.9, 0.8, 0.95, 10, 9, 0)
    return Report(
        title="A & B",
        summary="<script>alert(1)</script>",
        banner=PHANTOMS,
        facts=[Fact("AUROC", interval), Fact("nothing", float("nan"))],
        sections=[
            Section(
                "Classes",
                tables=[
                    pages.comparison("All", {"a": summary.overall}),
                    *pages.class_tables(summary),
                ],
                pictures=[
                    *pages.class_plots(summary, labels, scores, patients),
                    *pages.reliability_pictures(summary, labels, scores),
                ],
            ),
            Section(
                "Masks",
                pictures=[
                    mask_pages.overlay_picture([("best", 0.9, tile, overlay(tile, mask))], "lungs"),
                    Picture("c", 'an "alt" <text>', png=grid([[tile]])),
                    pages.interval_picture({"x": {"auroc": interval}}, "auroc", "Side by side"),
                ],
            ),
        ],
        provenance=pages.provenance({"seed": 3}),
    )


def test_the_page_is_well_formed_and_fetches_nothing(report):
    page, reader = render(report), Reader()
    reader.feed(page)
    assert reader.open == []
    assert len(set(reader.ids)) == len(reader.ids)
    assert reader.unnamed == []
    for address in reader.addresses:
        assert address.startswith(("#", "data:image/png;base64,"))
        if address.startswith("#"):
            assert address[1:] in reader.ids
    assert not re.search(r"@import|url\((?!#)|<script|<link", page)


def test_what_users_write_is_escaped(report):
    page = render(report)
    assert "A &amp; B" in page
    assert "&lt;script&gt;alert" in page
    assert "no &lt;finding&gt;" in page
    assert "no <finding>" not in page


def test_the_page_says_what_it_is_not(report):
    page = render(report)
    assert NOT_A_DEVICE in page
    assert PHANTOMS in page
    assert PHANTOMS not in render(Report("Real", "patients"))


def test_numbers_stand_with_their_intervals(report, classes):
    page = render(report)
    assert '<span class="value">0.900</span> <span class="range">0.800–0.950</span>' in page
    assert "absent." in page  # named as left out of the means
    assert np.isnan(classes[0].by_class["absent"]["auroc"].value)


def test_writing_replaces_whole_files(tmp_path, report):
    path = write_report(tmp_path / "report.html", report)
    assert path.read_text() == render(report)
    write_json(tmp_path / "a.json", {"x": float("nan"), "i": Interval(1, 2, np.inf, 3, 3, 0)})
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["x"] is None
    assert (found["i"]["low"], found["i"]["high"]) == (2, None)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "report.html"]


def test_the_same_report_is_the_same_file(report):
    assert render(report) == render(report)


def test_long_curves_are_thinned_but_keep_their_ends():
    x = np.linspace(0, 1, 50_000)
    drawn = plots.roc([plots.Curve("a", x, x**0.3)])
    assert len(drawn) < 60_000
    thin, _ = plots._thinned(x, x)
    assert (thin[0], thin[-1]) == (0, 1)


def test_multilabel_summary_leaves_unknown_out_by_label():
    rng = np.random.default_rng(1)
    labels = (rng.random((60, 2)) < 0.5).astype(float)
    labels[:20, 0] = np.nan
    made = summarise_classes(
        labels, labels * 0.8 + 0.1, np.arange(60), ("a", "b"), multilabel=True, n=100
    )
    assert (made.positives["a"][1], made.positives["b"][1]) == (40, 60)
    assert made.by_class["a"]["auroc"].n_rows == 40
    assert made.by_class["a"]["sensitivity"].value == 1.0
    assert made.confusion is None
    with pytest.raises(SpcxrError, match="no row with a known label"):
        summarise_classes(labels * np.nan, labels, np.arange(60), ("a", "b"), multilabel=True)


def test_rows_of_a_class_the_model_does_not_know_are_left_out(classes):
    summary = classes[0]
    assert summary.n_rows == 75
    assert summary.confusion.sum() == 75
    assert summary.left_out == ("absent",)


def test_masks_without_anything_to_measure_are_refused():
    with pytest.raises(SpcxrError, match="mask"):
        summarise_masks({"dice": np.array([np.nan])}, np.array(["a"]))


def test_small_and_unknown_groups_are_left_out():
    sites = np.array(["a"] * 30 + ["b"] * 30 + ["c"] * 3 + [""] * 30)
    assert set(subgroups({"site": sites, "sex": np.array(["F"] * 93)})["site"]) == {"a", "b"}
    assert "sex" not in subgroups({"sex": np.array(["F"] * 93)})


def test_overlay_draws_the_prediction_over_the_truth():
    image = np.full((224, 224), 40000, np.uint16)
    mask, truth = np.zeros((2, 224, 224), bool)
    mask[50:150, 50:150] = True
    truth[0:100, 0:100] = True
    picture = overlay(image, mask, truth)
    assert picture[50, 70].tolist() == [230, 159, 0]
    assert picture[0, 30].tolist() == [86, 180, 233]
    assert picture[100, 100].tolist() == picture[170, 170].tolist() == [156] * 3
    small = overlay(image[::4, ::4], mask[::4, ::4], truth[::4, ::4])
    assert small.shape == (224, 224, 3)
    assert small[52, 70].tolist() == [230, 159, 0]
    assert small[100, 100].tolist() == [156] * 3
    with pytest.raises(SpcxrError, match="sizes must be equal"):
        overlay(image, mask[:10])


def test_overlay_of_several_structures_has_a_colour_each():
    image = np.full((224, 224), 100, np.uint8)
    predicted, truth = np.zeros((2, 224, 224), np.uint8)
    truth[20:100, 20:100], truth[120:200, 120:200] = 1, 2
    predicted[20:60, 20:60], predicted[120:160, 120:160] = 2, 1  # taken for one another
    picture = overlay(image, predicted, truth, structures=2)
    lung, heart = structure_colours(2)
    assert picture[20, 40].tolist() == list(heart)  # the line is of what was said
    assert picture[120, 140].tolist() == list(lung)
    for place, colour in (((80, 80), lung), ((180, 180), heart)):  # the shade of what is true
        expected = (1 - SHADE) * 100 + SHADE * np.array(colour)
        np.testing.assert_allclose(picture[place], expected, atol=1)
    assert picture[210, 10].tolist() == [100, 100, 100]
    assert len(set(structure_colours(7))) == 7


def test_a_legend_names_every_colour_in_lines_that_fit():
    names = [f"structure {k}" for k in range(6)]
    page = with_legend(Image.new("RGB", (230, 50)), legend_of(names))
    shown = {tuple(pixel) for pixel in np.asarray(page)[50:].reshape(-1, 3)}
    assert set(structure_colours(6)) <= shown
    assert page.width == 230
    assert legend_of(["lung"]).keys() == {"prediction", "true mask"}


def test_best_median_worst_of_one_and_of_none():
    assert {index for _, index in best_median_worst(np.array([0.5]))} == {0}
    assert best_median_worst(np.array([np.nan])) == ()


def test_a_rare_class_does_not_throw_the_other_classes_away():
    """Six classes of one positive patient each: nearly every resample misses one of them."""
    labels = np.concatenate([np.eye(6), np.zeros((30, 6))])
    scores = (labels + np.random.default_rng(0).random(labels.shape)) / 2
    made = summarise_classes(labels, scores, np.arange(36), tuple("abcdef"), multilabel=True, n=400)
    assert made.by_class["a"]["auroc"].n_undefined > 100
    assert made.overall["macro_auroc"].n_undefined < 5
    assert "too narrow to trust: a, b, c, d, e, f." in pages.class_table("", made).note


def test_models_side_by_side():
    rng = np.random.default_rng(0)
    labels, patients = rng.integers(0, 2, 200), np.arange(200)
    first = rng.normal(size=200) + 2 * labels
    second = rng.normal(size=200)
    values = [
        bootstrap(patients, lambda w, s=s: auroc(labels, s, w), seed=0) for s in (first, second)
    ]
    apart = paired_bootstrap(
        patients, lambda w: auroc(labels, first, w), lambda w: auroc(labels, second, w), seed=0
    )
    test = delong_paired(labels, first, second)
    table = pages.paired_table(
        "A beside B",
        {
            "mean AUROC": pages.Comparison(*values, apart),
            "covid": pages.Comparison(*values, apart, test),
            "itself": pages.Comparison(*values, apart, delong_paired(labels, first, first)),
        },
    )
    assert [len(row) for row in table.rows] == [6, 6, 6]
    assert table.rows[0][4:] == [None, None]
    assert (table.rows[1][4].value, table.rows[1][5]) == (test.difference, "< 0.001")
    assert table.rows[2][5] == "–"
    assert "2 tests" in table.note
    page = render(Report("Models", "", sections=[Section("Models", tables=[table])]))
    assert "&lt; 0.001" in page


def test_the_reliability_of_labels_and_of_one_class_of_many(classes):
    summary, labels, scores, _ = classes
    (picture,) = pages.reliability_pictures(summary, labels, scores, what="raw probabilities")
    assert "raw probabilities (the highest of each image)" in picture.caption
    (flat,) = pages.reliability_pictures(summary, labels, np.full_like(scores, 1 / 3))
    # of those who are all called the first class at 1/3
    apart = abs(1 / 3 - np.nanmean(labels[:, 0]))
    assert f"highest probability {apart:.3f}." in flat.alt
    assert f"highest probability {summary.overall['ece'].value:.3f}." in picture.alt
    values = (np.random.default_rng(0).random((50, 5)) < 0.4).astype(float)
    values[:, 4] = np.nan
    several = summarise_classes(
        values, values * 0.5 + 0.2, np.arange(50), tuple("abcde"), multilabel=True, n=50
    )
    drawn = pages.reliability_pictures(several, values, values * 0.5 + 0.2)
    assert ["a, b, c" in drawn[0].caption, " d," in drawn[1].caption] == [True, True]
    assert len(drawn) == 2
    assert "; e" not in drawn[1].alt  # nothing is known of it
    for shown in [*drawn, picture]:
        assert "#000000" not in shown.svg  # dark pages: ink is currentColor
        assert "currentColor" in shown.svg


def test_curves_have_bands_that_hold_them(classes):
    summary, labels, scores, patients = classes
    kept = ~np.isnan(labels).any(1)
    truth, score, who = labels[kept], scores[kept], patients[kept]
    for draw in (pages._roc, pages._precision_recall):
        curve = draw(summary, 0, truth[:, 0], score[:, 0], who, 0)
        assert (curve.band.low <= curve.band.high).all()
        assert (curve.band.high - curve.band.low).max() < 0.6
        at = np.interp(0.5, curve.x, curve.y)
        assert curve.band.low[50] - 0.05 <= at <= curve.band.high[50] + 0.05
    assert pages._band(metrics.precision_at, truth[:, 2], score[:, 2], who, 0) is None


def test_precision_over_recall_is_drawn_as_the_steps_that_average_precision_sums(
    classes, monkeypatch
):
    """A line from point to point runs outside the band, and promises what no threshold gives."""
    summary, labels, scores, patients = classes
    kept = ~np.isnan(labels).any(1)
    truth, score = labels[kept][:, 0], scores[kept][:, 0]
    curve = pages._precision_recall(summary, 0, truth, score, patients[kept], 0)
    area = (np.diff(curve.x) * curve.y[1:]).sum()
    assert area == pytest.approx(float(metrics.average_precision(truth, score)))
    np.testing.assert_allclose(
        metrics.precision_at(truth, score, curve.x[1:]), curve.y[1:]
    )  # and as the band reads it
    monkeypatch.setattr(plots, "_svg", lambda figure: figure)
    (line,) = plots.precision_recall([curve]).axes[0].lines
    assert line.get_drawstyle() == "steps-pre"


def test_an_interval_is_drawn_where_it_is_though_its_value_lies_outside(monkeypatch):
    """Resampling roughens a calibration error: all resamples may be above the value."""
    monkeypatch.setattr(plots, "_svg", lambda figure: figure)
    rows = {"a": {"ece": Interval(0.04, 0.05, 0.07, 9, 9, 0)}}
    (axes,) = plots.intervals(rows, x_label="calibration error", mark=0.0).axes
    (segment,) = axes.collections[0].get_segments()
    np.testing.assert_allclose(segment[:, 0], [0.05, 0.07])
    assert [line.get_xdata()[0] for line in axes.lines if line.get_label() == "ece"] == [0.04]
    assert 0.0 in [line.get_xdata()[0] for line in axes.lines]


def test_a_label_with_dollar_signs_is_no_formula():
    drawn = plots.roc([plots.Curve("US$ or A$\\bad$", np.arange(2), np.arange(2))])
    assert "US$ or A$\\bad$" in drawn


@pytest.mark.filterwarnings("error")
def test_long_names_leave_room_for_what_they_name(monkeypatch):
    """Without room of their own they leave nothing, and matplotlib no more than warns of it."""
    label = "a label of many words, as they are given at times"
    assert label in plots.confusion(np.ones((2, 2)), [label, "b"])
    for name, columns in (("short", 2), (label, 1)):
        with monkeypatch.context() as patched:
            patched.setattr(plots, "_svg", lambda figure: figure)
            curves = [plots.Curve(one, np.arange(2), np.arange(2)) for one in (name, "b")]
            assert plots.roc(curves).legends[0]._ncols == columns
    rows = {f"/data/{'folder/' * 12}adults: test": {"auroc": Interval(0.8, 0.7, 0.9, 9, 9, 0)}}
    assert "adults: test" in plots.intervals(rows, x_label="AUROC")


def test_on_paper_no_table_is_cut_off(report):
    """A box that scrolls hides on paper what is wider than the paper."""
    _, printed = render(report).split("@media print {")
    assert ".scroll { overflow: visible; }" in printed
    assert "table { font-size: 8.5pt; }" in printed
