"""The block of the GPTQ solve as one kernel, against the solver's own loop over columns."""

import pytest
import torch
from torch import Tensor

from quantlab.quant.gptq import factorize, output_error, solve, solve_block
from quantlab.quant.grid import absmax_params, decode
from quantlab.schemes import Scheme
from quantlab_kernels.gptq_block import gptq_block

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"


def block(columns: int, rows: int, zeros: bool, seed: int = 0) -> tuple[Tensor, Tensor, tuple, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    wt = torch.randn(columns, rows, generator=generator)
    target = wt + 0.1 * torch.randn(columns, rows, generator=generator)
    steps = 0.2 + 0.1 * torch.rand(columns, rows, generator=generator)
    zt = torch.randint(-3, 4, (columns, rows), generator=generator).float() if zeros else None
    inner = 0.2 * torch.randn(columns, columns, generator=generator)
    grid = (steps.to(DEVICE), None if zt is None else zt.to(DEVICE))
    return wt.to(DEVICE), target.to(DEVICE), grid, inner.to(DEVICE)


@pytest.mark.parametrize("scheme", [Scheme("w4a16", None), Scheme("w8a8", None)], ids=str)
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(("columns", "rows"), [(1, 3), (7, 8), (32, 33), (128, 40)])
def test_the_kernel_rounds_as_the_loop_does(columns: int, rows: int, zeros: bool, scheme: Scheme):
    wt, target, grid, inner = block(columns, rows, zeros)
    found, wanted = (tuple(torch.full_like(wt, float("nan")) for _ in range(2)) for _ in range(2))
    gptq_block(wt, target, grid, inner, found, (scheme.code_min, scheme.code_max))
    solve_block(wt, target.clone(), grid, inner, wanted, scheme)
    same = (found[0] == wanted[0]).all(0)
    # A product and its sum rounded once or twice may put a value on the other side of a half; then the rest of that
    # row goes another way.
    assert same.float().mean() >= 0.9
    assert torch.allclose(found[1][:, same], wanted[1][:, same], atol=1e-4)
    assert bool((found[0] == found[0].round()).all())
    assert float(found[0].min()) >= scheme.code_min and float(found[0].max()) <= scheme.code_max


def test_the_target_is_left_alone_and_the_same_block_gives_the_same_bits():
    wt, target, grid, inner = block(16, 24, zeros=False)
    before, results = target.clone(), []
    for _ in range(2):
        out = (torch.full_like(wt, float("nan")), torch.full_like(wt, float("nan")))
        gptq_block(wt, target, grid, inner, out, (-8, 7))
        results.append(out)
    assert torch.equal(target, before)
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda w, t, g, i: (w, t[:, :3], g, i), "target must be contiguous"),
        (lambda w, t, g, i: (w, t.double(), g, i), "fp32 and on one device"),
        (lambda w, t, g, i: (w, t, g, i[:4]), "inner"),
        (lambda w, t, g, i: (w.repeat(20, 1), t, g, i), "1 to 128 columns"),
    ],
)
def test_what_it_cannot_read_is_refused_in_one_sentence(change, sentence: str):
    wt, target, grid, inner = change(*block(8, 8, zeros=False))
    with pytest.raises(ValueError, match=sentence):
        gptq_block(wt, target, grid, inner, (torch.empty_like(wt), torch.empty_like(wt)), (-8, 7))


@pytest.mark.gpu
def test_a_solve_on_the_gpu_is_as_good_as_on_the_cpu():
    x = torch.randn(1024, 512) * torch.randn(512).exp()
    w, h = torch.randn(200, 512), x.t() @ x / 1024
    scheme = Scheme("w4a16", 128)
    errors = []
    for device in ("cpu", "cuda"):
        factor = factorize(h.to(device), 0.01, True)
        scales, zeros = absmax_params(w.to(device), scheme, torch.float16)
        codes = solve(w.to(device), factor, scales, zeros, scheme, 128)
        errors.append(output_error(w.to(device) - decode(codes, scales, zeros), h.to(device)).sum().item())
    assert errors[1] == pytest.approx(errors[0], rel=5e-3)
