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

from docs.hooks import api_pages, configuration_pages
from tests.environments import ROOT

DOCS = ROOT / "docs"
RESOURCES = {"script": "src", "link": "href", "img": "src", "iframe": "src", "source": "src", "video": "src"}
"""Attributes that make a browser load a file, by tag."""
LOADED_LINKS = {"stylesheet", "icon", "preload", "preconnect", "modulepreload", "manifest"}
"""Relations of a link that make a browser load its target; a canonical address is only named."""
KNOWN_IN_SCRIPTS: dict[str, str | None] = {
    # The theme loads Mermaid for elements of this class alone, and a polyfill in browsers without ResizeObserver.
    "https://unpkg.com/mermaid@11/dist/mermaid.min.js": 'class="[^"]*\\bmermaid\\b',
    "https://unpkg.com/resize-observer-polyfill": None,
    # The theme counts the stars of the repository where a page links it in this component.
    "https://api.github.com/": 'data-md-component="source"',
    "https://${": 'data-md-component="source"',
    # These are names in licenses, comments, and messages, which nothing loads.
    "https://clipboardjs.com/": None,
    "https://github.com/isaacs/node-glob/": None,
    "https://bit.ly/2s3ChXG": None,
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
        code = re.sub(r"/\*.*?\*/|^\s*//[^\n]*", "", file.read_text(), flags=re.DOTALL | re.MULTILINE)
        for address in re.findall(r"https?://[^\s\"'`)]+", code):
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


def leaves(node: Any, path: str = "") -> Iterator[str]:
    """Yield the paths of all keys without keys of their own."""
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path


def test_configuration_reference_has_every_key() -> None:
    pages = configuration_pages(ROOT / "conf")
    for file in sorted((ROOT / "conf").glob("*/**/*.yaml")):
        group, *member = file.relative_to(ROOT / "conf").with_suffix("").parts
        if group == "dashboard":
            continue
        node = yaml.safe_load(file.read_text()) or {}
        node.pop("defaults", None)
        name = f"{group}={'/'.join(member)}" if file.stem != "common" else f"{'/'.join(member)} (shared keys)"
        section = re.search(rf"^## `?{re.escape(name)}`?\n(.*?)(?=^## |\Z)", pages[group], re.DOTALL | re.MULTILINE)
        assert section is not None, name
        is_global = "# @package _global_" in file.read_text()
        keys = set(leaves(node if is_global else {group: node})) if node else set()
        rows = tuple(re.findall(r"^\| `([^`]+)` \|", section[1], re.MULTILINE))
        assert [key for key in keys if not f"{key}.".startswith(tuple(f"{row}." for row in rows))] == []


def test_configuration_reference_shows_defaults_and_comments(tmp_path: Path) -> None:
    (tmp_path / "train.yaml").write_text("# The main job.\ndefaults:\n  - a: b\n\nseed: 0 # of sampling\n")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.yaml").write_text(
        "# First line.\n# Second line, see docs/how-to/index.md.\ndefaults:\n  - override /c: d\n\n"
        "x: 1 # a|b\n# Above.\ny: ???\nz: # both\n  v: {w: 1} # flow\n  t: | # text\n    # no comment\n"
    )
    pages = configuration_pages(tmp_path)
    assert "| `seed` | `0` | of sampling |" in pages["top-level"]
    assert pages["a"] == (
        "# `a`\n\nThe default is `a=b`.\n\n## `a=b`\n\n"
        "First line.\nSecond line, see [index](../../how-to/index.md).\n\nSelects `c=d`.\n\n"
        "| key | default | description |\n|---|---|---|\n"
        "| `a.x` | `1` | a\\|b |\n| `a.y` | required | Above. |\n| `a.z` |  | both |\n"
        "| `a.z.v` | `{w: 1}` | flow |\n| `a.z.t` | text of 1 lines | text |\n"
    )


def test_api_pages_name_every_module(tmp_path: Path) -> None:
    pages = api_pages(ROOT / "spo")
    named = set(re.findall(r"^::: (\S+)", "\n".join(pages.values()), re.MULTILINE))
    files = [file.relative_to(ROOT).with_suffix("") for file in (ROOT / "spo").rglob("*.py")]
    modules = {".".join(file.parts) for file in files if not any(part.startswith("_") for part in file.parts)}
    assert modules <= named and {"spo.losses", "spo.types"} <= set(pages)


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
