"""What kernels of linears compile to, for GPUs that need not be here: no spills, no conversions, tensor cores busy."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
SCRIPT = Path(__file__).with_name("machine_code.py")
KERNELS = (
    "plain-sm80", "plain-sm100", "decode-sm80", "decode-sm90", "decode-sm100", "decode-zeros-sm90", "gluon-8",
    "gluon-64-zeros", "gluon-192", "gluon-256", "gluon-256-shared", "gluon-272", "gluon-288-shared", "gluon-320",
    "gluon-144-shared", "gluon-8bit-8", "gluon-8bit-zeros",
)  # fmt: skip
GLUON = [name for name in KERNELS if name.startswith("gluon")]
W8A8 = ("w8a8-dot-sm80", "w8a8-dot-sm100", "w8a8-one-token", "w8a8-8", "w8a8-64", "w8a8-128", "w8a8-256-shared")
WGMMA8 = [name for name in W8A8 if name[5].isdigit()]
# Bytes of shared memory that a program may have: sm_80, sm_90 and sm_100 alike or more.
SHARED = {"plain-sm80": 166_912, "decode-sm80": 166_912, "w8a8-dot-sm80": 166_912}


@pytest.fixture(scope="module")
def reports(repository: Path) -> dict:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = f"{repository}:{repository / 'kernels'}"
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", [*KERNELS, *(name for name in W8A8 if name != "w8a8-one-token")])
def test_a_kernel_keeps_its_values_in_registers_and_multiplies_on_tensor_cores(name, reports):
    report = reports[name]
    assert report["stack"] == 0
    assert not report["loop"].get("LDL") and not report["loop"].get("STL")
    assert report["shared"] <= SHARED.get(name, 232_448)
    assert any("MMA" in op for op in report["loop"])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in KERNELS if not name.startswith("plain")])
def test_codes_become_weights_without_a_conversion(name, reports):
    assert not [op for op in reports[name]["loop"] if op.startswith("I2F")]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in KERNELS if name.startswith("decode")])
def test_the_decode_loop_uses_neither_shared_memory_nor_a_barrier(name, reports):
    assert not [op for op in reports[name]["loop"] if op in ("LDS", "STS", "LDSM", "BAR")]


@pytest.mark.slow
@pytest.mark.parametrize("name", GLUON)
def test_wgmmas_overlap_and_nothing_overwrites_what_they_read(name, reports):
    report = reports[name]
    assert report["loop"]["HGMMA"] >= 8
    assert not report["loop"].get("STS")
    assert not report["warnings"]
    assert report["full_waits"] == 1  # only after the loop
    assert report["overwritten"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", WGMMA8)
def test_int8_wgmmas_overlap_with_the_arrival_of_the_next_stage(name, reports):
    report = reports[name]
    assert report["loop"]["IGMMA"] >= 4
    assert not report["loop"].get("STS") and not report["loop"].get("LDS")
    assert not report["warnings"]
    assert report["full_waits"] == 1  # only after the loop


@pytest.mark.slow
def test_one_token_is_multiplied_by_dot_products_of_four_bytes_on_wide_loads(reports):
    report = reports["w8a8-one-token"]
    assert report["stack"] == 0 and report["wide_loads"] >= 28
    assert report["loop"]["IDP"] >= 3 * report["wide_loads"]  # four for each load of weights; some load x


@pytest.mark.slow
def test_a_warm_up_compiles_each_kernel_once(reports):
    assert reports["warm_up"]["first"] == reports["warm_up"]["asked"] > 0
    assert reports["warm_up"]["second"] == 0
