"""Evaluation text from where the user keeps it: files, folders of them, or the text that comes with the package.

Knows nothing about tokens: `eval.protocol` cuts what this reads. Imports no torch, so that the command line can check
names before anything is loaded.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quantlab.bundled import bundled_text
from quantlab.errors import TextError, UsageError, printable

BUNDLED = "bundled"
FOLDER_SUFFIXES = (".txt", ".raw", ".md")
MAX_BYTES = 1 << 28  # of one text: some 60 million tokens, days of work on any machine


@dataclass(frozen=True, slots=True)
class TextSource:
    """One text: the files that make it, end to end, and the name that results go by."""

    name: str
    files: tuple[Path, ...]


def find_texts(given: Sequence[Path]) -> tuple[TextSource, ...]:
    """One source for each file or folder given, the bundled text for none; a folder's files make one text.

    Raises TextError for what is not there or empty, UsageError where two would go by one name.
    """
    if not given:
        file = bundled_text("evaluation")
        if file is None:
            raise TextError("the bundled evaluation text is missing", where=BUNDLED, fix="--text FILE")
        return (TextSource(BUNDLED, (file,)),)
    sources = tuple(TextSource(_name(path), _files(path)) for path in given)
    names = [source.name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"two texts are called '{name}'", where="--text", fix="rename a file")
    return sources


def read_text(source: TextSource) -> str:
    """The files' text end to end; raises TextError for one that cannot be read as UTF-8, or if there is none."""
    parts = [_read(path) for path in source.files]
    if not any(part.strip() for part in parts):
        raise TextError("the text is empty", where=str(source.files[0]), fix="another --text")
    return "".join(parts)


def _name(path: Path) -> str:
    """A short name without the characters that metric names use: `wiki.test.raw` is `wiki_test`."""
    stem = path.resolve().name
    stem = stem.removesuffix(path.suffix) if path.is_file() else stem
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in printable(stem))[:80] or "text"


def _files(path: Path) -> tuple[Path, ...]:
    if not path.exists():
        raise TextError("no such file or folder", where=str(path), fix="leave --text out for the bundled text")
    found = [path]
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.suffix in FOLDER_SUFFIXES and p.is_file())
        if not found:
            raise TextError(f"the folder holds no {', '.join(FOLDER_SUFFIXES)} file", where=str(path))
    elif not path.is_file():
        raise TextError("is neither a file nor a folder", where=str(path))
    if not any(file.stat().st_size for file in found):
        raise TextError("the text is empty", where=str(path), fix="another --text")
    return tuple(found)


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size > MAX_BYTES:
                raise TextError(f"is over the limit of {MAX_BYTES:,} bytes", where=str(path), fix="split it")
            return file.read(MAX_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        fix = "convert it with iconv -t UTF-8"
        raise TextError(f"not UTF-8 text (byte {error.start})", where=str(path), fix=fix) from error
    except OSError as error:
        raise TextError(f"cannot be read: {error.strerror}", where=str(path)) from error
