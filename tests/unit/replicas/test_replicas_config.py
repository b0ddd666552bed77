"""The section `replicas` of a configuration: what is missing or unsafe is named, and nothing secret is shown."""

from __future__ import annotations

import asyncio
import sys

import pytest

from extproc.app import App
from extproc.config import parse_config
from extproc.errors import ConfigError

VALKEY = "valkey: {url: 'valkey://user:hush@10.0.0.2:6379'}"


def problems(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_config(text, "file", {})
    return caught.value.problems


def test_a_sidecar_is_alone_unless_it_is_told_otherwise():
    assert parse_config("{}", "file", {}).replicas is None


def test_the_address_that_others_are_told_is_where_we_listen_unless_another_is_given():
    here = parse_config(f"replicas: {{listen: '127.0.0.1:7001', {VALKEY}}}", "file", {}).replicas
    assert here.reached_at == "127.0.0.1:7001"
    environ = {"EXTPROC_REPLICAS__ADVERTISE": "10.1.2.3:7001"}
    there = parse_config(f"replicas: {{listen: '127.0.0.1:7001', {VALKEY}}}", "file", environ).replicas
    assert there.reached_at == "10.1.2.3:7001"


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ("replicas: {}", "replicas: needs one of valkey and kubernetes_lease"),
        (f"replicas: {{{VALKEY}, kubernetes_lease: {{}}}}", "replicas: needs one of valkey and kubernetes_lease"),
        (f"replicas: {{listen: '10.0.0.1:7001', {VALKEY}}}", "replicas.listen: '10.0.0.1:7001' can be reached"),
        (
            f"replicas: {{listen: '0.0.0.0:7001', allow_insecure: true, {VALKEY}}}",
            "replicas.advertise: is needed: nobody can connect to '0.0.0.0:7001'",
        ),
        ("replicas: {valkey: {url: 'http://10.0.0.2'}}", "replicas.valkey.url: must be a URL like valkey://"),
        (f"replicas: {{pool: 'Not A Name', {VALKEY}}}", "replicas.pool: must be 1 to 40 of a-z"),
        (f"replicas: {{pol: a, {VALKEY}}}", "replicas.pol: unknown key; did you mean 'pool'?"),
        (f"replicas: {{{VALKEY}, tls: {{cert_file: /a}}}}", "replicas.tls.key_file: is required"),
    ],
)
def test_what_is_missing_or_unsafe_is_named_with_what_would_be_right(section, says):
    assert any(problem.startswith(says) for problem in problems(section)), problems(section)


def test_a_password_in_the_stores_url_is_shown_nowhere():
    config = parse_config(f"replicas: {{{VALKEY}}}", "file", {})
    assert "hush" not in repr(config)
    assert "hush" not in str(config.model_dump())
    assert "hush" not in str(problems("replicas: {valkey: {url: 'nonsense://hush@x'}}"))


@pytest.mark.parametrize(
    ("answered", "says"), [(False, "and never has: until it does, or a leader"), (True, "nothing changes meanwhile: ")]
)
def test_a_store_that_never_answered_is_told_apart_from_one_that_is_silent_now(answered, says, caplog):
    """A start without its store said that nothing changes: it sends one request at a time to each engine."""

    async def main() -> None:
        text = "replicas: {listen: '127.0.0.1:0', valkey: {url: 'unix:///nowhere'}}"
        app = App(parse_config(text, "file", {}), asyncio.get_running_loop())
        if answered:
            app.membership.replica.store_says([])
        await app.membership._ask_store()

    asyncio.run(main())
    assert f"the store does not answer, {says}" in caplog.text


def test_without_the_client_of_the_store_the_error_says_what_to_install(monkeypatch):
    from extproc.replicas.stores import store_of

    config = parse_config(f"replicas: {{{VALKEY}}}", "file", {}).replicas
    monkeypatch.delitem(sys.modules, "extproc.replicas.stores.valkey", raising=False)
    monkeypatch.setitem(sys.modules, "valkey.asyncio", None)
    with pytest.raises(ConfigError, match=r"`pip install 'valkey<7,>=6.1'`"):
        store_of(config)
