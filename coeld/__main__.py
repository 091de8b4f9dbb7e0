"""`python -m coeld` is the `coeld` command."""

import sys

from coeld.ui.cli import main

if __name__ == "__main__":
    sys.exit(main())
