"""`quantization_config`: what is written is what other readers know, and what is read is only what was meant."""

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantlab.checkpoint.schema import parse_quantization_config, quantization_config
from quantlab.errors import CheckpointError, QuantlabError, UnsupportedModel, UsageError
from quantlab.schemes import GROUP_SIZES, Scheme

W4 = Scheme("w4a16", 128)
W8 = Scheme("w8a8", None)
MODULES = [f"model.layers.{i}.{name}" for i in range(2) for name in ("self_attn.q_proj", "mlp.down_proj")]

schemes = st.one_of(
    st.none(),
    st.builds(Scheme, st.just("w4a16"), st.sampled_from([None, *GROUP_SIZES])),
    st.builds(Scheme, st.just("w8a16"), st.sampled_from([None, *GROUP_SIZES])),
    st.just(W8),
)


def uniform(scheme: Scheme) -> dict[str, Scheme | None]:
    return dict.fromkeys(MODULES, scheme)


def written(scheme: Scheme = W4) -> dict[str, Any]:
    """A config that went through JSON, as a reader gets it."""
    return json.loads(json.dumps(quantization_config(uniform(scheme), {"version": "1"})))


@given(chosen=st.lists(schemes, min_size=5, max_size=5).filter(lambda items: any(items)))
def test_what_is_written_reads_back(chosen: list[Scheme | None]):
    modules = [*MODULES, "lm_head"]
    wanted = dict(zip(modules, chosen, strict=True))
    raw = json.loads(json.dumps(quantization_config(wanted, {})))
    assert parse_quantization_config(raw, modules) == wanted


def test_w4a16_is_written_as_the_smallest_section_that_every_reader_takes():
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
    group = {"format": "pack-quantized", "targets": ["Linear"], "weights": weights | {"dynamic": False}}
    assert written() == {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group | {"input_activations": None, "output_activations": None}},
        "quantlab": {"version": "1"},
    }


def test_w8a8_quantizes_activations_per_token():
    (group,) = written(W8)["config_groups"].values()
    assert group["format"] == "int-quantized"
    assert group["weights"]["strategy"] == "channel" and group["weights"]["group_size"] is None
    assert group["input_activations"]["strategy"] == "token" and group["input_activations"]["dynamic"] is True


def test_asymmetric_weights_ask_transformers_to_dequantize():
    asymmetric = Scheme("w4a16", 128, symmetric=False)
    assert written(asymmetric)["dequantize"] is True
    assert parse_quantization_config(written(asymmetric), MODULES) == uniform(asymmetric)


def test_asymmetric_weights_beside_another_scheme_are_refused():
    mixture = uniform(W4) | {MODULES[0]: Scheme("w4a16", 64, symmetric=False)}
    with pytest.raises(UsageError, match="cannot be mixed"):
        quantization_config(mixture, {})


def test_mixed_schemes_name_every_module_and_no_class():
    """A class target would catch vLLM's fused layers before their parts are looked at."""
    config = quantization_config(uniform(W4) | {MODULES[1]: W8, MODULES[3]: None}, {})
    assert config["format"] == "mixed-precision"
    targets = [target for group in config["config_groups"].values() for target in group["targets"]]
    assert sorted(targets) == sorted(MODULES[:3])
    assert config["ignore"] == [MODULES[3], "lm_head"]


def test_a_quantized_lm_head_is_named_because_vllm_does_not_call_it_linear():
    config = quantization_config(uniform(W4) | {"lm_head": W4}, {})
    assert config["config_groups"]["group_0"]["targets"] == ["Linear", "lm_head"]
    assert "lm_head" not in config["ignore"]


def test_a_section_with_the_keys_that_compressed_tensors_adds_reads_too():
    quantization = pytest.importorskip("compressed_tensors.quantization")
    full = quantization.QuantizationConfig(**written()).model_dump(mode="json")
    full |= {"version": "0.20.0", "sparsity_config": {}, "transform_config": {}}
    observer = {"observer": "memoryless_minmax", "observer_kwargs": {}, "actorder": "static", "block_structure": None}
    weights(full).update(observer)
    assert parse_quantization_config(full, MODULES) == uniform(W4)


