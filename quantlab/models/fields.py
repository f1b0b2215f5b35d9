"""Read single values out of untrusted JSON: every number has bounds, every refusal names the key.

Knows nothing about models; `config` and `rope_config` say which keys there are and what they mean.
"""

from dataclasses import dataclass
from typing import Any

from quantlab.errors import CheckpointError

MISSING: Any = object()


@dataclass(frozen=True, slots=True)
class Fields:
    """A JSON object and where it stands; a `default` of MISSING makes a key required, null counts as missing."""

    raw: dict[str, Any]
    where: str

    def integer(self, key: str, low: int, high: int, default: Any = MISSING) -> int:
        """The whole number at `key` within [low, high]; raises CheckpointError otherwise."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.error(f"{key} must be a whole number from {low} to {high}, not {shorten(value)}")
        return value

    def number(self, key: str, low: float, high: float, default: Any = MISSING) -> float:
        """The finite number at `key` within [low, high]; raises CheckpointError otherwise."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise self.error(f"{key} must be a number from {low:g} to {high:g}, not {shorten(value)}")
        return float(value)

    def optional_number(self, key: str, low: float, high: float) -> float | None:
        """As `number`, with None for a key that is missing or null."""
        return None if self.raw.get(key) is None else self.number(key, low, high)

    def flag(self, key: str, default: Any = MISSING) -> bool:
        """The boolean at `key`; raises CheckpointError otherwise."""
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self.error(f"{key} must be true or false, not {shorten(value)}")
        return value

    def text(self, key: str, default: Any = MISSING) -> str:
        """The string at `key`; raises CheckpointError otherwise."""
        value = self._value(key, default)
        if not isinstance(value, str):
            raise self.error(f"{key} must be a string, not {shorten(value)}")
        return value

    def child(self, key: str) -> "Fields | None":
        """The object at `key` as Fields, None when it is missing, null or empty."""
        value = self.raw.get(key)
        if not value:
            return None
        if not isinstance(value, dict):
            raise self.error(f"{key} must be an object, not {shorten(value)}")
        return Fields(value, self.where)

    def error(self, message: str) -> CheckpointError:
        """The error to raise for a value here."""
        return CheckpointError(message, where=self.where)

    def _value(self, key: str, default: Any) -> Any:
        value = self.raw.get(key)
        if value is not None:
            return value
        if default is MISSING:
            raise self.error(f"{key} is missing")
        return default


def shorten(value: Any) -> str:
    """`value` as JSON-like text of at most 40 characters, for a message."""
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
