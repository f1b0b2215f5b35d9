"""The page: complete in itself, safe to open whatever is in it, readable by eye, ear and keyboard."""

import re
from base64 import b64encode
from hashlib import sha256

import pytest

from quantlab.eval.reports.html import html, style
from quantlab.eval.reports.words import visible
from quantlab.eval.result import Report
from tests.eval.reports.hostile import ATTACK, hostile_report, huge_report
from tests.eval.reports.page import Page

VERDICTS = {"report": "fail", "passing": "pass", "undecided": "inconclusive", "bare": "none"}
SAFE = {
    "html", "head", "meta", "title", "style", "body", "header", "main", "footer", "section", "div", "h1", "h2", "h3",
    "p", "b", "strong", "span", "ul", "ol", "li", "dl", "dt", "dd", "pre", "figure", "figcaption", "details", "summary",
    "table", "thead", "tbody", "tr", "th", "td", "svg", "g", "line", "polyline", "circle", "rect", "text",
}  # fmt: skip


@pytest.mark.parametrize("which", VERDICTS)
def test_the_verdict_is_the_first_thing_on_the_page(which: str, request: pytest.FixtureRequest) -> None:
    page = Page(html(request.getfixturevalue(which)))
    (banner,) = page.all("header")
    assert banner.attributes["class"] == f"banner {VERDICTS[which]}"
    (heading,) = page.all("h1")
    assert heading.text == page.all("title")[0].text.split(":")[0]
    assert heading.text in ("FAIL", "PASS", "INCONCLUSIVE", "MEASURED")


def test_every_requirement_has_its_reason_the_missed_ones_first(report: Report) -> None:
    page = Page(html(report))
    (listing,) = page.all("ul", "gate")
    badges = [each.text for each in page.all("span", "badge") if "ul" in each.above]
    assert badges == ["FAIL", "INCONCLUSIVE", "PASS"]
    reasons = [each.text for each in page.all("p", "reason")]
    assert report.gate is not None and listing
    for line in report.gate.lines:
        assert any(reason.startswith(line.reason) for reason in reasons)


def test_met_requirements_are_folded_only_when_they_are_many(report: Report) -> None:
    assert report.gate is not None
    met = report.gate.lines[1]
    many = report.gate.model_copy(update={"lines": (report.gate.lines[0], *[met] * 9)})
    page = Page(html(report.model_copy(update={"gate": many})))
    assert [each.text for each in page.all("summary")][0] == "9 met"
    folded = [each for each in page.all("li", "pass") if "details" in each.above]
    assert len(folded) == 9 and "details" not in page.all("li", "fail")[0].above


def test_the_headline_holds_the_six_figures(report: Report) -> None:
    values = [each.text for each in Page(html(report)).all("dd", "value")]
    assert values == ["21.8 MB", "4.126", "28.167", "0.0481", "86.5\u00a0%", "-2.67"]


def test_all_plots_are_drawn_and_told_in_words(report: Report) -> None:
    page = Page(html(report))
    assert len(page.all("figure")) == 2 * 3 + 2
    drawings = [each for each in page.all("svg") if each.attributes.get("role") == "img"]
    labels = [each.attributes.get("aria-label") or "" for each in drawings]
    assert all(len(label) > 20 for label in labels)
    assert all(each.attributes.get("aria-hidden") == "true" for each in page.all("svg") if each not in drawings)


def test_parts_that_were_not_measured_are_absent(bare: Report) -> None:
    titles = [each.text for each in Page(html(bare)).all("h2")]
    assert titles == ["Headline figures", "Text: held-out books", "All figures", "Provenance"]


def test_headings_do_not_skip_a_level_and_ids_are_unique(report: Report) -> None:
    page = Page(html(report))
    levels = [int(each.tag[1]) for each in page.elements if re.fullmatch(r"h\d", each.tag)]
    assert levels[0] == 1 and all(after - before <= 1 for before, after in zip(levels, levels[1:], strict=False))
    ids = [each.attributes["id"] for each in page.elements if "id" in each.attributes]
    assert len(ids) == len(set(ids))
    assert {each.attributes.get("aria-labelledby") for each in page.all("section")} == set(ids)


@pytest.mark.parametrize("make", [hostile_report, huge_report])
def test_the_page_asks_for_nothing_and_forbids_the_rest(make: type) -> None:
    source = html(make())
    page = Page(source)
    assert {each.tag for each in page.elements} <= SAFE and not page.comments
    for each in page.elements:
        assert not {"src", "href", "style", "action", "data", "srcset"} & set(each.attributes), each
        assert not [name for name in each.attributes if name.startswith("on")], each
    (policy,) = [each.attributes["content"] for each in page.all("meta") if "http-equiv" in each.attributes]
    digest = b64encode(sha256(page.all("style")[0].text.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    assert not re.search(r"url\(|@import|https?:|//", style())


def test_hostile_text_is_shown_as_text() -> None:
    source = html(hostile_report())
    assert all(c in "\n\u00a0" or c.isprintable() for c in source)
    page = Page(source)
    (prompt,) = page.all("pre", "prompt")
    assert prompt.text == visible(ATTACK, 1500) and "<script>alert(1)</script>" in prompt.text
    assert not page.all("script") and not page.all("img")


def test_a_huge_report_is_a_page_under_two_megabytes() -> None:
    size = len(html(huge_report()).encode())
    assert 200_000 < size < 2_000_000


def colors(scheme: str) -> dict[str, str]:
    """The style sheet's variables in one scheme."""
    light, dark = re.findall(r":root \{(.*?)\}", style(), flags=re.DOTALL)[:2]
    pairs = re.findall(r"--([\w-]+): (#[0-9a-f]{6})", light) + (
        re.findall(r"--([\w-]+): (#[0-9a-f]{6})", dark) if scheme == "dark" else []
    )
    return dict(pairs)


def luminance(color: str) -> float:
    """Relative luminance (WCAG 2.2) of `#rrggbb`."""
    channels = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    """Contrast ratio (WCAG 2.2) of two colours."""
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colors_have_contrast(scheme: str) -> None:
    of = colors(scheme)
    surfaces = ["page", "surface", "pass-surface", "fail-surface", "inconclusive-surface", "none-surface"]
    for surface in surfaces:
        for ink in ("text", "muted"):
            assert contrast(of[ink], of[surface]) >= 4.5, (ink, surface)
    for verdict in ("pass", "fail", "inconclusive", "none"):
        for surface in ("page", f"{verdict}-surface"):
            assert contrast(of[verdict], of[surface]) >= 4.5, (verdict, surface)
    for line in ["baseline", "candidate", *(f"k{i}" for i in range(8))]:
        assert contrast(of[line], of["page"]) >= 3.0, line


def test_every_color_has_its_dark_twin() -> None:
    light, dark = re.findall(r":root \{(.*?)\}", style(), flags=re.DOTALL)[:2]
    assert re.findall(r"--[\w-]+:", light) == re.findall(r"--[\w-]+:", dark)


def test_every_class_that_is_drawn_has_a_style(report: Report) -> None:
    used = {name for each in Page(html(report)).elements for name in (each.attributes.get("class") or "").split()}
    styled = set(re.findall(r"\.([a-z][\w-]*)", style())) | {"tick", "title", "name"}
    assert used <= styled, used - styled
