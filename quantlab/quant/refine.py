"""The end-to-end stage: the loop around `distill`, with checkpoints, and the best state on held-out blocks kept.

The one stage that holds the whole model. An interruption loses at most `checkpoint_seconds`; because evaluations fall
on fixed steps and the whole optimizer is saved, a continued run ends bit for bit as an uninterrupted one.
"""

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quantlab.checkpoint.reader import TORCH_DTYPES, TensorReader
from quantlab.events import Notice, StepDone
from quantlab.models.decoder import CausalLM, build_model
from quantlab.models.naming import FINAL_NORM, tensor_shapes
from quantlab.models.rope import RopeTables
from quantlab.quant.amounts import MICRO_TOKENS
from quantlab.quant.block_task import weight_of
from quantlab.quant.captured import Captured
from quantlab.quant.distill import TrainedLinear, chunked_kl, rate_at
from quantlab.quant.journal import Journal
from quantlab.quant.parts import Parts, part_tensors
from quantlab.quant.setup import Setup
from quantlab.quant.stages import CalibrationAttention
from quantlab.recipe import Distill

STEP, STATE = "distilled", "distill-state"
EVALUATIONS = 12
CPU_EVALUATIONS = 4


@dataclass(slots=True)
class Trainee:
    """The student's trained tensors by name, the modules they sit in, and Adam over them."""

    model: CausalLM
    linears: dict[str, TrainedLinear]
    norms: dict[str, nn.Parameter]
    optimizer: torch.optim.Adam
    peaks: tuple[float, ...]

    def parameters(self) -> dict[str, nn.Parameter]:
        """Everything trained, by a name that is stable between runs."""
        named = {f"{name}.latent": linear.latent for name, linear in self.linears.items()}
        named |= {f"{name}.drift": linear.drift for name, linear in self.linears.items()}
        return named | self.norms


@dataclass(slots=True)
class Progress:
    """Where the loop stands: next step, and the best held-out KL with the part that reached it."""

    step: int
    first: float
    best: float
    best_step: int
    best_part: dict[str, Tensor]


def refine(setup: Setup, journal: Journal, parts: Parts, how: Distill) -> tuple[str, dict[str, Any]]:
    """Train, record the best state as the journal's step, and return its name and what the report says of it."""
    if STEP in journal.entries:
        return STEP, journal.entries[STEP]
    assert setup.blocks is not None
    teacher = build_model(setup.config, TensorReader(setup.checkpoint).tensor, setup.place.compute, setup.place.device)
    trainee = make_trainee(setup, parts, how)
    steps, batch, every = schedule(how, setup.place.device.type)
    held_out, train = setup.blocks.ids[-setup.held_out :], setup.blocks.ids[: -setup.held_out]
    progress = _resume(journal, trainee)
    if progress is None:
        first = held_out_kl(setup, trainee.model, teacher, held_out)
        progress = Progress(0, first, first, 0, snapshot(setup, trainee))
    else:
        setup.listener(Notice(f"continuing distillation at step {progress.step} of {steps}"))
    order = sample_order(len(train), steps * batch)
    lesson = Lesson(setup, trainee, teacher, batch, train.shape[1])
    saved = time.monotonic()
    while progress.step < steps:
        _set_rates(trainee, rate_at(progress.step, steps))
        picked = order[progress.step * batch : (progress.step + 1) * batch]
        loss = lesson.step(train[picked])
        progress.step += 1
        if progress.step % every == 0 or progress.step == steps:
            _evaluate(setup, trainee, teacher, held_out, progress)
        setup.listener(StepDone("distill", progress.step, steps, loss))
        if time.monotonic() - saved > how.checkpoint_seconds and progress.step < steps:
            journal.write_tensors(STATE, state_tensors(trainee, progress))
            saved = time.monotonic()
    facts: dict[str, Any] = {"steps": steps, "batch_size": batch, "tokens": steps * batch * setup.blocks.ids.shape[1]}
    facts |= {"held_out_kl_before": progress.first, "held_out_kl": progress.best, "kept_step": progress.best_step}
    journal.record(STEP, progress.best_part, facts)
    return STEP, facts


