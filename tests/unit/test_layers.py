"""Dependencies point one way: read from the imports, so that nobody has to remember it."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

from extproc.commands import cli

ROOT = Path(__file__).parents[2] / "extproc"

# For each part: what of this package, and which outside modules of interest, it may import.
ALLOWED = {
    "admission": {"extproc.admission", "extproc.errors"},
    "stream": {"extproc.stream", "extproc.admission", "extproc.durations", "extproc.errors", "extproc._pb"},
    "stream/gate": {"extproc.admission", "extproc.stream.replays"},
    "stream/routes": set(),
    "stream/silence": set(),
    "stream/replays": {"extproc.admission", "extproc.stream.by_age"},
    "stream/by_age": {"extproc.admission"},
    "stream/wire": {"extproc._pb", "extproc.errors"},
    "stream/bodies": {"extproc._pb", "extproc.errors"},
    "replicas": {
        *("extproc.replicas", "extproc.stream", "extproc.admission", "extproc.config", "extproc.errors"),
        *("extproc.transport.tls", "extproc.kubernetes", "extproc._pb", "extproc.words"),
    },
    "transport": {"extproc.transport", "extproc.stream", "extproc.config", "extproc.errors"},
    "transport/completion": {"extproc.transport", "extproc.stream", "extproc.errors"},
    "kubernetes": {"extproc.endpoints.access", "extproc.endpoints.names"},
    "engine": {"extproc.engine", "extproc.errors"},
    "endpoints/access": {"extproc.files"},
    "endpoints/telemetry": {
        *("extproc.endpoints.telemetry", "extproc.endpoints.access", "extproc.admission", "extproc.errors"),
        "extproc.turns",
    },
    "endpoints": {
        *("extproc.endpoints", "extproc.config", "extproc.envoy", "extproc.errors", "extproc.tasks"),
        *("extproc.admission", "extproc.stream", "extproc.files", "extproc.kubernetes", "extproc.turns"),
        "extproc.words",
    },
    "admin": {
        *(
            "extproc.admin",
            "extproc.admission",
            "extproc.stream",
            "extproc.observe",
            "extproc.config",
            "extproc.errors",
            "extproc.pure",
            "extproc.tasks",
            "extproc.turns",
        ),
        "extproc",
    },
    "config": {
        *("extproc.config", "extproc.admission", "extproc.stream", "extproc.endpoints.telemetry"),
        *("extproc.durations", "extproc.files", "extproc.errors", "extproc.endpoints.access", "extproc.stability"),
        "extproc.words",
    },
    "config/types": {"extproc.durations", "extproc.errors"},
    "config/section": set(),
    "config/kubernetes_api": {"extproc.config.section", "extproc.config.types"},
    "config/judging": {"extproc.config.section", "extproc.config.types", "extproc.admission"},
    "config/learning": {
        *("extproc.config.section", "extproc.config.types", "extproc.config.judging", "extproc.admission"),
    },
    "config/endpoints": {
        *(
            "extproc.config.kubernetes_api",
            "extproc.config.section",
            "extproc.config.types",
            "extproc.endpoints.telemetry",
            "extproc.endpoints.access",
        ),
    },
    "config/requests": {"extproc.config.section", "extproc.config.types", "extproc.admission"},
    "config/replicas": {"extproc.config.kubernetes_api", "extproc.config.section", "extproc.config.types"},
    "config/tls": {"extproc.config.section", "extproc.config.types"},
    "config/keys": {
        *("extproc.config.types", "extproc.config.section", "extproc.config.learning", "extproc.config.endpoints"),
        *("extproc.config.requests", "extproc.config.replicas", "extproc.config.tls"),
        *("extproc.admission", "extproc.stream", "extproc.endpoints.telemetry"),
    },
    "config/rules": {"extproc.config.types", "extproc.config.keys"},
    "envoy": {
        *("extproc.envoy", "extproc.config", "extproc.stream", "extproc.durations", "extproc.files", "extproc.errors"),
        *("extproc.endpoints.names", "extproc.admission.limit"),
    },
    "observe": {"extproc.observe", "extproc.admission", "extproc.endpoints.telemetry", "extproc.words", "extproc"},
    "words": set(),
}
PURE_ROOMS_OF_REPLICAS = ("census", "following", "gate", "leading", "messages", "replica", "wire")
FORBIDDEN_OUTSIDE = {
    "admission": {"asyncio", "grpc", "time", "random", "logging", "threading", "os", "socket", "aiohttp"},
    "stream": {"grpc", "asyncio"},
    **{f"replicas/{room}": {"asyncio", "time", "random", "socket"} for room in PURE_ROOMS_OF_REPLICAS},
}


def imports_of(part: str) -> set[str]:
    """Return the dotted names of all modules that a part imports, `from extproc import wire` as extproc.wire."""
    path = ROOT / part
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
    assert files, part
    found = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module == "extproc":
                found |= {
                    f"extproc.{alias.name}" if (ROOT / alias.name).exists() else "extproc" for alias in node.names
                }
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module)
    return found


def test_each_part_imports_only_what_is_below_it():
    for part, allowed in ALLOWED.items():
        own = {name for name in imports_of(part) if name.split(".")[0] == "extproc"}
        strangers = {
            name
            for name in own
            if not any(name == a or name.startswith(a + ".") for a in allowed if a != "extproc") and name not in allowed
        }
        assert not strangers, f"{part} must not import {strangers}"


def test_the_core_the_gate_and_the_session_do_no_io_and_read_no_clock():
    for part, forbidden in FORBIDDEN_OUTSIDE.items():
        outside = {name.split(".")[0] for name in imports_of(part)}
        assert not outside & forbidden, f"{part} must not import {outside & forbidden}"


def test_only_wire_and_bodies_know_the_generated_messages():
    for file in ROOT.rglob("*.py"):
        if file.name not in ("wire.py", "bodies.py") and "_pb" not in file.parts:
            assert "_pb" not in re.sub(r"\b(health|reflection|struct)_pb2", "", file.read_text()), file


def test_one_sidecar_alone_imports_nothing_of_the_rooms_for_several():
    """They are imported where `replicas` is set, inside a function; the top of a module never does."""
    for file in ROOT.rglob("*.py"):
        if "replicas" not in (*file.parts, file.stem):
            names = {
                node.module
                for node in ast.parse(file.read_text()).body
                if isinstance(node, ast.ImportFrom) and node.module is not None
            }
            several = ("extproc.replicas", "extproc.simulate.replicas")
            assert not {name for name in names if name.startswith(several)}, file


def test_the_command_line_of_a_sidecar_imports_neither_the_simulator_nor_the_engine(monkeypatch, capsys):
    for room in ("extproc.simulate", "extproc.engine"):
        monkeypatch.setitem(sys.modules, room, None)
    assert cli.main(["schema"]) == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize("part", ["admission", "stream"])
def test_the_map_names_every_room_of_the_core_and_of_a_stream(part):
    told = (ROOT.parent / "docs/map.md").read_text()
    rooms = {file.name for file in (ROOT / part).glob("*.py")} - {"__init__.py"}
    assert not {room for room in rooms if f"`{room}`" not in told}
