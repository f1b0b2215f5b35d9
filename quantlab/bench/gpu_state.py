"""The clock, power and temperature of the current GPU, as its driver's management library (NVML) reports them.

Called through ctypes, since the library comes with every driver and its Python package does not. Source of names and
numbers: NVML API reference (nvmlDeviceGetClockInfo, NVML_CLOCK_SM = 1; nvmlDeviceGetPowerUsage in milliwatts;
nvmlDeviceGetTemperature, NVML_TEMPERATURE_GPU = 0). Only reads; knows nothing about what the GPU does.
"""

import ctypes
from dataclasses import dataclass
from functools import cache

import torch

LIBRARY = "libnvidia-ml.so.1"
SM_CLOCK, GPU_TEMPERATURE = 1, 0


@dataclass(frozen=True, slots=True)
class State:
    """Megahertz of the multiprocessors, watts over about the last second, degrees Celsius."""

    sm_mhz: int
    watts: float
    celsius: int


def read_state() -> State | None:
    """The current GPU's state now; None where the library is missing or refuses."""
    try:
        library, device = _open(torch.cuda.current_device())
        clock, power, temperature = (ctypes.c_uint() for _ in range(3))
        _succeed(library.nvmlDeviceGetClockInfo(device, SM_CLOCK, ctypes.byref(clock)))
        _succeed(library.nvmlDeviceGetPowerUsage(device, ctypes.byref(power)))
        _succeed(library.nvmlDeviceGetTemperature(device, GPU_TEMPERATURE, ctypes.byref(temperature)))
    except (OSError, AttributeError):  # AttributeError: an older library without one of these functions
        return None
    return State(clock.value, power.value * 1e-3, temperature.value)


@cache
def _open(index: int) -> tuple[ctypes.CDLL, ctypes.c_void_p]:
    """The library, and its name for torch's GPU number `index`, which CUDA_VISIBLE_DEVICES may have renumbered."""
    library = ctypes.CDLL(LIBRARY)
    _succeed(library.nvmlInit_v2())
    device = ctypes.c_void_p()
    name = f"GPU-{torch.cuda.get_device_properties(index).uuid}".encode()
    _succeed(library.nvmlDeviceGetHandleByUUID(name, ctypes.byref(device)))
    return library, device


def _succeed(code: int) -> None:
    if code:
        raise OSError(f"NVML error {code}")
