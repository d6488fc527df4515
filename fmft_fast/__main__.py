"""`python -m fmft_fast` is the command `fmft`."""

import sys

from fmft_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
