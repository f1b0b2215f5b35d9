"""One server over the shipped model for all tests that leave it as it was."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.served import SMALL, Served, serving

TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="session")
def chat_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A template for a model that has none."""
    path = tmp_path_factory.mktemp("template") / "chat.jinja"
    path.write_text(TEMPLATE)
    return path


@pytest.fixture(scope="session")
def served(books_5m: Path, chat_template: Path) -> Iterator[Served]:
    """The shipped model behind HTTP, in float32 so that transformers can be its oracle."""
    with serving(books_5m, *SMALL, "--dtype", "float32", "--chat-template", str(chat_template)) as running:
        yield running
        code, told = running.terminate()
        assert code == 0, told
        assert "Traceback" not in told, told