def weights(raw: dict[str, Any]) -> dict[str, Any]:
    return raw["config_groups"]["group_0"]["weights"]


def group(raw: dict[str, Any]) -> dict[str, Any]:
    return raw["config_groups"]["group_0"]


REFUSED: dict[str, tuple[type[QuantlabError], Callable[[dict[str, Any]], object]]] = {
    "another method": (UnsupportedModel, lambda raw: raw.update(quant_method="gptq")),
    "no status": (CheckpointError, lambda raw: raw.pop("quantization_status")),
    "a frozen status": (CheckpointError, lambda raw: raw.update(quantization_status="frozen")),
    "an unknown key": (UnsupportedModel, lambda raw: raw.update(surprise=1)),
    "a KV cache scheme": (UnsupportedModel, lambda raw: raw.update(kv_cache_scheme={"num_bits": 8})),
    "sparsity": (UnsupportedModel, lambda raw: raw.update(sparsity_config={"format": "sparse-24-bitmask"})),
    "no groups": (CheckpointError, lambda raw: raw.update(config_groups={})),
    "groups in a list": (CheckpointError, lambda raw: raw.update(config_groups=[1])),
    "a preset for a group": (CheckpointError, lambda raw: raw.update(config_groups={"W4A16": ["Linear"]})),
    "an unknown key in a group": (UnsupportedModel, lambda raw: group(raw).update(surprise=1)),
    "output activations": (UnsupportedModel, lambda raw: group(raw).update(output_activations={"num_bits": 8})),
    "static activations": (UnsupportedModel, lambda raw: group(raw).update(input_activations={"dynamic": False})),
    "the wrong format": (UnsupportedModel, lambda raw: group(raw).update(format="int-quantized")),
    "three bits": (UnsupportedModel, lambda raw: weights(raw).update(num_bits=3)),
    "bits as text": (UnsupportedModel, lambda raw: weights(raw).update(num_bits="4")),
    "true for bits": (UnsupportedModel, lambda raw: weights(raw).update(num_bits=True)),
    "floats": (UnsupportedModel, lambda raw: weights(raw).update(type="float")),
    "blocks": (UnsupportedModel, lambda raw: weights(raw).update(strategy="block")),
    "groups of 7": (UnsupportedModel, lambda raw: weights(raw).update(group_size=7)),
    "groups of text": (UnsupportedModel, lambda raw: weights(raw).update(group_size="128")),
    "act-order by group": (UnsupportedModel, lambda raw: weights(raw).update(actorder="group")),
    "an unknown key in weights": (UnsupportedModel, lambda raw: weights(raw).update(surprise=1)),
    "targets as text": (CheckpointError, lambda raw: group(raw).update(targets="Linear")),
    "a number for a target": (CheckpointError, lambda raw: group(raw).update(targets=[3])),
    "a regular expression": (UnsupportedModel, lambda raw: group(raw).update(targets=["re:(a+)+$"])),
    "an unknown target": (CheckpointError, lambda raw: group(raw).update(targets=["model.layers.9.mlp.up_proj"])),
    "an unknown module to ignore": (CheckpointError, lambda raw: raw.update(ignore=["model.layers.9.mlp.up_proj"])),
    "a regular expression to ignore": (UnsupportedModel, lambda raw: raw.update(ignore=["re:.*lm_head"])),
    "one target in two groups": (
        CheckpointError,
        lambda raw: raw["config_groups"].update(group_1=copy.deepcopy(group(raw))),
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refuses(kind: str):
    error, change = REFUSED[kind]
    raw = written()
    change(raw)
    with pytest.raises(error) as caught:
        parse_quantization_config(raw, MODULES, "out/config.json")
    line = caught.value.one_line()
    assert "out/config.json: quantization_config" in line and line.isprintable()


def test_refuses_grouped_w8a8():
    raw = written(W8)
    weights(raw).update(strategy="group", group_size=128)
    with pytest.raises(UnsupportedModel, match="one scale a row"):
        parse_quantization_config(raw, MODULES)
