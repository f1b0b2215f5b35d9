"""The address of a server, taken before anything that takes time: one that is in use is told at once.

Knows nothing about what is served.
"""

import errno
import socket

from quantlab.errors import AddressError

BACKLOG = 2048


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens on the address; raises AddressError."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        return _bound(found[0])
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        fix = _fix(error)
        raise AddressError(f"cannot listen: {reason}", where=f"{host}:{port}", fix=fix) from error


def _fix(error: Exception) -> str:
    """What helps: a name that no network card of this machine has is no matter of the port."""
    if isinstance(error, socket.gaierror | UnicodeError) or getattr(error, "errno", None) == errno.EADDRNOTAVAIL:
        return "--host 127.0.0.1 for this machine alone, --host 0.0.0.0 for every network"
    return "another --port, or --port 0 for any free one"


def _bound(found: tuple[int, int, int, str, tuple[object, ...]]) -> socket.socket:
    family, kind, protocol, _, address = found
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener
