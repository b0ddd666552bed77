"""What clients read when Envoy itself answers: the words of each flag."""

from __future__ import annotations

import pytest
import yaml

from extproc.envoy.local_replies import local_replies


def mappers(*, fail_open: bool = False) -> list[tuple[list[str], dict[str, str]]]:
    """The flags and the error of each mapper, in order."""
    rows = []
    for mapper in yaml.safe_load(local_replies(fail_open=fail_open))["local_reply_config"]["mappers"]:
        filters = mapper["filter"].get("and_filter", {"filters": [mapper["filter"]]})["filters"]
        flags = filters[0]["response_flag_filter"]["flags"]
        rows.append((flags, mapper["body_format_override"]["json_format"]["error"]))
    return rows


def test_a_reset_that_is_envoys_own_is_not_laid_at_a_servers_door():
    named = {flag: error["code"] for flags, error in reversed(mappers()) for flag in flags}
    assert named["UC"] == named["UR"] == "server_broke_off"
    assert "LR" not in named


@pytest.mark.parametrize("fail_open", [False, True])
def test_servers_may_all_be_well_only_where_none_was_to_be_asked(fail_open):
    flags, error = mappers(fail_open=fail_open)[0]
    assert (flags, error["code"]) == (["UH"], "no_sidecar")
    assert ("may all be well" in error["message"]) is not fail_open
