import csv
import io
import re
from urllib.parse import unquote

import pytest

from momentum_lm.report import classification, perplexity
from momentum_lm.report.html import page
from momentum_lm.report.tables import Table, counted

TABLE = Table(["model", "ppl"], [["gpt", "101.25"], ["a|b<c>", "-9.5"]], "Perplexity & more")


def test_text_is_aligned():
    assert TABLE.text().splitlines() == [
        "Perplexity & more",
        "model      ppl",
        "------  ------",
        "gpt     101.25",
        "a|b<c>    -9.5",
    ]
    assert Table(["名前", "n"], [["あ", "1"]]).text().splitlines()[2] == "あ    1"  # wide characters take two columns


def test_markdown_escapes_bars():
    assert TABLE.markdown().splitlines() == [
        "| model | ppl |", "| :-- | --: |", "| gpt | 101.25 |", "| a\\|b<c> | -9.5 |",
    ]  # fmt: skip


def test_csv_has_headings_and_rows():
    assert list(csv.reader(io.StringIO(TABLE.csv()))) == [["model", "ppl"], ["gpt", "101.25"], ["a|b<c>", "-9.5"]]


def test_csv_is_inert_and_takes_names_of_any_bytes():
    cells = ["=HYPERLINK(1)", "@x", "\t=1", "-2+3", "-9.5", "+1.5 (0.1 to 2.0)", "-1.2e-05", "+3.0%", "b\udcff"]
    read = [row[0] for row in csv.reader(io.StringIO(Table(["a"], [[cell] for cell in cells]).csv()))][1:]
    assert read == ["'=HYPERLINK(1)", "'@x", "'\t=1", "'-2+3", *cells[4:8], "b\\udcff"]


def test_a_table_of_nothing():
    """Results without a finished run, as a kill leaves them, and as nobody should be surprised by."""
    for table in (Table.of([]), perplexity.results_table([]), classification.results_table([])):
        assert not table.text().strip() and not table.rows and not table.csv().strip()


def test_counts():
    assert [counted(n, "draw") for n in (0, 1, 2, 1000)] == ["0 draws", "1 draw", "2 draws", "1,000 draws"]


def test_html_escapes_everything():
    html = page("t", {"": [TABLE]})
    assert "<caption>Perplexity &amp; more <a" in html
    (link,) = re.findall(r'href="data:text/csv;charset=utf-8,([^"]*)"', html)
    assert unquote(link) == TABLE.csv()
    assert '<td data-column="model">a|b&lt;c&gt;</td>' in html and "<c>" not in html
    assert '<td class="number" data-column="ppl">101.25</td>' in html


def test_ragged_rows_are_refused():
    with pytest.raises(ValueError, match="2 columns"):
        Table(["a", "b"], [["1"]])
    assert Table(["a"], []).text() == "a\n-"
