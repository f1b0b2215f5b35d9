"""Our runtime as a model of lm-evaluation-harness: text in, log-likelihoods or greedy text out.

Follows the conventions of the harness's own model of transformers (HFLM), so that figures compare with published ones;
the one difference: a tokenizer's BOS is never scored as a predicted token of a rolling window.
Knows nothing about tasks, nor about which model is the baseline.
"""

from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from quantlab.errors import UsageError
from quantlab.eval.answers import Answers
from quantlab.eval.likelihood import Progress, Request, Score
from quantlab.text import Tokenizer

MAX_NEW_TOKENS = 256  # where a task does not say, as in HFLM
TAIL_TOKENS = 16  # decoded anew at each step to look for a stop string
Pair = tuple[list[int], list[int]]


class HarnessModel(TemplateLM):
    """Whoever gives `answers`, behind the harness's interface; greedy only.

    `likeliest` keeps the text that the model would rather have had in place of each continuation it scored, by
    (context, continuation): the harness itself learns only whether the two are equal.
    """

    def __init__(self, answers: Answers, tokenizer: Tokenizer, on_progress: Progress = lambda *_: None):
        super().__init__()
        self.answers = answers
        self.tokenizer = tokenizer
        self.on_progress = on_progress
        self.likeliest: dict[tuple[str, str], str] = {}

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text; raises UsageError for a tokenizer without one."""
        if self.tokenizer.eos_id is None:
            raise UsageError("tasks need an end-of-text token, which this tokenizer does not have")
        return self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token that stands for an empty context: BOS, or the end of the text before."""
        return self.eot_token_id if self.tokenizer.bos_id is None else self.tokenizer.bos_id

    @property
    def max_length(self) -> int:
        """The most tokens that the model reads at once."""
        return self.answers.max_length

    @property
    def max_gen_toks(self) -> int:
        """The most tokens that are generated where a task does not say."""
        return MAX_NEW_TOKENS

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's folder, as the harness's own models report it."""
        return str(self.tokenizer.folder)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None) -> list[int]:
        """Token ids; unless told otherwise, behind the BOS of a tokenizer that puts one, if none is written there."""
        if add_special_tokens is None:
            bos = self.tokenizer.decode([self.prefix_token_id])
            add_special_tokens = not has_bos_prefix(string, bos)
        prefix = list(self.tokenizer.prefix) if add_special_tokens else []
        return prefix + self.tokenizer.encode(string)

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """(log-probability, whether greedy decoding would write it) of each request's (context, continuation)."""
        pairs = [request.args for request in requests]
        encoded = self._encode_pairs(pairs)
        scores = self._score([Request(*ids) for ids in encoded])
        for pair, (_, target), found in zip(pairs, encoded, scores, strict=True):
            same = list(found.likeliest) == target
            self.likeliest[pair] = pair[1] if same else self.tokenizer.decode(list(found.likeliest))
        return _answers(encoded, scores)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        encoded = [(context, continuation) for _, context, continuation in requests]
        return _answers(encoded, self._score([Request(*ids) for ids in encoded]))

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = True) -> list[float]:
        """The log-probability of each request's whole text, cut into disjoint windows of the model's context."""
        windows: list[Request] = []
        counts = []
        for request in requests:
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            cut = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)
            found = [Request(*make_disjoint_window(window)) for window in cut]
            windows += found
            counts.append(len(found))
        scores = iter(self._score(windows))
        return [sum(next(scores).logprob for _ in range(count)) for count in counts]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = True) -> list[str]:
        """What the model writes after each request's context, up to the first of its stop strings.

        Raises UsageError when a task asks for sampling.
        """
        settings = [normalize_gen_kwargs(request.args[1], MAX_NEW_TOKENS) for request in requests]
        prompts = [self._prompt(request.args[0], asked) for request, asked in zip(requests, settings, strict=True)]
        # Only prompts with the same settings share a batch; the longest come first, so that memory runs out at once.
        order = sorted(range(len(requests)), key=lambda i: (repr(settings[i]), -len(prompts[i])))
        texts = [""] * len(requests)
        done = 0
        while done < len(order):
            asked = settings[order[done]]
            batch = [i for i in order[done : done + self.answers.rows] if settings[i] == asked]
            written = self._write([prompts[i] for i in batch], asked)
            for index, text in zip(batch, written, strict=True):
                texts[index] = text
            done += len(batch)
            self.on_progress(done, len(order))
        return texts

    def _score(self, requests: Sequence[Request]) -> list[Score]:
        return self.answers.score(requests, self.on_progress)

    def _encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[Pair]:
        """Token ids of contexts and continuations as the harness splits them; each text is tokenized once."""
        known: dict[str, list[int]] = {}

        def encode(text: str) -> list[int]:
            if text not in known:
                known[text] = self.tok_encode(text)
            return known[text]

        encoded = []
        for context, continuation in pairs:
            stripped = context.rstrip()  # a space before a word belongs to the word's token
            if not stripped:
                encoded.append(self._without_context(context + continuation))
                continue
            start = encode(stripped)
            encoded.append((start, encode(context + continuation)[len(start) :]))
        return encoded

    def _without_context(self, continuation: str) -> Pair:
        ids = self.tok_encode(continuation, add_special_tokens=False)
        return (ids[:1], ids[1:]) if ids[:1] == [self.prefix_token_id] else ([self.prefix_token_id], ids)

    def _prompt(self, context: str, asked: dict[str, Any]) -> list[int]:
        """The prompt's tokens, cut on the left to leave room for what is to be written."""
        if asked.get("do_sample") or asked.get("num_beams", 1) != 1:
            raise UsageError(
                "this task samples or searches, and answers are compared greedy only", fix="do_sample: false"
            )
        room = self.max_length - asked["max_gen_toks"]
        if room <= 0:
            raise UsageError(
                f"this task writes {asked['max_gen_toks']} tokens, the model's context is {self.max_length}"
            )
        return self.tok_encode(context)[-room:] or [self.prefix_token_id]

    def _write(self, prompts: list[list[int]], asked: dict[str, Any]) -> list[str]:
        stops = [stop for stop in asked["until"] if stop]
        written = self.answers.write(prompts, asked["max_gen_toks"], self._finished(stops))
        ends = [*stops, self.tokenizer.decode([self.eot_token_id])]
        special = set(self.tokenizer.backend.all_special_ids)
        texts = (self.tokenizer.decode([token for token in row if token not in special]) for row in written)
        return [postprocess_generated_text(text, ends, None) for text in texts]

    def _finished(self, stops: list[str]) -> Callable[[list[int]], bool]:
        """Whether new tokens end the text: with the end token, or with a stop string somewhere in the last few."""
        tail = max((len(stop) for stop in stops), default=0) + TAIL_TOKENS

        def finished(tokens: list[int]) -> bool:
            if tokens[-1] == self.eot_token_id:
                return True
            text = self.tokenizer.decode(tokens[-tail:])
            return any(stop in text for stop in stops)

        return finished


def _answers(encoded: Sequence[Pair], scores: Sequence[Score]) -> list[tuple[float, bool]]:
    return [(found.logprob, list(found.likeliest) == ids[1]) for ids, found in zip(encoded, scores, strict=True)]
