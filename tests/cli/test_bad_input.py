"""Every kind of bad input: the right exit code, one line on stderr, no data on stdout, and nothing written."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
SHARD_1, SHARD_2 = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
RTN = "passes:\n  - pass: rtn\n"

Case = tuple[Callable[[Any], Path | None], int, str]


def edit(change: Callable[[Path], object]) -> Callable[[Any], Path]:
    """A sound checkpoint that `change` then damages."""

    def build(models: Any) -> Path:
        folder = models.sound()
        change(folder)
        return folder

    return build


def edit_shards(change: Callable[[Path], object]) -> Callable[[Any], Path]:
    """A sound sharded checkpoint that `change` then damages."""

    def build(models: Any) -> Path:
        folder = models.sharded()
        change(folder)
        return folder

    return build


def rewrite_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    """Change the weight_map of an index."""
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def escape_by_link(folder: Path) -> None:
    """A shard that is a link to a file outside the folder."""
    outside = folder.parent / "outside.safetensors"
    (folder / SHARD_1).rename(outside)
    (folder / SHARD_1).symlink_to(outside)


def pickled(folder: Path) -> None:
    """Weights as pickle only."""
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def repeat_key(data: bytes) -> bytes:
    """A header that names a tensor twice."""
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].rstrip()
    first = json.loads(header)[Q_PROJ]
    longer = header[:-1] + b', "' + Q_PROJ.encode() + b'": ' + json.dumps(first).encode() + b"}"
    return len(longer).to_bytes(8, "little") + longer + data[8 + length :]


FILES: dict[str, Case] = {
    "hub id": (lambda m: Path("org/name"), 4, "hf download org/name --local-dir name"),
    "missing folder": (lambda m: Path("./nowhere"), 4, "nowhere"),
    "file for a folder": (edit(lambda f: (f / "config.json").rename(f.parent / "file")), 4, "config.json"),
    "empty folder": (edit(lambda f: [path.unlink() for path in f.iterdir()]), 4, "config.json"),
    "no config": (edit(lambda f: (f / "config.json").unlink()), 4, "config.json"),
    "config not JSON": (edit(lambda f: (f / "config.json").write_text("{")), 4, "config.json"),
    "config a list": (edit(lambda f: (f / "config.json").write_text("[]")), 4, "config.json"),
    "config not UTF-8": (edit(lambda f: (f / "config.json").write_bytes(b'{"a": "\xff"}')), 4, "config.json"),
    "unknown architecture": (
        lambda m: m.with_config(architectures=["LlamoForCausalLM"]), 5, "LlamoForCausalLM is not supported",
    ),
    "no architecture": (lambda m: m.with_config(architectures=None, model_type=None), 5, "architecture None"),
    "negative hidden size": (lambda m: m.with_config(hidden_size=-1), 4, "hidden_size"),
    "huge layer count": (lambda m: m.with_config(num_hidden_layers=10**9), 4, "num_hidden_layers"),
    "heads that do not divide": (lambda m: m.with_config(num_key_value_heads=3), 4, "num_key_value_heads"),
    "unknown activation": (lambda m: m.with_config(hidden_act="gelu"), 5, "hidden_act"),
    "unknown rope": (lambda m: m.with_config(rope_scaling={"rope_type": "spiral", "factor": 2.0}), 5, "spiral"),
    "already quantized": (
        lambda m: m.with_config(quantization_config={"quant_method": "gptq"}), 5, "already quantized (gptq)",
    ),
    "pickle only": (edit(pickled), 5, "pytorch_model.bin"),
    "no weights": (edit(lambda f: (f / "model.safetensors").unlink()), 4, "model.safetensors"),
    "empty weight file": (lambda m: m.with_header(lambda data: b""), 4, "model.safetensors"),
    "truncated weight file": (lambda m: m.with_header(lambda data: data[:-100]), 4, "model.safetensors"),
    "trailing bytes": (lambda m: m.with_header(lambda data: data + b"x" * 8), 4, "model.safetensors"),
    "header length past the end": (
        lambda m: m.with_header(lambda data: (2**62).to_bytes(8, "little") + data[8:]), 4, "model.safetensors",
    ),
    "header not JSON": (lambda m: m.with_header(lambda data: data[:8] + b"x" + data[9:]), 4, "model.safetensors"),
    "tensor named twice": (lambda m: m.with_header(repeat_key), 4, Q_PROJ),
    "missing tensor": (lambda m: m.without_tensor(Q_PROJ), 4, Q_PROJ),
    "extra tensor": (lambda m: m.with_tensor("model.layers.9.mlp.up_proj.weight", "BF16", (256, 128)), 4, "layers.9"),
    "wrong shape": (lambda m: m.with_tensor(Q_PROJ, "BF16", (128, 64)), 4, Q_PROJ),
    "wrong dtype": (lambda m: m.with_tensor(Q_PROJ, "I8", (128, 128)), 4, Q_PROJ),
    "missing shard": (edit_shards(lambda f: (f / SHARD_2).unlink()), 4, SHARD_2),
    "extra shard": (
        edit_shards(lambda f: (f / "model-00003-of-00003.safetensors").write_bytes((f / SHARD_1).read_bytes())),
        4, "model-00003-of-00003.safetensors",
    ),
    "no index": (edit_shards(lambda f: (f / INDEX).unlink()), 4, INDEX),
    "index without a map": (edit_shards(lambda f: (f / INDEX).write_text("{}")), 4, INDEX),
    "shard outside the folder": (
        edit_shards(lambda f: rewrite_index(f, lambda w: w.update({Q_PROJ: "../outside.safetensors"}))), 4, "outside",
    ),
    "link outside the folder": (edit_shards(escape_by_link), 4, SHARD_1),
    "index and shard disagree": (
        edit_shards(lambda f: rewrite_index(f, lambda w: w.update({Q_PROJ: SHARD_2}))), 4, Q_PROJ,
    ),
}  # fmt: skip

RECIPES: dict[str, tuple[str, str]] = {
    "not YAML": ("passes: [\n", "r.yaml:2:1: not YAML"),
    "empty file": ("", "r.yaml:1:1: the file is empty"),
    "a list": ("- rtn\n", "r.yaml:1:1: a recipe is a mapping"),
    "unknown key": ("group_sise: 32\n" + RTN, "r.yaml:1:1: unknown key 'group_sise', did you mean 'group_size'?"),
    "unknown pass": ("passes:\n  - pass: gtpq\n", "r.yaml:2:11: unknown pass 'gtpq', did you mean 'gptq'?"),
    "unknown scheme": ("scheme: w3a16\n" + RTN, "r.yaml:1:9: scheme: should be"),
    "duplicate key": ("name: a\nname: b\n" + RTN, "r.yaml:2:1: duplicate key 'name'"),
    "anchor": ("name: &x a\n" + RTN, "r.yaml:1:7: anchors and aliases are not allowed"),
    "python tag": ("name: !!python/object/apply:os.system [id]\n" + RTN, "is not allowed"),
    "deep nesting": ("passes: " + "[" * 99, "nested deeper than 16 levels"),
    "value out of range": ("passes:\n  - pass: gptq\n    damping: -1\n", "r.yaml:3:14: damping: should be greater"),
    "wrong type": ("passes:\n  - pass: gptq\n    block_size: many\n", "r.yaml:3:17: block_size"),
    "no passes": ("scheme: w4a16\n", "the key 'passes' is missing"),
    "two solvers": ("passes: [{pass: rtn}, {pass: gptq}]\n", "exactly one of rtn and gptq"),
    "wrong order": ("passes: [{pass: rtn}, {pass: awq}]\n", "passes must come in the order"),
    "grouped w8a8": ("scheme: w8a8\ngroup_size: 32\n" + RTN, "r.yaml:2:13: w8a8 has one scale per output channel"),
    "asymmetric INT8": ("scheme: w8a16\nsymmetric: false\n" + RTN, "r.yaml:2:12: asymmetric codes exist for w4a16"),
    "override matches nothing": (
        "overrides: [{match: lm_haed, scheme: skip}]\n" + RTN, "'lm_haed' matches no module, did you mean 'lm_head'?",
    ),
    "ignore matches nothing": ("ignore: ['re:.*gate']\n" + RTN, "'re:.*gate' matches no module"),
    "broken expression": ("ignore: ['re:(']\n" + RTN, "is not a regular expression"),
    "exponential expression": ("ignore: ['re:(a+)+b']\n" + RTN, "a group may not be repeated"),
    "fused modules apart": (
        "overrides: [{match: model.layers.0.self_attn.q_proj, scheme: skip}]\n" + RTN, "must share one scheme",
    ),
    "everything ignored": ("ignore: ['re:.*']\n" + RTN, "nothing is left to quantize"),
}  # fmt: skip

ARGUMENTS: dict[str, tuple[list[str], int, str]] = {
    "unknown command": (["quantise", "model"], 2, "no such command 'quantise', did you mean 'quantize'?"),
    "unknown option": (["quantize", "model", "--qualty", "fast"], 2, "did you mean '--quality'?"),
    "no model": (["quantize"], 2, "missing argument 'MODEL'"),
    "no out": (["quantize", "model"], 2, "--out DIR"),
    "two models": (["quantize", "model", "model", "-o", "out"], 2, "unexpected extra argument"),
    "option without value": (["quantize", "model", "--out"], 2, "--out"),
    "unknown scheme": (["quantize", "model", "-o", "out", "--scheme", "w4a61"], 2, "did you mean 'w4a16'?"),
    "unknown quality": (["quantize", "model", "-o", "out", "--quality", "bets"], 2, "did you mean 'best'?"),
    "group size": (["quantize", "model", "-o", "out", "--group-size", "48"], 2, "--group-size"),
    "missing recipe": (["quantize", "model", "-o", "out", "--recipe", "r.yaml"], 2, "no such recipe file"),
    "samples not a number": (["quantize", "model", "-o", "out", "--samples", "some"], 2, "nor 'all'"),
    "no samples": (["quantize", "model", "-o", "out", "--samples", "0"], 2, "--samples"),
    "short blocks": (["quantize", "model", "-o", "out", "--seq-len", "4"], 2, "--seq-len"),
    "blocks beyond the context": (["quantize", "model", "-o", "out", "--seq-len", "1024"], 2, "the model's 512"),
    "negative seed": (["quantize", "model", "-o", "out", "--seed", "-1"], 2, "--seed"),
    "unknown device": (["quantize", "model", "-o", "out", "--device", "tpu"], 2, "'tpu' is neither auto, cpu, cuda"),
    "size without number": (["quantize", "model", "-o", "out", "--max-shard-size", "big"], 2, "is not a size such as"),
    "tiny shards": (["quantize", "model", "-o", "out", "--max-shard-size", "1kB"], 2, "is not between"),
    "recipe and scheme": (
        ["quantize", "model", "-o", "out", "--recipe", "w4a16-rtn", "--scheme", "w8a8"], 2, "leave out --scheme",
    ),
    "unknown recipe": (["quantize", "model", "-o", "out", "--recipe", "w4a16-rnt"], 2, "did you mean 'w4a16-rtn'?"),
    "recipe folder": (["quantize", "model", "-o", "out", "--recipe", "model"], 2, "a folder, not a recipe file"),
    "asymmetric w8a8": (["quantize", "model", "-o", "out", "--scheme", "w8a8", "--asymmetric"], 2, "w4a16 only"),
    "grouped w8a8": (["quantize", "model", "-o", "out", "--scheme", "w8a8", "--group-size", "64"], 2, "use channel"),
    "no calibration file": (["quantize", "model", "-o", "out", "--calibration", "no.txt"], 6, "no.txt"),
    "calibration of a wrong kind": (["quantize", "model", "-o", "out", "--calibration", "data.csv"], 6, "data.csv"),
    "split of nothing": (["quantize", "model", "-o", "out", "--split", "train"], 2, "--calibration"),
    "out exists": (["quantize", "model", "-o", "taken"], 7, "exists already"),
    "out is somebody's": (["quantize", "model", "-o", "taken", "--force"], 7, "not a checkpoint folder"),
    "out in a file": (["quantize", "model", "-o", "file.txt/out"], 7, "is a file"),
    "out is the source": (["quantize", "model", "-o", "model", "--force"], 2, "must lie apart"),
    "out inside the source": (["quantize", "model", "-o", "model/out"], 2, "must lie apart"),
    "out around the source": (["quantize", "model", "-o", ".", "--force"], 2, "must lie apart"),
    "inspect nothing": (["inspect"], 2, "missing argument 'DIR'"),
    "inspect a file": (["inspect", "file.txt"], 4, "file.txt"),
    "inspect a folder of text": (["inspect", "taken"], 4, "config.json"),
    "show an unknown recipe": (["recipes", "show", "w8a8-gtpq"], 2, "did you mean 'w8a8-gptq'?"),
    "unknown recipes command": (["recipes", "validat", "x"], 2, "did you mean 'validate'?"),
    "validate a missing file": (["recipes", "validate", "no.yaml"], 2, "no such recipe file"),
    "doctor with an argument": (["doctor", "now"], 2, "unexpected extra argument"),
}  # fmt: skip


def contents(folder: Path) -> dict[str, str]:
    """Every path under `folder` with a digest of what it holds."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


