"""Every number of a request has bounds, and what is outside is named in a sentence."""

import math

import pytest

from quantlab.errors import UsageError
from quantlab.runtime.checks import check_request
from tests.runtime.scripted import INFO, VOCAB, ask

NAN, INFINITE = math.nan, math.inf


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        ((), {}, "no token"),
        ((1, VOCAB), {}, "from 0 to 49"),
        ((-1,), {}, "from 0 to 49"),
        ((1,) * 64, {}, "64 tokens, the longest that can be continued here has 63"),
        ((1,) * 64, {"max_tokens": None}, "64 tokens"),
        ((1,) * 65, {"max_tokens": 0}, "65 tokens"),
        ((1,), {"max_tokens": -1}, "max_tokens is -1"),
        ((1,), {"min_tokens": 17}, "min_tokens is 17, not from 0 to 16"),
        ((1,), {"min_tokens": -1}, "min_tokens"),
        *(((1,), {"temperature": value}, "temperature is") for value in (-0.1, NAN, INFINITE)),
        *(((1,), {"top_p": value}, "top_p is") for value in (0.0, 1.1, NAN)),
        *(((1,), {"min_p": value}, "min_p is") for value in (-0.1, 1.1, NAN)),
        ((1,), {"top_k": -1}, "top_k is -1"),
        *(((1,), {"repetition_penalty": value}, "repetition_penalty is") for value in (0.0, -1.0, NAN, INFINITE)),
        *(((1,), {"presence_penalty": value}, "presence_penalty is") for value in (NAN, -INFINITE)),
        *(((1,), {"frequency_penalty": value}, "frequency_penalty is") for value in (NAN, INFINITE)),
        ((1,), {"logit_bias": ((3, NAN),)}, "logit_bias is nan"),
        ((1,), {"logit_bias": ((VOCAB, 1.0),)}, "must name tokens from 0 to 49"),
        ((1,), {"stop_token_ids": (-1,)}, "must name tokens from 0 to 49"),
        ((1,), {"seed": -1}, "seed is -1"),
        ((1,), {"seed": 1 << 64}, "seed is"),
        ((1,), {"logprobs": -1}, "logprobs is -1"),
        ((1,), {"prompt_logprobs": VOCAB + 1}, "prompt_logprobs is 51"),
    ],
)
def test_what_cannot_run_is_refused_in_a_sentence(
    prompt: tuple[int, ...], settings: dict[str, object], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        check_request(ask("a", prompt, **settings), INFO)


@pytest.mark.parametrize(
    ("prompt", "settings"),
    [
        ((0, VOCAB - 1), {}),
        ((1,) * 63, {"max_tokens": None, "min_tokens": 64}),
        ((1,) * 64, {"max_tokens": 0}),
        ((1,), {"temperature": 0.0, "top_p": 1e-9, "min_p": 1.0, "repetition_penalty": 1e-9}),
        ((1,), {"seed": (1 << 64) - 1, "logprobs": VOCAB, "logit_bias": ((0, -100.0),), "stop_token_ids": (0,)}),
    ],
)
def test_the_bounds_themselves_are_allowed(prompt: tuple[int, ...], settings: dict[str, object]) -> None:
    request = ask("a", prompt, **settings)
    assert check_request(request, INFO) is None
