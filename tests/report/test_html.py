"""The HTML report is one well-formed page that loads nothing and believes no name."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import pytest

from mfext.report.extras import Extras, extras_of
from mfext.report.html import to_html
from mfext.report.report import Curves, Report, Series, Text
from mfext.report.sections import evaluation_report, run_report

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Checks that tags close in order and collects attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"an attribute twice in <{tag}>"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> inside {self.open}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.words += data


def page_of(result: Any) -> tuple[str, Page]:
    text = to_html(run_report("grow", result.data, extras_of(result.data, result.raw)))
    return text, Page(text)


@pytest.mark.parametrize(("learned", "mode"), [(1, "gated"), (2, "gated"), (1, "compete")])
def test_the_page_is_well_formed_and_self_contained(build_result: Any, learned: int, mode: str) -> None:
    text, page = page_of(build_result(learned=learned, mode=mode))
    assert text.lstrip().startswith("<!DOCTYPE html>")
    assert not re.search(r"https?:|//[a-z]|url\(|@import", text)
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "img")
        assert not {"src", "srcset", "onclick", "onload"} & attributes.keys()
        assert tag != "a" or (attributes["href"] or "").startswith("#s")


def test_links_lead_to_sections_that_exist(build_result: Any) -> None:
    _, page = page_of(build_result())
    ids = {attributes.get("id") for _, attributes in page.tags}
    targets = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    assert len(targets) > 8 and all(target and target[1:] in ids for target in targets)


def test_the_page_holds_every_part(build_result: Any) -> None:
    _, page = page_of(build_result(learned=2))
    titles = """Before and after; Loss after each stage; Change from row 0; Forgetting; Training loss; Expert usage;
        Routing to old and new experts; Gate of python_code; Gate of bytecode; Cost; Measured on; Lineage; Definitions;
        Environment"""
    for title in titles.split(";"):
        assert title.strip() in page.words


def test_the_verdict_comes_first_and_alarms_before_it(build_result: Any) -> None:
    result = build_result()
    result.data["frozen_ok"] = False
    text, page = page_of(result)
    assert ("p", {"class": "alarm", "role": "alert"}) in page.tags
    assert text.index("FROZEN PARTS CHANGED") < text.index("<h1>") < text.index('class="card ')


def test_hostile_names_stay_text(build_result: Any) -> None:
    evil = "</style><script>alert(1)</script>\"'><img src=x onerror=y>{{ 7*7 }}\x1b[31m"
    result = build_result()
    data = result.data
    data["domains"] = [evil if name == "python_code" else name for name in data["domains"]]
    data["learned"] = {evil: data["learned"]["python_code"]}
    data["stages"][1]["name"] = evil
    raw = result.raw
    for part in ("curves", "facts"):
        raw[part][evil] = raw[part].pop("python_code")
    raw["details"]["last"][evil] = raw["details"]["last"].pop("python_code")
    raw["lineage"][1] |= {"name": evil, "domains": [evil]}
    raw["generations"][0]["name"] = evil
    text, page = page_of(result)
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert "{{ 7*7 }}" in page.words and "\x1b" not in text


def test_missing_numbers_show_as_a_dash_with_the_reason(build_result: Any) -> None:
    result = build_result()
    result.data["matrix"]["nll_per_byte"][1][0] = None
    text, page = page_of(result)
    assert "english_prose: not measured" in text and "—" in page.words
    assert "1 document" in page.words


def test_a_report_without_extras_or_sections_still_is_a_page(build_result: Any) -> None:
    Page(to_html(run_report("grow", build_result().data, Extras())))
    Page(to_html(Report("doctor", {}, "mfext doctor", sections=(Text("T", paragraphs=("a < b",)),))))
    Page(to_html(run_report("pretrain", {}, Extras())))


def test_an_evaluation_becomes_a_page_with_usage(build_result: Any) -> None:
    result = build_result()
    details = result.raw["details"]["last"]
    entry = {"bits_per_byte": 2.3, "perplexity": 4.9, "tokens": 1000, "bytes": 1000, "documents": 3}
    data = {
        "model": "runs/m",
        "domains": {name: {**entry, "gates": detail["gates"]} for name, detail in details.items()},
        "usage": {name: detail["usage"] for name, detail in details.items()},
    }
    page = Page(to_html(evaluation_report(data)))
    assert "Losses" in page.words and "Expert usage" in page.words and "generation 1" in page.words


def test_log_scales_leave_out_what_has_no_logarithm() -> None:
    series = (Series("a", ((0, 0.0), (1, 10.0), (2, 1000.0))), Series("b", ()))
    text = to_html(Report("x", {}, "x", sections=(Curves("C", series=series, log_y=True),)))
    Page(text)
    drawn = re.findall(r' d="([^"]*)"', text)
    assert re.fullmatch(r"M0\.0 [\d.]+ L1000\.0 [\d.]+", drawn[0]) and drawn[1] == ""
