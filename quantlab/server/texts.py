"""The served model's text side: prompts to ids in a thread of their own, ids to text, and what a token looks like.

Knows nothing about requests or HTTP.
"""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from quantlab.detokenizer import TextStream, detokenizer
from quantlab.text import Tokenizer, load_tokenizer
from quantlab.token_bytes import TokenBytes, token_bytes

INLINE_CHARS: Final = 2048  # encoded at once: a thread costs more
MARGIN: Final = 4  # a normalizer may shorten the text before it is cut into tokens


class Texts:
    """One tokenizer and what is derived from it."""

    def __init__(self, tokenizer: Tokenizer, vocabulary: TokenBytes):
        self.tokenizer = tokenizer
        self.vocabulary = vocabulary
        self._longest = max(map(len, vocabulary.table), default=1) or 1
        # One thread: long prompts wait for each other and not for the event loop, and never fill both of two cores.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="encode")

    async def encode(self, text: str, special_tokens: bool = True) -> list[int]:
        """The ids of `text`, framed as a document unless `special_tokens` is off."""
        if len(text) <= INLINE_CHARS:
            return self.tokenizer.encode(text, special_tokens)
        return await asyncio.get_running_loop().run_in_executor(
            self._thread, self.tokenizer.encode, text, special_tokens
        )

    def least_tokens(self, text: str) -> int:
        """A number of tokens that `text` has at least, without looking at it."""
        return len(text) // (self._longest * MARGIN)

    def stream(
        self, prompt_ids: Sequence[int], stops: Sequence[str], min_tokens: int, skip_special: bool
    ) -> TextStream:
        """The text of an output that follows `prompt_ids`."""
        source = detokenizer(self.tokenizer, self.vocabulary, prompt_ids, skip_special)
        return TextStream(source, stops, min_tokens)

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """The text of `ids`."""
        stream = self.stream((), (), 0, skip_special)
        return stream.add(ids).text + stream.finish().text

    def offsets(self, ids: Sequence[int], skip_special: bool) -> tuple[int, ...]:
        """For each of `ids`, the characters of their text before it."""
        return self.stream((), (), 0, skip_special).add(ids).offsets


def load_texts(folder: Path) -> Texts:
    """The text side of the model in `folder`; raises CheckpointError where it has no readable tokenizer."""
    tokenizer = load_tokenizer(folder)
    return Texts(tokenizer, token_bytes(tokenizer))
