"""The end-to-end loop: what it trains, what it keeps, and that stopping it anywhere changes nothing."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from quantlab.checkpoint.reader import TensorReader
from quantlab.clock import Clock
from quantlab.events import Event, Notice, StepDone
from quantlab.models.decoder import build_model
from quantlab.quant.blocks import quantize_blocks
from quantlab.quant.distill import TrainedLinear
from quantlab.quant.journal import Journal, open_journal
from quantlab.quant.parts import Parts
from quantlab.quant.refine import (
    STATE,
    STEP,
    Lesson,
    held_out_kl,
    make_trainee,
    micro_batch,
    refine,
    sample_order,
    snapshot,
)
from quantlab.quant.setup import Setup, prepare
from quantlab.recipe import Distill

PASSES = [{"pass": "rtn"}, {"pass": "distill"}]
Started = tuple[Setup, Journal, list[str]]


@pytest.fixture
def start(
    tiny_models: Callable[..., Path], tmp_path: Path, make_options: Any, events: list[Event]
) -> Iterator[Callable[..., Started]]:
    """start(name, family, recipe) -> a run whose blocks are finished and whose end-to-end stage is to come."""
    opened = []

    def make(
        name: str = "out", family: str = "llama", recipe: dict[str, Any] | None = None, device: str = "cpu"
    ) -> Started:
        source = tiny_models(torch.bfloat16, family)
        options = make_options(source, tmp_path / name, PASSES, recipe, samples=32, device=device)
        setup = prepare(options, events.append)
        manager = open_journal(tmp_path / f".{name}.quantlab", setup.fingerprint, False)
        journal = manager.__enter__()
        opened.append(manager)
        return setup, journal, quantize_blocks(setup, journal, Clock())

    yield make
    for manager in opened:
        manager.__exit__(None, None, None)


def distill(steps: int, rate: float = 0.01, every: float = 60.0) -> Distill:
    return Distill(cpu_steps=steps, cpu_batch_size=8, code_rate=rate, scale_rate=rate / 10, checkpoint_seconds=every)


def student_kl(setup: Setup, journal: Journal, steps: list[str]) -> float:
    """Held-out KL of the model that the finished parts describe."""
    assert setup.blocks is not None
    reader, place = TensorReader(setup.checkpoint), setup.place
    teacher = build_model(setup.config, reader.tensor, place.compute, place.device)
    trainee = make_trainee(setup, Parts(journal, steps), distill(1))
    return held_out_kl(setup, trainee.model, teacher, setup.blocks.ids[-setup.held_out :])


@pytest.mark.parametrize(
    ("family", "recipe"),
    [
        ("llama", {}),
        ("qwen2", {"symmetric": False}),
        ("qwen3", {"scheme": "w8a16", "group_size": "channel"}),
        ("llama", {"scheme": "w8a8", "group_size": "channel"}),
    ],
    ids=str,
)
def test_it_keeps_the_best_state_on_held_out_blocks(
    family: str, recipe: dict[str, Any], start: Callable[..., Started]
) -> None:
    setup, journal, steps = start(family=family, recipe=recipe)
    before = student_kl(setup, journal, steps)
    step, facts = refine(setup, journal, Parts(journal, steps), distill(60))
    assert facts["held_out_kl_before"] == pytest.approx(before, rel=1e-5)
    assert facts["held_out_kl"] <= facts["held_out_kl_before"]
    assert student_kl(setup, journal, [*steps, step]) == pytest.approx(facts["held_out_kl"], rel=1e-3)
    assert facts["tokens"] == 60 * 8 * 32 and facts["steps"] == 60


def test_it_brings_int4_closer_to_the_16_bit_model(start: Callable[..., Started]) -> None:
    setup, journal, steps = start()
    facts = refine(setup, journal, Parts(journal, steps), distill(120, 0.02))[1]
    assert facts["held_out_kl"] < 0.7 * facts["held_out_kl_before"]
    assert 0 < facts["kept_step"] <= 120


def test_training_that_only_harms_leaves_the_blocks_results(start: Callable[..., Started]) -> None:
    setup, journal, steps = start(recipe={"scheme": "w8a16"})
    step, facts = refine(setup, journal, Parts(journal, steps), distill(12, 1.0))
    assert facts["kept_step"] == 0 and facts["held_out_kl"] == facts["held_out_kl_before"]
    before, after = Parts(journal, steps), Parts(journal, [*steps, step])
    for name, scheme in setup.schemes.items():
        if scheme is not None:
            assert torch.equal(before.quantized(name).codes, after.quantized(name).codes)
            assert torch.equal(before.quantized(name).scales, after.quantized(name).scales)


class Stopped(Exception):
    """What the test's listener raises."""


@pytest.mark.parametrize("at", [1, 2, 7, 11])
def test_a_loop_stopped_at_any_step_ends_with_the_same_bytes(at: int, start: Callable[..., Started]) -> None:
    setup, journal, steps = start("whole")
    refine(setup, journal, Parts(journal, steps), distill(12, 0.02))
    wanted = journal.path(STEP).read_bytes()
    setup, journal, steps = start("stopped")
    seen: list[Event] = []

    def stop(event: Event) -> None:
        seen.append(event)
        if isinstance(event, StepDone) and event.stage == "distill" and event.step == at:
            raise Stopped

    interrupted = Setup(**{name: getattr(setup, name) for name in Setup.__dataclass_fields__} | {"listener": stop})
    with pytest.raises(Stopped):
        refine(interrupted, journal, Parts(journal, steps), distill(12, 0.02, every=1e-6))
    assert journal.path(STATE).exists() == (at > 1)
    resumed: list[Event] = []
    again = Setup(**{name: getattr(setup, name) for name in Setup.__dataclass_fields__} | {"listener": resumed.append})
    refine(again, journal, Parts(journal, steps), distill(12, 0.02))
    assert journal.path(STEP).read_bytes() == wanted
    taken = [event.step for event in resumed if isinstance(event, StepDone)]
    assert taken == list(range(max(1, at), 13))  # at most one step is lost
    assert any(isinstance(event, Notice) and "continuing" in event.text for event in resumed) == (at > 1)


