"""EndpointSlices over real HTTP: every way in which a list or a watch can end, and what is seen afterwards."""

from __future__ import annotations

import asyncio
import ssl
import threading
from typing import TYPE_CHECKING, Any

import pytest

from extproc.config import KubernetesConfig
from extproc.endpoints.discovery import kubernetes
from extproc.endpoints.discovery.kubernetes import Kubernetes

from .kit.kube_api import KubeApi, slice_of
from .kit.processes import run, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator


class Watcher:
    """A source in a thread of its own, and what it reported."""

    def __init__(self, api: KubeApi, **config: Any) -> None:
        self.reports: list[dict[str, str]] = []
        keys = {"service": "vllm", "namespace": "ml", "api": api.url, "token_file": "/none", **config}
        if keys["service"] is None:
            del keys["service"]
        self._source = Kubernetes(KubernetesConfig.model_validate(keys), {})
        self._loop = asyncio.SelectorEventLoop()
        self._task: asyncio.Task[None] | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._task = self._loop.create_task(self._source.run(self._report))
        self._loop.run_until_complete(asyncio.gather(self._task, return_exceptions=True))
        for _ in range(1000):  # lets connections close: TLS takes a moment; the one left is the loop's own
            if len(self._loop._selector.get_map()) == 1:
                break
            self._loop.run_until_complete(asyncio.sleep(0.002))
        self._loop.close()

    def _report(self, endpoints) -> None:
        self.reports.append({endpoint.name: endpoint.address for endpoint in endpoints})

    def __enter__(self) -> Watcher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(lambda: self._task and self._task.cancel())
        self._thread.join(10)
        assert not self._thread.is_alive()

    @property
    def version(self) -> str | None:
        """The version it knows."""
        return self._source._version

    def sees(self, **pods: str) -> None:
        """Wait until the last report is exactly this: name -> address."""
        expected = {name.replace("_", "-"): address for name, address in pods.items()}
        try:
            wait_until(lambda: self.reports and self.reports[-1] == expected)
        except AssertionError:
            raise AssertionError(f"not {expected}; the reports: {self.reports}") from None


@pytest.fixture
def api() -> Iterator[KubeApi]:
    with KubeApi() as server:
        yield server


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(kubernetes, "BACKOFF_S", (0.01, 0.05))


def test_pods_are_listed_and_then_watched(api):
    api.put(slice_of("s1", {"a": "10.0.0.1"}))
    with Watcher(api) as watcher:
        watcher.sees(a="10.0.0.1:8000")
        api.wait_watching()
        api.put(slice_of("s1", {"a": "10.0.0.1", "b": "10.0.0.2"}))
        watcher.sees(a="10.0.0.1:8000", b="10.0.0.2:8000")
        api.put(slice_of("s2", {"c": "10.0.0.3"}, port=9000))
        watcher.sees(a="10.0.0.1:8000", b="10.0.0.2:8000", c="10.0.0.3:9000")
        api.delete("s1")
        watcher.sees(c="10.0.0.3:9000")
    assert api.lists() == 1
    query, _ = api.requests[0]
    assert query["labelSelector"] == "kubernetes.io/service-name=vllm"


def test_a_list_in_pages_is_read_whole_and_an_empty_one_is_an_answer(api):
    api.page = 2
    with Watcher(api) as watcher:
        wait_until(lambda: watcher.reports == [{}])
    for number in range(5):
        api.put(slice_of(f"s{number}", {f"p{number}": f"10.0.0.{number}"}))
    with Watcher(api) as watcher:
        watcher.sees(**{f"p{number}": f"10.0.0.{number}:8000" for number in range(5)})


def test_a_dropped_connection_is_watched_again_from_the_last_version_also_from_a_bookmarks(api):
    api.put(slice_of("s", {"a": "10.0.0.1"}))
    with Watcher(api) as watcher:
        watcher.sees(a="10.0.0.1:8000")
        api.wait_watching()
        marked = api.bookmark()
        api.put(slice_of("s", {"b": "10.0.0.2"}))
        watcher.sees(b="10.0.0.2:8000")
        api.drop()
        wait_until(lambda: len(api.watches()) == 2)
        assert api.watches()[1] == str(marked + 1)
        api.wait_watching()
        marked = api.bookmark()
        wait_until(lambda: watcher.version == str(marked))
        api.drop()
        wait_until(lambda: len(api.watches()) == 3)
        api.wait_watching()
        api.put(slice_of("s", {"c": "10.0.0.3"}))
        watcher.sees(c="10.0.0.3:8000")
    assert api.lists() == 1
    assert api.watches()[2] == str(marked)


@pytest.mark.parametrize("gone_as", ["event", "status"])
def test_a_version_that_is_gone_lists_again_and_sees_what_was_missed(api, gone_as):
    api.gone_as = gone_as
    api.put(slice_of("s", {"a": "10.0.0.1"}))
    with Watcher(api) as watcher:
        watcher.sees(a="10.0.0.1:8000")
        api.wait_watching()
        api.change_unheard(slice_of("s", {"z": "10.0.0.9"}))
        api.drop()
        watcher.sees(z="10.0.0.9:8000")
        api.wait_watching()
    assert api.lists() == 2
    assert len(api.watches()) == 3  # asked once in vain


