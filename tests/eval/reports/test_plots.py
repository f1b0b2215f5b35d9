"""What the plots show: the right values in the right places, and the sentence that says what comes of them."""

import re

import pytest

from quantlab.eval.reports import svg
from quantlab.eval.reports.layer_plot import errors_by_kind, layer_plot
from quantlab.eval.reports.task_plot import task_plot
from quantlab.eval.reports.text_plots import histogram_bins, text_plots, thinned
from quantlab.eval.result import LayerError, Report
from tests.eval.reports.page import Page
from tests.eval.reports.sample import task_result


def heights(page: Page, kind: str) -> list[float]:
    """The y of every corner of the line of a class."""
    (line,) = [each for each in page.all("polyline", kind) if "ul" not in each.above]
    return [float(pair.split(",")[1]) for pair in (line.attributes["points"] or "").split()]


def test_perplexity_falls_and_the_candidate_lies_above_the_baseline(report: Report) -> None:
    page = Page(text_plots(report.texts[0], None)[0])
    before, after = heights(page, "baseline"), heights(page, "candidate")
    assert len(before) == len(after) == 2 * 16
    assert all(low > high for low, high in zip(before, after, strict=True))  # y grows downward
    assert before == sorted(before)
    assert "1.0641 in the first 64, 1.0464 after them" in page.source


def test_slices_that_grow_are_drawn_by_decades(report: Report) -> None:
    edges = [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
    slices = zip(edges, edges[1:], report.texts[0].positions, strict=False)
    grown = tuple(p.model_copy(update={"start": start, "stop": stop}) for start, stop, p in slices)
    page = Page(text_plots(report.texts[0].model_copy(update={"positions": grown}), None)[1])
    assert "token of the window (logarithmic)" in [each.text for each in page.all("text", "title")]
    ticks = [each.text for each in page.all("text", "tick")]
    assert [tick for tick in ticks if "." not in tick and tick != "0"] == ["1", "10", "100", "1,000"]
    assert "in the first 64" in page.all("p")[0].text


def test_the_noise_floor_is_drawn_where_it_was_measured(report: Report) -> None:
    assert report.noise is not None
    text, noise = report.texts[0], report.noise.texts[0]
    assert Page(text_plots(text, noise)[1]).all("line", "floor")
    assert not Page(text_plots(text, None)[1]).all("line", "floor")


def test_the_histogram_s_bars_add_up_to_all_tokens(report: Report) -> None:
    text = report.texts[0]
    page = Page(text_plots(text, None)[2])
    bars = page.all("rect", "bar")
    assert len(bars) == len(histogram_bins(text))
    tokens = [int(each.text.split(": ")[1].split()[0].replace(",", "")) for each in page.all("title")]
    assert sum(tokens) == sum(text.kl_histogram.counts)
    tallest = min(bars, key=lambda each: float(each.attributes["y"] or 0))
    assert bars.index(tallest) == tokens.index(max(tokens))


def test_a_bin_from_zero_is_drawn(report: Report) -> None:
    histogram = report.texts[0].kl_histogram.model_copy(update={"edges": (0.0, 1e-6, 1e-3), "counts": (5, 3)})
    page = Page(text_plots(report.texts[0].model_copy(update={"kl_histogram": histogram}), None)[2])
    assert all(float(each.attributes["width"] or 0) > 10 for each in page.all("rect", "bar"))


@pytest.mark.parametrize("count", [1, 2, 127, 128, 129, 10_000])
def test_slices_are_thinned_evenly(count: int, report: Report) -> None:
    some = report.texts[0].positions[:1] * count
    assert min(count, 65) <= len(thinned(some, 128)) <= 128


def test_tasks_are_worst_first_and_marked_by_what_their_interval_says(report: Report) -> None:
    plot = task_plot(report)
    assert plot is not None
    page = Page(plot)
    names = sorted(
        (float(each.attributes["y"] or 0), each.text) for each in page.all("text", "tick") if each.text.isidentifier()
    )
    assert [name for _, name in names] == ["lambada_openai", "piqa", "arc_easy"]
    assert [len(page.all("circle", kind)) for kind in ("lost", "even", "won")] == [1, 2, 0]
    assert "1 of 3 worse and 0 better" in plot and "-2.67 points over all items" in plot


def test_the_bars_of_tasks_span_their_intervals(report: Report) -> None:
    only = report.model_copy(update={"tasks": (task_result("piqa", "acc", 40, 12),), "noise": None})
    page = Page(task_plot(only) or "")
    (dot,) = page.all("circle", "lost")
    bar, *_ = [
        each
        for each in page.all("line", "lost")
        if each.attributes["x1"] != each.attributes["x2"] and "ul" not in each.above
    ]
    middle = (float(bar.attributes["x1"] or 0) + float(bar.attributes["x2"] or 0)) / 2
    assert float(dot.attributes["cx"] or 0) == pytest.approx(middle, abs=0.02)
    (zero,) = page.all("line", "zero")
    assert float(bar.attributes["x2"] or 0) < float(zero.attributes["x1"] or 0)


def test_long_and_many_task_names_stay_within_the_drawing(report: Report) -> None:
    tasks = tuple(task_result(f"{i}_{'x' * 200}", "acc", 5, 5) for i in range(100))
    page = Page(task_plot(report.model_copy(update={"tasks": tasks})) or "")
    assert all(len(each.text) <= 20 for each in page.all("text", "tick"))
    assert len(page.all("circle")) == 60


def test_linears_are_grouped_by_kind_and_the_worst_is_named(report: Report) -> None:
    kinds = errors_by_kind(report.layers)
    assert list(kinds)[:2] == ["self_attn.q_proj", "self_attn.k_proj"] and len(kinds) == 7
    assert kinds["mlp.down_proj"][7] == max(layer.error for layer in report.layers)
    plot = layer_plot(report.layers)
    assert plot is not None and "Worst: model.layers.7.mlp.down_proj with 0.0372" in plot
    assert layer_plot(()) is None


def test_experts_are_one_kind_and_strangers_stand_behind_the_blocks() -> None:
    layers = [
        LayerError(module=f"model.layers.{b}.mlp.experts.{e}.up_proj", error=b + e / 10) for b in (0, 1) for e in (0, 5)
    ]
    kinds = errors_by_kind((*layers, LayerError(module="lm_head", error=9.0)))
    assert kinds == {"mlp.experts.*.up_proj": {0: 0.5, 1: 1.5}, "lm_head": {2: 9.0}}


def test_all_places_lie_within_the_drawing(report: Report) -> None:
    for plot in [*text_plots(report.texts[0], None), task_plot(report), layer_plot(report.layers)]:
        assert plot is not None
        for x, y in re.findall(r"(-?[\d.]+),(-?[\d.]+)", " ".join(re.findall(r'points="([^"]*)"', plot))):
            assert 0 <= float(x) <= svg.WIDTH and 0 <= float(y) <= svg.HEIGHT
