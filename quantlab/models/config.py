"""What a checkpoint's config.json says about its decoder, as one frozen value for every family.

Knows nothing about tensors, files or `quantization_config`: `checkpoint` finds the file, `decoder` builds the model.
Defaults for missing keys are those of the transformers configuration class of the family.
"""

from dataclasses import dataclass
from typing import Any

from quantlab.errors import UnsupportedModel
from quantlab.models.fields import MISSING, Fields, shorten
from quantlab.models.rope_config import MAX_CONTEXT, RopeConfig, read_rope

DTYPES: tuple[str, ...] = ("bfloat16", "float16", "float32")
ACTIVATIONS: tuple[str, ...] = ("silu", "swish")


@dataclass(frozen=True, slots=True)
class Family:
    """How one architecture reads its config.json: which flags it has and what a missing key means."""

    model_type: str
    max_position: int
    kv_heads: int | None = None
    head_dim: int | None = None
    theta: float = 10000.0
    reads_attention_bias: bool = False
    always_qkv_bias: bool = False
    reads_mlp_bias: bool = False
    qk_norm: bool = False
    tied: bool = False
    window: str = "none"
    nope: bool = False


FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family("llama", 2048, reads_attention_bias=True, reads_mlp_bias=True),
    "MistralForCausalLM": Family("mistral", 131072, kv_heads=8, window="always"),
    "Qwen2ForCausalLM": Family("qwen2", 32768, kv_heads=32, always_qkv_bias=True, window="late layers"),
    "Qwen3ForCausalLM": Family(
        "qwen3", 32768, kv_heads=32, head_dim=128, reads_attention_bias=True, qk_norm=True, window="late layers"
    ),
    "SmolLM3ForCausalLM": Family(
        "smollm3",
        32768,
        kv_heads=4,
        theta=2e6,
        reads_attention_bias=True,
        reads_mlp_bias=True,
        tied=True,
        window="nope layers",
        nope=True,
    ),
}


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One decoder-only model. `windows[i]` is layer i's attention window in tokens, None for all of the past;
    `rope_layers[i]` is False for a layer without position embedding (NoPE)."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    hidden_act: str
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tie_word_embeddings: bool
    rope: RopeConfig
    windows: tuple[int | None, ...]
    rope_layers: tuple[bool, ...]
    max_position_embeddings: int
    dtype: str
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    def layer_window(self, layer: int) -> int | None:
        """How many tokens, itself included, a token of `layer` sees; None for all of the past."""
        return self.windows[layer]

    def uses_rope(self, layer: int) -> bool:
        """Whether `layer` rotates its queries and keys."""
        return self.rope_layers[layer]

    @classmethod
    def from_json(cls, raw: dict[str, Any], where: str) -> "ModelConfig":
        """The model described by `raw`, the object of the config.json at `where`.

        Raises UnsupportedModel for what quantlab does not know and CheckpointError for a missing or bad value.
        """
        fields = Fields(raw, where)
        architecture = _architecture(fields)
        family = FAMILIES[architecture]
        num_layers = fields.integer("num_hidden_layers", 1, 4096)
        max_position = fields.integer("max_position_embeddings", 1, MAX_CONTEXT, family.max_position)
        attention_bias = family.reads_attention_bias and fields.flag("attention_bias", False)
        rope_layers = _rope_layers(fields, family, num_layers)
        num_heads, num_kv_heads, head_dim = _heads(fields, family)
        vocab_size = fields.integer("vocab_size", 1, 1 << 24)
        return cls(
            architecture=architecture,
            vocab_size=vocab_size,
            hidden_size=fields.integer("hidden_size", 1, 1 << 20),
            intermediate_size=fields.integer("intermediate_size", 1, 1 << 22),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rms_norm_eps=fields.number("rms_norm_eps", 0.0, 1.0, 1e-6),
            hidden_act=_one_of(fields, "hidden_act", ACTIVATIONS, "silu"),
            qkv_bias=family.always_qkv_bias or attention_bias,
            o_bias=attention_bias,
            mlp_bias=family.reads_mlp_bias and fields.flag("mlp_bias", False),
            qk_norm=family.qk_norm,
            tie_word_embeddings=fields.flag("tie_word_embeddings", family.tied),
            rope=read_rope(raw, where, max_position, family.theta),
            windows=_windows(fields, family, rope_layers),
            rope_layers=rope_layers,
            max_position_embeddings=max_position,
            dtype=_dtype(fields),
            bos_token_id=next(iter(_token_ids(fields, "bos_token_id", vocab_size)), None),
            eos_token_ids=_token_ids(fields, "eos_token_id", vocab_size),
        )


