"""The state of a core, packed: a pickle that may name nothing but the core's own classes.

(docs.python.org/3/library/pickle.html#restricting-globals): who reads a stranger's recording runs none of his code. A
compiled core and the source read each other's: what is named is attributes, and never how a class keeps them. Sessions
are hidden.
"""

from __future__ import annotations

import ast
import binascii
import io
import pickle
import zlib
from collections import OrderedDict
from dataclasses import fields, is_dataclass, replace
from enum import Enum
from importlib import import_module
from inspect import Parameter, signature
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import TYPE_CHECKING, Any

from extproc.admission import events
from extproc.admission.controller import Controller
from extproc.admission.endpoint import Endpoint
from extproc.admission.pool import Pool
from extproc.admission.sessions import Sessions
from extproc.admission.tenants import NO_RULES
from extproc.admission.ticket import Ticket
from extproc.admission.values import EndpointSpec, Policy, Request

if TYPE_CHECKING:
    from collections.abc import Callable

MOST_STATE_BYTES = 1 << 28
_PARTS: dict[str, type] = {kind.__name__: kind for kind in (Ticket, Endpoint, Pool)}
"""What the parts of the core point to each other by: pickled one by one, so that no chain of them gets too deep."""
_CORE = "extproc.admission."
_ATOMS = frozenset({str, int, float, bool, type(None), tuple, list, dict})
_OTHERS = {
    (__name__, "_keep"),
    ("collections", "OrderedDict"),
    ("collections", "deque"),
    ("builtins", "frozenset"),
    ("builtins", "set"),
}


class RecordingError(ValueError):
    """A recording can't be read; the message says where and why."""


def without_session(request: Request, hidden: Callable[[str], str]) -> Request:
    return request if request.session is None else replace(request, session=hidden(request.session))


def source_of(kind: type) -> ast.ClassDef:
    """Return a class of the core as written: its source is beside the machine code."""
    module = Path(events.__file__).with_name(kind.__module__.removeprefix(_CORE) + ".py")
    classes = [one for one in ast.parse(module.read_text()).body if isinstance(one, ast.ClassDef)]
    return next(one for one in classes if one.name == kind.__name__)


class _Freezer(pickle.Pickler):
    """Pickles the parts of a core one by one, and nothing of its driver.

    Sessions are hidden where they stand, in requests and in their memory: any other string may be equal to one.
    """

    def __init__(self, file: io.BytesIO, hidden: Callable[[str], str]) -> None:
        super().__init__(file, protocol=4)
        self.hidden = hidden
        self.numbers: dict[object, int] = {}
        self.todo: list[object] = []

    def persistent_id(self, obj: object) -> tuple[str, int | str] | None:
        kind = type(obj)
        if kind in _ATOMS:
            return None
        if obj is NO_RULES:
            return "no rules", 0
        if obj is _keep:
            return None
        if isinstance(obj, tuple(_PARTS.values())):
            number = self.numbers.get(obj)
            if number is None:
                number = self.numbers[obj] = len(self.numbers)
                self.todo.append(obj)
            return _part(obj).__name__, number
        if kind is MethodType or (kind in (BuiltinFunctionType, FunctionType) and not is_of_core(obj)):
            return "driver", 0
        return None

    def reducer_override(self, obj: object) -> Any:
        kind = type(obj)
        if not is_of_core(kind) or isinstance(obj, (Enum, tuple)):
            return NotImplemented
        if isinstance(obj, Request):
            obj = without_session(obj, self.hidden)
        if is_dataclass(obj):
            return kind, tuple([getattr(obj, field.name) for field in fields(obj)])
        kept = _kept(obj)
        if isinstance(obj, Sessions):
            kept["_endpoints"] = OrderedDict({self.hidden(name): known for name, known in kept["_endpoints"].items()})
        made_of = [kept.get(name, kept.get(f"_{name}")) for name in _needs(kind)]
        return kind, tuple(made_of), kept, None, None, _keep


def is_of_core(thing: Any) -> bool:
    return str(thing.__module__).startswith(_CORE)


