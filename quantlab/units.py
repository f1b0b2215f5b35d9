"""Sizes, counts and durations as people read them, the same on the terminal and in every report.

Knows nothing about what is counted.
"""


def human_bytes(size: float) -> str:
    """`5.23 MB`: three digits, decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.0f} B" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def human_count(count: float) -> str:
    """`1.24B`: three digits, for parameters and tokens."""
    for unit in ("", "k", "M", "B"):
        if count < 999.5:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.3g}T"


def human_seconds(seconds: float) -> str:
    """`0.4s`, `42s`, `3m 07s`, `2h 05m`."""
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
