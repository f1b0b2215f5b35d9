"""The address of a server, taken before anything that takes time: one that is in use is told at once.

Knows nothing about what is served.
"""

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
        fix = "another --port, or --port 0 for any free one"
        raise AddressError(f"cannot listen: {reason}", where=f"{host}:{port}", fix=fix) from error


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
