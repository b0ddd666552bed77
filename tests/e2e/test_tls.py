"""TLS between Envoy and the sidecar: mutual, refused when anything is wrong, and rotated without a restart."""

from __future__ import annotations

import contextlib
import dataclasses
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import grpc
import pytest
import trustme
import yaml

from .kit.certificates import PAST, SIDECAR_NAME, Mount, secret, serial, shown_serial
from .kit.clients import complete_many
from .kit.envoy import Envoy
from .kit.processes import wait_until
from .kit.recorder import Recorder
from .kit.stack import Front, Sidecar, Stack, local
from .kit.upstream import Upstream, behave

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CLUSTER = "cluster.extproc_queue."
HANDSHAKES = f"{CLUSTER}ssl.handshake"


class Pki:
    """One CA, a sidecar's and an Envoy's secret below `directory`, and the configuration that names them."""

    def __init__(self, directory: Path) -> None:
        self.ca = trustme.CA()
        self.directory = directory
        self.sidecar, self.envoy = Mount(directory / "sidecar"), Mount(directory / "envoy")
        self.first = secret(self.ca, SIDECAR_NAME)
        self.sidecar.put(self.first)
        self.envoy.put(secret(self.ca, "envoy.test"))

    @property
    def config(self) -> dict[str, Any]:
        secrets = self.directory / "secrets"
        secrets.mkdir(exist_ok=True)
        mine, envoys = self.sidecar.path, self.envoy.path
        return {
            "cert_file": mine("tls.crt"),
            "key_file": mine("tls.key"),
            "client_ca_file": mine("ca.crt"),
            "envoy": {
                "server_name": SIDECAR_NAME,
                "ca_file": envoys("ca.crt"),
                "cert_file": envoys("tls.crt"),
                "key_file": envoys("tls.key"),
                "secrets_directory": str(secrets),
            },
        }


def ext_proc_cluster(bootstrap: dict[str, Any]) -> dict[str, Any]:
    (found,) = [one for one in bootstrap["static_resources"]["clusters"] if one["name"] == "extproc_queue"]
    return found


@pytest.fixture(scope="module")
def pki(tmp_path_factory):
    return Pki(tmp_path_factory.mktemp("pki"))


@pytest.fixture(scope="module")
def secured(pki):
    """A stack whose sidecar and Envoy ask each other for certificates. Envoy also checks the sidecar's health."""

    def edit(bootstrap: dict[str, Any]) -> None:
        check = {"timeout": "30s", "interval": "0.2s", "no_traffic_interval": "0.2s", "healthy_threshold": 1}
        check |= {"unhealthy_threshold": 1, "grpc_health_check": {"service_name": "readiness"}}
        ext_proc_cluster(bootstrap)["health_checks"] = [check]

    directory = pki.directory / "stack"
    directory.mkdir()
    with Stack(directory, config={"tls": pki.config}, edit=edit) as started:
        yield started


def test_a_burst_over_mutual_tls_is_queued_and_served_and_health_checks_pass(secured):
    answers = complete_many(secured.url, 8, lambda n: {"x-test-id": f"burst-{n}"})
    assert [answer.status for answer in answers] == [200] * 8
    assert secured.upstreams["a"].peak == 1
    wait_until(lambda: secured.envoy.stats(CLUSTER)[f"{CLUSTER}health_check.success"] >= 1)
    stats = secured.envoy.stats(CLUSTER)
    assert stats[HANDSHAKES] >= 1
    assert stats[f"{CLUSTER}ssl.connection_error"] == 0
    assert stats[f"{CLUSTER}membership_healthy"] == 1


def keep(bootstrap: dict[str, Any]) -> None:
    """Change nothing."""


def without_certificate(bootstrap: dict[str, Any]) -> None:
    socket = ext_proc_cluster(bootstrap)["transport_socket"]
    del socket["typed_config"]["common_tls_context"]["tls_certificate_sds_secret_configs"]


def in_plain_text(bootstrap: dict[str, Any]) -> None:
    del ext_proc_cluster(bootstrap)["transport_socket"]


@dataclasses.dataclass(frozen=True)
class Wrong:
    """What Envoy is told; the sidecar stays as it is. `counter` of Envoy rises."""

    signer: str = "right"
    trusts: str = "right"
    when: dict[str, Any] = dataclasses.field(default_factory=dict)
    name: str = SIDECAR_NAME
    change: Any = keep
    counter: str = "upstream_cx_destroy"  # TLS 1.3: the client learns after its handshake that it is refused


REFUSED = {
    "Envoy trusts another CA": Wrong(trusts="other", counter="ssl.fail_verify_error"),
    "Envoy wants another name": Wrong(name="somebody.test", counter="ssl.fail_verify_san"),
    "Envoy's certificate is of another CA": Wrong(signer="other"),
    "Envoy's certificate is expired": Wrong(when=PAST),
    "Envoy shows no certificate": Wrong(change=without_certificate),
    "Envoy speaks plain text": Wrong(change=in_plain_text),
}


