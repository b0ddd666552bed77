"""A class may have a cluster of last resort: where its requests go that would be refused for want of room."""

from __future__ import annotations

import pytest
from test_second_try import headers

from extproc.admission.values import EndpointSpec, RequestClass
from tests.unit.gate_room import ONE, Room, message

CLASSES = (RequestClass("soft", 0, 5.0), RequestClass("firm", 0, 5.0))


def full(*endpoints: EndpointSpec, **policy) -> Room:
    room = Room(*(endpoints or (ONE,)), classes=CLASSES, **policy)
    room.reception.set_overflow({"soft": "elsewhere"})
    return room


def test_what_would_be_refused_for_want_of_room_goes_to_its_classes_cluster_and_takes_no_slot():
    room = full()
    room.open()
    soft, soft_replies = room.open(x_request_class="soft")
    _, firm_replies = room.open(x_request_class="firm")
    room.clock.advance(5.0)
    assert headers(soft_replies)["x-upstream-cluster"] == "elsewhere"
    assert firm_replies[0].immediate_response.status.code == 429
    fields = soft_replies[0].dynamic_metadata.fields["extproc"].struct_value.fields
    assert (fields["outcome"].string_value, fields["overflow"].string_value) == ("budget_expired", "elsewhere")
    soft.receive(message("response_headers", status="200"))
    soft.end()
    assert (room.in_flight("a"), room.reception.overflowed, room.reception.refused) == (1, {"soft": 1}, 1)


def test_what_the_client_would_have_to_change_is_refused_all_the_same():
    room = full(EndpointSpec("a", models=frozenset({"m"})))
    _, replies = room.open(x_request_class="soft", x_model="nobody's")
    assert replies[0].immediate_response.status.code == 404


def test_a_client_that_names_the_cluster_is_not_sent_there():
    room = full()
    _, replies = room.open(x_upstream_cluster="elsewhere")
    assert headers(replies)["x-upstream-cluster"] == "cluster-a"


@pytest.mark.parametrize("end", ["drain", "full"])
def test_a_full_queue_and_a_sidecar_that_drains_send_them_there_too(end):
    room = full(max_queued_requests=0 if end == "full" else 9)
    room.open()
    _, replies = room.open(x_request_class="soft")
    if end == "drain":
        room.gate.drain()
    assert headers(replies)["x-upstream-cluster"] == "elsewhere"
