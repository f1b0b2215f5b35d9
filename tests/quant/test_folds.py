"""Folds leave the float function as it was: through norms, from v to o across shared heads, from up to down."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quantlab.checkpoint.model_folder import open_model
from quantlab.checkpoint.reader import TensorReader
from quantlab.models.config import ModelConfig
from quantlab.models.decoder import build_block
from quantlab.models.layers import DecoderBlock
from quantlab.models.naming import INPUT_GROUPS, block_prefix, block_tensor_shapes
from quantlab.quant import folds
from quantlab.quant.block_task import BlockTask, install
from quantlab.quant.device import Place
from quantlab.quant.fold_search import FOLD_SOURCES, Fold, apply_fold, find_fold
from quantlab.quant.grid import absmax_params, nearest_codes
from quantlab.quant.smoothquant import Inputs
from quantlab.quant.solver import Problem
from quantlab.quant.stages import Stream
from quantlab.recipe import Awq, Recipe, SmoothQuant
from quantlab.schemes import Scheme
from quantlab_kernels.layout import QuantizedWeight

SCHEME = Scheme("w4a16", 32)


def test_a_norm_takes_any_scale_and_columns_take_what_the_rounded_norm_gives_back() -> None:
    norm, scales = torch.randn(64).to(torch.bfloat16), torch.rand(64) * 30 + 0.01
    divided, columns = folds.fold_into_norm(norm, scales)
    assert divided.dtype == torch.bfloat16 and columns.dtype == torch.float32
    assert torch.allclose(divided.float() * columns, norm.float(), rtol=1e-6)
    assert torch.allclose(columns, scales, rtol=0.01)


def test_a_norm_channel_that_is_zero_or_would_leave_the_dtype_stays() -> None:
    norm = torch.tensor([0.0, 1.0, 6e-8], dtype=torch.float16)
    divided, columns = folds.fold_into_norm(norm, torch.tensor([2.0, 1e-6, 1e4]))
    assert torch.equal(divided, norm) and torch.equal(columns, torch.ones(3))


def test_powers_of_two_are_powers_of_two_around_one() -> None:
    scales = folds.powers_of_two(torch.logspace(-9, 9, 101, base=2.0) * 1000)
    mantissas, exponents = torch.frexp(scales)
    assert (mantissas == 0.5).all()
    assert scales.median() == 1.0 and scales.max() == 64 and scales.min() == 1 / 64
    assert set((exponents - 1).tolist()) == set(range(-6, 7))


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2), (6, 1)])
def test_query_heads_that_share_a_value_head_share_its_scales(heads: int, kv_heads: int) -> None:
    shared = torch.rand(kv_heads * 16) + 0.5
    columns = folds.per_query_channel(shared, heads, kv_heads)
    assert columns.shape == (heads * 16,)
    for head in range(heads):
        owner = head // (heads // kv_heads)
        assert torch.equal(columns[head * 16 : head * 16 + 16], shared[owner * 16 : owner * 16 + 16])
    assert torch.allclose(folds.per_kv_channel(columns, heads, kv_heads), shared)


def test_a_row_that_would_round_is_not_divided() -> None:
    stored = torch.tensor([[1.0, 3.0], [6.1e-5, 1.0], [2**-24, 1.0]], dtype=torch.float16)
    assert folds.dividable(stored, torch.full((3,), 4.0)).tolist() == [4.0, 1.0, 1.0]


class Bench:
    """Block 0 of a tiny model with hidden states in front of it."""

    def __init__(self, source: Path):
        folder = open_model(source)
        self.config: ModelConfig = folder.config
        reader = TensorReader(folder.checkpoint)
        self.weights = {name: reader.tensor(block_prefix(0) + name) for name in block_tensor_shapes(self.config)}
        self.x = torch.randn(6, 16, self.config.hidden_size)
        self.x[..., ::20] *= 8.0

    def block(self) -> DecoderBlock:
        return build_block(self.config, 0, dict(self.weights), torch.float32, "cpu")

    def task(self, scheme: Scheme = SCHEME) -> BlockTask:
        recipe = Recipe(group_size=32, passes=[{"pass": "awq"}, {"pass": "gptq"}])
        return BlockTask(
            config=self.config,
            layer=0,
            block=self.block(),
            exact=self.block(),
            schemes={name: scheme for group in INPUT_GROUPS for name in group},
            recipe=recipe,
            place=Place(torch.device("cpu"), torch.float32),
            stored={name: tensor.dtype for name, tensor in self.weights.items()},
            listener=lambda event: None,
        )

    def output(self, block: DecoderBlock) -> Tensor:
        stream = self.stream()
        stream.run(block, 0)
        return stream.x

    def stream(self) -> Stream:
        return Stream(self.x.clone(), self.config, Place(torch.device("cpu"), torch.float32))


def stacked(task: BlockTask, stage: int) -> Tensor:
    return torch.cat([task.block.get_submodule(name).weight.data.float() for name in INPUT_GROUPS[stage]])


def solve_plainly(task: BlockTask, name: str) -> None:
    w = task.block.get_submodule(name).weight.data.float()
    scales, _ = absmax_params(w, SCHEME, task.scale_dtype)
    install(task, name, QuantizedWeight(nearest_codes(w, scales, None, SCHEME), scales, None, 32), SCHEME)


@pytest.fixture
def propose(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Fold]:
    """propose(task, stage, how) -> the fold that is made when the search answers with random scales."""

    def make(task: BlockTask, stage: int, how: Awq | SmoothQuant) -> Fold:
        w, scheme = stacked(task, stage), task.schemes[INPUT_GROUPS[stage][0]]
        scales = torch.randn(w.shape[1]).exp()
        monkeypatch.setattr(f"quantlab.quant.{how.kind}.search_scales", lambda *arguments: scales)
        assert scheme is not None
        problem = Problem(w, scheme, task.scale_dtype, hessian=torch.eye(w.shape[1]))
        nothing = Inputs(torch.zeros(1, w.shape[1]), torch.zeros(w.shape[1]), torch.zeros(w.shape[1]))
        fold = find_fold(task, stage, how, problem, nothing)
        assert fold is not None and fold.columns.std() > 0.1
        return fold

    return make


def scale_columns(task: BlockTask, stage: int, columns: Tensor) -> None:
    """What solving the folded problem does to the group's own weights."""
    for name in INPUT_GROUPS[stage]:
        linear = task.block.get_submodule(name)
        linear.weight.data = linear.weight.data * columns


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_fold_leaves_the_blocks_function_as_it_was(
    stage: int, dtype: torch.dtype, family: str, tiny_models: Callable[..., Path], propose: Callable[..., Fold]
) -> None:
    bench = Bench(tiny_models(dtype, family))
    task = bench.task()
    fold = propose(task, stage, Awq())
    before = bench.output(task.block)
    apply_fold(task, fold)
    scale_columns(task, stage, fold.columns)
    after = bench.output(task.block)
    assert torch.allclose(after, before, rtol=1e-4, atol=1e-5)
    assert torch.equal(bench.output(task.exact), before)  # the block it is compared with shares nothing with it
    for name, tensor in task.changed.items():
        assert tensor.dtype == bench.weights[name].dtype and not torch.equal(tensor, bench.weights[name])


