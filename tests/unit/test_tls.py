"""TLS files: each mistake is named with its key; Envoy's side is rendered and cross-checked. Also: e2e/test_tls.py."""

from __future__ import annotations

import asyncio
import datetime as dt
import logging

import pytest
import trustme
import yaml
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

from extproc.app import App
from extproc.commands import cli
from extproc.config import Config, TlsConfig, parse_config
from extproc.envoy.bootstrap import render
from extproc.envoy.check import check_envoy
from extproc.envoy.sidecar_tls import render_secrets
from extproc.envoy.skeleton import EnvoyOptions
from extproc.errors import ConfigError
from extproc.transport.tls import ServerTls, read

NOW, DAY = dt.datetime.now(dt.UTC), dt.timedelta(days=1)
CA = trustme.CA()
ENVOY = {"server_name": "s.test", "ca_file": "/e/ca.crt", "cert_file": "/e/tls.crt", "key_file": "/e/tls.key"}


@pytest.fixture
def files(tmp_path):
    """A good certificate, its key and a CA, at the places of `config_of`."""
    put(tmp_path, issue())
    (tmp_path / "ca").write_bytes(CA.cert_pem.bytes())
    return tmp_path


def issue(**how):
    return CA.issue_cert("s.test", **how)


def put(directory, cert, key=None):
    (directory / "cert").write_bytes(b"".join(blob.bytes() for blob in cert.cert_chain_pems))
    (directory / "key").write_bytes((key or cert).private_key_pem.bytes())


def config_of(directory, **more) -> TlsConfig:
    paths = {"cert_file": f"{directory}/cert", "key_file": f"{directory}/key", "client_ca_file": f"{directory}/ca"}
    return TlsConfig(**{**paths, **more})


def encrypted(directory):
    key = load_pem_private_key((directory / "key").read_bytes(), None)
    how = (Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"x"))
    (directory / "key").write_bytes(key.private_bytes(*how))


def swapped(directory):
    cert, key = (directory / "cert").read_bytes(), (directory / "key").read_bytes()
    (directory / "cert").write_bytes(key)
    (directory / "key").write_bytes(cert)


def test_good_files_are_read_with_the_time_they_are_good_for(files):
    put(files, issue(not_before=NOW - DAY, not_after=NOW + DAY))
    material = read(config_of(files))
    assert material.ends - material.begins == 2 * DAY.total_seconds()
    assert material.client_ca == CA.cert_pem.bytes()


def test_an_rsa_key_and_a_chain_are_fine(files):
    put(files, CA.create_child_ca().issue_cert("s.test", key_type=trustme.KeyType.RSA))
    assert read(config_of(files)).certificate.count(b"BEGIN CERTIFICATE") >= 2


