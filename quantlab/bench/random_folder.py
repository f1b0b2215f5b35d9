"""A packed checkpoint of known shapes with random weights on disk, to time what a start reads or to serve.

Written shard by shard, one decoder layer each, from the weights of `random_source`, with a tokenizer in which every id
is some text: `python -m quantlab.bench.random_folder DIR --shape llama-3.1-8b --scheme int4`. Knows nothing about
engines.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import tokenizers
import torch
from safetensors.torch import save_file
from torch import Tensor

from quantlab.bench.random_source import SCHEMES, SHAPES, RandomSource, random_config
from quantlab.checkpoint.packed import disk_tensors
from quantlab.checkpoint.schema import quantization_config
from quantlab.models.config import ModelConfig
from quantlab.models.naming import linear_shapes, tensor_shapes
from quantlab.schemes import Scheme
from quantlab_kernels.layout import QuantizedWeight


def write_folder(folder: Path, shape: str, scheme: Scheme | None, device: torch.device) -> int:
    """Write the model into `folder`, which must not exist; returns the bytes of its weights."""
    folder.mkdir()
    config = random_config(shape)
    source = RandomSource(config, scheme, torch.bfloat16, device)
    raw = hub_json(config)
    if scheme is not None:
        schemes = {name: None if name == "lm_head" else scheme for name in linear_shapes(config)}
        raw["quantization_config"] = quantization_config(schemes, {})
    (folder / "config.json").write_text(json.dumps(raw))
    write_tokenizer(folder, config.vocab_size)
    shards: dict[str, list[str]] = {}
    for name in tensor_shapes(config):
        shards.setdefault(".".join(name.split(".")[:3]) if ".layers." in name else "rest", []).append(name)
    weight_map: dict[str, str] = {}
    written = 0
    for number, names in enumerate(shards.values(), 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {key: value.cpu() for name in names for key, value in _stored(source, name, scheme).items()}
        save_file(tensors, folder / file)
        weight_map |= dict.fromkeys(tensors, file)
        written += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": written}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return written


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """A tokenizer of `vocab_size` tokens, 256 at least: one a byte, which is how text is read, and made-up words."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    words = [f"\u0120w{number}" for number in range(vocab_size - len(alphabet))]  # U+0120 stands for a space
    vocabulary = {piece: number for number, piece in enumerate(alphabet + words)}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


def hub_json(config: ModelConfig) -> dict[str, object]:
    """The config.json of a Llama of these shapes."""
    rope = asdict(config.rope)
    scaling = {key: rope[key] for key in ("factor", "low_freq_factor", "high_freq_factor")}
    scaling |= {"rope_type": "llama3", "rope_theta": config.rope.theta}
    scaling["original_max_position_embeddings"] = config.rope.max_position
    return {
        "architectures": [config.architecture],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "rope_parameters": scaling,
        "dtype": config.dtype,
        "transformers_version": "5.0.0",  # without one, transformers warns that the tokenizer may be an old Mistral's
    }


def _stored(source: RandomSource, name: str, scheme: Scheme | None) -> dict[str, Tensor]:
    """What the file holds for the tensor `name` of a 16-bit model."""
    module = name.removesuffix(".weight")
    if module not in linear_shapes(source.config):
        return {name: source.tensor(name)}
    weight = source.linear(module).weight
    if isinstance(weight, QuantizedWeight):
        assert scheme is not None
        return disk_tensors(module, weight, scheme)
    return {name: weight}


def main(arguments: Sequence[str] | None = None) -> None:
    """Write a folder."""
    made = argparse.ArgumentParser(prog="quantlab.bench.random_folder", description=__doc__)
    made.add_argument("folder", type=Path)
    made.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    made.add_argument("--scheme", choices=SCHEMES, default="int4")
    made.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    given = made.parse_args(arguments)
    print(write_folder(given.folder, given.shape, SCHEMES[given.scheme], given.device), "bytes of weights")


if __name__ == "__main__":
    main()
