"""Our decoder against transformers: same folder, same tokens, same logits."""

from typing import Any

import pytest
import torch

from quantlab.models.attention import KVCache

TOLERANCE = 1e-4
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 16}
WINDOW = {"use_sliding_window": True, "sliding_window": 5}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-untied": ("llama", {"tie_word_embeddings": False}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-one-kv-head": ("llama", {"num_key_value_heads": 1}),
    "llama-no-grouping": ("llama", {"num_key_value_heads": 4}),
    "llama-wide-heads": ("llama", {"head_dim": 16}),
    "llama-theta": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0}}),
    "llama-dynamic": (
        "llama",
        {"max_position_embeddings": 16, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
    ),
    "llama-llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama-yarn": ("llama", {"rope_parameters": YARN}),
    "llama-yarn-mscale": ("llama", {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}}),
    "llama-yarn-attention-factor": ("llama", {"rope_parameters": YARN | {"attention_factor": 0.8}}),
    "llama-yarn-not-truncated": (
        "llama",
        {"head_dim": 32, "rope_parameters": YARN | {"truncate": False, "beta_fast": 4.0, "beta_slow": 0.5}},
    ),
    "mistral-full": ("mistral", {"sliding_window": None}),
    "mistral-window": ("mistral", {"sliding_window": 5}),
    "mistral-wide-heads": ("mistral", {"sliding_window": 7, "head_dim": 12}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied-yarn": ("qwen2", {"tie_word_embeddings": True, "rope_parameters": YARN}),
    "qwen2-late-windows": ("qwen2", WINDOW | {"max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3-default-head-dim": ("qwen3", {"tie_word_embeddings": True}),
    "qwen3-biases": ("qwen3", {"head_dim": 8, "attention_bias": True}),
    "qwen3-listed-windows": (
        "qwen3",
        WINDOW | {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "smollm3": ("smollm3", {"num_hidden_layers": 5}),
    "smollm3-interval": ("smollm3", {"no_rope_layer_interval": 2, "tie_word_embeddings": False}),
    "smollm3-listed-nope": ("smollm3", {"no_rope_layers": [0, 1, 0]}),
    "smollm3-nope-windows": ("smollm3", WINDOW | {"no_rope_layer_interval": 2, "attention_bias": True}),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request, tiny_reference, load_tiny):
    """(transformers model, our model, 2 x 40 token ids) of one case."""
    reference, folder = tiny_reference(*request.param)
    ids = torch.randint(0, 96, (2, 40), generator=torch.Generator().manual_seed(3))
    return reference, load_tiny(folder), ids


@torch.no_grad()
def test_prefill_logits_match_transformers(case):
    reference, model, ids = case
    expected = reference(ids).logits
    assert expected.std() > 0.3, "logits too small for the tolerance to mean anything"
    assert (model(ids) - expected).abs().max() <= TOLERANCE


@torch.no_grad()
def test_step_by_step_decode_matches_transformers(case):
    reference, model, ids = case
    cache = KVCache(model.config, batch=2, capacity=40, dtype=torch.float32, device="cpu")
    past = None
    for start, end in [(0, 9), *((i, i + 1) for i in range(9, 40))]:
        answer = reference(ids[:, start:end], past_key_values=past, use_cache=True)
        past = answer.past_key_values
        assert (model(ids[:, start:end], cache) - answer.logits).abs().max() <= TOLERANCE, f"tokens {start}:{end}"


@pytest.mark.parametrize("name", ["llama-biases", "mistral-window", "qwen3", "smollm3-nope-windows"])
def test_gradients_match_transformers(name, tiny_reference, load_tiny):
    reference, folder = tiny_reference(*CASES[name])
    model = load_tiny(folder).requires_grad_(True)
    ids = torch.arange(24).view(1, 24)
    reference(ids).logits.square().mean().backward()
    model(ids).square().mean().backward()
    ours = {name.replace("blocks.", "layers."): p.grad for name, p in model.named_parameters()}
    theirs = {name.removeprefix("model."): p.grad for name, p in reference.named_parameters()}
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("name", ["llama-llama3", "mistral-window", "qwen2", "qwen3", "smollm3"])
@torch.no_grad()
def test_bfloat16_is_as_exact_as_transformers(name, tiny_reference, load_tiny):
    reference, folder = tiny_reference(*CASES[name])
    ids = torch.randint(0, 96, (4, 40), generator=torch.Generator().manual_seed(3))
    exact = reference(ids).logits
    ours, theirs = load_tiny(folder, torch.bfloat16)(ids), reference.bfloat16()(ids).logits
    assert ours.dtype == torch.bfloat16
    assert (ours - exact).square().mean() <= 1.2 * (theirs - exact).square().mean()


@torch.no_grad()
def test_prefill_in_chunks_equals_one_prefill(tiny_reference, load_tiny):
    _, folder = tiny_reference(*CASES["mistral-window"])
    model = load_tiny(folder)
    ids = torch.randint(0, 96, (1, 30))
    cache = KVCache(model.config, batch=1, capacity=30, dtype=torch.float32, device="cpu")
    chunks = [model(part, cache) for part in ids.split(11, dim=1)]
    torch.testing.assert_close(torch.cat(chunks, dim=1), model(ids), rtol=0, atol=TOLERANCE)
