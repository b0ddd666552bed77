"""How the ext_proc port comes into being, for any gRPC driver: plain or TLS, TCP or a unix socket with its rights."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from extproc.errors import StartError

if TYPE_CHECKING:
    from collections.abc import Callable

    import grpc

    from extproc.transport.tls import ServerTls


@dataclass(frozen=True, slots=True)
class SocketRights:
    """Who may connect to a unix socket.

    Attributes:
        mode: of the socket; connecting needs write permission.
        group: its group, a name or a number; None: the one it is born with.
    """

    mode: int = 0o660
    group: str | None = None


class Listener:
    """One address to serve at, and what must be kept while it is served."""

    def __init__(self, address: str, rights: SocketRights | None = None, tls: ServerTls | None = None) -> None:
        """Plan to listen at host:port or unix:/path; a `tls` makes it TLS."""
        self.address = address
        self.tls = tls
        self._rights = rights or SocketRights()
        self._lock: int | None = None

    def bind(self, add_port: Callable[[str, grpc.ServerCredentials | None], int]) -> int:
        """Have `add_port(address, credentials or None)` bind, and return its port. Raises StartError."""
        credentials = None if self.tls is None else self.tls.credentials()
        path = self.address.removeprefix("unix:")
        is_socket = path != self.address
        if is_socket:
            self._lock = _lock_socket(path)
        # Born closed to all others, opened when its group is right: nobody connects in between. The mask is the whole
        # process's; this is the start, and nothing else writes files now.
        umask = os.umask(0o177) if is_socket else None
        try:
            port = add_port(self.address, credentials)
        except RuntimeError as error:
            who = "is another process using it, or a sidecar that drains and has another admin port?"
            raise StartError(f"listen: can't bind {self.address}; {who} ({error})") from None
        finally:
            if umask is not None:
                os.umask(umask)
        if is_socket:
            _open_socket(path, self._rights)
        return port

    def close(self) -> None:
        """Let another server have the unix socket."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _open_socket(path: str, rights: SocketRights) -> None:
    if rights.group is not None:
        group = int(rights.group) if rights.group.isdecimal() else rights.group
        try:
            shutil.chown(path, group=group)
        except LookupError:
            raise StartError(f"socket_group: there is no group {rights.group!r} on this machine") from None
        except OSError as error:
            why = f"{error.strerror}; this process must be a member of that group"
            raise StartError(f"socket_group: can't give {path} to {rights.group}: {why}") from None
    Path(path).chmod(rights.mode)


def _lock_socket(path: str) -> int:
    """Take the lock beside a unix socket: without it a second server would silently steal the path."""
    try:
        descriptor = os.open(path + ".lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise StartError(f"listen: {path}.lock is a symbolic link; remove it, and see who made it") from None
        raise StartError(f"listen: can't create {path}.lock: {error.strerror}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise StartError(
            f"listen: another server holds {path} (its lock is {path}.lock); one that drains frees it at its end"
        ) from None
    left = Path(path)
    if left.is_socket():
        left.unlink()  # of a server that died: its lock is free
    elif left.exists():
        os.close(descriptor)
        raise StartError(f"listen: {path} is there already, and it is no socket; choose another path, or remove it")
    return descriptor
