"""An upstream that answers at once and costs nothing: a second Envoy with a direct response."""

from __future__ import annotations

import yaml

_EXTENSIONS = "type.googleapis.com/envoy.extensions"


def mirror_bootstrap(listen: str, admin: str, *, size_bytes: int = 100) -> str:
    """A bootstrap that answers every request at `listen`, HTTP/1.1 or HTTP/2, with 200 and so many bytes."""
    manager = {
        "@type": f"{_EXTENSIONS}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "mirror",
        "codec_type": "AUTO",
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "all",
                    "domains": ["*"],
                    "routes": [
                        {
                            "match": {"prefix": "/"},
                            "direct_response": {"status": 200, "body": {"inline_string": "x" * size_bytes}},
                        }
                    ],
                }
            ]
        },
        "http_filters": [{"name": "router", "typed_config": {"@type": f"{_EXTENSIONS}.filters.http.router.v3.Router"}}],
    }
    return yaml.safe_dump(
        {
            "admin": {"address": _address(admin)},
            "static_resources": {
                "listeners": [
                    {
                        "name": "mirror",
                        "address": _address(listen),
                        "filter_chains": [{"filters": [{"name": "http", "typed_config": manager}]}],
                    }
                ]
            },
        }
    )


def _address(address: str) -> dict[str, dict[str, str | int]]:
    host, _, port = address.rpartition(":")
    return {"socket_address": {"address": host, "port_value": int(port)}}
