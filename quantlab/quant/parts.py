"""What the journal holds of the model: solved codes by module and parameters that folds or training changed.

One file a block; a file that replaces all of them comes from the end-to-end stage. Knows nothing about solvers.
"""

from torch import Tensor

from quantlab.checkpoint.header import TensorInfo, read_header
from quantlab.checkpoint.reader import read_tensor
from quantlab.quant.journal import Journal
from quantlab_kernels.layout import QuantizedWeight

CODES, SCALES, ZEROS = ".codes", ".scales", ".zeros"


def part_tensors(solved: dict[str, QuantizedWeight], changed: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one part: codes, scales and zeros by module name, changed parameters by tensor name."""
    tensors = {}
    for module, q in solved.items():
        tensors[module + CODES] = q.codes
        tensors[module + SCALES] = q.scales
        if q.zeros is not None:
            tensors[module + ZEROS] = q.zeros
    return {name: tensor.detach().cpu() for name, tensor in (tensors | changed).items()}


class Parts:
    """Reads finished parts by module or tensor name, one tensor at a time; a later step replaces an earlier one's."""

    def __init__(self, journal: Journal, steps: list[str]):
        self._infos: dict[str, TensorInfo] = {}
        for step in steps:
            self._infos |= read_header(journal.path(step))

    def quantized(self, module: str) -> QuantizedWeight:
        """The solver's own codes, scales and zeros of `module`."""
        codes, scales = read_tensor(self._infos[module + CODES]), read_tensor(self._infos[module + SCALES])
        zeros = read_tensor(self._infos[module + ZEROS]) if module + ZEROS in self._infos else None
        return QuantizedWeight(codes, scales, zeros, codes.shape[1] // scales.shape[1])

    def changed(self, name: str) -> Tensor | None:
        """The parameter `name` if it is not the source's any more."""
        return read_tensor(self._infos[name]) if name in self._infos else None
