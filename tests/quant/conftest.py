"""Tiny random models with a tokenizer of their own, and runs on them as the command line would start them."""

import hashlib
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from quantlab.events import Event
from quantlab.quant.options import CalibrationSpec, QuantizeOptions
from quantlab.recipe import Recipe

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
WORDS = (
    "the",
    "sea",
    "was",
    "calm",
    "and",
    "grey",
    "ship",
    "lay",
    "under",
    "hill",
    "where",
    "nobody",
    "had",
    "light",
    "before",
)


def random_model(folder: Path, dtype: torch.dtype, family: str = "llama", tied: bool = False) -> Path:
    """A random model saved by transformers, its weights of a size that keeps activations of order one."""
    config = transformers.AutoConfig.for_model(family, **SIZES, tie_word_embeddings=tied)
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = parameter.shape[-1] ** -0.5 if "embed" not in name else 1.0
            parameter.copy_(1 + 0.3 * noise if "norm" in name else noise * (0.3 if noise.dim() == 1 else scale))
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_tokenizer(folder: Path) -> None:
    """One token a character."""
    vocabulary = {c: i for i, c in enumerate(dict.fromkeys("Ġ" + string.ascii_letters + string.digits + ".,"))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """get(dtype, family, tied) -> a tiny model's folder, made once a session; never write into it."""
    made: dict[tuple[Any, ...], Path] = {}

    def get(dtype: torch.dtype = torch.bfloat16, family: str = "llama", tied: bool = False) -> Path:
        key = (dtype, family, tied)
        if key not in made:
            made[key] = random_model(tmp_path_factory.mktemp("tiny") / "model", dtype, family, tied)
        return made[key]

    return get


@pytest.fixture(scope="session")
def tiny(tiny_models: Callable[..., Path]) -> Path:
    """A bfloat16 Llama with an lm_head of its own; never write into it."""
    return tiny_models()


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 kB of text that the tiny tokenizer knows."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    generator = torch.Generator().manual_seed(5)
    picked = torch.randint(len(WORDS), (900,), generator=generator).tolist()
    path.write_text(" ".join(WORDS[i] for i in picked))
    return path


@pytest.fixture
def make_options(tiny_text: Path) -> Callable[..., QuantizeOptions]:
    """make(source, out, passes, recipe=..., samples=..., seed=..., **options) -> options of a run on tiny text."""

    def make(
        source: Path,
        out: Path,
        passes: list[dict[str, Any]],
        recipe: dict[str, Any] | None = None,
        samples: int = 16,
        seed: int = 0,
        **options: Any,
    ) -> QuantizeOptions:
        chosen = Recipe(**{"group_size": 32, "passes": passes} | (recipe or {}))
        spec = CalibrationSpec(str(tiny_text), samples=samples, seq_len=32, seed=seed)
        return QuantizeOptions(source, out, chosen, spec, **{"device": "cpu"} | options)

    return make


@pytest.fixture
def events() -> list[Event]:
    """A list whose `append` is a listener."""
    return []


@pytest.fixture(scope="session")
def digests() -> Callable[[Path], dict[str, str]]:
    """digests(folder) -> the sha256 of every file under it."""

    def find(folder: Path) -> dict[str, str]:
        files = (path for path in sorted(folder.rglob("*")) if path.is_file())
        return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    return find
