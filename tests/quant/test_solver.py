"""The group solver: what it measures, how it compares with plain rounding, and inputs that say nothing."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from quantlab.quant.grid import absmax_params, decode, nearest_codes
from quantlab.quant.solver import HeldOut, Problem, Solution, better_rows, plain_rounding, solve_problem
from quantlab.recipe import Gptq, Rtn
from quantlab.schemes import Scheme
from quantlab_kernels.ref import dequantize, w8a8_linear

W4, W8 = Scheme("w4a16", 32), Scheme("w8a8", None)
SCHEMES = [W4, Scheme("w4a16", None), Scheme("w4a16", 32, symmetric=False), Scheme("w8a16", 64), W8]


def tokens(count: int = 400, columns: int = 64) -> Tensor:
    mix = torch.eye(columns) + 0.5 * torch.randn(columns, columns) / columns**0.5
    return torch.randn(count, columns) @ mix


def problem(w: Tensor, x: Tensor, scheme: Scheme) -> Problem:
    return Problem(w, scheme, torch.bfloat16, x.t() @ x / len(x))


@pytest.mark.parametrize("grid", ["absmax", "mse", "hessian"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_gptq_beats_plain_rounding_on_tokens_it_has_not_seen(scheme: Scheme, grid: str) -> None:
    w, x = torch.randn(24, 64), tokens(800)
    seen, unseen = x[:600], HeldOut(x[600:], x[600:] @ w.t())
    solution = solve_problem(problem(w, seen, scheme), Gptq(grid=grid, descent_rounds=2), unseen)
    plain = plain_rounding(Problem(w, scheme, torch.bfloat16), unseen)
    everything = slice(0, 24)
    if scheme.bits == 4:
        assert solution.relative_error(everything) < 0.95 * plain.relative_error(everything)
    assert solution.relative_error(everything) < 1.1 * plain.relative_error(everything)
    assert solution.method.startswith(f"gptq {grid}") and plain.method == "rtn"


def test_plain_rounding_is_absmax_over_half_the_range() -> None:
    w = torch.randn(8, 64)
    plain = plain_rounding(Problem(w, W4, torch.bfloat16), None)
    scales = (w.view(8, 2, 32).abs().amax(-1) / 7.5).to(torch.bfloat16)
    assert torch.equal(plain.scales, scales)
    wanted = (w.view(8, 2, 32) / scales.float()[..., None]).round().clamp(-8, 7).view(8, 64).to(torch.int8)
    assert torch.equal(plain.codes, wanted)


@pytest.mark.parametrize("scheme", [W4, W8], ids=str)
def test_the_error_reported_is_that_of_the_layer_that_engines_run(scheme: Scheme) -> None:
    w, x = torch.randn(16, 64), tokens(100)
    held_out = HeldOut(x, x @ w.t())
    solution = solve_problem(problem(w, x, scheme), Rtn(grid="mse"), held_out)
    for rows in (slice(0, 6), slice(6, 16)):
        q = replace(solution.weight(rows, scheme.group_size or 64), scales=solution.scales[rows].float())
        y = w8a8_linear(x, q, None) if scheme is W8 else x @ dequantize(q).t()
        wanted = (y - held_out.y[:, rows]).square().sum() / held_out.y[:, rows].square().sum()
        assert solution.relative_error(rows) == pytest.approx(float(wanted), rel=1e-3)


def test_without_tokens_the_error_is_that_of_the_weights() -> None:
    w = torch.randn(8, 64)
    plain = plain_rounding(Problem(w, W4, torch.bfloat16), None)
    error = (decode(plain.codes, plain.scales, None) - w).square().sum() / w.square().sum()
    assert plain.relative_error(slice(0, 8)) == pytest.approx(float(error))


@pytest.mark.parametrize("scheme", [W4, W8], ids=str)
def test_a_folded_problem_is_the_same_problem(scheme: Scheme) -> None:
    """Columns times s on inputs over s: the exact outputs are equal, and the error is measured on those inputs."""
    w, x, scales = torch.randn(16, 64), tokens(), torch.rand(64) + 0.5
    folded = problem(w, x, scheme).folded(scales)
    direct = problem(w * scales, x / scales, scheme)
    assert folded.hessian is not None and direct.hessian is not None
    assert torch.allclose(folded.hessian, direct.hessian, rtol=1e-4, atol=1e-6)
    unseen, moved = HeldOut(x[:50], x[:50] @ w.t()), HeldOut(x[:50] / scales, x[:50] @ w.t())
    ours, wanted = (
        solve_problem(replace(folded, hessian=direct.hessian), Gptq(), unseen),
        solve_problem(direct, Gptq(), moved),
    )
    assert torch.equal(ours.codes, wanted.codes)
    assert torch.allclose(ours.errors, wanted.errors, rtol=1e-4)


def solution(w: Tensor, errors: list[float], seed: int, scheme: Scheme) -> Solution:
    torch.manual_seed(seed)
    scales, zeros = absmax_params(w + torch.randn_like(w), scheme, torch.bfloat16)
    codes = nearest_codes(w, scales, zeros, scheme)
    return Solution(codes, scales, zeros, f"method {seed}", 0.01, 0, torch.tensor(errors), torch.ones(len(errors)))


@pytest.mark.parametrize("symmetric", [True, False])
def test_each_linear_keeps_what_errs_less(symmetric: bool) -> None:
    scheme = Scheme("w4a16", 32, symmetric)
    w = torch.randn(6, 64)
    ours = solution(w, [1.0, 1.0, 5.0, 0.0, 2.0, 2.0], 1, scheme)
    plain = solution(w, [2.0, 1.0, 1.0, 2.0, 2.0, 2.0], 2, scheme)
    modules = [slice(0, 2), slice(2, 4), slice(4, 6)]  # better, worse, equal
    merged, kept = better_rows(ours, plain, modules)
    assert kept == [True, False, True]
    for rows, source in zip(modules, (ours, plain, ours), strict=True):
        assert torch.equal(merged.codes[rows], source.codes[rows])
        assert torch.equal(merged.scales[rows], source.scales[rows])
        assert torch.equal(merged.errors[rows], source.errors[rows])
        if not symmetric:
            assert merged.zeros is not None and source.zeros is not None
            assert torch.equal(merged.zeros[rows], source.zeros[rows])
    assert all(merged.relative_error(rows) <= plain.relative_error(rows) for rows in modules)
    assert better_rows(ours, ours, modules)[0] is ours


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_an_input_that_is_always_zero_gives_sound_codes(scheme: Scheme) -> None:
    w, x = torch.randn(8, 64), torch.zeros(100, 64)
    found = solve_problem(problem(w, x, scheme), Gptq(descent_rounds=2), HeldOut(x, x @ w.t()))
    assert scheme.code_min <= found.codes.min() and found.codes.max() <= scheme.code_max
    error = (decode(found.codes, found.scales, found.zeros) - w).square().sum() / w.square().sum()
    assert error < 0.05  # nothing speaks against rounding to nearest
    assert found.relative_error(slice(0, 8)) == 0.0


def test_dead_channels_a_zero_group_and_too_few_tokens_give_sound_codes() -> None:
    w, x = torch.randn(8, 64), tokens(20)
    w[:, :32], x[:, 40:50] = 0.0, 0.0
    found = solve_problem(problem(w, x, W4), Gptq(descent_rounds=3), HeldOut(x, x @ w.t()))
    assert torch.isfinite(found.errors).all() and (found.scales != 0).all()
    assert found.codes.min() >= -8 and found.codes.max() <= 7


def test_retries_of_the_damping_are_told() -> None:
    w, h = torch.randn(8, 64), torch.ones(64, 64) - 0.05 * torch.eye(64)
    found = solve_problem(Problem(w, W4, torch.bfloat16, h), Gptq(damping=0.001, descent_rounds=1), None)
    assert found.retries > 0 and found.damping == pytest.approx(0.001 * 2**found.retries)
    assert torch.isfinite(found.errors).all()


def test_a_corrected_target_brings_the_outputs_nearer_to_those_wanted() -> None:
    exact, w = tokens(2000), torch.randn(16, 64)
    x = exact + 0.3 * torch.randn_like(exact)  # what the quantized blocks before feed in
    y = exact @ w.t()
    seen, unseen = slice(0, 1500), HeldOut(x[1500:], y[1500:])
    residual = x[seen].t() @ (y[seen] - x[seen] @ w.t()) / 1500
    task = replace(problem(w, x[seen], Scheme("w8a16", 64)), residual=residual)
    errors = [
        solve_problem(task, Gptq(target_correction=strength), unseen).relative_error(slice(0, 16))
        for strength in (0.0, 0.5, 1.0)
    ]
    assert max(errors[1:]) < 0.95 * errors[0]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_rows_are_solved_alike_in_any_portions(scheme: Scheme, monkeypatch: pytest.MonkeyPatch) -> None:
    w, x = torch.randn(24, 64), tokens(800)
    seen, unseen = x[:600], HeldOut(x[600:], x[600:] @ w.t())
    asked = replace(problem(w, seen, scheme), residual=torch.randn(64, 24) * 0.01)
    before = asked.hessian.clone()
    how = Gptq(descent_rounds=1, target_correction=0.5)
    whole = solve_problem(asked, how, unseen)
    assert torch.equal(asked.hessian, before)
    monkeypatch.setattr("quantlab.quant.solver.CHUNK_ELEMENTS", 7 * 64)
    parts = solve_problem(asked, how, unseen)
    assert (whole.codes == parts.codes).float().mean() > 0.99  # products of other shapes round otherwise
    assert parts.codes.shape == w.shape and parts.scales.shape == whole.scales.shape
    assert float(parts.errors.sum()) == pytest.approx(float(whole.errors.sum()), rel=0.02)
