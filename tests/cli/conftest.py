"""A command line run in this process, and tiny checkpoints made without torch."""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from quantlab.cli.app import main
from quantlab.models.config import ModelConfig
from quantlab.models.naming import tensor_shapes

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
WIDTH = {"BF16": 2, "F16": 2, "F32": 4, "I8": 1}
Tensors = dict[str, tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Ran:
    """What one command line did."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        """Lines on stderr."""
        return self.err.splitlines()


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Run `quantlab` with some arguments, in this process."""

    def run(*arguments: object) -> Ran:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return run


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder that is also the working folder."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path


class Models:
    """Tiny checkpoints to make, and to damage, in one folder."""

    config = CONFIG

    def __init__(self, folder: Path):
        self.folder = folder

    def sound(self, **changes: Any) -> Path:
        """A sound checkpoint in ./model, its config changed."""
        return write_model(self.folder / "model", config={**CONFIG, **changes})

    def sharded(self) -> Path:
        """A sound checkpoint in ./model, in two shards."""
        return write_sharded(self.folder / "model")

    def with_config(self, **changes: Any) -> Path:
        """Sound weights, and a config.json changed after they were made; None removes a key."""
        folder = self.sound()
        config = {key: value for key, value in {**CONFIG, **changes}.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    def with_tensor(self, name: str, dtype: str, shape: tuple[int, ...]) -> Path:
        """A sound checkpoint but for one tensor's dtype or shape."""
        return write_model(self.folder / "model", {**tensors_of(CONFIG), name: (dtype, shape)})

    def without_tensor(self, name: str) -> Path:
        """A checkpoint that lacks one tensor."""
        return write_model(self.folder / "model", {k: v for k, v in tensors_of(CONFIG).items() if k != name})

    def with_header(self, change: Callable[[bytes], bytes]) -> Path:
        """A sound checkpoint whose weight file was changed byte by byte."""
        folder = self.sound()
        path = folder / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))
        return folder


@pytest.fixture
def models(here: Path) -> Models:
    """Makes tiny checkpoints in the working folder."""
    return Models(here)


@pytest.fixture
def model(models: Models) -> Path:
    """A sound tiny checkpoint in ./model."""
    return models.sound()


def tensors_of(config: dict[str, Any]) -> Tensors:
    """What a sound checkpoint of `config` holds."""
    return {name: ("BF16", shape) for name, shape in tensor_shapes(ModelConfig.from_json(config, "test")).items()}


def write_model(folder: Path, tensors: Tensors | None = None, config: dict[str, Any] | None = None) -> Path:
    """A checkpoint folder with one weight file."""
    folder.mkdir(parents=True, exist_ok=True)
    chosen = CONFIG if config is None else config
    (folder / "config.json").write_text(json.dumps(chosen))
    write_safetensors(folder / "model.safetensors", tensors_of(chosen) if tensors is None else tensors)
    return folder


def write_sharded(folder: Path) -> Path:
    """A checkpoint folder with two shards and an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    tensors = tensors_of(CONFIG)
    names = list(tensors)
    halves = {
        "model-00001-of-00002.safetensors": names[: len(names) // 2],
        "model-00002-of-00002.safetensors": names[len(names) // 2 :],
    }
    weight_map = {name: file for file, part in halves.items() for name in part}
    for file, part in halves.items():
        write_safetensors(folder / file, {name: tensors[name] for name in part})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def write_safetensors(path: Path, tensors: Tensors) -> None:
    """A safetensors file of small positive numbers."""
    header: dict[str, Any] = {}
    data = bytearray()
    source = random.Random(0)
    for name, (dtype, shape) in tensors.items():
        size = WIDTH[dtype]
        for extent in shape:
            size *= extent
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [len(data), len(data) + size]}
        part = bytearray(source.randbytes(size))
        if dtype == "BF16":
            part[1::2] = b"\x3c" * (size // 2)  # 0.0078 to 0.031
        data += part
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
