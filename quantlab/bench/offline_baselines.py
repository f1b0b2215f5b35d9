"""transformers on random weights of the same shapes: its static `generate`, and its continuous batching.

Both in bf16 with its SDPA attention, as it is shipped; static batches are padded to one length, which here all
requests have. Knows nothing about our engine.
"""

import random
import time
from dataclasses import asdict
from typing import Any

import torch
import transformers

from quantlab.bench.offline_options import Work
from quantlab.models.config import ModelConfig

# Requests that a static batch holds, as many as our own engine has under way.
STATIC_BATCH = 256


def hub_config(config: ModelConfig) -> transformers.LlamaConfig:
    """The same shapes for transformers; no token ends a text."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": config.rope.theta,
        "factor": config.rope.factor,
        "low_freq_factor": config.rope.low_freq_factor,
        "high_freq_factor": config.rope.high_freq_factor,
        "original_max_position_embeddings": config.rope.max_position,
    }
    return transformers.LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.rms_norm_eps,
        max_position_embeddings=config.max_position_embeddings,
        rope_parameters=rope,
        tie_word_embeddings=config.tie_word_embeddings,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )


def random_model(config: ModelConfig, device: str) -> Any:
    """The model in bf16 on `device`, small random weights."""
    where = "cuda" if device == "auto" else device
    with torch.device("meta"):
        model: Any = transformers.LlamaForCausalLM(hub_config(config))
    model = model.to(torch.bfloat16).to_empty(device=where).eval()
    generator = torch.Generator(where).manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.02, generator=generator)
    # to_empty leaves buffers undefined; the rotary one is made anew from the configuration.
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(where)
    return model


def static_generate(config: ModelConfig, device: str, work: Work) -> dict[str, Any]:
    """Batch after batch of STATIC_BATCH requests through `generate`"""
    prompt, output, count = work.prompt, work.output, work.requests
    model = random_model(config, device)
    size = min(count, STATIC_BATCH)
    ids = torch.randint(config.vocab_size, (count, prompt), device=model.device)

    def generate(rows: torch.Tensor, tokens: int) -> None:
        mask = torch.ones_like(rows)
        model.generate(rows, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)

    generate(ids[:size], 4)
    begin = time.perf_counter()
    for rows in ids.split(size):
        generate(rows, output)
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return _row(work, time.perf_counter() - begin) | {"batch": size}


def continuous_batching(config: ModelConfig, device: str, work: Work) -> dict[str, Any]:
    """All requests through `generate_batch`"""
    prompt, output, count = work.prompt, work.output, work.requests
    model = random_model(config, device)
    model.set_attn_implementation("sdpa")
    draw = random.Random(0)
    inputs = [draw.choices(range(config.vocab_size), k=prompt) for _ in range(count)]
    settings = transformers.GenerationConfig(
        max_new_tokens=output, min_new_tokens=output, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    model.generate_batch(inputs[:2], generation_config=settings, max_new_tokens=4)
    begin = time.perf_counter()
    found = model.generate_batch(inputs, generation_config=settings)
    seconds = time.perf_counter() - begin
    made = sum(len(result.generated_tokens) for result in found.values())
    return _row(work, seconds) | {"generated": made, "output_rate": made / seconds}


def _row(work: Work, seconds: float) -> dict[str, Any]:
    rate = {"output_rate": work.requests * work.output / seconds}
    return asdict(work) | {"seconds": seconds} | rate
