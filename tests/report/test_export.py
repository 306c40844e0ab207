"""Tables for other programs: CSV that reads back to the same bits, LaTeX that shows a name as it is."""

from __future__ import annotations

import csv
import io
import re

import pytest

from mfext.commands.sweep_summary import with_groups
from mfext.report.comparison import sweep_report
from mfext.report.export import csv_files, escape, latex_files, to_latex
from mfext.report.extras import Extras
from mfext.report.report import Bar, Bars, HeatMap, HeatMaps, Report, Table
from mfext.report.sections import run_report
from tests.report.stream_results import LN2, stream_data, sweep_data


def rows_of(text: str) -> list[list[str]]:
    return list(csv.reader(io.StringIO(text)))


def test_a_matrix_in_csv_reads_back_to_the_same_bits() -> None:
    data = stream_data()
    rows = rows_of(csv_files(run_report("continual", data, Extras()))["loss_after_each_stage.csv"])
    assert rows[0] == ["bits per byte", *data["domains"]]
    for written, measured in zip(rows[1:], data["matrix"]["nll_per_byte"], strict=True):
        assert [float(cell) for cell in written[1:]] == [nats / LN2 for nats in measured]


def test_what_was_not_measured_is_an_empty_cell() -> None:
    section = HeatMap("M", rows=("a",), columns=("x", "y"), values=((None, 0.5),))
    assert csv_files(Report("x", {}, "x", sections=(section,))) == {"m.csv": "row,x,y\na,,0.5\n"}


def test_finished_cells_lose_their_typography_only() -> None:
    cells = ("−1.5", "12\u202f345", "5.31\u202fM", "—", "a,b")
    section = Table("T", columns=("a", "b", "c", "d", "e"), rows=(cells,))
    text = csv_files(Report("x", {}, "x", sections=(section,)))["t.csv"]
    assert rows_of(text)[1] == ["-1.5", "12345", "5.31 M", "", "a,b"]


def test_bars_keep_their_interval_and_reason() -> None:
    section = Bars("F", bars=(Bar("prose", 0.1, 0.05, 0.2), Bar("x", 1.0, reason="1 document")), unit="bits per byte")
    rows = rows_of(csv_files(Report("x", {}, "x", sections=(section,)))["f.csv"])
    assert rows[1:] == [["prose", "", "0.1", "0.05", "0.2", ""], ["x", "", "1.0", "", "", "1 document"]]


def test_every_table_has_a_file_of_its_own() -> None:
    maps = HeatMaps("M", maps=tuple(HeatMap("A/B", rows=("a",), columns=("x",), values=((1.0,),)) for _ in range(3)))
    again = Table("m a b", columns=("x",), rows=(("1",),))
    names = csv_files(Report("x", {}, "x", sections=(maps, again)))
    assert list(names) == ["m_a_b.csv", "m_a_b_2.csv", "m_a_b_3.csv", "m_a_b_4.csv"]


def test_a_sweep_has_every_table_in_both_forms() -> None:
    report = sweep_report(with_groups(sweep_data()))
    tables, papers = csv_files(report), latex_files(report)
    assert {name.removesuffix(".csv") for name in tables} == {name.removesuffix(".tex") for name in papers}
    rows = rows_of(tables["side_by_side.csv"])
    assert rows[0][:5] == [
        *("setting", "num_seeds", "forgetting_bits_per_byte", "forgetting_low_bits_per_byte"),
        "forgetting_high_bits_per_byte",
    ]
    assert all(len(row) == len(rows[0]) for row in rows) and len(rows) == 11
    assert all(re.fullmatch(r"[a-z0-9_]+\.(csv|tex)", name) for name in (*tables, *papers))


@pytest.mark.parametrize(
    ("text", "latex"),
    [
        ("a_b & 5\u202f%", r"a\_b \& 5\,\%"),
        ("\\input{x}", r"\textbackslash{}input\{x\}"),
        ("−1 ± 2 — #$^~", r"$-$1 $\pm$ 2 --- \#\$\textasciicircum{}\textasciitilde{}"),
    ],
)
def test_latex_shows_text_as_it_is(text: str, latex: str) -> None:
    assert escape(text) == latex


def test_a_latex_table_has_the_rules_of_booktabs() -> None:
    text = to_latex(Table("T", columns=("domain", "loss"), rows=(("a_b", "−1"),), text_columns=("domain",)), "my_t")
    assert "\\begin{tabular}{lr}" in text and "    a\\_b & $-$1 \\\\\n" in text and "\\label{tab:my-t}" in text
    order = [text.index(rule) for rule in ("\\toprule", "\\midrule", "\\bottomrule")]
    assert order == sorted(order)
