"""Durations as people write them, and ages from Envoy's time stamps."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.durations import format_duration, parse_duration
from extproc.stream.ages import BELIEVED_S, DOUBT_S, REPLAYS_BEGIN_S, SAMPLE_S, Ages


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("10s", 10), ("250ms", 0.25), ("1.5m", 90), ("2h", 7200), ("7", 7), (" 3s ", 3), ("0s", 0)],
)
def test_durations_are_read_as_seconds(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "s", "-1s", "1 s", "1d", "nan", "inf", "1e3s", "\u0661s", "1" * 40, "1s1s", "+1"])
def test_what_is_no_duration_is_none(text):
    assert parse_duration(text) is None


@given(st.floats(min_value=0, max_value=10**8))
def test_a_written_duration_reads_back_the_same(seconds):
    assert parse_duration(format_duration(seconds)) == pytest.approx(seconds, abs=1e-8)


class Clocks:
    """A wall clock and a monotonic one that a test sets."""

    def __init__(self) -> None:
        self.wall_s, self.monotonic_s, self.envoy_s = 1_800_000_000.0, 50.0, 0.0

    def stamp(self, ago_s: float = 0.0) -> str:
        return datetime.fromtimestamp(self.wall_s - ago_s - self.envoy_s, UTC).isoformat().replace("+00:00", "Z")

    def advance(self, seconds: float) -> None:
        self.wall_s += seconds
        self.monotonic_s += seconds

    def ages(self, *, envoy_s: float = 0.0) -> Ages:
        """Those of a sidecar that has just begun; Envoy's clock is `envoy_s` behind ours."""
        self.envoy_s = envoy_s
        ages = Ages(30.0, lambda: self.wall_s, lambda: self.monotonic_s)
        ages.expect_replays()
        return ages


def test_a_replayed_request_has_the_age_of_its_stamp():
    clocks = Clocks()
    assert clocks.ages().age_s(clocks.stamp(ago_s=4.0)) == pytest.approx(4.0)


@pytest.mark.parametrize("stamp", [None, "", "yesterday", "2026-13-01T00:00:00Z", "9" * 50])
def test_a_stamp_that_says_nothing_is_age_zero(stamp):
    assert Clocks().ages().age_s(stamp) == 0.0


def test_an_age_is_never_negative_nor_above_the_longest_budget():
    clocks = Clocks()
    ages = clocks.ages()
    assert ages.age_s(clocks.stamp(ago_s=-100)) == 0.0
    assert ages.age_s(clocks.stamp(ago_s=10_000)) == 30.0


@pytest.mark.parametrize("jump_s", [3600.0, -3600.0])
def test_when_the_wall_clock_jumps_ages_are_not_believed_for_a_while(jump_s):
    clocks = Clocks()
    ages = clocks.ages()
    before = clocks.stamp()
    clocks.wall_s += jump_s
    assert ages.age_s(before) == 0.0
    clocks.advance(DOUBT_S + 1)
    ages.expect_replays()
    assert ages.age_s(clocks.stamp(ago_s=3.0)) == pytest.approx(3.0)


def test_long_after_a_start_no_age_is_believed():
    clocks = Clocks()
    ages = clocks.ages()
    clocks.advance(BELIEVED_S)
    assert ages.age_s(clocks.stamp(ago_s=4.0)) == 0.0


def test_while_no_age_is_believed_few_stamps_are_read_and_as_soon_as_one_is_all_are():
    clocks = Clocks()
    ages = clocks.ages()
    clocks.advance(BELIEVED_S)
    read: list[float] = []
    ages._wall = lambda: read.append(clocks.monotonic_s) or clocks.wall_s
    for _ in range(1000):
        clocks.advance(0.001)
        assert ages.age_s(clocks.stamp(ago_s=0.002)) == 0.0
    assert 10 < len(read) <= 1 / SAMPLE_S + 1
    ages.expect_replays()
    assert [ages.age_s(clocks.stamp(ago_s=4.0)) > 0.0 for _ in range(3)] == [True] * 3


@pytest.mark.parametrize("looks_first", [True, False])
def test_after_a_stop_ages_are_believed_again_also_by_the_request_that_comes_first(looks_first):
    clocks = Clocks()
    ages = clocks.ages()
    ages.woke = ages.expect_replays
    for _ in range(30):
        clocks.advance(0.5)
        ages.look()
    assert ages.age_s(clocks.stamp(ago_s=4.0)) == 0.0, "long after the start"
    held = clocks.stamp()
    clocks.advance(12.0)
    if looks_first:
        ages.look()
    assert [ages.age_s(held) for _ in range(20)] == [pytest.approx(12.0)] * 20
    assert ages.offset_s == 0.0


@pytest.mark.parametrize("behind_s", [6.0, 0.2, -6.0, -3600.0])
def test_envoys_clock_is_compared_with_ours_by_requests_that_nobody_held(behind_s):
    clocks = Clocks()
    ages = clocks.ages(envoy_s=behind_s)
    for _ in range(3):
        ages.age_s(clocks.stamp())
        clocks.advance(0.3)
    assert ages.offset_s == pytest.approx(behind_s)
    assert ages.age_s(clocks.stamp(ago_s=0.01)) == pytest.approx(0.01, abs=1e-4)
    assert ages.age_s(clocks.stamp(ago_s=4.0)) == pytest.approx(4.0), "and a replayed one keeps its age"


def test_replayed_requests_do_not_move_the_clock():
    clocks = Clocks()
    ages = clocks.ages()
    held = [clocks.stamp(ago_s=3.0 + number / 10) for number in range(20)]
    for number in (7, 3, 19, 0, 11, 5, 16):
        assert ages.age_s(held[number]) > 2.9
        clocks.advance(0.07)
    assert ages.offset_s == 0.0


def test_a_slow_upload_among_others_does_not_move_the_clock():
    clocks = Clocks()
    ages = clocks.ages()
    for number in range(40):
        ages.age_s(clocks.stamp(ago_s=5.0 if number % 2 else 0.002))
        clocks.advance(0.3)
    assert ages.offset_s == 0.0


def test_a_clock_of_envoys_that_is_set_while_we_run_is_followed():
    clocks = Clocks()
    ages = clocks.ages()
    ages.age_s(clocks.stamp())
    for behind_s in (7.0, -2.0, 0.0):
        clocks.envoy_s = behind_s
        for _ in range(3):
            clocks.advance(5.0)
            ages.age_s(clocks.stamp())
        assert ages.offset_s == pytest.approx(behind_s)


@pytest.mark.parametrize("gaps_s", [(0.0, 0.01, 0.08, 0.06, 0.07, 0.07), (0.0,) * 9, (0.0, 0.0, 0.0, 0.3, 0.0, 0.0)])
def test_requests_that_were_held_since_one_moment_do_not_move_the_clock_however_they_come(gaps_s):
    clocks = Clocks()
    ages = clocks.ages()
    held = clocks.stamp(ago_s=3.0)
    for gap_s in gaps_s:
        clocks.advance(gap_s)
        assert ages.age_s(held) > 2.9
    assert ages.offset_s == 0.0


def test_requests_that_come_in_one_moment_too_late_for_a_replay_are_not_old():
    clocks = Clocks()
    ages = clocks.ages(envoy_s=6.0)
    clocks.advance(REPLAYS_BEGIN_S)
    for _ in range(5):
        ages.age_s(clocks.stamp())
    assert ages.offset_s == pytest.approx(6.0)
