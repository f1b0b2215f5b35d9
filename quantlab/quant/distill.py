"""End-to-end distillation: codes, scales and norms trained towards the 16-bit model's next-token distribution.

Knows nothing about files, recipes or how the codes were first chosen; `refine` owns the loop, early stopping and
checkpoints, this module one step's mathematics.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantlab.schemes import Scheme
from quantlab_kernels.layout import QuantizedWeight
from quantlab_kernels.ref import quantize_per_token

Gradients = tuple[Tensor, Tensor, None, None, None]

# Logits of this many elements at a time: 16 Mi fp32 elements are 64 MiB.
LOGIT_ELEMENTS = 1 << 24


class RoundedWeight(torch.autograd.Function):
    """(clip(round(latent)) - zero) * scale with a straight-through gradient (Bengio et al., arXiv 1308.3432)."""

    @staticmethod
    def forward(
        ctx: Any, latent: Tensor, scales: Tensor, zeros: Tensor | None, limits: tuple[int, int], dtype: torch.dtype
    ) -> Tensor:
        """latent: [N, K] fp32 in code units; scales: [N, G] fp32; zeros: [N, G] or None -> weight [N, K] of `dtype`."""
        low, high = limits
        level = latent.round().clamp_(low, high).unflatten(1, (scales.shape[1], -1))
        if zeros is not None:
            level -= zeros[..., None].float()
        ctx.save_for_backward(latent, scales, level.to(torch.int8))
        ctx.limits = limits
        return (level * scales[..., None]).flatten(1).to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Gradients:
        """Codes pass the gradient where the latent lies inside the code range; scales take the sum over their group."""
        latent, scales, level = ctx.saved_tensors
        low, high = ctx.limits
        g3 = grad.float().unflatten(1, (scales.shape[1], -1))
        to_latent = (g3 * scales[..., None]).flatten(1)
        to_latent.masked_fill_((latent < low - 0.5) | (latent > high + 0.5), 0.0)
        return to_latent, (g3 * level).sum(-1), None, None, None


class TrainedLinear(nn.Module):
    """A linear layer whose weight is codes times scales, both trained: `latent` in code units, `drift` relative."""

    def __init__(self, q: QuantizedWeight, bias: Tensor | None, scheme: Scheme):
        super().__init__()
        self.start: Tensor
        self.zeros: Tensor | None
        self.bias: Tensor | None
        scales, zeros = q.scales, q.zeros
        self.latent = nn.Parameter(q.codes.float())
        self.drift = nn.Parameter(torch.zeros_like(scales, dtype=torch.float32))
        self.register_buffer("start", scales.float())
        self.register_buffer("zeros", zeros)
        self.register_buffer("bias", bias)
        self.scale_dtype, self.limits = scales.dtype, (scheme.code_min, scheme.code_max)
        self.quantizes_input = scheme.quantizes_activations

    def scales(self) -> Tensor:
        """The stored scales `[N, G]` as fp32, rounded to their dtype with a straight-through gradient."""
        exact = self.start * (1.0 + self.drift)
        return exact + (exact.to(self.scale_dtype).float() - exact).detach()

    def codes(self) -> Tensor:
        """The signed codes int8 `[N, K]` as they would be stored now."""
        return self.latent.detach().round().clamp_(*self.limits).to(torch.int8)

    def quantized(self) -> QuantizedWeight:
        """The codes and scales as they would be stored now; a scale never crosses zero."""
        scales = self.scales().detach().to(self.scale_dtype)
        scales = torch.where(scales == 0, self.start.to(self.scale_dtype), scales)
        codes = self.codes()
        return QuantizedWeight(codes, scales, self.zeros, codes.shape[1] // scales.shape[1])

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., K] -> [..., N] in the autocast dtype, or that of x."""
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        if self.quantizes_input:
            codes, token_scales = quantize_per_token(x.detach())
            x = x + ((codes.float() * token_scales).to(x.dtype) - x).detach()
        w = RoundedWeight.apply(self.latent, self.scales(), self.zeros, self.limits, dtype)
        return F.linear(x.to(dtype), w, None if self.bias is None else self.bias.to(dtype))


def chunked_kl(student: Tensor, teacher: Tensor, head: Tensor, with_grad: bool) -> tuple[Tensor, Tensor | None]:
    """Mean KL(teacher || student) in nats a token, and its gradient to `student`, in chunks of tokens.

    student, teacher: [T, hidden], final hidden states after the norm; head: [V, hidden]. The gradient to the logits is
    (p_student - p_teacher) / T, so no logits outlive their chunk.
    """
    tokens = len(student)
    rows = max(1, LOGIT_ELEMENTS // head.shape[0])
    total = torch.zeros((), device=student.device)
    grads = []
    for s, t in zip(student.split(rows), teacher.split(rows), strict=True):
        log_p = torch.log_softmax(F.linear(s, head).float(), -1)
        log_q = torch.log_softmax(F.linear(t, head).float(), -1)
        q = log_q.exp()
        total += (q * (log_q - log_p)).sum() / tokens
        if with_grad:
            grads.append(((log_p.exp_() - q) / tokens).to(head.dtype) @ head)
    return total, torch.cat(grads) if with_grad else None


def rate_at(step: int, steps: int, warmup: int = 20) -> float:
    """Share of the peak rate at `step` of `steps`: a linear warm-up, then half a cosine down to 2 %."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.02 + 0.98 * 0.5 * (1.0 + float(torch.cos(torch.tensor(progress * torch.pi, dtype=torch.float64))))
