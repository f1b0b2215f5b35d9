"""A tiny checkpoint saved by transformers, and ways to quantize it plainly, write it packed and damage it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

from quantlab.checkpoint import sizes, writer
from quantlab.checkpoint.model_folder import open_model
from quantlab.checkpoint.packed import disk_tensors
from quantlab.checkpoint.reader import TensorReader
from quantlab.checkpoint.schema import quantization_config
from quantlab.models.naming import linear_shapes, tensor_shapes
from quantlab.schemes import Scheme
from quantlab_kernels.layout import QuantizedWeight

# k_proj has 12 rows and up_proj 72: neither fills the last word of zero points packed along N by 8 and by 32.
TINY = {
    "vocab_size": 70,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "head_dim": 12,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}


def random_checkpoint(folder: Path, dtype: torch.dtype, seed: int, **flags: object) -> Path:
    """A random Llama saved by transformers; weights sized to keep activations of order one."""
    config = transformers.LlamaConfig(**(TINY | flags))
    model = transformers.LlamaForCausalLM(config).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = 1.0 if "embed" in name else parameter.shape[-1] ** -0.5
            parameter.copy_(1 + 0.1 * noise if "norm" in name else noise * scale)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text('{"not": "re-serialized"  }')
    return folder


@pytest.fixture
def make_checkpoint() -> Callable[..., Path]:
    """make_checkpoint(folder, dtype, seed, **flags) -> a random checkpoint of its own."""
    return random_checkpoint


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One bfloat16 checkpoint for the session; never write into it, copy it."""
    return random_checkpoint(tmp_path_factory.mktemp("pristine") / "model", torch.bfloat16, seed=3)


@pytest.fixture(scope="session")
def pristine32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in float32, for what depends on rounding weights to the stored dtype."""
    return random_checkpoint(tmp_path_factory.mktemp("pristine32") / "model", torch.float32, seed=3)


@pytest.fixture(scope="session")
def pristine_sharded(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same checkpoint in three or more shards with an index."""
    folder = tmp_path_factory.mktemp("sharded") / "model"
    transformers.LlamaForCausalLM.from_pretrained(pristine).save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) >= 3
    return folder


@pytest.fixture
def source(pristine: Path, tmp_path: Path) -> Path:
    """A copy of the single-file checkpoint, free to damage."""
    return Path(shutil.copytree(pristine, tmp_path / "source"))


@pytest.fixture
def sharded(pristine_sharded: Path, tmp_path: Path) -> Path:
    """A copy of the sharded checkpoint, free to damage."""
    return Path(shutil.copytree(pristine_sharded, tmp_path / "sharded"))


def round_to_nearest(weight: Tensor, scheme: Scheme) -> QuantizedWeight:
    """The plainest quantization of weight [N, K]; its scales have the weight's dtype."""
    rows, columns = weight.shape
    size = scheme.group_size or columns
    groups = weight.float().view(rows, -1, size)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    steps = scheme.code_max - scheme.code_min
    wide = torch.maximum(-low, high) * 2 if scheme.symmetric else high - low
    scales = (wide / steps).to(weight.dtype)
    zeros = torch.zeros_like(low) if scheme.symmetric else scheme.code_min - low / scales.float()
    zeros = zeros.round().clamp(scheme.code_min, scheme.code_max)
    codes = groups / scales.float().unsqueeze(-1) + zeros.unsqueeze(-1)
    codes = codes.round().clamp(scheme.code_min, scheme.code_max).to(torch.int8).view(rows, columns)
    return QuantizedWeight(codes, scales, None if scheme.symmetric else zeros.to(torch.int8), size)


Choose = Callable[[str], Scheme | None]
WritePacked = Callable[..., Path]


@pytest.fixture
def write_packed(tmp_path: Path) -> WritePacked:
    """write(source, choose, max_shard_size) -> a folder with the source rounded to nearest, written by our writer."""

    def write(source: Path, choose: Choose, max_shard_size: int = 1 << 30) -> Path:
        model = open_model(source)
        schemes = {name: choose(name) for name in linear_shapes(model.config)}
        infos = [model.checkpoint.tensors[name] for name in tensor_shapes(model.config)]
        shards = sizes.plan_shards(sizes.output_entries(infos, schemes), max_shard_size)
        reader = TensorReader(model.checkpoint)

        def tensor(name: str) -> Tensor:
            module = name.rpartition(".")[0]
            scheme = schemes.get(module)
            if scheme is None or name.endswith(".bias"):
                return reader.tensor(name)
            return disk_tensors(module, round_to_nearest(reader.tensor(f"{module}.weight"), scheme), scheme)[name]

        out = tmp_path / "packed"
        out.mkdir()
        for shard in shards:
            writer.write_shard(out / shard.name, shard, tensor)
            assert (out / shard.name).stat().st_size == shard.size
        if len(shards) > 1:
            writer.write_json(out / "model.safetensors.index.json", sizes.index_json(shards))
        section = quantization_config(schemes, {"version": "test"})
        writer.write_json(out / "config.json", model.checkpoint.config | {"quantization_config": section})
        return out

    return write


@pytest.fixture
def edit_json() -> Callable[..., None]:
    """edit(path, change) -> rewrites the JSON file after `change(value)` has altered it in place."""

    def edit(path: Path, change: Callable[[dict], object]) -> None:
        value = json.loads(path.read_text())
        change(value)
        path.write_text(json.dumps(value))

    return edit
