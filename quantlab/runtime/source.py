"""A checkpoint folder, 16-bit or packed, as the source of an engine's weights.

Bytes go to the device as they are stored and are unpacked there, while threads read what comes next from the files.
Knows nothing about kernels.
"""

from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from quantlab.checkpoint.model_folder import ModelFolder
from quantlab.checkpoint.packed import from_disk
from quantlab.checkpoint.reader import all_finite, read_tensor
from quantlab.errors import CheckpointError
from quantlab.models.config import ModelConfig
from quantlab.models.naming import has_bias, linear_shapes
from quantlab.runtime.linears import RawLinear
from quantlab_kernels.layout import QuantizedWeight

READERS = 4  # threads


class FolderSource:
    """Reads `folder`'s tensors to `device`, floats in `dtype`; raises CheckpointError for what is damaged."""

    def __init__(self, folder: ModelFolder, dtype: torch.dtype, device: torch.device):
        self.config: ModelConfig = folder.config
        self.dtype, self.device = dtype, device
        self._schemes = folder.schemes
        self._shapes = linear_shapes(folder.config)
        self._tensors = folder.checkpoint.tensors
        self._ahead: dict[str, Future[Tensor]] = {}
        self._readers = ThreadPoolExecutor(READERS)

    def read_ahead(self, prefix: str) -> None:
        """Begin to read the tensors whose names begin with `prefix`."""
        for name, info in self._tensors.items():
            if name.startswith(prefix) and name not in self._ahead:
                self._ahead[name] = self._readers.submit(read_tensor, info)

    def tensor(self, name: str) -> Tensor:
        """A float tensor by its full name."""
        return self._read(name).to(self.dtype)

    def _read(self, name: str) -> Tensor:
        """The tensor as stored, on the device, where it is also checked: a CPU takes longer over a large one."""
        info = self._tensors[name]
        begun = self._ahead.pop(name, None)
        tensor = (read_tensor(info) if begun is None else begun.result()).to(self.device)
        if tensor.is_floating_point() and not all_finite(tensor):
            raise CheckpointError("holds NaN or Inf", where=f"{info.file}: tensor {name}")
        return tensor

    def linear(self, module: str) -> RawLinear:
        """A linear by its full module name."""
        scheme = self._schemes[module]
        block_relative = module.split(".", 3)[-1]
        biased = module != "lm_head" and has_bias(self.config, block_relative)
        bias = self.tensor(f"{module}.bias") if biased else None
        if scheme is None:
            return RawLinear(self.tensor(f"{module}.weight"), None, bias)
        q = from_disk(module, scheme, self._shapes[module], self._read)
        # The product of scales and codes is taken as checkpoint.load takes it, which says why.
        scales = q.scales.to(self.dtype) if scheme.symmetric else q.scales
        return RawLinear(QuantizedWeight(q.codes, scales, q.zeros, q.group_size), scheme, bias)
