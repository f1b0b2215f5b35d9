"""The engine's bench on a tiny model of random weights: what it measures is what it says."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quantlab.bench.offline import run_offline
from quantlab.bench.offline_options import (
    SCHEME_NAMES,
    SHAPE_NAMES,
    OfflineOptions,
    Setup,
    Work,
    parse_names,
    parse_setups,
    parse_workloads,
)
from quantlab.bench.offline_run import Profile, account
from quantlab.bench.random_folder import main, write_folder
from quantlab.bench.random_source import SCHEMES, SHAPES, RandomSource, random_config
from quantlab.checkpoint.model_folder import open_model
from quantlab.errors import UsageError
from quantlab.text import load_tokenizer
from quantlab.token_bytes import token_bytes
from quantlab_kernels.ref import dequantize


def test_prompts_that_do_not_fit_are_left_out_and_workloads_refused_before_anything_is_built() -> None:
    short = OfflineOptions(
        shape="tiny", setups=(Setup("bf16", False, False),), cases=("ttft",), device="cpu", max_model_len=512
    )
    assert [row["prompt"] for row in run_offline(short) if row["case"] == "ttft"] == [32, 128]
    with pytest.raises(UsageError, match="1000/24x3 needs 1024 tokens") as caught:
        replace(short, cases=("workload",), workloads=(Work(100, 24, 3), Work(1000, 24, 3)))
    assert caught.value.fix is not None and "--max-model-len 1024" in caught.value.fix


def test_every_case_is_a_row_and_every_request_is_answered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = OfflineOptions(
        shape="tiny",
        setups=(Setup("bf16", False, False), Setup("int4", True, False)),
        cases=("decode", "batch", "ttft", "workload"),
        workloads=(Work(20, 5, 12),),
        baselines=("static",),
        baseline_workloads=(Work(8, 4, 3),),
        load=("int8",),
        device="cpu",
        max_model_len=1400,
        max_num_seqs=8,
        steps=2,
        out=tmp_path / "rows.jsonl",
    )
    rows = run_offline(options)
    written = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len(written) == len(rows)
    for setup in ("bf16", "int4+kv8"):
        own = [row for row in rows if row["setup"] == setup]
        assert [(row["case"], row.get("sequences"), row.get("context")) for row in own if "step_seconds" in row] == [
            ("decode", 1, 128),
            ("batch", 8, 1024),
        ]
        assert [row["prompt"] for row in own if row["case"] == "ttft"] == [32, 128, 1024]
        (work,) = (row for row in own if row["case"] == "workload")
        assert work["output_rate"] == pytest.approx(60 / work["seconds"])
        assert 0 < work["ttft_median"] <= work["ttft_longest"] <= work["seconds"]
    assert [row["attempt"] for row in rows if row["case"] == "load"] == ["first", "again"]
    assert rows[-1]["setup"] == "transformers static" and rows[-1]["output_rate"] > 0
    assert "int4+kv8: 20/5 x 12" in capsys.readouterr().err


def test_setups_and_workloads_are_read_strictly() -> None:
    assert parse_setups("bf16,int4+kv8,int4+head8+kv8") == (
        Setup("bf16", False, False),
        Setup("int4", True, False),
        Setup("int4", True, True),
    )
    assert parse_setups("int4+head8+kv8")[0].name == "int4+kv8+head8"
    assert parse_workloads("128/64x10", "--workloads") == (Work(128, 64, 10),)
    for wrong in ("fp8", "int4+kv4"):
        with pytest.raises(UsageError, match="no setup"):
            parse_setups(wrong)
    for wrong in ("128", "128/x3", "0/1x1", "1/1x-1", "1/1x1000000"):
        with pytest.raises(UsageError):
            parse_workloads(wrong, "--workloads")
    with pytest.raises(UsageError, match="not known"):
        parse_names("decode,fast", ("decode",), "--cases")
    assert tuple(SHAPES) == SHAPE_NAMES and tuple(SCHEMES) == SCHEME_NAMES


def test_what_the_device_does_is_counted_once_where_kernels_overlap() -> None:
    spans = [(5.0, 7.0, "c"), (0.0, 2.0, "a"), (1.0, 3.0, "b"), (6.0, 6.5, "a")]
    found = account(spans, steps=2)
    assert found.kernels == {"a": (1.0, 1.0), "b": (0.5, 0.5), "c": (1.0, 0.5)}
    assert (found.step_us, found.gaps, found.idle) == (3.5, {"b -> c": 1.0}, 1.0 / 3.5)
    assert account([], 1) == Profile(0.0, 0.0, {}, {})


def test_a_random_folder_holds_the_weights_of_the_random_source(tmp_path: Path) -> None:
    size = write_folder(tmp_path / "m", "tiny", SCHEMES["int4"], torch.device("cpu"))
    model = open_model(tmp_path / "m")
    assert size == sum(info.nbytes for info in model.checkpoint.tensors.values())
    assert {scheme.name for scheme in model.schemes.values() if scheme} == {"w4a16"}
    assert model.schemes["lm_head"] is None


def test_every_token_of_a_random_folder_is_some_text(tmp_path: Path) -> None:
    main([str(tmp_path / "m"), "--shape", "tiny", "--scheme", "bf16"])
    tokenizer = load_tokenizer(tmp_path / "m")
    text = "Zwölf Boxkämpfer, 12 of them"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert all(map(len, token_bytes(tokenizer).table)) and len(token_bytes(tokenizer).table) == 512


@pytest.mark.parametrize("scheme", ["bf16", "int4", "int8"])
def test_random_linears_keep_the_size_of_what_passes_through(scheme: str) -> None:
    source = RandomSource(random_config("tiny"), SCHEMES[scheme], torch.float32, torch.device("cpu"))
    weight = source.linear("model.layers.0.self_attn.q_proj").weight
    matrix = weight if isinstance(weight, torch.Tensor) else dequantize(weight)
    y = torch.randn(64, matrix.shape[1], generator=torch.Generator().manual_seed(9)) @ matrix.t()
    assert 0.8 < y.std().item() < 1.3
