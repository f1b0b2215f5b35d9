"""The baseline's states on disk: the same logits to the bit, small, and made again when anything is not as it was."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quantlab.checkpoint.load import load_head
from quantlab.errors import NumericsError, OutputError
from quantlab.eval import reference as subject
from quantlab.eval.measure import Side, final_states, model_side, score_noise, score_windows
from quantlab.eval.protocol import Cut, Windows, make_windows
from quantlab.eval.reference import Key, build_reference, bytes_a_token, open_reference
from quantlab.models.decoder import CausalLM
from quantlab.text import Tokenizer


@pytest.fixture(scope="module", params=["gptq", "rolling"])
def windows(request: pytest.FixtureRequest, evaluation_text: Path, books_tokenizer: Tokenizer) -> Windows:
    cut = Cut(request.param, 32, 150, "a" * 64, "float32")
    return make_windows(evaluation_text.read_text()[:4000], books_tokenizer, cut, "a.txt")


@pytest.fixture
def key(windows: Windows) -> Key:
    return Key(weights="a" * 64, tokenizer="b" * 64, protocol=windows.protocol.digest, machine="cpu")


@pytest.fixture
def built(tmp_path: Path, key: Key, windows: Windows, books_model: CausalLM) -> Path:
    build_reference(tmp_path, key, windows, books_model, 2, lambda done, total: None)
    return tmp_path


def test_states_come_back_to_the_bit(built: Path, key: Key, windows: Windows, books_model: CausalLM) -> None:
    found = open_reference(built, key, windows, books_model.lm_head)
    assert found is not None
    for rows in windows.batches(2):
        live = final_states(books_model, windows, rows)
        assert torch.equal(found.states(rows), live)


def test_scores_from_the_cache_are_those_of_the_model(
    built: Path, key: Key, windows: Windows, books_model: CausalLM, books_5m: Path
) -> None:
    head = load_head(books_5m, torch.float32, "cpu")
    found = open_reference(built, key, windows, head)
    assert found is not None
    live = model_side(books_model, windows)
    kept = score_windows(windows, Side(found.states, head), live, 2, lambda done, total: None)
    fresh = score_windows(windows, live, live, 2, lambda done, total: None)
    assert all(torch.equal(one, other) for one, other in zip(kept.columns, fresh.columns, strict=True))
    assert kept.kl.max() == 0.0


def test_progress_reaches_the_last_window(tmp_path: Path, key: Key, windows: Windows, books_model: CausalLM) -> None:
    told: list[tuple[int, int]] = []
    build_reference(tmp_path, key, windows, books_model, 2, lambda done, total: told.append((done, total)))
    assert told[-1] == (len(windows.rows), len(windows.rows))
    assert [done for done, _ in told] == sorted({done for done, _ in told})


def test_an_entry_takes_what_it_says(built: Path, key: Key, windows: Windows, books_model: CausalLM) -> None:
    size = sum(path.stat().st_size for path in key.folder(built).iterdir())
    states = windows.protocol.tokens * bytes_a_token(books_model.lm_head, torch.float32)
    assert bytes_a_token(books_model.lm_head, torch.float32) == 4 * 256
    assert states < size < states + 4000


DAMAGE: dict[str, Callable[[Path], object]] = {
    "no facts": lambda folder: (folder / "reference.json").unlink(),
    "facts cut short": lambda folder: (folder / "reference.json").write_text('{"key"'),
    "facts of another kind": lambda folder: (folder / "reference.json").write_text('{"key": 1}'),
    "no states": lambda folder: (folder / "states.safetensors").unlink(),
    "states cut short": lambda folder: _cut(folder / "states.safetensors"),
    "one bit flipped": lambda folder: _flip(folder / "states.safetensors"),
    "another key inside": lambda folder: _edit(folder / "reference.json", weights="c" * 64),
}


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _edit(path: Path, weights: str) -> None:
    facts = json.loads(path.read_text())
    facts["key"]["weights"] = weights
    path.write_text(json.dumps(facts))


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_entry_is_none(kind: str, built: Path, key: Key, windows: Windows, books_model: CausalLM) -> None:
    DAMAGE[kind](key.folder(built))
    assert open_reference(built, key, windows, books_model.lm_head) is None
    build_reference(built, key, windows, books_model, 2, lambda done, total: None)
    assert open_reference(built, key, windows, books_model.lm_head) is not None


@pytest.mark.parametrize("field", ["weights", "tokenizer", "protocol"])
def test_another_digest_is_another_entry(
    field: str, built: Path, key: Key, windows: Windows, books_model: CausalLM
) -> None:
    other = key.model_copy(update={field: "f" * 64})
    assert open_reference(built, other, windows, books_model.lm_head) is None
    assert open_reference(built, key, windows, books_model.lm_head) is not None


def test_another_output_layer_is_refused(built: Path, key: Key, windows: Windows) -> None:
    head = torch.nn.Linear(256, 8192, bias=False)
    assert open_reference(built, key, windows, head) is None


def test_an_entry_cut_off_in_the_middle_leaves_nothing(
    tmp_path: Path, key: Key, windows: Windows, books_model: CausalLM
) -> None:
    def dies(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_reference(tmp_path, key, windows, books_model, 2, dies)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_two_runs_that_make_one_entry_at_once_both_end_well(
    tmp_path: Path, key: Key, windows: Windows, books_model: CausalLM
) -> None:
    """The other run makes the whole entry and begins to read it while this one is still writing."""
    entries: list[int] = []

    def other_run(done: int, total: int) -> None:
        if not entries:
            build_reference(tmp_path, key, windows, books_model, 2, lambda done, total: None)
            entries.append(key.folder(tmp_path).stat().st_ino)

    build_reference(tmp_path, key, windows, books_model, 2, other_run)
    assert key.folder(tmp_path).stat().st_ino == entries[0], "the other's entry stays"
    assert open_reference(tmp_path, key, windows, books_model.lm_head) is not None
    assert list(key.folder(tmp_path).parent.iterdir()) == [key.folder(tmp_path)]


def test_a_baseline_without_numbers_leaves_nothing(
    tmp_path: Path, key: Key, windows: Windows, books_model: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: CausalLM, ids: Tensor, cache: object = None) -> Tensor:
        return torch.full((*ids.shape, 256), torch.nan)

    monkeypatch.setattr(CausalLM, "hidden", broken)
    with pytest.raises(NumericsError, match="the baseline's logits"):
        build_reference(tmp_path, key, windows, books_model, 2, lambda done, total: None)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_cache_that_cannot_be_written_says_what_to_do(
    tmp_path: Path, key: Key, windows: Windows, books_model: CausalLM
) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OutputError, match="a file, not a folder") as caught:
        build_reference(tmp_path / "file", key, windows, books_model, 2, lambda done, total: None)
    assert "--no-cache" in (caught.value.fix or "")


def test_noise_is_that_of_another_batch(
    windows: Windows, books_model: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model whose states depend on how many rows run together: by that much its noise differs from nothing."""
    shapes: list[int] = []
    inner = CausalLM.hidden

    def leaky(self: CausalLM, ids: Tensor, cache: None = None) -> Tensor:
        shapes.append(len(ids))
        return inner(self, ids) + 0.01 * len(ids)

    monkeypatch.setattr(CausalLM, "hidden", leaky)
    scores = score_noise(books_model, windows, model_side(books_model, windows), 1)
    assert set(shapes) == {1, 2}
    assert 0 < scores.kl.mean() < 0.1
    assert len(scores.kl) == windows.lengths[0] * sum(length == windows.lengths[0] for length in windows.lengths)


def test_noise_looks_at_a_part_of_a_long_text(
    windows: Windows, books_model: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantlab.eval.measure.NOISE_TOKENS", 40)
    assert len(score_noise(books_model, windows, model_side(books_model, windows), 1).kl) == windows.lengths[0]
    assert len(score_noise(books_model, windows, model_side(books_model, windows), 2).kl) == 2 * windows.lengths[0]


def test_states_wider_than_the_limit_are_told_apart() -> None:
    narrow, wide = (torch.nn.Linear(width, 8, bias=False, device="meta") for width in (5000, 5001))
    assert bytes_a_token(narrow, torch.bfloat16) <= subject.MAX_BYTES_A_TOKEN < bytes_a_token(wide, torch.bfloat16)
