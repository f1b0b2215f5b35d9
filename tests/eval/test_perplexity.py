"""The figures that every comparison rests on, against transformers and torch as oracles."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from quantlab.errors import UsageError
from quantlab.eval import scoring
from quantlab.eval.perplexity import compare, compare_many, cut_windows, perplexity, read_ids
from quantlab.models.config import ModelConfig
from quantlab.models.decoder import CausalLM, build_model
from quantlab.text import Tokenizer

WINDOW = 64


@pytest.fixture(scope="module")
def model(books_5m: Path) -> CausalLM:
    return _load(books_5m)


@pytest.fixture(scope="module")
def damaged(books_5m: Path) -> CausalLM:
    """The same model with a visible amount of noise in every MLP."""
    model = _load(books_5m)
    generator = torch.Generator().manual_seed(1)
    for block in model.blocks:
        weight = block.mlp.down_proj.weight
        weight += 0.3 * weight.std() * torch.randn(weight.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def ids(evaluation_text: Path, books_tokenizer: Tokenizer) -> Tensor:
    return read_ids([evaluation_text], books_tokenizer, 4 * WINDOW + 7)


def _load(folder: Path) -> CausalLM:
    config = ModelConfig.from_json(json.loads((folder / "config.json").read_text()), str(folder))
    return build_model(config, load_file(folder / "model.safetensors").__getitem__, torch.float32, "cpu")


def test_perplexity_is_that_of_transformers(model: CausalLM, books_5m: Path, ids: Tensor) -> None:
    reference = AutoModelForCausalLM.from_pretrained(books_5m, dtype=torch.float32).eval()
    with torch.inference_mode():
        losses = [reference(row[None], labels=row[None]).loss.item() for row in cut_windows(ids, WINDOW)]
    assert perplexity(model, ids, WINDOW) == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)


def test_a_model_against_itself_is_lossless(model: CausalLM, ids: Tensor) -> None:
    fidelity = compare(model, model, ids, WINDOW)
    assert (fidelity.ratio, fidelity.kl, fidelity.agreement) == (1.0, 0.0, 1.0)
    assert fidelity.tokens == 4 * (WINDOW - 1)


def test_damage_shows_in_every_figure(model: CausalLM, damaged: CausalLM, ids: Tensor) -> None:
    fidelity = compare(model, damaged, ids, WINDOW)
    assert fidelity.ratio > 1.02
    assert fidelity.kl > 0.02
    assert 0.3 < fidelity.agreement < 0.98


def test_compare_agrees_with_whole_logits(model: CausalLM, damaged: CausalLM, ids: Tensor) -> None:
    fidelity = compare(model, damaged, ids, WINDOW)
    rows = cut_windows(ids, WINDOW)
    with torch.inference_mode():
        p, q = (m(rows)[:, :-1].log_softmax(-1).double() for m in (model, damaged))
    targets = rows[:, 1:, None]
    assert math.log(fidelity.baseline_perplexity) == pytest.approx(-p.gather(-1, targets).mean().item(), rel=1e-5)
    assert math.log(fidelity.perplexity) == pytest.approx(-q.gather(-1, targets).mean().item(), rel=1e-5)
    assert fidelity.kl == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4)
    assert fidelity.agreement == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item(), abs=0.005)


def test_many_candidates_give_what_each_gives_alone(model: CausalLM, damaged: CausalLM, ids: Tensor) -> None:
    assert compare_many(model, [damaged, model], ids, WINDOW) == [
        compare(model, damaged, ids, WINDOW),
        compare(model, model, ids, WINDOW),
    ]


def test_figures_do_not_depend_on_the_chunk(
    model: CausalLM, damaged: CausalLM, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = compare(model, damaged, ids, WINDOW)
    monkeypatch.setattr(scoring, "CPU_VALUES", 1)
    chunked = compare(model, damaged, ids, WINDOW)
    assert chunked.kl == pytest.approx(whole.kl, rel=1e-4)
    assert chunked.perplexity == pytest.approx(whole.perplexity, rel=1e-5)
    assert perplexity(model, ids, WINDOW) == pytest.approx(whole.baseline_perplexity, rel=1e-5)


def test_logits_never_exceed_a_chunk(model: CausalLM, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    inner = CausalLM.logits
    monkeypatch.setattr(CausalLM, "logits", lambda self, x: seen.append(len(x)) or inner(self, x))
    monkeypatch.setattr(scoring, "CPU_VALUES", 16 * 8192)
    perplexity(model, ids, WINDOW)
    assert max(seen) == 16
    assert sum(seen) == 4 * (WINDOW - 1)


def test_windows_are_disjoint_and_the_tail_is_dropped() -> None:
    assert cut_windows(torch.arange(11), 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_too_little_text_names_both_numbers() -> None:
    with pytest.raises(UsageError, match="holds 3 tokens, one window needs 4"):
        cut_windows(torch.arange(3), 4)


def test_files_are_read_end_to_end_up_to_the_limit(tmp_path: Path, books_tokenizer: Tokenizer) -> None:
    (tmp_path / "a.txt").write_text("hello ")
    (tmp_path / "b.txt").write_text("world")
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    assert read_ids(paths, books_tokenizer).tolist() == books_tokenizer.encode("hello world")
    assert len(read_ids(paths, books_tokenizer, limit=2)) == 2


def test_an_unreadable_text_is_a_usage_error(tmp_path: Path, books_tokenizer: Tokenizer) -> None:
    with pytest.raises(UsageError, match=r"cannot read the evaluation text.*missing\.txt"):
        read_ids([tmp_path / "missing.txt"], books_tokenizer)
