"""`python -m bench.proof.settings`: see extproc/simulate/studies/settings.py."""

import sys

from extproc.simulate.studies.settings import main

if __name__ == "__main__":
    sys.exit(main())
