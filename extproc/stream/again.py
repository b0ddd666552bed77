"""Second tries: a request whose server takes no connection comes back through Envoy, and waits for another one.

Each endpoint's cluster has Envoy's own listener as its second priority. What can't be connected to is retried there
(previous_priorities), goes through our filter again and is a new request to us, but for a header with a ticket that
only we and this one request know. By that the stream that sent it off is found: its lease goes back, its endpoint is
told of the failure, and the new one waits on with the age of the old one. Both happen once, whoever is first: a ticket
is good until it comes back, until an answer begins, or until its stream is over.
"""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

from extproc.stream import wire

if TYPE_CHECKING:
    from collections.abc import Mapping

    from extproc.stream.session import Session

MOST = 3
"""How often one request may come back: each time it is one more stream in Envoy, with its body."""
UPSTREAM = "upstream.address"
"""Envoy's attribute that tells who gave an answer."""


class Again:
    """The requests that were sent off and whose answer has not begun."""

    __slots__ = ("_address", "_sent", "count")

    def __init__(self, address: str = "") -> None:
        """`address`: of Envoy's listener, through which they come back; "": they don't."""
        self._address = address
        self._sent: dict[str, Session] = {}
        self.count = 0  # how many came back

    def __len__(self) -> int:
        """Count the tickets that are out."""
        return len(self._sent)

    def send(self, session: Session) -> tuple[str, bytes]:
        """Return a new ticket for a request that is sent off, and what to append to the answer; "": none is needed."""
        if not self._address:
            return "", b""
        ticket = secrets.token_hex(16)
        self._sent[ticket] = session
        return ticket, wire.again(ticket)

    def forget(self, ticket: str) -> None:
        """Make a ticket worthless. Unknown: no-op."""
        self._sent.pop(ticket, None)

    def back(self, headers: Mapping[str, str]) -> Session | None:
        """Return the stream that sent a request off which is here again; None: it is a new one."""
        ticket = headers.get(wire.AGAIN)
        session = None if ticket is None else self._sent.pop(ticket, None)
        self.count += session is not None
        return session

    def came_back(self, attributes: Mapping[str, str]) -> bool:
        """Tell whether an answer is that of a second try, which another sidecar may have taken."""
        return bool(self._address) and attributes.get(UPSTREAM) == self._address
