"""The size and habit budgets of the source, from figures of codebases that people like to read."""

import ast
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

FILE_LINES = 400
FUNCTION_LINES, KERNEL_LINES = 60, 120
MEDIAN_LINES, P90_LINES = 10, 30
ARGUMENTS = 7
LINE_LENGTH = 120
Function = ast.FunctionDef | ast.AsyncFunctionDef


@pytest.fixture(scope="module")
def sources(repository: Path) -> dict[str, ast.Module]:
    """Path relative to the repository -> tree of every shipped file and example."""
    folders = ("quantlab", "kernels", "examples")
    paths = [path for folder in folders for path in sorted((repository / folder).rglob("*.py"))]
    return {str(path.relative_to(repository)): ast.parse(path.read_text()) for path in paths}


def functions(sources: dict[str, ast.Module]) -> Iterator[tuple[str, Function]]:
    """Every function with its place."""
    for path, tree in sources.items():
        for node in ast.walk(tree):
            if isinstance(node, Function):
                yield f"{path}:{node.lineno} {node.name}", node


def length(node: Function) -> int:
    """Lines from def to the last statement."""
    return (node.end_lineno or node.lineno) - node.lineno + 1


def is_kernel(node: Function) -> bool:
    """Whether Triton compiles the function."""
    return any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)


def is_command(node: Function) -> bool:
    """Whether the function is a command, whose arguments are the user's options."""
    return node.name == "command" or any("command" in ast.unparse(decorator) for decorator in node.decorator_list)


def test_files_are_short(sources: dict[str, ast.Module], repository: Path) -> None:
    counts = {path: len((repository / path).read_text().splitlines()) for path in sources}
    assert not {path: count for path, count in counts.items() if count > FILE_LINES}


def test_functions_are_short(sources: dict[str, ast.Module]) -> None:
    over = [
        f"{place}: {length(node)} lines"
        for place, node in functions(sources)
        if length(node) > (KERNEL_LINES if is_kernel(node) else FUNCTION_LINES)
    ]
    assert not over, "\n".join(over)


def test_most_functions_are_very_short(sources: dict[str, ast.Module]) -> None:
    lengths = sorted(length(node) for _, node in functions(sources))
    assert statistics.median(lengths) <= MEDIAN_LINES
    assert lengths[int(0.9 * (len(lengths) - 1))] <= P90_LINES


def test_functions_take_few_arguments(sources: dict[str, ast.Module]) -> None:
    over = []
    for place, node in functions(sources):
        names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        count = len([name for name in names if name not in ("self", "cls")])
        if count > ARGUMENTS and not is_kernel(node) and not is_command(node):
            over.append(f"{place}: {count} arguments")
    assert not over, "\n".join(over)


def test_no_function_hides_its_arguments(sources: dict[str, ast.Module]) -> None:
    assert not [place for place, node in functions(sources) if node.args.kwarg]


def test_no_globals_no_bare_except_no_star_import(sources: dict[str, ast.Module]) -> None:
    wrong = []
    for path, tree in sources.items():
        for node in ast.walk(tree):
            bare = isinstance(node, ast.ExceptHandler) and node.type is None
            star = isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names)
            if isinstance(node, ast.Global | ast.Nonlocal) or bare or star:
                wrong.append(f"{path}:{node.lineno}")
    assert not wrong, "\n".join(wrong)


def test_only_the_log_module_reads_the_environment(sources: dict[str, ast.Module]) -> None:
    readers = {
        path
        for path, tree in sources.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.environ", "os.getenv")
    }
    # The benches start programs of their own and hand them an environment; the demo has nothing to hide either.
    assert {path for path in readers if not path.startswith("quantlab/bench/")} <= {"quantlab/log.py"}


def test_every_module_says_what_it_is_for(sources: dict[str, ast.Module]) -> None:
    assert not [path for path, tree in sources.items() if tree.body and not ast.get_docstring(tree)]


def test_public_functions_and_classes_have_docstrings(sources: dict[str, ast.Module]) -> None:
    missing = []
    for path, tree in sources.items():
        classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
        for node in [*tree.body, *(member for owner in classes for member in owner.body)]:
            if (
                isinstance(node, Function | ast.ClassDef)
                and not node.name.startswith("_")
                and not ast.get_docstring(node)
            ):
                missing.append(f"{path}:{node.lineno} {node.name}")
    assert not missing, "\n".join(missing)


def test_lines_fit(repository: Path) -> None:
    over = [
        f"{path.relative_to(repository)}:{number}"
        for folder in ("quantlab", "kernels", "examples", "tests")
        for path in sorted((repository / folder).rglob("*.py"))
        for number, line in enumerate(path.read_text().split("\n"), start=1)
        if len(line) > LINE_LENGTH
    ]
    assert not over, "\n".join(over)


def test_todos_name_nothing_left_undone(sources: dict[str, ast.Module], repository: Path) -> None:
    assert not [path for path in sources if "TODO" in (repository / path).read_text()]


def test_every_test_can_fail(repository: Path) -> None:
    """No test returns early, and each one asserts, expects an error, or hands its work to a helper that does."""
    idle = []
    for path in sorted((repository / "tests").rglob("test_*.py")):
        tree = ast.parse(path.read_text())
        helpers = {n.name for n in tree.body if isinstance(n, ast.FunctionDef) and _checks(n, set())}
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_") and not _checks(node, helpers):
                idle.append(f"{path.relative_to(repository)}:{node.lineno} {node.name}")
    assert not idle, "\n".join(idle)


def _checks(node: ast.FunctionDef, helpers: set[str]) -> bool:
    calls = {ast.unparse(n.func) for n in ast.walk(node) if isinstance(n, ast.Call)}
    runs = any(
        isinstance(n, ast.keyword) and n.arg == "check" and ast.unparse(n.value) == "True" for n in ast.walk(node)
    )
    checking = runs or any(call.split(".")[-1].lstrip("_").startswith(("assert", "raises", "warns")) for call in calls)
    return checking or bool(calls & helpers) or any(isinstance(n, ast.Assert) for n in ast.walk(node))
