"""Pages and the figures in them."""

import csv
import io
import re
from html.parser import HTMLParser

import jinja2
import numpy as np
import pytest
from PIL import Image

from momentum_lm.report import figures
from momentum_lm.report.html import (
    Code,
    Definitions,
    Dot,
    Folded,
    Forest,
    Gallery,
    Link,
    Paragraph,
    Picture,
    Points,
    Prompt,
    Reference,
    Verdict,
    page,
    write_page,
)  # fmt: skip
from momentum_lm.report.tables import Table

VOID = {"meta", "link", "br", "img"}


class Balanced(HTMLParser):
    def __init__(self):
        super().__init__()
        self.stack, self.text, self.seen = [], [], set()

    def handle_starttag(self, tag, attrs):
        self.seen.add(tag)
        if tag not in VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture
def figure():
    return drawn()


def drawn():
    return figures.draw(
        figures.perplexity_panel({"vanilla": [(64, 30.0), (256, 20.0)], "momentum": [(256, 19.0), (64, 28.0)]})
    )


def test_page_is_whole_and_needs_no_network(figure, tmp_path):
    parts = [
        Paragraph("a < b & c"),
        Code("x = '<y>'"),
        Table(["m"], [["1"]]),
        Picture(figures.to_svg(figure), 'says "more"'),
    ]
    parts += [Points(["one < two", "three"]), Folded("more & more", [Code("folded"), Table(["n"], [["2"]])])]
    write_page(tmp_path / "report.html", "Title <t>", {"": [Paragraph("first")], "Heading": parts})
    text = (tmp_path / "report.html").read_text()
    parser = Balanced()
    parser.feed(text)
    assert parser.stack == []
    assert {"svg", "table", "pre", "figure", "details", "ul"} <= parser.seen and not {
        "script",
        "link",
        "img",
    } & parser.seen
    assert "a < b & c" in parser.text and "\nx = '<y>'" in parser.text and "Title <t>" in parser.text
    assert {"one < two", "more & more", "\nfolded"} <= set(parser.text) and text.count("<table") == 2
    assert 'aria-label="says &#34;more&#34;"' in text
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text
    fetched = re.findall(r"(?:src|href)=[\"'](?!#|data:text/csv)[^\"']*|url\((?!#)[^)]*|@import[^;]*", text)
    assert fetched == []
    assert page("t", {}).count("<h2>") == 0


def test_svg_takes_the_pages_colours_and_is_deterministic(figure):
    svg = figures.to_svg(figure)
    assert svg.startswith("<svg") and "currentColor" in svg and "#010203" not in svg
    opening = re.match(r"<svg[^>]*>", svg)[0]
    assert " height=" not in opening and " width=" not in opening and 'style="max-width: 309.6pt"' in opening
    for label in ("context length (tokens)", "vanilla", "momentum", ">64<", ">256<"):
        assert label in svg
    assert svg == figures.to_svg(drawn())


def test_series_differ_without_colour(figure):
    lines = figure.axes[0].get_lines()
    assert len({(line.get_linestyle(), line.get_marker()) for line in lines}) == 2
    assert list(lines[1].get_xdata()) == [64, 256]  # in order, whatever order they came in


def test_gaps_share_looks_between_seeds_and_their_axis_fits_but_the_start(tmp_path):
    curves = {"a seed 1": [(0, 9.0), (1000, 0.2)], "a seed 2": [(0, -9.0), (1000, -0.3)], "b seed 1": [(0, 9.0)],
              "c": []}  # fmt: skip
    figure = figures.draw(figures.gap_panel(curves, "gap"), figures.perplexity_panel({"a": [(1, 2.0)]}))
    assert len(figure.axes) == 2
    assert figure.axes[0].get_ylim() == pytest.approx((-0.35, 0.25))
    zero, *lines = figure.axes[0].get_lines()
    assert list(zero.get_ydata()) == [0, 0]
    assert lines[0].get_linestyle() == lines[1].get_linestyle() != lines[2].get_linestyle()
    assert [t.get_text() for t in figure.axes[0].get_legend().get_texts()] == ["a", "b", "c"]
    figures.save_png(figure, tmp_path / "loss.png")
    pixels = np.asarray(Image.open(io.BytesIO((tmp_path / "loss.png").read_bytes())).convert("L"))
    assert pixels[0, 0] == 255 and pixels.min() < 100 and pixels.std() > 10  # something dark was drawn on white


