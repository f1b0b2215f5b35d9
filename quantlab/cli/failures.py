"""Turns whatever went wrong into one line for stderr and a documented exit code.

Knows nothing about what the commands do. typer's own errors are recognised by their methods, not by class:
typer carries a private copy of click, so there is no class to import.
"""

import errno
import re
import sys
import traceback
from typing import Any

from quantlab.errors import OutputError, QuantlabError, UsageError, did_you_mean, nearest

DISK_FULL = {errno.ENOSPC, errno.EDQUOT}
CHOICES = re.compile(r"'(?P<given>[^']*)' is not one of (?P<choices>.+?)\.?$")


class Interrupted(QuantlabError):
    """Ctrl-C."""

    exit_code, code = 130, "QL1300"


class Unexpected(QuantlabError):
    """A fault of ours, or of a library: the traceback is shown with --debug."""

    exit_code, code = 1, "QL0001"


def known_failure(err: BaseException) -> QuantlabError:
    """The error to tell the user about, whatever was raised."""
    if isinstance(err, QuantlabError):
        return err
    if isinstance(err, KeyboardInterrupt) or type(err).__name__ == "Abort":
        return Interrupted("interrupted")
    if hasattr(err, "format_message"):
        return _usage(err)
    if isinstance(err, OSError) and err.errno in DISK_FULL:
        return OutputError("the disk is full", where=_file(err), fix="free some space and run the same command again")
    if isinstance(err, OSError) and err.errno in (errno.EACCES, errno.EROFS):
        return OutputError(f"{err.strerror}", where=_file(err), fix="choose a folder that you may write to")
    if isinstance(err, MemoryError) or type(err).__name__ == "OutOfMemoryError":
        fix = "quantize: fewer --samples or a shorter --seq-len; eval: a smaller --batch-size or --window"
        return Unexpected("out of memory", fix=fix)
    told = str(err).strip().splitlines()
    what = f"{type(err).__name__}: {told[0]}" if told else type(err).__name__
    return Unexpected(f"unexpected {what}", fix="the same command with --debug shows the traceback")


def tell(err: BaseException, debug: bool) -> int:
    """Write the one line (and with `debug` the traceback before it) to stderr; returns the exit code."""
    failure = known_failure(err)
    if debug:
        traceback.print_exception(err, file=sys.stderr)
    label = "\x1b[1;31merror\x1b[0m" if sys.stderr.isatty() else "error"
    sys.stderr.write(f"{label}: {failure.one_line()}\n")
    return failure.exit_code


def _file(err: OSError) -> str | None:
    return None if err.filename is None else str(err.filename)


def _usage(err: Any) -> UsageError:
    """A typer usage error in our words, with the nearest option, command or choice."""
    context = getattr(err, "ctx", None)
    where = context.command_path if context is not None else "quantlab"
    message = " ".join(err.format_message().split()).rstrip(".").replace("Value error, ", "")
    option = getattr(err, "option_name", None)
    if option and message.startswith("No such option"):
        names = [name for param in context.command.params for name in param.opts] if context else []
        message = f"no such option '{option}'{_near(option, names)}"
    elif match := CHOICES.search(message):
        choices = re.findall(r"'([^']*)'", match["choices"])
        message += _near(match["given"], choices)
    elif match := re.match(r"No such command '([^']*)'", message):
        commands = list(getattr(context.command, "commands", {})) if context else []
        message = f"no such command '{match[1]}'{did_you_mean(match[1], commands)}"
    return UsageError(message[:1].lower() + message[1:], where=where, fix=f"{where} --help")


def _near(name: str, known: list[str]) -> str:
    close = nearest(name, known)
    return f", did you mean '{close}'?" if close else ""
