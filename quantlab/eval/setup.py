"""Everything an evaluation needs before a model is loaded, gathered and checked: folders, tokenizers, text, place.

Knows nothing about scoring. Reads both checkpoints once to digest them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from quantlab.checkpoint.model_folder import ModelFolder, open_model
from quantlab.errors import UsageError
from quantlab.eval.corpus import TextSource, read_text
from quantlab.eval.facts import device_name, model_facts, runtime_version
from quantlab.eval.options import DEFAULT_WINDOW, EvalOptions, ProtocolName, TextOptions
from quantlab.eval.protocol import Cut, Windows, make_windows, tokenizer_digest
from quantlab.eval.result import ModelFacts
from quantlab.models.device import find_device, multiplies_bf16, use_fast_products
from quantlab.models.naming import EMBEDDING
from quantlab.text import Tokenizer, load_tokenizer

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
STORED = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
CPU_BATCH, GPU_BATCH = 1, 8


@dataclass(frozen=True, slots=True)
class Place:
    """Where and how the models run: `batch` is windows in one forward pass."""

    device: torch.device
    dtype: torch.dtype
    batch: int

    @property
    def dtype_name(self) -> str:
        """`bfloat16` and its like."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def machine(self) -> str:
        """What decides how a model is computed: cached figures of another machine or version are not this one's."""
        threads = f" on {torch.get_num_threads()} threads" if self.device.type == "cpu" else ""
        return f"{device_name(self.device)}{threads}, torch {torch.__version__}, quantlab {runtime_version()}"


@dataclass(frozen=True, slots=True)
class Setup:
    """A checked evaluation; `texts` by the name that results go by."""

    options: EvalOptions
    place: Place
    tokenizer: Tokenizer
    baseline: ModelFacts
    candidate: ModelFacts
    texts: dict[str, Windows]


def prepare(options: EvalOptions) -> Setup:
    """Checks all that can be checked before a model is loaded; raises a QuantlabError and writes nothing."""
    folders = open_model(options.baseline), open_model(options.candidate)
    place = choose_place(options, folders[0])
    tokenizer, digest = shared_tokenizer(options.baseline, options.candidate)
    check_vocabularies(*folders)
    cut = Cut("gptq", choose_window(options.text, folders), options.text.tokens, digest, place.dtype_name)
    texts = dict(cut_texts(options.text, tokenizer, cut))
    facts = model_facts(options.baseline, digest), model_facts(options.candidate, digest)
    return Setup(options, place, tokenizer, *facts, texts)


def text_names(text: TextOptions) -> list[str]:
    """The names of the results that `text` will give; raises UsageError where two would go by one."""
    names = [_name(source, protocol, text) for source in text.sources for protocol in text.protocols]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"two results would be called '{name}'", where="--text", fix="rename a file")
    return names


def choose_place(options: EvalOptions, baseline: ModelFolder) -> Place:
    """The device, and unless it was named the dtype that the baseline is stored in, where the device multiplies it."""
    device = find_device(options.device)
    if device.type == "cpu":
        use_fast_products()
    name: str = options.dtype
    if name == "auto":
        stored = STORED[baseline.checkpoint.tensors[EMBEDDING].dtype]
        # No CPU multiplies fp16 fast, and one without bf16 units is slower in bf16 than in fp32.
        name = stored if device.type == "cuda" or (stored == "bfloat16" and multiplies_bf16(device)) else "float32"
    batch = options.batch or (CPU_BATCH if device.type == "cpu" else GPU_BATCH)
    return Place(device, DTYPES[name], batch)


def shared_tokenizer(baseline: Path, candidate: Path) -> tuple[Tokenizer, str]:
    """The tokenizer that both folders have, and its digest; raises UsageError when they have two."""
    tokenizers = [load_tokenizer(folder) for folder in (baseline, candidate)]
    digests = [tokenizer_digest(tokenizer) for tokenizer in tokenizers]
    if digests[0] != digests[1]:
        message = "the tokenizer is not the baseline's, so the figures of the two cannot be compared"
        fix = f"the tokenizer files of {baseline}, if they belong to the candidate"
        raise UsageError(message, where=str(candidate), fix=fix)
    return tokenizers[0], digests[0]


def check_vocabularies(baseline: ModelFolder, candidate: ModelFolder) -> None:
    """Raises UsageError unless both models give each token one logit."""
    sizes = baseline.config.vocab_size, candidate.config.vocab_size
    if sizes[0] != sizes[1]:
        message = f"has {sizes[1]} logits a token and the baseline {sizes[0]}: their distributions cannot be compared"
        raise UsageError(message, where=str(candidate.checkpoint.folder), fix="a candidate made from this baseline")


def choose_window(text: TextOptions, folders: tuple[ModelFolder, ModelFolder]) -> int:
    """Tokens of a window; raises UsageError for more than the models take."""
    limit = min(folder.config.max_position_embeddings for folder in folders)
    if text.window is not None and text.window > limit:
        raise UsageError(f"{text.window} tokens are more than the models' {limit}", where="--window")
    return text.window or min(DEFAULT_WINDOW, limit)


def cut_texts(text: TextOptions, tokenizer: Tokenizer, cut: Cut) -> Iterator[tuple[str, Windows]]:
    """Every text under every protocol, by name, else cut as `cut` says; raises TextError."""
    for source in text.sources:
        content = read_text(source)
        for protocol in text.protocols:
            how = replace(cut, protocol=protocol)
            yield _name(source, protocol, text), make_windows(content, tokenizer, how, str(source.files[0]))


def _name(source: TextSource, protocol: ProtocolName, text: TextOptions) -> str:
    return source.name if protocol == text.protocols[0] else f"{source.name}-{protocol}"
