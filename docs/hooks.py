"""Hooks of the documentation site: they generate the reference pages, so that no copy of a default is written by hand.

The configuration reference is read from the yaml files of ``conf/`` with their comments. The API pages name the modules
of ``spo/``, whose docstrings mkdocstrings reads from the sources. The pages of methods state what ``spo methods NAME``
prints, for which the losses are imported.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from spo.config.comments import comment_of, is_literal
from spo.metrics.catalogue import markdown_table
from spo.pages.methods import MethodFacts, in_groups, linked, page_end, page_rows
from spo.pages.methods import markdown_table as table_of_methods

if TYPE_CHECKING:  # the tests read the pages without mkdocs
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
CONFIGURATION = "reference/configuration/"
API = "reference/api/"
METHODS = "reference/methods/"
DECISIONS = "decisions/"
CATALOGUE_MARKER = "<!-- catalogue of metrics -->"
METHODS_MARKER = "<!-- table of methods -->"
NOT_CONFIGURED = ("dashboard",)
"""Folders of ``conf/`` that hold something else than members of a config group."""

LONG_DEFAULT = 24
"""Characters beyond which a default wraps within its cell."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages, and put them into the navigation."""
    from mkdocs.structure.files import File

    generated: dict[str, dict[str, str]] = {
        CONFIGURATION: configuration_pages(ROOT / "conf"),
        API: api_pages(ROOT / "spo"),
        METHODS: method_pages(methods()),
    }
    for folder, pages in generated.items():
        for name, content in pages.items():
            files.append(File.generated(config, f"{folder}{name}.md", content=content))
    listed = {folder: [f"{folder}{name}.md" for name in pages] for folder, pages in generated.items()}
    records = (file.src_uri for file in files.documentation_pages() if re.match(rf"{DECISIONS}\d", file.src_uri))
    listed[DECISIONS] = sorted(records)
    config.nav = expand(config.nav, listed)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Remove the tags that the tests read, serve linked files from outside ``docs/``, and list generated pages."""
    markdown = re.sub(r"^(\s*(?:```|~~~)\w+) [\w-]+$", r"\1", markdown, flags=re.MULTILINE)
    markdown = re.sub(r"(?<=\]\()\.\./[^)#\s]+", lambda match: _served(match[0], page, config, files), markdown)
    markdown = markdown.replace(CATALOGUE_MARKER, markdown_table())
    if METHODS_MARKER in markdown:
        markdown = markdown.replace(METHODS_MARKER, _with_links(table_of_methods(methods()), "methods/"))
    for folder in (CONFIGURATION, API):
        if page.file.src_uri == f"{folder}index.md":
            pages = [file for file in files.documentation_pages() if file.src_uri.startswith(folder)]
            names = sorted(Path(file.src_uri).stem for file in pages if file is not page.file)
            markdown += "\n" + "\n".join(f"- [`{name}`]({name}.md)" for name in names) + "\n"
    return markdown


def expand(nav: Any, listed: dict[str, list[str]]) -> Any:
    """Replace each folder in a navigation by the pages listed for it."""
    if isinstance(nav, dict):
        return {title: expand(entry, listed) for title, entry in nav.items()}
    if isinstance(nav, list):
        return [page for entry in nav for page in (listed[entry] if _is_folder(entry) else [expand(entry, listed)])]
    return nav


def _is_folder(entry: Any) -> bool:
    return isinstance(entry, str) and entry.endswith("/")


def _served(target: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Return a link to a copy in the site where ``target`` is a file of the repository outside ``docs/``."""
    from mkdocs.structure.files import File

    docs = Path(config.docs_dir)
    path = (docs / page.file.src_uri).parent.joinpath(target).resolve()
    if path.is_relative_to(docs) or not path.is_file():
        return target  # a page, or a broken link that mkdocs reports
    uri = f"repository/{path.relative_to(ROOT).as_posix()}"
    if files.get_file_from_path(uri) is None:
        files.append(File.generated(config, uri, content=path.read_bytes()))
    return "../" * page.file.src_uri.count("/") + uri


