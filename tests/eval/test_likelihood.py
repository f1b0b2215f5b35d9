"""Scores of continuations, against the whole model run on each sequence alone."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from quantlab.checkpoint.load import load_model
from quantlab.errors import NumericsError, UsageError
from quantlab.eval import likelihood
from quantlab.eval.likelihood import Request, score
from quantlab.models.config import ModelConfig
from quantlab.models.decoder import CausalLM


def quiet(done: int, total: int) -> None:
    """Nobody watches."""


@pytest.fixture(scope="module")
def model(books_5m: Path) -> CausalLM:
    return load_model(books_5m, torch.float32, "cpu")


@pytest.fixture(scope="module")
def windowed() -> CausalLM:
    """A random model in which some layers see seven tokens, and some have no position embedding."""
    raw = {
        "architectures": ["SmolLM3ForCausalLM"], "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "no_rope_layer_interval": 2,
        "use_sliding_window": True, "sliding_window": 7,
    }  # fmt: skip
    torch.manual_seed(0)
    model = CausalLM(ModelConfig.from_json(raw, "config.json")).requires_grad_(False).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model


def questions(vocabulary: int, count: int = 12) -> list[Request]:
    """Questions of several lengths with four answers each, and one answer that begins like another."""
    draw = torch.Generator().manual_seed(1)

    def tokens(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (1,), generator=draw))
        return torch.randint(0, vocabulary, (length,), generator=draw).tolist()

    found = []
    for _ in range(count):
        context = tokens(1, 60)
        answers = [tokens(1, 12) for _ in range(4)]
        found += [Request(context, answer) for answer in [*answers, answers[0] + answers[1]]]
    return found


def alone(model: CausalLM, request: Request) -> tuple[float, tuple[int, ...]]:
    """The definition: one sequence, one pass, every logit."""
    ids = torch.tensor([request.context + request.continuation])
    with torch.inference_mode():
        logprobs = model(ids[:, :-1])[0, -len(request.continuation) :].double().log_softmax(-1)
    picked = logprobs[range(len(request.continuation)), request.continuation]
    return picked.sum().item(), tuple(logprobs.argmax(-1).tolist())


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("name", ["model", "windowed"])
def test_scores_are_those_of_each_sequence_alone(name, batch_size, request):
    subject = request.getfixturevalue(name)
    asked = questions(subject.config.vocab_size)
    for wanted, found in zip(asked, score(subject, asked, batch_size, 512, quiet), strict=True):
        logprob, likeliest = alone(subject, wanted)
        assert found.logprob == pytest.approx(logprob, abs=2e-4)
        assert found.likeliest == likeliest


@pytest.mark.gpu
def test_a_gpu_scores_as_the_cpu_does(model, books_5m):
    asked = questions(8192)
    there = score(load_model(books_5m, torch.float32, "cuda"), asked, 16, 512, quiet)
    for here, found in zip(score(model, asked, 16, 512, quiet), there, strict=True):
        assert found.logprob == pytest.approx(here.logprob, abs=1e-2)


def test_a_long_sequence_loses_its_beginning(model):
    tokens = questions(8192, 1)[0].context * 3
    short, whole = score(model, [Request(tokens[-9:-2], tokens[-2:]), Request(tokens[:-2], tokens[-2:])], 4, 8, quiet)
    assert whole.logprob == pytest.approx(short.logprob, abs=1e-4)


def test_an_answer_longer_than_the_context_is_refused(model):
    with pytest.raises(UsageError, match="an answer has 9 tokens, and the model reads 8 at once"):
        score(model, [Request([1], list(range(9)))], 1, 8, quiet)


def test_an_answer_without_tokens_is_refused(model):
    with pytest.raises(UsageError, match="an answer has no tokens"):
        score(model, [Request([1], [2]), Request([1], [])], 1, 8, quiet)


def test_context_tokens_are_computed_once_and_get_no_logits(model, monkeypatch):
    read, scored = [], []
    states, logits = CausalLM.states, CausalLM.logits
    monkeypatch.setattr(
        CausalLM, "states", lambda self, ids, *rest: read.append(ids.numel()) or states(self, ids, *rest)
    )
    monkeypatch.setattr(CausalLM, "logits", lambda self, hidden: scored.append(len(hidden)) or logits(self, hidden))
    context = list(range(100, 200))
    score(model, [Request(context, [answer]) for answer in (5, 6, 7)], 4, 512, quiet)
    assert (sum(read), sum(scored)) == (100, 1)


def test_logits_never_exceed_a_chunk(model, monkeypatch):
    seen = []
    inner = CausalLM.logits
    monkeypatch.setattr(CausalLM, "logits", lambda self, hidden: seen.append(len(hidden)) or inner(self, hidden))
    monkeypatch.setattr(likelihood, "chunk_tokens", lambda *_: 5)
    found = score(model, [Request([1], list(range(12)))], 1, 512, quiet)
    assert seen == [5, 5, 2]
    assert found[0].logprob == pytest.approx(alone(model, Request([1], list(range(12))))[0], abs=1e-4)


def test_progress_counts_requests(model):
    told = []
    score(model, questions(8192, 3), 2, 512, lambda done, total: told.append((done, total)))
    assert told[-1] == (15, 15)
    assert told == sorted(told)


def test_logits_that_are_not_numbers_are_an_error(books_5m):
    broken = load_model(books_5m, torch.float32, "cpu")
    broken.norm.weight[3] = math.nan
    with pytest.raises(NumericsError, match="logits are NaN or infinite"):
        score(broken, [Request([1, 2], [3])], 1, 512, quiet)


def test_nothing_asked_is_nothing_scored(model):
    assert score(model, [], 4, 512, quiet) == []
