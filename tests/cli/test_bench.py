"""`quantlab bench` from its arguments to its files and exit codes, against a scripted server."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.bench.openai_script import Script, serving


def test_a_load_test_prints_tables_and_writes_its_files(cli: Any, here: Path) -> None:
    with serving(Script(gap=0.001)) as script:
        ran = cli("bench", "serve", "--base-url", script.url, "--concurrency", "1,4", "-n", "8", "--output", "3:5",
                  "--input", "40", "--ttft", "500", "--out", "load")  # fmt: skip
    assert ran.code == 0
    assert [line.split(":")[0] for line in ran.lines] == ["1 concurrent", "4 concurrent"]
    assert "8 of 8" in ran.out and "within limits" in ran.out and "written  load/load.json" in ran.out
    read = json.loads((here / "load" / "load.json").read_text())
    assert [level["concurrency"] for level in read["levels"]] == [1, 4]
    assert "<h1>" in (here / "load" / "load.html").read_text()


def test_json_is_one_object(cli: Any) -> None:
    with serving(Script()) as script:
        ran = cli("bench", "serve", "--base-url", script.url, "--rate", "500", "-n", "5", "--chat", "--json")
    read = json.loads(ran.out)
    assert (read["levels"][0]["succeeded"], read["options"]["target"]["api"]) == (5, "chat")


def test_the_key_may_come_from_the_environment(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTLAB_API_KEY", "s3cret")
    with serving(Script(key="s3cret")) as script:
        ran = cli("bench", "serve", "--base-url", script.url, "--concurrency", "2", "-n", "2", "--json")
    assert ran.code == 0 and "s3cret" not in ran.out


def test_nobody_there_is_one_line_and_its_own_code(cli: Any) -> None:
    ran = cli("bench", "serve", "--base-url", "http://127.0.0.1:9/v1", "--concurrency", "1")
    assert ran.code == 13 and ran.lines[0].startswith("error: QL1301 http://127.0.0.1:9/v1: cannot be reached")


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--concurrency", "1", "--rate", "1"],
        ["--concurrency", "none"],
        ["--concurrency", "1", "--input", "0"],
        ["--concurrency", "1", "--base-url", "nowhere"],
        ["--concurrency", "1", "--shared-prefix", "5", "--prompts", "x.txt"],
    ],
)
def test_what_cannot_be_meant_is_said_before_anything_is_sent(words: list[str], cli: Any) -> None:
    ran = cli("bench", "serve", *words)
    assert ran.code == 2 and len(ran.lines) == 1


def test_a_file_of_prompts_that_is_not_there(cli: Any, here: Path) -> None:
    with serving(Script()) as script:
        ran = cli("bench", "serve", "--base-url", script.url, "--concurrency", "1", "--prompts", "none.jsonl")
    assert ran.code == 6 and "none.jsonl" in ran.err


def test_kernels_need_a_gpu_and_a_known_name(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    ran = cli("bench", "kernels", "--only", "w8a8")
    assert ran.code == 3 and len(ran.lines) == 1
    assert ran.lines[0].startswith("error: QL0301 quantlab bench kernels: no CUDA GPU; try: ")
    ran = cli("bench", "kernels", "--only", "w4a16,nothing")
    assert ran.code == 2 and "no bench is called 'nothing'" in ran.lines[0]


def test_the_engine_alone_is_measured_on_random_weights(cli: Any, here: Path) -> None:
    ran = cli("bench", "offline", "--shape", "tiny", "--setups", "int4+kv8", "--cases", "workload", "--workloads",
              "12/3x4", "--device", "cpu", "--max-model-len", "64", "--out", "rows.jsonl")  # fmt: skip
    assert ran.code == 0
    rows = [json.loads(line) for line in ran.out.splitlines()]
    assert [(row["setup"], row["case"]) for row in rows] == [("int4+kv8", "build"), ("int4+kv8", "workload")]
    assert rows == [json.loads(line) for line in (here / "rows.jsonl").read_text().splitlines()]
    assert "int4+kv8: 12/3 x 4" in ran.err


def test_what_the_engines_bench_does_not_know_is_refused_by_name(cli: Any) -> None:
    for option, value in (("--setups", "int3"), ("--cases", "fast"), ("--workloads", "1x1"), ("--shape", "gpt-5")):
        ran = cli("bench", "offline", "--device", "cpu", option, value)
        assert ran.code == 2 and f"QL0002 {option}" in ran.lines[0]