# --- configuration ---------------------------------------------------------------------------------------------------


def configuration_pages(conf: Path) -> dict[str, str]:
    """Return one page for the keys outside groups and one for each config group, by file name."""
    main = [_section(file, file.stem, "") for file in sorted(conf.glob("*.yaml"))]
    pages = {"top-level": "# Keys outside groups\n\n" + "\n".join(main)}
    for folder in sorted(path for path in conf.iterdir() if path.is_dir() and path.name not in NOT_CONFIGURED):
        files = sorted(folder.rglob("*.yaml"), key=lambda file: (file.stem != "common", file))
        chosen = _default_member(conf / "train.yaml", folder.name)
        intro = f"The default is `{folder.name}={chosen}`." if chosen else "No member is selected by default."
        sections = []
        for file in files:
            member = file.relative_to(folder).with_suffix("").as_posix()
            title = f"{member} (shared keys)" if file.stem == "common" else f"{folder.name}={member}"
            sections.append(_section(file, title, folder.name))
        pages[folder.name] = f"# `{folder.name}`\n\n{intro}\n\n" + "\n".join(sections)
    return pages


def _default_member(main: Path, group: str) -> str | None:
    entries = yaml.safe_load(main.read_text())["defaults"]
    return next((entry[group] for entry in entries if isinstance(entry, dict) and group in entry), None)


def _section(file: Path, title: str, group: str) -> str:
    """Return the section of one yaml file: its leading comment, what it builds on, and a table of its keys."""
    text = file.read_text()
    comments = re.match(r"(?:#.*\n)*", text)
    lines = [line.lstrip("# ") for line in (comments[0] if comments else "").splitlines()]
    packages = [line.partition(" ")[2] for line in lines if line.startswith("@package")]
    prefix = "" if "_global_" in packages else group
    description = "\n".join(line for line in lines if not line.startswith("@package"))
    node = yaml.compose(text)
    blocks = [f"## {title}" if "shared" in title else f"## `{title}`", escape(description)]
    if isinstance(node, yaml.MappingNode):
        blocks.append(_builds_on(text))
        rows = [f"| `{key}` | {default} | {comment} |" for key, default, comment in keys_of(node, text, prefix)]
        if rows:
            blocks.append("\n".join(["| key | default | description |", "|---|---|---|", *rows]))
    return "\n\n".join(block for block in blocks if block) + "\n"


def _builds_on(text: str) -> str:
    """Return a sentence on the defaults list of a member."""
    bases, selected = [], []
    for entry in (yaml.safe_load(text) or {}).get("defaults", []):
        if isinstance(entry, dict):
            ((key, value),) = entry.items()
            group = re.sub(r"^override /?|@.*$", "", key).strip("/")
            selected.append(f"`{group}={'null' if value is None else value}`")
        elif entry != "_self_":
            bases.append(f"`{entry}`")
    words = [f"Builds on {', '.join(bases)}."] if bases else []
    return " ".join(words + ([f"Selects {', '.join(selected)}."] if selected else []))


def keys_of(node: yaml.MappingNode, text: str, prefix: str) -> Iterator[tuple[str, str, str]]:
    """Yield the path, the default, and the comment of each key, nested ones after the key that holds them."""
    for name, value in node.value:
        if name.value == "defaults" and name.start_mark.column == 0:
            continue  # the defaults list of Hydra, which a sentence states
        path = f"{prefix}.{name.value}" if prefix else name.value
        comment = escape(comment_of(name, value, text))
        if isinstance(value, yaml.MappingNode) and value.value and not value.flow_style:
            if comment:
                yield path, "", comment
            yield from keys_of(value, text, path)
        else:
            yield path, _default(value, text), comment


