"""The layer that stands for a W8A8 linear when a packed checkpoint is run in plain torch.

Knows nothing about files. Weight-only schemes need no such layer: their dequantized weight sits in an nn.Linear.
"""

from torch import Tensor, nn

from quantlab_kernels.layout import QuantizedWeight
from quantlab_kernels.ref import w8a8_linear


class W8A8Linear(nn.Module):
    """y = x W^T + b with x quantized to INT8 per token at run time and W held as INT8 codes."""

    def __init__(self, q: QuantizedWeight, bias: Tensor | None):
        super().__init__()
        self.codes: Tensor
        self.scales: Tensor
        self.bias: Tensor | None
        self.register_buffer("codes", q.codes)
        self.register_buffer("scales", q.scales)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: [.., K] floating -> [.., N] in x's dtype."""
        q = QuantizedWeight(self.codes, self.scales, None, self.codes.shape[1])
        return w8a8_linear(x, q, self.bias)
