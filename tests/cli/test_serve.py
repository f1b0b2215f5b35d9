"""`quantlab serve` up to the moment when it serves: what is refused before, and what it shows when it is ready."""

import socket
from pathlib import Path
from typing import Any

import pytest

from quantlab.cli.serve import guarded
from quantlab.cli.serve_view import Shown, base_url_of, curl, show_ready
from quantlab.runtime.options import EngineInfo, EngineOptions
from quantlab.server.admission import QueueLimits
from quantlab.server.options import ServeOptions

INFO = EngineInfo(
    model="m", architecture="LlamaForCausalLM", scheme="w4a16 g128", device="cuda:0", dtype="bfloat16",
    weight_bytes=5_200_000_000, kv_dtype="int8", kv_bytes=90_000_000_000, block_size=16, num_blocks=60_000,
    max_model_len=8192, max_num_seqs=256, max_batch_tokens=8192, vocab_size=128_256, eos_token_ids=(2,),
    kernels=("qkv, o: w4a16 (64 layers)", "lm_head: torch bfloat16"), startup_seconds=9.0,
)  # fmt: skip


def options(**changes: Any) -> ServeOptions:
    return ServeOptions(Path("m"), ("m",), EngineOptions(), QueueLimits(1, 1), **changes)


def test_a_folder_without_a_checkpoint_is_refused(cli: Any, tmp_path: Path) -> None:
    ran = cli("serve", tmp_path)
    assert (ran.code, ran.out, len(ran.lines)) == (4, "", 1)
    assert "config.json" in ran.err


def test_a_model_of_the_hub_is_told_how_to_fetch_it(cli: Any, here: Path) -> None:
    ran = cli("serve", "meta-llama/Llama-3.2-1B")
    assert (ran.code, len(ran.lines)) == (4, 1)
    assert "hf download meta-llama/Llama-3.2-1B --local-dir Llama-3.2-1B" in ran.err


def test_a_port_that_is_taken_is_refused_before_anything_is_loaded(cli: Any, books_5m: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ran = cli("serve", books_5m, "--port", taken.getsockname()[1])
    assert (ran.code, len(ran.lines)) == (14, 1)
    assert "QL1402" in ran.err and "--port" in ran.err


def test_a_host_that_is_none_is_refused(cli: Any, books_5m: Path) -> None:
    for host in ("no such host", "192.0.2.1"):  # an address for documentation, which no machine has
        ran = cli("serve", books_5m, "--host", host, "--port", 0)
        assert ran.code == 14 and "--host 127.0.0.1" in ran.err and "another --port" not in ran.err


def test_keys_that_cannot_be_read_are_refused(cli: Any, books_5m: Path, tmp_path: Path) -> None:
    ran = cli("serve", books_5m, "--api-key-file", tmp_path / "none", "--port", 0)
    assert (ran.code, len(ran.lines)) == (2, 1)
    assert ran.err.endswith("none: cannot read the API keys: No such file or directory\n")


def test_a_missing_extra_is_told_with_its_command(cli: Any, books_5m: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    ran = cli("serve", books_5m)
    assert ran.code == 3
    assert "fastapi" in ran.err and "pip install 'quantlab[serve]'" in ran.err


def test_the_screen_says_what_is_served_and_how_to_ask(capsys: pytest.CaptureFixture[str]) -> None:
    show_ready(INFO, Shown("llama", "http://127.0.0.1:8000", keyed=True, can_chat=False, seconds=12.0))
    shown = capsys.readouterr().out
    for part in (
        "llama", "w4a16 g128", "5.2 GB", "cuda:0", "60000 blocks of 16", "960k tokens", "117.2 requests of 8192",
        "lm_head: torch bfloat16", "/v1/chat/completions", "no chat template", "12s", "with a key", "curl http",
    ):  # fmt: skip
        assert part in shown, part
    assert len(shown.splitlines()) < 24


def test_the_command_to_paste_survives_a_shell() -> None:
    command = curl("it's", "http://127.0.0.1:8000", keyed=False)
    assert "it'\"'\"'s" in command and "Authorization" not in command


@pytest.mark.parametrize(
    ("bound", "url"),
    [
        (("127.0.0.1", 80), "http://127.0.0.1:80"),
        (("0.0.0.0", 80), "http://127.0.0.1:80"),
        (("::1", 80), "http://[::1]:80"),
        (("::", 80), "http://[::1]:80"),
    ],
)
def test_the_url_is_one_that_this_machine_can_ask(bound: tuple[str, int], url: str) -> None:
    assert base_url_of(bound) == url


def test_an_open_server_on_loopback_answers_to_this_machines_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert guarded(options(), "127.0.0.1").allowed_hosts == ()
    assert guarded(options(allowed_hosts=("box",)), "::1").allowed_hosts == ("box",)
    assert guarded(options(api_keys=("key-key-key",)), "127.0.0.1").allowed_hosts is None
    assert capsys.readouterr().err == ""
    assert guarded(options(), "0.0.0.0").allowed_hosts is None
    assert "--api-key-file" in capsys.readouterr().err
