"""The journal: what it says is there, whoever dies when; one writer at a time; changes are named."""

import fcntl
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from quantlab.errors import OutputError, ResumeMismatch
from quantlab.quant.journal import Journal, open_journal
from quantlab.quant.parts import Parts, part_tensors
from quantlab.quant.work import JOURNAL, PUBLISHED, REPORT_FILE, contents, published_by, work_folder
from quantlab_kernels.layout import QuantizedWeight

PRINT = {"quantlab": "1", "source": "abc", "recipe": "def"}
TENSORS = {"a.codes": torch.arange(6, dtype=torch.int8).view(2, 3), "b": torch.ones(3, dtype=torch.bfloat16)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / ".out.quantlab"


def record(folder: Path, *steps: str) -> None:
    with open_journal(folder, PRINT, restart=False) as journal:
        for step in steps:
            journal.record(step, TENSORS, {"rows": [step]})


def entries(folder: Path) -> dict[str, dict[str, object]]:
    with open_journal(folder, PRINT, restart=False) as journal:
        return dict(journal.entries)


def test_finished_steps_are_there_when_it_is_opened_again(folder: Path) -> None:
    record(folder, "one", "two")
    with open_journal(folder, PRINT, restart=False) as journal:
        assert journal.entries == {"one": {"rows": ["one"]}, "two": {"rows": ["two"]}}
        found = journal.tensors("two")
    assert found.keys() == TENSORS.keys()
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in TENSORS.items()
    )


@pytest.mark.parametrize("torn", ['{"step": "three', '{"step": "three"}', "\x00\x00", '{"step": "thr\xe9'])
def test_a_torn_last_line_is_not_a_step_and_does_not_spoil_the_next(folder: Path, torn: str) -> None:
    record(folder, "one", "two")
    with open(folder / JOURNAL, "ab") as file:
        file.write(torn.encode("latin-1"))
    assert list(entries(folder)) == ["one", "two"]
    record(folder, "three")
    assert list(entries(folder)) == ["one", "two", "three"]


def test_a_damaged_line_before_the_last_is_refused(folder: Path) -> None:
    record(folder, "one")
    text = (folder / JOURNAL).read_text()
    (folder / JOURNAL).write_text(text.replace('"step": "one"', '"stop": "one"') + '{"step": "two"}\n')
    with pytest.raises(ResumeMismatch, match="damaged"):
        entries(folder)