@contextlib.contextmanager
def envoy_for(told: Sidecar, directory: Path, change: Any) -> Iterator[Front]:
    """An Envoy with the bootstrap that fits `told`, changed. It gives up at once instead of after thirty tries."""
    address = local()
    bootstrap = yaml.safe_load(told.envoy_config(address, local(), directory / "access", "h1"))
    manager = bootstrap["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
    ours = next(one for one in manager["http_filters"] if one["name"] == "envoy.filters.http.ext_proc")
    ours["typed_config"]["grpc_service"]["retry_policy"]["num_retries"] = 0
    change(bootstrap)
    with Envoy(yaml.safe_dump(bootstrap), directory) as envoy:
        yield Front(address, envoy)


@pytest.mark.parametrize("what", REFUSED)
def test_no_stream_comes_to_be_and_nothing_passes_un_steered_when(secured, pki, tmp_path, what):
    wrong, other = REFUSED[what], trustme.CA()
    theirs = Pki(tmp_path / "pki")
    cas = {"right": pki.ca, "other": other}
    theirs.envoy.put(secret(cas[wrong.signer], "envoy.test", trusted=cas[wrong.trusts], **wrong.when))
    tls = theirs.config
    tls["envoy"]["server_name"] = wrong.name
    told = Sidecar({**secured.sidecar.config, "tls": tls}, tmp_path, name="told")
    told.write_config()
    with envoy_for(told, tmp_path, wrong.change) as front:
        before = len(secured.upstreams["a"].records())
        (answer,) = complete_many(front.url, 1, lambda _: {"x-test-id": f"refused-{what}"})
        assert answer.status == 503
        assert answer.headers["x-extproc-outcome"] == "unsteered"
        wait_until(lambda: front.envoy.stats(CLUSTER)[CLUSTER + wrong.counter] >= 1)
        assert len(secured.upstreams["a"].records()) == before
    wait_until(lambda: secured.sidecar.metrics()["extproc_streams"] == 0)
    assert "Traceback" not in secured.sidecar.child.output()


def test_envoy_refuses_a_sidecar_whose_certificate_is_expired(tmp_path):
    """By a server of our kit: the sidecar itself would not start with it, nor take it over."""
    pki = Pki(tmp_path / "pki")
    old = secret(pki.ca, SIDECAR_NAME, **PAST)
    with (
        Recorder(credentials=grpc.ssl_server_credentials([(old["tls.key"], old["tls.crt"])])) as recorder,
        Upstream("a") as upstream,
    ):
        endpoint = {"name": "a", "address": upstream.address}
        told = Sidecar({"tls": pki.config, "endpoints": [endpoint], "listen": recorder.address}, tmp_path)
        told.write_config()
        with envoy_for(told, tmp_path, keep) as front:
            (answer,) = complete_many(front.url, 1, lambda _: {"x-test-id": "expired"})
            assert answer.status == 503
            wait_until(lambda: front.envoy.stats(CLUSTER)[f"{CLUSTER}ssl.fail_verify_error"] >= 1)
        assert recorder.messages == []
        assert upstream.records() == []


def test_a_rotation_costs_held_requests_nothing_and_new_handshakes_use_it(tmp_path):
    pki = Pki(tmp_path / "pki")
    (tmp_path / "stack").mkdir()
    with Stack(tmp_path / "stack", config={"tls": pki.config}) as stack, ThreadPoolExecutor(2) as pool:
        where, output = stack.sidecar.listen, stack.sidecar.child.output
        blocker = pool.submit(complete_many, stack.url, 1, lambda _: {"x-test-id": "b", **dict([behave(hold="head")])})
        stack.wait_in_flight("a", 1)
        held = pool.submit(complete_many, stack.url, 10, lambda n: {"x-test-id": f"held-{n}"})
        stack.wait_waiting(10)
        handshakes = stack.envoy.stats(CLUSTER)[HANDSHAKES]
        assert shown_serial(where, pki.envoy) == serial(pki.first)

        second = secret(pki.ca, SIDECAR_NAME)
        pki.sidecar.put(second)
        wait_until(lambda: shown_serial(where, pki.envoy) == serial(second), message="the second certificate is shown")

        # The key of another certificate, then an expired one: what is in use stays, and each is named once.
        pki.sidecar.put({**secret(pki.ca, SIDECAR_NAME), "tls.key": second["tls.key"]})
        assert [shown_serial(where, pki.envoy) for _ in range(3)] == [serial(second)] * 3
        pki.sidecar.put(secret(pki.ca, SIDECAR_NAME, **PAST))
        assert [shown_serial(where, pki.envoy) for _ in range(3)] == [serial(second)] * 3
        assert output().count("is not the key of the certificate in") == 1
        assert output().count("certificate has expired") == 1

        assert stack.sidecar.queues()["waiting_total"] == 10
        assert stack.envoy.stats(CLUSTER)[HANDSHAKES] == handshakes
        stack.upstreams["a"].release("b")
        assert [answer.status for answer in blocker.result() + held.result()] == [200] * 11
        assert all(len(stack.upstreams["a"].seen(f"held-{n}")) == 1 for n in range(10))

        # A new CA for both, while a request is held; the new connection after a restart is by the new CA alone.
        blocker = pool.submit(complete_many, stack.url, 1, lambda _: {"x-test-id": "c", **dict([behave(hold="head")])})
        stack.upstreams["a"].wait_for("c")
        held = pool.submit(complete_many, stack.url, 1, lambda _: {"x-test-id": "over-the-change"})
        stack.wait_waiting(1)
        ca = trustme.CA()
        pki.sidecar.put(secret(ca, SIDECAR_NAME))
        pki.envoy.put(secret(ca, "envoy.test"))
        wait_until(lambda: shown_serial(where, pki.envoy), message="our own handshake by the new CA")
        stack.sidecar.child.signal(9)
        stack.sidecar.child.wait_exit()
        stack.sidecar.child.stop()
        stack.sidecar.start()
        stack.upstreams["a"].release("c")
        assert [answer.status for answer in blocker.result() + held.result()] == [200, 200]
        assert stack.envoy.stats(CLUSTER)[HANDSHAKES] > handshakes
