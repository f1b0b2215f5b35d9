"""Models of known shapes with random weights, made on the device in moments: what speed does not depend on is not read.

Codes are uniform over their range, scales such that activations stay of order one through any number of layers.
"""

import torch
from torch import Tensor

from quantlab.models.config import ModelConfig
from quantlab.models.naming import EMBEDDING, linear_shapes, tensor_shapes
from quantlab.models.rope_config import RopeConfig
from quantlab.runtime.linears import RawLinear
from quantlab.schemes import Scheme
from quantlab_kernels.layout import QuantizedWeight

LLAMA3_ROPE = RopeConfig("llama3", 500000.0, 8192, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
# Name -> (vocabulary, hidden, intermediate, layers, heads, KV heads, head_dim, tied).
SHAPES: dict[str, tuple[int, int, int, int, int, int, int, bool]] = {
    "llama-3.1-8b": (128256, 4096, 14336, 32, 32, 8, 128, False),
    "llama-3.2-1b": (128256, 2048, 8192, 16, 32, 8, 64, True),
    "qwen3-0.6b": (151936, 1024, 3072, 28, 16, 8, 128, True),
    "llama-500m": (32000, 1536, 4096, 18, 12, 4, 128, False),
    "tiny": (512, 256, 512, 2, 4, 2, 64, False),
}
SCHEMES: dict[str, Scheme | None] = {
    "bf16": None,
    "int4": Scheme("w4a16", 128),
    "int8": Scheme("w8a8", None),
    "int8-weights": Scheme("w8a16", None),
}


def random_config(shape: str, dtype: str = "bfloat16") -> ModelConfig:
    """The configuration of a named shape; no token ends a text."""
    vocab, hidden, intermediate, layers, heads, kv_heads, head_dim, tied = SHAPES[shape]
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=1e-5,
        hidden_act="silu",
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        qk_norm=False,
        tie_word_embeddings=tied,
        rope=LLAMA3_ROPE,
        windows=(None,) * layers,
        rope_layers=(True,) * layers,
        max_position_embeddings=131072,
        dtype=dtype,
        bos_token_id=None,
        eos_token_ids=(),
    )


class RandomSource:
    """Random weights of `config` by name, linears but for lm_head in `scheme`."""

    def __init__(self, config: ModelConfig, scheme: Scheme | None, dtype: torch.dtype, device: torch.device):
        self.config = config
        self.scheme, self.dtype, self.device = scheme, dtype, device
        self._linears = linear_shapes(config)
        self._tensors = tensor_shapes(config)
        self._generator = torch.Generator(device).manual_seed(0)

    def tensor(self, name: str) -> Tensor:
        """An embedding of unit variance, or norm weights of one."""
        shape = self._tensors[name]
        if name == EMBEDDING:
            return self._normal(shape, 1.0)
        return torch.ones(shape, dtype=self.dtype, device=self.device)

    def linear(self, module: str) -> RawLinear:
        """A linear whose outputs have the variance of its inputs, divided by the depth where they are added up."""
        rows, columns = self._linears[module]
        deviation = columns**-0.5
        if module.endswith(("o_proj", "down_proj")):
            deviation *= (2 * self.config.num_layers) ** -0.5
        if self.scheme is None or module == "lm_head":
            return RawLinear(self._normal((rows, columns), deviation), None, None)
        return RawLinear(self._codes(rows, columns, deviation, self.scheme), self.scheme, None)

    def read_ahead(self, prefix: str) -> None:
        """Nothing is read."""

    def _codes(self, rows: int, columns: int, deviation: float, scheme: Scheme) -> QuantizedWeight:
        low, high = scheme.code_min, scheme.code_max + 1
        codes = torch.randint(
            low, high, (rows, columns), dtype=torch.int8, device=self.device, generator=self._generator
        )
        uniform = (high - low) / 12**0.5  # the deviation of a uniform code
        scales = torch.full((rows, scheme.groups(columns)), deviation / uniform, device=self.device)
        scales *= torch.rand(scales.shape, device=self.device, generator=self._generator) + 0.5
        return QuantizedWeight(codes, scales.to(self.dtype), None, scheme.group_size or columns)

    def _normal(self, shape: tuple[int, ...], deviation: float) -> Tensor:
        values = torch.empty(shape, dtype=self.dtype, device=self.device)
        return values.normal_(0.0, deviation, generator=self._generator)
