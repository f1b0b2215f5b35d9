"""Sizes foretold without torch against files really written, and the plan's own rules."""

import json
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from quantlab.checkpoint import sizes, writer
from quantlab.checkpoint.header import DTYPE_BYTES, read_header
from quantlab.checkpoint.packed import disk_tensors
from quantlab.checkpoint.reader import TORCH_DTYPES, read_tensor
from quantlab.schemes import Scheme
from quantlab_kernels.layout import QuantizedWeight

entries = st.lists(
    st.tuples(st.sampled_from(["BF16", "I32", "F32", "I64", "I8"]), st.lists(st.integers(0, 9), max_size=3)),
    min_size=1,
    max_size=12,
).map(lambda items: [(f"layer.{i}.weight", dtype, tuple(shape)) for i, (dtype, shape) in enumerate(items)])

SCHEMES = [
    Scheme("w4a16", 32),
    Scheme("w4a16", None),
    Scheme("w4a16", 64, symmetric=False),
    Scheme("w8a16", 32),
    Scheme("w8a16", None, symmetric=False),
    Scheme("w8a8", None),
]


def random_weight(rows: int, columns: int, scheme: Scheme) -> QuantizedWeight:
    codes = torch.randint(scheme.code_min, scheme.code_max + 1, (rows, columns), dtype=torch.int8)
    scales = torch.rand(rows, scheme.groups(columns), dtype=torch.bfloat16) + 0.5
    zeros = None if scheme.symmetric else torch.randint(scheme.code_min, scheme.code_max + 1, scales.shape)
    zeros = None if zeros is None else zeros.to(torch.int8)
    return QuantizedWeight(codes, scales, zeros, scheme.group_size or columns)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(1, 64), (12, 128), (33, 192)])
def test_foretold_tensors_are_the_ones_written(scheme: Scheme, rows: int, columns: int):
    written = disk_tensors("m.proj", random_weight(rows, columns, scheme), scheme)
    foretold = sizes.disk_entries("m.proj", (rows, columns), scheme, "BF16")
    assert [entry[0] for entry in foretold] == list(written)
    for name, dtype, shape in foretold:
        assert written[name].dtype == TORCH_DTYPES[dtype] and tuple(written[name].shape) == shape


@given(entries=entries, limit=st.integers(min_value=1, max_value=5000))
def test_files_have_the_foretold_size_and_content(entries, limit, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    tensors = {name: torch.randint(-9, 9, shape).to(TORCH_DTYPES[dtype]) for name, dtype, shape in entries}
    shards = sizes.plan_shards(entries, limit)
    seen = {}
    for shard in shards:
        writer.write_shard(folder / shard.name, shard, tensors.__getitem__)
        assert (folder / shard.name).stat().st_size == shard.size
        assert shard.size <= limit or len(shard.entries) == 1
        seen |= read_header(folder / shard.name)
    assert seen.keys() == tensors.keys()
    assert all(torch.equal(read_tensor(seen[name]), tensors[name]) for name in tensors)


@given(entries=entries)
def test_every_tensor_is_aligned_to_its_element(entries, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    (shard,) = sizes.plan_shards(entries, 1 << 40)
    tensors = {name: torch.zeros(shape, dtype=TORCH_DTYPES[dtype]) for name, dtype, shape in entries}
    writer.write_shard(folder / shard.name, shard, tensors.__getitem__)
    assert all(info.start % DTYPE_BYTES[info.dtype] == 0 for info in read_header(folder / shard.name).values())


def test_the_safetensors_library_reads_our_files(tmp_path):
    entries = [("a.weight", "BF16", (3, 5)), ("b", "I64", (2,)), ("c", "I8", ()), ("d", "F32", (0, 3))]
    tensors = {name: torch.randint(-9, 9, shape).to(TORCH_DTYPES[dtype]) for name, dtype, shape in entries}
    (shard,) = sizes.plan_shards(entries, 1 << 30)
    writer.write_shard(tmp_path / shard.name, shard, tensors.__getitem__)
    with safe_open(tmp_path / shard.name, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        for name, tensor in tensors.items():
            assert file.get_tensor(name).dtype == tensor.dtype and torch.equal(file.get_tensor(name), tensor)


def test_one_shard_is_named_plainly_and_several_are_numbered():
    entries = [(f"t{i}", "F32", (100,)) for i in range(3)]
    assert [shard.name for shard in sizes.plan_shards(entries, 1 << 20)] == ["model.safetensors"]
    names = [shard.name for shard in sizes.plan_shards(entries, 700)]
    assert names == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]


def test_the_index_maps_every_tensor_and_counts_data_bytes():
    entries = [(f"t{i}", "F32", (100,)) for i in range(3)]
    shards = sizes.plan_shards(entries, 700)
    index = sizes.index_json(shards)
    assert index["metadata"] == {"total_size": 1200}
    assert index["weight_map"] == {f"t{i}": shard.name for i, shard in enumerate(shards)}


def test_output_entries_replace_weights_in_model_order(source):
    infos = list(read_header(source / "model.safetensors").values())
    module = "model.layers.0.mlp.up_proj"
    names = [entry[0] for entry in sizes.output_entries(infos, {module: SCHEMES[0], "lm_head": None})]
    place = [info.name for info in infos].index(f"{module}.weight")
    parts = [f"{module}.{part}" for part in ("weight_packed", "weight_scale", "weight_shape")]
    assert names[place : place + 3] == parts
    assert names[:place] + names[place + 3 :] == [info.name for info in infos if info.name != f"{module}.weight"]


def test_four_bits_in_groups_of_128_take_4_125_bits_a_weight():
    entries = sizes.disk_entries("m", (4096, 4096), Scheme("w4a16", 128), "BF16")
    total = sum(sizes.entry_bytes(entry) for entry in entries if not entry[0].endswith("shape"))
    assert math.isclose(8 * total / 4096**2, 4.125)


def test_json_is_rendered_the_same_way_every_time():
    value = {"b": [1, 2], "a": {"text": "é"}}
    assert sizes.json_bytes(value) == json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n"


def test_planning_imports_no_torch():
    modules = ("header", "folder", "hf", "sizes", "schema", "model_folder", "inspection")
    imports = "; ".join(f"import quantlab.checkpoint.{module}" for module in modules)
    code = f"import sys; {imports}; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    environment = {"PYTHONPATH": ":".join(sys.path)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (result.returncode, result.stdout.strip()) == (0, "[]"), result.stderr
