"""Keys of TLS at our port: ours, and what Envoy needs to meet it."""

from __future__ import annotations

from pydantic import Field

from extproc.config.section import Section
from extproc.config.types import (
    CertifiedName,
    FilePath,
)


class TlsEnvoyConfig(Section):
    """For `extproc envoy-config`: how Envoy meets our TLS. The paths are Envoy's, and nobody else looks at them."""

    server_name: CertifiedName = Field(description="A DNS name in our certificate. Envoy takes no other certificate.")
    ca_file: FilePath = Field(description="Who signed our certificate.")
    cert_file: FilePath | None = Field(
        None, description="What Envoy shows us. Needed with `client_ca_file`, and `key_file` with it."
    )
    key_file: FilePath | None = Field(None, description="Its key.")
    secrets_directory: FilePath = Field(
        "/etc/envoy", description="Where Envoy finds the files that `extproc envoy-config --secrets DIR` writes."
    )


class TlsConfig(Section):
    """TLS at `listen`. PEM files, read again when they change: a rotated certificate needs no restart."""

    cert_file: FilePath | None = Field(
        None, description="Our certificate, and after it those between it and its CA. Required, but for `self_signed`."
    )
    key_file: FilePath | None = Field(None, description="Its key, without a passphrase.")
    self_signed: bool = Field(
        False,
        description="Make a certificate at start instead: for gateways that want TLS and look at no certificate. Needs "
        "the extra `picker`.",
    )
    client_ca_file: FilePath | None = Field(
        None, description="Mutual TLS: only who shows a certificate signed by this CA may connect. Unset: anyone may."
    )
    envoy: TlsEnvoyConfig | None = Field(None, description="Envoy's side, for `extproc envoy-config`.")
