"""The core's events by the names of their methods, read from its source: compiled, a method tells no annotations."""

from __future__ import annotations

import ast
from pathlib import Path

import extproc

LAYERS = ("controller", "sharing", "administration")


def events_of_the_core() -> dict[str, list[str]]:
    """Return the methods that return decisions, each with the arguments that it needs."""
    rooms = Path(extproc.__file__).with_name("admission")
    return {
        method.name: _needed(method.args)
        for layer in LAYERS
        for core in ast.parse((rooms / f"{layer}.py").read_text()).body
        if isinstance(core, ast.ClassDef)
        for method in core.body
        if isinstance(method, ast.FunctionDef)
        and not method.name.startswith("_")
        and method.returns is not None
        and ast.unparse(method.returns) == "list[Decision]"
    }


def _needed(arguments: ast.arguments) -> list[str]:
    usual = arguments.args[1 : len(arguments.args) - len(arguments.defaults)]
    named = [one for one, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if default is None]
    return [one.arg for one in (*usual, *named)]
