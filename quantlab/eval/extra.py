"""Whether the optional dependencies of evaluation are there. Imports none of them."""

from importlib.util import find_spec

from quantlab.errors import MissingExtra


def require_harness() -> None:
    """Raises MissingExtra unless lm-evaluation-harness is there; to be asked before a module that imports it is."""
    if find_spec("lm_eval") is None:
        message = "tasks need lm-evaluation-harness, which is not installed"
        raise MissingExtra(message, fix="pip install 'quantlab[eval]'")