@pytest.mark.parametrize("stage", [1, 3])
def test_powers_of_two_through_linears_change_no_bit(
    stage: int, tiny_models: Callable[..., Path], propose: Callable[..., Fold]
) -> None:
    bench = Bench(tiny_models(torch.bfloat16, "qwen2"))
    task = bench.task()
    fold = propose(task, stage, Awq())
    feeder = "self_attn.v_proj" if stage == 1 else "mlp.up_proj"
    linear = copy.deepcopy(task.block.get_submodule(feeder))
    apply_fold(task, fold)
    folded = task.block.get_submodule(feeder)
    assert torch.equal(folded.weight * fold.inverse[:, None], linear.weight)
    if linear.bias is not None:
        assert torch.equal(folded.bias * fold.inverse, linear.bias)
    assert (torch.frexp(fold.columns)[0] == 0.5).all()


@pytest.mark.parametrize("stage", [1, 3])
def test_a_solved_feeder_keeps_its_codes_and_divides_its_stored_scales_exactly(
    stage: int, tiny_models: Callable[..., Path], propose: Callable[..., Fold]
) -> None:
    bench = Bench(tiny_models(torch.bfloat16))
    task = bench.task()
    feeder = "self_attn.v_proj" if stage == 1 else "mlp.up_proj"
    solve_plainly(task, feeder)
    before, kept = bench.output(task.block), task.solved[feeder]
    fold = propose(task, stage, Awq())
    apply_fold(task, fold)
    divided = task.solved[feeder]
    assert divided.codes is kept.codes
    assert torch.equal(divided.scales.float() * fold.inverse[:, None], kept.scales.float())
    scale_columns(task, stage, fold.columns)
    assert torch.allclose(bench.output(task.block), before, rtol=1e-5, atol=1e-6)
    assert f"{feeder}.weight" not in task.changed


def test_smoothquant_folds_the_same_way(tiny_models: Callable[..., Path], propose: Callable[..., Fold]) -> None:
    bench = Bench(tiny_models(torch.bfloat16))
    task = bench.task(Scheme("w8a8", None))
    fold = propose(task, 0, SmoothQuant(strength=0.6))
    assert (fold.source, fold.method) == ("norm", "smoothquant")
    before = bench.output(task.block)
    apply_fold(task, fold)
    scale_columns(task, 0, fold.columns)
    assert torch.allclose(bench.output(task.block), before, rtol=1e-4, atol=1e-4)


def test_every_group_has_a_place_to_fold_into() -> None:
    assert FOLD_SOURCES == ("norm", "v_o", "norm", "up_down") and len(INPUT_GROUPS) == 4
