"""Entry of ``python -m odeopt``."""

import sys

from odeopt.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
