"""Attention and its cache: what each token may see, and that a cache changes nothing."""

import pytest
import torch

from quantlab.models.attention import CachedAttention, DenseAttention, KVCache, MaskedAttention, causal_mask
from quantlab.models.config import ModelConfig

CONFIG = ModelConfig.from_json(
    {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 8,
        "hidden_size": 32,
        "intermediate_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "config.json",
)


def random_qkv(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, heads, tokens, 8, generator=generator) for heads in (4, 2, 2))


def by_hand(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
    """The definition, one head and one token at a time."""
    out = torch.empty_like(q)
    for head in range(4):
        for t in range(q.shape[2]):
            seen = slice(max(0, t - window + 1), t + 1)
            scores = (q[:, head, t, None] * k[:, head // 2, seen]).sum(-1) / 8**0.5
            out[:, head, t] = (scores.softmax(-1)[..., None] * v[:, head // 2, seen]).sum(1)
    return out


@pytest.mark.parametrize("window", [None, 1, 5, 13, 14])
def test_dense_attention_follows_the_definition(window):
    q, k, v = random_qkv(13)
    torch.testing.assert_close(DenseAttention(window)(q, k, v), by_hand(q, k, v, window or 13))


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("split", [(13,), (5, 8), (1,) * 13, (6, 1, 1, 5)])
def test_cached_attention_equals_dense_attention(window, split):
    q, k, v = random_qkv(13)
    cache = KVCache(CONFIG, batch=2, capacity=13, dtype=torch.float32, device="cpu")
    parts = []
    for chunk in zip(*(x.split(split, dim=2) for x in (q, k, v)), strict=True):
        parts.append(CachedAttention(cache, layer=1, window=window)(*chunk))
        cache.advance(chunk[0].shape[2])
    torch.testing.assert_close(torch.cat(parts, dim=2), DenseAttention(window)(q, k, v))


@pytest.mark.parametrize("window", [None, 4])
def test_masked_attention_with_a_causal_mask_is_causal_attention(window):
    q, k, v = random_qkv(13)
    mask = causal_mask(13, 13, window, q.device)[None, None]
    torch.testing.assert_close(MaskedAttention(mask)(q, k, v), by_hand(q, k, v, window or 13))


def test_masked_attention_takes_a_mask_for_each_row():
    q, k, v = random_qkv(6)
    alone = torch.eye(6, dtype=torch.bool)
    mask = torch.stack((causal_mask(6, 6, None, q.device), alone))[:, None]
    out = MaskedAttention(mask)(q, k, v)
    torch.testing.assert_close(out[0], by_hand(q, k, v, 6)[0])
    torch.testing.assert_close(out[1], v[1].repeat_interleave(2, dim=0))


def test_cache_layers_do_not_share_memory():
    _, k, v = random_qkv(3)
    cache = KVCache(CONFIG, batch=2, capacity=4, dtype=torch.float32, device="cpu")
    cache.write(0, k, v)
    assert cache.keys[1].abs().sum() == 0
    assert torch.equal(cache.values[0][:, :, :3], v)


def test_cache_refuses_to_overflow():
    _, k, v = random_qkv(5)
    with pytest.raises(AssertionError, match="5 tokens in a cache of 4"):
        KVCache(CONFIG, batch=2, capacity=4, dtype=torch.float32, device="cpu").write(0, k, v)


def test_mask_of_the_last_queries_is_the_end_of_the_whole_mask():
    whole = causal_mask(6, 6, 3, torch.device("cpu"))
    assert torch.equal(causal_mask(2, 6, 3, torch.device("cpu")), whole[-2:])
    assert whole.sum(dim=1).tolist() == [1, 2, 3, 3, 3, 3]
