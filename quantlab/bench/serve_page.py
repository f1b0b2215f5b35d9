"""A load test as one HTML page in the style of the evaluation's report: no script, no font, no network.

Knows nothing about files.
"""

from quantlab.bench.serve_plots import distribution_plots, load_plots, time_plots
from quantlab.bench.serve_result import LoadResult
from quantlab.bench.serve_summary import LevelResult
from quantlab.bench.serve_table import asked, failure_table, length_table, load_table, rate, seconds
from quantlab.eval.reports.elements import Markup, element
from quantlab.eval.reports.headline import Card
from quantlab.eval.reports.html import card_list, document, section
from quantlab.eval.reports.panels import drawn, spread
from quantlab.eval.reports.words import one_line

MAX_TIMED = 8  # levels whose time is drawn


def load_page(result: LoadResult) -> str:
    """The whole page."""
    model = one_line(result.server.model, 80)
    best = max(result.levels, key=lambda level: level.output_rate)
    heading = f"{rate(best.output_rate)} tokens a second"
    banner = element(
        "header",
        {"class": "banner none"},
        element(
            "div",
            None,
            element("h1", None, heading),
            element("p", {"class": "sentence"}, _sentence(best)),
            element("p", {"class": "models"}, element("b", None, model), f" at {result.options.target.base_url}"),
        ),
    )
    told = f"quantlab bench serve, {result.created}. Every figure here is in load.json."
    main = element("main", None, *_sections(result, best))
    return document(f"Load test: {model}", banner, main, element("footer", None, told))


def _sentence(best: LevelResult) -> str:
    failed = best.sent - best.succeeded
    lost = f", {failed:,} of {best.sent:,} requests failed" if failed else ""
    return (
        f"With {best.name}: first token after {seconds(best.ttft.p50)}, a token every {seconds(best.itl.p50)} "
        f"(medians){lost}."
    )


def _sections(result: LoadResult, best: LevelResult) -> list[Markup]:
    failures = failure_table(result)
    found = [(f"With {best.name}", card_list(_cards(best))), ("Every load", drawn(load_table(result)))]
    found += [("Failures", drawn(failures))] if failures else []
    plots = load_plots(result)
    found += [("Against load", spread(plots))] if plots else []
    found.append(("Distributions", spread(distribution_plots(result))))
    found += [(f"{level.name}, over time", spread(time_plots(level))) for level in result.levels[:MAX_TIMED]]
    found += [("Lengths", drawn(length_table(result))), ("How it was measured", drawn(asked(result)))]
    return [section(title, content) for title, content in found]


def _cards(level: LevelResult) -> list[Card]:
    cards = [
        Card("output tokens a second", rate(level.output_rate), f"with prompts {rate(level.total_rate)}"),
        Card("requests a second", rate(level.request_rate), f"{level.succeeded:,} in {level.seconds:.1f} s"),
        Card("time to first token", seconds(level.ttft.p50), f"99 % under {seconds(level.ttft.p99)}"),
        Card("between tokens", seconds(level.itl.p50), f"99 % under {seconds(level.itl.p99)}"),
        Card("whole answer", seconds(level.e2e.p50), f"99 % under {seconds(level.e2e.p99)}"),
    ]
    if level.good is not None:
        share = 100 * level.good / max(level.sent, 1)
        cards.append(Card("goodput", f"{rate(level.goodput or 0.0)} /s", f"{share:.1f} % within the limits"))
    return cards
