"""What a run will do, decided from config.json and headers alone: schemes, files to the byte, memory and time.

Knows nothing about tensors and imports no torch; `quant.run` follows the same assignment, so a dry run cannot differ.
"""

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from quantlab import __version__
from quantlab.checkpoint import sizes
from quantlab.checkpoint.hf import INDEX_FILE, HFCheckpoint
from quantlab.checkpoint.schema import quantization_config
from quantlab.errors import RecipeError
from quantlab.models.config import ModelConfig
from quantlab.models.naming import INPUT_GROUPS, block_prefix, linear_shapes, tensor_shapes
from quantlab.quant.amounts import solver_samples
from quantlab.quant.estimate import MemoryItem, flops, memory, parameters, seconds, total
from quantlab.quant.options import DEFAULT_SAMPLES, QuantizeOptions
from quantlab.quant.patterns import matching
from quantlab.recipe import Override, Recipe
from quantlab.schemes import GROUP_SIZES, Scheme, describe

TIED = "shares its weight with the embedding"
BYTES_PER_TOKEN = 4.0  # of English text; only sizes the estimate when every block of a text is used


@dataclass(frozen=True, slots=True)
class Assignment:
    """Each linear's scheme in model order (None: kept in 16 bits), why some are skipped, and what cannot be done."""

    schemes: dict[str, Scheme | None]
    skipped: dict[str, str]
    problems: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PlannedModule:
    """One linear: its shape (N, K), its scheme or why it stays in 16 bits, and its bytes on disk without bias."""

    name: str
    shape: tuple[int, int]
    scheme: Scheme | None
    why: str | None
    bytes: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run will do. `files` are exact sizes in bytes and empty when there are problems; the report, whose size
    depends on the run, is not among them. `tokens`, `memory` and `seconds` are estimates."""

    architecture: str
    parameters: int
    recipe: str
    modules: tuple[PlannedModule, ...]
    files: tuple[tuple[str, int], ...]
    source_bytes: int
    bits_per_weight: float
    tokens: int
    memory: tuple[MemoryItem, ...]
    seconds: float
    machine: str
    problems: tuple[str, ...]

    @property
    def output_bytes(self) -> int:
        """Bytes of all output files together."""
        return sum(size for _, size in self.files)

    @property
    def peak_bytes(self) -> int:
        """Estimated peak memory above that of the imports."""
        return total(self.memory)


def make_plan(checkpoint: HFCheckpoint, config: ModelConfig, recipe: Recipe, options: QuantizeOptions) -> Plan:
    """The whole plan, from headers; raises CheckpointError if the tensors are not those of the architecture."""
    checkpoint.check_tensors(tensor_shapes(config))
    assignment = assign(recipe, config)
    modules = _planned(checkpoint, config, assignment) if not assignment.problems else ()
    files = _files(checkpoint, config, assignment, options) if not assignment.problems else ()
    tokens = calibration_tokens(options)
    gpu = options.device.startswith("cuda") or (options.device == "auto" and has_gpu())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    seq_len = options.calibration.seq_len
    seen = solver_samples(recipe, max(1, tokens // seq_len), gpu)
    work = flops(config, recipe, seen, seq_len, gpu)
    return Plan(
        architecture=config.architecture,
        parameters=parameters(config),
        recipe=recipe.name,
        modules=modules,
        files=files,
        source_bytes=_source_bytes(checkpoint),
        bits_per_weight=_bits(modules),
        tokens=tokens,
        memory=memory(config, recipe, seen, seq_len),
        seconds=seconds(work, cores, gpu),
        machine="one GPU" if gpu else f"{cores} CPU cores",
        problems=assignment.problems,
    )


def output_config(
    source: Mapping[str, object], schemes: Mapping[str, Scheme | None], recipe: Recipe
) -> dict[str, object]:
    """The output's config.json: the source's, plus `quantization_config` with where it came from."""
    provenance = {"version": __version__, "recipe": recipe.name}
    return {**source, "quantization_config": quantization_config(dict(schemes), provenance)}


def output_entries(
    checkpoint: HFCheckpoint, config: ModelConfig, schemes: Mapping[str, Scheme | None]
) -> list[sizes.Entry]:
    """Every tensor of the output, in model order; tensors that the architecture does not have are left behind."""
    return sizes.output_entries([checkpoint.tensors[name] for name in tensor_shapes(config)], schemes)


def calibration_tokens(options: QuantizeOptions) -> int:
    """Tokens that will calibrate; guessed from the text's size when every block of it is asked for."""
    spec = options.calibration
    if spec.samples is not None:
        return spec.samples * spec.seq_len
    package = Path(__file__).parents[1]
    bundled = (package / "_data" / "calibration.txt", package.parent / "examples" / "text" / "calibration.txt")
    path = Path(spec.source) if spec.source else next((place for place in bundled if place.exists()), bundled[0])
    if not path.exists():
        return DEFAULT_SAMPLES * spec.seq_len
    size = path.stat().st_size if path.is_file() else sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
    return max(1, int(size / BYTES_PER_TOKEN) // spec.seq_len) * spec.seq_len


def has_gpu() -> bool:
    """Whether the system has a CUDA device node; asking torch would cost seconds."""
    return Path("/dev/nvidia0").exists() or Path("/dev/nvidiactl").exists()


def _files(
    checkpoint: HFCheckpoint, config: ModelConfig, assignment: Assignment, options: QuantizeOptions
) -> tuple[tuple[str, int], ...]:
    shards = sizes.plan_shards(output_entries(checkpoint, config, assignment.schemes), options.max_shard_size)
    files = [(shard.name, shard.size) for shard in shards]
    if len(shards) > 1:
        files.append((INDEX_FILE, len(sizes.json_bytes(sizes.index_json(shards)))))
    made = output_config(checkpoint.config, assignment.schemes, options.recipe)
    files.append(("config.json", len(sizes.json_bytes(made))))
    files += [(str(path.relative_to(checkpoint.folder)), path.stat().st_size) for path in checkpoint.extra_files]
    return tuple(files)


def _source_bytes(checkpoint: HFCheckpoint) -> int:
    """Bytes of the files that the output replaces or copies."""
    index = checkpoint.folder / INDEX_FILE
    paths = [checkpoint.folder / "config.json", *checkpoint.files, *checkpoint.extra_files]
    return sum(path.stat().st_size for path in paths + ([index] if index.exists() else []))


def _planned(checkpoint: HFCheckpoint, config: ModelConfig, assignment: Assignment) -> tuple[PlannedModule, ...]:
    planned = []
    for name, shape in linear_shapes(config).items():
        info, scheme = checkpoint.tensors[f"{name}.weight"], assignment.schemes[name]
        entries = sizes.output_entries([info], {name: scheme})
        size = sum(sizes.entry_bytes(entry) for entry in entries)
        planned.append(PlannedModule(name, shape, scheme, assignment.skipped.get(name), size))
    if config.tie_word_embeddings:
        planned.append(PlannedModule("lm_head", (config.vocab_size, config.hidden_size), None, TIED, 0))
    return tuple(planned)


def _bits(modules: Iterable[PlannedModule]) -> float:
    """Bits on disk for each weight of the quantized modules: all that stands for a weight counted."""
    quantized = [module for module in modules if module.scheme]
    weights = sum(math.prod(module.shape) for module in quantized)
    return 8 * sum(module.bytes for module in quantized) / weights if weights else 0.0


def assign_schemes(recipe: Recipe, config: ModelConfig) -> dict[str, Scheme | None]:
    """Each linear's scheme, by module name; raises RecipeError for the first problem found."""
    assignment = assign(recipe, config)
    if assignment.problems:
        more = f" (and {len(assignment.problems) - 1} more)" if len(assignment.problems) > 1 else ""
        raise RecipeError(assignment.problems[0] + more, where=f"recipe {recipe.name}")
    return assignment.schemes


def assign(recipe: Recipe, config: ModelConfig) -> Assignment:
    """Schemes by override (the first that matches), then `ignore`, then the recipe's own; problems are collected."""
    shapes = linear_shapes(config)
    owner, problems = _owners(recipe, shapes)
    schemes: dict[str, Scheme | None] = {}
    skipped: dict[str, str] = {} if "lm_head" in shapes else {"lm_head": TIED}
    for name in shapes:
        entry = owner.get(name)
        schemes[name] = None if isinstance(entry, str) else scheme_of(entry or recipe)
        if isinstance(entry, str):
            skipped[name] = entry
        elif entry and schemes[name] is None:
            skipped[name] = f"override '{entry.match}' says skip"
    problems += _indivisible(schemes, shapes) + _disagreeing(schemes, config)
    if not any(schemes.values()):
        problems.append("nothing is left to quantize: every module is ignored or skipped")
    return Assignment(schemes, skipped, tuple(problems))


def scheme_of(entry: Recipe | Override) -> Scheme | None:
    """The scheme that a recipe or an override names; w8a8 has one scale per output channel whatever the group size."""
    if entry.scheme == "skip":
        return None
    per_channel = entry.scheme == "w8a8" or entry.group_size == "channel"
    return Scheme(entry.scheme, None if per_channel else int(entry.group_size), entry.symmetric)


def _owners(recipe: Recipe, shapes: Mapping[str, object]) -> tuple[dict[str, Override | str], list[str]]:
    """Module name -> the override that decides it, or the reason why it is ignored; and what matches nothing."""
    names = [*shapes] if "lm_head" in shapes else [*shapes, "lm_head"]
    owner: dict[str, Override | str] = {}
    problems: list[str] = []
    for index, override in enumerate(recipe.overrides, start=1):
        found = _found(override.match, names, f"override {index}", problems)
        fresh = [name for name in found if name not in owner]
        if found and not fresh:
            problems.append(
                f"override {index} ('{override.match}') is never reached: earlier ones match all it matches"
            )
        if "lm_head" in fresh and "lm_head" not in shapes and override.scheme != "skip":
            problems.append(f"override {index}: lm_head {TIED}, so it cannot be quantized")
        owner |= dict.fromkeys(fresh, override)
    for pattern in recipe.ignore:
        found = _found(pattern, names, "ignore", problems)
        for name in found:
            owner.setdefault(name, f"ignored by '{pattern}'")
    return owner, problems


def _found(pattern: str, names: Iterable[str], where: str, problems: list[str]) -> list[str]:
    try:
        return matching(pattern, names, where)
    except RecipeError as err:
        problems.append(f"{where}: {err.message}")
        return []


def _indivisible(schemes: Mapping[str, Scheme | None], shapes: Mapping[str, tuple[int, int]]) -> list[str]:
    """One problem for each number of input features that is not a whole number of groups."""
    bad: dict[tuple[int, int], list[str]] = {}
    for name, scheme in schemes.items():
        size = scheme.group_size if scheme else None
        if size and shapes[name][1] % size:
            bad.setdefault((shapes[name][1], size), []).append(name)
    return [_indivisible_line(names, features, size) for (features, size), names in bad.items()]


def _indivisible_line(names: list[str], features: int, size: int) -> str:
    fits = [str(g) for g in reversed(GROUP_SIZES) if features % g == 0] + ["channel"]
    last = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))
    which = names[0] if len(names) == 1 else f"{', '.join(last)} ({len(names)} modules)"
    pattern = names[0] if len(names) == 1 else rf"re:.*\.{last[0]}" if len(last) == 1 else rf"re:.*\.({'|'.join(last)})"
    return (
        f"{which}: {features} input features are not divisible by group size {size}; "
        f"group sizes that fit: {', '.join(fits)}; or override or ignore '{pattern}'"
    )


def _disagreeing(schemes: Mapping[str, Scheme | None], config: ModelConfig) -> list[str]:
    """Linears that share an input must share a scheme: engines fuse q/k/v and gate/up into one matrix."""
    problems = []
    for layer in range(config.num_layers):
        for group in INPUT_GROUPS:
            names = [block_prefix(layer) + name for name in group]
            if len({schemes[name] for name in names}) > 1:
                told = ", ".join(f"{name.rsplit('.', 1)[1]} {describe(schemes[name])}" for name in names)
                parent = names[0].rsplit(".", 1)[0]
                problems.append(f"{parent}: engines fuse these, so they must share one scheme: {told}")
    return problems[:8]
