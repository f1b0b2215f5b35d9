"""Files of settings: YAML read node by node, so that every complaint carries its line and column.

Anchors, tags and merge keys are refused: a file of settings is a plain tree. Knows nothing about what its keys mean.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from yaml.constructor import ConstructorError
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from quantlab.errors import QuantlabError, did_you_mean, nearest

MAX_BYTES = 1_000_000
MAX_DEPTH = 16
PLAIN_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str", "map", "seq")}

Route = tuple[str | int, ...]  # from the root of a tree to a value: keys and list indices
Complaint = tuple[tuple[int, int], str]  # (line, column) and a sentence


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of file: what it is called, which keys it holds, the error of a bad one, and where to see good ones."""

    noun: str
    keys: str
    error: type[QuantlabError]
    builtin: Callable[[], Sequence[str]]  # names of those shipped
    listing: str | None  # the command that lists them
    example: str | None  # the command that shows one


@dataclass
class Marks:
    """Where each value of the tree stands: (line, column), from 1; keys apart from values."""

    values: dict[Route, tuple[int, int]] = field(default_factory=dict)
    keys: dict[Route, tuple[int, int]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Tree:
    """A file as dicts, lists and scalars, with the place of each; `where` names it in errors."""

    kind: Kind
    where: str
    data: dict[str, Any]
    marks: Marks

    def error(self, place: tuple[int, int], message: str) -> QuantlabError:
        """The error of this file at a line and column."""
        return self.kind.error(message, where=f"{self.where}:{place[0]}:{place[1]}")

    def at(self, route: Route) -> tuple[int, int]:
        """The place of a value, or the file's first if it is not there."""
        return self.marks.values.get(route, (1, 1))


def read_text(path: Path, kind: Kind) -> str:
    """The text of one file; raises the kind's error when it is missing, unreadable, too large or not UTF-8."""
    try:
        if path.is_dir():
            raise kind.error(f"this is a folder, not a {kind.noun} file", where=str(path))
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        close = nearest(path.stem, kind.builtin())
        hint = f"; the built-in one is called '{close}'" if close else ""
        raise kind.error(f"no such {kind.noun} file{hint}", where=str(path), fix=kind.listing) from None
    except OSError as err:
        raise kind.error(f"cannot be read: {err.strerror}", where=str(path)) from None
    if len(raw) > MAX_BYTES:
        raise kind.error(f"larger than {MAX_BYTES:,} bytes; a {kind.noun} is a page of text", where=str(path))
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as err:
        raise kind.error(f"not UTF-8 text (byte {err.start})", where=str(path)) from None


def parse(text: str, where: str, kind: Kind) -> Tree:
    """The tree of a file's text; raises the kind's error for anything that is not a plain mapping."""
    root = _compose(text, where, kind)
    tree = Tree(kind, where, {}, Marks())
    data = _plain(root, (), tree)
    if not isinstance(data, dict):
        raise tree.error((1, 1), f"a {kind.noun} is a mapping of keys such as {kind.keys}")
    tree.data.update(data)
    return tree


def _compose(text: str, where: str, kind: Kind) -> Node:
    """The one document's node tree, after a scan for what a file may not hold (the scan does not recurse)."""
    try:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
            elif isinstance(event, yaml.CollectionEndEvent):
                depth -= 1
            if depth > MAX_DEPTH:
                raise kind.error(f"nested deeper than {MAX_DEPTH} levels", where=_at(where, event.start_mark))
            if isinstance(event, yaml.NodeEvent) and event.anchor is not None:
                raise kind.error("anchors and aliases are not allowed", where=_at(where, event.start_mark))
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as err:
        mark = err.problem_mark or err.context_mark
        raise kind.error(f"not YAML: {err.problem or err.context}", where=_at(where, mark)) from None
    except (yaml.YAMLError, RecursionError) as err:
        raise kind.error(f"not YAML: {str(err).splitlines()[0]}", where=where) from None
    if root is None:
        raise kind.error("the file is empty", where=f"{where}:1:1", fix=kind.example)
    return root


def _at(where: str, mark: yaml.Mark | None) -> str:
    return where if mark is None else f"{where}:{mark.line + 1}:{mark.column + 1}"


def _plain(node: Node, route: Route, tree: Tree) -> Any:
    """A node as dicts, lists and scalars; fills the tree's marks."""
    if node.tag not in PLAIN_TAGS:
        raise tree.error(_place(node), f"a value of kind {node.tag} is not allowed")
    tree.marks.values[route] = _place(node)
    if isinstance(node, MappingNode):
        return _mapping(node, route, tree)
    if isinstance(node, SequenceNode):
        return [_plain(child, (*route, i), tree) for i, child in enumerate(node.value)]
    return _scalar(node, tree)


def _place(node: Node) -> tuple[int, int]:
    return node.start_mark.line + 1, node.start_mark.column + 1


def _mapping(node: MappingNode, route: Route, tree: Tree) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key_node, value_node in node.value:
        if not isinstance(key_node, ScalarNode):
            raise tree.error(_place(key_node), "a key must be a plain word")
        key = key_node.value
        if key in out:
            first = tree.marks.keys[(*route, key)][0]
            raise tree.error(_place(key_node), f"duplicate key '{key}', first set on line {first}")
        tree.marks.keys[(*route, key)] = _place(key_node)
        out[key] = _plain(value_node, (*route, key), tree)
    return out


def _scalar(node: Node, tree: Tree) -> Any:
    try:
        return yaml.SafeLoader("").construct_object(node)
    except (ValueError, ConstructorError):
        raise tree.error(_place(node), "a value that cannot be read") from None


def explain(
    err: ValidationError,
    tree: Tree,
    valid_keys: Callable[[Route], Sequence[str]],
    special: Callable[[Any, Route], Complaint | None] = lambda detail, route: None,
) -> QuantlabError:
    """The first problem in file order, in one line; says how many more there are.

    `valid_keys` tells the keys that the mapping at a route may hold; `special` may word one of pydantic's complaints.
    """
    details = err.errors(include_url=False)
    # pydantic also calls a list too short when its items failed, and a key missing when it was mistyped: say the cause.
    causes = [d for d in details if d["type"] not in ("too_short", "missing")]
    causes = causes or [d for d in details if d["type"] == "missing"] or details
    typos = [d for d in causes if d["type"] == "extra_forbidden"]
    problems = sorted(
        special(detail, route := file_route(detail["loc"], tree.data)) or _problem(detail, route, tree, valid_keys)
        for detail in typos or causes
    )
    place, message = problems[0]
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return tree.error(place, message + more)


def _problem(detail: Any, route: Route, tree: Tree, valid_keys: Callable[[Route], Sequence[str]]) -> Complaint:
    """One pydantic complaint as its place and a sentence."""
    name = str(route[-1]) if route else tree.kind.noun
    if detail["type"] == "extra_forbidden":
        place = tree.marks.keys.get(route, (1, 1))
        return place, f"unknown key '{name}'{did_you_mean(name, valid_keys(route[:-1]))}"
    if detail["type"] == "missing":
        return tree.at(route[:-1]), f"the key '{name}' is missing"
    if detail["type"] == "value_error":
        return tree.at(route), detail["msg"].removeprefix("Value error, ")
    return tree.at(route), f"{name}: {_reason(detail)}"


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


def file_route(loc: Route, data: Any) -> Route:
    """pydantic's location without the union tags that it inserts, which the file does not have."""
    route: list[str | int] = []
    here = data
    for i, part in enumerate(loc):
        last = i == len(loc) - 1
        if isinstance(here, list) and isinstance(part, int) and part < len(here):
            here = here[part]
        elif isinstance(here, dict) and (part in here or last):
            here = here.get(part)
        else:
            continue
        route.append(part)
    return tuple(route)
