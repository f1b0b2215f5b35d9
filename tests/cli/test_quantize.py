"""`quantlab quantize` before and around the work: dry runs, defaults, and what it asks of the run."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from quantlab.checkpoint.hf import open_checkpoint
from quantlab.cli.arguments import parse_size
from quantlab.cli.preflight import calibration_spec, check_out, choose_recipe
from quantlab.errors import CalibrationError, OutputError, QuantlabError, UsageError
from quantlab.models.config import ModelConfig
from quantlab.recipe_file import builtin


def dry(cli: Any, *arguments: object) -> dict[str, Any]:
    """The JSON of a dry run."""
    ran = cli("quantize", *arguments, "--dry-run", "--json")
    assert (ran.code, ran.err) == (0, "")
    return json.loads(ran.out)


@pytest.fixture
def config(model: Path) -> ModelConfig:
    return ModelConfig.from_json(open_checkpoint(model).config, "test")


def test_dry_run_tells_modules_files_memory_and_time(cli: Any, model: Path) -> None:
    ran = cli("quantize", "model", "--dry-run")
    assert (ran.code, ran.err) == (0, "")
    for word in ("w4a16-balanced", "self_attn.q_proj", "ignored by 'lm_head'", "model.safetensors", "config.json"):
        assert word in ran.out
    assert ran.out.count("quantlab_report.json  with the run") == 1  # its size depends on what the solver finds
    assert "peak memory" in ran.out
    assert "CPU core" in ran.out or "GPU" in ran.out


def test_dry_run_writes_nothing_and_needs_no_out(cli: Any, model: Path, here: Path) -> None:
    before = sorted(here.rglob("*"))
    assert dry(cli, "model")["out"] == "model-w4a16"
    assert sorted(here.rglob("*")) == before


def test_dry_run_sizes_follow_the_scheme(cli: Any, model: Path) -> None:
    int4, int8 = dry(cli, "model"), dry(cli, "model", "--scheme", "w8a8")
    linear = sum(math.prod(row["shape"]) for row in int4["modules"] if row["quantized"])
    assert int4["output_bytes"] == sum(file["bytes"] for file in int4["files"])
    assert 0 < int8["output_bytes"] - int4["output_bytes"] < linear
    assert {row["scheme"] for row in int8["modules"]} == {"w8a8", "16-bit"}


def test_dry_run_with_problems_shows_the_plan_and_exits_2(cli: Any, models: Any) -> None:
    models.sound(intermediate_size=96)
    ran = cli("quantize", "model", "--dry-run", "--json")
    assert ran.code == 2
    assert len(ran.lines) == 1
    assert "96 input features are not divisible by group size 128" in json.loads(ran.out)["problems"][0]


def test_group_size_and_symmetry_reach_the_plan(cli: Any, model: Path) -> None:
    told = dry(cli, "model", "--group-size", "32", "--asymmetric")
    assert {row["scheme"] for row in told["modules"] if row["quantized"]} == {"w4a16 g32 asym"}
    told = dry(cli, "model", "--recipe", "w4a16-rtn", "--group-size", "channel")
    assert {row["scheme"] for row in told["modules"] if row["quantized"]} == {"w4a16 channel"}


def test_a_recipe_file_and_a_builtin_name_both_work(cli: Any, model: Path, here: Path) -> None:
    (here / "mine.yaml").write_text("name: mine\nignore: [lm_head, 're:.*down_proj']\npasses: [{pass: rtn}]\n")
    told = dry(cli, "model", "--recipe", "mine.yaml")
    assert told["recipe"] == "mine"
    why = {row["why"] for row in told["modules"] if row["name"].endswith("down_proj")}
    assert why == {"ignored by 're:.*down_proj'"}
    assert dry(cli, "model", "--recipe", "w8a8-gptq")["recipe"] == "w8a8-gptq"


def test_max_shard_size_cuts_the_planned_files(cli: Any, books_5m: Path) -> None:
    names = [file["name"] for file in dry(cli, books_5m, "--max-shard-size", "1MB")["files"]]
    assert "model-00001-of-00003.safetensors" in names
    assert "model.safetensors.index.json" in names


def test_calibration_defaults(config: ModelConfig) -> None:
    none = (None, None, None)
    balanced = calibration_spec(builtin("w4a16-balanced"), config, none, None, None, 7)
    best = calibration_spec(builtin("w4a16-best"), config, none, None, None, 7)
    assert (balanced.samples, balanced.seq_len, balanced.seed, balanced.source) == (64, 512, 7, None)
    assert best.samples is None
    assert calibration_spec(builtin("w4a16-best"), config, none, 8, 64, 0).samples == 8
    assert calibration_spec(builtin("w4a16-balanced"), config, none, 0, 64, 0).samples is None


def test_a_dataset_id_is_not_taken_for_a_missing_file(config: ModelConfig) -> None:
    spec = calibration_spec(builtin("w4a16-fast"), config, ("org/data", "train", "text"), None, None, 0)
    assert (spec.source, spec.split, spec.field) == ("org/data", "train", "text")
    for path in ("./data", "/data/x", "notes.txt", "a/b.jsonl", "a/b/c", "notes.gz"):
        with pytest.raises(CalibrationError):
            calibration_spec(builtin("w4a16-fast"), config, (path, None, None), None, None, 0)


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("1.5 gb", 1_500_000_000), ("2GiB", 2**31), ("1000000", 10**6), ("500mb", 5 * 10**8)],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


def test_scheme_and_quality_choose_the_builtin() -> None:
    assert choose_recipe(None, None, None, None, None).name == "w4a16-balanced"
    assert choose_recipe(None, "w8a8", "best", None, None).name == "w8a8-best"
    assert choose_recipe("w4a16-gptq", None, None, "64", None).group_size == 64


def test_force_replaces_a_quantized_folder_and_nothing_else(model: Path, here: Path) -> None:
    out = here / "out"
    out.mkdir()
    check_out(model, out, force=True)
    (out / "config.json").write_text(json.dumps({"quantization_config": {}}))
    check_out(model, out, force=True)
    with pytest.raises(OutputError, match="exists already"):
        check_out(model, out, force=False)
    (out / "config.json").write_text("{}")
    with pytest.raises(OutputError, match="not a checkpoint folder"):
        check_out(model, out, force=True)


def test_out_through_a_link_into_the_source_is_refused(model: Path, here: Path) -> None:
    (here / "alias").symlink_to(model)
    with pytest.raises(UsageError, match="must lie apart"):
        check_out(model, here / "alias" / "out", force=False)


def test_a_read_only_place_is_refused(model: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantlab.cli.preflight.os.access", lambda path, mode: False)
    with pytest.raises(OutputError, match="cannot be written"):
        check_out(model, here / "out", force=False)


def test_hub_ids_are_told_how_to_download(cli: Any, here: Path) -> None:
    ran = cli("quantize", "meta-llama/Llama-3.2-1B", "--dry-run")
    assert ran.code == 4
    assert "hf download meta-llama/Llama-3.2-1B --local-dir Llama-3.2-1B" in ran.err


def test_errors_know_their_code() -> None:
    assert issubclass(OutputError, QuantlabError)
    assert OutputError("x", where="y", fix="z").one_line() == "QL0701 y: x; try: z"


@pytest.mark.parametrize("out", [".", "below/.."])
def test_an_output_without_a_name_of_its_own_is_refused(
    out: str, model: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "there" / "below").mkdir(parents=True)
    monkeypatch.chdir(here / "there")
    with pytest.raises(UsageError, match="does not name a folder"):
        check_out(here / model, Path(out), force=True)
