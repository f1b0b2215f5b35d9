"""How a text is scored: which tokens a model sees, which of them count, and a digest of all that.

Two named protocols, never mixed. `gptq-W`: the text is tokenized once (a BOS, if the tokenizer has one, at its very
start) and cut into disjoint windows of W tokens, the tail dropped, every token of a window but its first scored
(IST-DASLab/gptq, llama.py). `rolling-W`: the text is one document behind one prefix token, every token is scored, W of
them at a time with one token of context, the last few with a whole window (lm-eval 0.4, `loglikelihood_rolling`), so
that word perplexity and bits per byte are those of lm-eval. Knows nothing about models.
"""

import hashlib
import json
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from quantlab.errors import TextError, UsageError
from quantlab.eval.options import ProtocolName
from quantlab.eval.result import Protocol
from quantlab.text import Tokenizer


@dataclass(frozen=True, slots=True)
class Windows:
    """A text ready to be scored: `rows` of ids [L + 1] int64, the first L fed; the last `lengths` of each scored."""

    protocol: Protocol
    rows: tuple[Tensor, ...]
    lengths: tuple[int, ...]

    def targets(self, rows: range) -> Tensor:
        """The scored ids of rows of one length, end to end: [rows * length] int64."""
        return torch.cat([self.rows[index][-self.lengths[index] :] for index in rows])

    def batches(self, size: int) -> list[range]:
        """Consecutive rows alike in what is fed and scored, at most `size` together, as ranges of their indices."""
        found: list[range] = []
        kinds = [(len(row), length) for row, length in zip(self.rows, self.lengths, strict=True)]
        for index, kind in enumerate(kinds):
            last = found[-1] if found else range(0)
            if 0 < len(last) < size and kinds[last[0]] == kind:
                found[-1] = range(last.start, index + 1)
            else:
                found.append(range(index, index + 1))
        return found


@dataclass(frozen=True, slots=True)
class Cut:
    """What to cut a text into: `tokens` limits how many tokens of it are looked at, `tokenizer` is its digest."""

    protocol: ProtocolName
    window: int
    tokens: int | None
    tokenizer: str
    dtype: str


def make_windows(text: str, tokenizer: Tokenizer, cut: Cut, where: str) -> Windows:
    """`text` cut as `cut` says; raises TextError, naming `where`, when there is not enough of it."""
    ids, complete = _encode(text, tokenizer, cut.tokens)
    rows, bos = (_gptq if cut.protocol == "gptq" else _rolling)(ids, tokenizer, cut.window)
    if not rows:
        message = f"{len(ids)} tokens of text do not fill one window of {cut.window}"
        raise TextError(message, where=where, fix="more text, or a smaller --window")
    lengths = [len(row) - 1 for row in rows]
    if cut.protocol == "rolling":
        lengths[-1] = len(ids) - sum(lengths[:-1])
    ends = [row[-length:] for row, length in zip(rows, lengths, strict=True)]
    whole = complete and cut.protocol == "rolling"
    scored = [text] if whole else [tokenizer.decode(end.tolist()) for end in ends]
    facts = {
        "name": f"{cut.protocol}-{cut.window}",
        "text": sha256(text.encode("utf-8", "surrogatepass")),
        "tokenizer": cut.tokenizer,
        "bos": bos,
        "window": cut.window,
        "tokens": sum(lengths),
        "words": sum(count_words(part) for part in scored),
        "bytes": sum(len(part.encode("utf-8", "surrogatepass")) for part in scored),
        "dtype": cut.dtype,
    }
    seen = digest({**facts, "rows": [row.tolist() for row in rows], "lengths": lengths})
    return Windows(Protocol.model_validate({**facts, "digest": seen}), rows, tuple(lengths))


def count_words(text: str) -> int:
    """Words as lm-eval counts them (`len(re.split(r"\\s+", doc))`), at least one."""
    return len(re.split(r"\s+", text))


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """sha256 (hex) of what decides how text becomes ids; what only pads, truncates or formats does not count."""
    backend = getattr(tokenizer.backend, "backend_tokenizer", None)
    if backend is None:
        rules: dict[str, object] = {"vocab": tokenizer.backend.get_vocab()}
    else:
        rules = json.loads(backend.to_str())
        for name in ("version", "truncation", "padding", "decoder"):
            rules.pop(name, None)
    frame = [tokenizer.prefix, tokenizer.suffix, tokenizer.bos_id, tokenizer.eos_id]
    return digest({"rules": rules, "frame": frame})


def digest(value: object) -> str:
    """sha256 (hex) of `value` as canonical JSON."""
    return sha256(json.dumps(value, sort_keys=True).encode())


def sha256(data: bytes) -> str:
    """sha256 (hex) of bytes."""
    return hashlib.sha256(data).hexdigest()


def _encode(text: str, tokenizer: Tokenizer, limit: int | None) -> tuple[Tensor, bool]:
    """The first `limit` ids of the text without special tokens, [T] int64, and whether these are all."""
    ids: list[int] = []
    for piece in tokenizer.encode_pieces(text):
        ids += piece
        if limit is not None and len(ids) > limit:
            return torch.tensor(ids[:limit]), False
    return torch.tensor(ids, dtype=torch.int64), True


def _gptq(ids: Tensor, tokenizer: Tokenizer, window: int) -> tuple[tuple[Tensor, ...], str]:
    """Rows, and the rule of the BOS."""
    framed = torch.cat([torch.tensor(tokenizer.prefix, dtype=torch.int64), ids])
    count = len(framed) // window
    rows = framed[: count * window].split(window) if count else ()
    return tuple(rows), "once" if tokenizer.prefix else "none"


def _rolling(ids: Tensor, tokenizer: Tokenizer, window: int) -> tuple[tuple[Tensor, ...], str]:
    """Rows that overlap by one token, behind BOS or, without one, EOS, which is what lm-eval begins with.

    The last row is as long as the others, so that its tokens, fewer than W, have more context.
    """
    prefix = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    if prefix is None:
        message = "the tokenizer has neither BOS nor EOS, and the rolling protocol begins with one"
        raise UsageError(message, where=str(tokenizer.folder), fix="--protocol gptq")
    framed = torch.cat([torch.tensor([prefix]), ids])
    stops = [min(start + window, len(ids)) for start in range(0, len(ids), window)]
    return tuple(framed[max(0, stop - window) : stop + 1] for stop in stops), "once"
