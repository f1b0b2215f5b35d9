"""Calibration blocks: documents tokenized, packed end to end, cut into equal blocks, drawn with a seed.

No padding exists, so none enters a statistic. Knows nothing about models or passes.
"""

import hashlib
import random
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from quantlab.errors import CalibrationError, CheckpointError
from quantlab.quant.documents import Document, is_streamed, read_documents
from quantlab.quant.options import CalibrationSpec
from quantlab.text import Tokenizer

MAX_TOKENS = 1 << 24  # the pool that blocks are drawn from: 16.8M tokens, 67 MB
STREAM_FACTOR = 16  # from a streamed dataset, so many times the tokens that were asked for: enough to draw from


@dataclass(frozen=True, slots=True)
class Blocks:
    """Token blocks to calibrate on.

    ids: [S, seq_len] int64. `digest` is the SHA-256 of the ids, `source` what the user named, `available` the number of
    blocks that the text held and from which these were drawn.
    """

    ids: Tensor
    digest: str
    source: str
    available: int


def load_blocks(spec: CalibrationSpec, tokenizer: Tokenizer) -> Blocks:
    """`spec.samples` blocks of `spec.seq_len` tokens drawn without replacement (all of them for None).

    Raises CalibrationError when the text is missing, unreadable or too short.
    """
    source = spec.source or "bundled text"
    tokens = pack(read_documents(spec.source, spec.split, spec.field), tokenizer, _token_limit(spec))
    available = len(tokens) // spec.seq_len
    _check_enough(len(tokens), available, spec, source)
    wanted = available if spec.samples is None else spec.samples
    order = random.Random(spec.seed).sample(range(available), wanted)
    pool = torch.frombuffer(tokens, dtype=torch.int32)[: available * spec.seq_len].view(available, spec.seq_len)
    ids = pool[torch.tensor(order)].to(torch.int64)
    return Blocks(ids, hashlib.sha256(ids.numpy().tobytes()).hexdigest(), source, available)


def pack(documents: Iterable[Document], tokenizer: Tokenizer, limit: int) -> array:
    """The documents' token ids end to end, at most `limit` of them.

    Plain documents carry the special tokens that the tokenizer frames a document with, and its EOS stands between two;
    chats carry those of the chat template.
    """
    tokens = array("i")
    for document in documents:
        pieces = (ids for ids in _pieces(document, tokenizer) if ids)
        for index, ids in enumerate(pieces):
            if index == 0 and tokens and tokenizer.eos_id is not None and tokens[-1] != tokenizer.eos_id:
                tokens.append(tokenizer.eos_id)
            tokens.extend(ids[: limit - len(tokens)])
            if len(tokens) >= limit:
                return tokens
    return tokens


def _pieces(document: Document, tokenizer: Tokenizer) -> Iterator[list[int]]:
    """The ids of one document; none for a blank one."""
    if isinstance(document, str):
        return tokenizer.encode_pieces(document, special_tokens=True) if document.strip() else iter(())
    try:
        return tokenizer.encode_pieces(tokenizer.render_chat(document))
    except CheckpointError as error:
        raise CalibrationError(error.message, where=error.where, fix="--field with plain text") from error


def _token_limit(spec: CalibrationSpec) -> int:
    if is_streamed(spec.source) and spec.samples is not None:
        return min(MAX_TOKENS, STREAM_FACTOR * spec.samples * spec.seq_len)
    return MAX_TOKENS


def _check_enough(tokens: int, available: int, spec: CalibrationSpec, source: str) -> None:
    needed = 1 if spec.samples is None else spec.samples
    if available >= needed:
        return
    raise CalibrationError(
        f"the text holds {tokens} tokens ({available} blocks of {spec.seq_len}), "
        f"{needed * spec.seq_len} tokens ({needed} blocks) are needed",
        where=source,
        fix=f"--samples {available} or more text" if available else "a smaller --seq-len or more text",
    )
