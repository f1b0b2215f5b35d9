"""Keys: what opens the server, what does not, and where they come from."""

import base64
from pathlib import Path

import pytest

from quantlab.errors import UsageError
from quantlab.server.auth import Keys, read_keys
from tests.server.conftest import Start

KEY, OTHER = "correct-horse-battery", "staple-staple-staple"


def basic(key: str) -> bytes:
    return b"Basic " + base64.b64encode(f"anyone:{key}".encode())


@pytest.mark.parametrize("header", [f"Bearer {KEY}".encode(), f"bearer  {KEY} ".encode(), basic(KEY), basic(OTHER)])
def test_every_key_opens(header: bytes) -> None:
    assert Keys((KEY, OTHER)).opens(header)


@pytest.mark.parametrize(
    "header", [None, b"", b"Bearer", b"Bearer ", b"Bearer wrong", KEY.encode(), b"Basic !!", basic(""), b"\xff\xfe"]
)
def test_nothing_else_does(header: bytes | None) -> None:
    assert not Keys((KEY, OTHER)).opens(header)


def test_keys_come_from_a_file_and_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# ours\n{KEY}\n\n  {OTHER}\n")
    assert read_keys(file, f"{KEY}, another-key") == (KEY, "another-key", OTHER)
    assert read_keys(None, None) == ()


@pytest.mark.parametrize("text", ["", "# none\n", "short\n", "with a space in it\n", "ünïcode-key\n"])
def test_a_file_without_good_keys_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(UsageError, match="key"):
        read_keys(file, None)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read"):
        read_keys(tmp_path / "none", None)


def test_every_route_but_health_wants_the_key(start: Start) -> None:
    server = start(api_keys=[KEY])
    for path in ("/health", "/ready"):
        assert server.http.get(path).status_code == 200
    closed = ["/v1/models", "/metrics", "/version", "/openapi.json", "/nothing", "/", "/page.js"]
    for path in closed:
        refused = server.http.get(path)
        assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key"), path
    assert server.http.get("/").headers["www-authenticate"].startswith("Basic")
    assert server.http.get("/v1/models").headers["www-authenticate"] == "Bearer"
    assert server.complete("a").status_code == 401
    server.http.headers["authorization"] = f"Bearer {KEY}"
    assert server.complete("a").status_code == 200
    assert server.http.get("/").status_code == 200
