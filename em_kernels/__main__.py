"""`python -m em_kernels`: the command line."""

import sys

from em_kernels.cli import main

if __name__ == "__main__":
    sys.exit(main())