def _architecture(fields: Fields) -> str:
    """The one name in `architectures`; the family of `model_type` only where no architecture is given."""
    listed = fields.raw.get("architectures")
    names = listed if isinstance(listed, list) else [listed] if listed else []
    by_type = {family.model_type: name for name, family in FAMILIES.items()}
    found = names[0] if len(names) == 1 else names or fields.raw.get("model_type")
    if isinstance(found, str) and (found in FAMILIES or (not names and found in by_type)):
        return by_type.get(found, found)
    shown = found if isinstance(found, str) and len(found) <= 80 else shorten(found)
    supported = ", ".join(FAMILIES)
    raise UnsupportedModel(f"architecture {shown} is not supported; supported: {supported}", where=fields.where)


def _one_of(fields: Fields, key: str, known: tuple[str, ...], default: str) -> str:
    value = fields.text(key, default)
    if value not in known:
        names = ", ".join(known)
        raise UnsupportedModel(f"{key} {shorten(value)} is not supported; supported: {names}", where=fields.where)
    return value


def _dtype(fields: Fields) -> str:
    key = "dtype" if fields.raw.get("dtype") is not None else "torch_dtype"
    return _one_of(fields, key, DTYPES, "float32")


def _heads(fields: Fields, family: Family) -> tuple[int, int, int]:
    hidden_size = fields.integer("hidden_size", 1, 1 << 20)
    heads = fields.integer("num_attention_heads", 1, 4096)
    # A null says "as many as heads"; only a key that is absent means the family's default.
    kv_default = heads if "num_key_value_heads" in fields.raw or family.kv_heads is None else family.kv_heads
    kv_heads = fields.integer("num_key_value_heads", 1, 4096, kv_default)
    if heads % kv_heads:
        raise fields.error(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    if fields.raw.get("head_dim") is None and family.head_dim is None and hidden_size % heads:
        raise fields.error(f"hidden_size {hidden_size} is not a multiple of num_attention_heads {heads}")
    head_dim = fields.integer("head_dim", 4, 4096, family.head_dim or hidden_size // heads)
    if head_dim % 2:
        raise fields.error(f"head_dim {head_dim} must be even")
    return heads, kv_heads, head_dim


def _rope_layers(fields: Fields, family: Family, num_layers: int) -> tuple[bool, ...]:
    if not family.nope:
        return (True,) * num_layers
    flags = fields.raw.get("no_rope_layers")
    if flags is None:
        interval = fields.integer("no_rope_layer_interval", 1, 4096, 4)
        return tuple((layer + 1) % interval != 0 for layer in range(num_layers))
    if not isinstance(flags, list) or len(flags) < num_layers or any(flag not in (0, 1) for flag in flags):
        raise fields.error(f"no_rope_layers must hold a 0 or 1 for each of {num_layers} layers")
    return tuple(bool(flag) for flag in flags[:num_layers])


def _windows(fields: Fields, family: Family, rope_layers: tuple[bool, ...]) -> tuple[int | None, ...]:
    window = _window(fields, family)
    slides = _sliding_layers(fields, family, rope_layers) if window else (False,) * len(rope_layers)
    kinds = tuple("sliding_attention" if slide else "full_attention" for slide in slides)
    listed = fields.raw.get("layer_types")
    if listed is None:
        return tuple(window if slide else None for slide in slides)
    if not isinstance(listed, list) or len(listed) != len(kinds):
        raise fields.error(f"layer_types must name each of {len(kinds)} layers")
    free_choice = window is not None and family.window in ("late layers", "nope layers")
    known = all(kind in ("sliding_attention", "full_attention") for kind in listed)
    if not known or (not free_choice and tuple(listed) != kinds):
        message = f"layer_types {shorten(listed)} does not fit this architecture and its sliding_window"
        raise UnsupportedModel(message, where=fields.where)
    return tuple(window if kind == "sliding_attention" else None for kind in listed)


def _window(fields: Fields, family: Family) -> int | None:
    if family.window == "none":
        return None
    if family.window != "always" and not fields.flag("use_sliding_window", False):
        return None
    if fields.raw.get("sliding_window", MISSING) is None:
        return None
    if family.window == "nope layers" and "sliding_window" not in fields.raw:
        return None
    return fields.integer("sliding_window", 1, MAX_CONTEXT, 4096)


def _sliding_layers(fields: Fields, family: Family, rope_layers: tuple[bool, ...]) -> tuple[bool, ...]:
    if family.window == "always":
        return (True,) * len(rope_layers)
    if family.window == "nope layers":
        return tuple(not rope for rope in rope_layers)
    first = fields.integer("max_window_layers", 0, 4096, 28)
    return tuple(layer >= first for layer in range(len(rope_layers)))


def _token_ids(fields: Fields, key: str, vocab_size: int) -> tuple[int, ...]:
    value = fields.raw.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
        raise fields.error(f"{key} must be token ids, not {shorten(value)}")
    # Some published configs name ids beyond the vocabulary (or -1 for none); no such token can occur.
    return tuple(i for i in ids if 0 <= i < vocab_size)
