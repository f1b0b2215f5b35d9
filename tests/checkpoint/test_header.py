"""Safetensors headers: what the library writes is read, and every way of lying in one is refused in one line."""

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from quantlab.checkpoint import header as header_module
from quantlab.checkpoint.header import MAX_HEADER_BYTES, read_header
from quantlab.errors import CheckpointError


def entry(dtype: str, shape: object, start: object, end: object) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def with_header(text: bytes, data: bytes = b"") -> bytes:
    return len(text).to_bytes(8, "little") + text + data


def file_of(tensors: dict, data: bytes) -> bytes:
    return with_header(json.dumps(tensors).encode(), data)


FOUR = b"\0" * 4
GOOD = {"a": entry("F32", [1], 0, 4)}
DUPLICATE = (
    b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}'
)

HOSTILE_FILES: dict[str, bytes] = {
    "empty": b"",
    "seven bytes": b"1234567",
    "header longer than the file": (1000).to_bytes(8, "little") + b"{}",
    "header over the limit": (MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}",
    "header of 2^63 bytes": (2**63).to_bytes(8, "little") + b"{}",
    "header of no bytes": (0).to_bytes(8, "little"),
    "pickle": b"\x80\x02}q\x00X\x01\x00\x00\x00" + b"\0" * 64,
    "not JSON": with_header(b'{"a": '),
    "a list": with_header(b"[]"),
    "not UTF-8": with_header(b'{"\xff": 1}'),
    "nested a million deep": with_header(b'{"a":' + b"[" * 1_000_000),
    "NaN for a size": with_header(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', FOUR),
    "an integer of 5000 digits": with_header(b'{"a":' + b"9" * 5000 + b"}"),
    "metadata that is no table": with_header(b'{"__metadata__":3}'),
    "metadata of numbers": with_header(b'{"__metadata__":{"format":3}}'),
}
HOSTILE_TENSORS: dict[str, tuple[dict, bytes]] = {
    "a number for an entry": ({"a": 3}, b""),
    "an entry without dtype": ({"a": {"shape": [1], "data_offsets": [0, 4]}}, FOUR),
    "an entry with an extra key": ({"a": entry("F32", [1], 0, 4) | {"file": "b"}}, FOUR),
    "unknown dtype": ({"a": entry("F31", [1], 0, 4)}, FOUR),
    "a list for a dtype": ({"a": entry(["F32"], [1], 0, 4)}, FOUR),
    "negative size": ({"a": entry("F32", [-1], 0, 4)}, FOUR),
    "two negative sizes": ({"a": entry("F32", [-1, -1], 0, 4)}, FOUR),
    "fractional size": ({"a": entry("F32", [1.0], 0, 4)}, FOUR),
    "true for a size": ({"a": entry("F32", [True], 0, 4)}, FOUR),
    "size of 2^40 beside an empty one": ({"a": entry("F32", [0, 2**40], 0, 0)}, b""),
    "product of sizes over 2^64": ({"a": entry("F32", [2**30, 2**30, 2**30], 0, 4)}, FOUR),
    "nine dimensions": ({"a": entry("F32", [1] * 9, 0, 4)}, FOUR),
    "shape too large for its bytes": ({"a": entry("F32", [2], 0, 4)}, FOUR),
    "shape too small for its bytes": ({"a": entry("F32", [1], 0, 8)}, FOUR * 2),
    "offsets in reverse": ({"a": entry("F32", [1], 4, 0)}, FOUR),
    "negative offset": ({"a": entry("F32", [1], -4, 0)}, FOUR),
    "three offsets": ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 4]}}, FOUR),
    "offsets past the end": ({"a": entry("F32", [1], 4, 8)}, FOUR),
    "offset of 2^64": ({"a": entry("F32", [1], 2**64, 2**64 + 4)}, FOUR),
    "data cut short": ({"a": entry("F32", [2], 0, 8)}, b"\0" * 7),
    "a hole before a tensor": ({"a": entry("F32", [1], 4, 8)}, FOUR * 2),
    "two tensors on the same bytes": ({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 0, 4)}, FOUR),
    "tensors that overlap": ({"a": entry("F16", [3], 0, 6), "b": entry("F16", [2], 4, 8)}, FOUR * 2),
    "a name that is a path": ({"../../etc/passwd": entry("F32", [1], 0, 4)}, FOUR),
    "a name with an escape sequence": ({"\x1b[2Ja": entry("F32", [1], 0, 4)}, FOUR),
    "a name with a line break": ({"a\nok": entry("F32", [1], 0, 4)}, FOUR),
    "an empty name": ({"": entry("F32", [1], 0, 4)}, FOUR),
    "a name of 513 characters": ({"a" * 513: entry("F32", [1], 0, 4)}, FOUR),
}


