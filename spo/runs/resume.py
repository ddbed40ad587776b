"""Resuming a run: its own configuration, with the few changes that a resumed run may have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from spo.config.checks.settings import setting_problems, with_some_length
from spo.config.compose import compose, expand_numbers, parse
from spo.config.trust import Caller, check_trusted
from spo.errors import ConfigProblems, UserError
from spo.processes import is_first_process, place
from spo.records import filenames
from spo.records.files import read_json, read_mapping, write_json
from spo.records.operational_keys import CHOICES
from spo.runs.claim import is_finished, locked
from spo.runs.identity import identity, known_digests, with_digest
from spo.runs.saved_config import load_config, refuse_redacted, write_config

# Keys and groups that a resumed run may change, always and until it is finished.
LENGTH, TIME = ("trainer.max_steps", "trainer.max_epochs"), "trainer.max_time"
# A run that stopped at a loss that is not finite may leave that step out.
NONFINITE = ("callbacks.nonfinite.action", "callbacks.nonfinite.max_skipped")
DEVICES = ("trainer.devices", "trainer.num_nodes", "data.micro_batch_size", "data.micro_batch_tokens")
RESUMABLE = (*LENGTH, TIME, *DEVICES, "logger", "strategy", "model.trust_remote_code", *NONFINITE)
UNTIL_FINISHED = ("judge", "evaluation")


def resumed_config(
    run_dir: Path, overrides: Sequence[str], allow: Sequence[str] = (), config_dir: str | Path | None = None
) -> DictConfig:
    """Return the configuration with which the run in ``run_dir`` resumes, and record its changes there.

    Only the length (``trainer.max_steps``, ``max_epochs`` or ``max_time``), the devices and micro-batches, the keys of
    ``callbacks.nonfinite``, ``logger`` and ``strategy`` may change and, until the run is finished, ``judge`` and
    ``evaluation``: a judge that cannot be asked costs no training. A finished run resumes where its length grew, or
    where ``max_time`` changed and had stopped it. Its limits are those of the identity: ``composed.yaml`` has the steps
    that followed from them.

    Args:
        run_dir: Run directory.
        overrides: Changes, in Hydra's grammar.
        allow: Targets, modules and paths of the configuration that may be used although it came with the directory.
        config_dir: Folder with further members of the groups. What its files name may be used too.

    Raises:
        ConfigProblems: An override changes another key, or one that does not exist.
        UserError: The directory does not hold a run, the run is finished at more steps, or its configuration asks for
            something that the caller must allow.
    """
    cfg = changed_config(run_dir, overrides, allow, config_dir)
    if overrides and is_first_process():
        before = load_config(run_dir)
        with locked(run_dir):
            _record_changes(run_dir, cfg, OmegaConf.select(before, "trainer.max_steps"), OmegaConf.select(before, TIME))
    return cfg


def changed_config(
    run_dir: Path, overrides: Sequence[str], allow: Sequence[str] = (), config_dir: str | Path | None = None
) -> DictConfig:
    """Return what :func:`resumed_config` returns, and leave the files of the run as they are.

    Args:
        run_dir: Run directory.
        overrides: Changes, in Hydra's grammar.
        allow: Targets, modules and paths of the configuration that may be used although it came with the directory.
        config_dir: Folder with further members of the groups. What its files name may be used too.

    Raises:
        ConfigProblems: An override changes another key, or one that does not exist.
        UserError: The directory does not hold a run, or its configuration asks for something that the caller must
            allow.
    """
    cfg = load_config(run_dir)
    if OmegaConf.select(cfg, "trainer.max_epochs") is not None:
        cfg.trainer.max_steps = _given(run_dir).get("trainer.max_steps")
    if (own := place()).world_size > 1:  # The run may have started on other devices; an override names them again.
        cfg.trainer.devices, cfg.trainer.num_nodes = own.local_world_size, own.nodes
    problems: list[str] = []
    for text in sorted(overrides, key=lambda text: "." in text.partition("=")[0]):  # groups before their keys
        try:
            for single in expand_numbers([text]):
                _change(cfg, single, run_dir, config_dir)
        except UserError as error:
            problems.append(str(error))
    if not problems:
        check_trusted(cfg, run_dir, Caller.of(overrides, allow, config_dir))
        refuse_redacted(cfg)
    if problems := [*problems, *setting_problems(_length(cfg))]:
        raise ConfigProblems(problems)
    return cfg


def _change(cfg: DictConfig, text: str, run_dir: Path, config_dir: str | Path | None) -> None:
    override = parse(text)
    key = override.key_or_group
    group = key.partition(".")[0]
    if group in UNTIL_FINISHED and is_finished(run_dir):
        raise UserError(f"{text}: the run is finished; spo evaluate {run_dir} {text} evaluates it again")
    if key not in RESUMABLE and group not in (*RESUMABLE, *UNTIL_FINISHED):
        raise UserError(
            f"{text}: a resumed run cannot change this; it can change {', '.join((*LENGTH, TIME, *DEVICES))}, logger.* "
            "and strategy.*, callbacks.nonfinite.action and .max_skipped, and judge.* and evaluation.* until it is "
            "finished (start a new run to change anything else)"
        )
    if override.is_sweep_override() or override.is_delete():
        raise UserError(f"{text}: a resumed run takes one value per key")
    with open_dict(cfg) if override.is_add() or override.is_force_add() else nullcontext():
        if key == group:
            fresh = compose([f"{key}={override.value()}"], config_dir=config_dir, run_dir=run_dir)[key]
            cfg[key] = OmegaConf.to_container(fresh, resolve=False)
            if cfg.get(CHOICES):  # Runs of version 0.1 do not have the key.
                cfg[CHOICES][key] = str(override.value())
            return
        try:
            OmegaConf.update(cfg, key, override.value(), merge=True)
        except OmegaConfBaseException:
            parent = key.rpartition(".")[0]
            node = OmegaConf.select(cfg, parent)
            has = f"; {parent} has {', '.join(map(str, node))}" if isinstance(node, DictConfig) else ""
            raise UserError(f"{text}: unknown key{has}") from None


def _length(cfg: DictConfig) -> DictConfig:
    """Return a configuration that holds the limits of the length and nothing else."""
    trainer = {key.partition(".")[2]: OmegaConf.select(cfg, key) for key in LENGTH}
    return with_some_length(OmegaConf.create({"trainer": trainer}))


def _given(run_dir: Path) -> Mapping[str, Any]:
    """Return the configuration that started a run, as flat keys, or that a later resume changed it to."""
    return (read_json(run_dir / filenames.IDENTITY) or {}).get("config", {})


def _record_changes(run_dir: Path, cfg: DictConfig, before: int | None, time_before: Any) -> None:
    old, finished = read_json(run_dir / filenames.IDENTITY) or {}, is_finished(run_dir)
    epochs = OmegaConf.select(cfg, "trainer.max_epochs")
    limits, given = (cfg.trainer.max_steps, epochs), tuple(_given(run_dir).get(key) for key in LENGTH)
    # Runs of version 0.1.0 do not have this number.
    trained = int((read_mapping(run_dir / filenames.METRICS) or {}).get("trained/steps", before or 0))
    has_other_time = trained < (before or 0) and OmegaConf.select(cfg, TIME) != time_before
    if finished and before is not None and limits != given:
        # The steps of more epochs are known only when the data is read, so a limit in epochs grows with its number.
        shorter = limits[0] is not None and limits[0] <= before
        if shorter or (epochs is not None and given[1] is not None and epochs < given[1]):
            key, value = (LENGTH[0], limits[0]) if shorter else (LENGTH[1], epochs)
            raise UserError(f"{key}={value}: the run in {run_dir} is finished at {before} steps")
    if finished and before is not None and (limits != given or has_other_time):
        (run_dir / filenames.METRICS).rename(run_dir / filenames.earlier_metrics(trained))
    new = identity(cfg)
    write_config(run_dir, cfg)
    # The code stays the one that started the run: the same command rejects another version, and provenance.json lists
    # the versions that continued it.
    parts = {**old, "config": new["config"], "judge": new["judge"]}
    if "plugins" in old:
        parts["plugins"] = {name: old["plugins"].get(name, sha256) for name, sha256 in new["plugins"].items()}
    earlier = known_digests(old)  # The checkpoints until now carry them.
    for name in ("digest", "earlier_digests"):
        parts.pop(name, None)
    write_json(run_dir / filenames.IDENTITY, {**with_digest(parts), "earlier_digests": earlier})
