"""Whole folders: opened as models, inspected, loaded whole or by block, and verified against the solver."""

import functools
import json
import shutil
from collections.abc import Iterator

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantlab.checkpoint.inspection import inspect_folder
from quantlab.checkpoint.linear import W8A8Linear
from quantlab.checkpoint.load import load_model
from quantlab.checkpoint.model_folder import open_model
from quantlab.checkpoint.packed import from_disk
from quantlab.checkpoint.reader import TensorReader
from quantlab.checkpoint.verify import run_prompts, verify_codes, verify_folder, verify_tensors
from quantlab.errors import CheckpointError, QuantlabError, UnsupportedModel, VerificationError
from quantlab.models.naming import linear_shapes
from quantlab.schemes import Scheme
from quantlab_kernels.layout import QuantizedWeight
from quantlab_kernels.ref import w8a8_linear

W4 = Scheme("w4a16", 32)
W8 = Scheme("w8a8", None)
UP = "model.layers.0.mlp.up_proj"
SINGLE_FILE = "model.safetensors"


def but_lm_head(scheme: Scheme):
    return lambda name: None if name == "lm_head" else scheme


def mixed(name: str) -> Scheme | None:
    if name == "lm_head":
        return W8
    return W8 if "down_proj" in name else W4


def replace_tensors(folder, change) -> None:
    tensors = load_file(folder / SINGLE_FILE)
    change(tensors)
    save_file(tensors, folder / SINGLE_FILE, metadata={"format": "pt"})


@pytest.fixture
def packed(pristine, write_packed):
    return write_packed(pristine, but_lm_head(W4))


def test_a_16_bit_folder_opens_as_a_model_without_schemes(pristine):
    model = open_model(pristine)
    assert set(model.schemes.values()) == {None} and len(model.schemes) == 15


def test_a_packed_folder_opens_with_its_schemes(packed):
    model = open_model(packed)
    assert {name for name, scheme in model.schemes.items() if scheme is None} == {"lm_head"}
    assert set(model.schemes.values()) == {W4, None}


def test_a_packed_tensor_that_is_missing_is_named(packed):
    replace_tensors(packed, lambda t: t.pop(f"{UP}.weight_scale"))
    with pytest.raises(CheckpointError, match="is missing") as caught:
        open_model(packed)
    assert f"{SINGLE_FILE}: tensor {UP}.weight_scale" in caught.value.one_line()


def test_a_weight_kept_beside_its_packed_form_is_refused(packed):
    replace_tensors(packed, lambda t: t.update({f"{UP}.weight": torch.zeros(96, 64)}))
    with pytest.raises(CheckpointError, match="not part of this architecture"):
        open_model(packed)


def test_g_idx_is_refused(packed):
    replace_tensors(packed, lambda t: t.update({f"{UP}.weight_g_idx": torch.zeros(64).int()}))
    with pytest.raises(CheckpointError, match="not part of this architecture"):
        open_model(packed)


