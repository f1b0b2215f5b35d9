"""One tensor at a time from a checkpoint's files into memory.

Plain reads into the tensor's own buffer: mapped pages would count as resident memory, and a map over a file that
somebody truncates kills the process. Knows nothing about models or quantization.
"""

import torch
from torch import Tensor

from quantlab.checkpoint.header import TensorInfo, open_regular
from quantlab.checkpoint.hf import HFCheckpoint
from quantlab.errors import CheckpointError

TORCH_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


class TensorReader:
    """Reads tensors of `checkpoint` by name; holds nothing between calls."""

    def __init__(self, checkpoint: HFCheckpoint):
        self.checkpoint = checkpoint

    def tensor(self, name: str) -> Tensor:
        """The tensor `name`, as stored, on the CPU; raises CheckpointError if absent, cut short, NaN or Inf."""
        info = self.checkpoint.tensors.get(name)
        if info is None:
            raise CheckpointError(f"tensor {name} is missing", where=str(self.checkpoint.folder))
        tensor = read_tensor(info)
        if tensor.is_floating_point() and not all_finite(tensor):
            raise CheckpointError("holds NaN or Inf", where=f"{info.file}: tensor {name}")
        return tensor


def read_tensor(info: TensorInfo) -> Tensor:
    """The bytes that `info` points at, as a tensor; raises CheckpointError if the file ends before them."""
    where = f"{info.file}: tensor {info.name}"
    if info.dtype not in TORCH_DTYPES:
        raise CheckpointError(f"has dtype {info.dtype}, which quantlab does not read", where=where)
    if info.nbytes == 0:
        return torch.empty(info.shape, dtype=TORCH_DTYPES[info.dtype])
    buffer = bytearray(info.nbytes)
    with open_regular(info.file) as file:
        file.seek(info.start)
        view, done = memoryview(buffer), 0
        while done < info.nbytes:  # one read() is capped near 2 GiB by the kernel
            count = file.readinto(view[done:])
            if not count:
                raise CheckpointError("ends before its last byte: the file was cut", where=where)
            done += count
    return torch.frombuffer(buffer, dtype=TORCH_DTYPES[info.dtype]).view(info.shape)


def all_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite, without a temporary of the tensor's size."""
    if tensor.numel() == 0:
        return True
    low, high = torch.aminmax(tensor)  # NaN propagates into both
    return bool(torch.isfinite(low) and torch.isfinite(high))
