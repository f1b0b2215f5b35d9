"""Who may import whom: the table is the document, the source must agree with it."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Layers from the bottom; a part may import the parts named here, itself, and third parties.
ALLOWED: dict[str, set[str]] = {
    "quantlab": set(),  # quantlab/__init__.py: the version
    "quantlab_kernels": set(),
    "errors": set(),
    "log": set(),
    "schemes": set(),
    "events": set(),
    "clock": set(),
    "units": set(),
    "bundled": {"quantlab"},
    "recipe": {"schemes"},
    "yaml_tree": {"errors"},
    "recipe_file": {"quantlab", "errors", "schemes", "recipe", "yaml_tree"},
    "text": {"errors"},
    "token_bytes": {"text"},
    "detokenizer": {"text", "token_bytes"},
    "chat_template": {"errors", "text"},
    "models": {"errors", "quantlab_kernels"},
    "checkpoint": {"quantlab", "errors", "log", "schemes", "quantlab_kernels", "models"},
    "quant": {
        "quantlab", "bundled", "errors", "log", "events", "clock", "schemes", "recipe", "text", "quantlab_kernels",
        "models", "checkpoint",
    },
    "eval": {
        "quantlab", "bundled", "errors", "events", "clock", "log", "units", "schemes", "yaml_tree", "recipe_file",
        "text", "quantlab_kernels", "models", "checkpoint", "runtime",
    },
    "runtime": {
        "quantlab", "errors", "log", "clock", "units", "schemes", "models", "checkpoint", "quantlab_kernels",
    },
    "llm": {"errors", "text", "token_bytes", "detokenizer", "chat_template", "runtime"},
    "server": {
        "quantlab", "errors", "log", "clock", "units", "text", "token_bytes", "detokenizer", "chat_template", "runtime",
    },
    "bench": {
        "quantlab", "errors", "log", "events", "units", "bundled", "schemes", "recipe", "recipe_file", "text",
        "quantlab_kernels", "models", "checkpoint", "quant", "eval", "runtime", "llm",
    },
    "cli": {
        "quantlab", "errors", "log", "events", "units", "schemes", "recipe", "recipe_file", "text", "models",
        "checkpoint", "quant", "eval", "runtime", "llm", "server", "bench",
    },
    "__main__": {"cli", "log"},
}  # fmt: skip

# These answer --help, inspect, --dry-run and completion, so they and all that they import stay free of heavy imports.
LIGHT = (
    "quantlab.errors", "quantlab.log", "quantlab.schemes", "quantlab.events", "quantlab.units", "quantlab.recipe",
    "quantlab.yaml_tree", "quantlab.recipe_file",
    "quantlab.models.config", "quantlab.models.naming", "quantlab.checkpoint.header", "quantlab.checkpoint.hf",
    "quantlab.checkpoint.schema", "quantlab.checkpoint.sizes", "quantlab.bundled",
    "quantlab.quant.amounts", "quantlab.quant.options", "quantlab.quant.plan", "quantlab.quant.work",
    "quantlab.eval.result", "quantlab.eval.gate", "quantlab.eval.reports.files", "quantlab.eval.reports.terminal",
    "quantlab.cli.app",
)  # fmt: skip
HEAVY = {"torch", "transformers", "datasets", "numpy", "safetensors", "pyarrow", "triton"}


def modules(repository: Path) -> dict[str, Path]:
    """Module name -> file of everything that is shipped."""
    roots = {repository: "quantlab", repository / "kernels": "quantlab_kernels"}
    found = {}
    for root, package in roots.items():
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def part_of(module: str) -> str:
    """The row of the table that a module belongs to."""
    names = module.split(".")
    return names[1] if names[0] == "quantlab" and len(names) > 1 else names[0]


def imported(tree: ast.AST, known: dict[str, Path]) -> Iterator[tuple[str, int]]:
    """Our own modules that a tree imports, wherever in the file, with the line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module in known:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield (full if full in known else node.module), node.lineno


def third_parties(tree: ast.Module) -> set[str]:
    """Top-level packages that a file imports when it is itself imported."""
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.fixture(scope="module")
def trees(repository: Path) -> dict[str, ast.Module]:
    return {name: ast.parse(path.read_text()) for name, path in modules(repository).items()}


def test_every_import_is_in_the_table(trees: dict[str, ast.Module], repository: Path) -> None:
    known = modules(repository)
    assert {part_of(name) for name in trees} <= ALLOWED.keys()
    wrong = [
        f"{name}:{line} imports {target}"
        for name, tree in trees.items()
        for target, line in imported(tree, known)
        if part_of(target) not in ALLOWED[part_of(name)] | {part_of(name)}
    ]
    assert not wrong, "\n".join(wrong)


def test_the_table_itself_has_no_circle() -> None:
    left = dict(ALLOWED)
    while left:
        bottom = {part for part, below in left.items() if not below & left.keys()}
        assert bottom, f"circle among {sorted(left)}"
        left = {part: below for part, below in left.items() if part not in bottom}


def test_modules_do_not_import_in_circles(trees: dict[str, ast.Module], repository: Path) -> None:
    known = modules(repository)
    left = {name: {target for target, _ in imported(tree, known)} - {name} for name, tree in trees.items()}
    while left:
        bottom = {name for name, below in left.items() if not below & left.keys()}
        assert bottom, f"circle among {sorted(left)}"
        left = {name: below for name, below in left.items() if name not in bottom}


def test_imports_are_absolute_and_at_the_top(trees: dict[str, ast.Module]) -> None:
    wrong = []
    for name, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                wrong.append(f"{name}:{node.lineno} relative import")
            if isinstance(node, ast.Import | ast.ImportFrom) and node.col_offset and not _may_defer(name, tree, node):
                wrong.append(f"{name}:{node.lineno} import below the top level")
    assert not wrong, "\n".join(wrong)


def _may_defer(name: str, tree: ast.Module, node: ast.AST) -> bool:
    """The command line defers heavy imports; anyone may import for the type checker alone."""
    guards = [n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    return part_of(name) == "cli" or any(node in ast.walk(guard) for guard in guards)


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_import_nothing_heavy(module: str, trees: dict[str, ast.Module], repository: Path) -> None:
    known = modules(repository)
    queue, seen = [module], set()
    while queue:
        name = queue.pop()
        if name in seen:
            continue
        seen.add(name)
        assert not third_parties(trees[name]) & HEAVY, f"{module} imports {name}, which is heavy"
        top = ast.Module([n for n in trees[name].body if isinstance(n, ast.Import | ast.ImportFrom)], [])
        queue += [target for target, _ in imported(top, known)]


def test_kernels_stand_alone(trees: dict[str, ast.Module]) -> None:
    for name, tree in trees.items():
        if part_of(name) == "quantlab_kernels":
            strangers = third_parties(tree) - {"torch", "triton", "quantlab_kernels"} - sys.stdlib_module_names
            assert not strangers, f"{name}: {strangers}"


def test_the_kernels_folder_is_not_a_package(repository: Path) -> None:
    # A kernels/__init__.py would shadow the Hugging Face package `kernels` and break transformers.
    assert not (repository / "kernels" / "__init__.py").exists()


def test_package_files_are_empty(trees: dict[str, ast.Module], repository: Path) -> None:
    for name, path in modules(repository).items():
        if path.name == "__init__.py" and name not in ("quantlab", "quantlab_kernels"):
            assert not trees[name].body, f"{path} holds code"