def test_pairs_have_a_line_for_their_mean_and_faint_ones_for_themselves():
    pairs = {"a": [(100.0, 90.0), (400.0, 10.0)], "b": [(200.0, 220.0)]}
    axes = figures.draw(figures.pairs_panel(pairs, ("without", "with"), "perplexity", "title")).axes[0]
    assert axes.get_title(loc="left") == "title" and axes.get_ylabel() == "perplexity"
    assert [t.get_text() for t in axes.get_xticklabels()] == ["without", "with"]
    lines = [(list(map(float, line.get_ydata())), line.get_alpha()) for line in axes.get_lines()]
    assert lines == [([100, 90], 0.35), ([400, 10], 0.35), (pytest.approx([200, 30]), None),
                     (pytest.approx([200, 220]), None)]  # fmt: skip
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["a", "b"]


POINTS = [figures.AccuracyPoint(16, 0.8, 0.7, 0.9, (0.75, 0.85)), figures.AccuracyPoint(0, 0.5, 0.4, 0.6)]


def test_accuracy_figure():
    lines = {"none": POINTS, "batch": [figures.AccuracyPoint(4, 0.6, 0.55, 0.65)], "absent": []}
    axes = figures.draw(figures.accuracy_panel(lines, "mr", ("majority", 0.51), "calibration")).axes[0]
    assert axes.get_title(loc="left") == "mr" and [line.get_label() for line in axes.get_lines()] == [
        "none",
        "batch",
        "majority 51.0",
    ]
    line = axes.get_lines()[0]
    assert list(line.get_ydata()) == [50.0, 80.0]  # in the order of shots
    assert np.diff(line.get_xdata()) == pytest.approx([np.log2(17)])
    assert [t.get_text() for t in axes.get_xticklabels()] == ["0", "4", "16"]
    assert axes.get_legend().get_title().get_text() == "calibration"
    bars, dots = axes.collections[:2]
    assert [segment[:, 1].tolist() for segment in bars.get_segments()] == [[40.0, 60.0], [70.0, 90.0]]
    assert dots.get_offsets()[:, 1].tolist() == [75.0, 85.0]


def test_lines_that_share_a_figure_differ():
    for count in (1, 2, 3):
        axes = figures.draw(figures.accuracy_panel({str(i): POINTS for i in range(count)})).axes[0]
        assert len({(line.get_linestyle(), line.get_marker()) for line in axes.get_lines()}) == count


def test_confusion_figure():
    axes = figures.draw(figures.confusion_panel([[3, 1, 0], [0, 0, 0], [0, 5, 5]], ["a", "b", "c" * 30], "title")).axes[
        0
    ]
    cells = {(t.get_position()[1], t.get_position()[0]): t.get_text() for t in axes.texts}
    assert cells == {
        (0, 0): "75",
        (0, 1): "25",
        (2, 1): "50",
        (2, 2): "50",
    }  # zeros, and a class without examples, are blank
    assert [t.get_text() for t in axes.get_yticklabels()] == ["a (4)", "b (0)", "c" * 17 + "… (10)"]
    assert axes.get_ylim() == (2.5, -0.5) and axes.get_legend() is None
    shades = {tuple(map(int, np.add(p.get_xy(), 0.5))): p.get_alpha() for p in axes.patches}
    assert shades[0, 0] == pytest.approx(0.7 * 0.75) and max(shades.values()) <= 0.7  # text stays readable on it
    assert "<image" not in figures.to_svg(axes.figure)


def test_code_in_a_sentence():
    texts = ["run `momentum-lm report <b>` now", "names: `a` and `b <c>`"]
    shown = page("t", {"": [Paragraph(texts[0]), Points(texts[1:]), Definitions({"`--x`": "`--y`"})]})
    assert "<p>run <code>momentum-lm report &lt;b&gt;</code> now</p>" in shown
    assert "<li>names: `a` and `b &lt;c&gt;`</li>" in shown and "<dt>`--x`</dt><dd><code>--y</code></dd>" in shown


def test_every_part_is_escaped_and_balanced():
    evil = "<script>alert('1')</script> & \"x\""
    svg = figures.to_svg(figures.draw(figures.perplexity_panel({"a": [(1, 2.0)]})))
    parts = [
        Paragraph(evil), Points([evil]), Verdict([evil]), Definitions({evil: evil}), Code(evil), Link(evil, evil),
        Prompt(evil, [evil, evil], 1), Picture(svg, evil), Gallery([Picture(svg, evil)]), Table([evil], [[evil]], evil),
        Forest(evil, [Dot(evil, 0.5, (0.4, 0.6), evil, (0.45,))], evil, Reference(evil, 0.1), unit=evil),
        Folded(evil, [Paragraph(evil)]),
    ]  # fmt: skip
    text = page(evil, {evil: parts})
    parser = Balanced()
    parser.feed(text)
    assert parser.stack == [] and "script" not in parser.seen
    assert parser.text.count(evil) >= 15


