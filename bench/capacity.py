"""`python -m bench.capacity`: see extproc/simulate/studies/capacity.py."""

import sys

from extproc.simulate.studies.capacity import main

if __name__ == "__main__":
    sys.exit(main())