def test_a_finished_stage_is_not_done_again(start: Callable[..., Started], events: list[Event]) -> None:
    setup, journal, steps = start()
    first = refine(setup, journal, Parts(journal, steps), distill(3))
    events.clear()
    assert refine(setup, journal, Parts(journal, steps), distill(3)) == first
    assert events == []


def test_what_is_trained_is_every_quantized_linear_of_the_blocks_and_every_norm(start: Callable[..., Started]) -> None:
    setup, journal, steps = start(family="qwen3", recipe={"ignore": ["lm_head", "re:.*layers\\.1\\.mlp\\.down_proj"]})
    trainee = make_trainee(setup, Parts(journal, steps), distill(1))
    assert len(trainee.linears) == 13 and len(trainee.norms) == 2 * 4 + 1
    assert all(parameter.requires_grad for parameter in trainee.parameters().values())
    trained = {id(parameter) for parameter in trainee.parameters().values()}
    assert {id(p) for p in trainee.model.parameters() if p.requires_grad} == trained
    assert isinstance(trainee.model.linear("model.layers.0.mlp.down_proj"), TrainedLinear)
    part = snapshot(setup, trainee)
    assert all(part[name].dtype == torch.bfloat16 for name in trainee.norms)


@pytest.mark.parametrize(("samples", "count"), [(5, 12), (8, 8), (7, 3)])
def test_every_sample_is_seen_once_before_any_is_seen_again(samples: int, count: int) -> None:
    order = sample_order(samples, count).tolist()
    assert len(order) == count
    for start in range(0, count, samples):
        part = order[start : start + samples]
        assert len(set(part)) == len(part)
    assert order == sample_order(samples, count).tolist()


@pytest.mark.parametrize(
    ("batch", "tokens", "device", "size"),
    [(8, 1024, "cuda", 8), (8, 1024, "cpu", 4), (4, 8192, "cpu", 1), (12, 2048, "cuda", 6), (7, 1024, "cpu", 1)],
)
def test_passes_take_as_many_samples_as_fit_in_equal_parts(batch: int, tokens: int, device: str, size: int) -> None:
    assert micro_batch(batch, tokens, device) == size


def test_micro_batches_add_up_to_the_whole_batch(
    start: Callable[..., Started], monkeypatch: pytest.MonkeyPatch
) -> None:
    setup, journal, steps = start()
    assert setup.blocks is not None
    reader, place, ids = TensorReader(setup.checkpoint), setup.place, setup.blocks.ids[:8]
    teacher = build_model(setup.config, reader.tensor, place.compute, place.device)
    found = []
    for room in (8 * 32, 2 * 32):
        monkeypatch.setattr("quantlab.quant.refine.MICRO_TOKENS", room)
        trainee = make_trainee(setup, Parts(journal, steps), distill(1))
        lesson = Lesson(setup, trainee, teacher, 8, 32)
        found.append((lesson.micro, lesson.step(ids), [p.grad for p in trainee.parameters().values()]))
    (whole, loss, gradients), (part, other_loss, others) = found
    assert (whole, part) == (8, 2) and other_loss == pytest.approx(loss, rel=1e-3)
    for one, other in zip(gradients, others, strict=True):
        assert one is not None and other is not None
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.02 * float(one.abs().max()))


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", [{}, {"scheme": "w8a8", "group_size": "channel"}], ids=str)
def test_recorded_passes_give_the_gradients_of_those_they_record(
    recipe: dict[str, Any], start: Callable[..., Started], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantlab.quant.refine.MICRO_TOKENS", 32)  # two micro-batches of four
    setup, journal, steps = start(recipe=recipe, device="cuda")
    assert setup.blocks is not None
    teacher = build_model(setup.config, TensorReader(setup.checkpoint).tensor, setup.place.compute, setup.place.device)
    trainee = make_trainee(setup, Parts(journal, steps), distill(1))
    lesson = Lesson(setup, trainee, teacher, 8, 32)
    for group in trainee.optimizer.param_groups:
        group["lr"] = 0.0  # gradients alone are looked at
    lesson.step(setup.blocks.ids[:8])
    for ids in setup.blocks.ids[8:24].split(8):
        loss = lesson.step(ids)
        recorded = [p.grad.clone() for p in trainee.parameters().values() if p.grad is not None]
        trainee.optimizer.zero_grad(set_to_none=False)  # what is recorded adds to these very tensors
        wanted = sum(float(lesson._passes(part)) for part in ids.to(setup.place.device).split(lesson.micro)) / 2
        assert lesson.micro == 4 and loss == pytest.approx(wanted, rel=1e-4)
        for one, parameter in zip(recorded, trainee.parameters().values(), strict=True):
            torch.testing.assert_close(one, parameter.grad, rtol=1e-2, atol=1e-3 * float(one.abs().max()))


@pytest.mark.gpu
def test_it_trains_on_a_gpu(start: Callable[..., Started]) -> None:
    setup, journal, steps = start(device="cuda")
    how = Distill(steps=120, batch_size=8, code_rate=0.02, scale_rate=0.002)
    facts = refine(setup, journal, Parts(journal, steps), how)[1]
    assert facts["held_out_kl"] < 0.7 * facts["held_out_kl_before"]