def test_forest_has_every_number_where_it_belongs():
    dots = [
        Dot("mean", 0.5, (0.4, 0.6), "3 draws", (0.45, 0.55)),
        Dot("none", None, absent="nothing there"),
        Dot("other", 0.2, (-3.0, 0.3), "3 draws", role="control"),
    ]
    forest = Forest("t", dots, reference=Reference("as before", 0.0), percent=(1, "%"), signed=True)
    assert forest.ends == pytest.approx((-0.6, 0.6))  # not down to -3: as far as the axis is long, once more
    assert (forest.x(-0.6), forest.x(0.6), forest.x(-3.0)) == ("2.00%", "98.00%", "2.00%")
    assert [forest.text(dot) for dot in dots] == [
        "+50.0% (+40.0 to +60.0)",
        "nothing there",
        "+20.0% (-300.0 to +30.0)",
    ]
    assert forest.note() == (
        "Bars: 95% intervals over 3 draws. Arrow: the interval goes on. Hollow: controls. Grey points: single draws. "
        "Dashed: as before."
    )
    assert [len(forest.arrows(dot)) for dot in dots] == [0, 0, 1] and forest.arrows(dots[2])[0][0] == "2.00%"
    assert all(-0.6 <= tick <= 0.6 for tick in forest.ticks) and 0.0 in forest.ticks and len(forest.ticks) <= 7
    assert len({forest.shape(dot) for dot in dots}) == 2  # roles differ without colour
    rows = list(csv.reader(io.StringIO(forest.csv())))
    assert rows[1:] == [["mean", "0.5", "0.4", "0.6", "fraction", "3 draws", "0.45 0.55"],
                        ["none", "", "", "", "fraction", "", ""],
                        ["other", "0.2", "-3.0", "0.3", "fraction", "3 draws", ""]]  # fmt: skip
    mixed = Forest("t", [dots[0], Dot("b", 1.5, (1.0, 2.0), "examples")])
    assert [mixed.text(dot) for dot in mixed.dots] == [
        "0.500 (0.400 to 0.600; 3 draws)",
        "1.500 (1.000 to 2.000; examples)",
    ]
    assert mixed.note().startswith("Bars: 95% intervals, over what the numbers name. ")
    assert Forest("t", [Dot("a", -0.0)]).text(Dot("a", -0.0001)) == "0.000"  # no minus before a zero
    assert Forest("t", [Dot("a", None)]).ends == (0.0, 1.0)
    wide = Forest("t", [Dot("a", 0.05, (-0.16, 0.27)), Dot("b", 0.0, role="control")])
    assert wide.ends == (
        -0.16,
        0.27,
    )  # the main interval is whole, unless it is many times as wide as what was measured
    assert Forest("t", [Dot("a", 0.05, (-5.0, 5.0)), Dot("b", 0.0, role="control")]).ends == (-0.05, 0.1)
    large = Forest("t", [Dot("a", 7021.6, (6757.3, 7312.5))])
    assert large.text(large.dots[0]) == "7,022 (6,757 to 7,312)" and large.ends == (6757.3, 7312.5)


def test_what_is_not_finite_is_not_drawn():
    dots = [Dot("a", float("nan")), Dot("b", float("inf"), (0.0, float("inf"))), Dot("c", 0.5, (float("nan"), 0.6))]
    forest = Forest("t", [*dots, Dot("d", 0.25)])
    assert [forest.text(dot) for dot in dots] == ["not measured", "not measured", "0.500"]
    assert forest.ends == (0.25, 0.5) and "nan" not in page("t", {"": [forest]})


def test_sections_without_parts_have_no_heading_and_unknown_parts_are_refused():
    assert "<h2>" not in page("t", {"empty": []})

    class Other:
        kind = "other"

    with pytest.raises(jinja2.UndefinedError):
        page("t", {"": [Other()]})


def test_names_of_files_tell_what_is_in_them():
    forest = Forest("SimAOU:", [Dot("a", 1.0)])
    sections = {"mr, 4 shots": [forest], "trec, 4 shots": [forest, Folded("3 runs", [Table(["m"], [["1"]])])]}
    names = re.findall(r'download="([^"]*)"', page("t", sections))
    assert names == ["mr-4-shots-SimAOU.csv", "trec-4-shots-SimAOU.csv", "trec-4-shots-3-runs.csv"]


def test_a_prompt_keeps_its_first_line_break():
    assert "<pre>\n\nReview" in page("t", {"": [Prompt("\nReview", ["a"], 0)]})
