"""Whether a request can be run at all: every number of it has bounds, whoever sends it.

Knows nothing about what else runs; what a server allows may be less.
"""

import math
from collections.abc import Iterator

from quantlab.errors import UsageError
from quantlab.runtime.options import EngineInfo
from quantlab.runtime.request import Request, SamplingParams

LARGEST = 1e6  # of a penalty, bias or temperature: beyond it float32 scores stop being numbers
SEEDS = 1 << 64


def check_request(request: Request, info: EngineInfo) -> None:
    """Raises UsageError with one sentence when `request` can never run on an engine like `info`."""
    for problem in (*_prompt_problems(request, info), *_sampling_problems(request.params, info)):
        raise UsageError(problem, where=f"request {request.request_id}")


def _prompt_problems(request: Request, info: EngineInfo) -> Iterator[str]:
    prompt = request.prompt_ids
    room = info.max_model_len - (request.params.max_tokens != 0)
    if not prompt:
        yield "the prompt has no token"
    elif len(prompt) > room:
        yield f"the prompt has {len(prompt)} tokens, the longest that can be continued here has {room}"
    elif not _known(prompt, info):
        yield f"token ids of the prompt must be from 0 to {info.vocab_size - 1}"


def _sampling_problems(params: SamplingParams, info: EngineInfo) -> Iterator[str]:
    """What is wrong with the settings; comparisons are such that NaN is wrong too."""
    most = info.max_model_len if params.max_tokens is None else params.max_tokens
    if most < 0:
        yield f"max_tokens is {most}, less than 0"
    if not 0 <= params.min_tokens <= most:
        yield f"min_tokens is {params.min_tokens}, not from 0 to {most}"
    for name, value, least in (
        ("temperature", params.temperature, 0.0),
        ("repetition_penalty", params.repetition_penalty, math.ulp(0.0)),
        ("presence_penalty", params.presence_penalty, -LARGEST),
        ("frequency_penalty", params.frequency_penalty, -LARGEST),
        *(("logit_bias", bias, -LARGEST) for _, bias in params.logit_bias),
    ):
        if not least <= value <= LARGEST:
            yield f"{name} is {value}, not from {least:g} to {LARGEST:g}"
    if not 0.0 < params.top_p <= 1.0:
        yield f"top_p is {params.top_p}, not above 0 and at most 1"
    if not 0.0 <= params.min_p <= 1.0:
        yield f"min_p is {params.min_p}, not from 0 to 1"
    if params.top_k < 0:
        yield f"top_k is {params.top_k}, less than 0"
    if params.seed is not None and not 0 <= params.seed < SEEDS:
        yield f"seed is {params.seed}, not from 0 to 2^64 - 1"
    for name, count in (("logprobs", params.logprobs), ("prompt_logprobs", params.prompt_logprobs)):
        if count is not None and not 0 <= count <= info.vocab_size:
            yield f"{name} is {count}, not from 0 to {info.vocab_size}"
    if not _known((*params.stop_token_ids, *(token for token, _ in params.logit_bias)), info):
        yield f"stop_token_ids and logit_bias must name tokens from 0 to {info.vocab_size - 1}"


def _known(ids: tuple[int, ...], info: EngineInfo) -> bool:
    return not ids or (min(ids) >= 0 and max(ids) < info.vocab_size)
