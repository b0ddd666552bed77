"""`extproc check`: a configuration, and the Envoy bootstrap beside it, told as text or as JSON for a pipeline."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from extproc.config import doubts, load_config
from extproc.envoy.advice import advice
from extproc.envoy.check import check_envoy, could_not_look
from extproc.envoy.gateway import Gateway
from extproc.errors import ConfigError
from extproc.transport import tls
from extproc.words import some_of

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from extproc.config import Config


MOST_NAMED = 8
"""Clusters that are named; who has more knows how they are called."""


def check(file: Path, envoy: Path | None, *, as_json: bool) -> bool:
    """Tell what is wrong with `file`, and with the bootstrap `envoy` for it; return whether nothing is.

    Raises ConfigError with all that is wrong, if it is to be told as text.
    """
    if not as_json:
        config = _valid(file, envoy)
        for path, words in _good(config, file, envoy):
            print(f"{path}: {words}")
        for path, warning in _warnings(config, file, envoy):
            print(f"{path}: warning: {warning}", file=sys.stderr)
        return True
    findings: list[dict[str, str]] = []
    try:
        config = _valid(file, envoy)
        findings += [_finding(str(path), "warning", words) for path, words in _warnings(config, file, envoy)]
        findings += [_finding(str(path), "info", words) for path, words in _as_it_should_be(config, file, envoy)]
    except ConfigError as error:
        findings += [_finding(error.source, "error", problem) for problem in error.problems]
    ok = all(finding["severity"] != "error" for finding in findings)
    report: dict[str, Any] = {"ok": ok, "findings": findings}
    print(json.dumps(report, indent=2))
    return ok


def _valid(file: Path, envoy: Path | None) -> Config:
    config = load_config(file)
    mistakes = []
    if not config.endpoints and not config.sources and "endpoints" not in config.model_fields_set:
        what = "there are none, and no discovery: every request will be refused; say `endpoints: []` if that is meant"
        mistakes.append(f"endpoints: {what}")
    if config.tls is not None:
        try:
            tls.read(config.tls)
        except ConfigError as error:
            mistakes += error.problems
    if mistakes:
        raise ConfigError(str(file), mistakes)
    if envoy is not None:
        problems = Gateway(config, envoy).problems if config.picks else check_envoy(config, envoy)
        if problems:
            raise ConfigError(str(envoy), problems)
    return config


def _good(config: Config, file: Path, envoy: Path | None) -> Iterable[tuple[Path, str]]:
    classes = ", ".join(f"{klass.name} (budget {klass.budget_s:g}s)" for klass in config.classes)
    found = f" and those of {len(config.sources)} source(s)" if config.sources else ""
    yield file, f"ok: {len(config.endpoints)} endpoint(s){found}, queue {config.mode}, classes: {classes}"
    if envoy is not None:
        is_whole = config.picks or not could_not_look(config, envoy)
        yield envoy, f"ok: {'fits' if is_whole else 'what could be looked at fits'} {file}"
    yield from _as_it_should_be(config, file, envoy)


def _as_it_should_be(config: Config, file: Path, envoy: Path | None) -> Iterable[tuple[Path, str]]:
    if envoy is None and config.endpoints and not config.picks and config.envoy_clusters_file is None:
        names = [endpoint.cluster or endpoint.name for endpoint in config.endpoints]
        needs = f"Envoy needs a cluster for each endpoint: {some_of(names, MOST_NAMED)}"
        yield file, f"{needs}; `--envoy BOOTSTRAP` looks whether they are there"
    if envoy is not None and config.picks:
        for words in Gateway(config, envoy).good:
            yield envoy, words


def _warnings(config: Config, file: Path, envoy: Path | None) -> Iterable[tuple[Path, str]]:
    for doubt in doubts(config, file):
        yield file, doubt
    if envoy is not None:
        if config.picks:  # a gateway's Envoy, mostly as a dump: what ours has beside is not for it
            notes = Gateway(config, envoy).notes
        else:
            notes = [*could_not_look(config, envoy), *advice(config, envoy)]
        for note in notes:
            yield envoy, note


def _finding(file: str, severity: str, words: str) -> dict[str, str]:
    """Split what is told by its key path, where it begins with one: `endpoints[2].address: must be ...`."""
    at, colon, message = words.partition(": ")
    if not colon or " " in at:
        at, message = "", words
    return {"file": file, "severity": severity, "at": at, "message": message}
