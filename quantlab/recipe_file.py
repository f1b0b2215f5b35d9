"""Recipes on disk: YAML read node by node, so that every complaint carries its line and column.

Knows nothing about tensors or checkpoints. Anchors, tags and merge keys are refused: a recipe is a plain tree.
"""

import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from yaml.constructor import ConstructorError
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from quantlab.errors import RecipeError, UsageError, did_you_mean, nearest
from quantlab.recipe import Awq, Distill, Gptq, GroupSize, Override, Quality, Recipe, Rounding, Rtn, SmoothQuant
from quantlab.schemes import SchemeName

MAX_BYTES = 1_000_000
MAX_DEPTH = 16
PASSES: dict[str, type] = {
    "rtn": Rtn, "gptq": Gptq, "awq": Awq, "smoothquant": SmoothQuant, "rounding": Rounding, "distill": Distill,
}  # fmt: skip
PLAIN_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str", "map", "seq")}


@dataclass
class Marks:
    """Where each value of the tree stands: (line, column), from 1; keys apart from values."""

    values: dict[tuple[str | int, ...], tuple[int, int]] = field(default_factory=dict)
    keys: dict[tuple[str | int, ...], tuple[int, int]] = field(default_factory=dict)


def load_recipe(path: Path) -> Recipe:
    """Read one recipe file; raises RecipeError at file:line:column for anything that is not a valid recipe."""
    return parse_recipe(_read(path), str(path))


def parse_recipe(text: str, where: str) -> Recipe:
    """Parse the text of a recipe; `where` names it in errors."""
    root = _compose(text, where)
    marks = Marks()
    data = _plain(root, (), marks, where)
    if not isinstance(data, dict):
        raise RecipeError("a recipe is a mapping of keys such as scheme and passes", where=f"{where}:1:1")
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as err:
        raise _explain(err, data, marks, where) from None
    _check_schemes(recipe, marks, where)
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


def _check_schemes(recipe: Recipe, marks: Marks, where: str) -> None:
    entries: list[tuple[tuple[str | int, ...], Recipe | Override]] = [((), recipe)]
    entries += [(("overrides", i), entry) for i, entry in enumerate(recipe.overrides)]
    for path, entry in entries:
        problem = _scheme_problem(entry)
        if problem:
            line, column = marks.values.get((*path, problem[0]), (1, 1))
            raise RecipeError(problem[1], where=f"{where}:{line}:{column}")


def _read(path: Path) -> str:
    try:
        if path.is_dir():
            raise RecipeError("this is a folder, not a recipe file", where=str(path))
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        close = nearest(path.stem, builtin_names())
        hint = f"; the built-in one is called '{close}'" if close else ""
        raise RecipeError(f"no such recipe file{hint}", where=str(path), fix="quantlab recipes list") from None
    except OSError as err:
        raise RecipeError(f"cannot be read: {err.strerror}", where=str(path)) from None
    if len(raw) > MAX_BYTES:
        raise RecipeError(f"larger than {MAX_BYTES:,} bytes; a recipe is a page of text", where=str(path))
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as err:
        raise RecipeError(f"not UTF-8 text (byte {err.start})", where=str(path)) from None


def _compose(text: str, where: str) -> Node:
    """The one document's node tree, after a scan for what a recipe may not hold (the scan does not recurse)."""
    try:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
            elif isinstance(event, yaml.CollectionEndEvent):
                depth -= 1
            if depth > MAX_DEPTH:
                raise RecipeError(f"nested deeper than {MAX_DEPTH} levels", where=_at(where, event.start_mark))
            if isinstance(event, yaml.NodeEvent) and event.anchor is not None:
                raise RecipeError("anchors and aliases are not allowed", where=_at(where, event.start_mark))
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as err:
        mark = err.problem_mark or err.context_mark
        raise RecipeError(f"not YAML: {err.problem or err.context}", where=_at(where, mark)) from None
    except (yaml.YAMLError, RecursionError) as err:
        raise RecipeError(f"not YAML: {str(err).splitlines()[0]}", where=where) from None
    if root is None:
        raise RecipeError("the file is empty", where=f"{where}:1:1", fix="quantlab recipes show w4a16-balanced")
    return root


def _at(where: str, mark: yaml.Mark | None) -> str:
    return where if mark is None else f"{where}:{mark.line + 1}:{mark.column + 1}"


def _plain(node: Node, path: tuple[str | int, ...], marks: Marks, where: str) -> Any:
    """A node as dicts, lists and scalars; fills `marks`."""
    if node.tag not in PLAIN_TAGS:
        raise RecipeError(f"a value of kind {node.tag} is not allowed", where=_at(where, node.start_mark))
    marks.values[path] = (node.start_mark.line + 1, node.start_mark.column + 1)
    if isinstance(node, MappingNode):
        return _mapping(node, path, marks, where)
    if isinstance(node, SequenceNode):
        return [_plain(child, (*path, i), marks, where) for i, child in enumerate(node.value)]
    return _scalar(node, where)


