"""A likely tile for a W4A16 product that was never measured. Knows nothing about tensors.

The rules say what won on an H200 for the layers of an 8B model: few tokens want narrow programs, many of them on a
processor, with K divided until they fill it; many tokens want tiles of which little is left over. Above 128 tokens the
tile of the rule took 1.2 % longer than the fastest one measured, in the mean over 13 numbers of tokens from 193 to 640.
"""

from dataclasses import replace

from quantlab_kernels.w4a16_tiles import DecodeTile, GluonTile, PlainTile, Tile

MOST_SPLITS = 8
# Tiles for more than 128 tokens, and microseconds that one takes on 4096 columns.
LARGE_TILES = (
    (GluonTile(8, 1, 256, 0, 2, 1, 1), 43.0),
    (GluonTile(8, 1, 256, 16, 2, 1, 1), 52.0),
    (GluonTile(8, 1, 256, 32, 2, 1, 1), 52.5),
    (GluonTile(8, 1, 256, 64, 2, 1, 1), 56.0),
    (GluonTile(8, 1, 128, 64, 2, 1, 1), 38.0),
    (GluonTile(8, 1, 128, 32, 2, 1, 1), 31.5),
    (GluonTile(8, 1, 128, 16, 2, 1, 1), 30.0),
    (GluonTile(8, 2, 128, 0, 2, 1, 1), 43.0),
    (GluonTile(8, 1, 128, 0, 2, 1, 1), 24.0),
    (GluonTile(4, 1, 128, 0, 2, 1, 2), 26.0),
)
# Programs that share tiles are at different places along K, and probably find x in the L2 cache only if all of it fits.
MOST_SHARED = 2048  # tokens; measured: 0.86 to 1.0 of cuBLAS with shared tiles, 1.0 to 1.1 without
LAUNCH, MEETING = 2.5, 2.5  # microseconds
PARTIALS = 17_000.0  # float32 sums that the last program of a tile adds in a microsecond


def likely_tile(
    rows: int, columns: int, tokens: int, kernels: tuple[type[Tile], ...], processors: int, bits: int = 4
) -> Tile:
    """A tile of one of `kernels` for [tokens, columns] x [rows, columns]^T on a GPU of `processors`."""
    if GluonTile in kernels:
        if tokens > (128 if bits == 4 else 96):
            return large_tiles(rows, columns, tokens, processors, bits)[0][1]
        choices = _gluon_choices(tokens)
        if bits == 8:  # twice the bytes a stage
            narrow = replace(choices[0], chunks=2)
            choices = narrow, replace(narrow, warps=8, resident=2) if tokens <= 64 else replace(choices[1], chunks=2)
        return _filling(choices, rows, columns, tokens, processors)
    if DecodeTile in kernels and tokens <= 16:
        return _decode_tile(rows, columns, tokens, processors)
    return PlainTile(1 if rows <= 64 or tokens <= 64 else 2, min(64, max(16, _power_of_two(tokens))))


def _gluon_choices(tokens: int) -> tuple[GluonTile, GluonTile]:
    """For at most 128 tokens: the tile to take, and the wider one if that makes more programs than fit."""
    if tokens <= 16:
        narrow = GluonTile(4, 1, 8 if tokens <= 8 else 16, 0, 4, 1, 4)
        return narrow, narrow
    if tokens <= 32:
        return GluonTile(4, 1, 32, 0, 4, 1, 3), GluonTile(8, 1, 32, 0, 4, 1, 2)
    if tokens <= 64:
        return GluonTile(4, 1, 64, 0, 2, 1, 3), GluonTile(8, 1, 64, 0, 2, 1, 2)
    if tokens <= 96:
        return GluonTile(4, 1, 64, 32, 2, 1, 2), GluonTile(8, 1, 64, 32, 4, 1, 1)
    return GluonTile(4, 1, 128, 0, 2, 1, 2), GluonTile(8, 2, 128, 0, 2, 1, 1)


def _filling(choices: tuple[GluonTile, GluonTile], rows: int, columns: int, tokens: int, processors: int) -> GluonTile:
    narrow, wide = choices
    slots = processors * narrow.resident
    tile = narrow if _tiles(narrow, rows, tokens) <= slots else wide
    room = processors * tile.resident // _tiles(tile, rows, tokens)
    return replace(tile, split=max(1, min(MOST_SPLITS, room, _stages(tile, columns) // 2)))


def large_tiles(rows: int, columns: int, tokens: int, processors: int, bits: int = 4) -> list[tuple[float, GluonTile]]:
    """Tiles for more than 96 tokens with the microseconds that each is likely to take, the fastest first."""
    found = []
    for tile, microseconds in LARGE_TILES:
        if tile.stages(bits) < 3 or (bits == 8 and tile.ring_chunks(bits) < tile.chunks):  # the latter is not measured
            continue
        tiles, stages, slots = _tiles(tile, rows, tokens), _stages(tile, columns), processors * tile.resident
        for split in (1, 2, 3, 4, 6, 0):
            if split > 1 and (tiles * split > slots or stages < 2 * split):
                continue
            if split == 0 and (tiles % slots == 0 or tiles * stages < 2 * slots or tokens >= MOST_SHARED):
                continue
            rounds = -(-tiles * split // slots) / split if split else tiles / slots
            sharers = split or max(2, slots // tiles + 1)
            meeting = (MEETING + sharers * tile.rows * tile.columns / PARTIALS) * (split != 1) * (1 if split else 2)
            found.append((rounds * microseconds * columns / 4096 + LAUNCH + meeting, replace(tile, split=split)))
    return sorted(found, key=lambda pair: pair[0])


def _decode_tile(rows: int, columns: int, tokens: int, processors: int) -> DecodeTile:
    """About 16 warps a processor: wide programs where the rows suffice, else K divided."""
    row_tiles = 4 if rows >= 64 * 4 * processors else 2
    programs = -(-rows // (16 * row_tiles))
    split = max(1, min(MOST_SPLITS, 4 * processors // programs, columns // 512))
    return DecodeTile(4, row_tiles, 8 if tokens <= 8 else 16, split)


def _tiles(tile: GluonTile, rows: int, tokens: int) -> int:
    return -(-rows // tile.rows) * -(-tokens // tile.columns)


def _stages(tile: GluonTile, columns: int) -> int:
    return -(-columns // (64 * tile.chunks))


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
