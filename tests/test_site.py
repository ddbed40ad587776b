"""The documentation site: its navigation is complete, its build strict, and it loads nothing from another server."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.environments import ROOT

DOCS = ROOT / "docs"
RESOURCES = {"script": "src", "link": "href", "img": "src", "iframe": "src", "source": "src", "video": "src"}
"""Attributes that make a browser load a file, by tag."""
LOADED_LINKS = {"stylesheet", "icon", "preload", "preconnect", "modulepreload", "manifest"}
"""Relations of a link that make a browser load its target; a canonical address is only named."""
KNOWN_IN_SCRIPTS = {
    # The theme loads Mermaid for elements of this class alone, and a polyfill in browsers without ResizeObserver.
    "https://unpkg.com/mermaid@11/dist/mermaid.min.js": 'class="[^"]*\\bmermaid\\b',
    "https://unpkg.com/resize-observer-polyfill": None,
    # The theme counts the stars of the repository where a page links it in this component.
    "https://api.github.com/": 'data-md-component="source"',
    "https://${": 'data-md-component="source"',
    "https://clipboardjs.com/": None,  # the license of a library
}
"""Addresses in the scripts of the theme, each with the pattern of a page that makes the script load it."""


class _IgnoreTags(yaml.SafeLoader):
    """Reads mkdocs.yml without the tags that name Python objects."""


_IgnoreTags.add_multi_constructor("", lambda loader, suffix, node: None)


def pages_of(nav: Any) -> Iterator[str]:
    """Yield the pages and folders of a navigation."""
    if isinstance(nav, str):
        yield nav
    for entry in nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else ():
        yield from pages_of(entry)


def missing_pages(nav: Any, docs: Path) -> set[str]:
    """Return the pages that are not in the navigation, and the entries that are not pages."""
    named = list(pages_of(nav))
    folders = tuple(entry for entry in named if entry.endswith("/"))
    written = {file.relative_to(docs).as_posix() for file in docs.rglob("*.md")}
    in_folders = {page for page in written if page.startswith(folders) and page not in named}
    return (written - in_folders) ^ {entry for entry in named if entry not in folders}


def external_resources(site: Path) -> set[str]:
    """Return what a browser would load from another server, as ``PAGE: ADDRESS``."""
    found: set[str] = set()
    pages = {file: file.read_text() for file in sorted(site.rglob("*.html"))}
    for file, text in pages.items():
        parser = _Resources()
        parser.feed(text)
        found |= {f"{file.relative_to(site)}: {address}" for address in parser.addresses if is_external(address)}
    for file in sorted(site.rglob("*.css")):
        for address in re.findall(r"(?:url\(|@import )\s*[\"']?([^\"')\s]+)", file.read_text()):
            if is_external(address):
                found.add(f"{file.relative_to(site)}: {address}")
    for file in sorted(site.rglob("*.js")):
        for address in re.findall(r"https?://[^\s\"'`)]+", file.read_text()):
            known = next((start for start in KNOWN_IN_SCRIPTS if address.startswith(start)), None)
            pattern = KNOWN_IN_SCRIPTS[known] if known else None
            if known is None or (pattern and any(re.search(pattern, text) for text in pages.values())):
                found.add(f"{file.relative_to(site)}: {address}")
    return found


def is_external(address: str) -> bool:
    """Return whether an address names another server."""
    return address.startswith(("http://", "https://", "//"))


class _Resources(HTMLParser):
    """Collects the addresses that the tags of a page load."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Record the address of one tag."""
        values = {name: value or "" for name, value in attrs}
        if tag == "link" and not LOADED_LINKS & set(values.get("rel", "").split()):
            return
        if tag in RESOURCES and RESOURCES[tag] in values:
            self.addresses.append(values[RESOURCES[tag]])


def test_navigation_names_every_page() -> None:
    nav = yaml.load((ROOT / "mkdocs.yml").read_text(), _IgnoreTags)["nav"]
    assert missing_pages(nav, DOCS) == set()


def test_missing_pages_are_found(tmp_path: Path) -> None:
    for name in ("a.md", "b/c.md", "b/index.md", "d/e.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    nav = [{"A": "a.md"}, {"B": ["b/index.md", "b/"]}]
    assert missing_pages(nav, tmp_path) == {"d/e.md"}
    assert missing_pages([*nav, "d/e.md", "gone.md"], tmp_path) == {"gone.md"}


def test_external_resources_are_found(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text(
        '<link rel="canonical" href="https://a/"><a href="https://b/">b</a><script src="own.js"></script>'
    )
    (tmp_path / "own.js").write_text('load("https://unpkg.com/mermaid@11/dist/mermaid.min.js")')
    assert external_resources(tmp_path) == set()
    (tmp_path / "page.html").write_text(
        '<link rel="stylesheet" href="https://c/"><script src="//d/"></script><pre class="mermaid">x</pre>'
    )
    (tmp_path / "own.css").write_text('@import "https://e/"; a { background: url(https://f/) }')
    (tmp_path / "other.js").write_text("fetch('https://g/')")
    assert external_resources(tmp_path) == {
        "own.js: https://unpkg.com/mermaid@11/dist/mermaid.min.js",
        "page.html: https://c/",
        "page.html: //d/",
        "own.css: https://e/",
        "own.css: https://f/",
        "other.js: https://g/",
    }


@pytest.mark.slow
def test_site_builds_strictly_without_external_resources(tmp_path: Path) -> None:
    site = tmp_path / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(site)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert external_resources(site) == set()
    # Generated pages hold what the sources say.
    assert "data.batch_size" in (site / "reference" / "configuration" / "data.html").read_text()
    losses = (site / "reference" / "api" / "spo.losses.html").read_text()
    assert "SPOLoss" in losses and "<math" in losses and ".. math::" not in losses
    # The tags of the tests do not reach a reader.
    assert "run-tiny" not in (site / "tutorial" / "first-comparison.html").read_text()
