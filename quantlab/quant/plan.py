"""What a run will do, decided from config.json and headers alone: schemes, files to the byte, memory and time.

Knows nothing about tensors and imports no torch; `quant.run` follows the same assignment, so a dry run cannot differ.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from quantlab.errors import RecipeError
from quantlab.models.config import ModelConfig
from quantlab.models.naming import INPUT_GROUPS, block_prefix, linear_shapes
from quantlab.quant.patterns import matching
from quantlab.recipe import Override, Recipe
from quantlab.schemes import GROUP_SIZES, Scheme

TIED = "shares its weight with the embedding"


@dataclass(frozen=True, slots=True)
class Assignment:
    """Each linear's scheme in model order (None: kept in 16 bits), why some are skipped, and what cannot be done."""

    schemes: dict[str, Scheme | None]
    skipped: dict[str, str]
    problems: tuple[str, ...]


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
        entry = owner.get(name, recipe)
        schemes[name] = scheme_of(entry) if not isinstance(entry, str) else None
        if schemes[name] is None:
            skipped[name] = entry if isinstance(entry, str) else f"override '{entry.match}' says skip"
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
        owner = dict.fromkeys(found, f"ignored by '{pattern}'") | owner
    return owner, problems


def _found(pattern: str, names: Iterable[str], where: str, problems: list[str]) -> list[str]:
    try:
        return matching(pattern, names, where)
    except RecipeError as err:
        problems.append(f"{where}: {err.message}")
        return []


def _indivisible(schemes: Mapping[str, Scheme | None], shapes: Mapping[str, tuple[int, int]]) -> list[str]:
    """One problem for each kind of module whose input features are not a whole number of groups."""
    bad: dict[tuple[str, int, int], list[str]] = {}
    for name, scheme in schemes.items():
        size = scheme.group_size if scheme else None
        if size and shapes[name][1] % size:
            bad.setdefault((_kind(name), shapes[name][1], size), []).append(name)
    return [_indivisible_line(names, features, size) for (_, features, size), names in bad.items()]


def _indivisible_line(names: list[str], features: int, size: int) -> str:
    fits = [str(g) for g in reversed(GROUP_SIZES) if features % g == 0] + ["channel"]
    which = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} like it"
    return (
        f"{which}: {features} input features are not divisible by group size {size} "
        f"(fits: {', '.join(fits)}); set the group size, or override or ignore '{_pattern(names[0])}'"
    )


def _kind(name: str) -> str:
    """A module's name without its block: `mlp.down_proj`."""
    return name.split(".", 3)[3] if name.startswith("model.layers.") else name


def _pattern(name: str) -> str:
    return name if _kind(name) == name else rf"re:.*\.{name.rsplit('.', 1)[1]}"


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


def describe(scheme: Scheme | None) -> str:
    """A scheme in a few characters: `w4a16 g128`, `w4a16 g32 asym`, `w8a8`, `16-bit`."""
    if scheme is None:
        return "16-bit"
    group = "" if scheme.name == "w8a8" else " channel" if scheme.group_size is None else f" g{scheme.group_size}"
    return f"{scheme.name}{group}{'' if scheme.symmetric else ' asym'}"