def schedule(how: Distill, device: str) -> tuple[int, int, int]:
    """Steps, samples a step, and steps between two looks at the held-out samples, for a kind of device."""
    if device == "cpu":
        return how.cpu_steps, how.cpu_batch_size, max(1, how.cpu_steps // CPU_EVALUATIONS)
    return how.steps, how.batch_size, max(1, how.steps // EVALUATIONS)


def make_trainee(setup: Setup, parts: Parts, how: Distill) -> Trainee:
    """The quantized model with its codes, scales and norms trainable, from the finished parts."""
    reader, device = TensorReader(setup.checkpoint), setup.place.device

    def tensor(name: str) -> Tensor:
        changed = parts.changed(name)
        return reader.tensor(name) if changed is None else changed

    model = build_model(setup.config, tensor, setup.place.compute, device)
    linears: dict[str, TrainedLinear] = {}
    for name, scheme in setup.schemes.items():
        if scheme is not None and name != "lm_head":  # the loss is taken in front of lm_head
            linears[name] = TrainedLinear(parts.quantized(name), _bias(model.linear(name)), scheme).to(device)
            model.set_linear(name, linears[name])
    norms = {}
    for name in tensor_shapes(setup.config):
        if name.endswith("norm.weight"):
            module = model.norm if name == FINAL_NORM else model.get_submodule(_norm_path(name))
            module.weight = nn.Parameter(tensor(name).to(device).float())
            norms[name] = module.weight
    groups = [
        {"params": [linear.latent for linear in linears.values()]},
        {"params": [linear.drift for linear in linears.values()]},
        {"params": list(norms.values())},
    ]
    factor = how.cpu_rate_factor if device.type == "cpu" else 1.0
    peaks = (how.code_rate * factor, how.scale_rate * factor, how.norm_rate)
    return Trainee(model, linears, norms, torch.optim.Adam(groups, betas=(0.9, 0.95), eps=1e-10, fused=True), peaks)


class Lesson:
    """The passes of one training step: gradients of the student's KL from the teacher, added up over micro-batches.

    On a GPU the passes of a micro-batch are recorded once and replayed: started one by one, the kernels of a model of
    80M parameters take three times as long to start as to run.
    """

    def __init__(self, setup: Setup, trainee: Trainee, teacher: CausalLM, batch: int, tokens: int):
        self.setup, self.trainee, self.teacher = setup, trainee, teacher
        self.micro = micro_batch(batch, tokens, setup.place.device.type)
        self.share = self.micro / batch
        self.rope = rope_tables(setup, teacher, tokens)
        self._captured: Captured | None = None

    def step(self, ids: Tensor) -> float:
        """One step of the optimizer on ids: [B, T] int64; returns the mean KL in nats a token."""
        on_gpu = self.setup.place.device.type == "cuda"
        parts = ids.to(self.setup.place.device).split(self.micro)
        if on_gpu and self._captured is None:
            self._captured = Captured(self._passes, parts[0])
        self.trainee.optimizer.zero_grad(set_to_none=not on_gpu)  # recorded passes add to the same gradients
        run = self._captured or self._passes
        loss = sum(float(run(part)) for part in parts) * self.share
        self.trainee.optimizer.step()
        return loss

    def _passes(self, ids: Tensor) -> Tensor:
        """Adds to every gradient for ids: [b, T]; returns the mean KL [] fp32 of these tokens."""
        with torch.no_grad():
            wanted = final_states(self.setup, self.teacher, ids, self.rope)
        states = final_states(self.setup, self.trainee.model, ids, self.rope)
        loss, grad = chunked_kl(states.detach(), wanted, _head(self.teacher), True)
        assert grad is not None
        states.backward(grad.to(states.dtype) * self.share)
        return loss


def micro_batch(batch: int, tokens: int, device: str) -> int:
    """Samples of `tokens` tokens in a pass on a kind of device: as many as fit, in equal parts of the batch."""
    fitting = max(1, (4 * MICRO_TOKENS if device == "cuda" else MICRO_TOKENS) // tokens)
    return max(size for size in range(1, min(fitting, batch) + 1) if batch % size == 0)


@torch.no_grad()
def held_out_kl(setup: Setup, student: CausalLM, teacher: CausalLM, ids: Tensor) -> float:
    """Mean KL of the student from the teacher on ids: [S, T], nats a token."""
    total, rope = 0.0, rope_tables(setup, teacher, ids.shape[1])
    for part in ids.to(setup.place.device).split(max(1, MICRO_TOKENS // ids.shape[1])):
        states, wanted = (final_states(setup, model, part, rope) for model in (student, teacher))
        total += float(chunked_kl(states, wanted, _head(teacher), False)[0]) * len(part)
    return total / len(ids)


def rope_tables(setup: Setup, model: CausalLM, tokens: int) -> RopeTables:
    """The model's rotations of the first `tokens` positions."""
    return model.rope.tables(torch.arange(tokens, device=setup.place.device))


def final_states(setup: Setup, model: CausalLM, ids: Tensor, rope: RopeTables) -> Tensor:
    """States after the final norm for ids: [B, T], as [B*T, hidden] in the compute dtype."""
    with setup.place.forward():
        x = model.embed_tokens(ids).float()
        for layer, block in enumerate(model.blocks):
            tables = rope if setup.config.uses_rope(layer) else None
            x = block(x, tables, CalibrationAttention(setup.config.layer_window(layer)))
        return model.norm(x).flatten(0, 1).to(setup.place.compute)


def sample_order(samples: int, count: int) -> Tensor:
    """`count` sample numbers: whole passes over all samples, each in another seeded order."""
    generator = torch.Generator().manual_seed(1)
    passes = [torch.randperm(samples, generator=generator) for _ in range(-(-count // samples))]
    return torch.cat(passes)[:count]


def snapshot(setup: Setup, trainee: Trainee) -> dict[str, Tensor]:
    """The student as a part: codes and scales of every linear, every norm in its stored dtype."""
    linears = {name: linear.quantized() for name, linear in trainee.linears.items()}
    return part_tensors(linears, _stored_norms(setup, trainee))


def _stored_norms(setup: Setup, trainee: Trainee) -> dict[str, Tensor]:
    stored = {name: TORCH_DTYPES[setup.checkpoint.tensors[name].dtype] for name in trainee.norms}
    return {name: norm.detach().to(stored[name]) for name, norm in trainee.norms.items()}


def state_tensors(trainee: Trainee, progress: Progress) -> dict[str, Tensor]:
    """Everything that a continued loop needs."""
    scalars = [progress.step, progress.first, progress.best, progress.best_step]
    tensors = {"progress": torch.tensor(scalars, dtype=torch.float64)}
    tensors |= {f"best.{name}": tensor for name, tensor in progress.best_part.items()}
    for name, parameter in trainee.parameters().items():
        adam = trainee.optimizer.state[parameter]
        tensors |= {f"value.{name}": parameter.detach().cpu(), f"count.{name}": adam["step"].cpu().reshape(1)}
        tensors |= {f"mean.{name}": adam["exp_avg"].cpu(), f"square.{name}": adam["exp_avg_sq"].cpu()}
    return tensors


def _resume(journal: Journal, trainee: Trainee) -> Progress | None:
    if not journal.path(STATE).exists():
        return None
    tensors = journal.tensors(STATE)
    for name, parameter in trainee.parameters().items():
        device = parameter.device
        parameter.data.copy_(tensors[f"value.{name}"])
        trainee.optimizer.state[parameter] = {
            "step": tensors[f"count.{name}"].reshape(()).to(device),
            "exp_avg": tensors[f"mean.{name}"].to(device),
            "exp_avg_sq": tensors[f"square.{name}"].to(device),
        }
    step, first, best, best_step = tensors["progress"].tolist()
    part = {name.removeprefix("best."): t for name, t in tensors.items() if name.startswith("best.")}
    return Progress(int(step), first, best, int(best_step), part)


def _evaluate(setup: Setup, trainee: Trainee, teacher: CausalLM, held_out: Tensor, progress: Progress) -> None:
    exact = {name: norm.data for name, norm in trainee.norms.items()}
    for name, norm in _stored_norms(setup, trainee).items():  # what is judged is what would be written
        trainee.norms[name].data = norm.float()
    reached = held_out_kl(setup, trainee.model, teacher, held_out)
    for name, norm in exact.items():
        trainee.norms[name].data = norm
    if reached < progress.best:
        progress.best, progress.best_step, progress.best_part = reached, progress.step, snapshot(setup, trainee)


def _set_rates(trainee: Trainee, share: float) -> None:
    for group, peak in zip(trainee.optimizer.param_groups, trainee.peaks, strict=True):
        group["lr"] = peak * share


def _head(teacher: CausalLM) -> Tensor:
    return weight_of(teacher.lm_head)


def _bias(linear: nn.Module) -> Tensor | None:
    return linear.bias if isinstance(linear, nn.Linear) else None


def _norm_path(name: str) -> str:
    return name.removesuffix(".weight").replace("model.layers.", "blocks.", 1)
