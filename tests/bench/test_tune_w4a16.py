"""The search for W4A16 tiles: every candidate can run, and winners replace those of their GPU alone."""

import pytest

from quantlab.bench.gpu_state import State
from quantlab.bench.kernels_w4a16 import LAYERS, Row, main, table
from quantlab.bench.tune_w4a16 import candidates, write_tiles
from quantlab_kernels.w4a16_tiles import DecodeTile, GluonTile, measured_tiles, tile_to_json


@pytest.mark.parametrize("tokens", [1, 8, 16, 48, 64, 96, 128, 192, 256, 1024])
@pytest.mark.parametrize("shape", LAYERS.values(), ids=str)
def test_candidates_fit_the_processor_and_differ(shape, tokens):
    tiles = list(candidates(*shape, tokens, 132))
    assert len(tiles) == len(set(tiles)) >= 3
    for tile in tiles:
        if isinstance(tile, GluonTile):
            assert tile.stages() >= 3
            assert (tile.warps + 4) * 32 * tile.registers * tile.resident <= 65536
            assert tile.split * tile.chunks * 128 <= max(shape[1], 128 * tile.chunks)
        else:
            assert isinstance(tile, DecodeTile) and tokens <= 16


def test_winners_replace_those_of_their_gpu_alone(tmp_path):
    path = tmp_path / "tiles.json"
    path.write_text("[]")
    tiles = GluonTile(4, 1, 8, 0, 4, 1, 4), DecodeTile(4, 2, 8, 1)
    first, second = (tile_to_json(tile) for tile in tiles)
    write_tiles(path, "A", {(64, 128): [(8, first)]})
    write_tiles(path, "B", {(64, 128): [(8, second)]})
    write_tiles(path, "A", {(64, 256): [(16, second), (8, first)]})
    assert measured_tiles(path) == {("B", 64, 128): [(8, tiles[1])], ("A", 64, 256): [(8, tiles[0]), (16, tiles[1])]}


def test_the_table_sums_layers_and_leaves_out_what_is_not_whole():
    rows = [
        Row(name, 8, "bf16", 10.0, 12.0, 1e-3, 5.0, 20.0, 19.0, {}, State(1755 + i, 650.0, 60))
        for i, name in enumerate(LAYERS)
    ]
    rows.append(Row("qkv", 9, "bf16", 10.0, None, 1e-3, 5.0, 20.0, None, {}, None))
    lines = table(rows).splitlines()
    assert len(lines) == 2
    assert lines[1].split() == ["bf16", "8", "40.0", "48.0", "20.0", "50", "80.0", "2.00", "76.0", "1.0e-03", "1755"]


def test_without_a_gpu_the_bench_says_so(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        main([])
    assert "need a GPU" in capsys.readouterr().err
