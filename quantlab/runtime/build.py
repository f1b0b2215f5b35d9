"""From a folder to an engine that serves it: weights loaded, memory measured, keys and values given their room.

Knows nothing about requests or servers.
"""

import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from quantlab.checkpoint.folder import read_json_object
from quantlab.checkpoint.model_folder import open_model
from quantlab.log import logger, timed
from quantlab.models.config import ModelConfig
from quantlab.runtime.backend import Backend, choose_backend
from quantlab.runtime.engine import Engine
from quantlab.runtime.grammar import TokenGrammars
from quantlab.runtime.guided import Grammars
from quantlab.runtime.options import EngineInfo, EngineOptions
from quantlab.runtime.runner import ModelRunner
from quantlab.runtime.sampler import Sampler
from quantlab.runtime.scheduler import Scheduler
from quantlab.runtime.sizes import Sizes, limits_of, sizes_of
from quantlab.runtime.source import FolderSource
from quantlab.runtime.weights import Source, Weights, build_weights
from quantlab.schemes import Scheme, describe

LOG = logger(__name__)


def build_engine(folder: Path, options: EngineOptions) -> Engine:
    """An engine for the model in `folder`, 16-bit or packed, ready for requests.

    Raises CheckpointError or UnsupportedModel for the folder, UsageError for options that cannot be.
    """
    begin = time.perf_counter()
    with timed(LOG, "folder and device"):
        model = open_model(folder)
        backend = choose_backend(options, model.config)
    source = FolderSource(model, backend.dtype, backend.device)
    identity = Identity(folder.resolve().name, describe_schemes(model.schemes), end_tokens(folder, model.config))
    grammars = TokenGrammars(folder, model.config.vocab_size, identity.eos_token_ids)
    return assemble(source, backend, options, identity, grammars, begin)


@dataclass(frozen=True, slots=True)
class Identity:
    """What an engine is called, how its weights are stored, which tokens end a text."""

    name: str
    scheme: str
    eos_token_ids: tuple[int, ...]


def assemble(
    source: Source,
    backend: Backend,
    options: EngineOptions,
    identity: Identity,
    grammars: Grammars | None,
    begin: float,
) -> Engine:
    """An engine for the weights of `source` on `backend`; `begin` is when its start began, by time.perf_counter."""
    limits = limits_of(options, source.config, backend.device)
    with timed(LOG, "weights"):
        weights = build_weights(source, backend, limits.max_model_len)
    return engine_of(weights, backend, options, identity, grammars, begin)


def engine_of(
    weights: Weights,
    backend: Backend,
    options: EngineOptions,
    identity: Identity,
    grammars: Grammars | None,
    begin: float,
) -> Engine:
    """An engine for weights that are on the device already."""
    runner, sizes = runner_of(weights, backend, options, identity.eos_token_ids, grammars)
    info = engine_info(weights, backend, sizes, identity, time.perf_counter() - begin)
    # A CPU computes a step before its launch returns, so there is nothing to overlap.
    overlap = options.overlap and backend.device.type == "cuda"
    compile_grammar = grammars.start if grammars is not None else None
    return Engine(Scheduler(info, options.policy, options.prefix_caching), runner, info, overlap, compile_grammar)


def runner_of(
    weights: Weights,
    backend: Backend,
    options: EngineOptions,
    eos_token_ids: tuple[int, ...],
    grammars: Grammars | None,
) -> tuple[ModelRunner, Sizes]:
    """What computes steps of these weights, with room for keys and values, and the sizes that came of it."""
    config = weights.config
    limits = limits_of(options, config, backend.device)
    # Before free memory is measured: it keeps what penalties need for every sequence.
    sampler = Sampler(config.vocab_size, limits.max_num_seqs, backend.device, eos_token_ids, grammars)
    sizes = sizes_of(options, limits, config, (backend.device, backend.dtype))
    return backend.runner(weights, sizes, sampler), sizes


def engine_info(weights: Weights, backend: Backend, sizes: Sizes, identity: Identity, seconds: float) -> EngineInfo:
    """What was built."""
    config = weights.config
    dtype = str(backend.dtype).removeprefix("torch.")
    return EngineInfo(
        model=identity.name,
        architecture=config.architecture,
        scheme=identity.scheme,
        device=str(backend.device),
        dtype=dtype,
        weight_bytes=weights.nbytes,
        kv_dtype="int8" if sizes.int8_kv else dtype,
        kv_bytes=sizes.num_blocks * sizes.block_bytes,
        block_size=sizes.block_size,
        num_blocks=sizes.num_blocks,
        max_model_len=sizes.max_model_len,
        max_num_seqs=sizes.max_num_seqs,
        max_batch_tokens=sizes.max_batch_tokens,
        vocab_size=config.vocab_size,
        eos_token_ids=identity.eos_token_ids,
        kernels=(*weights.kernels(), backend.attention(sizes.int8_kv)),
        startup_seconds=seconds,
    )


def describe_schemes(schemes: dict[str, Scheme | None]) -> str:
    """The scheme of most linears, and how many have another."""
    counts = Counter(describe(scheme) for scheme in schemes.values())
    (name, _), *others = counts.most_common()
    return name if not others else f"{name} (" + ", ".join(f"{count} linears {other}" for other, count in others) + ")"


def end_tokens(folder: Path, config: ModelConfig) -> tuple[int, ...]:
    """The tokens that end a text: those of generation_config.json where it names some, else config.json's."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return config.eos_token_ids
    value = read_json_object(path, folder).get("eos_token_id")
    ids = value if isinstance(value, list) else [value]
    known = tuple(i for i in ids if type(i) is int and 0 <= i < config.vocab_size)
    return known or config.eos_token_ids
