"""The page in a real browser, where one is installed: it talks, shows what the server counts, and fits any screen."""

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from tests.server.page_script import Script, serving

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.slow


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


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A tab that fails the test for whatever it complains of."""
    tab = browser.new_page(viewport={"width": 1280, "height": 860})
    told: list[str] = []
    tab.on("console", lambda message: told.append(message.text))
    tab.on("pageerror", lambda error: told.append(str(error)))
    tab.told = told
    yield tab
    tab.close()


def opened(page: Any, script: Script) -> Any:
    page.goto(script.url)
    page.wait_for_selector(".ready")
    return page


def ask(page: Any, text: str) -> str:
    """Ask and wait for the end; the answer's text."""
    page.fill("#text", text)
    page.press("#text", "Enter")
    page.wait_for_selector("#turns li:last-child.assistant:not(.going)")
    return str(page.inner_text("#turns li:last-child .text"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_fits_and_asks_nobody_else(width: int, scheme: str, browser: Any) -> None:
    with serving(Script()) as script:
        tab = browser.new_page(viewport={"width": width, "height": 860}, color_scheme=scheme)
        asked: list[str] = []
        tab.on("request", lambda request: asked.append(request.url))
        opened(tab, script)
        ask(tab, "Who are you?")
        assert all(url.startswith((script.url, "data:")) for url in asked)
        assert tab.evaluate("document.documentElement.scrollWidth") == width
        dark = tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(16, 20, 25)"
        assert dark == (scheme == "dark")
        tab.close()


def test_a_conversation_streams_and_is_sent_whole(page: Any) -> None:
    with serving(Script()) as script:
        opened(page, script)
        assert page.inner_text("#model") == "books<5m>"
        page.fill("#set-max_tokens", "4")
        page.fill("#set-stop", "END\n\nSTOP")
        page.fill("#set-system", "Be brief.")
        assert ask(page, "Who are you?").strip() == "<b>Call</b> me Ishmael ."  # as text, never as markup
        figures = page.inner_text("#turns li:last-child .figures")
        assert "12 + 4 tokens" in figures and "8 from the cache" in figures and "token limit" in figures
        ask(page, "Go on")
    first, second = script.bodies
    assert [message["role"] for message in first["messages"]] == ["system", "user"]
    assert [message["role"] for message in second["messages"]] == ["system", "user", "assistant", "user"]
    assert (first["max_tokens"], first["stop"], first["temperature"]) == (4, ["END", "STOP"], 0.8)
    assert not {"top_p", "top_k", "min_p", "seed", "response_format", "logprobs"} & first.keys()  # neutral: not sent
    assert page.told == []


def test_without_a_chat_template_the_model_goes_on_with_a_text(page: Any) -> None:
    with serving(Script(chat_template=False)) as script:
        opened(page, script)
        page.fill("#set-max_tokens", "2")
        ask(page, "Once ")
        ask(page, "and ")
    assert script.paths == ["/v1/completions"] * 2
    assert script.bodies[1]["prompt"] == "Once <b>Call</b> me and "


def test_stop_frees_the_server_and_again_asks_again(page: Any) -> None:
    with serving(Script(gap=0.02)) as script:
        opened(page, script)
        page.fill("#set-max_tokens", "5000")
        page.fill("#text", "Talk")
        page.press("#text", "Enter")
        page.locator("#turns li:last-child .text", has_text="Some years").wait_for()
        page.click("#stop")
        page.wait_for_selector("#turns li:last-child:not(.going)")
        assert page.inner_text("#turns li:last-child .figures") == "stopped"
        sent = script.tokens
        page.wait_for_timeout(200)
        assert script.tokens <= sent + 3
        page.fill("#set-max_tokens", "3")
        page.click("#again")
        page.wait_for_selector("#turns li:last-child.assistant:not(.going)")
        assert page.locator("#turns li").count() == 2
    assert script.bodies[0]["messages"] == script.bodies[1]["messages"]


def test_what_the_server_refuses_is_shown_in_its_words(page: Any) -> None:
    with serving(Script(fault="<i>too long</i>")) as script:
        opened(page, script)
        ask(page, "x")
        assert page.inner_text("#turns li:last-child.failed .figures") == "<i>too long</i>"


def test_a_schema_that_is_no_json_never_leaves_the_page(page: Any) -> None:
    with serving(Script()) as script:
        opened(page, script)
        page.select_option("#set-format", "json_schema")
        page.fill("#set-schema", "{")
        ask(page, "x")
        assert "no JSON" in page.inner_text("#turns li:last-child.failed .figures")
        assert script.bodies == []
        page.fill("#set-schema", '{"type": "object"}')
        page.click("#again")
        page.wait_for_selector("#turns li:last-child.assistant:not(.going):not(.failed)")
    assert script.bodies[0]["response_format"]["json_schema"]["schema"] == {"type": "object"}


def test_uncertain_words_are_underlined(page: Any) -> None:
    with serving(Script()) as script:
        opened(page, script)
        page.check("#set-certainty")
        ask(page, "x")
        marked = page.locator("#turns .sure0")
        assert marked.first.inner_text().strip() == "never" and "5.0 %" in marked.first.get_attribute("title")
    assert (script.bodies[0]["logprobs"], script.bodies[0]["top_logprobs"]) == (True, 3)


def test_plots_follow_the_servers_counts(page: Any) -> None:
    with serving(Script()) as script:
        opened(page, script)
        page.wait_for_timeout(300)
        ask(page, "x")
        page.locator("figure b", has_text="150 ms").wait_for(timeout=8000)
        page.wait_for_timeout(1500)  # a rate needs two samples, a line three
        values = [each.inner_text() for each in page.locator("figure b").all()]
        assert values[2] == "150 ms"  # the middle of the bucket from 0.1 to 0.2
        assert values[4:7] == ["3 / 1", "50 %", "50 %"]
        drawn = page.locator("figure svg polyline").first.get_attribute("points")
        assert len(drawn.split()) >= 2


def test_the_status_says_what_the_server_is_doing(page: Any) -> None:
    with serving(Script(phase="draining")) as script:
        page.goto(script.url)
        page.locator("#phase", has_text="draining").wait_for()
        assert page.locator("#status.gone, #status.ready").count() == 0
    page.wait_for_selector("#status.gone", timeout=8000)
    assert page.inner_text("#phase") == "no answer"


def test_settings_are_kept_and_the_curl_line_is_what_would_be_sent(page: Any) -> None:
    with serving(Script()) as script:
        opened(page, script)
        page.fill("#set-temperature", "0.3")
        page.reload()
        page.wait_for_selector(".ready")
        assert page.input_value("#set-temperature") == "0.3"
        page.fill("#text", "it's")
        shown = page.evaluate("document.getElementById('curl').textContent")
    assert f"curl -N {script.url}/v1/chat/completions" in shown
    assert '"temperature": 0.3' in shown and "it'\\''s" in shown


def test_an_enter_that_ends_a_composition_sends_nothing_and_values_out_of_range_neither(page: Any) -> None:
    with serving(Script()) as script:
        opened(page, script)
        page.fill("#text", "x")
        page.press("#text", "Shift+Enter")
        page.fill("#set-temperature", "9")
        page.press("#text", "Enter")
        page.wait_for_timeout(100)
        assert page.locator("#turns li").count() == 0
    assert script.bodies == []
