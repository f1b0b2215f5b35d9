"""Every bench of the kernels, one after the other: `quantlab bench kernels` and `make bench-kernels`.

Each prints a table and appends JSON lines, a row a line. Knows nothing about what they measure.
"""

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path

# Name, module, whether it takes --tune.
BENCHES = {
    "w4a16": ("quantlab.bench.kernels_w4a16", True),
    "w8a8": ("quantlab.bench.kernels_w8a8", True),
    "load": ("quantlab.bench.kernels_load", False),
    "attention": ("quantlab.bench.kernels_attention", False),
    "fused": ("quantlab.bench.kernels_fused", False),
    "layer": ("quantlab.bench.kernels_layer", False),
}


def run(names: Sequence[str], tune: bool, out: Path | None) -> None:
    """Run the benches named in order; `tune`: measure tiles first where tiles are measured."""
    for name in names:
        module, tunes = BENCHES[name]
        words = [*(("--tune",) if tune and tunes else ()), *(("--out", str(out)) if out else ())]
        importlib.import_module(module).main(words)


def main(words: Sequence[str] | None = None) -> None:
    """The command of the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=tuple(BENCHES), default=tuple(BENCHES))
    parser.add_argument("--tune", action="store_true", help="measure tiles first and write the data files")
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file")
    options = parser.parse_args(words)
    run(options.only, options.tune, options.out)


if __name__ == "__main__":
    main()
