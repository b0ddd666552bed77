"""A contender of your own, read from a file: how it is started, and where clients meet it.

    python -m bench.proof --quick --contender mine=router.yaml

The file (docs/benchmarks-yours.md has a whole one):

    ports: [admin]                  # free ports of 127.0.0.1, called `$admin` below
    files:                          # written into a folder of its own, `$directory`
      envoy.yaml: |
        ...
    processes:
      - name: front
        command: [envoy, -c, $directory/envoy.yaml]
        ready: http://$admin/ready  # a URL that answers 200, or an address that takes connections

Known everywhere: `$listen` (HOST:PORT where clients send), `$listen_host`, `$listen_port`, `$directory`, `$python`,
`$envoy`, `$endpoints` (HOST:PORT,HOST:PORT,...), `$endpoint_urls` (http://HOST:PORT http://...), `$lb_endpoints` (a
JSON list of Envoy's LbEndpoint), `$classes` (names, the most urgent first, commas between), and each port's HOST:PORT
as `$NAME`, with `$NAME_host` and `$NAME_port`. An item of a command that is `$endpoint_urls` alone becomes one item
each. `$$` is a dollar.
"""

from __future__ import annotations

import json
import sys
from string import Template
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tests.e2e.kit.envoy import envoy_binary
from tests.e2e.kit.processes import free_port

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from extproc.simulate.workload import Klass

SEPARATE = "$endpoint_urls"


class RivalError(ValueError):
    """A contender's file can't be used; the message says what, where and what would be right."""


class Process(BaseModel):
    """One process of a contender."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1, pattern=r"^[a-z0-9-]+$")
    command: list[str] = Field(min_length=1)
    ready: str = Field(min_length=1)


class Recipe(BaseModel):
    """What a file says."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    processes: list[Process] = Field(min_length=1)
    ports: list[str] = []
    files: dict[str, str] = {}


Started = tuple[str, list[str], str]
"""A process to be started: its name, its command, and what says that it is ready."""


def is_own(contender: str) -> bool:
    """Say whether a contender's name is NAME=FILE."""
    return "=" in contender.partition(",")[0]


def name_of(contender: str) -> str:
    """Return NAME of NAME=FILE."""
    return contender.partition("=")[0]


def read(path: Path) -> Recipe:
    """Read a contender's file. Raises RivalError."""
    try:
        return Recipe.model_validate(yaml.safe_load(path.read_text()))
    except (OSError, yaml.YAMLError) as error:
        raise RivalError(f"{path}: {error}") from None
    except ValidationError as error:
        where = "; ".join(f"{'.'.join(map(str, one['loc'])) or 'file'}: {one['msg']}" for one in error.errors())
        raise RivalError(f"{path}: {where}") from None


def prepare(recipe: Recipe, listen: str, addresses: Sequence[str], classes: Sequence[Klass], at: Path) -> list[Started]:
    """Choose ports, write the files into `at`, fill the commands. Raises RivalError for a name that nothing has."""
    order = sorted(classes, key=lambda klass: -klass.priority)
    words = {
        "directory": str(at),
        "python": sys.executable,
        "envoy": str(envoy_binary()),
        "endpoints": ",".join(addresses),
        "endpoint_urls": " ".join(f"http://{address}" for address in addresses),
        "lb_endpoints": json.dumps([_lb_endpoint(address) for address in addresses]),
        "classes": ",".join(klass.name for klass in order),
    }
    for name, address in {"listen": listen, **{name: f"127.0.0.1:{free_port()}" for name in recipe.ports}}.items():
        host, _, port = address.rpartition(":")
        words |= {name: address, f"{name}_host": host, f"{name}_port": port}
    for name, text in recipe.files.items():
        path = at / name
        if path.parent != at:
            raise RivalError(f"files: {name!r} must be a name without a folder")
        path.write_text(_filled(text, words, f"files.{name}"))
    started: list[Started] = []
    for number, process in enumerate(recipe.processes):
        where = f"processes.{number}"
        command: list[str] = []
        for item in process.command:
            whole = _filled(item, words, f"{where}.command")
            command += whole.split() if item == SEPARATE else [whole]
        started.append((process.name, command, _filled(process.ready, words, f"{where}.ready")))
    return started


def _filled(text: str, words: Mapping[str, str], where: str) -> str:
    try:
        return Template(text).substitute(words)
    except (KeyError, ValueError) as error:
        raise RivalError(
            f"{where}: {error}: known are {', '.join(f'${word}' for word in words)}; $$ is a dollar"
        ) from None


def _lb_endpoint(address: str) -> dict[str, Any]:
    host, _, port = address.rpartition(":")
    return {"endpoint": {"address": {"socket_address": {"address": host, "port_value": int(port)}}}}
