"""One block, group by group: what solvers see, what they do not, and that plain rounding is the floor."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from quantlab.checkpoint.linear import W8A8Linear
from quantlab.checkpoint.model_folder import open_model
from quantlab.checkpoint.reader import TensorReader
from quantlab.errors import SolveError
from quantlab.events import Event, ModuleDone, Notice
from quantlab.models.decoder import build_block
from quantlab.models.naming import INPUT_GROUPS, block_prefix, block_tensor_shapes
from quantlab.quant.block_task import BlockTask
from quantlab.quant.blockwise import (
    Streams,
    collect,
    held_out_tokens,
    quantize_block,
    row_slices,
    seen_inputs,
    target_residual,
)
from quantlab.quant.device import Place
from quantlab.quant.gptq import factorize
from quantlab.quant.solver import Problem, Solution, plain_rounding, solve_problem
from quantlab.quant.stages import Stream
from quantlab.recipe import Recipe
from quantlab.schemes import Scheme
from quantlab_kernels.ref import dequantize

CPU32 = Place(torch.device("cpu"), torch.float32)
W4 = Scheme("w4a16", 32)
NAMES = [name for group in INPUT_GROUPS for name in group]
Make = Callable[..., tuple[BlockTask, Streams]]


@pytest.fixture
def make(tiny: Path, events: list[Event]) -> Make:
    """make(passes, scheme, compared) -> block 0 of the tiny model, and 8 samples in front of it, 2 of them held out."""
    folder = open_model(tiny)
    reader = TensorReader(folder.checkpoint)
    weights = {name: reader.tensor(block_prefix(0) + name) for name in block_tensor_shapes(folder.config)}

    def build(passes: list[dict[str, Any]], scheme: Scheme = W4, compared: bool = True) -> tuple[BlockTask, Streams]:
        task = BlockTask(
            config=folder.config,
            layer=0,
            block=build_block(folder.config, 0, dict(weights), torch.float32, "cpu"),
            exact=build_block(folder.config, 0, dict(weights), torch.float32, "cpu"),
            schemes=dict.fromkeys(NAMES, scheme),
            recipe=Recipe(scheme=scheme.name, group_size=scheme.group_size or "channel", passes=passes),
            place=CPU32,
            stored={name: tensor.dtype for name, tensor in weights.items()},
            listener=events.append,
        )
        x = torch.randn(8, 32, folder.config.hidden_size)
        drifted = x + 0.05 * torch.randn_like(x)  # as if quantized blocks lay before this one
        exact = Stream(x.clone(), folder.config, CPU32) if compared else None
        return task, Streams(Stream(drifted, folder.config, CPU32), exact, 2)

    return build


def test_every_linear_is_solved_and_installed_and_the_streams_move_on(make: Make, events: list[Event]) -> None:
    task, streams = make([{"pass": "gptq"}])
    assert streams.exact is not None
    entry, exact_entry = streams.quantized.x.clone(), streams.exact.x.clone()
    quantize_block(task, streams)
    assert list(task.solved) == NAMES
    for name, q in task.solved.items():
        assert torch.equal(task.block.get_submodule(name).weight, dequantize(q).float())
    again = Stream(entry, task.config, CPU32)
    again.run(task.block, 0)
    assert torch.equal(streams.quantized.x, again.x)
    assert task.exact is not None
    compared = Stream(exact_entry, task.config, CPU32)
    compared.run(task.exact, 0)
    assert torch.equal(streams.exact.x, compared.x)
    assert [event.name for event in events if isinstance(event, ModuleDone)] == [block_prefix(0) + n for n in NAMES]


def test_later_groups_are_solved_on_what_the_quantized_ones_before_them_produce(make: Make) -> None:
    """true sequential: o_proj's codes are those of a solve on inputs that quantized q, k and v made."""
    task, streams = make([{"pass": "gptq"}], compared=False)
    entry = streams.quantized.x.clone()
    w = task.block.self_attn.o_proj.weight.data.clone()
    quantize_block(task, streams)
    replay = Streams(Stream(entry, task.config, CPU32), None, 2)
    for stage in (0, 1):
        replay.quantized.enter(task.block, 0, stage)
    moments = collect(replay.quantized, 2)
    solver = task.solver
    found = solve_problem(Problem(w, W4, task.scale_dtype, moments.hessian), solver, held_out_tokens(replay, 1, w))
    q = found.weight(slice(0, 64), 32)
    assert torch.equal(q.codes, task.solved["self_attn.o_proj"].codes)


def test_solvers_never_see_the_samples_held_out(make: Make) -> None:
    results = []
    for shift in (0.0, 0.5):
        torch.manual_seed(3)
        task, streams = make([{"pass": "gptq"}], compared=False)
        streams.quantized.x[-2:, :, 0] += shift
        quantize_block(task, streams)
        results.append(task)
    for name in INPUT_GROUPS[0]:  # what is kept further on depends on whether plain rounding was better for these
        assert torch.equal(results[0].solved[name].codes, results[1].solved[name].codes)
    assert results[0].rows[0].tokens == 6 * 32
    assert results[0].rows[0].error != results[1].rows[0].error


def test_the_residual_is_the_mean_of_inputs_times_what_their_outputs_lack(make: Make) -> None:
    task, streams = make([{"pass": "gptq", "target_correction": 1.0}])
    assert streams.exact is not None and task.exact is not None
    for stage, names in enumerate(INPUT_GROUPS):
        w = torch.cat([task.block.get_submodule(name).weight.data for name in names])
        streams.quantized.enter(task.block, 0, stage)
        streams.exact.enter(task.exact, 0, stage)
        x, wanted = streams.quantized.inputs[:6].flatten(0, 1), streams.exact.inputs[:6].flatten(0, 1) @ w.t()
        if stage in (1, 3):
            wanted = wanted + (streams.exact.x - streams.quantized.x)[:6].flatten(0, 1)
        direct = x.t() @ (wanted - x @ w.t()) / len(x)
        assert torch.allclose(target_residual(streams, stage, w), direct, rtol=1e-3, atol=1e-4)
        if stage in (1, 3):
            streams.quantized.leave(task.block, stage)
            streams.exact.leave(task.exact, stage)


