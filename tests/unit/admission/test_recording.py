"""A recording of the core's events is a bug report that anybody can run again."""

from __future__ import annotations

import base64
import contextlib
import importlib
import json
import pickle
import pkgutil
import random
import zlib
from dataclasses import is_dataclass
from enum import Enum
from inspect import Parameter, signature
from itertools import product
from typing import TYPE_CHECKING

import pytest

import extproc.admission
from extproc.admission import administration, controller, events, sharing
from extproc.admission.controller import Controller
from extproc.admission.endpoint import Endpoint
from extproc.admission.estimate import Learnt
from extproc.admission.frame import Frame
from extproc.admission.load import Load
from extproc.admission.room import Room
from extproc.admission.sessions import Home
from extproc.admission.ticket import State, Ticket
from extproc.admission.values import Answer, EndpointSpec, Policy, Request
from extproc.commands.cli import main
from extproc.errors import TransitionError
from extproc.observe.packing import RecordingError
from extproc.observe.recording import FORMAT, Recorder, Recording
from extproc.pure import is_compiled

from .methods import events_of_the_core
from .storm import Storm

if TYPE_CHECKING:
    from pathlib import Path


EVENTS = [name for name, kind in vars(events).items() if isinstance(kind, type) and events.Event in kind.__mro__[1:-1]]
EVENTS = [name for name in EVENTS if not name.startswith("Of")]


def recorded(seed: int, before: int, after: int) -> tuple[str, Controller]:
    """Return the recording of the later part of a storm, and the core that it was of."""
    storm = Storm(seed, check_every=10**9)
    storm.run(before)
    core = storm.audited.core
    recorder = Recorder(core)
    core.watch(recorder.happened)
    storm.run(before + after)
    assert storm.audited.core is core
    return recorder.text(), core


def small() -> tuple[Controller, Recorder, list[Ticket]]:
    """Return a core with one request that runs and one that waits, and its recorder."""
    core = Controller(Policy(shed=False))
    core.put_endpoint(EndpointSpec("a", max_running_requests=1), 0.0)
    tickets = [Ticket(Request(f"r{number}", 0.0, tenant="t", session=f"s{number}")) for number in range(3)]
    for ticket in tickets[:2]:
        core.offer(ticket, 0.0)
    recorder = Recorder(core)
    core.watch(recorder.happened)
    return core, recorder, tickets


@pytest.mark.parametrize("seed", [1, 2, 4])
def test_a_storm_recorded_from_its_middle_runs_again_to_the_same_decisions_and_the_same_state(seed: int) -> None:
    text, core = recorded(seed, 3000, 1500)
    again = Recording(text.splitlines())
    differences = list(again.run())
    assert len(differences) > 1200
    assert not any(differences)
    assert repr(again.core) == repr(core)
    assert [t.request.id for t in again.core.waiting_tickets()] == [t.request.id for t in core.waiting_tickets()]


def test_what_no_storm_has_runs_again_too() -> None:
    core, recorder, (first, *_) = small()
    core.know_models(["m"], 1.0)
    core.send(Ticket(Request("embedding", 1.0)), 1.0)
    core.believe_home(Home("s9", "a", 10, 0.0), 1.0)
    core.believe(Learnt("mean", None, "", 0, 50.0, 0.0))
    core.drain(2.0)
    core.offer(Ticket(Request("too late", 3.0, kind="chat")), 3.0)
    core.release(first, 4.0)
    again = Recording(recorder.text().splitlines())
    assert list(again.run()) == [None] * 7
    assert again.core.learnt() == core.learnt()
    assert [home[1:] for home in again.core.homes(9, 4.0)] == [home[1:] for home in core.homes(9, 4.0)]


def test_no_name_of_a_session_is_in_a_recording() -> None:
    core, _, (first, second, _) = small()
    recorder = Recorder(core)
    core.watch(recorder.happened)
    core.release(first, 1.0)
    core.offer(Ticket(Request("r9", 2.0, session="s9")), 2.0)
    core.believe_home(Home("s8", "a", 10, 0.0), 1.0)
    head, *rest = recorder.text().splitlines()
    state = zlib.decompress(base64.b64decode(json.loads(head)["state"]))
    for name in ("s0", "s1", "s8", "s9"):
        assert name.encode() not in state
        assert f'"{name}"' not in "".join(rest)
    assert b"r1" in state, "what is no session is there"
    assert second.request.session == "s1"


