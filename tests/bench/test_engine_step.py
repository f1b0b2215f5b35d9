"""The step bench times steps in which every sequence gets a token."""

from quantlab.bench.engine_step import build, measure


def test_all_sequences_run_and_none_ends_while_the_clock_runs() -> None:
    times = measure(sequences=5, prompt=20, steps=3)
    assert 0 < times["median"] <= times["worst"]


def test_nothing_is_shared_and_nobody_gives_way() -> None:
    engine = build(sequences=4, prompt=40, tokens=8)
    while engine.has_work:
        engine.step()
    stats = engine.stats()
    assert (stats.generation_tokens, stats.prefix_hits, stats.preemptions) == (32, 0, 0)