def assert_refused(cli: Any, here: Path, arguments: list[str], code: int, fragment: str) -> None:
    """Run a command line that must fail without a trace."""
    before = contents(here)
    ran = cli(*arguments)
    assert ran.code == code, ran.err
    assert len(ran.lines) == 1, ran.err
    assert ran.lines[0].startswith("error: QL")
    assert fragment in ran.lines[0]
    assert ran.out == ""
    assert contents(here) == before


@pytest.mark.parametrize("kind", FILES)
def test_bad_checkpoint_is_refused(kind: str, cli: Any, models: Any, here: Path) -> None:
    build, code, fragment = FILES[kind]
    assert_refused(cli, here, ["quantize", str(build(models)), "--out", "out"], code, fragment)


@pytest.mark.parametrize("kind", RECIPES)
def test_bad_recipe_is_refused(kind: str, cli: Any, model: Path, here: Path) -> None:
    text, fragment = RECIPES[kind]
    (here / "r.yaml").write_text(text)
    assert_refused(cli, here, ["quantize", "model", "--out", "out", "--recipe", "r.yaml"], 2, fragment)


@pytest.mark.parametrize("kind", ARGUMENTS)
def test_bad_argument_is_refused(kind: str, cli: Any, model: Path, here: Path) -> None:
    arguments, code, fragment = ARGUMENTS[kind]
    (here / "taken").mkdir()
    (here / "taken" / "diary.txt").write_text("mine")
    (here / "file.txt").write_text("text")
    (here / "data.csv").write_text("a,b")
    assert_refused(cli, here, arguments, code, fragment)


