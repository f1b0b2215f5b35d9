"""A folder of task data in the bundled layouts, cut from the shipped held-out text, and the shipped model in fp32."""

import json
import re
from pathlib import Path

import pytest
import torch

from quantlab.checkpoint.load import load_model
from quantlab.models.decoder import CausalLM

ITEMS = 12


@pytest.fixture(scope="session")
def books_model(books_5m: Path) -> CausalLM:
    """The shipped model in fp32 (read only)."""
    return load_model(books_5m, torch.float32, "cpu")


@pytest.fixture(scope="session")
def sentences(evaluation_text: Path) -> list[str]:
    """Sentences of ten to thirty words from the held-out text."""
    text = " ".join(evaluation_text.read_text(encoding="utf-8").split())
    found = [part.strip() for part in re.split(r"(?<=[.!?]) ", text)]
    return [part for part in found if 10 <= len(part.split()) <= 30]


@pytest.fixture(scope="session")
def task_dir(sentences: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Items of four bundled tasks, whose right answers are how the text goes on (read only)."""
    folder = tmp_path_factory.mktemp("tasks")
    words = [sentence.split() for sentence in sentences]
    last_words = [{"context": " ".join(before[:-1]), "continuation": before[-1]} for before in words[:ITEMS]]
    questions = [
        {
            "query": f"Question: {' '.join(words[i][:6])}\u2028",
            "choices": [" ".join(words[(i + j) % ITEMS][6:]) for j in range(4)],
            "gold": 0,
        }
        for i in range(ITEMS)
    ]
    two_starts = [
        {
            "context_options": [" ".join([*words[i][:4], name]) for name in ("Mary", "the captain")],
            "continuation": " ".join(words[i][5:]),
            "gold": i % 2,
        }
        for i in range(ITEMS)
    ]
    pairs = [{**item, "choices": item["choices"][:2], "query": item["query"] + "\n"} for item in questions]
    tables = {"lambada_openai": last_words, "arc_easy": questions, "winogrande": two_starts, "piqa": pairs}
    for name, items in tables.items():
        lines = "\n".join(json.dumps(item, ensure_ascii=False) for item in items)
        (folder / f"{name}.jsonl").write_text(lines + "\n", encoding="utf-8")
    return folder
