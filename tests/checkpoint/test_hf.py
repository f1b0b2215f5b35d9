"""Checkpoint folders: sound ones are described, and each kind of damage or trap is refused in one line."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantlab.checkpoint.hf import INDEX_FILE, SINGLE_FILE, HFCheckpoint, open_checkpoint
from quantlab.checkpoint.reader import TensorReader
from quantlab.errors import CheckpointError, QuantlabError, UnsupportedModel
from quantlab.models.config import ModelConfig
from quantlab.models.naming import tensor_shapes

NORM = "model.norm.weight"


def refusal(folder: Path, kind: type[QuantlabError] = CheckpointError) -> str:
    """The line that a user would see."""
    with pytest.raises(kind) as caught:
        open_checkpoint(folder)
    line = caught.value.one_line()
    assert line.isprintable() and str(folder) in line
    return line


def tensor_refusal(folder: Path) -> str:
    """The line for a folder whose headers are sound but whose tensors are not those of its config."""
    checkpoint = open_checkpoint(folder)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.check_tensors(expected(checkpoint))
    line = caught.value.one_line()
    assert line.isprintable() and str(folder) in line and "safetensors" in line
    return line


def expected(checkpoint: HFCheckpoint) -> dict[str, tuple[int, ...]]:
    return tensor_shapes(ModelConfig.from_json(checkpoint.config, "config.json"))


def replace_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / SINGLE_FILE)
    change(tensors)
    save_file(tensors, folder / SINGLE_FILE, metadata={"format": "pt"})


def first_shard(folder: Path) -> Path:
    return min(folder.glob("model-*.safetensors"))


def change_index(folder: Path, change) -> None:
    index = json.loads((folder / INDEX_FILE).read_text())
    change(index)
    (folder / INDEX_FILE).write_text(json.dumps(index))


def test_one_file_and_shards_hold_the_same_tensors(source, sharded):
    one, many = open_checkpoint(source), open_checkpoint(sharded)
    assert len(one.files) == 1 and len(many.files) > 2
    assert one.tensors.keys() == many.tensors.keys()
    for checkpoint in (one, many):
        checkpoint.check_tensors(expected(checkpoint))
    for name in one.tensors:
        assert torch.equal(TensorReader(one).tensor(name), TensorReader(many).tensor(name))


def test_refuses_a_folder_that_is_not_there(tmp_path):
    assert "is not a folder" in refusal(tmp_path / "nowhere")


def test_refuses_a_file_for_a_folder(source):
    assert "is not a folder" in refusal(source / SINGLE_FILE)


def test_refuses_a_folder_without_config(source):
    (source / "config.json").unlink()
    assert "holds no config.json" in refusal(source)


def test_a_name_of_the_hub_is_told_the_command_that_fetches_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refusal(Path("org/name")).endswith("try: hf download org/name --local-dir name")


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"a": 1, "a": 2}', '{"a": NaN}', '{"a":' + "[" * 100_000])
def test_refuses_a_config_that_is_no_plain_object(source, text):
    (source / "config.json").write_text(text)
    assert "config.json" in refusal(source)


def test_refuses_a_folder_without_weights(source):
    (source / SINGLE_FILE).unlink()
    assert "neither" in refusal(source)


def test_refuses_pickled_weights_by_name(source):
    (source / SINGLE_FILE).unlink()
    (source / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")
    assert "pickled" in refusal(source, UnsupportedModel)


def test_refuses_an_already_quantized_source(source, edit_json):
    edit_json(source / "config.json", lambda c: c.update(quantization_config={"quant_method": "gptq"}))
    assert "already quantized (gptq)" in refusal(source, UnsupportedModel)
    assert open_checkpoint(source, allow_quantized=True).tensors


def test_refuses_a_missing_shard(sharded):
    shard = first_shard(sharded)
    shard.unlink()
    assert f"shard {shard.name} is missing" in refusal(sharded)


def test_refuses_an_extra_shard(sharded):
    shutil.copy(first_shard(sharded), sharded / "model-00099-of-00099.safetensors")
    assert "extra shard" in refusal(sharded)


def test_refuses_a_single_file_beside_shards(sharded, source):
    shutil.copy(source / SINGLE_FILE, sharded)
    assert "extra shard" in refusal(sharded)


def test_refuses_a_shard_beside_a_single_file(sharded, source):
    shutil.copy(first_shard(sharded), source)
    assert "extra shard" in refusal(source)


def test_refuses_shards_without_an_index(sharded):
    (sharded / INDEX_FILE).unlink()
    assert "no model.safetensors.index.json" in refusal(sharded)


def test_refuses_a_truncated_shard(sharded):
    shard = first_shard(sharded)
    shard.write_bytes(shard.read_bytes()[:-1])
    assert shard.name in refusal(sharded)


def test_refuses_a_shard_that_grew(sharded):
    shard = first_shard(sharded)
    shard.write_bytes(shard.read_bytes() + b"\0")
    assert "after the last tensor" in refusal(sharded)


@pytest.mark.parametrize(
    "name",
    [
        "../outside/model.safetensors",
        "/etc/model.safetensors",
        "sub/model.safetensors",
        "..",
        "",
        "model.bin",
        "model\n.safetensors",
        ".hidden.safetensors",
        "..\\model.safetensors",
    ],
)
def test_refuses_a_weight_map_entry_that_is_no_plain_file_name(sharded, name):
    outside = sharded.parent / "outside"
    outside.mkdir()
    shutil.copy(first_shard(sharded), outside / "model.safetensors")
    change_index(sharded, lambda index: index["weight_map"].update({NORM: name}))
    line = refusal(sharded)
    assert "not a plain .safetensors file name" in line and NORM in line


@pytest.mark.parametrize("value", [None, 3, ["a"], {}])
def test_refuses_a_weight_map_entry_that_is_no_text(sharded, value):
    change_index(sharded, lambda index: index["weight_map"].update({NORM: value}))
    assert NORM in refusal(sharded)


@pytest.mark.parametrize("value", [None, [], {}, "x"])
def test_refuses_an_index_without_a_weight_map(sharded, value):
    change_index(sharded, lambda index: index.update(weight_map=value))
    assert "weight_map is missing" in refusal(sharded)


def test_refuses_a_weight_map_that_names_the_wrong_shard(sharded):
    def swap(index):
        other = next(name for name in index["weight_map"].values() if name != index["weight_map"][NORM])
        index["weight_map"][NORM] = other

    change_index(sharded, swap)
    assert f"tensor {NORM}: is missing, though" in refusal(sharded)


def test_refuses_a_weight_map_that_names_a_tensor_nobody_has(sharded):
    change_index(sharded, lambda index: index["weight_map"].update(ghost=first_shard(sharded).name))
    assert "tensor ghost: is missing" in refusal(sharded)


def test_refuses_a_tensor_that_the_weight_map_forgot(sharded):
    change_index(sharded, lambda index: index["weight_map"].pop(NORM))
    assert f"tensor {NORM}: is not in" in refusal(sharded)


def test_refuses_a_tensor_that_two_shards_hold(sharded):
    index = json.loads((sharded / INDEX_FILE).read_text())
    shard = next(name for name in sorted(set(index["weight_map"].values())) if name != index["weight_map"][NORM])
    save_file(load_file(sharded / shard) | {NORM: torch.ones(64)}, sharded / shard)
    assert f"tensor {NORM}: is also in" in refusal(sharded)


def test_refuses_a_file_without_tensors(source):
    save_file({}, source / SINGLE_FILE)
    assert "holds no tensors" in refusal(source)


@pytest.mark.parametrize("name", ["config.json", SINGLE_FILE])
def test_refuses_a_link_that_leaves_the_folder(source, tmp_path, name):
    moved = tmp_path / "elsewhere"
    shutil.move(source / name, moved)
    (source / name).symlink_to(moved)
    assert "a link that leaves the folder" in refusal(source)


def test_refuses_to_copy_a_tokenizer_that_links_outside(source, tmp_path):
    (tmp_path / "secret").write_text("token")
    (source / "tokenizer.json").unlink()
    (source / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="leaves the folder"):
        _ = open_checkpoint(source).extra_files


def hub_cache(source: Path, root: Path) -> Path:
    """`source` laid out as the hub's download cache does: links into blobs named by hash."""
    blobs, snapshot = root / "blobs", root / "snapshots" / "0123abcd"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, path in enumerate(sorted(source.iterdir())):
        digest = f"{i:064x}"
        shutil.copy(path, blobs / digest)
        (snapshot / path.name).symlink_to(f"../../blobs/{digest}")
    return snapshot