def test_no_name_of_a_session_whose_request_left_is_in_a_recording() -> None:
    core, _, (first, second, _) = small()
    core.cancel(second, 1.0)
    core.release(first, 1.0)
    core.set_policy(Policy(session_memory=1), 1.0)
    core.offer(Ticket(Request("r9", 2.0, session="s9")), 2.0)
    state = zlib.decompress(base64.b64decode(json.loads(Recorder(core).text().splitlines()[0])["state"]))
    assert b"r1" in state, "the alarm of who left is kept for a while"
    assert b"s1" not in state


def test_no_name_of_a_session_is_told_of_an_event_that_could_not_be_recorded() -> None:
    core, recorder, _ = small()
    recorder._note = None  # type: ignore[method-assign, assignment]
    core.believe_home(Home("s8", "a", 10, 0.0), 1.0)
    *_, end = recorder.text().splitlines()
    assert "HomeBelieved could not be recorded" in end
    assert "s8" not in end


@pytest.mark.parametrize("session", ["a", "waiting", "policy", "count", "default"])
def test_a_session_may_be_called_like_anything_else_in_the_core(session: str) -> None:
    core = Controller(Policy(shed=False))
    core.put_endpoint(EndpointSpec("a", max_running_requests=1, models=frozenset({"m"})), 0.0)
    tickets = [Ticket(Request("r", 0.0, model="m", tenant="t", session=session)) for _ in range(3)]
    for ticket in tickets:
        core.offer(ticket, 0.0)
    recorder = Recorder(core)
    core.watch(recorder.happened)
    core.release(tickets[0], 1.0)
    core.put_endpoint(EndpointSpec("b", max_running_requests=1, models=frozenset({"m"})), 2.0)
    again = Recording(recorder.text().splitlines())
    assert list(again.run()) == [None, None]
    assert repr(again.core) == repr(core)
    assert repr(again.core.policy) == repr(core.policy)


def test_a_decision_that_differs_is_shown_beside_the_recorded_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    core, recorder, (first, _, third) = small()
    core.offer(third, 1.0)
    core.release(first, 2.0, Answer.OK)
    file = tmp_path / "bug.jsonl"
    file.write_text(recorder.text())
    assert main(["simulate", "--replay", str(file)]) == 0
    told = capsys.readouterr().out
    assert "the same decisions as recorded" in told
    assert "2 events, 1 decisions: 1 dispatched" in told
    file.write_text(recorder.text().replace('"a", 2.0', '"b", 2.0'))
    assert main(["simulate", "--replay", str(file)]) == 1
    told = capsys.readouterr().out
    assert "event 2, Released(at=2.0" in told
    assert any(
        line.startswith("! ") and "dispatched b 2.0" in line and "dispatched a 2.0" in line
        for line in told.splitlines()
    )


def test_every_event_of_the_core_is_told_once_as_a_value_of_its_own_kind() -> None:
    core = Controller(Policy())
    samples = {
        "spec": EndpointSpec("a"),
        "specs": (EndpointSpec("a"),),
        "name": "a",
        "is_up": True,
        "load": Load(running=1.0),
        "policy": Policy(),
        "quota": 1,
        "models": ("m",),
        "names": ("a",),
    }
    methods = events_of_the_core()
    assert methods.pop("put_endpoint") == ["spec", "now"], "which is put_endpoints of one"
    needs = {"cancel": State.WAITING, "withdraw": State.WAITING}
    needs |= dict.fromkeys(("release", "disown", "move"), State.LEASED)
    kinds = set()
    for name, needed in methods.items():
        core = Controller(Policy())
        core.put_endpoint(EndpointSpec("a", max_running_requests=1), 1.0)
        ticket = Ticket(Request("r", 1.0))
        while name in needs and ticket.state is not needs[name]:
            ticket = Ticket(Request("r", 1.0))
            core.offer(ticket, 1.0)
        told: list[events.Event] = []
        core.watch(lambda event, _, told=told: told.append(event))
        values = {"ticket": ticket, "now": 1.0, **samples}
        getattr(core, name)(**{one: values[one] for one in needed})
        (event,) = told
        assert event.at == 1.0
        kinds.add(type(event))
    assert len(kinds) == len(methods)


def test_no_event_is_made_while_nobody_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    for layer, name in product((controller, sharing, administration), EVENTS):
        if hasattr(layer, name):
            monkeypatch.setattr(layer, name, None)
    core = Controller(Policy())
    core.put_endpoint(EndpointSpec("a", max_running_requests=1), 0.0)
    ticket = Ticket(Request("r", 0.0))
    core.offer(ticket, 0.0)
    core.tick(1.0)
    core.release(ticket, 2.0)
    assert ticket.state is State.DONE


def test_a_recording_begins_with_words_that_say_what_it_is() -> None:
    _, recorder, _ = small()
    first = recorder.text().splitlines()[0]
    begins = first[:300].partition('"state"')[0]
    assert all(word in begins for word in ("each event of the core", "extproc simulate --replay", "1 waiting and"))


