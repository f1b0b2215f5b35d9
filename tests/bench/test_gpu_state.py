"""The GPU's state as NVML tells it, where NVML may not be there, and on a GPU."""

import ctypes

import pytest
import torch

from quantlab.bench import gpu_state
from quantlab.bench.gpu_state import State, read_state


def test_without_the_library_there_is_no_state(monkeypatch):
    monkeypatch.setattr(gpu_state, "LIBRARY", "libno-such-nvml.so.1")
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    assert read_state() is None


def test_a_library_without_these_functions_tells_no_state(monkeypatch):
    monkeypatch.setattr(gpu_state, "_open", lambda _: (ctypes.CDLL(None), ctypes.c_void_p()))
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    assert read_state() is None


def library_that(refuses: bool) -> object:
    """What stands in for NVML: it writes 1755 MHz, 650 W and 60 degrees, or refuses."""

    class Library:
        def __getattr__(self, name: str):
            values = {"ClockInfo": 1755, "PowerUsage": 650_000, "Temperature": 60}

            def call(*arguments: object) -> int:
                target = ctypes.cast(arguments[-1], ctypes.POINTER(ctypes.c_uint))
                target[0] = next(value for key, value in values.items() if name.endswith(key))
                return int(refuses)

            return call

    return Library()


@pytest.mark.parametrize(("refuses", "wanted"), [(False, State(1755, 650.0, 60)), (True, None)])
def test_watts_and_megahertz_are_read_and_a_refusal_is_no_state(monkeypatch, refuses, wanted):
    monkeypatch.setattr(gpu_state, "_open", lambda _: (library_that(refuses), ctypes.c_void_p()))
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    assert read_state() == wanted


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_has_a_clock_and_draws_power():
    state = read_state()
    assert state is None or (100 < state.sm_mhz < 5000 and 1 < state.watts < 3000 and 0 < state.celsius < 120)
