"""The documents as a site: a hook of mkdocs (`make docs`).

Pages are written to be read in the repository, so their links lead out of docs/. Here the root's pages become pages of
the site, other files that a page links to are put beside it, and links follow. `llms.txt` lists the pages for machines,
and each page is there as Markdown too.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING

from mkdocs.structure.files import File

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^```(\w+) .*$", re.MULTILINE)
"""The first line of a block that says more than its language: to the tests, which run it."""
LINK = re.compile(r"\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^)#\s]+)((?:#[^)]*)?)\)")
"""Its text, its target, and an anchor."""


def _at(path: str) -> str:
    """Return where a file of the repository is in the site's sources."""
    if path == "README.md":
        return "index.md"
    if path == "docs/adr":
        return "adr/0001-one-stream-one-lease.md"
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"project/{path}" if path.endswith(".md") and "/" not in path else f"files/{path}"


def _home(uri: str) -> str:
    """Return where a page of the site comes from in the repository."""
    if uri == "index.md":
        return "README.md"
    return uri.removeprefix("project/") if uri.startswith("project/") else f"docs/{uri}"


def _targets(text: str, home: str) -> dict[str, str]:
    """Return the files of the repository that a page links to, by how it writes them."""
    found = {target for _, target, _ in LINK.findall(text) if "://" not in target and not target.startswith("mailto:")}
    return {target: posixpath.normpath(posixpath.join(posixpath.dirname(home), target)) for target in found}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the root's pages, and what pages link to outside docs/."""
    pages = {page.name: page.read_text(encoding="utf-8") for page in sorted(ROOT.glob("*.md"))}
    linked: set[str] = set()
    for name, text in pages.items():
        files.append(File.generated(config, _at(name), content=text))
        linked |= set(_targets(text, name).values())
    for page in files.documentation_pages():
        if page.src_uri not in ("index.md",) and not page.src_uri.startswith("project/"):
            linked |= set(_targets(page.content_string, f"docs/{page.src_uri}").values())
    for path in sorted(linked):
        if not path.startswith("docs/") and path not in pages and (ROOT / path).is_file():
            files.append(File.generated(config, _at(path), content=(ROOT / path).read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Let links lead to where their targets are in the site."""
    here = page.file.src_uri
    targets = _targets(markdown, _home(here))

    def moved(found: re.Match[str]) -> str:
        path = targets.get(found[2])
        if path is None:
            return found[0]
        if _at(path).startswith("files/") and (ROOT / path).is_dir():
            return found[1]  # a folder has no page
        where = posixpath.relpath(_at(path), posixpath.dirname(here) or ".")
        return f"[{found[1]}]({where}{found[3]})"

    return FENCE.sub(r"```\1", LINK.sub(moved, markdown))


def on_config(config: MkDocsConfig) -> None:
    """List the decisions, and the pages that mkdocs.yml does not place."""
    nav = config.nav or []
    placed = str(nav)
    decisions = sorted(f"adr/{path.name}" for path in (ROOT / "docs/adr").glob("*.md"))
    others = sorted(path.name for path in (ROOT / "docs").glob("*.md") if f"'{path.name}'" not in placed)
    config.nav = [*nav, *([{"More": others}] if others else []), {"Decisions": decisions}]


def on_nav(nav: object, config: MkDocsConfig, files: Files) -> None:
    """Remember the pages in the order of the navigation, for llms.txt."""
    del config, files
    _listed[:] = list(nav.pages)  # type: ignore[attr-defined]


_listed: list[Page] = []


def on_post_build(config: MkDocsConfig) -> None:
    """Write llms.txt, and each page as Markdown beside its HTML."""
    site = Path(config.site_dir)
    lines = [f"# {config.site_name}", "", f"> {config.site_description}", ""]
    for page in _listed:
        twin = page.file.dest_uri.removesuffix(".html") + ".md"
        (site / twin).parent.mkdir(parents=True, exist_ok=True)
        (site / twin).write_text(page.markdown or "", encoding="utf-8")
        lines.append(f"- [{page.title}]({twin})")
    (site / "llms.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
