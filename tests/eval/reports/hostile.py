"""A report whose every free string attacks whoever shows it, and one that is far too large."""

from quantlab.eval.result import Flip, GateLine, LayerError, Report, TaskNoise
from tests.eval.reports.sample import gate, sample_report

SCRIPT = "<script>alert(1)</script>"
ATTACK = (
    f"\"'>{SCRIPT}<img src=x onerror=alert(2)>]]>--><!-- \x1b[2J\x00\x07\r\n\u202edetrever\u2028"
    "| a | b |\n# 1\n[x](https://evil.example) @admin #42 www.evil.example ![](https://evil.example/i.png) `code` ${x}"
)


def hostile_report() -> Report:
    """ATTACK wherever a report holds free text."""
    sound = sample_report()
    text, task = sound.texts[0], sound.tasks[0]
    model = {"path": ATTACK, "architecture": ATTACK, "scheme": ATTACK}
    protocol = text.protocol.model_copy(update={"name": ATTACK, "dtype": ATTACK})
    flip = Flip(index=1, prompt=ATTACK, baseline=ATTACK, candidate=ATTACK, was_right=True)
    line = GateLine(metric=ATTACK, requirement=ATTACK, measured=1.0, limit=2.0, verdict="fail", reason=ATTACK)
    return sound.model_copy(
        update={
            "quantlab": ATTACK,
            "created": ATTACK,
            "machine": sound.machine.model_copy(update={"device": ATTACK, "torch": ATTACK, "transformers": ATTACK}),
            "baseline": sound.baseline.model_copy(update=model),
            "candidate": sound.candidate.model_copy(update=model),
            "texts": (text.model_copy(update={"name": ATTACK, "protocol": protocol}), sound.texts[1]),
            "tasks": (task.model_copy(update={"name": ATTACK, "metric": ATTACK, "flips": (flip,)}), sound.tasks[1]),
            "layers": (LayerError(module=f"model.layers.0.{ATTACK}", error=0.1), LayerError(module=ATTACK, error=0.2)),
            "gate": gate("fail", line, line).model_copy(update={"source": ATTACK}),
            "seconds": {ATTACK: 1.0},
        }
    )


def huge_report() -> Report:
    """A thousand tasks with long flips, a thousand lines and texts, and a mixture of experts' ten thousand linears."""
    sound = sample_report()
    text, task = sound.texts[0], sound.tasks[0]
    flip = Flip(index=1, prompt="<&> " * 20_000, baseline="&" * 10_000, candidate="漢" * 10_000, was_right=False)
    assert sound.gate is not None and sound.noise is not None
    tasks = [task.model_copy(update={"name": f"task {i} " + "x" * 300, "flips": (flip,) * 50}) for i in range(1000)]
    lines = [sound.gate.lines[0].model_copy(update={"metric": f"line {i}", "reason": "&" * 900}) for i in range(1000)]
    positions = tuple(text.positions[0].model_copy(update={"start": i, "stop": i + 1}) for i in range(20_000))
    bins = text.kl_histogram.model_copy(
        update={"edges": tuple(1e-6 * (i + 1) for i in range(5001)), "counts": (7,) * 5000}
    )
    long = text.model_copy(update={"positions": positions, "kl_histogram": bins})
    linears = (f"model.layers.{i // 100}.mlp.experts.{i % 100}.up_proj" for i in range(10_000))
    return sound.model_copy(
        update={
            "texts": tuple(long.model_copy(update={"name": f"text {i}"}) for i in range(100)),
            "tasks": tuple(tasks),
            "noise": sound.noise.model_copy(
                update={"tasks": tuple(TaskNoise(name=each.name, items=400, flips=1) for each in tasks)}
            ),
            "layers": tuple(LayerError(module=name, error=0.01) for name in linears),
            "gate": gate("fail", *lines),
            "seconds": {f"stage {i}": 1.0 for i in range(1000)},
        }
    )