def test_a_server_that_is_away_takes_nothing_away_and_is_found_again(api):
    api.put(slice_of("s", {"a": "10.0.0.1"}))
    with Watcher(api) as watcher:
        watcher.sees(a="10.0.0.1:8000")
        api.wait_watching()
        api.down()
        api.put(slice_of("s", {"b": "10.0.0.2"}))
        assert watcher.reports[-1] == {"a": "10.0.0.1:8000"}
        api.up()
        watcher.sees(b="10.0.0.2:8000")


def test_what_is_not_ready_or_terminates_is_not_seen_and_ready_unsaid_is_ready(api):
    item = slice_of("s", {"a": "10.0.0.1", "b": "10.0.0.2", "c": "10.0.0.3", "d": "10.0.0.4"})
    item["endpoints"][0]["conditions"] = {"ready": False}
    item["endpoints"][1]["conditions"] = {"ready": True, "terminating": True}
    item["endpoints"][2]["conditions"] = {}
    del item["endpoints"][3]["targetRef"]
    api.put(item)
    with Watcher(api) as watcher:
        watcher.sees(**{"c": "10.0.0.3:8000", "10.0.0.4:8000": "10.0.0.4:8000"})


def test_a_pod_in_two_slices_is_one_endpoint_and_ipv4_is_preferred(api):
    api.put(slice_of("s4", {"a": "10.0.0.1"}))
    api.put(slice_of("s4b", {"a": "10.0.0.1"}))
    api.put(slice_of("s6", {"a": "fd00::1", "v6": "fd00::2"}, addressType="IPv6"))
    with Watcher(api) as watcher:
        watcher.sees(a="10.0.0.1:8000", v6="[fd00::2]:8000")


def test_the_port_is_chosen_by_name_or_number(api):
    ports = [{"name": "metrics", "port": 9}, {"name": "http", "port": 8000}]
    api.put(slice_of("s", {"a": "10.0.0.1"}, ports=ports))
    for port, expected in (("http", 8000), (7, 7), (None, 9)):
        with Watcher(api, port=port) as watcher:
            watcher.sees(a=f"10.0.0.1:{expected}")
    with Watcher(api, port="none") as watcher:
        wait_until(lambda: watcher.reports == [{}])


def test_the_token_is_read_again_for_every_call_and_a_refusal_takes_nothing_away(api, tmp_path):
    token = tmp_path / "token"
    token.write_text("old\n")
    api.token = "old"  # noqa: S105
    api.put(slice_of("s", {"a": "10.0.0.1"}))
    with Watcher(api, token_file=str(token)) as watcher:
        watcher.sees(a="10.0.0.1:8000")
        api.wait_watching()
        api.token = "new"  # noqa: S105
        api.drop()
        wait_until(lambda: len(api.requests) >= 5)  # refused, and asks on
        assert watcher.reports == [{"a": "10.0.0.1:8000"}]
        token.write_text("new")
        api.wait_watching()
        api.put(slice_of("s", {"b": "10.0.0.2"}))
        watcher.sees(b="10.0.0.2:8000")


def test_the_servers_certificate_must_be_signed_by_the_ca_file(tmp_path):
    names = ("-subj", "/CN=api", "-addext", "subjectAltName=IP:127.0.0.1")
    key, ca, other = (str(tmp_path / name) for name in ("key", "ca", "other"))
    for certificate in (other, ca):
        command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-keyout", key]
        assert run([*command, "-out", certificate, *names]).returncode == 0
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(ca, key)
    with KubeApi(server) as api:
        api.put(slice_of("s", {"a": "10.0.0.1"}))
        with Watcher(api, ca_file=ca) as watcher, Watcher(api, ca_file=other) as stranger:
            watcher.sees(a="10.0.0.1:8000")
            assert not stranger.reports


@pytest.mark.parametrize("line", [b"garbage\n", b"[]\n", b'{"type": "ADDED"}\n', b'{"type": "ADDED", "object": 3}\n'])
def test_garbage_in_a_watch_is_a_failure_like_any_other(api, line, monkeypatch):
    api.put(slice_of("s", {"a": "10.0.0.1"}))
    real, bad = kubernetes._lines, [line]

    async def lines(response):
        if bad:
            yield bad.pop()
        async for good in real(response):
            yield good

    monkeypatch.setattr(kubernetes, "_lines", lines)
    with Watcher(api) as watcher:
        watcher.sees(a="10.0.0.1:8000")
        wait_until(lambda: len(api.watches()) >= 2)
        api.wait_watching()
        api.put(slice_of("s", {"b": "10.0.0.2"}))
        watcher.sees(b="10.0.0.2:8000")
