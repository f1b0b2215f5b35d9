"""Every error a user can meet: what happened, where, and the command that fixes it.

Knows nothing about torch, files or terminals; the command line turns these into one line and an exit code.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class QuantlabError(Exception):
    """A failure with a known cause; `exit_code` and `code` are part of the documented table."""

    exit_code = 1
    code = "QL0001"

    def __init__(self, message: str, *, where: str | None = None, fix: str | None = None):
        super().__init__(message)
        self.message = message
        self.where = where
        self.fix = fix

    def one_line(self) -> str:
        """The error as one printable line: `code where: what (fix)`, control characters escaped."""
        place = f"{self.where}: " if self.where else ""
        fix = f"; try: {self.fix}" if self.fix else ""
        return printable(f"{self.code} {place}{self.message}{fix}")


class UsageError(QuantlabError):
    """An argument that cannot be meant."""

    exit_code, code = 2, "QL0002"


class RecipeError(QuantlabError):
    """A recipe file that is malformed; `where` is file:line:column."""

    exit_code, code = 2, "QL0201"


class GateError(QuantlabError):
    """A gate file that is malformed, or that asks for what is not measured; `where` is file:line:column."""

    exit_code, code = 2, "QL0202"


class GrammarError(QuantlabError):
    """A JSON schema that is malformed, too complex, or asks for what cannot be enforced."""

    exit_code, code = 2, "QL0203"


class MissingExtra(QuantlabError):
    """An optional dependency that this command needs is not installed."""

    exit_code, code = 3, "QL0301"


class CheckpointError(QuantlabError):
    """A source or packed checkpoint that is damaged, incomplete or hostile."""

    exit_code, code = 4, "QL0401"


class ReportError(QuantlabError):
    """A result file that cannot be read, or that no evaluation of this version wrote."""

    exit_code, code = 4, "QL0402"


class UnsupportedModel(QuantlabError):
    """A sound checkpoint of a kind that quantlab does not handle."""

    exit_code, code = 5, "QL0501"


class CalibrationError(QuantlabError):
    """Calibration text that is missing, unreadable or too short."""

    exit_code, code = 6, "QL0601"


class TextError(QuantlabError):
    """Evaluation text that is missing, unreadable or too short."""

    exit_code, code = 6, "QL0602"


class OutputError(QuantlabError):
    """An output place that exists, is full or cannot be written."""

    exit_code, code = 7, "QL0701"


class ResumeMismatch(QuantlabError):
    """A journal that belongs to another source, recipe, text or version."""

    exit_code, code = 8, "QL0801"


class VerificationError(QuantlabError):
    """The files written do not say what the solver decided; nothing was put in place."""

    exit_code, code = 9, "QL0901"


class SolveError(QuantlabError):
    """A pass whose numbers went wrong (NaN, no finite loss)."""

    exit_code, code = 12, "QL1201"


class NumericsError(QuantlabError):
    """A model whose logits are NaN or infinite."""

    exit_code, code = 12, "QL1202"


class EndpointError(QuantlabError):
    """A server to measure that cannot be reached, or answers nothing that can be measured."""

    exit_code, code = 13, "QL1301"


class EngineDied(QuantlabError):
    """The engine process of a server ended before the server did."""

    exit_code, code = 14, "QL1401"


class AddressError(QuantlabError):
    """An address that a server cannot listen on."""

    exit_code, code = 14, "QL1402"


def printable(text: str) -> str:
    """`text` on one line, with control characters (a hostile tensor name may hold some) escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name closest to a mistyped `name`, or None when nothing is close."""
    close = get_close_matches(name[:512], list(known), n=1, cutoff=0.6)
    return close[0] if close else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A clause to append to an "unknown ..." message: the nearest known name, or every one of them."""
    names = list(known)
    close = nearest(name, names)
    if close is not None:
        return f", did you mean '{close}'?"
    return f" (known: {', '.join(names[:24])}{', ...' if len(names) > 24 else ''})"