MISTAKES = {
    "no certificate there": (lambda d: (d / "cert").unlink(), "tls.cert_file: {}/cert can't be read: No such file"),
    "no key there": (lambda d: (d / "key").unlink(), "tls.key_file: {}/key can't be read: No such file"),
    "no CA there": (lambda d: (d / "ca").unlink(), "tls.client_ca_file: {}/ca can't be read: No such file"),
    "a directory": (
        lambda d: ((d / "key").unlink(), (d / "key").mkdir()),
        "tls.key_file: {}/key can't be read: Is",
    ),
    "an empty file": (lambda d: (d / "cert").write_text(""), "tls.cert_file: {}/cert holds no PEM block"),
    "certificate and key swapped": (swapped, "tls.cert_file: {}/cert holds no readable certificate"),
    "a key of another certificate": (
        lambda d: put(d, issue(), issue()),
        "tls.key_file: {}/key is not the key of the certificate in {}/cert",
    ),
    "a key of another kind": (
        lambda d: put(d, issue(), issue(key_type=trustme.KeyType.RSA)),
        "tls.key_file: {}/key is not the key of the certificate in {}/cert",
    ),
    "a key with a passphrase": (encrypted, "tls.key_file: {}/key: is encrypted"),
    "expired": (
        lambda d: put(d, issue(not_before=NOW - 2 * DAY, not_after=NOW - DAY)),
        "certificate has expired",
    ),
    "too early": (lambda d: put(d, issue(not_before=NOW + DAY, not_after=NOW + 2 * DAY)), "is not yet valid"),
    "a CA that is none": (
        lambda d: (d / "ca").write_bytes(issue().cert_chain_pems[0].bytes()),
        "tls.client_ca_file: {}/ca holds no CA certificate",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_with_its_key_and_its_file(files, mistake):
    spoil, expected = MISTAKES[mistake]
    spoil(files)
    with pytest.raises(ConfigError) as caught:
        read(config_of(files))
    (problem,) = caught.value.problems
    assert expected.replace("{}", str(files)) in problem


@pytest.mark.parametrize("comment", ["# für uns\n".encode(), b"# f\xfcr uns\n"])
@pytest.mark.parametrize("name", ["cert", "key", "ca"])
def test_a_comment_in_a_file_may_be_in_any_encoding(files, name, comment):
    (files / name).write_bytes(comment + b"\n" + (files / name).read_bytes())
    assert read(config_of(files))


def test_a_bug_in_what_runs_now_and_then_is_told_once_and_stops_nothing_else(files, caplog):
    loop = asyncio.new_event_loop()
    app = App(Config(tls=config_of(files)), loop)
    app.queue_log.look = lambda: 1 / 0
    put(files, issue())
    first = app.tls.material
    for _ in range(3):
        app._look()
    loop.close()
    assert app.tls.material is not first
    assert caplog.text.count("ZeroDivisionError, told once") == 1


def test_all_mistakes_are_told_at_once_and_check_ends_with_1(files, capsys):
    (files / "cert").unlink()
    (files / "ca").unlink()
    path = files / "config.yaml"
    path.write_text(yaml.safe_dump({"listen": "0.0.0.0:1", "tls": config_of(files).model_dump(exclude_none=True)}))
    assert cli.main(["check", str(path)]) == 1
    said = capsys.readouterr().err
    assert f"{path}: tls.cert_file: " in said
    assert f"{path}: tls.client_ca_file: " in said


def test_a_changed_certificate_is_taken_over_once_and_a_bad_one_is_named_once(files, caplog):
    caplog.set_level(logging.INFO, "extproc.tls")
    tls = ServerTls(config_of(files))
    first = tls.material
    tls.look()
    assert tls.material is first
    put(files, issue(), issue())
    for _ in range(3):
        tls.look()
    assert tls.material is first
    assert caplog.text.count("the certificate in use stays") == 1
    put(files, issue())
    for _ in range(3):
        tls.look()
    assert tls.material is not first
    assert caplog.text.count("new connections use them") == 1


def test_a_certificate_near_its_end_is_warned_of_once(files, caplog):
    put(files, issue(not_before=NOW - 99 * DAY, not_after=NOW + DAY))
    tls = ServerTls(config_of(files))
    for _ in range(3):
        tls.look()
    assert caplog.text.count("renew it") == 1
    put(files, issue(not_before=NOW - DAY, not_after=NOW + 99 * DAY))
    tls.look()
    assert caplog.text.count("renew it") == 1


# ---- the configuration


def problems(data) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_config(yaml.safe_dump(data), "file", {})
    return caught.value.problems


PATHS = {"cert_file": "/s/tls.crt", "key_file": "/s/tls.key"}


def test_tls_makes_other_machines_welcome_at_listen_and_not_at_admin():
    parse_config(yaml.safe_dump({"listen": "0.0.0.0:1", "tls": PATHS}), "file", {})
    (problem,) = problems({"listen": "0.0.0.0:1", "admin": "0.0.0.0:2", "tls": PATHS})
    assert problem.startswith("admin: '0.0.0.0:2' can be reached from other machines in plain text")
    (problem,) = problems({"listen": "0.0.0.0:1"})
    assert problem.startswith("listen: '0.0.0.0:1' can be reached")
    assert "allow_insecure_listen: true" in problem


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"tls": {**PATHS, "cert_file": "tls.crt"}, "listen": "0.0.0.0:1"}, "tls.cert_file: must be an absolute path"),
        ({"tls": {"cert_file": "/a"}, "listen": "0.0.0.0:1"}, "tls.key_file: is required"),
        ({"tls": {**PATHS, "envoy": {"ca_file": "/a"}}}, "tls.envoy.server_name: is required"),
        ({"tls": {**PATHS, "client_ca": "/a"}}, "tls.client_ca: unknown key; did you mean 'client_ca_file'?"),
        ({"tls": PATHS, "listen": "unix:/s"}, "tls: a unix socket needs none"),
        (
            {"tls": {**PATHS, "envoy": {"server_name": "s", "ca_file": "/a", "key_file": "/k"}}},
            "tls.envoy: needs both or none of cert_file and key_file",
        ),
        (
            {"tls": {**PATHS, "client_ca_file": "/a", "envoy": {"server_name": "s", "ca_file": "/a"}}},
            "tls.envoy.cert_file: is needed",
        ),
        ({"socket_mode": "0777"}, "socket_mode: must be 0600 (owner), 0660 (owner and group) or 0666"),
        ({"socket_mode": ["0660"]}, "socket_mode: must be 0600"),
    ],
)
def test_what_does_not_go_together_is_said_in_one_line(data, expected):
    (problem,) = problems(data)
    assert problem.startswith(expected)


