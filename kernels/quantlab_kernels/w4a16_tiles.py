"""Which W4A16 kernel makes a product, and in which tiles: measured choices for known GPUs, a rule for all others.

The measurements are data, `tiles/w4a16.json`: for a GPU and a weight's shape, the fastest tile by number of tokens.
Knows nothing about tensors.
"""

from dataclasses import dataclass
from pathlib import Path

from quantlab_kernels.hopper import registers, shared_bytes
from quantlab_kernels.tile_data import TileData

FEW_STAGES = 3
MEASURED = Path(__file__).parent / "tiles" / "w4a16.json"


@dataclass(frozen=True, slots=True)
class PlainTile:
    """w4a16_triton: tiles of 64 `blocks` rows by `tokens` tokens."""

    blocks: int
    tokens: int


@dataclass(frozen=True, slots=True)
class DecodeTile:
    """w4a16_decode: `warps` warps on 16 `row_tiles` rows by `tokens` tokens, `split` programs along K."""

    warps: int
    row_tiles: int
    tokens: int
    split: int


@dataclass(frozen=True, slots=True)
class GluonTile:
    """w4a16_gluon: 16 `warps` `row_blocks` rows by `tokens` + `more_tokens`, iterations of 64 `chunks` columns.

    `split` programs along K, or 0 to share tiles evenly as gluon_schedule says; `resident` programs share a processor.
    """

    warps: int
    row_blocks: int
    tokens: int
    more_tokens: int
    chunks: int
    split: int
    resident: int

    @property
    def rows(self) -> int:
        """Rows of a tile."""
        return 16 * self.warps * self.row_blocks

    @property
    def columns(self) -> int:
        """Tokens of a tile."""
        return self.tokens + self.more_tokens

    def stages(self, bits: int = 4) -> int:
        """As many as fit the share of shared memory, at most 10; what the epilogue and barriers need is measured."""
        chunk = self.columns * 128 + self.rows * 8 * bits
        return min(10, self._room // (self.ring_chunks(bits) * chunk))

    def ring_chunks(self, bits: int = 4) -> int:
        """Chunks a stage: those of an iteration if FEW_STAGES such stages fit, else 1."""
        stage = self.chunks * (self.columns * 128 + self.rows * 8 * bits)
        return self.chunks if self._room >= FEW_STAGES * stage else 1

    @property
    def _room(self) -> int:
        return shared_bytes(self.resident) - {4: 2200, 8: 4300, 16: 8400}[self.warps]

    @property
    def registers(self) -> int:
        """Registers a thread at most; the producer warp counts as four."""
        return registers(self.warps, self.resident)


Tile = PlainTile | DecodeTile | GluonTile
KINDS: dict[str, type[Tile]] = {"plain": PlainTile, "decode": DecodeTile, "gluon": GluonTile}
DATA: TileData[Tile] = TileData(MEASURED, KINDS)
measured_tiles, measured_tile, tile_to_json, tile_from_json = DATA.tiles, DATA.tile, DATA.to_json, DATA.from_json