def test_reads_a_snapshot_of_the_hub_cache(source, tmp_path):
    checkpoint = open_checkpoint(hub_cache(source, tmp_path / "cache"))
    checkpoint.check_tensors(expected(checkpoint))
    assert [path.name for path in checkpoint.extra_files] == ["generation_config.json", "tokenizer.json"]


def test_refuses_a_hub_cache_blob_that_links_on(source, tmp_path):
    snapshot = hub_cache(source, tmp_path / "cache")
    blob = (snapshot / SINGLE_FILE).resolve()
    shutil.move(blob, tmp_path / "elsewhere")
    blob.symlink_to(tmp_path / "elsewhere")
    assert "a link that leaves the folder" in refusal(snapshot)


def test_refuses_a_missing_tensor_and_names_the_nearest(source):
    replace_tensors(source, lambda t: t.update({"model.norn.weight": t.pop(NORM)}))
    line = tensor_refusal(source)
    assert f"tensor {NORM}: is missing (the nearest name is model.norn.weight)" in line


def test_refuses_a_tensor_that_the_architecture_lacks(source):
    replace_tensors(source, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(96)}))
    assert "q_proj.bias: is not part of this architecture" in tensor_refusal(source)


def test_refuses_a_wrong_shape(source):
    replace_tensors(source, lambda t: t.update({NORM: torch.ones(65)}))
    assert f"tensor {NORM}: has shape [65]; config.json asks for [64]" in tensor_refusal(source)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn])
