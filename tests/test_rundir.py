"""Run directories: claim, identity, secrets, provenance and resume."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from spo.config.checks import check_config
from spo.config.compose import compose
from spo.errors import ConfigProblems, UserError
from spo.records.digests import code_version
from spo.runs.claim import Status, claim, finish
from spo.runs.identity import differences, identity
from spo.runs.provenance import git_state, record_continuation, record_inputs
from spo.runs.resume import resumed_config
from spo.runs.saved_config import load_config, resolved
from spo.secrets import command_line
from spo.stages.evaluation_config import evaluation_config


def config(run_dir: Path, *overrides: str) -> DictConfig:
    return compose(overrides, run_dir=run_dir)


def claimed(run_dir: Path, *overrides: str) -> Status:
    with claim(run_dir, config(run_dir, *overrides)) as status:
        return status


# --- claim ---------------------------------------------------------------------------------------------------------


def test_run_directory_is_new_then_unfinished_then_finished(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert claimed(run_dir, "seed=3") is Status.NEW
    assert OmegaConf.load(run_dir / "config.yaml").seed == 3
    assert claimed(run_dir, "seed=3") is Status.UNFINISHED
    finish(run_dir, {"eval/kl": 1.5})
    assert json.loads((run_dir / "metrics.json").read_text()) == {"eval/kl": 1.5}
    assert claimed(run_dir, "seed=3", "tags=[a]", "logger=csv") is Status.FINISHED


def test_damaged_metrics_leave_a_run_unfinished(tmp_path: Path) -> None:
    claimed(tmp_path)
    (tmp_path / "metrics.json").write_text('{"eval/kl": 1.')
    assert claimed(tmp_path) is Status.UNFINISHED


def test_claim_of_another_run_fails_and_lists_every_difference(tmp_path: Path) -> None:
    claimed(tmp_path, "seed=3")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(UserError) as caught:
        claimed(tmp_path, "seed=4", "method=dpo", "alpha=0.5")
    text = str(caught.value)
    assert "seed: 3 there, 4 now" in text
    assert 'method.name: "spo" there, "dpo" now' in text
    assert "method.loss.label_smoothing: absent there, 0.0 now" in text
    assert "alpha.value" in text and "rerun=true" in text
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_claim_of_a_directory_with_other_files_fails_except_for_logs(tmp_path: Path) -> None:
    (tmp_path / "spo.log").touch()
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"do not belong to a run of spo \(thesis.tex\)"):
        claimed(tmp_path)
    (tmp_path / "thesis.tex").unlink()
    assert claimed(tmp_path) is Status.NEW


def test_rerun_moves_the_old_run_aside(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    claimed(run_dir, "seed=3")
    assert claimed(run_dir, "seed=4", "rerun=true") is Status.NEW
    assert claimed(run_dir, "seed=5", "rerun=true") is Status.NEW
    seeds = {path.name: OmegaConf.load(path / "config.yaml").seed for path in tmp_path.iterdir()}
    assert seeds == {"run": 5, "run.1": 3, "run.2": 4}


def test_rerun_in_a_new_directory_moves_nothing(tmp_path: Path) -> None:
    assert claimed(tmp_path / "run", "rerun=true") is Status.NEW
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_claim_fails_while_another_process_has_the_directory(tmp_path: Path) -> None:
    cfg = config(tmp_path)
    with claim(tmp_path, cfg), pytest.raises(UserError, match="another process is at work"), claim(tmp_path, cfg):
        pass
    assert claimed(tmp_path) is Status.UNFINISHED


def test_claim_writes_nothing_on_further_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config(tmp_path)
    with claim(tmp_path, cfg) as first:
        before = sorted(file.name for file in tmp_path.iterdir())
        for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
            monkeypatch.setenv(name, value)
        with claim(tmp_path, cfg) as second:
            assert first is second is Status.NEW
        assert sorted(file.name for file in tmp_path.iterdir()) == before


# --- identity ------------------------------------------------------------------------------------------------------


def test_identity_ignores_paths_loggers_and_tags(tmp_path: Path) -> None:
    one = identity(config(tmp_path / "a", "paths.outputs=x", "logger=csv", "tags=[a]"))
    other = identity(config(tmp_path / "b", "paths.cache=y", "logger=record", "rerun=true"))
    assert one == other and differences(one, other) == []


def test_a_run_is_the_same_on_other_devices(tmp_path: Path) -> None:
    one = identity(config(tmp_path))
    changes = ["trainer.devices=2", "trainer.num_nodes=2", "strategy=ddp", "data.micro_batch_size=1"]
    other = identity(config(tmp_path, *changes, "data.micro_batch_tokens=100"))
    assert one == other
    # Version 0.1.0 counted them as part of a run.
    before = {**one, "config": {**one["config"], "trainer.devices": 1, "strategy.plugin": "auto"}, "digest": "x"}
    assert differences(before, other) == []
    assert differences(before, identity(config(tmp_path, "trainer.max_steps=7"))) != []


def test_identity_depends_on_the_bytes_of_data_and_weights(tmp_path: Path) -> None:
    data, model = tmp_path / "pairs.jsonl", tmp_path / "model"
    model.mkdir()
    overrides = ["model=hf", f"model.path={model}", "data=jsonl", f"data.path={data}"]

    def write(text: str, weights: bytes) -> dict[str, Any]:
        data.write_text(text)
        (model / "model.safetensors").write_bytes(weights)
        return identity(config(tmp_path / "run", *overrides))

    one = write("a", b"0")
    assert write("a", b"0") == one
    assert differences(one, write("b", b"0")) == ["the bytes of the data have changed"]
    assert differences(one, write("a", b"1")) == ["the weights of the model have changed"]


def test_identity_depends_on_the_code(tmp_path: Path) -> None:
    one = identity(config(tmp_path))
    assert one["code"] == code_version()
    assert differences(one, {**one, "code": "0.0.0+0"}) == [f"the code of spo: {code_version()} there, 0.0.0+0 now"]


def test_claim_with_other_code_needs_an_explicit_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg, versions = config(tmp_path), []
    with claim(tmp_path, cfg):
        pass
    for code, step in (("0.2.0+a", 3), ("0.2.0+a", 4), (code_version(), 5)):
        for module in ("identity", "provenance"):
            monkeypatch.setattr(f"spo.runs.{module}.code_version", lambda code=code: code)
        if code == "0.2.0+a":
            with pytest.raises(UserError, match="holds another run"), claim(tmp_path, cfg):
                pass
        with claim(tmp_path, cfg, resumed=True) as status:
            assert status is Status.UNFINISHED
            record_continuation(tmp_path, cfg, step)
        versions.append(capsys.readouterr().err.count("note: code"))
    assert versions == [1, 0, 1]
    continued = json.loads((tmp_path / "provenance.json").read_text())["continued_with"]
    assert [(one["code"], one["step"]) for one in continued] == [("0.2.0+a", 3), (code_version(), 5)]


def test_resume_with_other_code_compares_keys_that_both_versions_know(tmp_path: Path) -> None:
    cfg = config(tmp_path)
    with claim(tmp_path, cfg):
        pass
    old = json.loads((tmp_path / "identity.json").read_text())
    del old["config"]["trainer.precision"]
    config_of_old = {**old["config"], "trainer.dropped": 1}
    (tmp_path / "identity.json").write_text(json.dumps({**old, "code": "0.0.0+0", "config": config_of_old}))
    with claim(tmp_path, cfg, resumed=True) as status:
        assert status is Status.UNFINISHED
    (tmp_path / "identity.json").write_text(json.dumps({**old, "code": "0.0.0+0", "config": {"seed": 7}}))
    with (
        pytest.raises(UserError, match=r"(?s)What differs:\n  - seed: 7 there, 0 now\nchoose"),
        claim(tmp_path, cfg, resumed=True),
    ):
        pass
    (tmp_path / "identity.json").write_text(json.dumps({**old, "config": config_of_old}))
    with pytest.raises(UserError, match=r"trainer\.dropped: 1 there, absent now"), claim(tmp_path, cfg, resumed=True):
        pass  # the same code has the same keys


def test_resume_with_changes_keeps_the_code_of_the_identity(tmp_path: Path) -> None:
    with claim(tmp_path, config(tmp_path, "trainer.max_steps=9")):
        pass
    old = json.loads((tmp_path / "identity.json").read_text())
    (tmp_path / "identity.json").write_text(json.dumps({**old, "code": "0.0.0+0"}))
    resumed_config(tmp_path, ["trainer.max_steps=10"])
    new = json.loads((tmp_path / "identity.json").read_text())
    assert new["code"] == "0.0.0+0" and new["config"]["trainer.max_steps"] == 10
    ours = identity(config(tmp_path, "trainer.max_steps=10"))
    assert new["digest"] != ours["digest"]


# --- secrets -------------------------------------------------------------------------------------------------------


def test_secrets_are_not_written_to_the_run_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "hunter2")
    cfg = config(
        tmp_path,
        "+logger.mine.api_key=${oc.env:MY_API_KEY}",
        "+logger.mine.url='http://x/${oc.env:MY_API_KEY}'",
        "+logger.mine.password=hunter2",
        "+logger.mine.max_new_tokens=5",
        "+logger.mine.eos_token=end",
    )
    with claim(tmp_path, cfg):
        pass
    assert not [file for file in tmp_path.iterdir() if b"hunter2" in file.read_bytes()]
    written = OmegaConf.to_container(OmegaConf.load(tmp_path / "config.yaml"), resolve=False)["logger"]["mine"]
    assert written["api_key"] == "${oc.env:MY_API_KEY}" and written["password"] == "<redacted>"
    assert written["max_new_tokens"] == 5 and written["eos_token"] == "end"
    assert command_line(["/bin/spo", "train", "+a.token=x", "seed=1"]) == "spo train +a.token=<redacted> seed=1"


def test_saved_config_is_fully_resolved(tmp_path: Path) -> None:
    claimed(tmp_path)
    assert "${" not in (tmp_path / "config.yaml").read_text()
    assert OmegaConf.load(tmp_path / "config.yaml").callbacks.checkpoint.dirpath == f"{tmp_path}/checkpoints"
    assert resolved(config(tmp_path)) == OmegaConf.to_container(OmegaConf.load(tmp_path / "config.yaml"))


# --- provenance ----------------------------------------------------------------------------------------------------


def test_provenance_holds_seeds_digests_versions_and_command(tmp_path: Path) -> None:
    data = tmp_path / "pairs.jsonl"
    data.write_text("x")
    cfg = config(tmp_path / "run", "seed=5", "data=jsonl", f"data.path={data}")
    with claim(tmp_path / "run", cfg):
        pass
    provenance = json.loads((tmp_path / "run/provenance.json").read_text())
    assert provenance["seeds"] == {"seed": 5, "data.seed": 0}
    assert provenance["data"]["sha256"] == identity(cfg)["data"]
    assert {"torch", "lightning", "transformers"} <= provenance["versions"].keys()
    assert {"git_sha", "git_dirty", "command", "python", "code"} <= provenance.keys()


def test_provenance_keeps_both_digests_when_inputs_change_on_resume(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    claimed(tmp_path)
    first = {"reference_sha256": "a", "pairs_sha256": "b"}
    second = {**first, "pairs_sha256": "c"}
    record_inputs(tmp_path, first)
    record_inputs(tmp_path, first, step=3)
    record_inputs(tmp_path, {**first, "reference_sha256": "z"})  # the run restarts: no step used the earlier inputs
    record_inputs(tmp_path, first)
    assert "earlier_inputs" not in json.loads((tmp_path / "provenance.json").read_text())
    assert capsys.readouterr().err == ""
    record_inputs(tmp_path, second, step=3)
    record_inputs(tmp_path, second, step=4)
    [note] = capsys.readouterr().err.splitlines()
    assert note.startswith(
        "note: the preference pairs of this run were made again and differ from those of its first 3"
    )
    provenance = json.loads((tmp_path / "provenance.json").read_text())
    assert provenance["inputs"] == second and provenance["earlier_inputs"] == [{**first, "until_step": 3}]
    assert provenance["command"] and provenance["identity"]
    record_inputs(tmp_path, first, step=5)
    provenance = json.loads((tmp_path / "provenance.json").read_text())
    assert provenance["inputs"] == first and [one["until_step"] for one in provenance["earlier_inputs"]] == [3, 5]


def test_git_state_reports_commit_and_changes(tmp_path: Path) -> None:
    assert git_state(tmp_path) is None

    def git(*arguments: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", "-C", str(tmp_path), *who, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    git("init", "-q")
    (tmp_path / "a.py").write_text("1")
    (tmp_path / ".gitignore").write_text("b.py\n")
    git("add", ".")
    git("commit", "-q", "-m", "one")
    sha = git("rev-parse", "HEAD")
    assert git_state(tmp_path) == git_state(tmp_path, "a.py") == {"git_sha": sha, "git_dirty": False}
    (tmp_path / "a.py").write_text("2")
    (tmp_path / "b.py").write_text("an installed package inside a repository that ignores it")
    assert git_state(tmp_path) == {"git_sha": sha, "git_dirty": True}
    assert git_state(tmp_path, "b.py") is None


# --- resuming ------------------------------------------------------------------------------------------------------


def test_resume_accepts_other_steps_loggers_and_strategy(tmp_path: Path) -> None:
    claimed(tmp_path, "trainer.max_steps=10", "seed=3")
    cfg = resumed_config(tmp_path, ["trainer.max_steps=20", "logger=csv", "strategy=ddp"])
    assert (cfg.seed, cfg.trainer.max_steps) == (3, 20)
    assert list(cfg.logger) == ["csv"] and cfg.logger.csv.save_dir == str(tmp_path)
    assert cfg.strategy.plugin["_target_"].endswith("DDPStrategy")
    assert (cfg.choices.logger, cfg.choices.strategy, cfg.choices.method) == ("csv", "ddp", "spo")
    with claim(tmp_path, cfg) as status:
        assert status is Status.UNFINISHED
    with pytest.raises(UserError, match=r"trainer\.max_steps: 20 there, 10 now"):
        claimed(tmp_path, "trainer.max_steps=10", "seed=3", "strategy=ddp")


def test_resume_may_skip_the_step_at_which_the_run_stopped(tmp_path: Path) -> None:
    claimed(tmp_path)
    cfg = resumed_config(tmp_path, ["callbacks.nonfinite.action=skip", "callbacks.nonfinite.max_skipped=2"])
    assert (cfg.callbacks.nonfinite.action, cfg.callbacks.nonfinite.max_skipped) == ("skip", 2)
    with claim(tmp_path, cfg) as status:
        assert status is Status.UNFINISHED
    check_config(resumed_config(tmp_path, []))
    with pytest.raises(ConfigProblems, match=r"callbacks\.nonfinite\.action=go: choose stop or skip"):
        check_config(resumed_config(tmp_path, ["callbacks.nonfinite.action=go"]))


def test_resume_rejects_every_other_change(tmp_path: Path) -> None:
    claimed(tmp_path)
    with pytest.raises(ConfigProblems) as caught:
        resumed_config(tmp_path, ["seed=4", "method=dpo", "alpha=0.5", "trainer.max_steps=x", "logger.wandb.projekt=y"])
    text = str(caught.value)
    for part in ("seed=4: a resumed run cannot", "method=dpo: a", "alpha=constant: a", "max_steps=x: must"):
        assert part in text
    assert "logger.wandb.projekt=y: unknown key; logger.wandb has" in text
    assert claimed(tmp_path) is Status.UNFINISHED


def test_resume_accepts_another_judge_until_the_run_is_finished(tmp_path: Path) -> None:
    endpoint = ["judge=openai", "judge.model=wrong", "judge.key_variable=null"]
    claimed(tmp_path, *endpoint)
    cfg = resumed_config(tmp_path, ["judge.model=right", "evaluation.num_prompts=7"])
    assert (cfg.judge.model, cfg.evaluation.num_prompts) == ("right", 7)
    with claim(tmp_path, cfg) as status:
        assert status is Status.UNFINISHED
    local = ["judge.margin=0.5", "judge=language_model", "judge.path=MODEL"]  # in any order
    cfg = resumed_config(tmp_path, local)
    assert (cfg.judge.margin, cfg.judge.path) == (0.5, "MODEL") and "model" not in cfg.judge
    with pytest.raises(UserError, match=r"judge\.margin: 0\.5 there, absent now"):
        claimed(tmp_path, *endpoint)
    finish(tmp_path, {"a": 1.0})
    with pytest.raises(ConfigProblems, match=r"spo evaluate .* judge=gold evaluates it again"):
        resumed_config(tmp_path, ["judge=gold"])


def test_identity_ignores_the_request_rate_of_a_judge(tmp_path: Path) -> None:
    endpoint = ["judge=openai", "judge.model=m", "judge.key_variable=null"]
    claimed(tmp_path, *endpoint)
    faster = ["judge.concurrency=2", "judge.requests_per_minute=9", "judge.timeout_s=1", "evaluation.batch_size=3"]
    assert claimed(tmp_path, *endpoint, *faster) is Status.UNFINISHED
    with pytest.raises(UserError, match=r"judge\.request\.temperature"):
        claimed(tmp_path, *endpoint, "judge.request.temperature=1")


def test_finished_run_resumes_for_more_steps(tmp_path: Path) -> None:
    claimed(tmp_path, "trainer.max_steps=10")
    finish(tmp_path, {"a": 1.0})
    with claim(tmp_path, resumed_config(tmp_path, [])) as status:
        assert status is Status.FINISHED
    with pytest.raises(UserError, match="finished at 10 steps"):
        resumed_config(tmp_path, ["trainer.max_steps=5"])
    with claim(tmp_path, resumed_config(tmp_path, ["trainer.max_steps=20"])) as status:
        assert status is Status.UNFINISHED
    assert json.loads((tmp_path / "metrics.10.json").read_text()) == {"a": 1.0}


def test_moved_run_directory_can_be_claimed(tmp_path: Path) -> None:
    claimed(tmp_path / "old")
    os.rename(tmp_path / "old", tmp_path / "new")
    cfg = load_config(tmp_path / "new")
    assert cfg.paths.run == str(tmp_path / "new")
    assert cfg.callbacks.checkpoint.dirpath == f"{tmp_path}/new/checkpoints"
    with claim(tmp_path / "new", cfg) as status:
        assert status is Status.UNFINISHED


def test_resume_of_a_directory_without_a_run_fails(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        resumed_config(tmp_path / "nowhere", [])
    with pytest.raises(UserError, match=r"composed\.yaml is missing"):
        resumed_config(tmp_path, [])


def test_resume_with_more_steps_updates_dependent_keys(tmp_path: Path) -> None:
    claimed(tmp_path, "trainer.max_steps=10", "alpha=linear", "beta=cosine")
    cfg = resumed_config(tmp_path, ["trainer.max_steps=20"])
    assert (cfg.scheduler.num_training_steps, cfg.alpha.steps, cfg.beta.steps) == (20, 20, 20)
    assert OmegaConf.load(tmp_path / "config.yaml").scheduler.num_training_steps == 20
    with claim(tmp_path, cfg) as status:
        assert status is Status.UNFINISHED


def test_secret_in_an_override_is_not_written(tmp_path: Path) -> None:
    claimed(tmp_path, "+logger.wandb.api_key=hunter2")
    assert all("hunter2" not in file.read_text() for file in tmp_path.iterdir())


def test_evaluation_overrides_update_dependent_keys(tmp_path: Path) -> None:
    claimed(tmp_path, "evaluation.num_prompts=3")
    cfg = evaluation_config(load_config(tmp_path), ["data.max_new_tokens=10", "data.seed=5"])
    assert (cfg.evaluation.max_new_tokens, cfg.data.source.seed, cfg.evaluation.num_prompts) == (10, 5, 3)
    other = evaluation_config(load_config(tmp_path), ["data=jsonl", "data.path=x.jsonl"])
    assert (other.data.source.path, other.judge.reward, other.evaluation.num_prompts) == ("x.jsonl", None, 3)
    with pytest.raises(UserError, match=r"method=dpo"):
        evaluation_config(load_config(tmp_path), ["method=dpo"])
