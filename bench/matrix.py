"""`python -m bench.matrix`: see extproc/simulate/studies/matrix/command.py."""

import sys

from extproc.simulate.studies.matrix.command import main

if __name__ == "__main__":
    sys.exit(main())
