"""Text to token ids and back: one tokenizer folder, its chat template, nothing that runs code from the folder.

Knows nothing about models, calibration or files other than the tokenizer's own.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import AutoTokenizer
from transformers.configuration_utils import PreTrainedConfig

from quantlab.errors import CheckpointError

# A tokenizer keeps offsets and strings of every token it returns: 4 MB of text take 0.8 GB and 4.9 s in one call,
# 0.02 GB and 1.4 s in pieces of this size.
PIECE_CHARS = 1 << 14
PIECES = 16  # encoded at once, on as many threads as the machine has
PROBE = "a"
WORD_START = re.compile(r"(?<=[^\W\d_]) (?=[^\W\d_])")


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """A checkpoint's own tokenizer; `backend` is the transformers object behind it.

    `prefix` and `suffix` are the ids that it puts around one document (Llama: BOS before; Qwen: nothing).
    """

    backend: Any
    folder: Path
    bos_id: int | None
    eos_id: int | None
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]

    def encode(self, text: str, special_tokens: bool = False) -> list[int]:
        """Token ids of `text`; with `special_tokens`, as the tokenizer itself frames one document.

        The ids come from `encode_pieces`, which a caller with much text uses directly.
        """
        return [token for ids in self.encode_pieces(text, special_tokens) for token in ids]

    def encode_pieces(self, text: str, special_tokens: bool = False) -> Iterator[list[int]]:
        """The ids of `encode` a few thousand at a time, so that memory stays flat however long the text."""
        if special_tokens and self.prefix:
            yield list(self.prefix)
        for pieces in batched(split_words(text, PIECE_CHARS), PIECES):
            yield from self.backend(pieces, add_special_tokens=False, verbose=False)["input_ids"]
        if special_tokens and self.suffix:
            yield list(self.suffix)

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`, special tokens spelled out."""
        return str(self.backend.decode(ids, clean_up_tokenization_spaces=False))

    def render_chat(self, messages: list[dict[str, str]]) -> str:
        """`messages` (role, content) through the folder's chat template, special tokens included.

        Raises CheckpointError when the tokenizer has no template or the template refuses the messages.
        """
        if not self.backend.chat_template:
            raise CheckpointError("the tokenizer has no chat template", where=str(self.folder))
        try:
            return str(self.backend.apply_chat_template(messages, tokenize=False))
        except (TemplateError, ValueError, TypeError, KeyError) as error:
            raise CheckpointError(
                f"the chat template refuses these messages: {error}", where=str(self.folder)
            ) from error


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in `folder`, from local files alone and without running any code of theirs.

    Raises CheckpointError when there is none or it cannot be read.
    """
    try:
        backend = AutoTokenizer.from_pretrained(
            str(folder), config=_family(folder), local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(
            f"no readable tokenizer: {reason}",
            where=str(folder),
            fix="copy tokenizer.json and tokenizer_config.json from the model's page into the folder",
        ) from error
    prefix, suffix = _frame(backend)
    return Tokenizer(backend, folder, backend.bos_token_id, backend.eos_token_id, prefix, suffix)


def _family(folder: Path) -> PreTrainedConfig:
    """What of the model's configuration decides how its tokenizer is read.

    Left to itself AutoTokenizer imports the whole of the model's code for it, which takes a second or two.
    """
    values, _ = PreTrainedConfig.get_config_dict(str(folder), local_files_only=True)
    return PreTrainedConfig.from_dict({key: values[key] for key in ("model_type", "tokenizer_class") if key in values})


def _frame(backend: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The special tokens that the tokenizer puts before and after a document, found on a probe."""
    bare = backend.encode(PROBE, add_special_tokens=False)
    framed = backend.encode(PROBE, add_special_tokens=True)
    start = next((i for i in range(len(framed)) if framed[i : i + len(bare)] == bare), 0)
    return tuple(framed[:start]), tuple(framed[start + len(bare) :])


def batched(pieces: Iterator[str], count: int) -> Iterator[list[str]]:
    """Lists of `count` of the pieces, the last one shorter."""
    while batch := list(islice(pieces, count)):
        yield batch


def split_words(text: str, limit: int) -> Iterator[str]:
    """`text` in pieces of about `limit` characters, each cut before a single space between two letters.

    Byte-level tokenizers begin a new word at such a space, so the pieces' ids join to those of the whole. Text without
    one (Chinese, say) stays in one piece.
    """
    start = 0
    while len(text) - start > limit and (found := WORD_START.search(text, start + limit)):
        yield text[start : found.start()]
        start = found.start()
    yield text[start:]
