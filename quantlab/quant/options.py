"""What a quantization run is asked to do and what it gives back: plain values.

Knows nothing about tensors, terminals or how the work is done; the command line fills these in, `quant.run` reads them.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantlab.recipe import Recipe

DEFAULT_SAMPLES = 64
DEFAULT_SEQ_LEN = 1024
DEFAULT_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True, slots=True)
class CalibrationSpec:
    """Which text calibrates the run.

    `source` is a file, a folder or a dataset id, None for the bundled text; `split` and `field` choose inside it.
    `samples` blocks of `seq_len` tokens are drawn with `seed`; None takes every block that there is.
    """

    source: str | None = None
    split: str | None = None
    field: str | None = None
    samples: int | None = DEFAULT_SAMPLES
    seq_len: int = DEFAULT_SEQ_LEN
    seed: int = 0


@dataclass(frozen=True, slots=True)
class QuantizeOptions:
    """One run: the 16-bit folder `source`, the folder `out` to make, and how.

    `device` is "auto", "cpu", "cuda" or "cuda:N"; `max_shard_size` is in bytes; `force` replaces an existing `out`;
    `restart` drops what an interrupted run left.
    """

    source: Path
    out: Path
    recipe: Recipe
    calibration: CalibrationSpec = CalibrationSpec()
    device: str = "auto"
    max_shard_size: int = DEFAULT_SHARD_BYTES
    force: bool = False
    restart: bool = False


@dataclass(frozen=True, slots=True)
class Result:
    """A finished run: the folder, its size in bytes, and the report that lies in it.

    `bits_per_weight` is over the quantized modules, codes, scales, zero points and shape counted as they lie on disk;
    `seconds` is wall time of this call.
    """

    out: Path
    modules: int
    bits_per_weight: float
    bytes: int
    seconds: float
    report: dict[str, Any]
