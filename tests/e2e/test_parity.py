"""Greedy texts of the engine are transformers' own, token by token, in every mode that a text must not depend on."""

from dataclasses import replace
from pathlib import Path

import pytest

from quantlab.bench.parity import BLOCK, SMALL_POOL, Ids, Mode, Reference, Work, build, compare, draw_work, modes, run
from quantlab.text import load_tokenizer

PROMPTS, LONGEST, TOKENS = 64, 100, 24
FEW_BLOCKS = 12  # these texts are too short to fill SMALL_POOL
MODES = {mode.name: mode for mode in modes("float32", PROMPTS, in_flight=(1, 5, 64))}


@pytest.fixture(scope="module")
def works(books_5m: Path, evaluation_text: Path) -> list[Work]:
    ids = load_tokenizer(books_5m).encode(evaluation_text.read_text()[:20_000])
    return draw_work(ids, PROMPTS, LONGEST, TOKENS)


@pytest.fixture(scope="module")
def expected(books_5m: Path, works: list[Work]) -> list[Ids]:
    reference = Reference(books_5m, "float32")
    return [reference.continuation(work) for work in works]


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_texts_are_those_of_transformers(mode: Mode, books_5m: Path, works: list[Work], expected: list[Ids]) -> None:
    tight = replace(mode, pool=FEW_BLOCKS) if mode.pool is not None else mode
    outcome = compare(books_5m, tight, works, expected)
    assert outcome.identical == PROMPTS, outcome.leads
    assert (outcome.preemptions > 0) == (mode.pool is not None)
    assert (outcome.prefix_hits > 0) == mode.options.prefix_caching
    assert outcome.most_running <= (mode.options.max_num_seqs or 0)


@pytest.mark.parametrize("name", ["preemption, prefix cache", "64 at once"])
def test_texts_are_the_same_when_each_step_is_launched_before_the_last_is_read(
    name: str, books_5m: Path, works: list[Work], expected: list[Ids]
) -> None:
    """What a GPU's engine does, whose tokens the host learns a step late; a CPU's own does not, as it gains nothing."""
    mode = replace(MODES[name], pool=MODES[name].pool and FEW_BLOCKS)
    engine = build(books_5m, mode, LONGEST + TOKENS)
    engine._overlap = True
    said, _ = run(engine, works)
    assert said == expected


def test_prompts_are_of_mixed_length_and_some_begin_alike(works: list[Work]) -> None:
    lengths = sorted(len(work.prompt) for work in works)
    assert lengths[0] <= 2
    assert lengths[-1] > LONGEST // 2
    long = [work.prompt[:BLOCK] for work in works if len(work.prompt) >= BLOCK]
    assert len(set(long)) < len(long)


def test_a_small_pool_has_so_many_blocks(books_5m: Path) -> None:
    info = build(books_5m, MODES["preemption"], longest=800).info
    assert (info.num_blocks, info.block_size) == (SMALL_POOL, BLOCK)


def test_another_text_is_seen_and_its_lead_is_told(books_5m: Path, works: list[Work], expected: list[Ids]) -> None:
    wrong = [(*said[:-1], (said[-1] + 1) % 8192) for said in expected[:4]]
    outcome = compare(books_5m, MODES["64 at once"], works[:4], wrong)
    assert outcome.identical == 0
    assert all(lead < -1 for lead in outcome.leads)