def test_a_group_size_that_does_not_divide_the_columns_is_refused(packed, edit_json):
    def change(config):
        config["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] = 128

    edit_json(packed / "config.json", change)
    with pytest.raises(CheckpointError, match="do not divide into groups of 128"):
        open_model(packed)


def test_an_unknown_architecture_is_refused_by_name(source, edit_json):
    edit_json(source / "config.json", lambda config: config.update(architectures=["GPT5ForCausalLM"]))
    with pytest.raises(UnsupportedModel, match="GPT5ForCausalLM is not supported"):
        open_model(source)


JUNK = [None, -1, 0, 2**70, 1.5, True, "x", [], [1], {}, {"a": 1}, "\x1b[31m"]


def places(value: object, here: tuple = ()) -> Iterator[tuple]:
    """The path of every value inside nested tables and lists."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield (*here, key)
        yield from places(child, (*here, key))


def test_junk_anywhere_in_the_config_is_read_or_refused_in_one_line(packed):
    """No value, wherever it stands, may end in an exception that is not ours."""
    text = (packed / "config.json").read_text()
    refused = 0
    for place in places(json.loads(text)):
        for junk in JUNK:
            config = json.loads(text)
            inner = functools.reduce(lambda table, key: table[key], place[:-1], config)
            inner[place[-1]] = junk
            (packed / "config.json").write_text(json.dumps(config))
            try:
                open_model(packed)
            except QuantlabError as error:
                assert error.one_line().isprintable() and error.exit_code in (4, 5)
                refused += 1
    assert refused > 200


def test_inspection_counts_bits_and_bytes(packed):
    report = inspect_folder(packed)
    assert report.problems == () and report.architecture == "LlamaForCausalLM"
    row = next(row for row in report.modules if row.name == UP)
    words, scales, shape = 96 * 64 // 2, 96 * 2 * 2, 16
    assert (row.scheme, row.bits, row.shape, row.bytes) == (W4, 4, (96, 64), words + scales + shape)
    assert row.bits_per_weight == 8 * (words + scales + shape) / (96 * 64)
    head = next(row for row in report.modules if row.name == "lm_head")
    assert (head.scheme, head.bits, head.bytes) == (None, 16, 70 * 64 * 2)
    assert report.file_bytes == (packed / SINGLE_FILE).stat().st_size
    assert report.tensor_bytes == report.other_bytes + sum(row.bytes for row in report.modules)
    assert 4.5 < report.quantized_bits_per_weight < 4.8 < report.bits_per_weight < 16


def test_inspection_of_a_16_bit_folder_finds_16_bits(pristine):
    report = inspect_folder(pristine)
    assert report.bits_per_weight == 16.0 and report.quantized == () and report.quantized_bits_per_weight is None


def test_inspection_tells_every_problem(packed):
    def damage(tensors):
        tensors.pop(f"{UP}.weight_shape")
        tensors["model.norm.weight"] = torch.ones(3)
        tensors["ghost"] = torch.ones(1)

    replace_tensors(packed, damage)
    problems = inspect_folder(packed).problems
    assert len(problems) == 3 and all(SINGLE_FILE in problem for problem in problems)
    assert [any(word in p for p in problems) for word in ("weight_shape", "[3]", "ghost")] == [True] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_runs_as_it_does_inside_the_model(pristine, write_packed, dtype):
    folder = write_packed(pristine, mixed)
    ids = torch.randint(0, 70, (3, 20))
    whole = load_model(folder, dtype, "cpu")(ids)[:, -1]
    streamed = run_prompts(open_model(folder), ids, dtype, "cpu")
    error = ((whole - streamed).norm() / whole.norm()).item()
    assert error < {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]


def test_w8a8_layers_run_the_reference_operation(pristine, write_packed):
    folder = write_packed(pristine, but_lm_head(W8))
    layer = load_model(folder, torch.float32, "cpu").linear(UP)
    assert isinstance(layer, W8A8Linear)
    model = open_model(folder)
    q = from_disk(UP, W8, (96, 64), TensorReader(model.checkpoint).tensor)
    x = torch.randn(5, 64)
    assert torch.equal(layer(x), w8a8_linear(x, q, None))


def test_biases_survive_packing_and_w8a8(write_packed, tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 70}
    config = transformers.Qwen2Config(**sizes, num_attention_heads=4, num_key_value_heads=2)
    reference = transformers.Qwen2ForCausalLM(config)
    torch.nn.init.normal_(reference.model.layers[0].self_attn.q_proj.bias)
    reference.save_pretrained(tmp_path / "qwen")
    model = load_model(write_packed(tmp_path / "qwen", but_lm_head(W8)), torch.float32, "cpu")
    name = "model.layers.0.self_attn.q_proj"
    assert torch.equal(model.linear(name).bias, reference.model.layers[0].self_attn.q_proj.bias)


def solver_of(folder):
    """What the solver decided, as far as these tests go: the codes that the sound folder holds."""
    model = open_model(folder)
    reader, shapes = TensorReader(model.checkpoint), linear_shapes(model.config)
    return lambda name: from_disk(name, model.schemes[name], shapes[name], reader.tensor)


def test_verification_passes_what_was_solved(packed, tmp_path):
    original = shutil.copytree(packed, tmp_path / "original")
    model = verify_folder(packed, open_model(original).schemes)
    assert verify_codes(model, solver_of(original)) == 14
    tensors = load_file(original / SINGLE_FILE)
    assert verify_tensors(model, {"model.norm.weight": lambda: tensors["model.norm.weight"]}) == 1


def test_verification_notices_one_changed_nibble(packed, tmp_path):
    original = shutil.copytree(packed, tmp_path / "original")
    replace_tensors(packed, lambda t: t[f"{UP}.weight_packed"][17, 3].bitwise_xor_(1 << 8))
    with pytest.raises(VerificationError, match="codes differ") as caught:
        verify_codes(open_model(packed), solver_of(original))
    assert UP in caught.value.one_line()


def test_verification_notices_one_changed_scale(packed, tmp_path):
    original = shutil.copytree(packed, tmp_path / "original")
    replace_tensors(packed, lambda t: t[f"{UP}.weight_scale"][17, 1].mul_(1.01))
    with pytest.raises(VerificationError, match="scales differ"):
        verify_codes(open_model(packed), solver_of(original))


def test_verification_notices_zeros_that_should_not_be_there(packed, tmp_path):
    solve = solver_of(packed)

    def asymmetric(name):
        q = solve(name)
        return QuantizedWeight(q.codes, q.scales, torch.zeros(q.scales.shape, dtype=torch.int8), q.group_size)

    with pytest.raises(VerificationError, match="zeros differ"):
        verify_codes(open_model(packed), asymmetric)


def test_verification_notices_a_changed_norm(packed):
    with pytest.raises(VerificationError, match="differs from what was written"):
        verify_tensors(open_model(packed), {"model.norm.weight": lambda: torch.zeros(64, dtype=torch.bfloat16)})


def test_verification_notices_another_scheme(packed):
    schemes = open_model(packed).schemes | {UP: W8}
    with pytest.raises(VerificationError, match="was solved as w8a8 channel symmetric"):
        verify_folder(packed, schemes)


def test_verification_reports_what_a_reader_would_meet(packed):
    schemes = open_model(packed).schemes
    (packed / SINGLE_FILE).write_bytes((packed / SINGLE_FILE).read_bytes()[:-1])
    with pytest.raises(VerificationError, match="cannot be read back") as caught:
        verify_folder(packed, schemes)
    assert caught.value.exit_code == 9 and SINGLE_FILE in caught.value.one_line()


def test_prompts_that_give_constant_logits_fail(source):
    replace_tensors(source, lambda t: t["lm_head.weight"].zero_())
    with pytest.raises(VerificationError, match="constant"):
        run_prompts(open_model(source), torch.randint(0, 70, (2, 8)), torch.float32, "cpu")


def test_prompts_that_overflow_fail(source):
    replace_tensors(source, lambda t: t["lm_head.weight"].fill_(3e38))
    with pytest.raises(VerificationError, match="not finite"):
        run_prompts(open_model(source), torch.randint(0, 70, (2, 8)), torch.float32, "cpu")