def test_refuses_a_wrong_dtype(source, dtype):
    replace_tensors(source, lambda t: t.update({NORM: torch.ones(64).to(dtype)}))
    assert f"tensor {NORM}: has dtype" in tensor_refusal(source)


def test_lets_harmless_extras_through(source, edit_json):
    edit_json(source / "config.json", lambda c: c.update(tie_word_embeddings=True))
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    replace_tensors(source, lambda t: t.update({name: torch.ones(6)}))
    checkpoint = open_checkpoint(source)
    assert "lm_head.weight" in checkpoint.tensors and "lm_head.weight" not in expected(checkpoint)
    checkpoint.check_tensors(expected(checkpoint))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_reading_refuses_a_weight_that_is_not_finite(source, dtype, value):
    bad = torch.ones(64, dtype=dtype)
    bad[37] = value
    replace_tensors(source, lambda t: t.update({NORM: bad}))
    with pytest.raises(CheckpointError) as caught:
        TensorReader(open_checkpoint(source)).tensor(NORM)
    line = caught.value.one_line()
    assert "holds NaN or Inf" in line and NORM in line and SINGLE_FILE in line


def test_reading_notices_a_file_cut_after_it_was_opened(source):
    checkpoint = open_checkpoint(source)
    last = max(checkpoint.tensors.values(), key=lambda info: info.end)
    path = source / SINGLE_FILE
    path.write_bytes(path.read_bytes()[: last.start + 1])
    with pytest.raises(CheckpointError, match="ends before its last byte"):
        TensorReader(checkpoint).tensor(last.name)


def test_reading_a_name_that_is_not_there_is_an_error(source):
    with pytest.raises(CheckpointError, match="ghost is missing"):
        TensorReader(open_checkpoint(source)).tensor("ghost")


def test_tensors_can_be_written_to(source):
    """They are copies, not views of the file: a solver may work in place."""
    reader = TensorReader(open_checkpoint(source))
    reader.tensor(NORM).zero_()
    assert not (reader.tensor(NORM) == 0).any()


def test_extra_files_are_those_to_copy(source):
    for name in ("LICENSE", "chat_template.jinja", "modeling_x.py", "README.md", "optimizer.pt", "merges.txt"):
        (source / name).write_text("x")
    names = {path.name for path in open_checkpoint(source).extra_files}
    copied = {"LICENSE", "chat_template.jinja", "modeling_x.py", "merges.txt"}
    assert names == copied | {"generation_config.json", "tokenizer.json"}


def test_the_fingerprint_changes_with_any_byte_and_with_nothing_else(source, tmp_path):
    before = open_checkpoint(source).fingerprint()
    assert open_checkpoint(Path(shutil.copytree(source, tmp_path / "copy"))).fingerprint() == before
    (source / "README.md").write_text("not part of it")
    assert open_checkpoint(source).fingerprint() == before
    for name in ("config.json", "tokenizer.json", SINGLE_FILE):
        content = (source / name).read_bytes()
        changed = content[:-1] + bytes([content[-1] ^ 1]) if name == SINGLE_FILE else content + b" "
        (source / name).write_bytes(changed)
        assert open_checkpoint(source).fingerprint() != before
        (source / name).write_bytes(content)
    assert open_checkpoint(source).fingerprint() == before
