"""What an evaluation is asked to do: plain values.

Knows nothing about tensors, terminals or how the work is done; the command line fills these in, `eval.run` reads them.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from quantlab.eval.corpus import TextSource
from quantlab.eval.gate_file import Gate
from quantlab.runtime.options import KVDtype

ProtocolName = Literal["gptq", "rolling"]
DtypeName = Literal["auto", "bfloat16", "float16", "float32"]
DEFAULT_WINDOW = 1024
MIN_WINDOW = 16


@dataclass(frozen=True, slots=True)
class TextOptions:
    """Which text is scored and how; `window` None is DEFAULT_WINDOW or the model's limit, `tokens` None all of it."""

    sources: tuple[TextSource, ...]
    protocols: tuple[ProtocolName, ...] = ("gptq",)
    window: int | None = None
    tokens: int | None = None


@dataclass(frozen=True, slots=True)
class TaskOptions:
    """Tasks, suites or task files by name or path, where their data are, and how many items of each (None: all)."""

    names: tuple[str, ...]
    task_dir: Path | None = None
    limit: int | None = None
    allow_code: bool = False


@dataclass(frozen=True, slots=True)
class ServedOptions:
    """The candidate as `quantlab serve` runs it: through its kernels and its cache of keys and values."""

    kv_dtype: KVDtype = "auto"
    int8_head: bool = False


@dataclass(frozen=True, slots=True)
class EvalOptions:
    """One evaluation. `batch` is windows in one forward pass, None what suits the device; `cache` None keeps nothing.

    `device` is "auto", "cpu", "cuda" or "cuda:N". `served` None computes the candidate in plain torch.
    """

    candidate: Path
    baseline: Path
    text: TextOptions
    gate: Gate
    device: str = "auto"
    dtype: DtypeName = "auto"
    batch: int | None = None
    cache: Path | None = None
    served: ServedOptions | None = None