def test_tensors_without_their_line_are_not_a_step(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill between the tensors and the line: the step is done again, over what is there."""

    def dies(self: Journal, step: str, facts: dict[str, object]) -> None:
        raise KeyboardInterrupt

    record(folder, "one")
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "note", dies)
        with pytest.raises(KeyboardInterrupt):
            record(folder, "two")
    assert (folder / "two.safetensors").exists()
    assert list(entries(folder)) == ["one"]
    record(folder, "two")
    assert list(entries(folder)) == ["one", "two"]


def test_a_file_cut_short_while_being_written_is_never_taken_for_the_step(folder: Path) -> None:
    record(folder, "one")
    (folder / "two.unfinished").write_bytes(b"\x10\x00")
    record(folder, "two")
    assert not (folder / "two.unfinished").exists()
    with open_journal(folder, PRINT, restart=False) as journal:
        assert torch.equal(journal.tensors("two")["b"], TENSORS["b"])


HOLD = """
import fcntl, sys
file = open(sys.argv[1], "a")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def held(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the journal's lock."""
    record(folder, "one")
    line = [sys.executable, "-c", HOLD, str(folder / "lock")]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.stdin.close()


def test_another_process_that_writes_is_respected(folder: Path, held: subprocess.Popen[str]) -> None:
    before = (folder / JOURNAL).read_bytes()
    for restart in (False, True):
        with pytest.raises(OutputError, match="another run"), open_journal(folder, PRINT, restart):
            raise AssertionError("not to be reached")
    assert (folder / JOURNAL).read_bytes() == before and (folder / "one.safetensors").exists()
    held.kill()  # a lock does not outlive its process, however that ends
    held.wait()
    assert list(entries(folder)) == ["one"]


def test_the_lock_is_given_back_at_the_end(folder: Path) -> None:
    record(folder, "one")
    with open(folder / "lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert list(entries(folder)) == ["one"]


def test_what_has_changed_since_is_named(folder: Path) -> None:
    record(folder, "one")
    changed = {"quantlab": "1", "source": "other", "recipe": "def", "device": "new"}
    with pytest.raises(ResumeMismatch, match=": source, device$") as caught, open_journal(folder, changed, False):
        raise AssertionError("not to be reached")
    assert "--restart" in (caught.value.fix or "")
    assert list(entries(folder)) == ["one"]


def test_restart_drops_all_that_was_there(folder: Path) -> None:
    record(folder, "one")
    (folder / "output").mkdir()
    with open_journal(folder, {"source": "other"}, restart=True) as journal:
        assert journal.entries == {}
        assert {path.name for path in folder.iterdir()} == {"lock", JOURNAL}


def test_a_restart_cut_off_in_the_middle_leaves_no_line_without_its_tensors(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(folder, "one", "two")

    def dies(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("quantlab.quant.journal.remove_tree", dies)
        with pytest.raises(KeyboardInterrupt), open_journal(folder, PRINT, restart=True):
            raise AssertionError("not to be reached")
    assert entries(folder) == {}


def test_a_journal_without_a_step_goes_away_with_the_error_and_one_with_steps_stays(folder: Path) -> None:
    with pytest.raises(ValueError), open_journal(folder, PRINT, restart=False):
        raise ValueError
    assert not folder.exists()
    with pytest.raises(ValueError), open_journal(folder, PRINT, restart=False) as journal:
        journal.record("one", TENSORS, {})
        raise ValueError
    assert list(entries(folder)) == ["one"]


def test_parts_give_back_codes_and_changed_parameters_and_a_later_step_wins(folder: Path) -> None:
    q = QuantizedWeight(torch.ones(4, 8, dtype=torch.int8), torch.ones(4, 2), torch.zeros(4, 2, dtype=torch.int8), 4)
    later = QuantizedWeight(q.codes + 1, q.scales * 2, None, 4)
    with open_journal(folder, PRINT, restart=False) as journal:
        journal.record("one", part_tensors({"m": q, "n": q}, {"norm.weight": torch.ones(3)}), {})
        journal.record("two", part_tensors({"n": later}, {}), {})
        parts = Parts(journal, ["one", "two"])
        first, second = parts.quantized("m"), parts.quantized("n")
        assert first.group_size == 4 and torch.equal(first.codes, q.codes) and first.zeros is not None
        assert torch.equal(second.codes, later.codes) and torch.equal(second.scales, later.scales)
        assert torch.equal(parts.changed("norm.weight"), torch.ones(3))  # type: ignore[arg-type]
        assert parts.changed("m.bias") is None


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """An output in place, and the work folder of the run that put it there."""
    out = tmp_path / "out"
    out.mkdir()
    (out / REPORT_FILE).write_text(json.dumps({"fingerprint": PRINT}))
    (out / "model.safetensors").write_bytes(b"weights")
    with open_journal(work_folder(out), PRINT, restart=False) as journal:
        journal.record("one", TENSORS, {})
        journal.note(PUBLISHED, contents(out))
    return out


def test_a_published_output_is_known_until_anything_of_it_changes(published: Path) -> None:
    assert published_by(published) == {"fingerprint": PRINT}
    (published / "model.safetensors").write_bytes(b"weights!")
    assert published_by(published) is None


def test_an_output_is_published_only_when_the_journal_ends_with_it(published: Path) -> None:
    with open(work_folder(published) / JOURNAL, "a") as file:
        file.write('{"step": "another"}\n')
    assert published_by(published) is None


def test_an_output_is_still_known_while_its_work_folder_is_being_removed(
    published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (work_folder(published) / "one.safetensors").unlink()
    assert published_by(published) is not None
    (work_folder(published) / JOURNAL).unlink()
    assert published_by(published) is not None
    (work_folder(published) / "lock").unlink()
    assert published_by(published) is not None
    work_folder(published).rmdir()
    assert published_by(published) is None
