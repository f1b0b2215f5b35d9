"""Grammars over tokens: which tokens may come next so that the text is JSON, or JSON after a schema.

The work is llguidance's (extra `serve`), which is imported when a grammar is first asked for. Its limits of fuel,
states and items bound every step. Nothing in it bounds the time of compiling a schema (a `multipleOf` of ten million
takes minutes), so who compiles schemas of strangers does it first where it can be killed. Knows nothing about torch,
logits or requests.
"""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from quantlab.checkpoint.folder import MAX_JSON_BYTES, check_link
from quantlab.errors import GrammarError, MissingExtra, UnsupportedModel
from quantlab.runtime.request import Grammar

if TYPE_CHECKING:
    from torch import Tensor

MAX_SCHEMA_BYTES: Final = 1 << 16
COMPILE_SECONDS: Final = 0.2  # of one core, twice: an engine compiles again what a sandbox has found sound
KEPT: Final = 64  # compiled grammars
# Spaces anywhere between JSON's signs, but no endless run of them, which small models like to fall into.
WHITESPACE: Final = r"\n?[ ]{0,16}"
# All of them, since a schema may hold settings of its own (x-guidance) and these win.
SETTINGS: Final = {
    "whitespace_pattern": WHITESPACE,
    "whitespace_flexible": True,
    "item_separator": ",",
    "key_separator": ":",
    "coerce_one_of": False,
    "lenient": False,
}
LIMITS: Final = {"max_items_in_row": 10_000, "step_lexer_fuel": 100_000, "max_lexer_states": 50_000}
REASON_CHARS: Final = 240


class TokenGrammars:
    """Grammars for the tokenizer in `folder` and a model of `vocab_size` tokens that ends texts with `eos_token_ids`.

    What is compiled is kept, so that asking for the same grammar again costs a copy. May be used by several threads.
    """

    def __init__(self, folder: Path, vocab_size: int, eos_token_ids: Sequence[int]):
        self._folder = folder
        self._vocab_size = vocab_size
        self._eos_token_ids = list(eos_token_ids)
        self._lock = threading.Lock()
        self._tokenizer: Any = None
        self._compiled: OrderedDict[Grammar, Any] = OrderedDict()

    def prepare(self) -> None:
        """Load the tokenizer now (a second for 128k tokens) and not when the first grammar is asked for.

        Raises MissingExtra without llguidance, UnsupportedModel for a tokenizer that it cannot read.
        """
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = self._load()

    def check(self, grammar: Grammar) -> None:
        """Compile `grammar`; raises GrammarError where that fails or takes too long, and as `prepare` does."""
        self._matcher(grammar, COMPILE_SECONDS)

    def start(self, grammar: Grammar) -> TokenMatcher:
        """A matcher at the beginning of `grammar`; one that allows nothing if it cannot be compiled.

        It takes the time it takes: who checked it first must not be let down by a clock that runs a little slower.
        """
        try:
            return TokenMatcher(self._matcher(grammar, math.inf).deep_copy())
        except (GrammarError, MissingExtra, UnsupportedModel):
            return TokenMatcher(None)

    def _matcher(self, grammar: Grammar, most_seconds: float) -> Any:
        """The matcher of `grammar` at its beginning, which must not be changed."""
        self.prepare()
        with self._lock:
            matcher = self._compiled.get(grammar)
        if matcher is None:  # outside the lock: who asks for one that is there does not wait for it
            matcher = _compile(grammar, self._tokenizer, most_seconds)
        with self._lock:
            self._compiled[grammar] = matcher
            self._compiled.move_to_end(grammar)
            if len(self._compiled) > KEPT:
                self._compiled.popitem(last=False)
            return matcher

    def _load(self) -> Any:
        library = _llguidance()
        path = self._folder / "tokenizer.json"
        check_link(path, self._folder)
        if not path.is_file() or path.stat().st_size > MAX_JSON_BYTES:
            raise UnsupportedModel("grammars need a tokenizer.json", where=str(self._folder))
        try:
            # By its path: a text that is no JSON would be looked up as a name.
            return library.LLTokenizer(str(path.resolve()), self._vocab_size, self._eos_token_ids or None)
        except ValueError as error:
            message = f"grammars cannot be used with this tokenizer: {str(error)[:REASON_CHARS]}"
            raise UnsupportedModel(message, where=str(path)) from error


class TokenMatcher:
    """One text on its way through a grammar."""

    def __init__(self, matcher: Any):
        self._matcher = matcher

    def consume(self, token_ids: Sequence[int]) -> None:
        """Go on by tokens that were sampled; after one that was not allowed nothing is."""
        if self._matcher is not None and token_ids and not self._matcher.consume_tokens(list(token_ids)):
            self._matcher = None

    def fill(self, mask: Tensor) -> None:
        """Write which tokens may come next: mask: [ceil(V / 32)] int32 on the host, bit i of word w for 32 w + i.

        Only the tokens that end a text may follow a whole one; none is left after a fault or a limit.
        """
        if self._matcher is not None:
            self._matcher.unsafe_compute_mask_ptr(mask.data_ptr(), mask.numel() * mask.element_size())
        if self._matcher is None or self._matcher.is_error():
            mask.zero_()

    @property
    def is_accepting(self) -> bool:
        """Whether the text so far is whole."""
        return self._matcher is not None and bool(self._matcher.is_accepting())


def _compile(grammar: Grammar, tokenizer: Any, most_seconds: float) -> Any:
    """A matcher that has allowed its first token; raises GrammarError, also for more than `most_seconds` of a core."""
    library = _llguidance()
    schema = '{"type": "object"}' if grammar.kind == "json_object" else grammar.schema
    if len(schema.encode("utf-8", "replace")) > MAX_SCHEMA_BYTES:
        raise GrammarError(f"the schema is larger than {MAX_SCHEMA_BYTES} bytes")
    begin = time.thread_time()
    try:
        text = library.LLMatcher.grammar_from_json_schema(schema, overrides=SETTINGS)
    except ValueError as error:
        raise GrammarError(f"the schema is no JSON object: {str(error)[:REASON_CHARS]}") from error
    limits = library.LLParserLimits(verbose_errors=False, **LIMITS)
    matcher = library.LLMatcher(tokenizer, text, log_level=0, limits=limits)
    if not matcher.is_error():
        matcher.compute_bitmask()  # some schemas can begin with no token at all, which shows here
    if matcher.is_error():
        reason = " ".join(str(matcher.get_error()).split())[:REASON_CHARS]
        raise GrammarError(f"the schema cannot be followed: {reason}")
    if (seconds := time.thread_time() - begin) > most_seconds:
        raise GrammarError(f"the schema is too complex: {seconds:.1f} s to compile, {most_seconds} s are allowed")
    return matcher


def _llguidance() -> Any:
    if find_spec("llguidance") is None:
        raise MissingExtra("grammars need llguidance, which is not installed", fix="pip install 'quantlab[serve]'")
    return import_module("llguidance")
