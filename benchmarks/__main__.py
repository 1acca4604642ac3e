"""`python -m benchmarks`, from the repository root: the same as `minipeft bench`."""

import sys

from benchmarks.run import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
