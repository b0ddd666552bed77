"""Second tries: a request whose server takes no connection comes back through Envoy, and waits for another one.

Each endpoint's cluster has Envoy's own listener as its second priority. What can't be connected to is retried there
(previous_priorities), goes through our filter again and is a new request to us, but for a header with a key that
only we and this one request know; before it stands how often it came back. By that the stream that sent it off is
found: its lease goes back, its endpoint is told of the failure, and the new one waits on with the age of the old one,
for any other endpoint. Both happen once, whoever is first: a key is good until it comes back, until an answer
begins, or until its stream is over.

Where several sidecars stand behind one Envoy, the one that is asked may not know the key: it goes on counting from
what stands before it. A client that makes one up has fewer tries, and nothing else.
"""

from __future__ import annotations

import re
import secrets
from typing import TYPE_CHECKING

from extproc.stream import wire

if TYPE_CHECKING:
    from collections.abc import Mapping

    from extproc.stream.session import Session

MOST = 3
"""How often one request may come back: each time it is one more stream in Envoy, with its body."""
PAUSE_S = 1.0
"""So long one waits that came back from the last that was up, or as often as it may: by then pages or checks tell who
is down, and who asks again waits in the queue for somebody that is up."""
KEY = re.compile(r"([1-9])\.[0-9a-f]{32}")
"""How often a request came back, and what nobody can guess."""
UPSTREAM = "upstream.address"
"""Envoy's attribute that tells who gave an answer."""


class Again:
    """The requests that were sent off and whose answer has not begun.

    Attributes:
        is_on: requests do come back.
        count: how many came back.
    """

    __slots__ = ("_address", "_expected", "count", "is_on")

    def __init__(self, address: str = "") -> None:
        """`address`: of Envoy's listener, through which they come back; "": they don't."""
        self._address = address
        self.is_on = bool(address)
        self._expected: dict[str, Session] = {}
        self.count = 0

    def __len__(self) -> int:
        """Count the keys that are out."""
        return len(self._expected)

    def expect(self, session: Session, tries: int) -> tuple[str, bytes]:
        """Return a new key for a request that is sent off, and what to append to the answer.

        `tries`: how often it came back before.
        """
        key = f"{tries + 1}.{secrets.token_hex(16)}"
        self._expected[key] = session
        return key, wire.again(key)

    def forget(self, key: str) -> None:
        """Make a key worthless. Unknown: no-op."""
        self._expected.pop(key, None)

    def back(self, headers: Mapping[str, str]) -> tuple[Session | None, int]:
        """Return the stream that sent a request off which is here again, and how often it came back; None: not by us.

        What is no key of any sidecar's says nothing: it is a new request.
        """
        key = headers.get(wire.AGAIN)
        if key is None or not self.is_on:
            return None, 0
        session = self._expected.pop(key, None)
        self.count += session is not None
        found = KEY.fullmatch(key)
        return session, int(found[1]) if found is not None else 0

    def came_back(self, attributes: Mapping[str, str]) -> bool:
        """Tell whether an answer is that of a second try, which another sidecar may have taken."""
        return self.is_on and attributes.get(UPSTREAM) == self._address