@pytest.mark.parametrize("text", ["0660", "'0660'", "660", "0o660", "432"])
def test_a_mode_is_read_as_meant_however_yaml_reads_it(text):
    assert parse_config(f"socket_mode: {text}", "file", {}).socket_mode == 0o660


# ---- Envoy's side

TLS = {**PATHS, "client_ca_file": "/s/ca.crt", "envoy": ENVOY}
SECURE = parse_config(yaml.safe_dump({"listen": "0.0.0.0:50051", "tls": TLS}), "file", {})
PLAIN = parse_config("{}", "file", {})


def check(config, bootstrap, tmp_path) -> list[str]:
    path = tmp_path / "envoy.yaml"
    path.write_text(yaml.safe_dump(bootstrap))
    return check_envoy(config, path)


def test_what_we_render_passes_and_tls_on_one_side_alone_does_not(tmp_path):
    secure, plain = (yaml.safe_load(render(config, EnvoyOptions())) for config in (SECURE, PLAIN))
    assert check(SECURE, secure, tmp_path) == []
    (problem,) = check(SECURE, plain, tmp_path)
    assert "transport_socket: the sidecar speaks TLS and Envoy would not: no request reaches it" in problem
    (problem,) = check(PLAIN, secure, tmp_path)
    assert "transport_socket: the sidecar speaks plain text and Envoy would not" in problem


def test_without_envoys_side_in_the_configuration_there_is_nothing_to_render():
    config = parse_config(yaml.safe_dump({"tls": PATHS}), "file", {})
    for what in (lambda: render(config, EnvoyOptions()), lambda: render_secrets(config), lambda: render_secrets(PLAIN)):
        with pytest.raises(ConfigError, match=r"tls\.envoy: is needed"):
            what()


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("tls_certificate_sds_secret_configs", "lacks a certificate to show"),
        ("combined_validation_context", "lacks a validation context: Envoy believes whoever answers"),
        ("alpn_protocols", "alpn_protocols: lacks h2"),
    ],
)
def test_a_gap_in_envoys_tls_is_named(tmp_path, key, expected):
    bootstrap = yaml.safe_load(render(SECURE, EnvoyOptions()))
    context = bootstrap["static_resources"]["clusters"][0]["transport_socket"]["typed_config"]["common_tls_context"]
    del context[key]
    (problem,) = check(SECURE, bootstrap, tmp_path)
    assert expected in problem


def test_a_name_that_nobody_checks_is_named(tmp_path):
    bootstrap = yaml.safe_load(render(SECURE, EnvoyOptions()))
    context = bootstrap["static_resources"]["clusters"][0]["transport_socket"]["typed_config"]["common_tls_context"]
    del context["combined_validation_context"]["default_validation_context"]
    (problem,) = check(SECURE, bootstrap, tmp_path)
    assert "lacks match_typed_subject_alt_names" in problem


def test_the_files_that_envoy_follows_name_paths_and_hold_no_key():
    secrets = {name: yaml.safe_load(text)["resources"][0] for name, text in render_secrets(SECURE).items()}
    assert set(secrets) == {"extproc_ca.yaml", "extproc_client.yaml"}
    shown = secrets["extproc_client.yaml"]["tls_certificate"]
    assert shown["private_key"] == {"filename": "/e/tls.key"}
    assert secrets["extproc_ca.yaml"]["validation_context"]["trusted_ca"] == {"filename": "/e/ca.crt"}
