"""The OpenAPI document: what each route answers, with the schemas of the bodies that are really sent.

Knows nothing about what the routes do.
"""

from typing import Any, Final

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from quantlab import __version__
from quantlab.server.errors import ErrorBody
from quantlab.server.responses import BODIES, Status

ERRORS: Final = {
    400: "The request cannot be meant.",
    401: "An API key is wanted.",
    403: "The server may not be asked by this name.",
    404: "There is no such model.",
    408: "The body came too slowly.",
    413: "The body is too large.",
    415: "The body is not JSON by its type.",
    429: "The queue is full; Retry-After says when to come again.",
    500: "The engine or the server failed.",
    503: "The server takes no work now; Retry-After says when to come again.",
}
READS_A_BODY: Final = (400, 404, 408, 413, 415, 503)
GENERATES: Final = (*READS_A_BODY, 429)
REFERENCE: Final = "#/components/schemas/{name}"
Documented = dict[int | str, dict[str, Any]]


def answers(kind: type[msgspec.Struct], *errors: int, streamed: type[msgspec.Struct] | None = None) -> Documented:
    """What a route answers: a body of `kind`, events of `streamed`, and `errors` beside those of every route."""
    content: dict[str, Any] = {"application/json": {"schema": _reference(kind)}}
    if streamed is not None:
        # Each event is `data: ` and a body of this kind; the last of a whole answer is `data: [DONE]`.
        content["text/event-stream"] = {"schema": {"type": "string", "x-event": _reference(streamed)}}
    return {200: {"description": "Done.", "content": content}, **_errors(errors)}


def answers_text() -> Documented:
    """What a route answers that gives plain text."""
    content = {"text/plain": {"schema": {"type": "string"}}}
    return {200: {"description": "Done.", "content": content}, **_errors(())}


def answers_status() -> Documented:
    """What the routes for health answer: 200 and 503 have the same body."""
    content = {"application/json": {"schema": _reference(Status)}}
    status: Documented = {503: {"description": "No.", "content": content}}
    return {200: {"description": "Yes.", "content": content}, **_errors((), always=(403,)), **status}


def describe(app: FastAPI) -> dict[str, Any]:
    """The document of `app`: FastAPI's, with our bodies and without the status that it would give wrong fields."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=__version__, routes=app.routes)
        for path in document["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        _, components = msgspec.json.schema_components([*BODIES, ErrorBody], ref_template=REFERENCE)
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        schemas.update(components)
        for unused in ("HTTPValidationError", "ValidationError"):
            schemas.pop(unused, None)
        app.openapi_schema = document
    return app.openapi_schema


def _errors(statuses: tuple[int, ...], always: tuple[int, ...] = (401, 403, 500)) -> Documented:
    content = {"application/json": {"schema": _reference(ErrorBody)}}
    return {status: {"description": ERRORS[status], "content": content} for status in sorted({*statuses, *always})}


def _reference(kind: type[msgspec.Struct]) -> dict[str, str]:
    return {"$ref": REFERENCE.format(name=kind.__name__)}
