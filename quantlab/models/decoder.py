"""The whole decoder: embedding, blocks, final norm and output layer, and how to build them from named tensors.

Knows nothing about files, tokenizers or quantization; `checkpoint` supplies the tensors.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from quantlab.models.attention import Attend, CachedAttention, DenseAttention, KVCache
from quantlab.models.config import ModelConfig
from quantlab.models.layers import DecoderBlock, RMSNorm
from quantlab.models.naming import EMBEDDING, FINAL_NORM, LM_HEAD, block_prefix, block_tensor_shapes
from quantlab.models.rope import Rope


class CausalLM(nn.Module):
    """A decoder-only language model of any supported family; a tied lm_head shares the embedding's weight."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.rope = Rope(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(DecoderBlock(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head: nn.Module = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def hidden(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """ids: [B, T] int64 -> states after the final norm: [B, T, hidden]; a cache takes the tokens in."""
        start = 0 if cache is None else cache.length
        positions = torch.arange(start, start + ids.shape[1], device=ids.device)
        states = self.states(ids, positions, lambda layer: self._attend(layer, cache))
        if cache is not None:
            cache.advance(ids.shape[1])
        return states

    def states(self, ids: Tensor, positions: Tensor, attend: Callable[[int], Attend]) -> Tensor:
        """ids: [B, T] int64 at positions: [T] or [B, T] int64 -> states after the final norm: [B, T, hidden].

        `attend` gives each layer's attention, which decides what each token sees.
        """
        tables = self.rope.tables(positions)
        x = self.embed_tokens(ids)
        for layer, block in enumerate(self.blocks):
            x = block(x, tables if self.config.uses_rope(layer) else None, attend(layer))
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: [.., hidden] -> [.., vocab]."""
        return self.lm_head(hidden)

    def forward(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """ids: [B, T] int64 -> logits: [B, T, vocab]; with a cache, ids continue what it holds."""
        return self.logits(self.hidden(ids, cache))

    def linear(self, name: str) -> nn.Module:
        """The linear with that full module name, such as `model.layers.3.mlp.up_proj` or `lm_head`."""
        return self.get_submodule(_attribute(name))

    def set_linear(self, name: str, module: nn.Module) -> None:
        """Put `module` in the place of the linear with that full module name."""
        parent, _, child = _attribute(name).rpartition(".")
        setattr(self.get_submodule(parent), child, module)

    def _attend(self, layer: int, cache: KVCache | None) -> Attend:
        window = self.config.layer_window(layer)
        return DenseAttention(window) if cache is None else CachedAttention(cache, layer, window)


def _attribute(name: str) -> str:
    return name.replace("model.layers.", "blocks.", 1)


def build_block(
    config: ModelConfig, layer: int, weights: dict[str, Tensor], dtype: torch.dtype, device: torch.device | str
) -> DecoderBlock:
    """Block `layer` from its tensors by block-relative name, none trainable until asked.

    No memory is spent on initial values; a tensor that already has the dtype and device is used, not copied.
    """
    with torch.device("meta"):
        block = DecoderBlock(config)
    expected = block_tensor_shapes(config).keys()
    assert weights.keys() == expected, f"layer {layer}: {sorted(weights.keys() ^ expected)}"
    block.load_state_dict({name: weight.to(device, dtype) for name, weight in weights.items()}, assign=True)
    return block.requires_grad_(False)


def build_model(
    config: ModelConfig, tensor: Callable[[str], Tensor], dtype: torch.dtype, device: torch.device | str
) -> CausalLM:
    """The model with tensors read one by one by full name, none trainable until asked."""
    with torch.device("meta"):
        model = CausalLM(config)
    for layer in range(config.num_layers):
        prefix = block_prefix(layer)
        # Converted one by one, so that no second copy of a whole block exists.
        weights = {name: tensor(prefix + name).to(device, dtype) for name in block_tensor_shapes(config)}
        model.blocks[layer] = build_block(config, layer, weights, dtype, device)
    model.embed_tokens.weight = _frozen(tensor(EMBEDDING).to(device, dtype))
    model.norm.weight = _frozen(tensor(FINAL_NORM).to(device, dtype))
    tied = config.tie_word_embeddings
    model.lm_head.weight = model.embed_tokens.weight if tied else _frozen(tensor(LM_HEAD).to(device, dtype))
    return model


def _frozen(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight, requires_grad=False)
