"""How many sidecars there are: quick to count somebody in, slow to count him out."""

from __future__ import annotations

import pytest

from extproc.replicas.census import GONE_S, NEW_BEATS, WARY_S, Census
from extproc.replicas.messages import Member
from extproc.replicas.replica import BEAT_S, STOPPED_S
from extproc.replicas.stores import lease, valkey

ONE, TWO, THREE = (Member(name, f"{name}:1", number) for number, name in enumerate("abc"))


def of_old(*members: Member, beat_s: float = 1.0) -> Census:
    """The store has told of them for so long that each knows of each; the last time now, at 0."""
    census = Census(beat_s)
    census.heard(members, -NEW_BEATS * beat_s - GONE_S)
    census.heard(members, 0.0)
    return census


def share(census: Census, group: set[str], now: float) -> float:
    return census.part(group, now) * (1.0 - census.kept(now))


def test_a_part_is_nothing_until_the_store_has_spoken():
    assert Census().part({"a"}, 0.0) == 0.0


def test_a_sidecar_that_the_store_leaves_out_for_a_moment_still_counts():
    census = of_old(ONE, TWO, THREE)
    census.heard([ONE], 1.0)
    census.heard([ONE], 1.0 + GONE_S - 0.1)
    assert census.part({"a", "b"}, 2.9) == 2 / 3
    census.heard([ONE, TWO], 4.1)
    assert census.part({"a", "b"}, 4.1) == 1.0


def test_to_a_part_of_them_who_vanished_counts_on_as_he_may_be_alive_in_another_part():
    """Two of three that see the store had half of a limit each, and the third, which nobody saw, a third."""
    census = of_old(ONE, TWO, THREE)
    census.heard([ONE, TWO], 1.0)
    census.heard([ONE, TWO], 5.0)
    assert share(census, {"a"}, 5.0) == pytest.approx(1 / 3)
    assert census.part({"a", "b"}, 5.0) == 1.0
    census.heard([ONE, TWO], 6.0 + WARY_S)
    assert share(census, {"a"}, 6.0 + WARY_S) == 1 / 2


def test_one_that_dies_again_and_again_counts_once():
    """Each of its lives has a name of its own: after ten, two of three that see each other had 2/13 of each limit."""
    census = of_old(ONE, TWO)
    for number in range(10):
        life = Member(f"c{number}", "c:1", 3 + number)
        census.heard([ONE, TWO, life], 10.0 * number)
        census.heard([ONE, TWO], 10.0 * number + 4.0)
        census.heard([ONE, TWO], 10.0 * number + 8.0)
    assert share(census, {"a"}, 98.0) == pytest.approx(1 / 3)
    census.heard([ONE, TWO, Member("c", "c:1", 20)], 100.0)
    assert census.part({"a", "b"}, 100.0) == 2 / 3
    assert census.is_wary(100.0)


def test_a_sidecar_that_connects_counts_before_the_store_has_told_of_it():
    census = of_old(ONE)
    census.met(TWO, 0.0)
    assert census.part({"a"}, 0.0) == 1 / 2


def test_who_said_goodbye_counts_no_more_although_the_store_lists_it_for_a_while():
    census = Census()
    census.heard([ONE, TWO], 0.0)
    census.left("b")
    census.heard([ONE, TWO], 0.5)
    assert census.part({"a"}, 0.5) == 1.0
    assert not census.is_wary(0.5)


def test_who_vanished_without_a_word_may_be_alive_unseen_for_a_long_time():
    census = Census()
    census.heard([ONE, TWO], 0.0)
    census.heard([ONE], 1.0)
    census.heard([ONE], 5.0)
    assert census.part({"a"}, 5.0) == 1.0
    assert census.is_wary(5.0 + WARY_S - 1)
    assert not census.is_wary(5.0 + WARY_S + 1)


def test_who_vanished_keeps_the_part_that_it_had_whoever_joins_until_it_may_be_alive_no_more_or_is_back():
    census = of_old(ONE, TWO, THREE)
    census.heard([ONE, TWO], 1.0)
    assert census.kept(1.0) == 0.0
    census.heard([ONE, TWO], 5.0)
    assert census.kept(5.0) == 1 / 3
    census.heard([ONE, TWO, Member("d", "d:1", 4)], 6.0)
    assert census.kept(6.0) == 1 / 3, "it does not know of the fourth"
    assert census.kept(6.0 + WARY_S) == 0.0
    census.heard([ONE, TWO, Member("e", THREE.address, 5)], 7.0)
    assert census.kept(7.0) == 0.0, "another life of it"


