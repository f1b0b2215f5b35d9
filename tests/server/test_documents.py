"""The OpenAPI document says what the server does."""

from typing import Any

import jsonschema
import pytest
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012

from tests.server.serving import Server


@pytest.fixture(scope="module")
def document(server: Server) -> Any:
    return server.http.get("/openapi.json").json()


def assert_fits(document: Any, name: str, body: Any) -> None:
    """`body` fits the document's schema `name`."""
    registry = Registry().with_resource("urn:api", Resource(document, DRAFT202012))
    schema = {"$ref": f"urn:api#/components/schemas/{name}"}
    jsonschema.Draft202012Validator(schema, registry=registry).validate(body)


def test_every_route_is_there_with_every_status_it_has(document: Any) -> None:
    generating = document["paths"]["/v1/completions"]["post"]["responses"]
    assert set(generating) == {"200", "400", "401", "403", "404", "408", "413", "415", "429", "500", "503"}
    for path in ("/v1/chat/completions", "/v1/models", "/tokenize", "/detokenize", "/health", "/ready", "/metrics"):
        assert path in document["paths"]
    assert "/" not in document["paths"]


def test_no_status_is_named_that_never_comes(document: Any) -> None:
    statuses = {code for path in document["paths"].values() for way in path.values() for code in way["responses"]}
    assert "422" not in statuses


@pytest.mark.parametrize(
    ("name", "path"), [("ModelList", "/v1/models"), ("Status", "/health"), ("Version", "/version")]
)
def test_what_is_there_fits(server: Server, document: Any, name: str, path: str) -> None:
    assert_fits(document, name, server.http.get(path).json())


def test_answers_and_refusals_fit(server: Server, document: Any) -> None:
    assert_fits(document, "Completion", server.complete("It was", max_tokens=2, logprobs=1, echo=True).json())
    assert_fits(document, "ErrorBody", server.complete("It was", max_tokens=-2).json())
    assert_fits(document, "Tokenized", server.post("/tokenize", {"prompt": "It was", "return_token_strs": True}).json())
    assert_fits(document, "Detokenized", server.post("/detokenize", {"tokens": [5, 6]}).json())


def test_bounds_are_in_the_document(document: Any) -> None:
    fields = document["components"]["schemas"]["CompletionBody"]["properties"]
    bounds = next(choice for choice in fields["temperature"]["anyOf"] if choice["type"] == "number")
    assert (bounds["minimum"], bounds["maximum"]) == (0, 2)
    assert document["components"]["schemas"]["CompletionBody"]["additionalProperties"] is False
