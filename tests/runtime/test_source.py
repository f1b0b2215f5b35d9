"""Weights as they come from a folder: what is stored, fused as it runs, and damage found while loading."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantlab.checkpoint.load import load_model
from quantlab.checkpoint.model_folder import open_model
from quantlab.errors import CheckpointError
from quantlab.models.config import ModelConfig
from quantlab.runtime.backend_cpu import CpuBackend
from quantlab.runtime.linears import DenseLinear
from quantlab.runtime.source import FolderSource
from quantlab.runtime.weights import Weights, build_weights
from tests.runtime.steps import tiny_model

CPU = torch.device("cpu")


def weights_of(folder: Path) -> Weights:
    return build_weights(FolderSource(open_model(folder), torch.float32, CPU), CpuBackend(CPU, torch.float32), 64)


def test_projections_that_read_the_same_are_one_matrix(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "m", "llama", {"attention_bias": True, "tie_word_embeddings": False})
    model, weights = load_model(folder, torch.float32, CPU), weights_of(folder)
    for layer, block in enumerate(weights.blocks):
        parts = [model.linear(f"model.layers.{layer}.self_attn.{side}_proj") for side in "qkv"]
        assert isinstance(block.qkv, DenseLinear) and block.qkv.bias is not None
        assert torch.equal(block.qkv.weight, torch.cat([part.weight for part in parts]))
        assert torch.equal(block.qkv.bias, torch.cat([part.bias for part in parts]))
    assert [kind for kind, _ in weights.linears()] == ["qkv", "o", "gate_up", "down"] * 3 + ["lm_head"]
    stored = sum(parameter.nbytes for parameter in model.parameters())
    assert weights.nbytes == stored


def test_a_tied_head_is_the_embedding_and_counts_once(tmp_path: Path) -> None:
    weights = weights_of(tiny_model(tmp_path / "m", "llama", {"tie_word_embeddings": True}))
    assert isinstance(weights.head, DenseLinear)
    assert weights.head.weight.data_ptr() == weights.embedding.data_ptr()
    layers = sum(layer.nbytes for kind, layer in weights.linears() if kind != "lm_head")
    assert weights.nbytes < layers + 2 * weights.embedding.nbytes


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight", "lm_head.weight"])
def test_a_nan_anywhere_ends_loading_with_its_name(name: str, tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "m", "llama", {"tie_word_embeddings": False})
    tensors = load_file(folder / "model.safetensors")
    tensors[name][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="holds NaN or Inf") as error:
        weights_of(folder)
    assert name in str(error.value.where)


def test_a_file_that_was_cut_since_it_was_opened_ends_loading(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "m", "llama", {})
    model = open_model(folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="ends before its last byte"):
        build_weights(FolderSource(model, torch.float32, CPU), CpuBackend(CPU, torch.float32), 64)


def test_rotary_tables_are_those_of_the_model_definition(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path / "m", "llama", {})
    config = ModelConfig.from_json(json.loads((folder / "config.json").read_text()), "config.json")
    weights = weights_of(folder)
    cos, sin = load_model(folder, torch.float32, CPU).rope.tables(torch.arange(64))
    half = config.head_dim // 2
    assert torch.equal(weights.cos, cos[:, :half]) and torch.equal(weights.sin, sin[:, :half])
