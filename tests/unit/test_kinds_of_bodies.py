"""What a body is, as far as headers tell: estimates learned from one kind say nothing of another."""

from __future__ import annotations

import pytest

from extproc.admission.estimate import TokenEstimate
from extproc.admission.ticket import Ticket
from extproc.admission.values import FORM, JSON, OTHER, UNSIZED, Request
from extproc.stream.ages import Ages
from extproc.stream.request import Headers, Requests
from extproc.stream.wire import Incoming, Kind


def read(*, has_body: bool = True, **headers: str) -> Request:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    incoming = Incoming(Kind.REQUEST_HEADERS, named, has_body=has_body)
    return Requests(Headers(), Ages(30.0)).read(incoming, 0.0, {})


@pytest.mark.parametrize(
    ("content_type", "kind"),
    [
        ("application/json", JSON),
        ("Application/JSON; charset=utf-8", JSON),
        ("application/problem+json", JSON),
        ("", JSON),
        ("multipart/form-data; boundary=x", FORM),
        ("audio/wav", OTHER),
        ("a-name-that-nobody-has-had-yet/1", OTHER),
    ],
)
def test_a_body_is_one_of_a_few_kinds_by_its_content_type(content_type: str, kind: str) -> None:
    assert read(content_type=content_type, content_length="4000").kind == kind


def test_a_body_without_a_size_is_of_a_kind_of_its_own_whatever_its_type() -> None:
    assert read(content_type="multipart/form-data; boundary=x").kind == UNSIZED
    assert read(has_body=False).kind == JSON


def test_what_a_recording_costs_is_learned_apart_from_what_as_many_bytes_of_text_cost() -> None:
    estimate, size = TokenEstimate(), "400000"
    text, recording = (
        Ticket(read(content_type=kind, content_length=size)) for kind in ("application/json", "multipart/form-data")
    )
    for _ in range(10):
        estimate.learn_prompts(300, [recording])
    for ticket in (text, recording):
        estimate.estimate(ticket, None)
    assert (text.prompt_tokens, recording.prompt_tokens) == (100_000, pytest.approx(300, rel=0.05))
