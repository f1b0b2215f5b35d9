"""The benches of kernels where there is no GPU: what they refuse, what they would measure, and the picture of rows."""

import json
import xml.etree.ElementTree as ET

import pytest

from quantlab.bench import kernels, kernels_load, kernels_w8a8
from quantlab.bench.kernels_plot import draw, main, panel
from quantlab.bench.kernels_w4a16 import LAYERS
from quantlab.bench.kernels_w8a8 import Row, table
from quantlab.bench.tune_w8a8 import candidates
from quantlab_kernels.w8a8_tiles import OneTokenTile, WgmmaTile

ROWS = [
    {"op": "w8a8", "layer": name, "tokens": tokens, "us": 10.0 * tokens, "floor": 6.0 * tokens, "cublas": 20.0 * tokens}
    for tokens in (1, 16, 256)
    for name in LAYERS
]
FACTS = {"gpu": "A <GPU>", "torch": "2.11", "triton": "3.6", "time": "2026-11-22T00:00:00"}


@pytest.mark.parametrize("tokens", [1, 8, 16, 64, 128, 256, 1024])
@pytest.mark.parametrize("shape", LAYERS.values(), ids=str)
def test_w8a8_candidates_fit_the_processor_and_differ(shape, tokens):
    tiles = list(candidates(*shape, tokens, 132))
    assert len(tiles) == len(set(tiles)) >= 4
    for tile in tiles:
        if isinstance(tile, WgmmaTile):
            assert tile.stages >= 3 and tile.row_blocks * tile.tokens <= 256
            assert (tile.warps + 4) * 32 * tile.registers * tile.resident <= 65536
            assert tile.split <= -(-shape[1] // (128 * tile.chunks))
        else:
            assert isinstance(tile, OneTokenTile) and tokens == 1


def test_the_w8a8_table_sums_layers_and_leaves_out_what_is_not_whole():
    rows = [Row(name, 8, 10.0, 12.0, 9.0, 1e-3, 5.0, 20.0, None, {}, None) for name in LAYERS]
    rows.append(Row("qkv", 9, 10.0, 12.0, 9.0, 1e-3, 5.0, 20.0, 1.0, {}, None))
    lines = table(rows).splitlines()
    assert len(lines) == 2
    assert lines[1].split() == ["8", "40.0", "48.0", "36.0", "20.0", "50", "80.0", "2.00", "0.0", "1.0e-03", "0"]


@pytest.mark.parametrize("main", [kernels_w8a8.main, kernels_load.main])
def test_without_a_gpu_a_bench_says_so(main, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        main([])
    assert "need a GPU" in capsys.readouterr().err


def test_every_bench_is_run_in_order_and_only_those_with_tiles_are_tuned(monkeypatch, tmp_path):
    asked = []
    for name, (module, _) in kernels.BENCHES.items():
        monkeypatch.setattr(f"{module}.main", lambda words, name=name: asked.append((name, words)))
    kernels.run(("load", "w8a8"), tune=True, out=tmp_path / "rows")
    assert asked == [("load", ["--out", str(tmp_path / "rows")]), ("w8a8", ["--tune", "--out", str(tmp_path / "rows")])]
    asked.clear()
    kernels.run(("w8a8", "w4a16"), tune=False, out=None, dense=True)
    assert asked == [("w8a8", []), ("w4a16", ["--dense"])]


def test_a_picture_has_sums_of_whole_groups_and_is_well_formed(tmp_path):
    lonely = {"op": "w8a8", "layer": "qkv", "tokens": 512, "us": 1.0, "floor": 1.0, "cublas": 1.0}
    assert panel("p", [*ROWS, lonely], 4).points["us"] == [(1, 40.0), (16, 640.0), (256, 10240.0)]
    (tmp_path / "rows").write_text("".join(json.dumps(row | FACTS) + "\n" for row in ROWS))
    main([str(tmp_path / "rows"), "--out", str(tmp_path / "plot.svg")])
    root = ET.fromstring((tmp_path / "plot.svg").read_text())
    texts = [node.text for node in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "W8A8 with its quantization" in texts and "cuBLAS bf16" in texts and "256" in texts
    assert any(text and text.startswith("A <GPU>, torch 2.11") for text in texts)


def test_lines_of_a_picture_rise_with_time():
    svg = draw([panel("p", ROWS, 4)], "note")
    paths = [node.get("d", "") for node in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}path")]
    cublas, ours, floor = (path for path in paths if path.count("L") == 2)
    heights = [[float(point.split()[1]) for point in path[1:].split("L")] for path in (cublas, ours, floor)]
    assert all(line == sorted(line, reverse=True) for line in heights)
    assert all(a < b < c for a, b, c in zip(*heights, strict=True))