def test_a_recording_ends_by_itself_when_it_is_full() -> None:
    core, _, (first, *_) = small()
    full: list[bool] = []
    recorder = Recorder(core, lambda: full.append(True), most_events=2)
    core.watch(recorder.happened)
    core.tick(0.1)
    assert not full
    core.tick(0.2)
    core.release(first, 0.3)
    assert full == [True]
    lines = recorder.text().splitlines()
    assert [json.loads(line).get("event") for line in lines[1:]] == ["Ticked", "Ticked", None]
    assert list(Recording(lines).run()) == [None, None]


def test_who_waits_or_runs_when_a_recording_ends_leaves_nothing_behind_in_it() -> None:
    core, recorder, (first, second, third) = small()
    core.offer(third, 0.5)
    core.release(first, 1.0)
    core.release(second, 2.0)
    core.release(third, 3.0)
    assert not recorder._numbers


class Evil:
    """What an attacker's pickle would run."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("owned",))


@pytest.mark.parametrize(
    "state",
    [
        pickle.dumps(Evil(), protocol=4),
        b"cextproc.errors\nConfigError\n(tR.",
        b"cextproc.admission.books\nheappush\n(tR.",
        b"cextproc.admission.books\nTYPE_CHECKING\n.",
        b"\x80\x04\x8c\x1aextproc.admission.controller\x8c\x0cState.NEW.sub\x93.",
        b"cextproc.observe.packing\n_keep\n(cextproc.admission.ticket\nTicket\n}(S'why'\nI1\nutR.",
        b"",
    ],
    ids=["builtin", "another part", "an import of the core", "no class", "dotted", "a class changed", "nothing"],
)
def test_a_strangers_recording_runs_none_of_his_code(state: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    head = {"extproc": "1", "format": FORMAT, "state": base64.b64encode(zlib.compress(state)).decode()}
    with pytest.raises(RecordingError, match="line 1: its state"):
        Recording([json.dumps(head)])
    assert "owned" not in capsys.readouterr().out


def test_garbage_is_an_error_that_names_the_line_and_nothing_else() -> None:
    core, recorder, (first, _, third) = small()
    core.offer(third, 1.0)
    core.observe("a", Load(running=1.0), 1.5)
    core.set_policy(Policy(), 1.7)
    core.release(first, 2.0, Answer.OK)
    head, *rest = recorder.text().splitlines()
    dice = random.Random(1)
    for _ in range(400):
        lines = list(rest)
        number = dice.randrange(len(lines) - 1)
        line = lines[number]
        at = dice.randrange(len(line))
        lines[number] = line[:at] + dice.choice(['"', "{", "1", "null", "[", "x", ""]) + line[at + dice.randrange(4) :]
        with contextlib.suppress(TransitionError):  # read, and told so: it can't have happened
            problem = problem_of([head, *lines])
            assert problem is None or problem.startswith(f"line {number + 2}")


def problem_of(lines: list[str]) -> str | None:
    try:
        list(Recording(lines).run())
    except RecordingError as error:
        return str(error)
    return None


def test_a_file_that_is_no_recording_is_told_with_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "x.jsonl"
    assert main(["simulate", "--replay", str(file)]) == 1
    file.write_text('{"format": 99}\n')
    assert main(["simulate", "--replay", str(file)]) == 1
    assert "format 99" in capsys.readouterr().err


MADE_OTHERWISE = (Frame, Controller, Room, Endpoint, Ticket)


@pytest.mark.skipif(is_compiled(), reason="read from the source, whose signatures a compiled core does not tell")
def test_what_a_class_of_the_core_is_made_with_it_keeps_under_that_name() -> None:
    """A recording makes objects again with it, and a compiled class takes nothing else in its place."""
    for found in pkgutil.iter_modules(extproc.admission.__path__, "extproc.admission."):
        for kind in vars(importlib.import_module(found.name)).values():
            if not isinstance(kind, type) or kind.__module__ != found.name or issubclass(kind, Enum | tuple):
                continue
            kept = [*getattr(kind, "__slots__", ()), *getattr(kind, "__mypyc_attrs__", ())]
            if kept and kind not in MADE_OTHERWISE and not is_dataclass(kind):
                asked = signature(kind).parameters
                needs = [name for name, one in asked.items() if one.default is Parameter.empty]
                assert [name for name in needs if asked[name].kind is Parameter.KEYWORD_ONLY] == [], kind
                assert [name for name in needs if name not in kept and f"_{name}" not in kept] == [], kind
