"""schemathesis against the server's own OpenAPI document, sound and unsound requests: never a 5xx, every answer as
documented, and the next request is served. QUANTLAB_FUZZ_EXAMPLES asks for more (`make bench-fuzz`)."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.e2e.conftest import TEMPLATE
from tests.e2e.served import SMALL, serving, until

EXAMPLES = int(os.environ.get("QUANTLAB_FUZZ_EXAMPLES", "60"))
# The first goes through every bound of every field by itself, which makes a thousand cases of any number of examples.
PHASES = "coverage,fuzzing" if EXAMPLES >= 100 else "fuzzing"
CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance,"
    "response_schema_conformance,negative_data_rejection"
)


def fuzz(url: str, out: Path, seed: int) -> dict[str, Any]:
    """Run schemathesis as its user would; its report."""
    program = str(Path(sys.executable).with_name("st"))
    command = [program, "run", f"{url}/openapi.json", "--mode", "all", "--phases", PHASES]
    command += ["--checks", CHECKS, "-n", str(EXAMPLES), "--seed", str(seed), "--continue-on-failure", "--no-color"]
    command += [
        "--request-timeout",
        "120",
        "--generation-database",
        "none",
        "--report",
        "json",
        "--report-dir",
        str(out),
        "--warnings",
        "off",
    ]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=out)
    found = list(out.glob("*.json"))
    assert len(found) == 1, ran.stdout + ran.stderr
    report: dict[str, Any] = json.loads(found[0].read_text())
    assert report["exit_code"] == 0 and not report["errors"], ran.stdout
    return report


def test_no_request_whatever_brings_a_server_error(books_5m: Path, tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text(TEMPLATE)
    out = tmp_path / "found"
    out.mkdir()
    words = ("--max-model-len", "64", "--max-queue", "4096", "--chat-template", str(template))
    with serving(books_5m, *SMALL, *words) as served:
        before = served.http.post("/v1/completions", json={"prompt": "Once", "max_tokens": 5, "temperature": 0}).json()
        report = fuzz(served.url, out, seed=EXAMPLES)
        assert report["operations"]["tested"] == report["operations"]["total"] >= 8
        assert report["test_cases"]["generated"] >= (2000 if EXAMPLES >= 100 else 300)
        assert report["failures"] == []
        until(lambda: served.metrics()["num_requests_running"] == served.metrics()["num_requests_waiting"] == 0)
        after = served.http.post("/v1/completions", json={"prompt": "Once", "max_tokens": 5, "temperature": 0}).json()
        assert after["choices"] == before["choices"]
        code, told = served.terminate()
        assert (code, "Traceback" in told) == (0, False), told
