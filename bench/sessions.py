"""`python -m bench.sessions`: see extproc/simulate/studies/sessions.py."""

import sys

from extproc.simulate.studies.sessions import main

if __name__ == "__main__":
    sys.exit(main())
