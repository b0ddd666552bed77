"""`extproc why ID`: what happened to a request, asked of a running sidecar's admin port."""

from __future__ import annotations

import os
import sys
from http.client import HTTPConnection, HTTPException
from urllib.parse import quote

from extproc.commands.top import plain
from extproc.errors import StartError, plain_words

WAIT_S = 5.0
MOST_BYTES = 1 << 16


def why(request_id: str, admin: str) -> bool:
    """Print the story of a request; tell whether it is known. Raises StartError when nobody answers at `admin`."""
    connection = HTTPConnection(admin, timeout=WAIT_S)
    try:
        connection.request("GET", f"/debug/requests/{quote(os.fsencode(request_id), safe='')}")
        response = connection.getresponse()
        text = response.read(MOST_BYTES).decode(errors="replace")
    except (OSError, HTTPException) as error:
        raise StartError(f"--admin: no answer from {admin}: {plain_words(error)}") from None
    finally:
        connection.close()
    out = sys.stdout if response.status == 200 else sys.stderr
    for line in text.splitlines():
        print(plain(line), file=out)
    return response.status == 200
