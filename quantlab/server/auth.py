"""API keys: read from a file or the environment, compared in constant time.

A client sends a key as `Authorization: Bearer KEY`; a browser that asks its user sends it as the password of Basic
authentication. Knows nothing about routes.
"""

import base64
import binascii
import hashlib
import hmac
from pathlib import Path
from typing import Final

from quantlab.errors import UsageError

MIN_KEY, MAX_KEY, MAX_KEYS = 8, 512, 1000
ENVIRONMENT: Final = "QUANTLAB_API_KEYS"


class Keys:
    """The keys that open the server; without any it is open."""

    def __init__(self, keys: tuple[str, ...]):
        # Digests: all have one length, so that a comparison tells nothing about a key's.
        self._digests = [_digest(key.encode()) for key in keys]

    @property
    def required(self) -> bool:
        """Whether a key is asked for."""
        return bool(self._digests)

    def opens(self, authorization: bytes | None) -> bool:
        """Whether the header `authorization` has one of the keys; takes as long whichever it is."""
        given = _digest(_credential(authorization or b""))
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        return any(matches)


def read_keys(file: Path | None, environment: str | None) -> tuple[str, ...]:
    """The keys of `file`, one a line (# begins a comment), and of `environment`, separated by commas.

    Raises UsageError for a file that cannot be read or holds no key, and for keys too short to be secret.
    """
    keys = [key.strip() for key in (environment or "").split(",") if key.strip()]
    _check(keys, ENVIRONMENT)
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
            raise UsageError(f"cannot read the API keys: {reason}", where=str(file)) from error
        of_file = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not of_file:
            raise UsageError("holds no API key", where=str(file), fix="one key a line")
        _check(of_file, str(file))
        keys += of_file
    return tuple(dict.fromkeys(keys))


def _check(keys: list[str], where: str) -> None:
    if len(keys) > MAX_KEYS:
        raise UsageError(f"more than {MAX_KEYS} API keys", where=where)
    for number, key in enumerate(keys, start=1):
        if not MIN_KEY <= len(key) <= MAX_KEY or not key.isascii() or not key.isprintable() or " " in key:
            message = f"API key {number} is not {MIN_KEY} to {MAX_KEY} printable ASCII characters without spaces"
            raise UsageError(message, where=where, fix="python3 -c 'import secrets; print(secrets.token_urlsafe())'")


def _credential(header: bytes) -> bytes:
    """What the header claims to be a key."""
    scheme, _, value = header.strip().partition(b" ")
    if scheme.lower() == b"bearer":
        return value.strip()
    if scheme.lower() == b"basic":
        try:
            return base64.b64decode(value.strip(), validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            return b""
    return b""


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
