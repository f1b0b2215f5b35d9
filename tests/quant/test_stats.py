"""Accumulated moments against the sums that they stand for."""

import pytest
import torch

from quantlab.quant.stats import TILE, Moments, add_outer, mirror_upper


@pytest.mark.parametrize("features", [7, 64, TILE, TILE + 88])
def test_the_hessian_is_the_mean_outer_product_however_the_tokens_come(features: int) -> None:
    x = torch.randn(300, features)
    moments = Moments.empty(features, "cpu")
    for part in x.split([1, 120, 179]):
        moments.add(part)
    moments.finish()
    assert torch.allclose(moments.hessian, (x.double().t() @ x.double() / 300).float(), rtol=1e-4, atol=1e-5)
    assert torch.allclose(moments.hessian, moments.hessian.t(), atol=1e-6)
    assert moments.tokens == 300


def test_only_tiles_on_and_above_the_diagonal_are_computed() -> None:
    x = torch.randn(10, 2 * TILE)
    h = torch.zeros(2 * TILE, 2 * TILE)
    add_outer(h, x, 0)
    assert (h[TILE:, :TILE] == 0).all()
    mirror_upper(h)
    assert torch.allclose(h, x.t() @ x, atol=1e-4)


def test_no_token_at_all_gives_zeros() -> None:
    moments = Moments.empty(4, "cpu")
    moments.finish()
    assert (moments.hessian == 0).all() and moments.tokens == 0


@pytest.mark.parametrize("shared", [0.0, 1.0, 30.0])
def test_bf16_inputs_of_a_cpu_are_summed_closely_whatever_the_tokens_share(shared: float) -> None:
    x = (torch.randn(1600, 40) + shared).bfloat16()
    moments = Moments.empty(40, "cpu")
    for part in x.split(100):
        moments.add(part)
    moments.finish()
    exact = x.double().t() @ x.double() / 1600
    spread = x.double().var(0).mean()  # what the smaller eigenvalues are made of
    assert float((moments.hessian - exact).norm() / 40**0.5 / spread) < 0.03
    assert float((moments.hessian - exact).norm() / exact.norm()) < 1e-3