def _default(node: yaml.Node, text: str) -> str:
    """Return a value as it is written in the file, as code."""
    if is_literal(node):
        return f"text of {len(node.value.splitlines())} lines"
    if isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        return f"{len(node.value)} entries"
    written = text[node.start_mark.index : node.end_mark.index].strip()
    if written == "???":
        return "required"
    code = " ".join(written.split()).replace("|", r"\|")
    return f"`{code}`" + ("{.long}" if len(code) > LONG_DEFAULT else "") if code else ""


def escape(text: str) -> str:
    """Return a comment with markup escaped, and with the pages of ``docs/`` that it names as links."""
    escaped = re.sub(r"([\\*_<>|\[\]])", r"\\\1", text)
    return re.sub(r"\bdocs/((?:[\w-]+/)*([\w-]+))\.md", r"[\2](../../\1.md)", escaped)


# --- methods ---------------------------------------------------------------------------------------------------------


@cache
def methods() -> list[MethodFacts]:
    """Return the facts of the shipped methods, in the order of their headings."""
    from spo.stages.methods import read_methods

    return read_methods([ROOT / "conf"], verify=True)


def method_pages(found: list[MethodFacts]) -> dict[str, str]:
    """Return one page for each heading, with a section for each method, by file name."""
    return {
        page_of(group): "\n\n".join([f"# {group.capitalize()}", *map(_method, some)]) + "\n"
        for group, some in in_groups(found)
    }


def page_of(group: str) -> str:
    """Return the name of the page of a heading."""
    return group.replace(" ", "-")


def _method(method: MethodFacts) -> str:
    """Return the section of a method: what ``spo methods NAME`` prints, with its formula as MathML."""
    from latex2mathml.converter import convert

    rows = {label: linked(escape(words)) for label, words in (page_rows(method) | page_end(method)).items()}
    module, name = method.loss.rsplit(".", 1)
    link = f"[`{name}`](../api/{'.'.join(module.split('.')[:2])}.md#{method.loss})"
    rows["source"] = f"{linked(method.paper) or 'no paper'}; the docstring of {link} defines the symbols"
    lines = [f"- **{label.capitalize()}:** {words}" for label, words in rows.items() if label != "formula"]
    keys = [f"| `{key.name}` | `{key.default}` | {escape(key.comment)} |" for key in method.keys]
    table = ["| key | default | description |", "|---|---|---|", *keys] if keys else []
    shown = [f'<div class="formula">{convert(formula, display="block")}</div>' for formula in method.formula]
    parts = [f"## `{method.name}`: {method.title} {{#{method.name}}}", *shown, "\n".join(lines), "\n".join(table)]
    return "\n\n".join(part for part in parts if part)


def _with_links(table: str, folder: str) -> str:
    """Return a table of methods whose names link to their sections."""
    pages = {method.name: f"{folder}{page_of(method.group)}.md#{method.name}" for method in methods()}
    for name, page in pages.items():
        table = table.replace(f"\n| `{name}` |", f"\n| [`{name}`]({page}) |")
    return table


# --- Python API ------------------------------------------------------------------------------------------------------


def api_pages(package: Path) -> dict[str, str]:
    """Return one page for each module or package directly inside ``package``, by dotted name."""
    pages = {}
    for path in sorted(package.iterdir()):
        if path.stem.startswith("_") or not (path.suffix == ".py" or (path / "__init__.py").is_file()):
            continue
        name = f"{package.name}.{path.stem}"
        files = [path] if path.suffix else [path / "__init__.py", *sorted(path.rglob("*.py"))]
        blocks = [f"# `{name}`", f"::: {name}\n    options:\n      show_root_heading: false"]
        if path.is_dir():
            blocks[1] += "\n      members: false"  # what a package lists is documented where it is defined
        for file in files[1:]:
            parts = file.relative_to(package.parent).with_suffix("").parts
            if not any(part.startswith("_") for part in parts):
                blocks.append(f"::: {'.'.join(parts)}")
        pages[name] = "\n\n".join(blocks) + "\n"
    return pages
