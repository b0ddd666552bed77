"""Sets the wall clock of a sidecar: put this directory on PYTHONPATH and seconds into AHEAD_S.

libfaketime would be the obvious way, but gRPC's core waits by the kernel's own clock, and then hangs or spins. So only
our own code gets the other time, and of that not what hands it to gRPC.
"""

import os
import sys
import time

_AHEAD_S = float(os.environ.get("AHEAD_S", "0"))
_GRPC = "extproc.transport."
_now = time.time


def _set() -> float:
    caller = str(sys._getframe(1).f_globals.get("__name__"))
    return _now() + _AHEAD_S if caller.startswith("extproc.") and not caller.startswith(_GRPC) else _now()


time.time = _set
