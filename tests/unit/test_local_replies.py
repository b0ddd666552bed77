"""What clients read when Envoy itself answers: the words of each flag."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from extproc.envoy.local_replies import local_replies


def mappers(*, fail_open: bool = False) -> list[tuple[list[str], dict[str, str]]]:
    """The flags and the error of each mapper that is not for gRPC alone, in order."""
    return [(flags, body["json_format"]["error"]) for flags, filters, body in _all(fail_open) if not _grpc(filters)]


def _all(fail_open: bool) -> list[tuple[list[str], list[dict[str, Any]], dict[str, Any]]]:
    """The flags, the further filters and the body of each mapper."""
    rows = []
    for mapper in yaml.safe_load(local_replies(fail_open=fail_open))["local_reply_config"]["mappers"]:
        filters = mapper["filter"].get("and_filter", {"filters": [mapper["filter"]]})["filters"]
        flags = filters[0].get("response_flag_filter", {"flags": []})["flags"]  # a 413 has none
        rows.append((flags, filters[1:], mapper["body_format_override"]))
    return rows


def _grpc(filters: list[dict[str, Any]]) -> bool:
    return any("header_filter" in one for one in filters)


def test_a_reset_that_is_envoys_own_is_not_laid_at_a_servers_door():
    named = {flag: error["code"] for flags, error in reversed(mappers()) for flag in flags}
    assert named["UC"] == named["UR"] == "server_broke_off"
    assert "LR" not in named


def test_a_body_that_envoy_does_not_take_is_the_clients_doing_and_the_last_in_the_list():
    """Whatever else has a flag says more."""
    flags, error = mappers()[-1]
    assert (flags, error["code"], error["type"]) == ([], "body_too_large", "invalid_request_error")
    assert {error["type"] for flags, error in mappers() if flags} == {"server_error"}


@pytest.mark.parametrize("fail_open", [False, True])
def test_servers_may_all_be_well_only_where_none_was_to_be_asked(fail_open):
    flags, error = mappers(fail_open=fail_open)[0]
    assert (flags, error["code"]) == (["UH"], "no_sidecar")
    assert ("may all be well" in error["message"]) is not fail_open


@pytest.mark.parametrize("fail_open", [False, True])
def test_before_each_error_for_clients_of_http_stands_the_same_as_a_sentence_for_those_of_grpc(fail_open):
    rows = _all(fail_open)
    for (flags, filters, sentence), (same_flags, same_filters, body) in zip(rows[::2], rows[1::2], strict=True):
        assert _grpc(filters)
        assert not _grpc(same_filters)
        assert (flags, filters[:-1]) == (same_flags, same_filters)
        error = body["json_format"]["error"]
        assert sentence == {
            "text_format_source": {"inline_string": f"{error['message']} ({error['code']}, %RESPONSE_FLAGS%)"}
        }
