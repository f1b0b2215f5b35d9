"""What attention, fused, sampling and GPTQ kernels become on GPUs that this machine need not have.

They compile, stay in registers and shared memory, and attention uses tensor cores.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

from quantlab_kernels.paged_decode_int8 import ASSEMBLY_RELEASES

PRODUCTS = {"_decode_kernel", "_decode_int8_kernel", "_prefill_kernel", "_prefill_hopper_kernel"}
OTHERS = {
    "_write_kernel", "_merge_kernel", "_dequantize_kernel", "_rms_norm_kernel", "_silu_mul_kernel",
    "_silu_mul_int8_kernel", "_embed_kernel", "_greatest_kernel", "_nucleus_kernel", "_gptq_block_kernel",
}  # fmt: skip
# Shared memory that a block may ask for, in bytes.
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


@pytest.fixture(scope="module", params=sorted(SHARED))
def kernels(request: pytest.FixtureRequest, repository: Path) -> tuple[int, list[dict]]:
    """The capability and what every kernel became."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": f"{repository}:{repository / 'kernels'}", "PYTHONWARNINGS": "ignore"}
    script = Path(__file__).parent / "compile_attention.py"
    done = subprocess.run(
        [sys.executable, script, str(request.param)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return request.param, [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_kernels_keep_to_registers_and_shared_memory(kernels: tuple[int, list[dict]]):
    capability, found = kernels
    names = {kernel["kernel"] for kernel in found}
    assert names >= OTHERS | {"_decode_kernel", "_decode_int8_kernel"}
    assert names & {"_prefill_kernel", "_prefill_hopper_kernel"}
    for kernel in found:
        assert kernel["shared"] <= SHARED[capability], kernel
        # Prefill keeps up to 32 words outside, all but a few of them around its masked loops.
        assert kernel["stack"] <= (128 if "prefill" in kernel["kernel"] else 8), kernel


@pytest.mark.slow
def test_attention_runs_on_tensor_cores(kernels: tuple[int, list[dict]]):
    for kernel in kernels[1]:
        if kernel["kernel"] not in PRODUCTS:
            continue
        integer = kernel["kernel"] == "_decode_int8_kernel"
        assert any(product.startswith("I" if integer else ("H", "UTCH")) for product in kernel["products"]), kernel


@pytest.mark.slow
def test_the_assembly_of_the_int8_kernel_finds_its_words_in_order(kernels: tuple[int, list[dict]]):
    if ".".join(triton.__version__.split(".")[:2]) not in ASSEMBLY_RELEASES:
        pytest.skip("this release takes the way without assembly")
    decode = [kernel for kernel in kernels[1] if kernel["kernel"] == "_decode_int8_kernel"]
    assert decode
    assert all(kernel["splits"] and kernel["words_in_order"] for kernel in decode)
