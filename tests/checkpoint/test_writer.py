"""Writing: whole or not at all, one line when the disk refuses, and nothing but the bytes that were meant."""

import errno
import os
import resource
import signal
from pathlib import Path

import pytest
import torch

from quantlab.checkpoint import sizes, writer
from quantlab.errors import CheckpointError, OutputError

SHARD = sizes.plan_shards([("a", "F32", (1000,))], 1 << 30)[0]


def test_a_tensor_that_is_not_the_planned_one_is_a_bug(tmp_path):
    for tensor in (torch.zeros(999), torch.zeros(1000, dtype=torch.float16)):
        with pytest.raises(AssertionError, match="planned F32"):
            writer.write_shard(tmp_path / f"{tensor.dtype}", SHARD, lambda name, tensor=tensor: tensor)


def test_tensors_are_asked_for_once_each_in_file_order(tmp_path):
    (shard,) = sizes.plan_shards([("a", "BF16", (2,)), ("b", "F32", (2,)), ("c", "BF16", (2,))], 1 << 30)
    asked = []

    def tensor(name):
        asked.append(name)
        return torch.zeros(2, dtype=torch.float32 if name == "b" else torch.bfloat16)

    writer.write_shard(tmp_path / "s", shard, tensor)
    assert asked == ["b", "a", "c"]


def test_strided_and_trainable_tensors_are_written_by_value(tmp_path):
    value = torch.nn.Parameter(torch.arange(6.0).view(2, 3)).t()
    (shard,) = sizes.plan_shards([("a", "F32", (3, 2))], 1 << 30)
    writer.write_shard(tmp_path / "s", shard, lambda name: value)
    assert (tmp_path / "s").read_bytes().endswith(value.detach().contiguous().numpy().tobytes())


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "quota"),
        (errno.EACCES, "no permission"),
        (errno.EROFS, "read-only"),
        (errno.EIO, "cannot be written"),
    ],
)
def test_a_refusing_disk_is_one_line_with_a_reason(number, words, tmp_path):
    with pytest.raises(OutputError) as caught, writer.disk_errors(tmp_path / "out"):
        raise OSError(number, os.strerror(number))
    line = caught.value.one_line()
    assert words in line and str(tmp_path / "out") in line
    assert number == errno.EIO or "; try: " in line


def test_a_disk_that_fills_up_in_the_middle_is_one_line(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(OutputError, match="size limit"):
            writer.write_shard(tmp_path / "s", SHARD, lambda name: torch.zeros(1000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def test_a_path_through_a_file_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is a file, not a folder"):
        writer.write_json(tmp_path / "file" / "config.json", {})


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_one_line(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="no permission"):
        writer.write_json(tmp_path / "config.json", {})


def test_an_existing_file_is_never_overwritten_nor_followed(tmp_path):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "config.json").symlink_to(tmp_path / "victim")
    with pytest.raises(OutputError, match="exists already"):
        writer.write_json(tmp_path / "config.json", {})
    assert (tmp_path / "victim").read_text() == "precious"


def test_copies_are_byte_for_byte_and_never_links(tmp_path):
    source = tmp_path / "tokenizer.json"
    source.write_bytes(os.urandom(100_000))
    (tmp_path / "link.json").symlink_to(source)
    target = tmp_path / "out" / "sub" / "tokenizer.json"
    writer.copy_file(tmp_path / "link.json", target)
    assert target.read_bytes() == source.read_bytes() and not target.is_symlink()


def test_copying_a_file_that_vanished_is_one_line(tmp_path):
    with pytest.raises(CheckpointError, match="No such file"):
        writer.copy_file(tmp_path / "ghost", tmp_path / "copy")


def folder(path: Path, content: str) -> Path:
    path.mkdir()
    (path / "f").write_text(content)
    return path


def test_publish_renames_the_finished_folder(tmp_path):
    writer.publish(folder(tmp_path / "tmp", "new"), tmp_path / "out", force=False)
    assert (tmp_path / "out" / "f").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_publish_refuses_an_existing_output_and_leaves_both_alone(tmp_path):
    tmp, out = folder(tmp_path / "tmp", "new"), folder(tmp_path / "out", "old")
    with pytest.raises(OutputError) as caught:
        writer.publish(tmp, out, force=False)
    assert "--force" in caught.value.one_line()
    assert (tmp / "f").read_text() == "new" and (out / "f").read_text() == "old"


@pytest.mark.parametrize("make", [lambda p: folder(p, "old"), lambda p: p.write_text("old"), lambda p: p.mkdir()])
def test_publish_with_force_replaces_whatever_was_there(tmp_path, make):
    tmp = folder(tmp_path / "tmp", "new")
    make(tmp_path / "out")
    writer.publish(tmp, tmp_path / "out", force=True)
    assert (tmp_path / "out" / "f").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_publish_with_force_replaces_a_link_and_not_its_target(tmp_path):
    target = folder(tmp_path / "target", "precious")
    (tmp_path / "out").symlink_to(target)
    writer.publish(folder(tmp_path / "tmp", "new"), tmp_path / "out", force=True)
    assert (tmp_path / "out" / "f").read_text() == "new" and not (tmp_path / "out").is_symlink()
    assert (target / "f").read_text() == "precious"


def test_publish_puts_the_old_output_back_when_the_new_one_cannot_be_moved(tmp_path):
    out = folder(tmp_path / "out", "old")
    with pytest.raises(OutputError):
        writer.publish(tmp_path / "ghost", out, force=True)
    assert (out / "f").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
