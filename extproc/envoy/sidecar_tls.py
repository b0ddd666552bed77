"""How Envoy meets a sidecar with TLS, and the files that tell it which certificates to follow."""

from __future__ import annotations

import json
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from extproc.envoy.skeleton import quoted
from extproc.errors import ConfigError

if TYPE_CHECKING:
    from extproc.config import Config, TlsEnvoyConfig

_TLS_TYPES = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3."
_CA_SECRET, _CLIENT_SECRET = "extproc_ca", "extproc_client"


def sidecar_tls(config: Config) -> str:
    """Return how Envoy meets a sidecar with TLS. Raises ConfigError if the configuration does not tell."""
    if config.tls is None:
        return ""
    envoy = config.tls.envoy
    if envoy is None:
        problem = "tls.envoy: is needed here: with which CA, name and certificate shall Envoy meet the sidecar's tls?"
        raise ConfigError("configuration", [problem])
    name = json.dumps(envoy.server_name)
    shown = ""
    if envoy.cert_file is not None:
        shown = f"""\
          tls_certificate_sds_secret_configs:
          - name: {_CLIENT_SECRET}
            sds_config: {_followed(envoy, _CLIENT_SECRET)}
"""
    return f"""\
    # Only a certificate with this name, signed by this CA, is believed. Envoy follows the files: none of them needs a
    # restart when it is rotated. `extproc envoy-config --secrets DIR` writes the files in {envoy.secrets_directory}.
    transport_socket:
      name: envoy.transport_sockets.tls
      typed_config:
        "@type": {_TLS_TYPES}UpstreamTlsContext
        sni: {name}
        common_tls_context:
          tls_params: {{tls_minimum_protocol_version: TLSv1_3, tls_maximum_protocol_version: TLSv1_3}}
          alpn_protocols: [h2]
{shown}\
          combined_validation_context:
            default_validation_context:
              match_typed_subject_alt_names: [{{san_type: DNS, matcher: {{exact: {name}}}}}]
            validation_context_sds_secret_config:
              name: {_CA_SECRET}
              sds_config: {_followed(envoy, _CA_SECRET)}
"""


def render_secrets(config: Config) -> dict[str, str]:
    """Return the files that tell Envoy which certificate files to follow: name -> text. They hold no secret.

    Envoy follows certificate files only if another file names them (SDS); named in the bootstrap they are read once.
    """
    envoy = None if config.tls is None else config.tls.envoy
    if envoy is None:
        raise ConfigError("configuration", ["tls.envoy: is needed to write the files that name Envoy's certificates"])
    bodies = {_CA_SECRET: f"validation_context:\n    trusted_ca: {_file(envoy.ca_file)}"}
    if envoy.cert_file is not None and envoy.key_file is not None:
        bodies[_CLIENT_SECRET] = f"""\
tls_certificate:
    certificate_chain: {_file(envoy.cert_file)}
    private_key: {_file(envoy.key_file)}"""
    return {
        f"{secret}.yaml": f"""\
# Written by `extproc envoy-config --secrets`. Envoy reads the files named here again when something is renamed in their
# directory, as Kubernetes does when a secret changes. By hand: write new files beside the old ones, and rename them.
resources:
- "@type": {_TLS_TYPES}Secret
  name: {secret}
  {body}
"""
        for secret, body in bodies.items()
    }


def _followed(envoy: TlsEnvoyConfig, secret: str) -> str:
    path = PurePosixPath(envoy.secrets_directory) / f"{secret}.yaml"
    return f"{{path_config_source: {{path: {quoted(str(path))}}}, resource_api_version: V3}}"


def _file(path: str) -> str:
    return f"{{filename: {quoted(path)}}}"
