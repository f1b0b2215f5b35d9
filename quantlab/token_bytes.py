"""The bytes that each token of a tokenizer stands for, so that text can be put together token by token.

Byte-level tokenizers (GPT-2, Llama 3, Qwen) and those in SentencePiece's manner (Llama 2, Mistral, Gemma) say exactly
which bytes a token adds; for any other kind the bytes are those of the token decoded alone. Knows nothing about
prompts, streams or stop strings.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from quantlab.text import Tokenizer

BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))


@dataclass(frozen=True, slots=True)
class TokenBytes:
    """`table[id]`: the bytes of a token, b"" for an id without one; `special` tokens are not text.

    `joined` says that the bytes of a sequence are those of its tokens one after the other, save that the first
    `leading_spaces` spaces of a whole text are dropped.
    """

    table: tuple[bytes, ...]
    special: frozenset[int]
    joined: bool
    leading_spaces: int = 0

    def of(self, token_id: int) -> bytes:
        """The bytes of one token; b"" for an id that the tokenizer does not know (models have padded vocabularies)."""
        return self.table[token_id] if 0 <= token_id < len(self.table) else b""

    def text(self, token_id: int) -> str:
        """One token as text, U+FFFD for bytes that are no whole character."""
        return self.of(token_id).decode("utf-8", "replace")


def token_bytes(tokenizer: Tokenizer) -> TokenBytes:
    """The bytes of every token of `tokenizer`, about a second for a million tokens."""
    backend = getattr(tokenizer.backend, "backend_tokenizer", None)
    if backend is None:
        return _decoded_alone(tokenizer)
    pieces: dict[str, int] = backend.get_vocab(with_added_tokens=True)
    added = backend.get_added_tokens_decoder()
    special = frozenset(i for i, token in added.items() if token.special)
    reading = _reading(json.loads(backend.decoder.__getstate__()) if backend.decoder else {})
    if reading is None:
        return _decoded_alone(tokenizer)
    read, leading_spaces = reading
    table = [b""] * (max(pieces.values(), default=-1) + 1)
    for piece, i in pieces.items():
        # An added token may go through the normalizer before it is decoded: its spaces are then pieces' marks.
        table[i] = read(backend.id_to_token(i) if i in added else piece)
    return TokenBytes(tuple(table), special, True, leading_spaces)


def _decoded_alone(tokenizer: Tokenizer) -> TokenBytes:
    table = tuple(tokenizer.decode([i]).encode() for i in range(len(tokenizer.backend)))
    return TokenBytes(table, frozenset(tokenizer.backend.all_special_ids), joined=False)


def _reading(decoder: dict[str, Any]) -> tuple[Callable[[str], bytes], int] | None:
    """How a decoder of the `tokenizers` library makes bytes of a piece, and the spaces it drops at the very start.

    None for a decoder that is not known to do so piece by piece.
    """
    if decoder.get("type") == "ByteLevel":
        alphabet = _byte_level_alphabet()
        return lambda piece: _byte_level(piece, alphabet), 0
    steps = decoder["decoders"] if decoder.get("type") == "Sequence" else [decoder]
    replacements, leading_spaces, by_bytes = [], 0, False
    for step in steps:
        match step:
            case {"type": "Replace", "pattern": {"String": pattern}, "content": content}:
                replacements.append((pattern, content))
            case {"type": "ByteFallback"}:
                by_bytes = True
            case {"type": "Fuse"}:
                pass
            case {"type": "Strip", "content": " ", "start": start, "stop": 0} if _fused(steps, step):
                leading_spaces += start
            case {"type": "Metaspace", "replacement": mark, "prepend_scheme": scheme}:
                replacements.append((mark, " "))
                leading_spaces += scheme != "never"
            case _:
                return None
    return (lambda piece: _sentence_piece(piece, replacements, by_bytes)), leading_spaces


def _fused(steps: list[dict[str, Any]], strip: dict[str, Any]) -> bool:
    """Whether the pieces are one text when `strip` comes."""
    return {"type": "Fuse"} in steps[: steps.index(strip)]


def _byte_level(piece: str, alphabet: dict[str, int]) -> bytes:
    """Added tokens may be spelled outside the alphabet; they stand for themselves."""
    try:
        return bytes(alphabet[char] for char in piece)
    except KeyError:
        return piece.encode()


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's characters for bytes: printable ones stand for themselves, the rest are counted up from U+0100."""
    others = [byte for byte in range(256) if byte not in PRINTABLE]
    alphabet = {chr(byte): byte for byte in PRINTABLE}
    return alphabet | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def _sentence_piece(piece: str, replacements: list[tuple[str, str]], by_bytes: bool) -> bytes:
    if by_bytes and (byte := BYTE_PIECE.fullmatch(piece)):
        return bytes([int(byte[1], 16)])
    for pattern, content in replacements:
        piece = piece.replace(pattern, content)
    return piece.encode()
