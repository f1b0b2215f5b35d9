"""The page in a real browser, where one is installed: it fits narrow and wide screens, and asks for nothing."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from quantlab.eval.reports.html import html
from tests.eval.reports.hostile import hostile_report, huge_report
from tests.eval.reports.sample import sample_report

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
MAKERS = {"sample": sample_report, "hostile": hostile_report, "huge": huge_report}
UNFOLD = "document.querySelectorAll('details').forEach(each => each.open = true)"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless browser."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    with api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("which", MAKERS)
def test_the_page_fits_and_asks_for_nothing(which: str, width: int, scheme: str, browser: Any, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text(html(MAKERS[which]()), encoding="utf-8")
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    told: list[str] = []
    page.on("request", lambda request: told.append(request.url))
    page.on("console", lambda message: told.append(message.text))
    page.on("dialog", lambda dialog: (told.append("dialog"), dialog.dismiss()))
    page.goto((tmp_path / "report.html").as_uri())
    page.evaluate(UNFOLD)
    assert told == [(tmp_path / "report.html").as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") == width
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(16, 20, 25)"
    assert dark == (scheme == "dark")  # and so the policy let the style sheet in
    page.close()
