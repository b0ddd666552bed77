"""The commands of the documents work: each page's blocks run from top to bottom, on other ports.

In a page, ```yaml file: NAME writes a file, ```sh runs (`&` at the end of a line: until the page ends), and
```sh skip: REASON does not run, and says why.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from .kit.processes import free_port

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(sh|yaml)( [^\n]*)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = [page for page in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]) if "```sh\n" in page.read_text()]
PORTS = (8001, 8002, 8080, 9901, 9902, 50051)
DEFAULTS = {  # what a command uses without being told, and must not use here
    "extproc envoy-config ": "extproc envoy-config --http 127.0.0.1:8080 --envoy-admin 127.0.0.1:9901 ",
    "extproc top ": "extproc top --admin 127.0.0.1:9902 ",
}


def script_of(page: Path, directory: Path) -> tuple[str, dict[str, str]]:
    """Write the page's files and return its commands, and the ports that it uses for those it names."""
    ports = {str(port): str(free_port()) for port in PORTS}

    def elsewhere(text: str) -> str:
        for said, meant in DEFAULTS.items():
            text = text.replace(said, meant)
        return re.sub("|".join(rf"\b{port}\b" for port in ports), lambda found: ports[found[0]], text)

    lines = ["set -e"]
    for kind, words, text in BLOCK.findall(page.read_text()):
        head = words.strip()
        if kind == "yaml" and head.startswith("file: "):
            (directory / head.removeprefix("file: ")).write_text(elsewhere(text))
        elif kind == "sh" and not head:
            lines.append(elsewhere(text))
        elif kind == "sh":
            assert re.match(r"skip: \w", head), f"{page.name}: a block that neither runs nor says why not: {head!r}"
    return "\n".join(lines), ports


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_commands_of_a_page_work_from_top_to_bottom(page, tmp_path):
    script, ports = script_of(page, tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    environ = {key: value for key, value in os.environ.items() if not key.startswith("EXTPROC_")}
    environ |= {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "EXTPROC_LISTEN": f"127.0.0.1:{ports['50051']}",
        "EXTPROC_ADMIN": f"127.0.0.1:{ports['9902']}",
    }
    shell = subprocess.Popen(
        ["bash", "-c", script],
        cwd=tmp_path,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    # What a page leaves running in the background holds the pipe: wait for the shell alone.
    with shell:
        try:
            code = shell.wait(120)
        finally:
            for number in (signal.SIGTERM, signal.SIGKILL):
                try:
                    os.killpg(shell.pid, number)
                except ProcessLookupError:
                    break
        assert shell.stdout is not None
        assert code == 0, shell.stdout.read()[-4000:]
