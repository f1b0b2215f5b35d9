"""Quantized weights into file tensors and back, bit for bit; containers that lie are refused."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quantlab.checkpoint.packed import disk_tensors, from_disk
from quantlab.errors import CheckpointError
from quantlab.schemes import Scheme
from quantlab_kernels.layout import QuantizedWeight
from quantlab_kernels.ref import dequantize

M = "model.layers.0.mlp.up_proj"
SCHEMES = {
    "w4a16": Scheme("w4a16", 32),
    "w4a16-channel": Scheme("w4a16", None),
    "w4a16-asym": Scheme("w4a16", 32, symmetric=False),
    "w8a16": Scheme("w8a16", 64),
    "w8a16-asym": Scheme("w8a16", None, symmetric=False),
    "w8a8": Scheme("w8a8", None),
}


def weight(scheme: Scheme, rows: int, columns: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(seed)

    def draw(shape: tuple[int, ...]) -> Tensor:
        return torch.randint(scheme.code_min, scheme.code_max + 1, shape, dtype=torch.int8, generator=generator)

    scales = (torch.rand(rows, scheme.groups(columns), generator=generator) + 0.1).to(dtype)
    zeros = None if scheme.symmetric else draw(tuple(scales.shape))
    return QuantizedWeight(draw((rows, columns)), scales, zeros, scheme.group_size or columns)


@given(
    label=st.sampled_from(sorted(SCHEMES)), rows=st.integers(1, 40), groups=st.integers(1, 4), seed=st.integers(0, 99)
)
def test_every_bit_comes_back(label: str, rows: int, groups: int, seed: int):
    scheme = SCHEMES[label]
    columns = groups * (scheme.group_size or 13)
    q = weight(scheme, rows, columns, seed)
    back = from_disk(M, scheme, (rows, columns), disk_tensors(M, q, scheme).__getitem__)
    assert torch.equal(back.codes, q.codes) and torch.equal(back.scales, q.scales)
    assert back.group_size == q.group_size
    assert q.zeros is None if back.zeros is None else torch.equal(back.zeros, q.zeros)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scales_keep_their_dtype(dtype):
    q = weight(SCHEMES["w4a16"], 4, 64, 0, dtype)
    tensors = disk_tensors(M, q, SCHEMES["w4a16"])
    assert tensors[f"{M}.weight_scale"].dtype == dtype
    back = from_disk(M, SCHEMES["w4a16"], (4, 64), tensors.__getitem__)
    assert torch.equal(dequantize(back), dequantize(q))


def test_packing_never_writes_g_idx_and_says_the_shape():
    tensors = disk_tensors(M, weight(SCHEMES["w4a16"], 4, 64, 0), SCHEMES["w4a16"])
    assert sorted(tensors) == [f"{M}.weight_packed", f"{M}.weight_scale", f"{M}.weight_shape"]
    assert tensors[f"{M}.weight_shape"].tolist() == [4, 64]


def test_a_scheme_that_is_not_the_weights_own_is_a_bug():
    with pytest.raises(AssertionError):
        disk_tensors(M, weight(SCHEMES["w4a16"], 4, 64, 0), SCHEMES["w4a16-asym"])


Damage = Callable[[dict[str, Tensor]], object]
DAMAGE: dict[str, tuple[str, str, Damage]] = {
    "scale of zero": ("w4a16", "weight_scale", lambda t: t[f"{M}.weight_scale"][1].zero_()),
    "scale of NaN": ("w4a16", "weight_scale", lambda t: t[f"{M}.weight_scale"][1].fill_(float("nan"))),
    "scale of Inf": ("w8a8", "weight_scale", lambda t: t[f"{M}.weight_scale"][1].fill_(float("inf"))),
    "scale as integers": ("w8a8", "weight_scale", lambda t: t.update({f"{M}.weight_scale": torch.ones(6, 1).int()})),
    "scale transposed": ("w4a16", "weight_scale", lambda t: t.update({f"{M}.weight_scale": torch.ones(2, 6)})),
    "words too few": ("w4a16", "weight_packed", lambda t: t.update({f"{M}.weight_packed": torch.ones(6, 7).int()})),
    "words as int64": ("w4a16", "weight_packed", lambda t: t.update({f"{M}.weight_packed": torch.ones(6, 8).long()})),
    "codes as uint8": ("w8a8", "weight", lambda t: t.update({f"{M}.weight": t[f"{M}.weight"].view(torch.uint8)})),
    "codes of another shape": ("w8a8", "weight", lambda t: t.update({f"{M}.weight": t[f"{M}.weight"].t()})),
    "a shape that lies": ("w4a16", "weight_shape", lambda t: t[f"{M}.weight_shape"].fill_(64)),
    "a shape of three": ("w4a16", "weight_shape", lambda t: t.update({f"{M}.weight_shape": torch.ones(3).long()})),
    "zero points unpacked": (
        "w4a16-asym",
        "weight_zero_point",
        lambda t: t.update({f"{M}.weight_zero_point": torch.zeros(6, 2, dtype=torch.int8)}),
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_refuses(kind: str):
    label, part, damage = DAMAGE[kind]
    tensors = disk_tensors(M, weight(SCHEMES[label], 6, 64, 0), SCHEMES[label])
    damage(tensors)
    with pytest.raises(CheckpointError) as caught:
        from_disk(M, SCHEMES[label], (6, 64), tensors.__getitem__)
    assert f"tensor {M}.{part}:" in caught.value.one_line()


def test_refuses_groups_that_do_not_divide_the_columns():
    with pytest.raises(CheckpointError, match="do not divide into groups of 32"):
        from_disk(M, SCHEMES["w4a16"], (6, 65), {}.__getitem__)
