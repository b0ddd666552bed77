"""What a single value may be: durations, names, addresses. Each refusal says what would be right."""

from __future__ import annotations

import contextlib
import re
from ipaddress import ip_address, ip_network
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, PlainSerializer, SecretStr, WithJsonSchema
from yarl import URL

from extproc.durations import format_duration, parse_duration
from extproc.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from pydantic.fields import FieldInfo

MOST_SOCKET_PATH = 107
"""Bytes of a unix socket's path: sockaddr_un has 108, and the last is 0 (unix(7))."""
MOST_PORT = 65535
LONGEST_S = 999_999_999.0
"""Of any duration, 31 years: Envoy takes 292, and what is rendered from it must be read again."""
MOST_HEADERS = 8
"""Headers that may carry one thing."""
_ADDRESS = "host:port, like 10.0.0.7:8000 or [::1]:8000"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}", re.ASCII)
_ROUTE = re.compile(r"/[!-)+->@-~]*\*?")
_METHOD = re.compile(r"[A-Z]{1,32}")
_POOL = re.compile(r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?")
_FOUR_NUMBERS = re.compile(r"\d+(\.\d+){3}", re.ASCII)
_STRANGE = re.compile(r"[\s/@?#]")
_HOST = re.compile(r"[A-Za-z0-9._:%-]{1,253}", re.ASCII)
_DNS_NAME = re.compile(r"[A-Za-z0-9._-]{1,253}", re.ASCII)
_HEADER = re.compile(r"[a-z0-9!#$%&'*+.^_`|~-]{1,64}", re.ASCII)


def shown(value: object) -> str:
    """Return what somebody wrote, in YAML's words and not Python's."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a mapping"
    return "a list" if isinstance(value, list) else repr(value)


def _duration(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError(f"must be a duration like 10s or 250ms, not {shown(value)}")  # noqa: TRY004 - pydantic wants it
    seconds = parse_duration(f"{value:.9f}" if isinstance(value, float) else str(value))  # 0.00001 is 1e-05 to Python
    if seconds is None:
        raise ValueError(f"must be a duration like 10s or 250ms, not {shown(value)}")
    if seconds > LONGEST_S:
        raise ValueError(f"must be 999999999s or less, not {shown(value)}")
    return seconds


def _positive_duration(value: object) -> float:
    seconds = _duration(value)
    if seconds <= 0:
        raise ValueError(f"must be longer than 0s, not {shown(value)}")
    return seconds


def _limit(value: object) -> int | None:
    if value == "adaptive" or value is None:
        return None
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 1_000_000:
        return value
    raise ValueError(f"must be 'adaptive' or a whole number from 1, not {shown(value)}")


def _own_limit(value: object) -> int | str | None:
    return value if value == "inherit" else _limit(value)


def _name(value: object) -> str:
    if isinstance(value, str) and _NAME.fullmatch(value):
        return value
    raise ValueError(
        f"must be 1 to 128 letters, digits, '.', '_', ':' or '-', beginning with a letter or digit, not {shown(value)}"
    )


def _header(value: object) -> str:
    if isinstance(value, str) and _HEADER.fullmatch(value.lower()):
        return value.lower()
    raise ValueError(f"must be the name of an HTTP header, like x-model, not {shown(value)}")


def _headers(value: object) -> list[str]:
    names = [_header(name) for name in (value if isinstance(value, list) else [value])]
    if not names or len(set(names)) < len(names) or len(names) > MOST_HEADERS:
        raise ValueError(f"must be one header, or 1 to {MOST_HEADERS} different ones, not {shown(value)}")
    return names


def _address(value: object) -> str:
    if isinstance(value, str):
        split_address(value)
        return value
    raise ValueError(f"must be {_ADDRESS}, not {shown(value)}")


def _server(value: object) -> str:
    address = _address(value)
    if split_address(address)[1] == 0:
        raise ValueError(f"must have a port from 1 to {MOST_PORT}, not 0: {address!r}")
    return address


def _host_name(value: object) -> str:
    if isinstance(value, str) and 1 <= len(value) <= 253 and not _STRANGE.search(value) and _is_host(value):
        return value
    raise ValueError(f"must be a name that can be looked up, like vllm.llm.svc, without a port, not {shown(value)}")


def _certified_name(value: object) -> str:
    if isinstance(value, str) and _DNS_NAME.fullmatch(value):
        return value
    raise ValueError(f"must be a DNS name as a certificate has it, like extproc.llm.svc, not {shown(value)}")


def _listen(value: object) -> str:
    if isinstance(value, str) and value.startswith("unix:/"):
        if not value.isprintable():
            raise ValueError(f"the path of a unix socket must be printable text, not {shown(value)}")
        length = len(value.removeprefix("unix:").encode())
        if length > MOST_SOCKET_PATH:
            raise ValueError(f"the path of a unix socket has at most {MOST_SOCKET_PATH} bytes; this one has {length}")
        return value
    return _address(value)


def _url(value: object) -> str:
    if isinstance(value, str):
        is_url = False
        with contextlib.suppress(ValueError):
            url = URL(value)
            port = url.explicit_port
            is_url = url.scheme in ("http", "https") and bool(url.host) and (port is None or port > 0)
        if is_url and (url.user is not None or url.password is not None):
            raise ValueError("must have no user and no password in it: nothing keeps a URL out of the log")
        if is_url:
            return value
    raise ValueError(f"must be a URL like http://10.0.0.7:8000/metrics, not {shown(value)}")


def _store_url(value: object) -> SecretStr:
    plain = value.get_secret_value() if isinstance(value, SecretStr) else value
    if isinstance(plain, str):
        try:
            url = URL(plain)
            schemes = ("valkey", "valkeys", "redis", "rediss")
            if (url.scheme in schemes and url.host) or (url.scheme == "unix" and url.path.startswith("/")):
                return SecretStr(plain)
        except ValueError:
            pass
    raise ValueError("must be a URL like valkey://10.0.0.7:6379, redis://, valkeys:// (TLS) or unix:///path")


def _pool(value: object) -> str:
    if isinstance(value, str) and _POOL.fullmatch(value):
        return value
    raise ValueError(f"must be 1 to 40 of a-z, 0-9 and '-', a letter or digit at both ends, not {shown(value)}")


def _clusters_file(value: object) -> str:
    if isinstance(value, str) and value.startswith("/") and value.endswith((".yaml", ".yml")) and value.isprintable():
        return value
    right = "an absolute path that ends in .yaml, like /run/extproc/clusters.yaml"
    raise ValueError(f"must be {right}, not {shown(value)}")


def _file(value: object) -> str:
    if isinstance(value, str) and value.startswith("/") and value.isprintable():
        return value
    raise ValueError(f"must be an absolute path, like /etc/extproc/tls/tls.crt, not {shown(value)}")


_SOCKET_MODES: dict[object, int] = {
    spelt: mode for mode in (0o600, 0o660, 0o666) for spelt in (f"{mode:04o}", f"{mode:#o}", mode, int(f"{mode:o}"))
}
"""Also as YAML 1.1 and 1.2 read a bare 0660: 432 and 660. With three choices no number means two."""


def _socket_mode(value: object) -> int:
    try:
        return _SOCKET_MODES[value]
    except (KeyError, TypeError):
        raise ValueError(
            f"must be 0600 (owner), 0660 (owner and group) or 0666 (anyone on this machine), not {shown(value)}"
        ) from None


def _path_of_url(value: object) -> str:
    if isinstance(value, str) and value.startswith("/") and value.isascii() and value.isprintable():
        return value
    raise ValueError(f"must be the path of a URL, like /health, not {shown(value)}")


_SET_BY_HTTP = frozenset(
    ("host", "connection", "content-length", "transfer-encoding", "te", "upgrade", "accept-encoding")
)


def _secret_headers(value: object) -> dict[str, SecretStr]:
    """Say what is wrong without saying what is in there."""
    if not isinstance(value, dict):
        raise ValueError("must be a mapping of header names to text")  # noqa: TRY004 - pydantic wants it
    for name, text in value.items():
        _header(name)
        if name.lower() in _SET_BY_HTTP:
            raise ValueError(f"{name}: HTTP sets this header itself")
        plain = text.get_secret_value() if isinstance(text, SecretStr) else text
        if not isinstance(plain, str) or not plain or not plain.isascii() or not plain.isprintable():
            raise ValueError(f"{name}: must be printable ASCII text")
    return {name.lower(): text if isinstance(text, SecretStr) else SecretStr(text) for name, text in value.items()}


def _route_path(value: object) -> str:
    if isinstance(value, str) and _ROUTE.fullmatch(value):
        return value
    raise ValueError(f"must be a path, with `*` only at its end, like /v1/rerank or /v2/*, not {value!r}")


def _method(value: object) -> str:
    if isinstance(value, str) and _METHOD.fullmatch(value):
        return value
    raise ValueError(f"must be an HTTP method in capitals, like GET, or UPGRADE for a WebSocket, not {value!r}")


def _network(value: object) -> str:
    try:
        if isinstance(value, str):
            return str(ip_network(value))
    except ValueError:
        pass
    raise ValueError(f"must be a network like 10.0.0.0/8 or fd00::/8, not {shown(value)}")


def is_ours(cluster: str) -> bool:
    """Tell whether the name of a cluster is kept for those that we render ourselves."""
    return cluster == "unsteered" or cluster.startswith("extproc_")


def _slice_port(value: object) -> int | str | None:
    if value is None or (type(value) is int and 1 <= value <= MOST_PORT):
        return value
    if isinstance(value, str) and value.strip().isdigit():
        raise ValueError(f"must be a port's number without quotes, or its name, which has a letter, not {shown(value)}")
    if isinstance(value, str) and value:
        return value
    raise ValueError(f"must be a port's number or name, not {shown(value)}")


def _named_port(value: object) -> int | str:
    port = _slice_port(value)
    if port is None:
        raise ValueError("must be a port's number or name")
    return port


def split_address(address: str) -> tuple[str, int]:
    """Split host:port, IPv6 hosts in brackets. Raises ValueError that says what would be right."""
    scheme, with_scheme, _ = address.partition("://")
    if with_scheme:
        why = "; Envoy and we speak plain HTTP to it" if scheme == "https" else ""
        raise ValueError(f"must be host:port without {scheme}://{why}: like 10.0.0.7:8000, not {address!r}")
    try:
        parts = urlsplit(f"//{address}")
        host, port = parts.hostname, parts.port
    except ValueError:  # urllib's words for a port that is none, and for brackets that don't close
        number = address.rpartition(":")[2]
        if number.isascii() and number.isdigit() and int(number[:20]) > MOST_PORT:
            raise ValueError(f"must have a port from 1 to 65535, not {number[:20]}: {address!r}") from None
        raise ValueError(f"must be {_ADDRESS}, not {address!r}") from None
    strange = parts.path or parts.query or parts.fragment or parts.username is not None
    if not host or port is None or strange or not _HOST.fullmatch(host):
        raise ValueError(f"must be {_ADDRESS}, not {address!r}")
    if not _is_host(host):
        raise ValueError(f"must have an IP address, or a name that can be looked up: {host!r} is neither")
    if ":" in host and "%" in host and not ip_address(host).is_link_local:
        raise ValueError(f"must have no zone: only an address of fe80::/10 has one, not {host!r}")
    return host, port


def _is_host(host: str) -> bool:
    """Tell whether this is an IP address, or a name as DNS has them; 10.0.0.256 and a..b are neither."""
    with contextlib.suppress(ValueError):
        if ":" in host or _FOUR_NUMBERS.fullmatch(host):
            return bool(ip_address(host))
        return bool(host.encode("idna"))
    return False


def require_address(flag: str, address: str) -> tuple[str, int]:
    """Split what a command-line flag names. Raises ConfigError unless it is host:port."""
    try:
        return split_address(address)
    except ValueError as error:
        raise ConfigError("command line", [f"{flag}: {error}"]) from None


def require_ip(flag: str, address: str) -> None:
    """Check where Envoy is to listen: it looks no name up there. Raises ConfigError unless it is IP:port."""
    host, _ = require_address(flag, address)
    with contextlib.suppress(ValueError):
        ip_address(host)
        return
    raise ConfigError("command line", [f"{flag}: must have an IP address, where Envoy listens, not {address!r}"])


def require_listen(flag: str, address: str) -> None:
    """Check where a sidecar is said to listen. Raises ConfigError unless it is host:port or unix:/path."""
    try:
        _listen(address)
    except ValueError as error:
        raise ConfigError("command line", [f"{flag}: {error}"]) from None


def is_duration(field: FieldInfo) -> bool:
    """Tell whether a key is a duration, or one or unset."""
    durations = (_duration, _positive_duration)
    said = [*field.metadata, *(one for part in get_args(field.annotation) for one in getattr(part, "__metadata__", ()))]
    return any(isinstance(one, BeforeValidator) and one.func in durations for one in said)


def _written(validate: Callable[[object], object], *shapes: dict[str, object]) -> BeforeValidator:
    """Return a validator; `shapes`: what may stand there, for `extproc schema`, never stricter than `validate`."""
    shape = shapes[0] if len(shapes) == 1 else {"anyOf": list(shapes)}
    return BeforeValidator(validate, json_schema_input_type=Annotated[Any, WithJsonSchema(shape)])


def _matching(pattern: str) -> dict[str, object]:
    return {"type": "string", "pattern": pattern}


_DURATION = (_matching(r"^\s*\d{1,9}(\.\d{1,9})?(ms|s|m|h)?\s*$"), {"type": "number", "minimum": 0})
_LIMIT = ({"const": "adaptive"}, {"type": "null"}, {"type": "integer", "minimum": 1, "maximum": 1_000_000})
_NAMED = ({"type": "integer", "minimum": 1, "maximum": MOST_PORT}, {"type": "string", "minLength": 1})
_HEADER_SHAPE = _matching(r"^[A-Za-z0-9!#$%&'*+.^_`|~-]{1,64}$")
_AT = _matching(r"^[^/?#@\s]+:\d+$")

_WITH_UNIT = PlainSerializer(format_duration)  # what a log says of it
Duration = Annotated[float, _written(_duration, *_DURATION), _WITH_UNIT]
PositiveDuration = Annotated[float, _written(_positive_duration, *_DURATION), _WITH_UNIT]
Percent = Annotated[int, Field(ge=1, le=100)]
Limit = Annotated[int | None, _written(_limit, *_LIMIT)]
OwnLimit = Annotated[int | Literal["inherit"] | None, _written(_own_limit, {"const": "inherit"}, *_LIMIT)]
Name = Annotated[str, _written(_name, _matching(r"^[A-Za-z0-9][A-Za-z0-9._:-]{0,127}$"))]
HeaderName = Annotated[str, _written(_header, _HEADER_SHAPE)]
HeaderNames = Annotated[list[str], _written(_headers, _HEADER_SHAPE, {"type": "array", "items": _HEADER_SHAPE})]
Address = Annotated[str, _written(_address, _AT)]
Server = Annotated[str, _written(_server, _AT)]
CertifiedName = Annotated[str, _written(_certified_name, _matching(r"^[A-Za-z0-9._-]{1,253}$"))]
HostName = Annotated[str, _written(_host_name, {"type": "string", "minLength": 1, "maxLength": 253})]
ModelName = Annotated[str, Field(min_length=1, max_length=256)]
Label = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]
Listen = Annotated[str, _written(_listen, _AT, _matching("^unix:/"))]
Url = Annotated[str, _written(_url, _matching("^[Hh][Tt][Tt][Pp][Ss]?://."))]
StoreUrl = Annotated[SecretStr, _written(_store_url, _matching("^((valkeys?|rediss?)://.|unix:)"))]
PoolName = Annotated[str, _written(_pool, _matching("^[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?$"))]
ClustersFile = Annotated[str, _written(_clusters_file, _matching(r"^/.*\.ya?ml$"))]
FilePath = Annotated[str, _written(_file, _matching("^/"))]
SocketMode = Annotated[int, _written(_socket_mode, {"enum": list(_SOCKET_MODES)})]
RoutePath = Annotated[str, _written(_route_path, _matching(r"^/[!-)+->@-~]*\*?$"))]
Method = Annotated[str, _written(_method, _matching("^[A-Z]{1,32}$"))]
UrlPath = Annotated[str, _written(_path_of_url, _matching("^/"))]
Port = Annotated[int, Field(ge=1, le=65535)]
NamedPort = Annotated[int | str, _written(_named_port, *_NAMED)]
SlicePort = Annotated[int | str | None, _written(_slice_port, *_NAMED, {"type": "null"})]
Network = Annotated[str, _written(_network, _matching(r"^[0-9A-Fa-f.:]+(/\d{1,3})?$"))]
SecretHeaders = Annotated[
    dict[str, SecretStr], _written(_secret_headers, {"type": "object", "additionalProperties": {"type": "string"}})
]
Threshold = Annotated[int, Field(ge=1, le=100)]
