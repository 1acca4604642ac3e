"""`python -m benchmarks`, from the repository root: the same as `minipeft bench`."""

import sys

from benchmarks.options import ask_for_huge_pages

if __name__ == "__main__":
    ask_for_huge_pages()
    from benchmarks.run import main

    sys.exit(main(sys.argv[1:]))
