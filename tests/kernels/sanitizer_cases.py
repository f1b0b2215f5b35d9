"""Run as a script under compute-sanitizer: one small case of each kernel of linears, checked against the reference.

Data are drawn on the CPU, so that nearly all that the tool watches are the kernels themselves.
"""

import torch

from quantlab.bench.gpu_timing import relative_rmse
from quantlab_kernels import ref
from quantlab_kernels.w4a16 import run as run_w4a16
from quantlab_kernels.w4a16 import supported_kernels
from quantlab_kernels.w4a16_layout import to_kernel
from quantlab_kernels.w4a16_tiles import DecodeTile, GluonTile, PlainTile
from quantlab_kernels.w4a16_tiles import Tile as W4A16Tile
from quantlab_kernels.w8a8 import quantize_tokens
from quantlab_kernels.w8a8 import run as run_w8a8
from quantlab_kernels.w8a8 import supported_kernels as supported_w8a8
from quantlab_kernels.w8a8_layout import W8A8Weight
from quantlab_kernels.w8a8_tiles import DotTile, OneTokenTile, WgmmaTile
from quantlab_kernels.w8a8_tiles import Tile as W8A8Tile
from tests.kernels.w4a16_cases import TOLERANCE, Linear

DEVICE = torch.device("cuda", 0)
W4A16: list[tuple[Linear, W4A16Tile]] = [
    (Linear(130, 200, 200, 5, bias=True), PlainTile(2, 16)),
    (Linear(70, 768, 64, 5, zeros=True), DecodeTile(2, 2, 8, 3)),
    (Linear(100, 1024, 64, 7, zeros=True, bias=True), GluonTile(4, 1, 8, 0, 2, 3, 2)),
    (Linear(333, 512, 128, 33), GluonTile(8, 1, 32, 16, 2, 0, 1)),
    (Linear(333, 512, 128, 65), GluonTile(8, 2, 64, 0, 2, 1, 1)),
    (Linear(100, 512, 512, 9, bits=8, bias=True), GluonTile(4, 1, 16, 0, 2, 0, 2)),
]
W8A8: list[tuple[tuple[int, int, int], W8A8Tile]] = [
    ((5, 100, 80), DotTile(16, 64)),
    ((1, 77, 208), OneTokenTile(4, 32, 4)),
    ((17, 333, 1040), WgmmaTile(4, 1, 32, 2, 3, 3)),
    ((65, 300, 512), WgmmaTile(4, 1, 128, 1, 0, 2)),
]


def main() -> None:
    """Every case once, with overlap and without; raises if one is wrong."""
    for linear, tile in W4A16:
        if type(tile) in supported_kernels(DEVICE):
            q, x, bias, exact = linear.draw("cpu")
            weight = to_kernel(q.to(DEVICE), linear.dtype, linear.bits)
            for early in (True, False):
                out = torch.full(exact.shape, float("nan"), dtype=x.dtype).to(DEVICE)
                run_w4a16(x.to(DEVICE), weight, None if bias is None else bias.to(DEVICE), out, tile, early)
                assert relative_rmse(out.cpu(), exact) < TOLERANCE[linear.dtype]
    for (tokens, rows, columns), tile in W8A8:
        if type(tile) in supported_w8a8(DEVICE):
            codes, scales = quantize_tokens(torch.randn(tokens, columns).to(DEVICE))
            w = W8A8Weight(torch.randint(-128, 128, (rows, columns), dtype=torch.int8), torch.rand(rows) + 0.5)
            exact = ref.int8_matmul(codes.cpu(), w.codes).double() * scales.cpu()[:, None].double() * w.scales.double()
            on_gpu = W8A8Weight(w.codes.to(DEVICE), w.scales.to(DEVICE))
            for early in (True, False):
                out = torch.full(exact.shape, float("nan"), dtype=torch.bfloat16).to(DEVICE)
                run_w8a8(codes, scales, on_gpu, None, out, tile, early)
                assert relative_rmse(out.cpu(), exact) < 3e-3
    print("all right")


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
