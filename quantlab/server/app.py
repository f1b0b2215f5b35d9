"""The application: its routes behind the gate, every error in OpenAI's shape, the OpenAPI document.

Knows nothing about what the routes do.
"""

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp

from quantlab import __version__
from quantlab.server.auth import Keys
from quantlab.server.documents import describe
from quantlab.server.errors import ApiError, invalid, unexpected
from quantlab.server.gate import Gate
from quantlab.server.hosts import Hosts
from quantlab.server.protocol import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody, fields_of
from quantlab.server.routes import add_generation, add_models, add_page, add_state, add_tokens
from quantlab.server.service import Service

BODIES: dict[str, type[BaseModel]] = {
    "/v1/completions": CompletionBody,
    "/v1/chat/completions": ChatBody,
    "/tokenize": TokenizeBody,
    "/detokenize": DetokenizeBody,
}
CODES = {400: "invalid_json", 404: "not_found", 405: "method_not_allowed"}


def create_app(service: Service) -> ASGIApp:
    """The application behind its gate."""
    # No documentation pages: they would load scripts from elsewhere. /openapi.json is there.
    app = FastAPI(title="quantlab", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    for add in (add_generation, add_models, add_tokens, add_state):
        add(app, service)
    add_page(app)
    _add_errors(app)
    app.openapi = lambda: describe(app)  # type: ignore[method-assign]
    options = service.options
    return Gate(app, Keys(options.api_keys), Hosts(options.allowed_hosts), service.metrics, BODIES)


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid_body(request: Request, error: RequestValidationError) -> Response:
        body = BODIES.get(request.url.path)
        return invalid(error.errors(), fields_of(body) if body else []).response()

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        return _told(request, error).response()

    @app.exception_handler(Exception)
    async def fault(request: Request, error: Exception) -> Response:
        return unexpected().response()


def _told(request: Request, error: HTTPException) -> ApiError:
    path, status = request.url.path, error.status_code
    messages = {404: f"there is no {path} here", 405: f"{path} has no {request.method}"}
    answer = ApiError(status, messages.get(status, str(error.detail)), code=CODES.get(status))
    answer.headers.update(error.headers or {})
    return answer
