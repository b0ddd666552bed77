"""`python -m extproc` is `extproc`."""

import sys

from extproc.cli import main

sys.exit(main())
