"""The page at `/`: its files as they are sent, and the headers that keep a browser from fetching anything else.

Knows nothing about what the page shows.
"""

from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Final

MEDIA: Final = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
}
ROUTES: Final = {
    "/": "index.html",
    "/page.css": "page.css",
    "/page.js": "page.js",
    "/chat.js": "chat.js",
    "/plots.js": "plots.js",
}
POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
HEADERS: Final = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True, slots=True)
class Asset:
    """One file of the page."""

    media_type: str
    content: bytes


@cache
def assets() -> dict[str, Asset]:
    """Each route of the page with its file."""
    folder = files("quantlab.server").joinpath("page")
    return {
        route: Asset(MEDIA[name.rpartition(".")[2]], folder.joinpath(name).read_bytes())
        for route, name in ROUTES.items()
    }
