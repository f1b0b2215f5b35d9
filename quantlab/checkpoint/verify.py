"""Reads a finished folder back and compares it with what was meant: nothing is published before this passes.

Streams: one module's weight or one block is in memory at a time. Knows nothing about how the weights were solved.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from quantlab.checkpoint.load import ModelWeights
from quantlab.checkpoint.model_folder import ModelFolder, open_model
from quantlab.checkpoint.packed import from_disk
from quantlab.checkpoint.reader import TensorReader
from quantlab.errors import CheckpointError, UnsupportedModel, VerificationError
from quantlab.models.attention import DenseAttention
from quantlab.models.layers import RMSNorm
from quantlab.models.naming import EMBEDDING, FINAL_NORM, LM_HEAD, linear_shapes
from quantlab.models.rope import block_rope
from quantlab.schemes import Scheme
from quantlab_kernels.layout import QuantizedWeight


def verify_folder(folder: Path, schemes: Mapping[str, Scheme | None]) -> ModelFolder:
    """Reopens `folder`: every name, dtype and shape, and the scheme of every linear as `schemes` has it.

    Raises VerificationError that carries what a reader of the folder would have met.
    """
    try:
        model = open_model(folder)
    except (CheckpointError, UnsupportedModel) as error:
        raise VerificationError(f"cannot be read back: {error.message}", where=error.where) from error
    for name in linear_shapes(model.config):
        if model.schemes[name] != schemes.get(name):
            message = f"reads back as {_label(model.schemes[name])}, was solved as {_label(schemes.get(name))}"
            raise VerificationError(message, where=f"{folder / 'config.json'}: {name}")
    return model


def verify_codes(model: ModelFolder, solved: Callable[[str], QuantizedWeight]) -> int:
    """Decodes every quantized module of `model` and compares codes, scales and zeros with `solved(module)`, bit by bit.

    Returns the number of modules compared; raises VerificationError at the first difference.
    """
    reader = TensorReader(model.checkpoint)
    count = 0
    for module, shape in linear_shapes(model.config).items():
        scheme = model.schemes[module]
        if scheme is None:
            continue
        written, wanted = from_disk(module, scheme, shape, reader.tensor), solved(module)
        for part in ("codes", "scales", "zeros"):
            if not _same(getattr(written, part), getattr(wanted, part)):
                where = f"{model.checkpoint.folder}: {module}"
                raise VerificationError(f"{part} differ from the solver's", where=where)
        count += 1
    return count


def verify_tensors(model: ModelFolder, wanted: Mapping[str, Callable[[], Tensor]]) -> int:
    """Compares tensors that are not quantized (norms, biases, embedding) with `wanted`, bit by bit.

    Returns the number compared; raises VerificationError at the first difference.
    """
    reader = TensorReader(model.checkpoint)
    for name, make in wanted.items():
        if not _same(reader.tensor(name), make()):
            raise VerificationError("differs from what was written", where=f"{model.checkpoint.folder}: tensor {name}")
    return len(wanted)


@torch.inference_mode()
def run_prompts(model: ModelFolder, ids: Tensor, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Logits [B, V] of the last token of each prompt, one block in memory at a time; ids: [B, T] int64.

    Raises VerificationError if they are not finite, or do not differ between prompts that differ.
    """
    weights = ModelWeights(model, dtype, device)
    positions = torch.arange(ids.shape[1], device=device)
    # Rows of the embedding are gathered where it was read: the whole table never reaches the device.
    x = torch.nn.functional.embedding(ids.cpu(), weights.tensor(EMBEDDING)).to(device, dtype)
    for layer in range(model.config.num_layers):
        rope = block_rope(model.config, layer, positions, device)
        x = weights.block(layer)(x, rope, DenseAttention(model.config.layer_window(layer)))
    logits = _head(weights, x[:, -1])
    where = str(model.checkpoint.folder)
    if not bool(torch.isfinite(logits).all()):
        raise VerificationError("its logits are not finite", where=where)
    if bool((logits == logits[:, :1]).all()):
        raise VerificationError("its logits are constant: the model says nothing", where=where)
    return logits


def _head(weights: ModelWeights, x: Tensor) -> Tensor:
    """Final norm and output layer. x: [B, hidden] -> [B, V]."""
    config = weights.config
    norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
    norm.weight = torch.nn.Parameter(weights.tensor(FINAL_NORM).to(x.device, x.dtype), requires_grad=False)
    tied = config.tie_word_embeddings
    layer = None if tied else weights.replacement("lm_head", None)
    if layer is not None:
        return layer(norm(x))
    return norm(x) @ weights.tensor(EMBEDDING if tied else LM_HEAD).to(x.device, x.dtype).t()


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two tensors have the same dtype, shape and elements (or are both absent)."""
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and torch.equal(a.cpu(), b.cpu())


def _label(scheme: Scheme | None) -> str:
    if scheme is None:
        return "not quantized"
    grouping = "channel" if scheme.group_size is None else f"g{scheme.group_size}"
    return f"{scheme.name} {grouping} {'symmetric' if scheme.symmetric else 'asymmetric'}"
