"""Recipes on disk: YAML files and the built-in ones, every complaint at its line and column.

Knows nothing about tensors or checkpoints.
"""

from functools import cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from quantlab import yaml_tree
from quantlab.errors import RecipeError, UsageError, did_you_mean
from quantlab.recipe import Awq, Distill, Gptq, GroupSize, Override, Quality, Recipe, Rounding, Rtn, SmoothQuant
from quantlab.schemes import SchemeName
from quantlab.yaml_tree import Complaint, Kind, Route, Tree

PASSES: dict[str, type] = {
    "rtn": Rtn, "gptq": Gptq, "awq": Awq, "smoothquant": SmoothQuant, "rounding": Rounding, "distill": Distill,
}  # fmt: skip


def load_recipe(path: Path) -> Recipe:
    """Read one recipe file; raises RecipeError at file:line:column for anything that is not a valid recipe."""
    return parse_recipe(yaml_tree.read_text(path, RECIPE), str(path))


def parse_recipe(text: str, where: str) -> Recipe:
    """Parse the text of a recipe; `where` names it in errors."""
    tree = yaml_tree.parse(text, where, RECIPE)
    try:
        recipe = Recipe.model_validate(tree.data)
    except ValidationError as err:
        raise yaml_tree.explain(
            err, tree, lambda route: _valid_keys(route, tree.data), lambda detail, route: _special(detail, route, tree)
        ) from None
    _check_schemes(recipe, tree)
    return recipe


def builtin_folder() -> Path:
    """The folder of built-in recipes: inside an installed package, or beside it in a source tree."""
    here = Path(__file__).resolve().parent
    shipped = here / "_recipes"
    return shipped if shipped.is_dir() else here.parent / "recipes"


@cache
def builtin_names() -> tuple[str, ...]:
    """Names of the built-in recipes, sorted."""
    return tuple(sorted(p.stem for p in builtin_folder().glob("*.yaml")))


def builtin_text(name: str) -> str:
    """The YAML text of one built-in recipe; raises UsageError for an unknown name."""
    if name not in builtin_names():
        hint = did_you_mean(name, builtin_names())
        raise UsageError(f"no built-in recipe is called '{name}'{hint}", fix="quantlab recipes list")
    return (builtin_folder() / f"{name}.yaml").read_text(encoding="utf-8")


def builtin(name: str) -> Recipe:
    """One built-in recipe; raises UsageError for an unknown name."""
    return parse_recipe(builtin_text(name), f"recipes/{name}.yaml")


def for_quality(
    scheme: SchemeName, quality: Quality, group_size: GroupSize | None = None, symmetric: bool | None = None
) -> Recipe:
    """The recipe behind `--scheme` and `--quality`, regrouped if asked; raises UsageError for an impossible scheme."""
    return regroup(builtin(f"{scheme}-{quality}"), group_size, symmetric)


def regroup(recipe: Recipe, group_size: GroupSize | None, symmetric: bool | None) -> Recipe:
    """`recipe` with another group size or symmetry (None: its own); raises UsageError where the scheme has none."""
    data = recipe.model_dump(by_alias=True, exclude_unset=True)
    if group_size is not None:
        data["group_size"] = group_size
    if symmetric is not None:
        data["symmetric"] = symmetric
    changed = Recipe.model_validate(data)
    problem = _scheme_problem(changed)
    if problem:
        raise UsageError(problem[1], where=f"--{problem[0].replace('_', '-')}")
    return changed


def _scheme_problem(entry: Recipe | Override) -> tuple[str, str] | None:
    """The key and the reason why an entry's scheme cannot be, looking only at what was written down."""
    if entry.scheme == "w8a8" and "group_size" in entry.model_fields_set and entry.group_size != "channel":
        return "group_size", f"w8a8 has one scale per output channel, not groups of {entry.group_size}: use channel"
    if entry.scheme in ("w8a8", "w8a16") and not entry.symmetric:
        return "symmetric", f"asymmetric codes exist for w4a16 only, not for {entry.scheme}"
    return None


def _check_schemes(recipe: Recipe, tree: Tree) -> None:
    entries: list[tuple[Route, Recipe | Override]] = [((), recipe)]
    entries += [(("overrides", i), entry) for i, entry in enumerate(recipe.overrides)]
    for route, entry in entries:
        problem = _scheme_problem(entry)
        if problem:
            raise tree.error(tree.at((*route, problem[0])), problem[1])


def _special(detail: Any, route: Route, tree: Tree) -> Complaint | None:
    """Complaints about passes, which are told apart by their 'pass:' key."""
    if detail["type"] == "union_tag_invalid":
        tag = str(detail["ctx"].get("tag", ""))
        return tree.at((*route, "pass")), f"unknown pass '{tag}'{did_you_mean(tag, PASSES)}"
    if detail["type"] == "union_tag_not_found":
        return tree.at(route), f"each pass needs a 'pass:' key, one of {', '.join(PASSES)}"
    if detail["type"] == "value_error":
        at = "passes" if detail["msg"].startswith("Value error, passes") or "a pass " in detail["msg"] else ""
        return tree.marks.keys.get((at,), (1, 1)), detail["msg"].removeprefix("Value error, ")
    return None


def _valid_keys(route: Route, data: dict[str, Any]) -> list[str]:
    """The keys allowed in the mapping at `route`."""
    model: Any = Recipe
    if route and route[0] == "overrides":
        model = Override
    elif route and route[0] == "passes":
        step = data["passes"][route[1]]
        model = PASSES[step.get("pass", step.get("kind"))]  # pydantic also finds the kind under the field's own name
    return [info.alias or name for name, info in model.model_fields.items()]


RECIPE = Kind(
    "recipe", "scheme and passes", RecipeError, builtin_names, "quantlab recipes list",
    "quantlab recipes show w4a16-balanced",
)  # fmt: skip
