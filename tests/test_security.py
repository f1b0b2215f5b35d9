"""What hostile files could use is not in the source: no pickle, no remote code, no shell, no unsafe YAML."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

FORBIDDEN_IMPORTS = {"pickle", "cPickle", "dill", "marshal", "shelve", "joblib", "cloudpickle"}
FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "__import__", "torch.load", "torch.save", "yaml.load", "yaml.load_all",
    "yaml.unsafe_load", "yaml.full_load", "os.system", "os.popen", "subprocess.getoutput", "numpy.load", "np.load",
}  # fmt: skip
FORBIDDEN_FLAGS = {"trust_remote_code", "shell", "allow_pickle"}


def nodes(repository: Path) -> Iterator[tuple[str, ast.AST]]:
    """Every node of the shipped source and the examples, with its place."""
    for folder in ("quantlab", "kernels", "examples"):
        for path in sorted((repository / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                yield f"{path.relative_to(repository)}:{getattr(node, 'lineno', 0)}", node


def offences(place: str, node: ast.AST) -> Iterator[str]:
    """What is wrong with one node."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
        yield from (f"{place} imports {name}" for name in names if name.split(".")[0] in FORBIDDEN_IMPORTS)
    if isinstance(node, ast.Call):
        if (called := ast.unparse(node.func)) in FORBIDDEN_CALLS:
            yield f"{place} calls {called}"
        for keyword in node.keywords:
            if keyword.arg in FORBIDDEN_FLAGS and ast.unparse(keyword.value) != "False":
                yield f"{place} passes {keyword.arg}={ast.unparse(keyword.value)}"


def test_the_source_has_no_unsafe_call(repository: Path) -> None:
    found = [offence for place, node in nodes(repository) for offence in offences(place, node)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "planted",
    [
        "import pickle",
        "from dill import loads",
        "torch.load(path)",
        "yaml.load(text)",
        "eval(text)",
        "AutoTokenizer.from_pretrained(path, trust_remote_code=True)",
        "AutoTokenizer.from_pretrained(path, trust_remote_code=flag)",
        "subprocess.run(text, shell=True)",
    ],
)
def test_the_check_sees_a_planted_fault(planted: str) -> None:
    assert [offence for node in ast.walk(ast.parse(planted)) for offence in offences("here", node)]


def test_every_transformers_loader_refuses_remote_code(repository: Path) -> None:
    loaders = [
        (place, {keyword.arg for keyword in node.keywords})
        for place, node in nodes(repository)
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".from_pretrained")
    ]
    assert loaders, "the tokenizer is loaded somewhere"
    for place, flags in loaders:
        assert {"trust_remote_code", "local_files_only"} <= flags, place
