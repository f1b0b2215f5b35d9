"""`python -m quantlab` and the `quantlab` command."""

import sys

from quantlab.cli.app import main as run
from quantlab.log import configure


def main() -> None:
    """Run the command line and exit with its code."""
    configure(debug="--debug" in sys.argv[1:])
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