def test_who_has_just_come_adds_nothing_to_its_group_while_somebody_may_not_know_of_it_and_counts_to_others_at_once():
    ours, theirs, late = of_old(ONE, TWO, THREE), of_old(ONE, TWO, THREE), Census()
    for census in (ours, theirs, late):
        census.heard([ONE, TWO, THREE, Member("d", "d:1", 4)], 1.0)
    for now in (1.0, NEW_BEATS + GONE_S + 0.9):
        assert ours.part({"a", "b", "d"}, now) == 2 / 3, "the third may not have heard of it"
        assert ours.part({"a", "b", "c", "d"}, now) == 1.0
        assert theirs.part({"c"}, now) == 1 / 4
        assert late.part({"d"}, now) == 0.0
    now = NEW_BEATS + GONE_S + 1.0
    assert ours.part({"a", "b", "d"}, now) == 3 / 4
    assert late.part({"d"}, now) == 1 / 4


def test_those_who_lose_the_store_just_after_they_have_come_are_not_new_for_as_long_as_it_is_silent():
    census = Census()
    census.heard([ONE, TWO], 0.0)
    assert census.part({"a"}, 8.9) == 0.0
    assert census.part({"a"}, 9.0) == 1 / 2


def test_who_vanished_as_somebody_came_has_the_part_that_it_had_before():
    census = of_old(ONE, TWO, THREE)
    for now in range(1, 7):
        census.heard([ONE, TWO, Member("d", "d:1", 4)], float(now))
    assert census.kept(6.0) == pytest.approx(1 / 3)


def test_those_who_have_all_just_come_share_with_the_many_who_vanished_then_as_if_these_knew_of_them():
    """These are dead most likely, and the new ones had nothing for ten minutes but what they take in steps."""
    census = Census()
    new = [Member(name, f"{name}:1", number) for number, name in enumerate("xyz", 4)]
    census.heard([ONE, TWO, THREE, *new], 0.0)
    for now in range(1, 7):
        census.heard(new, float(now))
    assert census.part({"x", "y", "z"}, 6.0) == 1.0
    assert census.kept(6.0) == pytest.approx(1 / 2)


@pytest.mark.parametrize("beat_s", [1.0, 2.0])
def test_who_spoke_last_just_before_somebody_came_is_counted_out_before_that_one_adds_its_part(beat_s):
    census = of_old(ONE, TWO, THREE, beat_s=beat_s)
    now, four = 0.0, Member("d", "d:1", 4)
    while "c" in census.members:  # it spoke at 0, and D came right after
        now += beat_s
        census.heard([ONE, TWO, four, *([THREE] if now <= 3 * beat_s else [])], now)
        assert "c" not in census.members or census.part({"a", "b", "d"}, now + beat_s - 0.01) == 2 / 3
    assert census.part({"a", "b", "d"}, now) == 1.0
    assert census.kept(now) == pytest.approx(1 / 3)


def test_who_is_cut_off_does_not_count_on_it_for_longer_than_others_expect_that_it_lives():
    mine, theirs = Census(), Census()
    mine.heard([ONE, TWO], 0.0)
    theirs.heard([ONE, TWO], 0.0)
    theirs.heard([ONE], 1.0)
    theirs.heard([ONE], 1.0 + GONE_S)
    at = WARY_S - 1.0
    assert (mine.are_wary(at), theirs.kept(at)) == (True, 1 / 2)
    assert not mine.are_wary(WARY_S + 1.0)
    assert theirs.kept(WARY_S + 1.0) == 1 / 2


over_stores = pytest.mark.parametrize("store", [lease, valkey], ids=["lease", "valkey"])


@over_stores
def test_two_beats_of_the_store_may_fail_before_a_sidecar_takes_itself_as_cut_off(store):
    census = Census(store.BEAT_S)
    assert census.is_cut_off(0.0)
    census.heard([ONE, TWO], 0.1, 0.0)
    assert not census.is_cut_off(3 * store.BEAT_S + 0.1)
    assert census.is_cut_off(4 * store.BEAT_S)


@over_stores
def test_a_sidecar_takes_itself_as_cut_off_before_others_that_ask_all_the_time_count_it_out(store):
    """However late the answer came, and though its process may do nothing for a while without noticing."""
    mine, theirs = Census(store.BEAT_S), Census(store.BEAT_S)
    said_at, now = 10.0, 10.0
    mine.heard([ONE, TWO], said_at + 3.0, said_at)
    while theirs.count({"a"}) != 1:
        theirs.heard([ONE, TWO] if now < said_at + store.ALIVE_S else [ONE], now)
        now += 0.01
    assert mine.is_cut_off(now - BEAT_S - STOPPED_S)