@pytest.mark.parametrize(
    ("passes", "scheme"),
    [
        ([{"pass": "gptq"}], W4),
        ([{"pass": "gptq", "grid": "absmax", "damping": 1.0}], Scheme("w4a16", None)),
        ([{"pass": "awq"}, {"pass": "gptq", "target_correction": 1.0, "descent_rounds": 3}], W4),
        ([{"pass": "awq"}, {"pass": "rtn"}], Scheme("w4a16", 32, symmetric=False)),
        ([{"pass": "smoothquant"}, {"pass": "gptq"}], Scheme("w8a8", None)),
        ([{"pass": "smoothquant", "strength": 0.9}, {"pass": "rtn", "grid": "mse"}], Scheme("w8a8", None)),
    ],
    ids=str,
)
def test_no_module_is_worse_than_plain_rounding(passes: list[dict[str, Any]], scheme: Scheme, make: Make) -> None:
    task, streams = make(passes, scheme)
    quantize_block(task, streams)
    assert len(task.rows) == 7
    assert all(0 < row.error <= row.rtn_error for row in task.rows)
    int8 = scheme.quantizes_activations
    assert all(isinstance(task.block.get_submodule(name), W8A8Linear) == int8 for name in NAMES)


def test_a_module_that_plain_rounding_serves_better_keeps_it_and_says_so(
    make: Make, events: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(problem: Problem, how: Any, held_out: Any) -> Solution:
        """A solver that ruins the last third of the rows: v_proj among q, k, v."""
        found = solve_problem(problem, how, held_out)
        if len(found.codes) == 128:
            found.codes[96:] = 7
            found.errors[96:] = 1e9
        return found

    monkeypatch.setattr("quantlab.quant.blockwise.solve_problem", spoil)
    task, streams = make([{"pass": "gptq"}], compared=False)
    w = task.block.self_attn.v_proj.weight.data.clone()
    quantize_block(task, streams)
    rows = {row.name.rpartition(".")[2]: row for row in task.rows}
    assert rows["v_proj"].method == "rtn" and rows["v_proj"].error == rows["v_proj"].rtn_error
    assert rows["q_proj"].method.startswith("gptq")
    assert torch.equal(
        task.solved["self_attn.v_proj"].codes, plain_rounding(Problem(w, W4, torch.bfloat16), None).codes
    )
    assert any(isinstance(event, Notice) and "v_proj: plain rounding was better" in event.text for event in events)


def test_retries_of_the_damping_are_in_the_row_and_told(make: Make, events: list[Event], monkeypatch: Any) -> None:
    monkeypatch.setattr("quantlab.quant.solver.factorize", shy_factorize)
    task, streams = make([{"pass": "gptq"}])
    quantize_block(task, streams)
    assert {(row.retries, row.damping) for row in task.rows} == {(2, 0.04)}
    assert sum("damping raised" in event.text for event in events if isinstance(event, Notice)) == 7


def shy_factorize(h: torch.Tensor, damping: float, activation_order: bool) -> Any:
    """A Hessian just too indefinite for the first two dampings."""
    return replace(factorize(h, damping * 4, activation_order), retries=2)


def test_numbers_that_went_wrong_are_an_error_that_names_the_module(make: Make) -> None:
    task, streams = make([{"pass": "gptq"}], compared=False)
    streams.quantized.x[0, 0, 0] = float("inf")
    with pytest.raises(SolveError) as caught:
        quantize_block(task, streams)
    assert caught.value.where == "model.layers.0.self_attn.q_proj"
    assert "damping" in (caught.value.fix or "")


def test_a_module_without_a_scheme_is_left_as_it_is(make: Make) -> None:
    task, streams = make([{"pass": "gptq"}])
    for name in INPUT_GROUPS[2]:
        task.schemes[name] = None
    before = task.block.mlp.gate_proj.weight.data.clone()
    quantize_block(task, streams)
    assert set(task.solved) == set(NAMES) - set(INPUT_GROUPS[2])
    assert torch.equal(task.block.mlp.gate_proj.weight, before)


def test_without_text_weights_are_rounded_as_they_stand(make: Make) -> None:
    task, _ = make([{"pass": "rtn", "grid": "mse"}])
    quantize_block(task, None)
    assert len(task.solved) == 7 and {row.tokens for row in task.rows} == {0}
    assert all(row.error <= row.rtn_error for row in task.rows)


def test_the_moments_are_those_of_the_solvers_samples(make: Make) -> None:
    task, streams = make([{"pass": "gptq"}])
    streams.quantized.enter(task.block, 0, 0)
    x = streams.quantized.inputs[:6].flatten(0, 1)
    moments = collect(streams.quantized, 2)
    assert torch.allclose(moments.hessian, x.t() @ x / len(x), rtol=1e-4, atol=1e-5)
    seen = seen_inputs(streams, Problem(torch.zeros(1, x.shape[1]), W4, torch.float32, moments.hessian))
    assert torch.equal(seen.tokens, x) and torch.equal(seen.absmax, x.abs().amax(0)) and moments.tokens == len(x)
    assert torch.allclose(seen.mean_square, x.square().mean(0), rtol=1e-4)


def test_rows_of_stacked_linears() -> None:
    assert row_slices([4, 2, 3]) == [slice(0, 4), slice(4, 6), slice(6, 9)]
