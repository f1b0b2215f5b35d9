"""lm_head, for the recipes that quantize it: one linear behind the final norm.

Knows nothing about blocks; it comes after the last one.
"""

import torch

from quantlab.checkpoint.reader import TORCH_DTYPES, TensorReader
from quantlab.events import ModuleDone
from quantlab.models.layers import RMSNorm
from quantlab.models.naming import FINAL_NORM, LM_HEAD
from quantlab.quant.blockwise import Streams, collect
from quantlab.quant.journal import Journal
from quantlab.quant.parts import part_tensors
from quantlab.quant.report import ModuleRow
from quantlab.quant.setup import Setup
from quantlab.quant.solver import HeldOut, Problem, better_rows, plain_rounding, solve_problem

HEAD_STEP = "head"


def quantize_head(setup: Setup, journal: Journal, streams: Streams | None) -> None:
    """Solve lm_head on the final norm's output and record it."""
    scheme = setup.schemes["lm_head"]
    assert scheme is not None
    reader, device = TensorReader(setup.checkpoint), setup.place.device
    w = reader.tensor(LM_HEAD).to(device).float()
    dtype = TORCH_DTYPES[setup.checkpoint.tensors[LM_HEAD].dtype]
    problem, held_out, tokens = Problem(w, scheme, dtype), None, 0
    if streams is not None:
        norm = RMSNorm(setup.config.hidden_size, setup.config.rms_norm_eps)
        norm.weight = torch.nn.Parameter(reader.tensor(FINAL_NORM).to(device).float(), requires_grad=False)
        streams.quantized.inputs = norm(streams.quantized.x).to(setup.place.compute)
        moments = collect(streams.quantized, streams.held_out)
        x = streams.quantized.inputs[-streams.held_out :].flatten(0, 1).float()
        held_out, tokens = HeldOut(x, x @ w.t()), moments.tokens
        problem = Problem(w, scheme, dtype, moments.hessian)
    solver = next(p for p in setup.options.recipe.passes if p.kind in ("gptq", "rtn"))
    solution, plain = solve_problem(problem, solver, held_out), plain_rounding(problem, held_out)
    everything = slice(0, w.shape[0])
    solution, (kept,) = better_rows(solution, plain, [everything])
    error, rtn = solution.relative_error(everything), plain.relative_error(everything)
    method = solution.method if kept else plain.method
    row = ModuleRow("lm_head", scheme, method, solution.damping, solution.retries, tokens, error, rtn)
    q = solution.weight(everything, scheme.group_size or w.shape[1])
    journal.record(HEAD_STEP, part_tensors({"lm_head": q}, {}), {"rows": [row.as_json()]})
    setup.listener(ModuleDone(setup.config.num_layers, row.name, method, error, rtn, 0.0))
