"""What every test folder shares: seeds, the shipped model and texts, and which tests this machine can run."""

import os
from pathlib import Path

import pytest
import torch

from quantlab.cli.app import main
from quantlab.text import Tokenizer, load_tokenizer

REPOSITORY = Path(__file__).parent.parent


def pytest_configure() -> None:
    """Without a GPU, kernels run in Triton's interpreter, which is chosen when the first of them is imported.

    What compiles them for a GPU starts a process of its own.
    """
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers in every run, whatever the order of the tests."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the source tree."""
    return REPOSITORY


@pytest.fixture(scope="session")
def books_5m() -> Path:
    """The shipped 5M-parameter model (read only)."""
    return REPOSITORY / "examples" / "books-5m"


@pytest.fixture(scope="session")
def calibration_text() -> Path:
    """The shipped calibration text (read only)."""
    return REPOSITORY / "examples" / "text" / "calibration.txt"


@pytest.fixture(scope="session")
def evaluation_text() -> Path:
    """The shipped held-out text (read only)."""
    return REPOSITORY / "examples" / "text" / "evaluation.txt"


@pytest.fixture(scope="session")
def books_tokenizer(books_5m: Path) -> Tokenizer:
    """The shipped model's tokenizer."""
    return load_tokenizer(books_5m)


def _quantized(source: Path, recipe: str, out: Path) -> Path:
    assert main(["quantize", str(source), "--out", str(out), "--recipe", recipe, "--device", "cpu"]) == 0
    return out


@pytest.fixture(scope="session")
def int4_model(books_5m: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model in INT4 by plain rounding (read only)."""
    return _quantized(books_5m, "w4a16-rtn", tmp_path_factory.mktemp("int4") / "books-5m-w4a16")


@pytest.fixture(scope="session")
def int8_model(books_5m: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model in INT8, weights and activations, by plain rounding (read only)."""
    return _quantized(books_5m, "w8a8-rtn", tmp_path_factory.mktemp("int8") / "books-5m-w8a8")
