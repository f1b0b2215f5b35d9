"""`python -m quantlab` and the `quantlab` command."""

import io
import sys

from quantlab.cli.app import main as run
from quantlab.log import configure


def main() -> None:
    """Run the command line and exit with its code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path need not be text
    configure(debug="--debug" in sys.argv[1:])
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
