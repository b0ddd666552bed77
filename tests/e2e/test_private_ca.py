"""An engine behind a private CA, with keys and a redirect before its pages: real Envoy, `extproc serve`, real TLS.

Envoy's way to it is the operator's: a transport socket in its cluster. The sidecar's are `metrics_ca_file` and
`health_check.ca_file`.
"""

from __future__ import annotations

import asyncio
import ssl
import threading
from typing import TYPE_CHECKING, Any

import trustme
from aiohttp import web

from .kit.clients import complete_many
from .kit.processes import PATIENCE_S, end_server, free_port, wait_until

if TYPE_CHECKING:
    from pathlib import Path

PAGE = 'vllm:num_requests_running{engine="0"} 3\nvllm:num_requests_waiting{engine="0"} 2\n'
NAME = "127.0.0.1"


class Guarded:
    """An engine that speaks TLS alone: /metrics leads to /metrics/, which wants a token; /health wants a key."""

    def __init__(self, ca: trustme.CA) -> None:
        self.port = free_port()
        self.address = f"{NAME}:{self.port}"
        self.refused = 0
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.show(ca)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)

    def show(self, ca: trustme.CA) -> None:
        """Show a new certificate, of `ca`, from the next handshake on."""
        ca.issue_cert(NAME).configure_cert(self._tls)

    def __enter__(self) -> Guarded:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(PATIENCE_S)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(end_server(self._runner), self._loop).result(PATIENCE_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _listen(self) -> None:
        app = web.Application()
        app.router.add_get("/metrics", self._moved)
        app.router.add_get("/metrics/", self._metrics)
        app.router.add_get("/health", self._health)
        app.router.add_post("/v1/chat/completions", self._answer)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, keepalive_timeout=60)
        await self._runner.setup()
        await web.TCPSite(self._runner, NAME, self.port, ssl_context=self._tls).start()

    async def _moved(self, _: web.Request) -> web.Response:
        return web.Response(status=307, headers={"location": "/metrics/"})

    async def _metrics(self, request: web.Request) -> web.Response:
        return self._if(request.headers.get("authorization") == "Bearer page-token", PAGE)

    async def _health(self, request: web.Request) -> web.Response:
        return self._if(request.headers.get("x-key") == "health-key", "ok")

    async def _answer(self, request: web.Request) -> web.Response:
        await request.read()
        return web.Response(text="tokens")

    def _if(self, is_known: bool, text: str) -> web.Response:
        self.refused += not is_known
        return web.Response(text=text) if is_known else web.Response(status=401)


def put(path: Path, content: bytes) -> str:
    path.with_suffix(".new").write_bytes(content)
    path.with_suffix(".new").replace(path)
    return str(path)


def speak_tls(bootstrap: dict[str, Any], ca_file: str) -> None:
    (cluster,) = (one for one in bootstrap["static_resources"]["clusters"] if one["name"] == "guarded")
    cluster["transport_socket"] = {
        "name": "envoy.transport_sockets.tls",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
            "common_tls_context": {"validation_context": {"trusted_ca": {"filename": ca_file}}},
        },
    }


def test_an_engine_behind_a_private_ca_is_served_watched_and_checked_and_a_new_ca_is_taken_up(stack, tmp_path):
    first, second = trustme.CA(), trustme.CA()
    ca_file = put(tmp_path / "ca.pem", first.cert_pem.bytes())
    envoys = put(tmp_path / "envoys.pem", first.cert_pem.bytes())
    token_file = put(tmp_path / "token", b"page-token\n")
    with Guarded(first) as engine:
        here = stack(
            upstreams=(),
            endpoints={
                "guarded": {
                    "address": engine.address,
                    "metrics_ca_file": ca_file,
                    "metrics_token_file": token_file,
                }
            },
            config={
                "max_running_requests": "adaptive",
                "scrape_interval": "100ms",
                "health_check": {"interval": "100ms", "timeout": "1s", "unhealthy_threshold": 1}
                | {"ca_file": ca_file, "headers": {"x-key": "health-key"}},
            },
            edit=lambda bootstrap: speak_tls(bootstrap, envoys),
        )
        wait_until(lambda: here.endpoint("guarded")["state"] == "up")
        wait_until(lambda: here.endpoint("guarded")["load"].get("waiting") == 2)
        assert {one.status for one in complete_many(here.url, 4, lambda n: {"x-test-id": f"t-{n}"})} == {200}
        assert engine.refused == 0

        engine.show(second)  # whose certificates nobody here was told to believe
        wait_until(lambda: here.endpoint("guarded")["state"] == "down")
        put(tmp_path / "ca.pem", second.cert_pem.bytes())
        wait_until(lambda: here.endpoint("guarded")["state"] == "up")
        text = here.sidecar.child.output()
        assert "down" in text
        assert "page-token" not in text
        assert "health-key" not in text
