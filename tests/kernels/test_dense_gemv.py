"""One token times a 16-bit weight is the product that torch gives."""

import pytest
import torch

from quantlab.bench.gpu_timing import relative_rmse
from quantlab_kernels.dense_gemv import COLUMNS, ROWS, dense_gemv

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def operands(rows: int, columns: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.randn(1, columns, device=DEVICE).to(dtype)
    weight = (torch.randn(rows, columns, device=DEVICE) / columns**0.5).to(dtype)
    return x, weight, torch.randn(rows, device=DEVICE).to(dtype)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("rows", "columns"), [(ROWS, COLUMNS), (13, 96), (ROWS * 3 + 1, COLUMNS * 2 + 40), (1, 8), (50, COLUMNS + 1)]
)
def test_the_product_is_torchs(rows: int, columns: int, bias: bool) -> None:
    x, weight, more = operands(rows, columns, torch.float16)
    exact = x.float() @ weight.float().t() + (more.float() if bias else 0.0)
    assert relative_rmse(dense_gemv(x, weight, more if bias else None), exact) < 6e-4  # rounding of the result: 2e-4


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "columns"), [(4096, 14336), (128256, 4096), (6145, 4096)])
def test_bf16_products_of_a_models_size_are_right_and_repeatable(rows: int, columns: int) -> None:
    x, weight, more = operands(rows, columns, torch.bfloat16)
    first = dense_gemv(x, weight, more)
    assert relative_rmse(first, x.float() @ weight.float().t() + more.float()) < 5e-3
    assert torch.equal(first, dense_gemv(x, weight, more))


def test_what_it_cannot_read_is_refused_in_a_sentence() -> None:
    x, weight, more = operands(8, 16, torch.float16)
    for arguments, sentence in (
        ((x.expand(2, -1), weight), "x must be"),
        ((x.float(), weight), "the weight torch.float16"),
        ((x, weight.t().contiguous().t()), "contiguous"),
        ((x, weight, more[:4]), "bias must be"),
    ):
        with pytest.raises(ValueError, match=sentence):
            dense_gemv(*arguments)