def test_group_size_that_does_not_divide_names_those_that_do(cli: Any, models: Any, here: Path) -> None:
    models.sound(intermediate_size=96)
    assert_refused(cli, here, ["quantize", "model", "--out", "out"], 2, "group sizes that fit: 32, channel")


def test_recipe_of_a_megabyte_is_refused(cli: Any, model: Path, here: Path) -> None:
    (here / "r.yaml").write_text("# " + "x" * 1_000_001)
    assert_refused(cli, here, ["quantize", "model", "-o", "out", "--recipe", "r.yaml"], 2, "larger than 1,000,000")


def test_recipe_that_is_not_text_is_refused(cli: Any, model: Path, here: Path) -> None:
    (here / "r.yaml").write_bytes(b"\xff\xfe\x00")
    assert_refused(cli, here, ["recipes", "validate", "r.yaml"], 2, "not UTF-8 text")


def test_hostile_tensor_name_cannot_write_to_the_terminal(cli: Any, models: Any, here: Path) -> None:
    models.with_tensor("model.\x1b[31mred", "BF16", (4,))
    ran = cli("quantize", "model", "--out", "out")
    assert ran.code == 4
    assert len(ran.lines) == 1
    assert "\x1b" not in ran.err


def test_disk_without_room_is_refused_before_work(
    cli: Any, model: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("quantlab.cli.preflight.shutil.disk_usage", lambda path: usage)
    assert_refused(cli, here, ["quantize", "model", "--out", "out"], 7, "has 1 kB free")
