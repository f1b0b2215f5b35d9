"""Which names a server answers to."""

import pytest

from quantlab.server.errors import ApiError
from quantlab.server.hosts import Hosts
from tests.server.conftest import Start

OWN = [b"localhost", b"LOCALHOST:8000", b"127.0.0.1:8000", b"127.8.8.8", b"[::1]:8000", b"[::1]", None]
OTHERS = [
    b"evil.example",
    b"evil.example:8000",
    b"10.0.0.7",
    b"localhost.evil.example",
    b"127.0.0.1.nip.io",
    b"",
    b"\xff",
]


@pytest.mark.parametrize("header", OWN)
def test_the_names_of_this_machine_are_let_in(header: bytes | None) -> None:
    assert Hosts(()).check(header) is None


@pytest.mark.parametrize("header", OTHERS)
def test_other_names_are_not_unless_they_are_allowed(header: bytes) -> None:
    with pytest.raises(ApiError) as error:
        Hosts(()).check(header)
    assert error.value.status == 403
    assert Hosts(None).check(header) is None


def test_an_allowed_name_is_let_in_whatever_its_case_and_port() -> None:
    assert Hosts(("My.Box",)).check(b"my.box:80") is None


def test_a_page_under_another_name_is_told_nothing(start: Start) -> None:
    server = start(allowed_hosts=["my.box"])
    refused = server.http.get("/v1/models", headers={"host": "evil.example"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "host_not_allowed")
    assert server.http.get("/v1/models", headers={"host": "my.box"}).status_code == 200
