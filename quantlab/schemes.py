"""What a quantization scheme is: bits, grouping and activation handling of one linear layer.

Knows nothing about tensors or files: `checkpoint.schema` writes these as JSON, `quant.grid` turns them into numbers.
"""

from dataclasses import dataclass
from typing import Literal

SchemeName = Literal["w4a16", "w8a8", "w8a16"]
SCHEME_NAMES: tuple[str, ...] = ("w4a16", "w8a8", "w8a16")
GROUP_SIZES: tuple[int, ...] = (32, 64, 128)


@dataclass(frozen=True, slots=True)
class Scheme:
    """One linear layer's scheme; `group_size` None means one scale per output channel."""

    name: SchemeName
    group_size: int | None
    symmetric: bool = True

    @property
    def bits(self) -> int:
        """Bits of one weight code."""
        return 4 if self.name == "w4a16" else 8

    @property
    def quantizes_activations(self) -> bool:
        """Whether the layer's input is quantized to INT8, per token, at run time."""
        return self.name == "w8a8"

    @property
    def code_min(self) -> int:
        """Smallest signed code."""
        return -(1 << (self.bits - 1))

    @property
    def code_max(self) -> int:
        """Largest signed code."""
        return (1 << (self.bits - 1)) - 1

    def groups(self, in_features: int) -> int:
        """Scales per output row for `in_features` columns."""
        return 1 if self.group_size is None else in_features // self.group_size


def describe(scheme: Scheme | None) -> str:
    """A scheme in a few characters: `w4a16 g128`, `w4a16 g32 asym`, `w8a8`, `16-bit`."""
    if scheme is None:
        return "16-bit"
    group = "" if scheme.name == "w8a8" else " channel" if scheme.group_size is None else f" g{scheme.group_size}"
    return f"{scheme.name}{group}{'' if scheme.symmetric else ' asym'}"
