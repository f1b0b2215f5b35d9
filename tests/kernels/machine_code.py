"""Run as a script: compiles W4A16 kernels for GPUs that need not be there, and prints what their machine code holds.

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
}


def report(capability: int, product: Product) -> dict[str, Any]:
    """Registers, stack and shared memory; counts of instructions in the innermost loop that multiplies; WGMMA lint."""
    triton.runtime.driver.set_active(OfflineDriver(capability))
    kernel = compile_product(product)
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
    """The shortest loop with tensor core instructions."""
    return min((loop for loop in loops(code) if any("MMA" in op for _, op, _ in loop)), key=len)


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


if __name__ == "__main__":
    wanted = sys.argv[1:] or list(PRODUCTS)
    print(json.dumps({name: report(*PRODUCTS[name]) for name in wanted} | {"warm_up": warmed_up()}))
