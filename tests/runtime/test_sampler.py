"""The sampler: what each setting does to the next token, with transformers' processors as oracle; seeds; failures."""

from collections.abc import Sequence as Ordered

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from quantlab.runtime import distribution
from quantlab.runtime.batch import Slice
from quantlab.runtime.request import SamplingParams
from quantlab.runtime.sampler import NOT_FINITE, NOTHING_LEFT, Sampler
from quantlab_kernels import sampling
from tests.runtime.sampling import CPU, next_slice, sampler_with, sequence, step

V = 1000
GREEDY = SamplingParams(temperature=0.0)


def scores(rows: int, vocab: int = V, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, vocab) * spread


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_greedy_takes_the_likeliest_token(dtype: torch.dtype) -> None:
    rows = [sequence(GREEDY, slot) for slot in (3, 0, 5)]
    logits = scores(3).to(dtype)
    assert step(sampler_with(rows, V), rows, logits).token_ids == tuple(logits.argmax(-1).tolist())


def test_a_row_does_what_it_asks_beside_rows_that_ask_something_else() -> None:
    settings = [
        GREEDY,
        SamplingParams(top_k=1),
        SamplingParams(top_p=1e-6),
        SamplingParams(min_p=1.0),
        SamplingParams(temperature=1e-300),
        SamplingParams(temperature=0.0, logit_bias=((17, 100.0),)),
        SamplingParams(top_k=3, top_p=0.0, temperature=5.0),
    ]
    rows = [sequence(params, slot) for slot, params in enumerate(settings)]
    logits = scores(len(rows))
    best = logits.argmax(-1).tolist()
    best[5] = 17
    assert list(step(sampler_with(rows, V), rows, logits).token_ids) == best


def test_logits_are_left_as_they_are() -> None:
    rows = [sequence(SamplingParams(top_k=5, logit_bias=((1, 3.0),), repetition_penalty=2.0), 0)]
    logits = scores(1)
    before = logits.clone()
    step(sampler_with(rows, V), rows, logits)
    assert torch.equal(before, logits)


def test_slices_that_do_not_sample_have_no_row() -> None:
    rows = [sequence(GREEDY, slot) for slot in range(3)]
    sampler, logits = sampler_with(rows, V), scores(2)
    slices = [next_slice(rows[0]), Slice(rows[1], 0, 1, samples=False), next_slice(rows[2])]
    logits[1, 4] = torch.nan
    sampled = sampler.launch(logits, slices).result()
    assert sampled.token_ids == (logits[0].argmax().item(), 0)
    assert sampled.failed == ((2, NOT_FINITE),), "named by the place of the slice in the batch"


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
@pytest.mark.parametrize("params", [GREEDY, SamplingParams(seed=1), SamplingParams(top_p=0.5), SamplingParams(top_k=2)])
def test_numbers_that_are_wrong_fail_their_own_row_only(params: SamplingParams, wrong: float) -> None:
    rows = [sequence(params, 0), sequence(GREEDY, 1)]
    logits = scores(2)
    logits[0, 7] = wrong
    sampled = step(sampler_with(rows, V), rows, logits)
    assert sampled.failed == ((0, NOT_FINITE),) and sampled.token_ids == (0, logits[1].argmax().item())


def test_a_row_without_a_token_fails() -> None:
    rows = [sequence(GREEDY, 0), sequence(SamplingParams(), 1)]
    logits = torch.full((2, V), -torch.inf)
    assert step(sampler_with(rows, V), rows, logits).failed == ((0, NOTHING_LEFT), (1, NOTHING_LEFT))


def test_the_last_tokens_stay_on_the_device_by_slot() -> None:
    rows = [sequence(GREEDY, slot) for slot in (6, 2)]
    sampler = sampler_with(rows, V)
    sampled = step(sampler, rows, scores(2))
    assert [sampler.last_tokens[slot].item() for slot in (6, 2)] == list(sampled.token_ids)


def penalised(params: SamplingParams, logits: torch.Tensor, prompt: Ordered[int], output: Ordered[int]) -> torch.Tensor:
    """transformers' repetition penalty, then OpenAI's formula for the others."""
    ids = torch.tensor([[*prompt, *output]])
    changed = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(ids, logits[None].clone())[0]
    for token in set(output):
        changed[token] -= params.frequency_penalty * output.count(token) + params.presence_penalty
    return changed


