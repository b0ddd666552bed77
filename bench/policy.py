"""`python -m bench.policy`: see extproc/simulate/studies/policy.py."""

import sys

from extproc.simulate.studies.policy import main

if __name__ == "__main__":
    sys.exit(main())
