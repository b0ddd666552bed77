"""EndpointSlices over real HTTP: every way in which a list or a watch can end, and what is seen afterwards."""

from __future__ import annotations

import asyncio
import socket
import ssl
from typing import Any

import pytest

from extproc.config import LeaseConfig
from extproc.endpoints.discovery import watch
from extproc.endpoints.discovery.kubernetes import Kubernetes
from extproc.replicas.messages import Member
from extproc.replicas.stores.lease import LeaseStore

from .kit.certificates import without_key_identifiers
from .kit.kube_api import KubeApi, api, quick, slice_of
from .kit.processes import run, wait_until
from .kit.watcher import Watcher

__all__ = ["api", "quick"]  # fixtures


def watch_service(api: KubeApi, **config: Any) -> Watcher:
    keys = {"service": "vllm", "namespace": "ml", "api": api.url, "token_file": "/none", **config}
    return Watcher(Kubernetes, **keys)


def test_pods_are_listed_and_then_watched(api):
    api.put(slice_of("s1", {"a": "10.0.0.1"}))
    with watch_service(api) as watcher:
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
    with watch_service(api) as watcher:
        wait_until(lambda: watcher.reports == [{}])
    for number in range(5):
        api.put(slice_of(f"s{number}", {f"p{number}": f"10.0.0.{number}"}))
    with watch_service(api) as watcher:
        watcher.sees(**{f"p{number}": f"10.0.0.{number}:8000" for number in range(5)})


def test_a_dropped_connection_is_watched_again_from_the_last_version_also_from_a_bookmarks(api):
    api.put(slice_of("s", {"a": "10.0.0.1"}))
    with watch_service(api) as watcher:
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
        wait_until(lambda: watcher.source._slices.version == str(marked))
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
    with watch_service(api) as watcher:
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
    with watch_service(api) as watcher:
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
    with watch_service(api) as watcher:
        watcher.sees(**{"c": "10.0.0.3:8000", "10.0.0.4:8000": "10.0.0.4:8000"})


def test_a_pod_in_two_slices_is_one_endpoint_and_ipv4_is_preferred(api):
    api.put(slice_of("s4", {"a": "10.0.0.1"}))
    api.put(slice_of("s4b", {"a": "10.0.0.1"}))
    api.put(slice_of("s6", {"a": "fd00::1", "v6": "fd00::2"}, addressType="IPv6"))
    with watch_service(api) as watcher:
        watcher.sees(a="10.0.0.1:8000", v6="[fd00::2]:8000")


def test_the_port_is_chosen_by_name_or_number(api):
    ports = [{"name": "metrics", "port": 9}, {"name": "http", "port": 8000}]
    api.put(slice_of("s", {"a": "10.0.0.1"}, ports=ports))
    for port, expected in (("http", 8000), (7, 7), (None, 9)):
        with watch_service(api, port=port) as watcher:
            watcher.sees(a=f"10.0.0.1:{expected}")
    with watch_service(api, port="none") as watcher:
        wait_until(lambda: watcher.reports == [{}])


def test_the_token_is_read_again_for_every_call_and_a_refusal_takes_nothing_away(api, tmp_path):
    token = tmp_path / "token"
    token.write_text("old\n")
    api.token = "old"  # noqa: S105
    api.put(slice_of("s", {"a": "10.0.0.1"}))
    with watch_service(api, token_file=str(token)) as watcher:
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


def test_the_servers_certificate_must_be_signed_by_the_ca_file(tmp_path, quick):
    names = ("-subj", "/CN=api", "-addext", "subjectAltName=IP:127.0.0.1")
    key, ca, other = (str(tmp_path / name) for name in ("key", "ca", "other"))
    for certificate in (other, ca):
        command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-keyout", key]
        assert run([*command, "-out", certificate, *names]).returncode == 0
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(ca, key)
    with KubeApi(server) as api:
        api.put(slice_of("s", {"a": "10.0.0.1"}))
        with watch_service(api, ca_file=ca) as watcher, watch_service(api, ca_file=other) as stranger:
            watcher.sees(a="10.0.0.1:8000")
            assert not stranger.reports


@pytest.fixture
def strict(monkeypatch):
    """Python 3.13 sets VERIFY_X509_STRICT by default; here it is set as there, on any Python."""
    real = ssl.create_default_context

    def made(*arguments: Any, **more: Any) -> ssl.SSLContext:
        context = real(*arguments, **more)
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        return context

    monkeypatch.setattr(ssl, "create_default_context", made)


@pytest.mark.usefixtures("strict")
def test_a_ca_without_key_identifiers_is_no_reason_to_see_no_pods_or_no_other_sidecar(tmp_path, quick):
    ca, server = without_key_identifiers("127.0.0.1", tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(server)
    with KubeApi(context) as api:
        by_default = ssl.create_default_context(cafile=ca)
        with (
            socket.create_connection(("127.0.0.1", api.port)) as raw,
            pytest.raises(ssl.SSLCertVerificationError, match="Key Identifier"),
        ):
            by_default.wrap_socket(raw, server_hostname="127.0.0.1")
        api.put(slice_of("s", {"a": "10.0.0.1"}))
        with watch_service(api, ca_file=str(ca)) as watcher:
            watcher.sees(a="10.0.0.1:8000")
        asyncio.run(beat_once(api, str(ca)))
    assert [lease["spec"]["holderIdentity"] for lease in api.leases.values()] == ["me"]


async def beat_once(api: KubeApi, ca_file: str) -> None:
    config = LeaseConfig(namespace="ml", api=api.url, token_file="/none", ca_file=ca_file)  # noqa: S106
    store = LeaseStore(config, "default", {})
    await store.beat(Member("me", "10.0.0.9:1", 0))
    await store.close()


@pytest.mark.parametrize("line", [b"garbage\n", b"[]\n", b'{"type": "ADDED"}\n', b'{"type": "ADDED", "object": 3}\n'])
def test_garbage_in_a_watch_is_a_failure_like_any_other(api, line, monkeypatch):
    api.put(slice_of("s", {"a": "10.0.0.1"}))
    real, bad = watch._lines, [line]

    async def lines(response):
        if bad:
            yield bad.pop()
        async for good in real(response):
            yield good

    monkeypatch.setattr(watch, "_lines", lines)
    with watch_service(api) as watcher:
        watcher.sees(a="10.0.0.1:8000")
        wait_until(lambda: len(api.watches()) >= 2)
        api.wait_watching()
        api.put(slice_of("s", {"b": "10.0.0.2"}))
        watcher.sees(b="10.0.0.2:8000")
