"""Tiny random checkpoints of every family, made by transformers and saved as real folders."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from quantlab.models.config import ModelConfig
from quantlab.models.decoder import CausalLM, build_model

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Weights that keep activations of order one and make every tensor, norms and biases too, matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 2:
                scale = 1.0 if "embed" in name else parameter.shape[1] ** -0.5
                parameter.copy_(noise * scale)
            else:
                parameter.copy_(0.3 * noise + (1.0 if "norm" in name else 0.0))


@pytest.fixture
def tiny_reference(tmp_path: Path) -> Callable[..., tuple[transformers.PreTrainedModel, Path]]:
    """make(model_type, flags) -> the transformers model (fp32, eager attention) and the folder it was saved in."""

    def make(model_type: str, flags: dict[str, Any]) -> tuple[transformers.PreTrainedModel, Path]:
        config = transformers.AutoConfig.for_model(model_type, **(SIZES | flags))
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
        randomize(model, seed=7)
        model.save_pretrained(tmp_path / "checkpoint")
        return model, tmp_path / "checkpoint"

    return make


@pytest.fixture
def load_tiny() -> Callable[..., CausalLM]:
    """load(folder, dtype) -> our model of a saved folder, through its config.json and tensors alone."""

    def load(folder: Path, dtype: torch.dtype = torch.float32) -> CausalLM:
        raw = json.loads((folder / "config.json").read_text())
        tensors = load_file(folder / "model.safetensors")
        return build_model(ModelConfig.from_json(raw, str(folder)), tensors.__getitem__, dtype, "cpu")

    return load
