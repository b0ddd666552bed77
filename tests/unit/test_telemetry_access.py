"""Pages behind a lock: a private CA, headers, a token, a redirect; and no secret anywhere else."""

from __future__ import annotations

import asyncio
import os

import pytest
import trustme

from extproc.config import parse_config, target_of
from extproc.endpoints.access import Access
from extproc.endpoints.telemetry.target import Target
from extproc.errors import ConfigError
from tests.unit.pages import Pages, Wire, server_tls, until


def test_a_page_behind_a_private_ca_is_read_by_who_was_told_that_ca_and_by_nobody_else(tmp_path):
    ca, other = trustme.CA(), trustme.CA()
    right, wrong = tmp_path / "right.pem", tmp_path / "wrong.pem"
    ca.cert_pem.write_to_path(str(right))
    other.cert_pem.write_to_path(str(wrong))

    async def main() -> None:
        async with (
            Pages(server_tls(ca)) as pages,
            Pages(server_tls(ca, "elsewhere.test")) as misnamed,
            Wire(interval_s=0.03) as wire,
        ):
            for name, page, file in (
                ("fine", pages, right),
                ("stranger", pages, wrong),
                ("system", pages, None),
                ("misnamed", misnamed, right),
            ):
                access = Access((), None, None if file is None else str(file))
                wire.scraper.put(Target(name, f"https://{page.address}/good", access=access))
            await until(lambda: len(wire.errors()) == 3 and len(wire.seen) >= 2)
            assert {name: set(why) for name, why in wire.errors().items()} == {
                "stranger": {"connect"},
                "system": {"connect"},
                "misnamed": {"connect"},
            }
            assert {name for name, _ in wire.seen} == {"fine"}
            assert misnamed.heads == []  # no word, so no secret, before the name was right
            wrong.with_suffix(".new").write_bytes(right.read_bytes())
            wrong.with_suffix(".new").replace(wrong)
            await until(lambda: "stranger" in {name for name, _ in wire.seen})  # a CA that changed is taken up

    asyncio.run(main())


def test_a_handshake_that_is_never_answered_is_given_up_with_the_page_and_leaves_no_connection():
    held: set[asyncio.StreamWriter] = set()

    async def hold(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        held.add(writer)
        while await reader.read(4096):
            pass
        held.discard(writer)
        writer.close()

    async def main() -> None:
        server = await asyncio.start_server(hold, "127.0.0.1", 0)
        async with server, Wire(interval_s=0.03, timeout_s=0.05) as wire:
            port = server.sockets[0].getsockname()[1]
            wire.scraper.put(Target("hangs", f"https://127.0.0.1:{port}/metrics"))
            await until(lambda: wire.errors().get("hangs", {}).get("timeout", 0) >= 3)
            assert set(wire.errors()["hangs"]) == {"timeout"}
            wire.scraper.remove("hangs")
            await until(lambda: not held)

    asyncio.run(main())


def test_a_page_behind_headers_and_a_token_is_read_and_a_token_that_changed_is_taken_up(tmp_path):
    token = tmp_path / "token"
    token.write_text("first\n")

    async def main() -> None:
        async with Pages() as pages, Wire(interval_s=0.02) as wire:
            pages.token = "first"  # noqa: S105
            access = Access((("x-key", "s3cret"),), str(token))
            wire.scraper.put(Target("a", pages.url("locked"), access=access))
            await until(lambda: len(wire.seen) >= 2)
            assert wire.errors() == {}
            pages.token = "second"  # noqa: S105
            await until(lambda: wire.errors() == {"a": {"status": wire.errors().get("a", {}).get("status", 0)}})
            token.with_name("new").write_text("second")
            token.with_name("new").replace(token)
            seen = len(wire.seen)
            await until(lambda: len(wire.seen) >= seen + 2)

    asyncio.run(main())


def test_a_token_that_cant_be_read_is_an_error_of_its_own_and_a_fifo_there_holds_nothing_up(tmp_path):
    os.mkfifo(tmp_path / "fifo")

    async def main() -> None:
        async with Pages() as pages, Wire(interval_s=0.02) as wire:
            for name in ("missing", "fifo"):
                wire.scraper.put(Target(name, pages.url("locked"), access=Access((), str(tmp_path / name))))
            wire.scraper.put(Target("fine", pages.url("good")))
            await until(lambda: len(wire.errors()) == 2 and len(wire.seen) >= 2)
            assert {name: set(reasons) for name, reasons in wire.errors().items()} == {
                "missing": {"credentials"},
                "fifo": {"credentials"},
            }
            assert "locked" not in pages.hits

    asyncio.run(main())


def test_a_redirect_on_the_same_server_is_followed_and_no_secret_goes_to_another(tmp_path):
    async def main() -> None:
        async with Pages() as pages, Wire() as wire:
            access = Access((("x-key", "s3cret"),))
            wire.scraper.put(Target("moved", pages.url("moved"), access=access))
            await until(lambda: wire.seen)
            assert wire.seen[0][1].running == 3.0
            wire.scraper.put(Target("away", pages.url("away"), access=access))
            await until(wire.errors)
            assert wire.errors() == {"away": {"redirect": 1}}
            assert pages.hits["good"] == 1
            elsewhere = f"http://{pages.address.replace('127.0.0.1', 'localhost')}"
            wire.scraper.put(Target("asked", pages.url("good"), base=elsewhere, access=access))
            await until(lambda: "v1/models" in pages.hits)
            assert "x-key" not in next(head for head in pages.heads if "/v1/models" in head).lower()

    asyncio.run(main())


SECRETS = """
scrape_interval: 1s
health_check: {headers: {x-probe: hush-probe}}
endpoints:
- {name: a, address: '10.0.0.1:8000', metrics_headers: {X-Key: hush-key}, metrics_ca_file: /ca.pem}
"""


def test_secrets_in_the_configuration_are_in_no_text_of_it_and_in_no_error():
    config = parse_config(SECRETS, "file", {})
    target = target_of(config.endpoints[0])
    assert target.access == Access((("x-key", "hush-key"),), None, "/ca.pem")
    assert target.url == "https://10.0.0.1:8000/metrics"
    assert config.health_check is not None
    assert config.health_check.access().headers == (("x-probe", "hush-probe"),)
    assert "hush" not in repr(config) + str(config) + repr(target) + config.model_dump_json()
    for wrong in ("{X-Key: [hush]}", "{host: hush}", "hush", "{X-Key: 'hush\u00e9'}", "{'hush key\u00e9': a}"):
        with pytest.raises(ConfigError) as caught:
            parse_config(SECRETS.replace("{X-Key: hush-key}", wrong), "file", {})
        assert "endpoints[0].metrics_headers" in str(caught.value)
        assert "hush" not in str(caught.value) or "hush key" in str(caught.value)  # a name is no secret
