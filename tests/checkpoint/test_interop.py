"""Files that our writer made, loaded unmodified by transformers with compressed-tensors: the logits must be ours."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

from quantlab.checkpoint.load import load_model
from quantlab.schemes import Scheme

pytest.importorskip("compressed_tensors", reason="compressed-tensors is the oracle here; it is in the extra `test`")

W4 = Scheme("w4a16", 32)
W8 = Scheme("w8a8", None)
UNIFORM = {
    "w4a16-g32": W4,
    "w4a16-channel": Scheme("w4a16", None),
    "w8a8": W8,
    "w8a16-channel": Scheme("w8a16", None),
    "w8a16-g32": Scheme("w8a16", 32),
}
ASYMMETRIC = {
    "w4a16-g32": Scheme("w4a16", 32, symmetric=False),
    "w4a16-channel": Scheme("w4a16", None, symmetric=False),
    "w8a16-g32": Scheme("w8a16", 32, symmetric=False),
}


def relative_error(theirs: Tensor, ours: Tensor) -> float:
    return ((theirs - ours).norm() / theirs.norm()).item()


@torch.inference_mode()
def logits_of_both(folder: Path, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits by transformers and by us; fails if transformers found a tensor missing or superfluous."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    ids = torch.arange(48).view(2, 24) % 70
    return model(ids).logits.float(), load_model(folder, dtype, "cpu")(ids).float()


def but_lm_head(scheme: Scheme) -> Callable[[str], Scheme | None]:
    return lambda name: None if name == "lm_head" else scheme


def mixed(name: str) -> Scheme | None:
    """Three schemes and a module left alone, chosen so that fused groups agree."""
    if name == "lm_head" or name.endswith("layers.1.self_attn.o_proj"):
        return None
    if name.endswith("down_proj"):
        return W8
    return Scheme("w8a16", None) if "layers.0.mlp" in name else W4


@pytest.mark.parametrize("label", UNIFORM)
def test_transformers_computes_our_logits(label, pristine, write_packed):
    folder = write_packed(pristine, but_lm_head(UNIFORM[label]))
    theirs, ours = logits_of_both(folder, torch.float32)
    assert relative_error(theirs, ours) < 1e-3


@pytest.mark.parametrize("label", ASYMMETRIC)
def test_transformers_computes_our_logits_for_asymmetric_weights(label, pristine32, write_packed):
    folder = write_packed(pristine32, but_lm_head(ASYMMETRIC[label]))
    theirs, ours = logits_of_both(folder, torch.float32)
    assert relative_error(theirs, ours) < 1e-3


def test_asymmetric_bfloat16_files_agree_to_the_rounding_of_a_weight(pristine, write_packed):
    """transformers takes (code - zero) * scale in the file's dtype since some 5.x, in the run's dtype before."""
    theirs, ours = logits_of_both(write_packed(pristine, but_lm_head(ASYMMETRIC["w4a16-g32"])), torch.float32)
    assert relative_error(theirs, ours) < 1e-2


@pytest.mark.parametrize("label", UNIFORM)
def test_bfloat16_runs_agree_to_bfloat16(label, pristine, write_packed):
    theirs, ours = logits_of_both(write_packed(pristine, but_lm_head(UNIFORM[label])), torch.bfloat16)
    assert relative_error(theirs, ours) < 2e-2


def test_transformers_computes_our_logits_for_mixed_schemes(pristine, write_packed):
    theirs, ours = logits_of_both(write_packed(pristine, mixed), torch.float32)
    assert relative_error(theirs, ours) < 1e-3


def test_transformers_computes_our_logits_with_tied_embeddings(make_checkpoint, write_packed, tmp_path):
    """With tied embeddings lm_head is a Linear in transformers and no module of ours: it must be ignored by name."""
    tied = make_checkpoint(tmp_path / "tied", torch.bfloat16, seed=5, tie_word_embeddings=True)
    theirs, ours = logits_of_both(write_packed(tied, lambda name: W4), torch.float32)
    assert relative_error(theirs, ours) < 1e-3


def test_transformers_reads_our_shards(pristine, write_packed):
    folder = write_packed(pristine, but_lm_head(W4), max_shard_size=20_000)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    theirs, ours = logits_of_both(folder, torch.float32)
    assert relative_error(theirs, ours) < 1e-3


def test_transformers_reads_a_quantized_lm_head(pristine, write_packed):
    theirs, ours = logits_of_both(write_packed(pristine, lambda name: W4), torch.float32)
    assert relative_error(theirs, ours) < 1e-3


def test_transformers_reads_two_group_sizes(pristine, write_packed):
    def choose(name: str) -> Scheme | None:
        if name == "lm_head":
            return None
        return W4 if name.endswith("down_proj") else Scheme("w4a16", None)

    theirs, ours = logits_of_both(write_packed(pristine, choose), torch.float32)
    assert relative_error(theirs, ours) < 1e-3


def test_quantization_is_visible_in_the_logits(pristine, write_packed):
    """Guards the tests above: were the codes ignored, both sides would agree for the wrong reason."""
    ids = torch.arange(48).view(2, 24) % 70
    exact = load_model(pristine, torch.float32, "cpu")(ids)
    packed = load_model(write_packed(pristine, but_lm_head(W4)), torch.float32, "cpu")(ids)
    assert relative_error(exact, packed) > 1e-2
