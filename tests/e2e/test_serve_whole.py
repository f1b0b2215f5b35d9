"""The whole path on the shipped model, command by command as a user types them: quantize, judge, serve, ask, stop."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.e2e.served import REPOSITORY, SMALL, serving


def quantlab(*words: object) -> str:
    """What a command prints; it must succeed."""
    environment = os.environ | {"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'kernels'}"}
    command = [sys.executable, "-m", "quantlab", *map(str, words)]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_quantize_judge_serve_ask_scrape_stop(books_5m: Path, tmp_path: Path) -> None:
    packed = tmp_path / "books-5m-w4a16"
    quantlab("quantize", books_5m, "--out", packed, "--quality", "fast", "--samples", 8, "--seq-len", 256)
    gate = tmp_path / "gate.yaml"
    gate.write_text("require:\n  - {metric: kl.mean, max: 0.5}\n")
    words = ("--tokens", 2048, "--window", 256, "--gate", gate, "--no-cache", "--json")
    report = json.loads(quantlab("eval", packed, "--baseline", books_5m, *words))
    assert report["gate"]["verdict"] == "pass"
    with serving(packed, *SMALL) as served:
        assert "int4" in str(served.ready).lower() and served.ready["weight_bytes"] < 7e6
        with served.client() as client:
            (card,) = client.models.list()
            assert card.id == "books-5m-w4a16"
            asked = {
                "model": card.id,
                "prompt": "The captain looked at the sea and",
                "max_tokens": 24,
                "temperature": 0.0,
            }
            answer = client.completions.create(**asked)
            stream = client.completions.create(**asked, stream=True)
            assert "".join(chunk.choices[0].text for chunk in stream) == answer.choices[0].text
        # The offline command goes through the same engine: the same weights give the same words.
        told = quantlab("generate", packed, "--prompt", asked["prompt"], "--max-tokens", 24, "--temperature", 0)
        assert answer.choices[0].text.strip() in told
        counts = served.metrics()
        assert (counts["generation_tokens_total"], counts["request_success_total"]) == (48, 2)
        assert counts["time_to_first_token_seconds_count"] == 2
        load = json.loads(
            quantlab(
                "bench",
                "serve",
                "--base-url",
                f"{served.url}/v1",
                "--concurrency",
                "4",
                "-n",
                8,
                "--input",
                30,
                "--output",
                8,
                "--json",
            )  # fmt: skip
        )
        assert load["levels"][0]["succeeded"] == 8 and load["levels"][0]["output_tokens"] == 64
        assert served.terminate()[0] == 0
