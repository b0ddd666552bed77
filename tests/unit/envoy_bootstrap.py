"""A rendered Envoy bootstrap that tests of `extproc check --envoy` spoil."""

from __future__ import annotations

from typing import TYPE_CHECKING

import yaml

from extproc.envoy.bootstrap import render
from extproc.envoy.check import check_envoy, could_not_look
from extproc.envoy.skeleton import EnvoyOptions

if TYPE_CHECKING:
    from pathlib import Path

    from extproc.config import Config

MANAGER = "static_resources.listeners[0].filter_chains[0].filters[0].typed_config"
OURS = 1
"""Where our filter stands among the HTTP filters: behind the one that waits for the whole body."""
HOST = f"{MANAGER}.route_config.virtual_hosts[0]"


class Rendered:
    """What `extproc envoy-config` prints for `config`, in parts."""

    def __init__(self, config: Config, options: EnvoyOptions | None = None) -> None:
        self.config = config
        self.whole = yaml.load(render(config, options or EnvoyOptions()), yaml.CSafeLoader)
        self.resources = self.whole["static_resources"]
        self.manager = self.resources["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
        self.host = self.manager["route_config"]["virtual_hosts"][0]
        self.routes = self.host["routes"]
        self.steered, self.bypass, self.unsteered = self.routes[-3:]

    def write(self, tmp_path: Path) -> Path:
        path = tmp_path / "envoy.yaml"
        path.write_text(yaml.safe_dump(self.whole))
        return path

    def check(self, tmp_path: Path) -> list[str]:
        return check_envoy(self.config, self.write(tmp_path))

    def notes(self, tmp_path: Path) -> list[str]:
        return could_not_look(self.config, self.write(tmp_path))

    def the_problem(self, tmp_path: Path) -> str:
        """The one problem that there is."""
        problems = self.check(tmp_path)
        assert len(problems) == 1, problems
        return problems[0]
