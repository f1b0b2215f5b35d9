"""Greedy continuations in batches, against transformers and against each prompt alone."""

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from quantlab.checkpoint.load import load_model
from quantlab.errors import NumericsError
from quantlab.eval.generation import generate
from quantlab.models.decoder import CausalLM
from quantlab.text import Tokenizer

PROMPTS = ("The captain looked at", "It was", "Once upon a time there was a little girl who lived in", "He")
NEW_TOKENS = 12


def endless(tokens: list[int]) -> bool:
    """No text is ever finished."""
    return False


@pytest.fixture(scope="module")
def model(books_5m: Path) -> CausalLM:
    return load_model(books_5m, torch.float32, "cpu")


@pytest.fixture(scope="module")
def prompts(books_tokenizer: Tokenizer) -> list[list[int]]:
    return [books_tokenizer.encode(text) for text in PROMPTS]


def test_continuations_are_those_of_transformers(model, prompts, books_5m):
    reference = AutoModelForCausalLM.from_pretrained(books_5m, dtype=torch.float32).eval()
    for prompt, found in zip(prompts, generate(model, prompts, NEW_TOKENS, endless), strict=True):
        ids = torch.tensor([prompt])
        wanted = reference.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None
        )
        assert found == wanted[0, len(prompt) :].tolist()


@pytest.mark.gpu
def test_a_gpu_writes_what_the_cpu_writes(model, prompts, books_5m):
    there = generate(load_model(books_5m, torch.float32, "cuda"), prompts, NEW_TOKENS, endless)
    assert there == generate(model, prompts, NEW_TOKENS, endless)


def test_a_row_ends_when_it_is_finished_and_others_go_on(model, prompts):
    whole = generate(model, prompts, NEW_TOKENS, endless)
    stop = whole[0][2]
    found = generate(model, prompts, NEW_TOKENS, lambda tokens: tokens[-1] == stop)
    for row, full in zip(found, whole, strict=True):
        length = full.index(stop) + 1 if stop in full else NEW_TOKENS
        assert row == full[:length]
    assert len(found[0]) <= 3


def test_no_step_is_taken_once_every_row_has_ended(model, prompts, monkeypatch):
    steps = []
    inner = CausalLM.logits
    monkeypatch.setattr(CausalLM, "logits", lambda self, hidden: steps.append(1) or inner(self, hidden))
    generate(model, prompts, NEW_TOKENS, lambda tokens: len(tokens) == 2)
    assert len(steps) == 2


def test_logits_that_are_not_numbers_are_an_error(books_5m, prompts):
    broken = load_model(books_5m, torch.float32, "cpu")
    broken.norm.weight[0] = math.inf
    with pytest.raises(NumericsError, match="logits are NaN or infinite"):
        generate(broken, prompts, 2, endless)
