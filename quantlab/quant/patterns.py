"""Which modules a recipe's `match` and `ignore` entries mean: a whole name, or a regular expression after `re:`.

Knows nothing about schemes. A recipe may come from a stranger, so patterns that could take exponential time are refused
before they are tried: repeats are counted, repeated groups and look-around are not allowed.
"""

import re
from collections.abc import Iterable

from quantlab.errors import RecipeError, nearest

PREFIX = "re:"
MAX_REPEATS = 4
MAX_BRANCHES = 64
REPEAT = re.compile(r"[*+?]|\{\d*,?\d*\}")


def matching(pattern: str, names: Iterable[str], where: str) -> list[str]:
    """The names that `pattern` means, in order; raises RecipeError for a bad pattern or one that matches nothing."""
    known = list(names)
    if not pattern.startswith(PREFIX):
        found = [pattern] if pattern in known else []
    else:
        compiled = compile_pattern(pattern, where)
        found = [name for name in known if compiled.fullmatch(name)]
    if not found:
        raise RecipeError(f"'{pattern}' matches no module{_hint(pattern, known)}", where=where)
    return found


def compile_pattern(pattern: str, where: str) -> re.Pattern[str]:
    """The expression after `re:`; raises RecipeError if it is malformed or could take exponential time."""
    text = pattern.removeprefix(PREFIX)
    reason = _danger(text)
    if reason:
        raise RecipeError(f"the pattern '{pattern}' is refused: {reason}", where=where)
    try:
        return re.compile(text)
    except (re.error, OverflowError, RecursionError) as err:
        raise RecipeError(f"'{pattern}' is not a regular expression: {err}", where=where) from None


def _danger(text: str) -> str | None:
    """Why an expression could be slow: with at most four single-character repeats the work is polynomial and small."""
    bare = re.sub(r"\[\^?\]?(?:\\.|[^\]\\])*\]", "x", re.sub(r"\\[^1-9]", "x", text))
    if re.search(r"\\[1-9]", bare):
        return "back-references are not allowed"
    if re.search(r"\(\?(?!:)", bare):
        return "of the (?...) forms only (?:...) is allowed"
    plain = bare.replace("(?:", "(")
    if re.search(r"\)(?:[*+?]|\{)", plain):
        return "a group may not be repeated; write the repeat inside it"
    if len(REPEAT.findall(plain)) > MAX_REPEATS:
        return f"more than {MAX_REPEATS} repeats"
    if plain.count("|") > MAX_BRANCHES or len(re.findall(r"\([^()]*\|", plain)) > MAX_REPEATS:
        return "too many alternatives"
    return None


def _hint(pattern: str, names: list[str]) -> str:
    """The nearest module to a mistyped name, or how to say a suffix when a bare one was written."""
    if pattern.startswith(PREFIX):
        example = next((name for name in names if name != "lm_head"), "lm_head")
        return f" (the whole name must match, such as {example})"
    if any(name.endswith(f".{pattern}") for name in names):
        return rf", did you mean 're:.*\.{re.escape(pattern)}'?"
    close = nearest(pattern, names)
    return f", did you mean '{close}'?" if close else ""
