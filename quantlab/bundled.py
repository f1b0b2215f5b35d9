"""Where the texts that come with the package lie: inside it when installed, in examples/ in a source tree.

Knows nothing about what they are for.
"""

from pathlib import Path

import quantlab


def bundled_text(name: str) -> Path | None:
    """The file of the text `name` ("calibration" or "evaluation"), or None where an installation has lost it."""
    package = Path(quantlab.__file__).parent
    places = (package / "_data" / f"{name}.txt", package.parent / "examples" / "text" / f"{name}.txt")
    return next((place for place in places if place.is_file()), None)
