"""Run as a script: compiles kernels of linears for GPUs that need not be there; prints what their machine code holds.

A process of its own, since the tests' process has Triton's interpreter switched on. Prints one JSON object.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import triton

from quantlab_kernels.layout import QuantizedWeight
from quantlab_kernels.w4a16_compile import OfflineDriver, Product, compile_product
from quantlab_kernels.w4a16_layout import to_kernel
from quantlab_kernels.w4a16_tiles import DecodeTile, GluonTile, PlainTile
from quantlab_kernels.w8a8 import prepare
from quantlab_kernels.w8a8_layout import W8A8Weight
from quantlab_kernels.w8a8_tiles import DotTile, OneTokenTile, WgmmaTile
from quantlab_kernels.w8a8_tiles import Tile as W8A8Tile
from quantlab_kernels.warm_up import compilations, warm_up

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)([^;]*);")
PRODUCTS = {
    "plain-sm80": (80, Product(4096, 4096, 64, PlainTile(2, 64), torch.float16, early=False)),
    "plain-sm100": (100, Product(4096, 4096, 64, PlainTile(2, 64), torch.bfloat16, early=False)),
    "decode-sm80": (80, Product(4096, 4096, 4, DecodeTile(4, 2, 8, 2), torch.bfloat16, early=False)),
    "decode-sm90": (90, Product(4096, 4096, 4, DecodeTile(4, 4, 8, 2), torch.float16)),
    "decode-sm100": (100, Product(4096, 4096, 4, DecodeTile(4, 2, 8, 1), torch.bfloat16)),
    "decode-zeros-sm90": (90, Product(4096, 4096, 4, DecodeTile(4, 2, 8, 1), torch.bfloat16, 32, True, True)),
    "gluon-8": (90, Product(6144, 4096, 8, GluonTile(4, 1, 8, 0, 4, 4, 4), torch.bfloat16)),
    "gluon-64-zeros": (90, Product(4096, 4096, 64, GluonTile(4, 1, 64, 0, 2, 4, 2), torch.float16, 64, True, True)),
    "gluon-192": (90, Product(4096, 4096, 192, GluonTile(8, 1, 128, 64, 2, 2, 1), torch.bfloat16)),
    "gluon-256": (90, Product(4096, 4096, 4096, GluonTile(8, 1, 256, 0, 2, 1, 1), torch.bfloat16)),
    "gluon-256-shared": (90, Product(4096, 4096, 4096, GluonTile(8, 1, 256, 0, 2, 0, 1), torch.bfloat16)),
    "gluon-272": (90, Product(4096, 4096, 4096, GluonTile(8, 1, 256, 16, 2, 2, 1), torch.bfloat16)),
    "gluon-288-shared": (90, Product(4096, 4096, 4096, GluonTile(8, 1, 256, 32, 2, 0, 1), torch.bfloat16)),
    "gluon-320": (90, Product(4096, 4096, 4096, GluonTile(8, 1, 256, 64, 2, 2, 1), torch.bfloat16)),
    "gluon-144-shared": (90, Product(4096, 4096, 4096, GluonTile(8, 1, 128, 16, 2, 0, 1), torch.bfloat16)),
    "gluon-8bit-8": (90, Product(128256, 4096, 8, GluonTile(8, 1, 8, 0, 2, 1, 2), torch.bfloat16, bits=8)),
    "gluon-8bit-zeros": (
        90,
        Product(4096, 4096, 64, GluonTile(8, 1, 64, 0, 2, 0, 2), torch.float16, 32, True, True, bits=8),
    ),  # fmt: skip
}
# Capability, tokens, N, K, tile.
W8A8: dict[str, tuple[int, int, int, int, W8A8Tile]] = {
    "w8a8-dot-sm80": (80, 64, 4096, 4096, DotTile(64, 64)),
    "w8a8-dot-sm100": (100, 64, 4096, 4096, DotTile(64, 64)),
    "w8a8-one-token": (90, 1, 4096, 14336, OneTokenTile(4, 512, 2)),
    "w8a8-8": (90, 8, 4096, 4096, WgmmaTile(4, 1, 8, 1, 6, 3)),
    "w8a8-64": (90, 64, 28672, 4096, WgmmaTile(4, 2, 64, 1, 1, 2)),
    "w8a8-128": (90, 1024, 4096, 4096, WgmmaTile(4, 2, 128, 1, 1, 2)),
    "w8a8-256-shared": (90, 4096, 4096, 4096, WgmmaTile(8, 2, 128, 1, 0, 1)),
}


def w4a16_report(capability: int, product: Product) -> dict[str, Any]:
    """`report` of a W4A16 or W8A16 kernel."""
    triton.runtime.driver.set_active(OfflineDriver(capability))
    return report(capability, compile_product(product))


def w8a8_report(capability: int, tokens: int, rows: int, columns: int, tile: W8A8Tile) -> dict[str, Any]:
    """`report` of a W8A8 kernel."""
    triton.runtime.driver.set_active(OfflineDriver(capability))
    codes, scales = torch.empty(tokens, columns, dtype=torch.int8), torch.empty(tokens)
    weight = W8A8Weight(torch.empty(rows, columns, dtype=torch.int8), torch.empty(rows))
    out = torch.empty(tokens, rows, dtype=torch.bfloat16)
    kernel, grid, arguments, options = prepare(codes, scales, weight, None, out, tile, early=capability >= 90)
    return report(capability, kernel.warmup(*arguments, grid=grid, **options))


def report(capability: int, kernel: Any) -> dict[str, Any]:
    """Registers, stack and shared memory; counts of instructions in the innermost loop that multiplies; WGMMA lint.

    For a kernel without tensor cores the counts are those of all of it.
    """
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder) / "k.cubin", Path(folder) / "k.ptx"
        cubin.write_bytes(kernel.asm["cubin"])
        ptx.write_text(kernel.asm["ptx"])
        usage, text = (_run("cuobjdump", option, cubin) for option in ("-res-usage", "-sass"))
        words = _run("ptxas", "-arch=sm_90a", "-v", ptx, "-o", Path(folder) / "again") if capability == 90 else ""
    code = [(int(m[1], 16), m[2], m[3]) for m in INSTRUCTION.finditer(text)]
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found and code
    return {
        "registers": int(found[1]),
        "stack": int(found[2]),
        "shared": kernel.metadata.shared,
        "loop": Counter(op.split(".")[0] for _, op, _ in multiplying_loop(code)),
        "wide_loads": len(re.findall(r"LDG\.E\.(?:EF\.)?128", text)),
        "warnings": re.findall(r"C75\d\d", words),
        "full_waits": len(re.findall(r"DEPBAR\.LE gsb0, 0x0", text)),
        "overwritten": overwritten_operands(code),
    }


def loops(code: list[tuple[int, str, str]]) -> list[list[tuple[int, str, str]]]:
    """The instructions between each backward branch and where it goes."""
    at = {address: i for i, (address, _, _) in enumerate(code)}
    found = []
    for i, (_, op, rest) in enumerate(code):
        target = re.search(r"0x([0-9a-f]+)", rest) if op.startswith("BRA") else None
        begin = at.get(int(target[1], 16), i) if target else i
        if begin < i:
            found.append(code[begin : i + 1])
    return found


def multiplying_loop(code: list[tuple[int, str, str]]) -> list[tuple[int, str, str]]:
    """The shortest loop with tensor core instructions, or all of the code."""
    return min((loop for loop in loops(code) if any("MMA" in op for _, op, _ in loop)), key=len, default=code)


def overwritten_operands(code: list[tuple[int, str, str]]) -> int:
    """Writes to registers that a WGMMA in flight still reads as its first operand, in any loop, twice round it."""
    count = 0
    for loop in loops(code):
        flights: list[set[int]] = []
        batch: set[int] = set()
        for _, op, rest in loop * 2 if any("HGMMA" in op for _, op, _ in loop) else []:
            target = re.match(r"\s*R(\d+)", rest)
            if "HGMMA" in op:
                first = int(re.findall(r"R(\d+)", rest)[1])
                batch |= set(range(first, first + 4))
                if "gsb0" in rest:
                    flights, batch = [*flights, batch], set()
            elif "DEPBAR" in op:
                left = int(rest.split(",")[1], 16)
                flights = flights[len(flights) - left :] if left else []
            elif target and not op.startswith(("ST", "RED", "SYNCS")):
                wide = 4 if ".128" in op else 2 if ".64" in op or "WIDE" in op or op.startswith("CS2R") else 1
                count += bool(set(range(int(target[1]), int(target[1]) + wide)) & batch.union(*flights))
    return count


def warmed_up() -> dict[str, int]:
    """Kernels that a warm-up compiles, and that the same warm-up compiles again."""
    triton.runtime.driver.set_active(OfflineDriver(90))
    codes = torch.zeros(128, 256, dtype=torch.int8)
    weight = to_kernel(QuantizedWeight(codes, torch.ones(128, 2).half(), None, 128), torch.float16)
    with compilations() as first:
        asked = warm_up([(weight, None), (weight, torch.zeros(128).half())], (1, 2, 3, 40))
    with compilations() as second:
        warm_up([(weight, None), (weight, torch.zeros(128).half())], (1, 2, 3, 40))
    return {"asked": asked, "first": len(first), "second": len(second)}


def _run(tool: str, *words: object) -> str:
    done = subprocess.run([TOOLS / tool, *map(str, words)], capture_output=True, text=True)
    return done.stdout + done.stderr


def main(wanted: list[str]) -> None:
    """Print the reports of the kernels that are wanted, all of them if none is named."""
    reports = {name: w4a16_report(*product) for name, product in PRODUCTS.items() if not wanted or name in wanted}
    reports |= {name: w8a8_report(*launch) for name, launch in W8A8.items() if not wanted or name in wanted}
    print(json.dumps(reports | {"warm_up": warmed_up()}))


if __name__ == "__main__":
    main(sys.argv[1:])
