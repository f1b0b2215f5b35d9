"""What a load test found, as plain values for JSON, with all that is needed to read them.

Knows nothing about HTTP or how results are shown.
"""

import json
import os
import platform
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import quantlab
from quantlab.bench.serve_options import LoadOptions
from quantlab.bench.serve_prompts import Rate
from quantlab.bench.serve_summary import LevelResult

SCHEMA = "quantlab.bench.serve/1"


@dataclass(frozen=True, slots=True)
class Server:
    """What the server said of itself: the model that answered, its card from /v1/models, and /version if it has one."""

    model: str
    card: dict[str, Any]
    version: str


@dataclass(frozen=True, slots=True)
class LoadResult:
    """A load test: what was asked, of whom, from where, and each level's figures."""

    options: LoadOptions
    server: Server
    tokens_per_word: Rate
    levels: tuple[LevelResult, ...]
    created: str

    def as_json(self) -> dict[str, Any]:
        """Everything as plain values; the API key is not among them."""
        asked = asdict(self.options)
        asked["target"].pop("api_key")
        asked["work"]["prompts"] = None if self.options.work.prompts is None else str(self.options.work.prompts)
        return {
            "schema": SCHEMA,
            "created": self.created,
            "quantlab": quantlab.__version__,
            "client": client(),
            "options": asked,
            "server": asdict(self.server),
            "tokens_per_word": asdict(self.tokens_per_word),
            "levels": [level.as_json() for level in self.levels],
        }

    def to_json(self) -> str:
        """The result as one JSON document."""
        return json.dumps(self.as_json(), ensure_ascii=False, allow_nan=False)


def client() -> dict[str, Any]:
    """The machine that sent the load."""
    return {"python": platform.python_version(), "machine": platform.machine(), "cores": os.cpu_count()}


def now() -> str:
    """This moment, to the second, in UTC."""
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
