"""Under which names a server on loopback may be asked.

A page on the internet can let its own name point to this machine, and the browser then takes the server for the page's
own. The name is in the Host header, and no page can change that. Knows nothing about requests otherwise.
"""

from ipaddress import ip_address

from quantlab.server.errors import ApiError


class Hosts:
    """The names that a Host header may have beside those of this machine; None lets any name in."""

    def __init__(self, names: tuple[str, ...] | None):
        self._names = None if names is None else {"localhost", *(name.lower() for name in names)}

    def check(self, header: bytes | None) -> None:
        """Raises ApiError 403 for another name."""
        if self._names is None or header is None:
            return
        name = _without_port(header.decode("latin-1").strip().lower())
        if name not in self._names and not _is_loopback(name):
            message = f"this server may not be asked as '{name}'; --allowed-host {name} lets it, as does an API key"
            raise ApiError(403, message, code="host_not_allowed")


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def _is_loopback(name: str) -> bool:
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return False
