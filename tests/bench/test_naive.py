"""The yardstick is honest: it is GPTQ, it helps, and it does not depend on our solver."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from quantlab.bench.naive import Hessian, collect, gptq, quantize_naively
from quantlab.eval.perplexity import compare_many, read_ids
from quantlab.models.attention import DenseAttention
from quantlab.models.config import ModelConfig
from quantlab.models.decoder import CausalLM, build_model
from quantlab.quant.gptq import factorize, solve
from quantlab.quant.grid import absmax_params, decode, nearest_codes
from quantlab.schemes import Scheme
from quantlab.text import Tokenizer

SCHEME = Scheme("w4a16", 128)


def load(folder: Path) -> CausalLM:
    config = ModelConfig.from_json(json.loads((folder / "config.json").read_text()), str(folder))
    return build_model(config, load_file(folder / "model.safetensors").__getitem__, torch.float32, "cpu")


def correlated(tokens: int, columns: int) -> torch.Tensor:
    return torch.randn(tokens, columns) @ (torch.eye(columns) + 0.3 * torch.randn(columns, columns) / columns**0.5)


def test_it_chooses_the_codes_of_our_solver_on_the_same_scales() -> None:
    x, w = correlated(1024, 256), torch.randn(48, 256)
    h = x.t() @ x
    scales, _ = absmax_params(w, SCHEME, torch.bfloat16)
    ours = decode(solve(w, factorize(h, 0.01, activation_order=True), scales, None, SCHEME), scales, None)
    # Two factorizations in fp32: a few codes that lie at a rounding boundary may differ.
    assert (gptq(w, h) - ours).abs().gt(1e-6).float().mean() < 0.01


def test_it_beats_plain_rounding_on_the_output() -> None:
    x, w = correlated(1024, 256), torch.randn(48, 256)
    scales, _ = absmax_params(w, SCHEME, torch.bfloat16)
    rounded = decode(nearest_codes(w, scales, None, SCHEME), scales, None)
    solved = gptq(w, x.t() @ x)
    assert (x @ (w - solved).t()).square().sum() < 0.9 * (x @ (w - rounded).t()).square().sum()


def test_a_dead_input_channel_does_no_harm() -> None:
    x, w = correlated(512, 128), torch.randn(8, 128)
    x[:, 5] = 0.0
    assert gptq(w, x.t() @ x).isfinite().all()


def test_the_hessian_is_the_mean_over_batches() -> None:
    hessian = Hessian(16)
    batches = torch.randn(6, 1, 10, 16)
    for batch in batches:
        hessian.add(batch)
    flat = batches.flatten(0, 2)
    torch.testing.assert_close(hessian.matrix, 2 * flat.t() @ flat / 6)


def test_every_linear_has_its_own_hessian_and_no_hook_stays(books_5m: Path) -> None:
    model = load(books_5m)
    block, tables = model.blocks[0], model.rope.tables(torch.arange(16))
    found = collect(block, [torch.randn(1, 16, 256)], tables, DenseAttention())
    assert len(found) == 7
    torch.testing.assert_close(found["self_attn.q_proj"].matrix, found["self_attn.v_proj"].matrix)
    assert not any(module._forward_pre_hooks for module in block.modules())


def test_the_whole_model_loses_less_than_by_plain_rounding(
    books_5m: Path, evaluation_text: Path, books_tokenizer: Tokenizer
) -> None:
    ids = read_ids([evaluation_text], books_tokenizer, 12_288)
    solved, rounded = load(books_5m), load(books_5m)
    times = quantize_naively(solved, ids[4096:].view(32, 256))
    for block in rounded.blocks:
        for linear in (module for module in block.modules() if isinstance(module, torch.nn.Linear)):
            scales, _ = absmax_params(linear.weight, SCHEME, torch.bfloat16)
            linear.weight.copy_(decode(nearest_codes(linear.weight, scales, None, SCHEME), scales, None))
    with_gptq, with_rtn = compare_many(load(books_5m), [solved, rounded], ids[:4096], 256)
    assert 0 < with_gptq.kl < 0.9 * with_rtn.kl
    assert times.total == times.collect + times.solve + times.propagate > 0
