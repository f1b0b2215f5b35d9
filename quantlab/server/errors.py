"""Refusals and failures as OpenAI's clients read them: a status and {"error": {message, type, param, code}}.

Knows nothing about routes or engines.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec
from starlette.responses import Response

from quantlab.errors import did_you_mean, printable

UNIONS: Final = {
    "prompt": "a text, a list of texts, a list of token ids, or a list of such lists",
    "stop": "a text or a list of texts",
    "content": "a text or a list of text parts",
}
MESSAGE_CHARS: Final = 1000
PARAM_CHARS: Final = 100
TYPES: Final = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error", 503: "overloaded_error"}


class ErrorDetail(msgspec.Struct):
    """What went wrong: `param` is the field to blame, `code` a word that programs compare."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct):
    """The body of every answer that is not a success."""

    error: ErrorDetail


class ApiError(Exception):
    """An answer that is not a success; `retry_after` in seconds tells the client when to come again."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.headers: dict[str, str] = {} if retry_after is None else {"retry-after": str(retry_after)}

    def body(self) -> bytes:
        """The JSON of the answer; a client's own words in it are cut and escaped."""
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        message = printable(str(self))
        if len(message) > MESSAGE_CHARS:
            message = f"{message[:MESSAGE_CHARS]}..."
        return msgspec.json.encode(ErrorBody(ErrorDetail(message, kind, self.param, self.code)))

    def response(self) -> Response:
        """The answer."""
        return Response(self.body(), self.status, self.headers, media_type="application/json")


def unexpected() -> ApiError:
    """The answer to what nobody foresaw."""
    return ApiError(500, "the server failed; its log says why", code="internal_error")


def invalid(errors: Sequence[Mapping[str, Any]], fields: Sequence[str]) -> ApiError:
    """The answer to a body that does not fit its model: the first fault, by the name of its field.

    `errors` are pydantic's; `fields` are the names that the route knows, for the nearest one to a mistyped.
    """
    error = _plainest(errors)
    place = [str(part) for part in error["loc"] if part != "body"]
    param = printable(place[0])[:PARAM_CHARS] if place else None
    if error["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {error['ctx']['error']}", code="invalid_json")
    if error["type"] == "extra_forbidden":
        name = ".".join(place)
        near = did_you_mean(name, fields) if len(place) == 1 else ""
        return ApiError(
            400, f"the parameter '{name}' is not supported{near}", code="unsupported_parameter", param=param
        )
    if _means_nothing(error):
        told = f"{'.'.join(place)} is not supported by this server: leave it out"
        return ApiError(400, told, code="unsupported_parameter", param=param)
    if error["type"] == "missing":
        name = ".".join(place) or "body"
        return ApiError(400, f"the parameter '{name}' is missing", code="missing_required_parameter", param=param)
    if error["type"].endswith("_type") and (wanted := next((UNIONS[part] for part in place if part in UNIONS), None)):
        return ApiError(400, f"{param} must be {wanted}", code="invalid_value", param=param)
    message = error["msg"].removeprefix("Value error, ")
    if not place and error["type"] == "model_attributes_type":
        message = "must be a JSON object"
    return ApiError(400, f"{'.'.join(place) or 'body'}: {message}", code="invalid_value", param=param)


def _means_nothing(error: Mapping[str, Any]) -> bool:
    """Whether the field takes nothing but null or an empty list: one that this server does not carry out."""
    return error["type"] == "none_required" or (error["type"] == "too_long" and error["ctx"]["max_length"] == 0)


def _plainest(errors: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Of a value that fits no member of a union, pydantic tells what each member says: one that speaks of the value
    itself says more than one that speaks of its type."""
    first = errors[0]
    same = [error for error in errors if error["loc"][:2] == first["loc"][:2]]
    return next((error for error in same if not error["type"].endswith(("_type", "none_required"))), first)
