"""The caches that attention tests and benches run on, and the lines that the bench prints."""

import pytest
import torch

from quantlab.bench.kernels_attention import (
    NOWHERE,
    Heads,
    Row,
    line,
    main,
    poison_unwritten,
    random_cache,
    scattered_pages,
)
from quantlab_kernels.ref_attention import read_kv

HEADS = Heads(4, 2, 64, 16)


def test_sequences_share_no_block_and_tables_end_in_nowhere():
    pages, blocks = scattered_pages([0, 1, 16, 17, 60], HEADS, "cpu")
    used = pages.blocks[pages.blocks != NOWHERE].tolist()
    assert sorted(used) == sorted(set(used)) and max(used) < blocks
    assert [(row != NOWHERE).sum().item() for row in pages.blocks] == [0, 1, 1, 2, 4]
    assert pages.max_length == 60


@pytest.mark.parametrize("int8", [False, True])
def test_poison_lies_outside_of_sequences_only(int8: bool):
    pages, blocks = scattered_pages([5, 40], HEADS, "cpu")
    cache = random_cache(HEADS, blocks, torch.zeros(1).half(), int8)
    before = [read_kv(cache, row, length) for row, length in zip(pages.blocks, (5, 40), strict=True)]
    poison_unwritten(cache, pages)
    for (k, v), row, length in zip(before, pages.blocks, (5, 40), strict=True):
        assert all(torch.equal(x, y) for x, y in zip((k, v), read_kv(cache, row, length), strict=True))
        past = read_kv(cache, row, -(-length // 16) * 16)[1][length:]
        assert past.isnan().all()


def test_a_line_names_the_shape_and_the_ratio_to_each_baseline():
    row = Row("decode", 32, 1, 2048, False, 66.2, 4.05, 2.3e-3, 64.9, None, 71.8, 16, None)
    text = line(row)
    assert "decode 32x1 + 2048 bf16 blocks of 16" in text
    assert "cuDNN 64.9 (0.98x)" in text and "FA3 another day 71.8 (1.08x)" in text and "flash" not in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_the_bench_says_so(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main([])
    assert "need a GPU" in capsys.readouterr().err
