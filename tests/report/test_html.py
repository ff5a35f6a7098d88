"""Pages and the figures in them."""

import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from momentum_lm.report import figures
from momentum_lm.report.html import Code, Paragraph, Picture, page, write_page
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
    return figures.draw(figures.perplexity_panel({"vanilla": [(64, 30.0), (256, 20.0)], "momentum": [(256, 19.0), (64, 28.0)]}))


def test_page_is_whole_and_needs_no_network(figure, tmp_path):
    parts = [Paragraph("a < b & c"), Code("x = '<y>'"), Table(["m"], [["1"]]), Picture(figures.to_svg(figure), 'says "more"')]
    write_page(tmp_path / "report.html", "Title <t>", {"": [Paragraph("first")], "Heading": parts})
    text = (tmp_path / "report.html").read_text()
    parser = Balanced()
    parser.feed(text)
    assert parser.stack == []
    assert {"svg", "table", "pre", "figure"} <= parser.seen and not {"script", "link", "img"} & parser.seen
    assert "a < b & c" in parser.text and "x = '<y>'" in parser.text and "Title <t>" in parser.text
    assert 'aria-label="says &quot;more&quot;"' in text
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text
    fetched = re.findall(r"(?:src|href)=[\"'](?!#)[^\"']*|url\((?!#)[^)]*|@import[^;]*", text)
    assert fetched == []
    assert page("t", {}).count("<h2>") == 0


def test_svg_takes_the_pages_colours_and_is_deterministic(figure):
    svg = figures.to_svg(figure)
    assert svg.startswith("<svg") and "currentColor" in svg and "#010203" not in svg
    assert re.match(r"<svg[^>]*>", svg)[0].count("height=") == 0
    for label in ("context length (tokens)", "vanilla", "momentum", ">64<", ">256<"):
        assert label in svg
    assert svg == figures.to_svg(figure)


def test_series_differ_without_colour(figure):
    lines = figure.axes[0].get_lines()
    assert len({(line.get_linestyle(), line.get_marker()) for line in lines}) == 2
    assert list(lines[1].get_xdata()) == [64, 256]  # in order, whatever order they came in


def test_loss_figure_shares_looks_between_seeds(tmp_path):
    curves = {"a seed 1": [(0, 9.0), (1000, 7.0)], "a seed 2": [(0, 9.0), (1000, 7.1)], "b seed 1": [(0, 9.0)], "c": []}
    figure = figures.draw(figures.loss_panel(curves, {"unigram": 6.5}), figures.perplexity_panel({"a": [(1, 2.0)]}))
    assert len(figure.axes) == 2
    lines = figure.axes[0].get_lines()
    assert lines[0].get_linestyle() == lines[1].get_linestyle() != lines[2].get_linestyle()
    assert [t.get_text() for t in figure.axes[0].get_legend().get_texts()] == ["a", "b", "c"]
    figures.save_png(figure, tmp_path / "loss.png")
    pixels = np.asarray(Image.open(io.BytesIO((tmp_path / "loss.png").read_bytes())).convert("L"))
    assert pixels[0, 0] == 255 and pixels.min() < 100 and pixels.std() > 10  # something dark was drawn on white