def _mapping(node: MappingNode, path: tuple[str | int, ...], marks: Marks, where: str) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key_node, value_node in node.value:
        if not isinstance(key_node, ScalarNode):
            raise RecipeError("a key must be a plain word", where=_at(where, key_node.start_mark))
        key = key_node.value
        if key in out:
            first = marks.keys[(*path, key)][0]
            raise RecipeError(
                f"duplicate key '{key}', first set on line {first}", where=_at(where, key_node.start_mark)
            )
        marks.keys[(*path, key)] = (key_node.start_mark.line + 1, key_node.start_mark.column + 1)
        out[key] = _plain(value_node, (*path, key), marks, where)
    return out


def _scalar(node: Node, where: str) -> Any:
    try:
        return yaml.SafeLoader("").construct_object(node)
    except (ValueError, ConstructorError):
        raise RecipeError("a value that cannot be read", where=_at(where, node.start_mark)) from None


def _explain(err: ValidationError, data: dict[str, Any], marks: Marks, where: str) -> RecipeError:
    """The first problem in file order, in one line; says how many more there are."""
    details = err.errors(include_url=False)
    # pydantic also calls a list too short when its items failed, and a key missing when it was mistyped: say the cause.
    causes = [d for d in details if d["type"] not in ("too_short", "missing")] or details
    typos = [d for d in causes if d["type"] == "extra_forbidden"]
    problems = sorted(_problem(detail, data, marks) for detail in typos or causes)
    (line, column), message = problems[0]
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return RecipeError(message + more, where=f"{where}:{line}:{column}")


def _problem(detail: Any, data: dict[str, Any], marks: Marks) -> tuple[tuple[int, int], str]:
    """One pydantic complaint as its place and a sentence."""
    path = _file_path(detail["loc"], data)
    kind, context = detail["type"], detail.get("ctx", {})
    name = str(path[-1]) if path else "recipe"
    if kind == "extra_forbidden":
        valid = _valid_keys(path[:-1], data)
        return marks.keys.get(path, (1, 1)), f"unknown key '{name}'{did_you_mean(name, valid)}"
    if kind == "missing":
        return marks.values.get(path[:-1], (1, 1)), f"the key '{name}' is missing"
    if kind == "union_tag_invalid":
        tag = str(context.get("tag", ""))
        return marks.values.get((*path, "pass"), (1, 1)), f"unknown pass '{tag}'{did_you_mean(tag, PASSES)}"
    if kind == "union_tag_not_found":
        return marks.values.get(path, (1, 1)), f"each pass needs a 'pass:' key, one of {', '.join(PASSES)}"
    if kind == "value_error":
        at = "passes" if detail["msg"].startswith("Value error, passes") or "a pass " in detail["msg"] else ""
        return marks.keys.get((at,), (1, 1)), detail["msg"].removeprefix("Value error, ")
    return marks.values.get(path, (1, 1)), f"{name}: {_reason(detail)}"


def _reason(detail: Any) -> str:
    """What a value should have been, and what it is."""
    value = detail["input"]
    if detail["type"] == "too_short":
        return "needs at least one entry"
    if detail["type"] == "tuple_type":
        return f"must be a list, not {_shown(value)}"
    if detail["type"].startswith("model_"):
        return f"must be a mapping of keys, not {_shown(value)}"
    message = detail["msg"].removeprefix("Input ").removeprefix("String ")
    hint = nearest(str(value), re.findall(r"'([^']*)'", message)) if detail["type"] == "literal_error" else None
    return f"{message}, not {_shown(value)}" + (f", did you mean '{hint}'?" if hint else "")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _file_path(loc: tuple[str | int, ...], data: Any) -> tuple[str | int, ...]:
    """pydantic's location without the union tags that it inserts, which the file does not have."""
    path: list[str | int] = []
    here = data
    for i, part in enumerate(loc):
        last = i == len(loc) - 1
        if isinstance(here, list) and isinstance(part, int) and part < len(here):
            here = here[part]
        elif isinstance(here, dict) and (part in here or last):
            here = here.get(part)
        else:
            continue
        path.append(part)
    return tuple(path)


def _valid_keys(path: tuple[str | int, ...], data: dict[str, Any]) -> list[str]:
    """The keys allowed in the mapping at `path`."""
    model: Any = Recipe
    if path and path[0] == "overrides":
        model = Override
    elif path and path[0] == "passes":
        step = data["passes"][path[1]]
        model = PASSES[step.get("pass", step.get("kind"))]  # pydantic also finds the kind under the field's own name
    return [info.alias or name for name, info in model.model_fields.items()]
