"""Our runtime behind the harness's interface gives what the harness's own model of transformers gives."""

import json
import shutil
from pathlib import Path

import pytest
from lm_eval.api.instance import Instance
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM

from quantlab.errors import UsageError
from quantlab.eval.answers import PlainAnswers
from quantlab.eval.harness import HarnessModel
from quantlab.eval.options import TaskOptions
from quantlab.eval.task_set import load_tasks, quiet_libraries
from quantlab.eval.tasks import run_tasks
from quantlab.models.decoder import CausalLM
from quantlab.text import Tokenizer, load_tokenizer

FOUR = ("lambada_openai", "arc_easy", "winogrande", "piqa")
TOLERANCE = 1e-4  # nats; measured: 2e-5


@pytest.fixture(scope="module")
def ours(books_model: CausalLM, books_tokenizer: Tokenizer) -> HarnessModel:
    return HarnessModel(PlainAnswers(books_model, 3), books_tokenizer)


@pytest.fixture(scope="module")
def oracle(books_5m: Path) -> HFLM:
    return hugging_face(books_5m)


def hugging_face(folder: Path) -> HFLM:
    with quiet_libraries():
        return HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=4)


def ask(kind: str, *arguments: object) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def answers(model: HFLM, kind: str, requests: list[Instance]) -> list:
    with quiet_libraries():
        return getattr(model, kind)(requests, disable_tqdm=True)


def test_four_tasks_score_as_in_the_harness(ours, oracle, task_dir):
    tasks = load_tasks(TaskOptions(FOUR, task_dir))
    mine = run_tasks(ours.answers, ours.tokenizer, tasks, lambda *_: None)
    with quiet_libraries():
        found = evaluate(oracle, {"tasks": {task.name: task.task for task in tasks.tasks}}, bootstrap_iters=0)
    for task in tasks.tasks:
        samples = sorted(found["samples"][task.name], key=lambda sample: sample["doc_id"])
        assert list(mine[task.name].right) == [int(sample[task.metric]) for sample in samples]
        requests = [instance for item in task.items for instance in item]
        scored = ours.loglikelihood(requests)
        wanted = [response for sample in samples for response in sample["filtered_resps"]]
        assert [greedy for _, greedy in scored] == [greedy for _, greedy in wanted]
        differences = [abs(a - b) for (a, _), (b, _) in zip(scored, wanted, strict=True)]
        assert max(differences) < TOLERANCE


PAIRS = [
    ("The man said ", " hello"), ("The man said", " hello there, my dear"), ("", " Once upon"), ("", "<s> Once"),
    ("<s>A line\n", "of verse"), ("Question: is it?\nAnswer:", " yes"), ("Question: is it?\nAnswer:", " no"),
]  # fmt: skip


def test_pairs_are_split_into_tokens_as_in_the_harness(ours, oracle):
    requests = [ask("loglikelihood", *pair) for pair in PAIRS]
    for mine, wanted in zip(ours.loglikelihood(requests), answers(oracle, "loglikelihood", requests), strict=True):
        assert mine == (pytest.approx(wanted[0], abs=TOLERANCE), wanted[1])


def test_a_blank_context_is_none(ours):
    blank, none = ask("loglikelihood", " \n", "Once upon"), ask("loglikelihood", "", " \nOnce upon")
    assert ours.loglikelihood([blank]) == ours.loglikelihood([none])
    (written,) = ours.generate_until([ask("generate_until", "", {"until": [], "max_gen_toks": 2})])
    assert written


def test_whole_texts_are_cut_into_windows_as_in_the_harness(ours, oracle, evaluation_text):
    texts = [evaluation_text.read_text(encoding="utf-8")[:12_000], "Hello there."]
    requests = [ask("loglikelihood_rolling", text) for text in texts]
    assert len(ours.tokenizer.encode(texts[0])) > ours.max_length
    mine, wanted = ours.loglikelihood_rolling(requests), answers(oracle, "loglikelihood_rolling", requests)
    assert mine == [pytest.approx(value, rel=1e-6) for value in wanted]


def test_text_is_written_as_in_the_harness(ours, oracle):
    until = {"until": ["\n\n", "."], "max_gen_toks": 20, "do_sample": False}
    prompts = ("The captain looked at", "It was", "Once upon a time there was a little girl who")
    requests = [ask("generate_until", prompt, until) for prompt in prompts]
    requests.append(ask("generate_until", "He said", {"until": "him", "max_gen_toks": 4}))
    assert ours.generate_until(requests) == answers(oracle, "generate_until", requests)


@pytest.fixture(scope="module")
def with_bos(books_5m: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model with a tokenizer that puts <s> before every text, as Llama's does."""
    folder = tmp_path_factory.mktemp("bos") / "model"
    shutil.copytree(books_5m, folder)
    rules = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    template = {
        "type": "TemplateProcessing", "single": [bos, first], "pair": [bos, first, second],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }  # fmt: skip
    rules["post_processor"] = {"type": "Sequence", "processors": [rules["post_processor"], template]}
    (folder / "tokenizer.json").write_text(json.dumps(rules), encoding="utf-8")
    return folder


def test_a_tokenizers_bos_begins_every_context_and_is_never_scored(with_bos, books_model):
    tokenizer = load_tokenizer(with_bos)
    assert tokenizer.prefix == (1,)
    mine, wanted = HarnessModel(PlainAnswers(books_model, 3), tokenizer), hugging_face(with_bos)
    requests = [ask("loglikelihood", *pair) for pair in PAIRS]
    for found, expected in zip(mine.loglikelihood(requests), answers(wanted, "loglikelihood", requests), strict=True):
        assert found == (pytest.approx(expected[0], abs=TOLERANCE), expected[1])
    text = "A text of some words."
    with_it = ask("loglikelihood_rolling", text)
    plain = ask("loglikelihood", "", text)  # behind one BOS, which is given and not predicted
    assert mine.loglikelihood_rolling([with_it]) == [pytest.approx(mine.loglikelihood([plain])[0][0], abs=1e-4)]


def test_what_the_model_would_rather_have_said_is_kept(ours):
    ours.loglikelihood([ask("loglikelihood", *pair) for pair in PAIRS])
    greedy = ours.generate_until([ask("generate_until", "The man said", {"until": [], "max_gen_toks": 1})])
    ours.loglikelihood(
        [ask("loglikelihood", "The man said", greedy[0]), ask("loglikelihood", "The man said", " zebra")]
    )
    assert ours.likeliest["The man said", greedy[0]] == greedy[0]
    assert ours.likeliest["The man said", " zebra"].startswith(greedy[0])


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"do_sample": True, "temperature": 0.7}, "answers are compared greedy only"),
        ({"num_beams": 4}, "answers are compared greedy only"),
        ({"max_gen_toks": 2048}, "writes 2048 tokens, the model's context is 2048"),
    ],
)
def test_what_is_not_greedy_text_within_the_context_is_refused(ours, settings, told):
    with pytest.raises(UsageError, match=told):
        ours.generate_until([ask("generate_until", "It was", settings)])


def test_long_prompts_lose_their_beginning(ours):
    asked = {"until": [], "max_gen_toks": ours.max_length - 4}
    assert len(ours._prompt("word " * 50, {**asked})) == 4
