"""One step's mathematics: straight-through gradients, and the KL in chunks against autograd's."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantlab.quant.distill import TrainedLinear, chunked_kl, rate_at
from quantlab.quant.grid import absmax_params, nearest_codes
from quantlab.schemes import Scheme
from quantlab_kernels.layout import QuantizedWeight
from quantlab_kernels.ref import dequantize, quantize_per_token, w8a8_linear

W4, ASYMMETRIC, W8 = Scheme("w4a16", 32), Scheme("w4a16", 32, symmetric=False), Scheme("w8a8", None)


def trained(
    scheme: Scheme, dtype: torch.dtype = torch.float32, bias: bool = False
) -> tuple[TrainedLinear, QuantizedWeight]:
    w = torch.randn(12, 64)
    scales, zeros = absmax_params(w, scheme, dtype)
    q = QuantizedWeight(nearest_codes(w, scales, zeros, scheme), scales, zeros, scheme.group_size or 64)
    return TrainedLinear(q, torch.randn(12) if bias else None, scheme), q


@pytest.mark.parametrize("scheme", [W4, ASYMMETRIC, W8], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_before_any_step_it_is_the_quantized_layer(scheme: Scheme, dtype: torch.dtype) -> None:
    linear, q = trained(scheme, dtype, bias=True)
    x = torch.randn(5, 64)
    wide = QuantizedWeight(q.codes, q.scales.float(), q.zeros, q.group_size)
    wanted = w8a8_linear(x, wide, linear.bias) if scheme is W8 else F.linear(x, dequantize(wide), linear.bias)
    assert torch.allclose(linear(x), wanted, rtol=1e-4, atol=1e-4)
    back = linear.quantized()
    assert torch.equal(back.codes, q.codes) and torch.equal(back.scales, q.scales) and back.scales.dtype == dtype
    assert (back.zeros is None) == (q.zeros is None)


@pytest.mark.parametrize("scheme", [W4, ASYMMETRIC], ids=str)
def test_gradients_are_those_of_the_weight_passed_straight_through_the_rounding(scheme: Scheme) -> None:
    """latent: dL/dW times the scale, inside the code range; drift: the sum over its group of dL/dW times the weight."""
    linear, _ = trained(scheme)
    with torch.no_grad():
        linear.latent += 0.3 * torch.randn_like(linear.latent)
        linear.drift += 0.01 * torch.randn_like(linear.drift)
        linear.latent[0, 0], linear.latent[0, 1], linear.latent[0, 2] = 9.0, -11.0, scheme.code_max + 0.4
    x, y = torch.randn(7, 64), torch.randn(7, 12)
    (linear(x) - y).square().sum().backward()
    scales = linear.scales().detach()
    q = linear.quantized()
    weight = dequantize(QuantizedWeight(q.codes, scales, q.zeros, 32)).requires_grad_()
    (F.linear(x, weight) - y).square().sum().backward()
    assert weight.grad is not None and linear.latent.grad is not None and linear.drift.grad is not None
    straight = weight.grad * scales.repeat_interleave(32, dim=1)
    latent = linear.latent.detach()
    beyond = (latent < scheme.code_min - 0.5) | (latent > scheme.code_max + 0.5)
    assert beyond[0, :3].tolist() == [True, True, False]
    straight[beyond] = 0.0  # more of it would change nothing
    assert torch.allclose(linear.latent.grad, straight, rtol=1e-4, atol=1e-5)
    assert linear.latent.grad[0, 2] != 0
    by_group = (weight.grad * weight.detach()).view(12, 2, 32).sum(-1) / (1 + linear.drift.detach())
    assert torch.allclose(linear.drift.grad, by_group, rtol=1e-3, atol=1e-4)


def test_int8_inputs_pass_their_gradient_straight_through() -> None:
    linear, _ = trained(W8)
    x = torch.randn(5, 64, requires_grad=True)
    linear(x).sum().backward()
    weight = dequantize(linear.quantized())
    assert x.grad is not None and linear.latent.grad is not None
    assert torch.allclose(x.grad, weight.sum(0).expand(5, 64), rtol=1e-4, atol=1e-4)
    codes, token_scales = quantize_per_token(x.detach())
    seen = (codes.float() * token_scales).sum(0)  # the weight's gradient is taken at the inputs that engines see
    assert torch.allclose(linear.latent.grad, seen * linear.start, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_scale_is_always_one_that_can_be_stored_and_never_zero(dtype: torch.dtype) -> None:
    linear, q = trained(W4, dtype)
    with torch.no_grad():
        linear.drift.uniform_(-0.05, 0.05)
        linear.drift[0, 0] = -1.0
    scales = linear.scales().detach()
    assert torch.equal(scales, scales.to(dtype).float())
    stored = linear.quantized().scales
    assert (stored != 0).all() and stored[0, 0] == q.scales[0, 0]


def test_negative_scales_are_trained_like_others() -> None:
    scheme, w = W4, torch.randn(4, 64)
    scales = -absmax_params(w, scheme, torch.float32)[0]
    q = QuantizedWeight(nearest_codes(w, scales, None, scheme), scales, None, 32)
    linear = TrainedLinear(q, None, scheme)
    optimizer = torch.optim.Adam(linear.parameters(), lr=0.05)
    x = torch.randn(200, 64) @ (torch.eye(64) + 0.1 * torch.randn(64, 64))
    losses = []
    for _ in range(60):
        loss = (linear(x) - x @ w.t()).square().mean()
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert min(losses) < 0.8 * losses[0]
    assert (linear.quantized().scales < 0).all()


@pytest.mark.parametrize("rows", [3, 1000])
def test_chunked_kl_and_its_gradient_equal_autograds(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantlab.quant.distill.LOGIT_ELEMENTS", rows * 50)
    student, teacher, head = torch.randn(20, 16, requires_grad=True), torch.randn(20, 16), torch.randn(50, 16)
    wanted = kl(student, teacher, head)
    wanted.backward()
    value, gradient = chunked_kl(student.detach(), teacher, head, with_grad=True)
    assert gradient is not None and student.grad is not None
    assert torch.allclose(value, wanted.detach(), rtol=1e-5)
    assert torch.allclose(gradient, student.grad, rtol=1e-4, atol=1e-6)
    assert chunked_kl(student.detach(), teacher, head, with_grad=False)[1] is None


def kl(student: Tensor, teacher: Tensor, head: Tensor) -> Tensor:
    log_p, log_q = (F.log_softmax(F.linear(x, head), -1) for x in (student, teacher))
    return F.kl_div(log_p, log_q, log_target=True, reduction="batchmean")


def test_equal_states_have_no_divergence_and_no_gradient() -> None:
    states = torch.randn(6, 16)
    value, gradient = chunked_kl(states, states, torch.randn(50, 16), with_grad=True)
    assert value.abs() < 1e-6
    assert gradient is not None and gradient.abs().max() < 1e-6


def test_the_rate_warms_up_and_decays_to_a_fiftieth() -> None:
    rates = [rate_at(step, 200) for step in range(201)]
    assert rates[0] == 1 / 20 and rates[19] == 1.0 and max(rates) == 1.0
    assert all(a >= b for a, b in zip(rates[20:], rates[21:], strict=False))
    assert rates[200] == pytest.approx(0.02)


def test_only_codes_and_scales_are_trained() -> None:
    linear, _ = trained(ASYMMETRIC, bias=True)
    assert {name for name, _ in linear.named_parameters()} == {"latent", "drift"}
    assert isinstance(linear, nn.Module) and linear.bias is not None and not linear.bias.requires_grad
