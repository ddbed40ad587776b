"""Configuration of ``spo evaluate``: that of the run, with other data, settings or judge."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from spo.config.compose import compose, expand_numbers, parse
from spo.config.nodes import ROUND_SOURCE, has_judge, select
from spo.config.trust import Caller, check_trusted
from spo.errors import UserError
from spo.metrics.catalogue import REFERENCE

CHANGEABLE_KEYS = (
    "data",
    "evaluation",
    "judge",
    "trainer.accelerator",
    "trainer.devices",
    "model.trust_remote_code",
)
"""Groups and keys that an evaluation may change."""
# Keys that spo.config.trust checks.
_NEED_TRUST = ("_target_", "base_url", "trust_remote_code")


def evaluation_config(own: DictConfig, overrides: Sequence[str], config_dir: str | Path | None = None) -> DictConfig:
    """Return the configuration of a run with overrides of its evaluation, its interpolations unresolved.

    Args:
        own: Configuration of the run.
        overrides: Overrides of the keys and groups in :data:`CHANGEABLE_KEYS`.
        config_dir: Folder with further members of the groups.

    Raises:
        UserError: An override is of another key, or its key does not exist.
    """
    parsed = [parse(text) for text in expand_numbers(overrides)]
    unsupported = [
        one.input_line
        for one in parsed
        if not any(one.key_or_group == key or one.key_or_group.startswith(f"{key}.") for key in CHANGEABLE_KEYS)
    ]
    if unsupported:
        raise UserError(
            f"an evaluation can change {', '.join(CHANGEABLE_KEYS)} only, not {', '.join(map(str, unsupported))}: "
            "train another run for that"
        )
    if saved := [one.input_line for one in parsed if one.key_or_group == "evaluation.policy"]:
        raise UserError(
            f"{saved[0]} decides which weights training saves: spo evaluate measures those in policy/; remove it"
        )
    cfg = OmegaConf.create(OmegaConf.to_container(own, resolve=False))
    assert isinstance(cfg, DictConfig)
    if "start" in cfg.model:  # An evaluation reads policy/, and extrapolated weights may have left the cache.
        cfg.model.start = None
    # A member of a group replaces the whole group, as in a new composition. Single keys are set below, on top of it.
    for group in {one.key_or_group for one in parsed} & {"data", "evaluation", "judge"}:
        of_group = (one.input_line for one in parsed if one.key_or_group.partition(".")[0] == group)
        chosen = [line for line in of_group if line is not None]
        cfg[group] = OmegaConf.to_container(compose(chosen, config_dir, own.paths.run)[group], resolve=False)
    OmegaConf.set_struct(cfg, True)
    for one in parsed:
        if "." in one.key_or_group:
            try:
                OmegaConf.update(cfg, one.key_or_group, one.value())
            except Exception as error:
                raise UserError(
                    f"{one.input_line}: the configuration of the run does not have this key ({error})"
                ) from error
    if {one.key_or_group for one in parsed} & {"data", "data.path"} and select(cfg, ROUND_SOURCE) is not None:
        # An evaluation does not read training pairs, so none are made of the policy's completions.
        cfg.iteration.source.prompts, cfg.data.num_pairs, cfg.data.min_pairs = 0, None, 1
        # The iteration itself added its other rounds, which do not have samples of other prompts.
        rounds = f"{select(cfg, 'paths.iteration')}/"
        if not {one.key_or_group for one in parsed} & {"evaluation", "evaluation.against"}:
            against = [name for name in cfg.evaluation.against if not str(name).startswith(rounds)]
            cfg.evaluation.against = against if has_judge(cfg) else [REFERENCE]
    return cfg


def trusted_evaluation(
    own: DictConfig,
    run_dir: Path,
    overrides: Sequence[str],
    allow: Sequence[str] = (),
    config_dir: str | Path | None = None,
    unused: Collection[str] = (),
) -> DictConfig:
    """Return the configuration of :func:`evaluation_config`, after a check that all it names may be used.

    Args:
        own: Configuration of the run, by which its reference is made. Its judge, evaluation and model are replaced by
            those of the result, because those of the run are not used.
        run_dir: Directory of the run.
        overrides: Overrides of the keys and groups in :data:`CHANGEABLE_KEYS`.
        allow: Targets, modules and paths of the configuration that may be used although it came with the directory.
        config_dir: Folder with further members of the groups.
        unused: Groups, and keys of groups, whose parts the caller does not build. Their targets, addresses and
            permissions for remote code are removed, here and in ``own``. Other values stay, because other keys may
            read them.

    Raises:
        UserError: An override is of another key, its key does not exist, or the configuration asks for something that
            the caller must allow.
    """
    cfg = evaluation_config(own, overrides, config_dir)
    own.judge, own.evaluation, own.model = cfg.judge, cfg.evaluation, cfg.model
    caller = Caller.of(overrides, allow, config_dir)
    for used in (cfg, own):
        _remove_parts(used, unused)
        check_trusted(used, run_dir, caller)
    return cfg


def _remove_parts(cfg: DictConfig, keys: Collection[str]) -> None:
    """Remove the keys that a caller must allow from groups and keys of groups, in place."""
    raw: Any = OmegaConf.to_container(cfg, resolve=False)  # No resolver may be called before the check.
    for key in keys:
        group, _, name = key.partition(".")
        if not isinstance(raw.get(group), dict):
            continue
        if not name:
            raw[group] = _without_parts(raw[group])
        elif name in raw[group]:
            raw[group][name] = _without_parts(raw[group][name])
        cfg[group] = raw[group]


def _without_parts(node: Any) -> Any:
    """Return nested dictionaries and lists without the keys that a caller must allow."""
    if isinstance(node, dict):
        return {name: _without_parts(value) for name, value in node.items() if name not in _NEED_TRUST}
    return [_without_parts(value) for value in node] if isinstance(node, list) else node
