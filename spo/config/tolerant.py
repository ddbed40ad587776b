"""Composition that survives bad overrides: Hydra stops at the first one, and here all of them are found."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path

from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from spo.config.compose import parse
from spo.config.groups import group_members
from spo.config.nodes import (
    DIRECTIVES,
    first_line,
    in_target,
    keys_of,
    listed,
)
from spo.errors import missing_package
from spo.resources import conf_dir
from spo.wording import suggestion

COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, ValueError)


class TolerantComposer:
    """A composer that leaves out bad overrides and explains each of them.

    Args:
        compose: Function from overrides to a configuration with Hydra's own node.
        config_dir: Folder with further members of the groups, or ``None``.
    """

    def __init__(self, compose: Callable[[Sequence[str]], DictConfig], config_dir: str | Path | None) -> None:
        self._compose = compose
        self.folders = [Path(config_dir).absolute()] if config_dir is not None else []
        self.folders.append(conf_dir())
        self.groups = group_members(self.folders)
        self._baselines: dict[tuple[tuple[str, str], ...], set[str]] = {}

    def compose(self, overrides: Sequence[str], found: list[str]) -> tuple[DictConfig, bool]:
        """Compose the overrides that can be used.

        Args:
            overrides: Overrides in Hydra's grammar.
            found: List that receives a sentence for each override that cannot be used.

        Returns:
            The configuration, and whether too few overrides could be used to judge it.
        """
        try:
            return self._compose(overrides), False
        except COMPOSITION_ERRORS as error:
            only_error = error if len(overrides) == 1 else None
        accepted: list[str] = []
        dropped: set[str] = set()
        cfg = self._default
        # Groups come first, since keys depend on them. Each override is tried on top of those that can be used.
        for text in sorted(overrides, key=lambda text: not self._is_group(parse(text))):
            override = parse(text)
            if override.key_or_group.partition(".")[0] in dropped:
                continue
            cause: Exception | None = only_error
            if cause is None:
                try:
                    cfg = self._compose([*accepted, text])
                    accepted.append(text)
                    continue
                except COMPOSITION_ERRORS as raised:
                    cause = raised
            found.append(f"{text}: {self._explain(override, cfg, cause)}")
            if not self._is_group(override):
                continue
            # Look for further problems as if the right member had been named.
            for correction in self._corrections(override):
                try:
                    cfg = self._compose([*accepted, correction])
                    accepted.append(correction)
                    break
                except COMPOSITION_ERRORS:
                    continue
            else:
                dropped.add(override.key_or_group)
        return cfg, bool(dropped)

    @cached_property
    def _default(self) -> DictConfig:
        """The configuration without any override."""
        return self._compose([])

    def _is_group(self, override: Override) -> bool:
        return override.key_or_group in self.groups or "/" in override.key_or_group

    def _corrections(self, override: Override) -> list[str]:
        """Return overrides that a misspelled group member may stand for."""
        group = override.key_or_group
        members = difflib.get_close_matches(str(override.value()), self.groups.get(group, []), n=1)
        return [f"{plus}{group}={member}" for member in members for plus in ("", "+")]

    def _explain(self, override: Override, cfg: DictConfig, error: Exception) -> str:
        """Return why an override cannot be used, in place of Hydra's error."""
        key, text = override.key_or_group, str(error)
        if plugin := re.search(r"Could not find 'hydra/(launcher|sweeper)/(\w+)'", text):
            name = {"submitit_slurm": "submitit"}.get(plugin[2], plugin[2])
            if words := missing_package(f"hydra_plugins.hydra_{name}_{plugin[1]}"):
                return words
        members = self.groups.get(key)
        if members is not None:
            if f"+{key}=" in text and override.type is OverrideType.CHANGE:
                return f"write it with a plus, +{override.input_line}"
            known = f"the group has {listed(members)}" if members else "the group is empty"
            if str(override.value()) not in members:
                return f"no such member of {key}{suggestion(str(override.value()), members)}; {known}"
        if override.is_delete():
            return "there is nothing to delete"
        if "Could not append" in text:
            return f"the key exists already; write {str(override.input_line).lstrip('+')}"
        if "Could not override" in text or "is not in struct" in text:
            if key.rpartition(".")[0] == "data.chat_template_kwargs":
                return f"write it with a plus, +{override.input_line}"
            value, present = override.value(), OmegaConf.select(cfg, key, throw_on_missing=False)
            if isinstance(value, dict) and isinstance(present, DictConfig):
                added = " ".join(f"+{key}.{name}=..." for name in value if name not in present)
                return f"the value is merged into what {key} has; add what is new there by itself, {added}"
            hint = _key_suggestion(key, cfg, self.groups)
            if members := self._members_with(key):
                # The key exists, so that a guess at another one would mislead.
                hint = f"{'' if hint.endswith('?') else hint}; {listed(members)} has it"
            return f"unknown key{hint}"
        return first_line(error)

    def _members_with(self, key: str) -> list[str]:
        """Return the members of a group, such as ``optimizer=sgd``, that have a key which the chosen one lacks."""
        group, _, name = key.partition(".")
        files = [folder / group / f"{member}.yaml" for folder in self.folders for member in self.groups.get(group, [])]
        return [f"{group}={file.stem}" for file in files if file.is_file() and name in OmegaConf.load(file)]

    def unknown_keys(self, cfg: DictConfig, overrides: Sequence[str]) -> list[str]:
        """Return a sentence for each key that ``+`` or a preset added and that nothing reads."""
        choices = {
            str(group): str(member)
            for group, member in cfg.hydra.runtime.choices.items()
            if member is not None and not str(group).startswith("hydra/")
        }
        presets = {group for group, member in choices.items() if self._is_preset(group, member)}
        if not presets and not any(text.startswith("+") for text in overrides):
            return []
        known = self._keys_of({group: member for group, member in choices.items() if group not in presets})
        raw = OmegaConf.to_yaml(cfg)
        found: list[str] = []
        for key in sorted(keys_of(cfg) - known):
            parent = key.rpartition(".")[0]
            if any(key.startswith(f"{reported.partition(':')[0]}.") for reported in found):
                continue
            if in_target(cfg, key) or f"${{{key}" in raw or _is_open(known, parent):
                continue
            found.append(f"{key}: nothing reads this key{suggestion(key, sorted(known))}")
        return found

    def _is_preset(self, group: str, member: str) -> bool:
        """Return whether a member sets keys of other groups."""
        for file in (folder / group / f"{member}.yaml" for folder in self.folders):
            if file.is_file() and re.search(r"^# *@package _global_", file.read_text(), re.MULTILINE):
                return bool(set(OmegaConf.load(file)) - {"defaults", "hydra"})
        return False

    def _keys_of(self, choices: dict[str, str]) -> set[str]:
        frozen = tuple(sorted(choices.items()))
        if frozen not in self._baselines:
            default = self._default.hydra.runtime.choices
            chosen = [f"{group}={member}" if group in default else f"+{group}={member}" for group, member in frozen]
            self._baselines[frozen] = keys_of(self._compose(chosen))
        return self._baselines[frozen]


def _is_open(known: set[str], parent: str) -> bool:
    """Return whether a mapping accepts any key: the loggers, the callbacks, one that is empty by default."""
    return parent in ("logger", "callbacks") or (parent in known and not any(k.startswith(f"{parent}.") for k in known))


def _key_suggestion(key: str, cfg: DictConfig, groups: Iterable[str]) -> str:
    keys = keys_of(cfg) | set(groups)
    parent, _, leaf = key.rpartition(".")
    siblings = sorted(known.rpartition(".")[2] for known in keys if parent and known.rpartition(".")[0] == parent)
    siblings = [name for name in siblings if name not in DIRECTIVES]
    if close := difflib.get_close_matches(leaf, siblings, n=1):
        return f"; did you mean {parent}.{close[0]}?"
    if siblings:
        return f"; {parent} has {', '.join(siblings)}"
    same_leaf = sorted(known for known in keys if known.rpartition(".")[2] == leaf)
    return f"; did you mean {listed(same_leaf[:4])}?" if same_leaf else suggestion(key, sorted(keys))