def _kept(obj: object, kind: type | None = None) -> dict[str, Any]:
    """Return the attributes of an object of the core, of those that `kind` has: it is compiled, or has slots."""
    kind = kind or type(obj)
    names = getattr(kind, "__mypyc_attrs__", None) or [
        name for base in kind.__mro__ for name in vars(base).get("__slots__", ())
    ]
    return {name: getattr(obj, name) for name in names if name != "__dict__"}


def _keep(obj: object, kept: dict[str, Any]) -> None:
    """Give an object of the core its attributes back."""
    if not is_of_core(type(obj)):
        raise pickle.UnpicklingError(f"a recording may change nothing of {type(obj).__name__}")
    for name, value in kept.items():
        setattr(obj, name, value)


_NEEDS: dict[type, list[str]] = {}


def _needs(kind: type) -> list[str]:
    """Return the arguments that a class of the core is made with: it keeps each under this name, or with a `_`."""
    if kind not in _NEEDS:
        try:
            asked = signature(kind).parameters
            _NEEDS[kind] = [name for name, one in asked.items() if one.default is Parameter.empty]
        except ValueError:  # compiled, and a default is more than a literal: the source tells
            (made,) = (
                one for one in source_of(kind).body if isinstance(one, ast.FunctionDef) and one.name == "__init__"
            )
            usual = made.args.args
            _NEEDS[kind] = [one.arg for one in usual[1 : len(usual) - len(made.args.defaults)]]
    return _NEEDS[kind]


def _part(obj: object) -> type:
    """Return the core's class that `obj` is of: its driver may have one of its own below it."""
    return next(kind for kind in type(obj).__mro__ if _PARTS.get(kind.__name__) is kind)


_BLANK: dict[str, Callable[[], object]] = {
    "Ticket": lambda: Ticket(Request("", 0.0)),
    "Endpoint": lambda: Endpoint(EndpointSpec(""), Policy()),
    "Pool": Pool,
}


class _Thawer(pickle.Unpickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.parts: dict[int, Any] = {}

    def persistent_load(self, pid: Any) -> object:
        name, number = pid
        if name == "driver":
            return None
        if name == "no rules":
            return NO_RULES
        if number not in self.parts:
            self.parts[number] = _BLANK[name]()
        return self.parts[number]

    def find_class(self, module: str, name: str) -> object:
        if (module, name) in _OTHERS:
            return super().find_class(module, name)
        if module.startswith(_CORE) and name.isidentifier():
            found = vars(import_module(module)).get(name)
            if getattr(found, "__module__", None) == module:
                return found
        raise pickle.UnpicklingError(f"a recording may not hold {module}.{name}")


def freeze(core: Controller, hidden: Callable[[str], str]) -> tuple[bytes, dict[Ticket, int], int]:
    """Return the state of `core`, the numbers that tickets have in it, and the next number."""
    file = io.BytesIO()
    freezer = _Freezer(file, hidden)
    freezer.dump({**_kept(core, Controller), "_watchers": []})
    for part in freezer.todo:  # grows meanwhile
        freezer.dump((freezer.numbers[part], _kept(part, _part(part))))
    tickets = {part: number for part, number in freezer.numbers.items() if isinstance(part, Ticket)}
    return zlib.compress(file.getvalue()), tickets, len(freezer.numbers)


def thaw(state: bytes) -> tuple[Controller, dict[int, Ticket]]:
    unzipper = zlib.decompressobj()
    try:
        plain = unzipper.decompress(state, MOST_STATE_BYTES)
        if unzipper.unconsumed_tail:
            raise RecordingError(f"line 1: a state of more than {MOST_STATE_BYTES} bytes")
        file = io.BytesIO(plain)
        thawer = _Thawer(file)
        core = Controller(Policy())
        _keep(core, thawer.load())
        while file.tell() < len(plain):
            number, kept = thawer.load()
            _keep(thawer.parts[number], kept)
    except (
        pickle.UnpicklingError,
        ValueError,
        TypeError,
        KeyError,
        IndexError,
        zlib.error,
        binascii.Error,
        AttributeError,
        EOFError,
        ImportError,
    ) as error:
        raise RecordingError(f"line 1: its state can't be read: {error}") from None
    return core, {number: part for number, part in thawer.parts.items() if isinstance(part, Ticket)}
