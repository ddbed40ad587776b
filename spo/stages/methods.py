"""``spo methods``: what each method is, changes, needs and computes, from its yaml file and its loss."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from torch import nn

from spo.config.comments import comments_of
from spo.config.groups import config_folders, method_file, methods_by_group
from spo.config.nodes import DIRECTIVES, first_line, locate
from spo.errors import UserError
from spo.losses import Column, Drawn, Loss, Mismatched
from spo.pages.formulas import formulas_of
from spo.pages.methods import MethodFacts, MethodKey, method_page, methods_table
from spo.records.files import load_yaml, write_json
from spo.types import LabelledLogps, ListLogps, PairLogps
from spo.wording import suggestion

_DATA = {PairLogps: "pairs", LabelledLogps: "unpaired", ListLogps: "ranked"}
_WORDS = ("changes", "use_when", "checked")
"""Keys that describe the member itself. A member that builds on another one does not inherit them."""


def methods_command(
    name: str | None, data: str | None, no_reference: bool, config_dir: str | None, json_file: Path | None
) -> None:
    """Print the table of methods, or the page of one.

    Args:
        name: Method of the page, ``None`` for the table.
        data: Kind of data that listed methods read, ``None`` for any.
        no_reference: Whether to list only methods whose loss does not need a reference.
        config_dir: Folder with further methods.
        json_file: File for the facts, ``None`` for no file.

    Raises:
        UserError: A folder or the method does not exist, or a method cannot be read.
    """
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise UserError(f"--json {json_file}: there is no folder {json_file.absolute().parent}")
    if config_dir is not None and not Path(config_dir).is_dir():
        raise UserError(f"--config-dir {config_dir}: there is no such folder")
    folders, console = config_folders(config_dir), Console()
    if name is not None:
        found = [facts_of(name, folders, verify=True)]
        console.print(method_page(found[0]))
    else:
        found = [
            method
            for method in read_methods(folders)
            if data in (None, method.data) and not (no_reference and method.reads_reference)
        ]
        console.print(methods_table(found, console.width) if found else "there is no such method")
    if json_file is not None:
        write_json(json_file, [dataclasses.asdict(method) for method in found])


def read_methods(folders: Sequence[Path], verify: bool = False) -> list[MethodFacts]:
    """Return the facts of all methods, in the order of their headings.

    Args:
        folders: Folders of config groups.
        verify: Whether to find out what ``spo verify`` does with each, which takes seconds.
    """
    groups = methods_by_group(folders)
    return [_facts(name, group, folders, verify) for group, some in groups.items() for name in some]


def facts_of(name: str, folders: Sequence[Path], verify: bool = False) -> MethodFacts:
    """Return the facts of one method.

    Args:
        name: Member of the config group ``method``.
        folders: Folders of config groups.
        verify: Whether to find out what ``spo verify`` does with it.

    Raises:
        UserError: There is no such method, or its yaml file does not name a loss.
    """
    groups = methods_by_group(folders)
    group = next((group for group, some in groups.items() if name in some), None)
    if group is None:
        hint = suggestion(name, [one for some in groups.values() for one in some]) or "; spo methods lists them"
        raise UserError(f"there is no method {name}{hint}")
    return _facts(name, group, folders, verify)


def _facts(name: str, group: str, folders: Sequence[Path], verify: bool) -> MethodFacts:
    member = _Member(name, folders)
    loss = member.loss
    data = _DATA[_declared(loss, "inputs", PairLogps)]
    return MethodFacts(
        name=name,
        title=str(member.get("title") or member.cls.__name__),
        paper=str(member.get("paper") or ""),
        group=group,
        **{key: str(member.own.get(key) or "") for key in _WORDS},
        data=data,
        needs=(*_needs(loss, data), *(f"{group}={chosen}" for group, chosen in member.chosen.items())),
        reads_reference=_reads_reference(loss),
        formula=tuple(formulas_of(inspect.cleandoc(member.cls.__doc__ or ""))),
        keys=(*member.beta(), *member.keys()),
        loss=f"{member.cls.__module__}.{member.cls.__qualname__}",
        verified=_verified(member) if verify else None,
    )


class _Member:
    """A method's yaml file with those that it builds on, and its loss.

    Args:
        name: Member of the config group ``method``.
        folders: Folders of config groups.

    Raises:
        UserError: A file cannot be read or does not name a loss that can be imported.
    """

    def __init__(self, name: str, folders: Sequence[Path]) -> None:
        self.folders = folders
        self.chosen: dict[str, str] = {}
        self.comments: dict[str, str] = {}
        node = self._merged(name)
        # Methods read the kind of data in their defaults.
        self._cfg = OmegaConf.create({"method": node, "data": {"regime": None}})
        self.own: Mapping[str, Any] = self._read(name)[0]
        target = OmegaConf.select(self._cfg, "method.loss._target_")
        if target is None:
            raise UserError(f"{method_file(name, folders)}: method.loss._target_ does not name the class of a loss")
        try:
            named = locate(str(target))
            # Declarations may depend on options.
            self.loss: Any = _instance(self._cfg) or named
        except ImportError as error:
            raise UserError(f"{method_file(name, folders)}: method.loss: {error}") from error
        self.cls: Any = type(self.loss) if isinstance(self.loss, Loss) else self.loss

    def get(self, key: str) -> Any:
        """Return the value of a key of the method, ``None`` if it is absent or needs what a run has."""
        return OmegaConf.select(self._cfg, f"method.{key}", throw_on_missing=False)

    def keys(self) -> list[MethodKey]:
        """Return the keys of the loss, with the comments of the yaml files, else the descriptions of the docstring."""
        node: Any = OmegaConf.to_container(self._cfg.method.loss, resolve=False)
        described: dict[str, str] = {}
        for cls in reversed(self.cls.__mro__):
            described |= arguments_of(cls)
        comments = {key: self.comments.get(f"loss.{key}") or described.get(key, "") for key in node}
        return [
            MethodKey(f"method.loss.{key}", _as_text(value), comments[key])
            for key, value in node.items()
            if key not in DIRECTIVES
        ]

    def beta(self) -> list[MethodKey]:
        """Return the key beta with its default, and that on the built-in stories where it differs."""
        general = self.get("default_beta")
        if general is None:
            return []
        on_stories = OmegaConf.merge(self._cfg, {"data": {"regime": "stories"}})
        stories = OmegaConf.select(on_stories, "method.default_beta")
        default = f"{general:g}" if stories == general else f"{general:g} ({stories:g} on stories)"
        return [MethodKey("beta", default, self.comments.get("default_beta", ""))]

    def _merged(self, name: str) -> DictConfig:
        """Return the keys of a member and of those in its defaults list, and collect choices and comments."""
        own, text = self._read(name)
        parts: list[Any] = []
        entries = [*own.get("defaults", [])]
        for entry in entries if "_self_" in entries else [*entries, "_self_"]:
            if entry == "_self_":
                parts.append({key: value for key, value in own.items() if key != "defaults"})
                self.comments |= comments_of(text)
            elif isinstance(entry, str):
                parts.append(self._merged(entry.removeprefix("/method/")))
            else:
                ((key, member),) = entry.items()
                if member is not None:
                    self.chosen[re.sub(r"^override /?|@.*$", "", str(key))] = str(member)
        merged = OmegaConf.merge(*parts)
        assert isinstance(merged, DictConfig)
        return merged

    def _read(self, name: str) -> tuple[Mapping[str, Any], str]:
        try:
            file = method_file(name, self.folders)
        except StopIteration:
            raise UserError(f"a defaults list in conf/method names {name}, and there is no such method") from None
        try:
            text = file.read_text(encoding="utf-8")
            node = load_yaml(text)
        except Exception as error:
            raise UserError(f"{file} cannot be read: {first_line(error)}") from error
        return (node if isinstance(node, dict) else {}), text


def _instance(cfg: DictConfig) -> Loss[Any] | None:
    """Return the loss of a configuration, ``None`` where it needs values that the file leaves open."""
    from hydra.utils import instantiate

    try:
        loss = instantiate(cfg.method.loss, _convert_="all")
    except Exception:
        return None
    return loss if isinstance(loss, Loss) else None


def _declared(loss: Any, name: str, default: Any = None) -> Any:
    """Return a declaration of a loss; of a class, ``default`` where instances compute it."""
    value = getattr(loss, name, default)
    return default if isinstance(value, property) else value


def _reads_reference(loss: Any) -> bool:
    terms, roles = _declared(loss, "terms", {}).values(), _declared(loss, "extra_completions", {}).values()
    return bool(
        _declared(loss, "uses_reference")
        or _declared(loss, "extra_references")
        or any(term.needs_reference_logits for term in terms)
        or any(isinstance(role, Drawn) for role in roles)
    )


def _needs(loss: Any, data: str) -> list[str]:
    """Return what a loss declares that it needs besides log-probs of the policy, in words."""
    needs = [name for name in ("alpha", "beta", "reference") if _declared(loss, f"uses_{name}")]
    if terms := _declared(loss, "terms", {}):
        of_reference = any(term.needs_reference_logits for term in terms.values())
        needs.append(f"token-level terms of {'policy and reference' if of_reference else 'the policy'}")
    for feature in _declared(loss, "features", {}).values():
        columns = {"unpaired": feature.label_columns, "ranked": feature.list_columns}.get(data, feature.columns)
        is_optional = feature.default is not None or feature.make is not None
        words = f"column{'s' if len(columns) > 1 else ''} {' and '.join(columns)}"
        needs.append(f"{words} (optional)" if is_optional else words)
    needs += [_of_role(role) for role in _declared(loss, "extra_completions", {}).values()]
    if names := _declared(loss, "extra_references", ()):
        needs.append(f"further reference{'s' if len(names) > 1 else ''} {', '.join(names)}")
    if _declared(loss, "full_batch"):
        needs.append("whole batch")
    cls = type(loss) if isinstance(loss, Loss) else loss
    if _declared(loss, "has_statistics", cls.update_statistics is not Loss.update_statistics):
        needs.append("running statistics")
    if _declared(loss, "has_width", cls.fit_width is not Loss.fit_width):
        needs.append("a head on hidden states of the policy")
    elif isinstance(loss, nn.Module) and any(parameter.requires_grad for parameter in loss.parameters()):
        needs.append("parameters of its own")
    return list(dict.fromkeys(needs))


def _of_role(role: Any) -> str:
    match role:
        case Column():
            return f"column {role.name}"
        case Drawn():
            return "completions drawn from the reference"
        case Mismatched():
            return "completions of other prompts"
    return f"further completions ({type(role).__name__})"


def _verified(member: _Member) -> str:
    from spo.stages.verify import why_not_verified

    if not isinstance(member.loss, Loss):
        return ""
    chosen = member.chosen.get("reference")
    files = [folder / "reference" / f"{chosen}.yaml" for folder in member.folders]
    text = next((file.read_text() for file in files if file.is_file()), "_target_: spo.models.FrozenReference")
    reason = why_not_verified(member.loss, locate(load_yaml(text)["_target_"]))
    return "spo verify compares it with its optimum" if reason is None else f"no optimum to compare with: {reason}"


def arguments_of(cls: type) -> dict[str, str]:
    """Return what the Google style docstring of a class says of each argument: the first sentence, without its period.

    Args:
        cls: Class; the docstrings of its bases are not read.
    """
    section = re.search(r"^Args:\n((?:[ ]+.*\n|\n)+)", inspect.cleandoc(vars(cls).get("__doc__") or "") + "\n", re.M)
    entries = re.findall(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", section[1] if section else "", re.M)
    texts = ((name, " ".join(text.replace("``", "`").split())) for name, text in entries)
    return {name: re.split(r"\.(?= [A-Z0-9`]|$)", text, maxsplit=1)[0] for name, text in texts}


def _as_text(value: Any) -> str:
    """Return a value as it is written on a command line; a node with a class as a call of it."""
    if isinstance(value, Mapping):
        items = [(str(key), _as_text(item)) for key, item in value.items() if key not in DIRECTIVES]
        if "_target_" in value:
            name = str(value["_target_"]).rpartition(".")[2]
            return f"{name}({', '.join(f'{key}={item}' for key, item in items)})"
        return "{" + ", ".join(f"{key}: {item}" for key, item in items) + "}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ", ".join(map(_as_text, value)) + "]"
    if isinstance(value, float):
        return f"{value:g}"
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)
