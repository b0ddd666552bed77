"""Mutual TLS between sidecars, on asyncio. Files are read for each connection: a rotated one is used from then on."""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING

from extproc.config import TlsConfig
from extproc.errors import ConfigError
from extproc.transport.tls import read

if TYPE_CHECKING:
    from extproc.config import ReplicasTlsConfig


class MutualTls:
    """Both sides show a certificate of one CA, for one name that all sidecars of a pool share."""

    def __init__(self, config: ReplicasTlsConfig) -> None:
        """Read the files. Raises ConfigError with all that is wrong with them."""
        self._config = config
        try:
            read(TlsConfig(cert_file=config.cert_file, key_file=config.key_file, client_ca_file=config.ca_file))
        except ConfigError as error:
            problems = [f"replicas.{problem}".replace("client_ca_file", "ca_file") for problem in error.problems]
            raise ConfigError(error.source, problems) from None
        self.server_name = config.server_name
        self.server = self._context(ssl.PROTOCOL_TLS_SERVER)
        self.server.sni_callback = self._renew

    def client(self) -> ssl.SSLContext:
        """Return what to dial with. Raises OSError (ssl.SSLError is one) if the files are no good now."""
        return self._context(ssl.PROTOCOL_TLS_CLIENT)

    def _context(self, side: int) -> ssl.SSLContext:
        context = ssl.SSLContext(side)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_cert_chain(self._config.cert_file, self._config.key_file)
        context.load_verify_locations(self._config.ca_file)
        return context

    def _renew(self, connection: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
        """Answer a handshake with the files as they are now; with bad ones, as they were at the start."""
        try:
            connection.context = self._context(ssl.PROTOCOL_TLS_SERVER)
        except OSError:
            return
