"""Source files of plugins: the code outside the package that a ``_target_`` names, found without importing it."""

from __future__ import annotations

import ast
import hashlib
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path

LIBRARIES = frozenset(
    {
        "datasets",
        "deepspeed",
        "hydra",
        "hydra_plugins",
        "lightning",
        "numpy",
        "omegaconf",
        "optuna",
        "peft",
        "pytorch_lightning",
        "safetensors",
        "spo",
        "tokenizers",
        "torch",
        "torchmetrics",
        "transformers",
        "trl",
        "wandb",
    }
)
"""Top-level modules that are not plugins: the package, whose code has a version, and the libraries that it uses."""


@dataclass(frozen=True)
class PluginSource:
    """Source of a plugin: a module, or a package with all of its modules.

    Attributes:
        path: File of the module, or folder of the package.
        sha256: Digest over the names and bytes of the Python files.
        imports: Top-level modules that the files import; none of an installed plugin.
    """

    path: Path
    sha256: str
    imports: frozenset[str]


_read: dict[str, tuple[list[ModuleSpec | None], PluginSource | None]] = {}
"""Sources by top-level module, with the specs of its loaded modules when the files were read."""


def plugin_sources(targets: Iterable[str]) -> dict[str, PluginSource]:
    """Return the sources of the plugins that targets name, by top-level module.

    The modules that a plugin imports belong to it, unless they are installed. Imports are read from the files, so
    nothing is imported, and modules whose names are computed are not found.

    Args:
        targets: Dotted paths of objects.
    """
    found: dict[str, PluginSource] = {}
    queue = [(target.partition(".")[0], True) for target in targets]
    while queue:
        name, is_named = queue.pop()
        if name in found or name in LIBRARIES or name in sys.stdlib_module_names:
            continue
        path = _path(name)
        if path is not None and (is_named or not _is_installed(path)) and (source := _source(name, path)) is not None:
            found[name] = source
            queue += [(imported, False) for imported in source.imports]
    return dict(sorted(found.items()))


def plugin_digests(targets: Iterable[str]) -> dict[str, str]:
    """Return the digest of each plugin that targets name, by top-level module."""
    return {name: source.sha256 for name, source in plugin_sources(targets).items()}


def _is_installed(path: Path) -> bool:
    """Return whether an installer put a file there, as it does with the libraries that a plugin imports."""
    return not {"site-packages", "dist-packages"}.isdisjoint(path.parts)


def _path(name: str) -> Path | None:
    """Return the file of a top-level module, or the folder of a package; ``None`` if it has neither."""
    try:
        spec = find_spec(name)
    except (ImportError, ValueError):  # A module without a spec, such as the script that runs.
        return None
    if spec is None:
        return None
    if folders := list(spec.submodule_search_locations or ()):
        return Path(folders[0])
    return Path(spec.origin) if spec.origin is not None and Path(spec.origin).is_file() else None


def _source(name: str, path: Path) -> PluginSource | None:
    """Return the source of a top-level module, as it was when this process loaded it; ``None`` if it has no files.

    A file that is edited later does not change what runs in this process, unless the module is reloaded, which gives it
    another spec.
    """
    loaded = [
        getattr(module, "__spec__", None)
        for key, module in list(sys.modules.items())
        if key == name or key.startswith(f"{name}.")
    ]
    before = _read.get(name)
    if before is not None and before[0] and all(any(spec is other for other in loaded) for spec in before[0]):
        return before[1]
    source = _read_source(name, path)
    _read[name] = loaded, source
    return source


def _read_source(name: str, path: Path) -> PluginSource | None:
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
    if not files:
        return None
    whole, imports = hashlib.sha256(), set[str]()
    folder = path if path.is_dir() else path.parent
    for file in files:
        content = file.read_bytes()
        whole.update(file.relative_to(folder).as_posix().encode() + b"\0" + hashlib.sha256(content).digest())
        # What an installed plugin imports is installed too. Parsing whole libraries would take long.
        imports |= set() if _is_installed(path) else _imports(content)
    return PluginSource(path, whole.hexdigest(), frozenset(imports - {name}))


def _imports(content: bytes) -> set[str]:
    """Return the top-level modules that Python code imports, without relative imports."""
    try:
        nodes = list(ast.walk(ast.parse(content)))
    except (SyntaxError, ValueError):  # Importing the plugin reports it, and a compiled module is not code.
        return set()
    plain = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    named = [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level]
    return {module.partition(".")[0] for module in [*plain, *named]}