def refusal(path: Path) -> str:
    """The line that a user would see."""
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    line = caught.value.one_line()
    assert line.isprintable() and str(path) in line and len(line) < 500 + len(str(path))
    return line


@pytest.mark.parametrize("kind", HOSTILE_FILES)
def test_refuses_a_file_with(kind: str, tmp_path: Path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(HOSTILE_FILES[kind])
    refusal(path)


@pytest.mark.parametrize("kind", HOSTILE_TENSORS)
def test_refuses_a_tensor_with(kind: str, tmp_path: Path):
    tensors, data = HOSTILE_TENSORS[kind]
    path = tmp_path / "model.safetensors"
    path.write_bytes(file_of(tensors, data))
    assert "tensor" in refusal(path)


def test_refuses_a_tensor_named_twice(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(with_header(DUPLICATE, FOUR * 2))
    assert "key a appears twice" in refusal(path)


def test_refuses_bytes_after_the_last_tensor(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(file_of(GOOD, FOUR + b"\0"))
    assert "1 bytes after the last tensor" in refusal(path)


def test_refuses_more_tensors_than_any_model_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(header_module, "MAX_TENSORS", 2)
    path = tmp_path / "model.safetensors"
    path.write_bytes(file_of({name: entry("F32", [0], 0, 0) for name in "abc"}, b""))
    assert "names 3 tensors" in refusal(path)


def test_refuses_a_named_pipe_without_waiting_for_a_writer(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    os.mkfifo(path)
    assert "not a regular file" in refusal(path)


def test_refuses_a_folder(tmp_path: Path):
    assert "not a regular file" in refusal(tmp_path)


def test_refuses_a_file_that_is_not_there(tmp_path: Path):
    assert "No such file" in refusal(tmp_path / "model.safetensors")


@given(cut=st.integers(min_value=0, max_value=400))
def test_every_prefix_of_a_good_file_is_refused(cut: int, tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp("cut") / "model.safetensors"
    save_file({"a": torch.ones(3, 4), "b": torch.ones(5, dtype=torch.int8)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: min(cut, len(whole) - 1)])
    refusal(path)


@given(position=st.integers(min_value=0, max_value=10_000), value=st.integers(min_value=0, max_value=255))
def test_a_changed_byte_is_refused_or_leaves_every_tensor_inside_the_file(
    position: int, value: int, tmp_path_factory: pytest.TempPathFactory
):
    path = tmp_path_factory.mktemp("flip") / "model.safetensors"
    save_file({"a": torch.ones(3, 4), "b": torch.ones(5, dtype=torch.int8)}, path)
    content = bytearray(path.read_bytes())
    content[position % len(content)] = value
    path.write_bytes(content)
    try:
        infos = read_header(path)
    except CheckpointError:
        return
    assert all(0 <= info.start <= info.end <= len(content) for info in infos.values())
    assert sum(info.nbytes for info in infos.values()) == 53


def test_reads_what_the_safetensors_library_writes(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    tensors = {"a": torch.rand(3, 5), "b.c": torch.rand(2).bfloat16(), "d": torch.tensor(7), "e": torch.rand(0, 4)}
    save_file(tensors, path, metadata={"format": "pt"})
    infos = read_header(path)
    assert {name: info.shape for name, info in infos.items()} == {n: tuple(t.shape) for n, t in tensors.items()}
    assert {name: info.dtype for name, info in infos.items()} == {"a": "F32", "b.c": "BF16", "d": "I64", "e": "F32"}
    content = path.read_bytes()
    assert content[infos["a"].start : infos["a"].end] == tensors["a"].numpy().tobytes()
    assert infos["a"].file == path
