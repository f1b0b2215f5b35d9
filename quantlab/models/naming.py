"""Names and shapes of every tensor a model has, in the order of its layers.

Knows nothing about tensors or files: shapes are tuples, names are those of Hugging Face checkpoints.
"""

from quantlab.models.config import ModelConfig

Shape = tuple[int, ...]

# Linears of a block that share one input, in the order of computation; each group must share one scheme.
INPUT_GROUPS: tuple[tuple[str, ...], ...] = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
LM_HEAD = "lm_head.weight"


def block_prefix(layer: int) -> str:
    """What a block's tensor names begin with in the file."""
    return f"model.layers.{layer}."


def block_linear_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Block-relative module name -> (N, K) of each linear of a block."""
    hidden, mlp = config.hidden_size, config.intermediate_size
    query, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return {
        "self_attn.q_proj": (query, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, query),
        "mlp.gate_proj": (mlp, hidden),
        "mlp.up_proj": (mlp, hidden),
        "mlp.down_proj": (hidden, mlp),
    }


def block_tensor_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Block-relative tensor name -> shape of everything a block holds."""
    shapes: dict[str, Shape] = {"input_layernorm.weight": (config.hidden_size,)}
    for name, shape in block_linear_shapes(config).items():
        shapes[f"{name}.weight"] = shape
        if has_bias(config, name):
            shapes[f"{name}.bias"] = shape[:1]
        if name == "self_attn.o_proj":
            shapes |= _qk_norms(config)
            shapes["post_attention_layernorm.weight"] = (config.hidden_size,)
    return shapes


def has_bias(config: ModelConfig, name: str) -> bool:
    """Whether the linear `name` (block-relative) adds a bias."""
    if name == "self_attn.o_proj":
        return config.o_bias
    return config.qkv_bias if name.startswith("self_attn.") else config.mlp_bias


def _qk_norms(config: ModelConfig) -> dict[str, Shape]:
    if not config.qk_norm:
        return {}
    return {f"self_attn.{side}_norm.weight": (config.head_dim,) for side in "qk"}


def tensor_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Full tensor name -> shape of all that the model needs: embedding, blocks, final norm, untied lm_head."""
    shapes: dict[str, Shape] = {EMBEDDING: (config.vocab_size, config.hidden_size)}
    for layer in range(config.num_layers):
        prefix = block_prefix(layer)
        shapes |= {prefix + name: shape for name, shape in block_tensor_shapes(config).items()}
    shapes[FINAL_NORM] = (config.hidden_size,)
    if not config.tie_word_embeddings:
        shapes[LM_HEAD] = (config.vocab_size, config.hidden_size)
    return shapes


def linear_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Full module name -> (N, K) of every linear that could be quantized; a tied lm_head is not one."""
    block = block_linear_shapes(config)
    layers = range(config.num_layers)
    shapes = {block_prefix(layer) + name: shape for layer in layers for name, shape in block.items()}
    if not config.tie_word_embeddings:
        shapes["lm_head"] = (config.vocab_size, config.hidden_size)
    return shapes
