"""`python -m mfext`: the same as the `mfext` command."""

import sys

from mfext.cli import main

if __name__ == "__main__":
    sys.exit(main())
