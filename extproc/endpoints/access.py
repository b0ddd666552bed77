"""How a server's own pages, metrics and health, are asked for: headers, token, CA, and how far a redirect leads.

Secrets stay here: nothing in this room is shown, and what fails names files, never what is in them.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from yarl import URL

from extproc.files import read_regular, signature_of

if TYPE_CHECKING:
    from extproc.files import Signature

HOPS = 3
"""Redirects that are followed, each to the same scheme, host and port: `/metrics` to `/metrics/`, mostly."""
MOST_TOKEN_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Access:
    """What a page behind a lock needs.

    Attributes:
        headers: sent with each request.
        token_file: holds a token that is sent as `authorization: Bearer`; read again when it changes.
        ca_file: who signed the server's certificate, for https; read again when it changes.
    """

    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    token_file: str | None = None
    ca_file: str | None = None


NOTHING = Access()
"""For a page that anyone may see."""


class Credentials:
    """An `Access` with its files read."""

    __slots__ = ("_access", "_headers", "_tls", "_tls_seen", "_token_seen")

    def __init__(self, access: Access) -> None:
        """Use `access`; nothing is read yet."""
        self._access = access
        self._headers: dict[str, str] | None = None
        self._tls: ssl.SSLContext | None = None
        self._token_seen: Signature = None
        self._tls_seen: Signature = None

    def headers(self) -> dict[str, str] | None:
        """Return the headers to send. Raises OSError or ValueError if the token can't be read."""
        file = self._access.token_file
        if file is None:
            if self._headers is None and self._access.headers:
                self._headers = dict(self._access.headers)
            return self._headers
        seen = signature_of(file)
        if self._headers is None or seen is None or seen != self._token_seen:
            token = read_regular(file, MOST_TOKEN_BYTES).decode("ascii").strip()
            if not token or not token.isprintable():
                raise ValueError(f"{file}: no token")
            self._headers, self._token_seen = {**dict(self._access.headers), "authorization": f"Bearer {token}"}, seen
        return self._headers

    def tls(self) -> ssl.SSLContext | bool:
        """Return what to trust; True: what the system does. Raises OSError if the CA can't be read."""
        file = self._access.ca_file
        if file is None:
            return True
        seen = signature_of(file)
        if self._tls is None or seen is None or seen != self._tls_seen:
            self._tls, self._tls_seen = client_tls(file), seen
        return self._tls


def client_tls(ca_file: str) -> ssl.SSLContext:
    """Return a context that trusts the CAs in a PEM file, and no others. Raises OSError.

    Python 3.13 made VERIFY_X509_STRICT the default: it refuses CAs without key identifiers, which clusters still have
    (EKS). Whom to trust was decided by naming the file; the chain, its dates and the host's name are checked as ever.
    """
    context = ssl.create_default_context(cafile=ca_file)
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    return context


def onward(status: int, location: str | None, url: URL) -> URL | None:
    """Return where an answer of `url` leads, on the same server; None: it is no redirect, or leads elsewhere."""
    if not 300 <= status < 400 or location is None:
        return None
    try:
        there = url.join(URL(location))
    except ValueError:
        return None
    return there if there.origin() == url.origin() and there.user is None else None
