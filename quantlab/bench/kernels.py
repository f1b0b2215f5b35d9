"""Every bench of the kernels, one after the other: `quantlab bench kernels` and `make bench-kernels`.

Each prints a table and appends JSON lines, a row a line. Knows nothing about what they measure.
"""

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path

# Name, module, which of --tune and --dense it takes.
BENCHES: dict[str, tuple[str, tuple[str, ...]]] = {
    "w4a16": ("quantlab.bench.kernels_w4a16", ("--tune", "--dense")),
    "w8a8": ("quantlab.bench.kernels_w8a8", ("--tune",)),
    "load": ("quantlab.bench.kernels_load", ()),
    "attention": ("quantlab.bench.kernels_attention", ()),
    "fused": ("quantlab.bench.kernels_fused", ()),
    "layer": ("quantlab.bench.kernels_layer", ()),
}


def run(names: Sequence[str], tune: bool, out: Path | None, dense: bool = False) -> None:
    """Run the benches named in order; `tune`: measure tiles first where tiles are measured; `dense`: many more rows."""
    asked = {"--tune": tune, "--dense": dense}
    for name in names:
        module, takes = BENCHES[name]
        words = [*(word for word in takes if asked[word]), *(("--out", str(out)) if out else ())]
        importlib.import_module(module).main(words)


def main(words: Sequence[str] | None = None) -> None:
    """The command of the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=tuple(BENCHES), default=tuple(BENCHES))
    parser.add_argument("--tune", action="store_true", help="measure tiles first and write the data files")
    parser.add_argument("--dense", action="store_true", help="many more numbers of tokens where that is asked for")
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file")
    options = parser.parse_args(words)
    run(options.only, options.tune, options.out, options.dense)


if __name__ == "__main__":
    main()