@pytest.mark.parametrize("resumed", [False, True], ids=["from-the-prompt", "after-preemption"])
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.0, repetition_penalty=1.7),
        SamplingParams(temperature=0.0, presence_penalty=1.5),
        SamplingParams(temperature=0.0, frequency_penalty=0.4),
        SamplingParams(temperature=0.0, repetition_penalty=0.8, presence_penalty=-0.3, frequency_penalty=0.9),
    ],
    ids=["repetition", "presence", "frequency", "all"],
)
def test_penalties_follow_the_text_step_by_step(params: SamplingParams, resumed: bool) -> None:
    vocab, prompt = 12, (3, 3, 7)
    row, other = sequence(params, 4, prompt, (5, 5, 2) if resumed else ()), sequence(GREEDY, 1)
    sampler = sampler_with([other, row], vocab)
    for _ in range(30):
        logits = scores(2, vocab, spread=1.0)
        expected = penalised(params, logits[1], prompt, row.output_ids).argmax().item()
        assert step(sampler, [other, row], logits).token_ids[1] == expected


def test_a_slot_forgets_the_text_of_its_last_owner() -> None:
    params = SamplingParams(temperature=0.0, presence_penalty=100.0)
    first = sequence(params, 0, prompt=(1,), output=(5,))
    sampler = sampler_with([first], 10)
    sampler.release(0)
    second = sequence(params, 0)
    sampler.admit(second)
    logits = torch.zeros(1, 10)
    logits[0, 5] = 1.0
    assert step(sampler, [second], logits).token_ids == (5,)
    assert step(sampler, [second], logits).token_ids != (5,), "and remembers its own"


def test_penalties_count_tokens_that_the_host_has_not_read() -> None:
    row = sequence(SamplingParams(temperature=0.0, presence_penalty=100.0), 0)
    sampler = sampler_with([row], 6)
    logits = torch.tensor([[6.0, 5.0, 4.0, 3.0, 2.0, 1.0]])
    draws = [sampler.launch(logits, [Slice(row, position, 1, samples=True)]) for position in range(6)]
    assert [draw.result().token_ids[0] for draw in draws] == [0, 1, 2, 3, 4, 5]


def test_no_token_ends_the_text_before_its_least_length() -> None:
    params = SamplingParams(temperature=0.0, min_tokens=2, stop_token_ids=(4, 99))
    rows = [
        sequence(params, 0),
        sequence(GREEDY, 1),
        sequence(SamplingParams(temperature=0, min_tokens=2, ignore_eos=True), 2),
    ]
    sampler = sampler_with(rows, 8, eos=(3,))
    logits = torch.tensor([0.0, 1, 2, 5, 4, 3, 0, 0]).expand(3, 8)
    assert [step(sampler, rows, logits).token_ids for _ in range(3)] == [(5, 3, 3), (5, 3, 3), (3, 3, 3)]


