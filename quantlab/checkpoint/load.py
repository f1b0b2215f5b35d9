"""A model from a folder, 16-bit or packed, whole or one block at a time.

Packed weights are dequantized, so this runs wherever torch does and says what the file means; W8A8 layers also
quantize their input, as engines do. Knows nothing about how codes were chosen.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from quantlab.checkpoint.linear import W8A8Linear
from quantlab.checkpoint.model_folder import ModelFolder, open_model
from quantlab.checkpoint.packed import from_disk
from quantlab.checkpoint.reader import TensorReader
from quantlab.models.config import ModelConfig
from quantlab.models.decoder import CausalLM, build_block, build_model
from quantlab.models.layers import DecoderBlock
from quantlab.models.naming import (
    EMBEDDING,
    LM_HEAD,
    block_linear_shapes,
    block_prefix,
    block_tensor_shapes,
    linear_shapes,
)
from quantlab_kernels.layout import QuantizedWeight
from quantlab_kernels.ref import dequantize


def load_model(folder: Path, dtype: torch.dtype, device: torch.device | str) -> CausalLM:
    """The model in `folder` on `device`, its floats in `dtype`; raises CheckpointError or UnsupportedModel."""
    weights = ModelWeights(open_model(folder), dtype, device)
    model = build_model(weights.config, weights.tensor, dtype, device)
    for name in linear_shapes(weights.config):
        replacement = weights.replacement(name, _bias(model.linear(name)))
        if replacement is not None:
            model.set_linear(name, replacement)
    return model.eval()


def load_head(folder: Path, dtype: torch.dtype, device: torch.device | str) -> nn.Module:
    """The output layer alone of the model in `folder`, exactly as `load_model` gives it; raises the same errors."""
    weights = ModelWeights(open_model(folder), dtype, device)
    config = weights.config
    with torch.device("meta"):
        head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
    tensor = weights.tensor(EMBEDDING if config.tie_word_embeddings else LM_HEAD).to(device, dtype)
    head.weight = nn.Parameter(tensor, requires_grad=False)
    replacement = weights.replacement("lm_head", None) if "lm_head" in linear_shapes(config) else None
    return (replacement or head).eval()


class ModelWeights:
    """The weights of an opened folder as a model wants them, read when asked for; holds nothing between calls."""

    def __init__(self, folder: ModelFolder, dtype: torch.dtype, device: torch.device | str):
        self.config: ModelConfig = folder.config
        self.dtype, self.device = dtype, device
        self._schemes = folder.schemes
        self._shapes = linear_shapes(folder.config)
        self._reader = TensorReader(folder.checkpoint)

    def tensor(self, name: str) -> Tensor:
        """A float tensor by its 16-bit name; a packed weight comes dequantized.

        The weight of a W8A8 layer comes as zeros that take no memory: `replacement` is what runs.
        """
        module = name.removesuffix(".weight")
        scheme = self._schemes.get(module) if module != name else None
        if scheme is None:
            return self._reader.tensor(name)
        if scheme.quantizes_activations:
            return torch.zeros((), dtype=self.dtype, device=self.device).expand(self._shapes[module])
        return dequantize(self.quantized(module))

    def quantized(self, module: str) -> QuantizedWeight:
        """The codes and scales of a quantized linear, scales in the dtype in which their product with codes is taken.

        That is what transformers 5.23 does with the same file: the run's dtype for symmetric weights, which it keeps
        packed until they run, and the stored dtype for asymmetric ones, which it can only dequantize while loading.
        """
        scheme = self._schemes[module]
        assert scheme is not None, module
        q = from_disk(module, scheme, self._shapes[module], self._reader.tensor)
        zeros = None if q.zeros is None else q.zeros.to(self.device)
        scales = q.scales.to(self.device, self.dtype if scheme.symmetric else q.scales.dtype)
        return QuantizedWeight(q.codes.to(self.device), scales, zeros, q.group_size)

    def replacement(self, module: str, bias: Tensor | None) -> nn.Module | None:
        """The layer to run instead of an nn.Linear, or None where the dequantized weight is all there is to it."""
        scheme = self._schemes[module]
        if scheme is None or not scheme.quantizes_activations:
            return None
        return W8A8Linear(self.quantized(module), bias)

    def block(self, layer: int) -> DecoderBlock:
        """Decoder block `layer`, ready to run."""
        prefix = block_prefix(layer)
        weights = {name: self.tensor(prefix + name) for name in block_tensor_shapes(self.config)}
        block = build_block(self.config, layer, weights, self.dtype, self.device)
        for name in block_linear_shapes(self.config):
            parent, _, child = name.rpartition(".")
            replacement = self.replacement(prefix + name, _bias(block.get_submodule(name)))
            if replacement is not None:
                setattr(block.get_submodule(parent), child, replacement)
        return block.eval()


def _bias(linear: nn.Module) -> Tensor | None:
    assert isinstance(linear, nn.Linear)
    return linear.bias
