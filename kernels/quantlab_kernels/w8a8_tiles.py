"""Which W8A8 kernel makes a product, and in which tiles: measured choices for known GPUs, a rule for all others.

The measurements are data, `tiles/w8a8.json`: for a GPU and a weight's shape, the fastest tile by number of tokens.
Knows nothing about tensors.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from quantlab_kernels.hopper import registers, shared_bytes
from quantlab_kernels.tile_data import TileData

MEASURED = Path(__file__).parent / "tiles" / "w8a8.json"
MOST_SPLITS = 8


@dataclass(frozen=True, slots=True)
class DotTile:
    """The plain kernel: `tokens` tokens by `rows` rows, 64 columns at a time."""

    tokens: int
    rows: int


@dataclass(frozen=True, slots=True)
class OneTokenTile:
    """The kernel for one token: `rows` rows a program of `warps` warps, 4 `words` columns at a time."""

    rows: int
    words: int
    warps: int


@dataclass(frozen=True, slots=True)
class WgmmaTile:
    """The Gluon kernel: 16 `warps` `row_blocks` rows by `tokens` tokens, stages of 128 `chunks` columns.

    `split` programs along K, or 0 to share tiles evenly as gluon_schedule says; `resident` programs share a processor.
    """

    warps: int
    row_blocks: int
    tokens: int
    chunks: int
    split: int
    resident: int

    @property
    def rows(self) -> int:
        """Rows of a tile."""
        return 16 * self.warps * self.row_blocks

    @property
    def stages(self) -> int:
        """As many as fit the share of shared memory, at most 10; what the epilogue and barriers need is measured."""
        spare = {4: 2200, 8: 4300, 16: 8400}[self.warps]
        room = shared_bytes(self.resident) - spare
        return min(10, room // (self.chunks * 128 * (self.tokens + self.rows)))

    @property
    def registers(self) -> int:
        """Registers a thread at most; the producer warp counts as four."""
        return registers(self.warps, self.resident)


Tile = DotTile | OneTokenTile | WgmmaTile
KINDS: dict[str, type[Tile]] = {"dot": DotTile, "one_token": OneTokenTile, "wgmma": WgmmaTile}
DATA: TileData[Tile] = TileData(MEASURED, KINDS)
measured_tiles, measured_tile, tile_to_json, tile_from_json = DATA.tiles, DATA.tile, DATA.to_json, DATA.from_json


def likely_tile(rows: int, columns: int, tokens: int, kernels: tuple[type[Tile], ...], processors: int) -> Tile:
    """A tile of one of `kernels` for [tokens, columns] x [rows, columns]^T on a GPU of `processors`.

    As it won on an H200 for the layers of an 8B model; tiles shared evenly did not pay there.
    """
    if tokens == 1 and OneTokenTile in kernels:
        return OneTokenTile(8 if columns <= 4096 else 4, 1024 if columns <= 4096 else 512, 4)
    if WgmmaTile not in kernels:
        return DotTile(min(64, max(16, _power_of_two(tokens))), 64)
    if tokens > 512:
        return WgmmaTile(8, 2, 128, 1, 1, 1)
    if tokens > 64:
        narrow = WgmmaTile(8, 1, 64 if tokens <= 128 else 128, 1, 1, 1)
        fits = _tiles(narrow, rows, tokens) <= processors
        return _filling(narrow, rows, columns, tokens, processors) if fits else WgmmaTile(4, 2, 128, 1, 1, 2)
    width = max(8, _power_of_two(tokens))
    tile = WgmmaTile(4, 1, width, 1, 1, 3 if width <= 16 else 2)
    wide = WgmmaTile(4, 2, width, 1, 1, 2)
    if _tiles(tile, rows, tokens) > processors * tile.resident:
        return wide
    return _filling(tile, rows, columns, tokens, processors)


def _filling(tile: WgmmaTile, rows: int, columns: int, tokens: int, processors: int) -> WgmmaTile:
    """`tile` with K divided among as many programs as fit the GPU at once, and have two stages each."""
    room = processors * tile.resident // _tiles(tile, rows, tokens)
    return replace(tile, split=max(1, min(MOST_SPLITS, room, _stages(tile, columns) // 2)))


def _tiles(tile: WgmmaTile, rows: int, tokens: int) -> int:
    return -(-rows // tile.rows) * -(-tokens // tile.tokens)


def _stages(tile: WgmmaTile, columns: int) -> int:
    return -(-columns // (128 * tile.chunks))


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
