"""The unix socket: whose it is, who may connect, and that a second server can't take it. Real processes, real users."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import sys
import tempfile
from pathlib import Path

import pytest

from extproc.errors import StartError
from extproc.transport.listener import Listener, SocketRights

from .kit.extproc_raw import RawChannel, StreamEnd
from .kit.processes import run
from .kit.stack import Sidecar
from .kit.stack import local as local_address

NOBODY = 65534
CONNECT = "import socket, sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1])"
as_root = pytest.mark.skipif(os.getuid() != 0 or shutil.which("setpriv") is None, reason="only root can be others")


@pytest.fixture
def place():
    """A directory that other users may enter, short enough for the path of a socket."""
    with tempfile.TemporaryDirectory(prefix="extproc-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


def connects_as(user: int, group: int, path: Path) -> bool:
    command = ["setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups"]
    return run([*command, "/usr/bin/env", "python3", "-c", CONNECT, str(path)]).returncode == 0


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@as_root
@pytest.mark.parametrize(
    ("keys", "mode", "member", "stranger"),
    [
        ({"socket_mode": "0600", "socket_group": str(NOBODY)}, 0o600, False, False),
        ({"socket_group": str(NOBODY)}, 0o660, True, False),
    ],
)
def test_who_may_connect_is_what_the_configuration_says(place, keys, mode, member, stranger):
    path = place / "s"
    with Sidecar({"listen": f"unix:{path}", **keys}, place):
        assert mode_of(path) == mode
        assert path.stat().st_uid == os.getuid()
        assert connects_as(NOBODY, NOBODY, path) is member
        assert connects_as(NOBODY - 1, NOBODY - 1, path) is stranger


def test_a_second_server_is_told_who_holds_the_socket_and_the_first_serves_on(place):
    path = place / "s"
    with Sidecar({"listen": f"unix:{path}"}, place) as first:
        second = Sidecar({**first.config, "admin": local_address()}, place, name="second")
        second.write_config()
        done = run([sys.executable, "-m", "extproc", "serve", "--config", str(second.path)])
        assert done.returncode == 3
        assert f"another server holds {path}" in done.stderr
        with RawChannel(f"unix:{path}") as channel, channel.open() as stream:
            stream.half_close()
            with pytest.raises(StreamEnd, match="OK"):
                stream.read()
        first.child.signal(9)
        first.child.wait_exit()
        first.child.stop()
        assert path.is_socket(), "a killed server leaves it"
        first.start()


def test_nobody_else_can_connect_before_the_group_is_right(place):
    path = place / "s"
    born: list[int] = []
    with socket.socket(socket.AF_UNIX) as server:

        def add_port(address: str, _: object) -> int:
            server.bind(address.removeprefix("unix:"))
            born.append(mode_of(path))
            return 1

        listener = Listener(f"unix:{path}", SocketRights(0o666))
        before = os.umask(0o022)
        os.umask(before)
        listener.bind(add_port)
        assert born == [0o600]
        assert mode_of(path) == 0o666
        after = os.umask(before)
        assert after == before, "the process's own mask is back"
        listener.close()
        with pytest.raises(StartError, match="socket_group: there is no group 'no-such-group' on this machine"):
            Listener(f"unix:{place}/t", SocketRights(group="no-such-group")).bind(lambda *_: 1)
