"""`python -m ghl`: the command line, for torchrun and for where no `ghl` is on the path."""

import sys

from ghl.cli import main

if __name__ == "__main__":
    sys.exit(main())
