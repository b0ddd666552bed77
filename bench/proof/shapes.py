"""`python -m bench.proof.shapes`: see extproc/simulate/studies/shapes.py."""

import sys

from extproc.simulate.studies.shapes import main

if __name__ == "__main__":
    sys.exit(main())
