"""`python -m bench.ceiling`: see extproc/simulate/studies/ceiling.py."""

import sys

from extproc.simulate.studies.ceiling import main

if __name__ == "__main__":
    sys.exit(main())
