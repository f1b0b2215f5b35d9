"""A report as one HTML page that needs nothing else: no script, no font, no network.

The page forbids itself everything but its own style sheet (Content-Security-Policy), so that even text that got past
the escaping could not load or run anything. Knows nothing about files.
"""

from base64 import b64encode
from functools import cache
from hashlib import sha256
from importlib.resources import files

from quantlab.eval.reports.elements import Markup, element
from quantlab.eval.reports.flips import flips_browser
from quantlab.eval.reports.gate_list import gate_list
from quantlab.eval.reports.headline import Card, cards
from quantlab.eval.reports.layer_plot import layer_plot
from quantlab.eval.reports.panels import drawn, spread
from quantlab.eval.reports.tables import cost_table, noise_of, provenance, task_table
from quantlab.eval.reports.task_plot import task_plot
from quantlab.eval.reports.text_plots import text_plots
from quantlab.eval.reports.words import one_line, verdict_sentence, verdict_word
from quantlab.eval.result import Report

MAX_ROWS = 150
MAX_TEXTS = 6


def html(report: Report) -> str:
    """The whole page."""
    title = f"{verdict_word(report)}: {one_line(report.candidate.path)} against {one_line(report.baseline.path)}"
    return document(title, _banner(report), element("main", None, *_sections(report)), _foot(report))


def document(title: str, *body: Markup) -> str:
    """A page in our style, complete in itself; whoever else has figures to show draws them into it."""
    return f"<!doctype html>\n{element('html', {'lang': 'en'}, _head(title), element('body', None, *body))}\n"


@cache
def style() -> str:
    """The style sheet."""
    return files("quantlab.eval.reports").joinpath("report.css").read_text(encoding="utf-8")


def _head(title: str) -> Markup:
    digest = b64encode(sha256(style().encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    return element(
        "head",
        None,
        element("meta", {"charset": "utf-8"}),
        element("meta", {"http-equiv": "Content-Security-Policy", "content": policy}),
        element("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}),
        element("meta", {"name": "color-scheme", "content": "light dark"}),
        element("title", None, title),
        element("style", None, Markup(style())),
    )


def _banner(report: Report) -> Markup:
    verdict = report.gate.verdict if report.gate else "none"
    models = element(
        "p",
        {"class": "models"},
        element("b", None, one_line(report.candidate.path)),
        f" ({one_line(report.candidate.scheme)}) against ",
        element("b", None, one_line(report.baseline.path)),
    )
    word = element("h1", None, verdict_word(report))
    sentence = element("p", {"class": "sentence"}, verdict_sentence(report))
    return element("header", {"class": f"banner {verdict}"}, element("div", None, word, sentence, models))


def _sections(report: Report) -> list[Markup]:
    gate = gate_list(report.gate) if report.gate else None
    found = [
        ("Requirements", gate),
        ("Headline figures", card_list(cards(report))),
        *((f"Text: {one_line(text.name, 80)}", _plots(report, i)) for i, text in enumerate(report.texts[:MAX_TEXTS])),
        (_others_title(report), _others(report)),
        ("Answers that changed between right and wrong", flips_browser(report.tasks)),
        ("All figures", drawn(cost_table(report).first(MAX_ROWS))),
    ]
    tasks = task_table(report)
    found += [("All tasks", drawn(tasks.first(MAX_ROWS)))] if tasks else []
    found.append(("Provenance", drawn(provenance(report).first(MAX_ROWS))))
    return [section(title, content) for title, content in found if content is not None]


def section(title: str, content: Markup) -> Markup:
    """A titled part of a page."""
    name = "s-" + "".join(c if c.isascii() and c.isalnum() else "-" for c in title.lower())[:60]
    return element("section", {"aria-labelledby": name}, element("h2", {"id": name}, title), content)


def card_list(figures: list[Card]) -> Markup:
    """The large figures at the top of a page."""
    items = [
        element(
            "div",
            None,
            element("dt", None, card.name),
            element("dd", {"class": "value"}, _whole(card.value)),
            element("dd", {"class": "detail"}, _whole(card.detail)),
        )
        for card in figures
    ]
    return element("dl", {"class": "cards"}, *items)


def _whole(words: str) -> str:
    """A number and its percent sign stay on one line."""
    return words.replace(" %", "\u00a0%")


def _plots(report: Report, index: int) -> Markup | None:
    text = report.texts[index]
    plots = text_plots(text, noise_of(report, text.name))
    return spread(plots) if plots else None


def _others_title(report: Report) -> str:
    return "Tasks and layers" if report.tasks and report.layers else "Tasks" if report.tasks else "Layers"


def _others(report: Report) -> Markup | None:
    plots = [plot for plot in (task_plot(report), layer_plot(report.layers)) if plot is not None]
    return spread(plots) if plots else None


def _foot(report: Report) -> Markup:
    told = f"quantlab {one_line(report.quantlab)}, {one_line(report.created)}. Every figure here is in report.json."
    return element("footer", None, told)