def chi_square(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """Pearson's statistic in standard deviations from its mean, over cells with at least 5 expected."""
    enough = expected >= 5
    statistic = ((counts - expected) ** 2 / expected)[enough].sum().item()
    freedom = int(enough.sum()) - 1
    return (statistic - freedom) / (2 * freedom) ** 0.5


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.7),
        SamplingParams(top_k=5),
        SamplingParams(top_p=0.8, temperature=1.3),
        SamplingParams(min_p=0.1),
        SamplingParams(logit_bias=((2, 1.5),)),
    ],
    ids=["plain", "temperature", "top-k", "top-p", "min-p", "bias"],
)
@pytest.mark.parametrize("seeded", [False, True])
def test_tokens_come_as_often_as_they_should(params: SamplingParams, seeded: bool) -> None:
    vocab, draws, batch = 600, 20_000, 100
    logits = torch.randn(vocab) * 2
    rows = [
        sequence(SamplingParams(**{**fields(params), "seed": slot if seeded else None}), slot) for slot in range(batch)
    ]
    sampler = sampler_with(rows, vocab, slots=batch)
    counts = torch.zeros(vocab)
    for _ in range(draws // batch):
        drawn = torch.tensor(step(sampler, rows, logits.expand(batch, vocab)).token_ids)
        counts += torch.bincount(drawn, minlength=vocab)
    expected = by_definition(params, logits) * draws
    assert counts[expected == 0].sum() == 0, "what is filtered out never comes"
    assert abs(chi_square(counts, expected)) < 5


def fields(params: SamplingParams) -> dict[str, object]:
    return {name: getattr(params, name) for name in SamplingParams.__dataclass_fields__}


def by_definition(params: SamplingParams, logits: torch.Tensor) -> torch.Tensor:
    """By the definition, with a sort."""
    biased = logits.double().clone()
    for token, value in params.logit_bias:
        biased[token] += value
    values, order = (biased / params.temperature).softmax(-1).sort(descending=True)
    if params.top_k:
        values[params.top_k :] = 0
    values[(values.cumsum(0) - values) / values.sum() >= params.top_p] = 0
    values[values < params.min_p * values[0]] = 0
    return torch.zeros_like(values).scatter_(0, order, values / values.sum())


def test_a_seeded_text_does_not_depend_on_its_company_its_slot_or_a_preemption() -> None:
    params = SamplingParams(seed=1234, temperature=1.1, top_p=0.95)
    steps = [scores(1) for _ in range(20)]

    alone = sequence(params, 0)
    sampler = sampler_with([alone], V)
    for logits in steps:
        step(sampler, [alone], logits)

    crowded = sequence(params, 3)
    company = [sequence(SamplingParams(top_k=9), 0), sequence(GREEDY, 1), sequence(SamplingParams(min_p=0.2), 7)]
    sampler = sampler_with([crowded, *company], V)
    for i, logits in enumerate(steps):
        others = company[: i % 4]
        step(sampler, [*others, crowded], torch.cat([scores(len(others)), logits]))
        if i == 11:
            sampler.release(3)
            crowded.slot = 5
            sampler.admit(crowded)
    assert crowded.output_ids == alone.output_ids


def test_texts_differ_by_seed_and_without_one() -> None:
    logits = torch.zeros(1, V)
    texts = set()
    for params in (
        SamplingParams(seed=1),
        SamplingParams(seed=2),
        SamplingParams(seed=-1),
        SamplingParams(),
        SamplingParams(),
    ):
        row = sequence(params, 0)
        sampler = sampler_with([row], V)
        for _ in range(8):
            step(sampler, [row], logits)
        texts.add(tuple(row.output_ids))
    assert len(texts) == 5


def test_settings_of_every_row_hold_when_rows_come_and_go() -> None:
    """Plans are kept from step to step: none may outlive its rows."""
    sampler = Sampler(V, 4, CPU)
    for turn in range(6):
        params = SamplingParams(temperature=0.0, logit_bias=((turn, 1000.0),))
        row = sequence(params, 2)
        sampler.admit(row)
        assert step(sampler, [row], scores(1)).token_ids == (turn,)
        sampler.release(2)


def test_logprobs_are_the_models_own() -> None:
    rows = [
        sequence(SamplingParams(temperature=0.3, top_k=4, logprobs=3, logit_bias=((7, 50.0),)), 0),
        sequence(GREEDY, 1),
        sequence(SamplingParams(temperature=0.0, logprobs=0), 2),
    ]
    logits = scores(3)
    sampled = step(sampler_with(rows, V), rows, logits)
    expected = logits.double().log_softmax(-1)
    assert sampled.logprobs is not None and sampled.logprobs[1] is None
    first, last = sampled.logprobs[0], sampled.logprobs[2]
    assert first is not None and last is not None
    assert sampled.token_ids[0] == 7
    assert first.logprob == pytest.approx(expected[0, 7].item(), abs=1e-5)
    assert first.rank == int((expected[0] > expected[0, 7]).sum()) + 1
    assert [token for token, _ in first.top] == expected[0].topk(3).indices.tolist()
    assert [value for _, value in first.top] == pytest.approx(expected[0].topk(3).values.tolist(), abs=1e-5)
    assert last.top == () and last.rank == 1


def test_the_draw_is_launched_before_it_is_read() -> None:
    rows = [sequence(SamplingParams(seed=slot, logprobs=1), slot) for slot in range(2)]
    sampler = sampler_with(rows, V)
    logits = [scores(2), scores(2)]
    slices = [[Slice(row, position, 1, samples=True) for row in rows] for position in range(2)]
    launched = [sampler.launch(*pair) for pair in zip(logits, slices, strict=True)]
    again = sampler_with(rows, V)
    one_by_one = [again.launch(*pair).result() for pair in zip(logits, slices, strict=True)]
    assert [draw.result() for draw in launched] == one_by_one


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
def test_the_kernels_of_a_gpu_choose_the_same_tokens() -> None:
    """In Triton's interpreter; on a GPU, the next test."""
    settings = [
        GREEDY,
        SamplingParams(seed=1),
        SamplingParams(seed=2, top_p=0.7, top_k=40),
        SamplingParams(seed=3, min_p=0.05),
    ]
    chosen = []
    for operations in (distribution, sampling):
        torch.manual_seed(1)
        rows = [sequence(params, slot) for slot, params in enumerate(settings)]
        sampler = sampler_with(rows, 700)
        sampler.operations = operations
        for _ in range(6):
            step(sampler, rows, scores(len(rows), 700))
        chosen.append([row.output_ids for row in rows])
    assert chosen[0] == chosen[1]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_gpu_chooses_the_same_tokens(dtype: torch.dtype) -> None:
    """Every setting at once; the draws of both machines are at the same place of the same distribution."""
    vocab, count = 128_256, 64
    settings = [
        GREEDY,
        SamplingParams(seed=1),
        SamplingParams(seed=2, top_p=0.7, temperature=0.8),
        SamplingParams(seed=3, top_k=40, min_p=0.05),
        SamplingParams(temperature=0.0, repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=0.25),
        SamplingParams(seed=4, logit_bias=((5, 3.0),), min_tokens=3, logprobs=2),
    ]
    chosen, logprobs = [], []
    for device in ("cpu", "cuda"):
        generator = torch.Generator().manual_seed(0)
        rows = [sequence(settings[slot % len(settings)], slot, (1, 2, 3)) for slot in range(count)]
        sampler = Sampler(vocab, count, torch.device(device), (7,))
        for row in rows:
            sampler.admit(row)
        for _ in range(5):
            logits = (torch.randn(count, vocab, generator=generator) * 4).to(dtype).to(device)
            sampled = step(sampler, rows, logits)
            assert not sampled.failed and sampler.last_tokens.tolist() == list(sampled.token_ids)
            logprobs.append(sampled.logprobs)
        chosen.append(torch.tensor([row.output_ids for row in rows]))
    assert (chosen[0] == chosen[1]).float().mean() > 0.98, "a draw at the border of two tokens may differ"
    greedy = [slot for slot in range(count) if slot % len(settings) in (0, 4)]
    assert torch.equal(chosen[0][greedy], chosen[1][greedy])
    assert [value is None for value in logprobs[0] or ()] == [value is None for value in logprobs[5] or ()]


@pytest.mark.gpu
def test_a_launch_on_a_gpu_does_not_wait_for_it() -> None:
    settings = [SamplingParams(seed=1, top_p=0.9, top_k=50, repetition_penalty=1.1, logprobs=3, min_tokens=9), GREEDY]
    rows = [sequence(settings[slot % 2], slot) for slot in range(16)]
    sampler = Sampler(128_256, 16, torch.device("cuda"), (2,))
    for row in rows:
        sampler.admit(row)
    logits = torch.randn(16, 128_256, device="cuda", dtype=torch.bfloat16)
    sampler.launch(logits, [Slice(row, 0, 1, samples=True) for row in rows]).result()
    torch.cuda.set_sync_debug_mode("error")
    try:
        draws = [sampler.launch(logits, [Slice(row, at, 1, samples=True) for row in rows]) for at in range(1, 4)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(len(draw.result().token_ids) == 16 for draw in draws)


def test_a_gpu_s_codes_for_no_token_are_those_that_are_read_back() -> None:
    codes = sampling.NOT_FINITE.value, sampling.NOTHING_LEFT.value
    assert codes == (distribution.NOT_FINITE, distribution.NOTHING_LEFT)
