"""The 8-bit output head: its error is the one it states, and its logits are those of the 16-bit head but for that."""

import pytest
import torch

from quantlab.bench.gpu_timing import relative_rmse
from quantlab_kernels.int8_head import ROWS_AT_ONCE, int8_head, quantize_rows
from quantlab_kernels.ref import dequantize
from quantlab_kernels.w4a16 import w4a16_linear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_the_logits_differ_by_the_error_that_is_stated():
    head, hidden = torch.randn(515, 256, device=DEVICE).half() / 16, torch.randn(9, 256, device=DEVICE).half()
    weight, error = int8_head(head)
    assert 0.003 < error < 0.012
    assert relative_rmse(w4a16_linear(hidden, weight), hidden.double() @ head.double().t()) < 1.5 * error


def test_the_error_is_that_of_the_whole_weight():
    head = torch.randn(ROWS_AT_ONCE + 70, 32, device=DEVICE).half()
    _, error = int8_head(head)
    assert error == pytest.approx(relative_rmse(dequantize(quantize_rows(head)), head), rel=1e-6)


def test_a_row_of_zeros_stays_zero_and_others_reach_the_last_code():
    head = torch.zeros(3, 32, device=DEVICE).half()
    head[1, 5], head[2, 7] = 3.0, -60000.0
    q = quantize_rows(head)
    assert not q.codes[0].any() and q.codes[1, 5] == 127 and q.codes[2, 7] == -127
    assert int8_head(head)[1] == pytest.approx(0, abs=1e-7)
    assert int8_head(torch.zeros(3, 32, device=DEVICE).half())[1] == 0


def test_a_head_that_is_not_finite_or_not_16_bit_is_refused():
    with pytest.raises(ValueError, match="finite"):
        int8_head(torch.full((3, 32), float("inf"), device=DEVICE).half())
    with pytest.raises(ValueError, match="float16 or bfloat16"):
        int8_head(torch.zeros(3, 32, device=DEVICE))
