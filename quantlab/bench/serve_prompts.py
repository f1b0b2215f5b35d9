"""The requests of a load: passages of the bundled text cut to a length in tokens, or the lines of a file.

The same seed gives the same requests. A server's tokenizer is learned from its own counts, so none is needed here.
Knows nothing about when requests are sent.
"""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

from quantlab.bench.serve_client import Body
from quantlab.bench.serve_options import Api, Target, Work
from quantlab.bundled import bundled_text
from quantlab.errors import TextError

PROBES = (10, 200)  # words of the requests that show how many tokens a word has
PLACES = 3  # in the text where each is taken: books differ
MAX_FILE_BYTES = 256_000_000
TOKENS_PER_WORD = 1.35  # English in a vocabulary of 32,000 or more, for servers that do not count


@dataclass(frozen=True, slots=True)
class Rate:
    """Tokens of w words: `fixed` (a chat's frame) + `per_word` * w; `measured` at the server, or assumed."""

    fixed: float = 0.0
    per_word: float = TOKENS_PER_WORD
    measured: bool = False

    def words(self, tokens: int) -> int:
        """How many words make `tokens`, one at least."""
        return max(1, round((tokens - self.fixed) / self.per_word))

    @classmethod
    def from_probes(cls, counts: Sequence[int]) -> "Rate":
        """The line through what the server counted for the `probes`; the assumption where it counted nothing."""
        few, many = sum(counts[:PLACES]) / PLACES, sum(counts[PLACES:]) / PLACES
        if not 0 < few < many:
            return cls()
        per_word = (many - few) / (PROBES[1] - PROBES[0])
        return cls(few - per_word * PROBES[0], per_word, True)


@dataclass(frozen=True, slots=True)
class Passages:
    """The bundled text as words; a passage is a run of them, and begins anew at the end."""

    words: tuple[str, ...]

    @classmethod
    def bundled(cls) -> "Passages":
        """The held-out text that comes with the package; raises TextError."""
        path = bundled_text("evaluation")
        if path is None:
            raise TextError("the bundled text is missing", fix="pip install --force-reinstall quantlab")
        return cls(tuple(path.read_text(encoding="utf-8").split()))

    def cut(self, start: int, count: int) -> str:
        """`count` words from word `start` on."""
        size = len(self.words)
        return " ".join(self.words[(start + index) % size] for index in range(count))


def probes(target: Target, model: str, work: Work) -> list[Body]:
    """Requests of PROBES words from PLACES places, the short ones first, for one token each."""
    text = Passages.bundled()
    starts = [(2 * place + 1) * len(text.words) // (2 * PLACES) for place in range(PLACES)]
    return [_body(target, model, text.cut(start, count), 1, work) for count in PROBES for start in starts]


def requests(target: Target, model: str, work: Work, rate: Rate, stream: str) -> Iterator[Body]:
    """Bodies without end; another `stream` ("warm-up", a level's name) draws others from the same seed.

    Raises TextError for a file whose prompts the server's route does not take.
    """
    if work.prompts is not None:
        rows = read_prompts(work.prompts)
        asked = [_for_route(row, target.api, str(work.prompts)) for row in rows]
        lengths = [row.get("max_tokens", work.output.high) for row in rows]
        return cycle([_body(target, model, *each, work) for each in zip(asked, lengths, strict=True)])
    return _passages(target, model, work, rate, random.Random(f"{work.seed} {stream}"))


def _passages(target: Target, model: str, work: Work, rate: Rate, draw: random.Random) -> Iterator[Body]:
    passages = Passages.bundled()
    shared = rate.words(work.shared_prefix) if work.shared_prefix else 0
    while True:
        count = rate.words(draw.randint(work.input.low, work.input.high))
        own = passages.cut(draw.randrange(len(passages.words)), max(1, count - shared))
        text = f"{passages.cut(0, shared)} {own}" if shared else own
        yield _body(target, model, text, draw.randint(work.output.low, work.output.high), work)


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """The prompts of a file, at least one: each line is a JSON object with `prompt` (text or token ids) or `messages`
    and perhaps `max_tokens`, or in a file not named .jsonl the prompt itself. Raises TextError with the line."""
    try:
        content = path.read_bytes()[: MAX_FILE_BYTES + 1]
        lines = content.decode("utf-8").splitlines()
    except OSError as error:
        raise TextError(f"cannot be read: {error.strerror}", where=str(path), fix="another --prompts") from error
    except UnicodeDecodeError as error:
        raise TextError("is not UTF-8", where=str(path), fix="another --prompts") from error
    if len(content) > MAX_FILE_BYTES:
        raise TextError(f"is larger than {MAX_FILE_BYTES:,} bytes", where=str(path), fix="a part of it")
    plain = path.suffix != ".jsonl"
    rows = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    found = [{"prompt": line} if plain else _row(line, f"{path}:{number}") for number, line in rows]
    if not found:
        raise TextError("holds no prompt", where=str(path), fix="one prompt a line")
    return found


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict) or ("prompt" in row) == ("messages" in row):
        raise TextError("is no object with either prompt or messages", where=where, fix='{"prompt": "..."}')
    tokens = row.get("max_tokens", 1)
    if not isinstance(tokens, int) or tokens < 1:
        raise TextError("max_tokens is no whole number above 0", where=where, fix='"max_tokens": 128')
    return row


def _for_route(row: dict[str, Any], api: Api, where: str) -> Any:
    """What a line asks, as the route takes it: text or token ids for completions, text or messages for chat."""
    if api == "completions" and "messages" in row:
        raise TextError("holds messages, which are a chat's", where=where, fix="--chat")
    if api == "chat" and not isinstance(row.get("messages", row.get("prompt")), str | list):
        raise TextError("holds a prompt that is neither text nor messages", where=where)
    if api == "chat" and isinstance(row.get("prompt"), list):
        raise TextError("holds token ids, which a chat does not take", where=where, fix="leave out --chat")
    return row.get("messages", row.get("prompt"))


def _body(target: Target, model: str, asked: Any, max_tokens: int, work: Work) -> Body:
    body = {
        "model": model,
        "max_tokens": max_tokens,
        "temperature": work.temperature,
        "seed": work.seed,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if work.ignore_eos:
        body["ignore_eos"] = True
    if target.api == "completions":
        return body | {"prompt": asked}
    return body | {"messages": asked if isinstance(asked, list) else [{"role": "user", "content": asked}]}
