"""What one processor of Hopper (sm_90) gives the programs that share it.

Source: CUDA C++ Programming Guide, technical specifications of compute capability 9.0. Knows nothing about kernels.
"""

SHARED_BYTES = 232_448  # that a program may have; each resident program costs another KB
REGISTERS = 65_536  # of a processor
MOST_REGISTERS = 248  # a thread, in the steps of 8 that they come in


def shared_bytes(resident: int) -> int:
    """Bytes of shared memory for each of `resident` programs."""
    return SHARED_BYTES // resident - 1024 * (resident > 1)


def registers(warps: int, resident: int) -> int:
    """Registers a thread at most for `resident` programs of `warps` warps and a producer, which counts as four."""
    return min(MOST_REGISTERS, REGISTERS // ((warps + 4) * 32 * resident) // 8 * 8)
