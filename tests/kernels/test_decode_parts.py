"""How decode steps are cut: every token belongs to one part, grids fit the GPU, and few kernels serve all shapes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantlab_kernels.decode_parts import PART_BUCKETS, Parts, launch_merge, plan_16bit, plan_int8

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
H200 = 132
plans = st.sampled_from([plan_16bit, plan_int8])
head_dims = st.sampled_from([64, 96, 128, 256])


@given(plan=plans, pairs=st.integers(1, 5000), tokens=st.integers(1, 200_000), head_dim=head_dims)
def test_no_part_is_shorter_than_a_step(plan, pairs: int, tokens: int, head_dim: int):
    chosen = plan(pairs, tokens, head_dim, H200)
    step = chosen.tokens * (chosen.warps if plan is plan_int8 else 1)
    assert 1 <= chosen.parts <= PART_BUCKETS[-1]
    assert chosen.parts == 1 or (chosen.parts - 1) * step < tokens


@given(plan=plans, pairs=st.integers(1, 2 * H200), head_dim=head_dims)
def test_long_sequences_fill_the_gpu_once(plan, pairs: int, head_dim: int):
    """Two waves would leave processors idle in the second."""
    programs = pairs * plan(pairs, 1 << 20, head_dim, H200).parts
    assert programs <= 8 * H200
    assert programs >= min(H200, 64 * pairs) / 2


def test_a_batch_that_fills_the_gpu_is_not_cut():
    assert all(plan(8 * 64, 32768, 128, H200).parts == 1 for plan in (plan_16bit, plan_int8))


@pytest.mark.parametrize("parts", [2, 16, 17, 64, 65, 128])
def test_parts_combine_as_softmax_does(parts: int):
    """Each part is a normalized output and the log2 of its weights' sum; parts without tokens count nothing."""
    weight = torch.randn(3, parts, 2, device=DEVICE) * 5
    weight[:, 1] = weight[2] = float("-inf")
    output = torch.randn(3, parts, 2, 64, device=DEVICE)
    out = torch.full((3, 2, 64), float("nan"), device=DEVICE)
    launch_merge(Parts(output, weight), out)
    share = (weight[:2].double() * torch.log(torch.tensor(2.0))).softmax(1)
    expected = (output[:2].double() * share[..., None]).sum(1)
    torch.testing.assert_close(out[:2], expected.float())
    assert not out[2].any()
