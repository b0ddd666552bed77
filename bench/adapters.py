"""`python -m bench.adapters`: see extproc/simulate/studies/adapters.py."""

import sys

from extproc.simulate.studies.adapters import main

if __name__ == "__main__":
    sys.exit(main())
