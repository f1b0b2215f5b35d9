"""The page's files: all that they ask for is here, nothing is asked of anyone else, nothing is set as markup."""

import re

import pytest

from quantlab.server.page_files import HEADERS, POLICY, ROUTES, assets
from tests.eval.reports.page import Page

SCRIPTS = [route for route in ROUTES if route.endswith(".js")]


def text(route: str) -> str:
    return assets()[route].content.decode()


def test_every_file_that_is_named_is_served() -> None:
    page = Page(re.sub(r"<(link|input)([^>]*)>", r"<\1\2/>", text("/")))
    named = [each.attributes.get("src") or each.attributes.get("href") for each in page.elements]
    named += [name for script in SCRIPTS for name in re.findall(r'from "([^"]+)"', text(script))]
    local = {name for name in named if name and not name.startswith("data:")}
    assert local == set(ROUTES) - {"/"}


def test_nothing_is_fetched_from_elsewhere() -> None:
    for route in ROUTES:
        found = re.findall(r"(?:https?:)?//[a-z0-9.-]+\.[a-z]+[^\s\"']*", text(route))
        assert set(found) <= {"http://www.w3.org/2000/svg"}, route
        assert "@import" not in text(route)


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_script_makes_markup_or_code_of_text(script: str) -> None:
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function", "srcdoc"):
        assert word not in text(script)


def test_every_element_that_the_scripts_use_is_in_the_page() -> None:
    page = Page(re.sub(r"<(link|input)([^>]*)>", r"<\1\2/>", text("/")))
    ids = [each.attributes["id"] for each in page.elements if "id" in each.attributes]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'\$\("([a-z-]+)"\)', text("/page.js"))) <= set(ids)


def test_the_policy_lets_in_the_pages_own_files_alone() -> None:
    assert POLICY.startswith("default-src 'none'") and "unsafe" not in POLICY and "*" not in POLICY
    assert HEADERS["X-Content-Type-Options"] == "nosniff"
    assert not re.search(r"<(script|style)>|\bon[a-z]+=|style=", text("/")), "inline code would be blocked"


def test_the_whole_page_is_small() -> None:
    assert sum(len(asset.content) for asset in assets().values()) < 60_000
