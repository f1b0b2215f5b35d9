"""A likely tile for a W4A16 product on a GPU that was never measured. Knows nothing about tensors."""

from quantlab_kernels.w4a16_tiles import DecodeTile, GluonTile, PlainTile, Tile


def likely_tile(rows: int, columns: int, tokens: int, kernels: tuple[type[Tile], ...], processors: int) -> Tile:
    """A tile of one of `kernels` for [tokens, columns] x [rows, columns]^T on a GPU of `processors`."""
    if DecodeTile in kernels and tokens <= 8:
        return DecodeTile(4, 2, 8, 1)
    if GluonTile in kernels:
        return GluonTile(8, 1, 64, 0, 2, 1, 1)
    return PlainTile(1, 16)
