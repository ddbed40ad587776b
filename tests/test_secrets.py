"""Secrets stay in the process: files, terminal, logs, trackers, and messages do not contain them."""

from __future__ import annotations

import html
import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import pytest
import yaml

from spo import cli, secrets
from spo.config.compose import compose, job_name
from spo.errors import UserError
from spo.records.files import write_json, write_text
from spo.runs.claim import claim
from spo.runs.resume import resumed_config
from spo.secrets import command_line, is_secret_key, reads_secret_variable, redact_override, scrub, scrub_output
from spo.stages import evaluate
from spo.tracking import RunDescription
from spo.tracking.wandb import WandbTracker
from tests.commands import enter
from tests.endpoint import Reply, serving

KEY = 'planted"key+/=&<1>'


@pytest.fixture(autouse=True)
def _forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "_remembered", set())


def files_with(folder: Path, *texts: str) -> list[Path]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return [file for file in files if any(text.encode() in file.read_bytes() for text in texts)]


# --- names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "is_secret"),
    [
        ("logger.wandb.api_key", True),
        ("judge.request.headers.Authorization", True),
        ("judge.request.extra_headers.X-Gateway", True),
        ("judge.request.headers.Content-Type", False),
        ("judge.request.proxy-authorization", True),
        ("judge.request.Ocp-Apim-Subscription-Key", True),
        ("logger.x.token", True),
        ("logger.x.client_secret", True),
        ("logger.x.session_token", True),
        ("data.max_new_tokens", False),
        ("judge.request.max_tokens", False),
        ("judge.key_variable", False),
        ("data.source.eos_token", False),
        ("paths.cache", False),
    ],
)
def test_keys_that_hold_secrets(key: str, is_secret: bool) -> None:
    assert is_secret_key(key) is is_secret
    assert (redact_override(f"{key}=abcdefgh") != f"{key}=abcdefgh") is is_secret


@pytest.mark.parametrize(
    ("name", "is_secret"),
    [
        ("OPENAI_API_KEY", True),
        ("HF_TOKEN", True),
        ("AWS_SECRET_ACCESS_KEY", True),
        ("DB_PASSWORD", True),
        ("MY_KEY", True),
        ("SENTRY_DSN", True),
        ("TOKENIZERS_PARALLELISM", False),
        ("KEYBOARD", False),
        ("HOME", False),
        ("PWD", False),
    ],
)
def test_variables_that_hold_secrets(name: str, is_secret: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "value-of-a-variable")
    assert reads_secret_variable(f"x ${{oc.env:{name}}}") is is_secret
    assert (scrub("the value-of-a-variable.") == "the <redacted>.") is is_secret


def test_short_values_counts_and_paths_are_not_secrets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {"A_TOKEN": "true", "MAX_TOKENS": "4096", "B_KEY": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
        assert scrub(f"{value} stays") == f"{value} stays"


def test_a_secret_is_found_in_every_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", KEY)
    for form in (KEY, json.dumps(KEY), repr(KEY), html.escape(KEY), quote(KEY, safe="")):
        assert scrub(f"a {form} b").strip("ab \"'") == "<redacted>"
    monkeypatch.setenv("OTHER_API_KEY", f"{KEY}-and-more")
    assert scrub(f"{KEY}-and-more") == "<redacted>"


def test_command_line_and_names_hold_no_secret() -> None:
    words = [
        "judge.request.headers.Authorization=planted1",
        "+judge.request={extra_headers:{X-Key:'planted2',Accept:a}}",
    ]
    line = command_line(["/bin/spo", "train", *words, "logger.x.api_key=${oc.env:MY_KEY}", "seed=1"])
    assert "planted" not in line and "seed=1" in line and "Accept:a" in line and "${oc.env:MY_KEY}" in line
    name = job_name([*words, "seed=1"])
    assert "planted" not in name and "seed-1" in name
    assert name == job_name([word.replace("planted", "changed") for word in [*words, "seed=1"]])


# --- what leaves the process ---------------------------------------------------------------------------------------


def test_files_terminal_and_logs_are_scrubbed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MY_API_KEY", KEY)
    write_text(tmp_path / "a.txt", f"x {KEY} y")
    write_json(tmp_path / "b.json", {"x": KEY})
    assert json.loads((tmp_path / "b.json").read_text()) == {"x": "<redacted>"}
    end = scrub_output()
    try:
        handler = logging.FileHandler(tmp_path / "spo.log")
        log = logging.getLogger("spo.tests.secrets")
        log.addHandler(handler)
        print("printed", KEY)
        print("warned", KEY, file=sys.stderr)
        try:
            raise ValueError(KEY)
        except ValueError:
            log.warning("an error about %s", KEY, exc_info=True)
        log.removeHandler(handler)
        handler.close()
    finally:
        end()
    shown = capsys.readouterr()
    assert KEY not in shown.out + shown.err and shown.out == "printed <redacted>\n"
    assert "ValueError: <redacted>" in (tmp_path / "spo.log").read_text()
    assert not files_with(tmp_path, KEY)
    print(KEY)
    assert KEY in capsys.readouterr().out  # Only the command scrubs the terminal.


def test_an_error_of_the_command_is_scrubbed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(arguments: list[str]) -> int:
        raise UserError(f"the server says {KEY}")

    monkeypatch.setenv("MY_API_KEY", KEY)
    monkeypatch.setitem(cli.RUN, "report", fail)
    assert cli.main(["report"]) == 1
    assert capsys.readouterr().err == "spo: the server says <redacted>\n"


def test_a_run_directory_has_no_secret_and_its_identity_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY", "planted-gateway")
    monkeypatch.setenv("MY_TOKEN", "planted-token")
    run = tmp_path / "run"
    overrides = [
        "judge=openai",
        "judge.model=planted-typed",  # the same text as a secret
        "judge.key_variable=null",
        "+judge.request.headers.Authorization=Bearer planted-typed",
        "+judge.request.headers.X-Gateway=${oc.env:GATEWAY}",
        "tags=['${oc.env:MY_TOKEN}','${judge.request.headers.X-Gateway}',planted-gateway]",
    ]
    cfg = compose(overrides, run_dir=run)
    assert cfg.judge.request.headers.Authorization == "Bearer planted-typed"
    with pytest.raises(ValueError, match="planted"), claim(run, cfg):
        raise ValueError("the server repeats planted-gateway and planted-typed")
    assert not files_with(run, "planted-")
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["judge"]["request"]["headers"] == {"Authorization": "<redacted>", "X-Gateway": "${oc.env:GATEWAY}"}
    assert config["tags"] == ["${oc.env:MY_TOKEN}", "<redacted>", "<redacted>"]
    with claim(run, cfg):
        pass
    with pytest.raises(UserError, match=r"headers\.Authorization: the run directory does not hold this secret"):
        resumed_config(run, [])
    again = resumed_config(run, ["judge.request.headers.Authorization=planted-again", "judge.model=m"])
    assert again.judge.request.headers["X-Gateway"] == "planted-gateway"
    assert not files_with(run, "planted-")


def test_evaluation_records_its_configuration_without_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "planted-key")
    run = tmp_path / "run"
    with claim(run, compose(["judge=none"], run_dir=run)):
        pass
    (run / "policy").mkdir()
    (run / "policy/config.json").write_text("{}")
    seen: list[Any] = []
    result = SimpleNamespace(metrics={"eval/kl": 1.0}, samples=[], write_samples=lambda folder: None)
    for name, value in {
        "check_config": lambda cfg: None,
        "prepare_run": lambda cfg, model_from: None,
        "evaluate_run": lambda cfg, *_: seen.append(cfg) or result,
        "result_panel": lambda *_: None,
    }.items():
        monkeypatch.setattr(evaluate, name, value)
    overrides = ["judge=openai", "judge.model=m", "judge.key_variable=MY_API_KEY"]
    evaluate.evaluate_command(run, [*overrides, "+judge.request.user=${oc.env:MY_API_KEY}"])
    assert seen[0].judge.request.user == "planted-key"
    [file] = run.glob("evaluations/*/config.yaml")
    assert yaml.safe_load(file.read_text())["judge"]["request"]["user"] == "${oc.env:MY_API_KEY}"
    assert not files_with(run, "planted-key")


# --- W&B -----------------------------------------------------------------------------------------------------------


def described(folder: Path, **changes: Any) -> RunDescription:
    fields: dict[str, Any] = {"name": "n", "group": "g", "job_type": "j", "tags": ["a"], "config": {}}
    return RunDescription(directory=folder, **fields | changes)


def test_wandb_project_of_the_environment_counts_unless_the_key_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_PROJECT", "WANDB_ENTITY"):
        monkeypatch.delenv(name, raising=False)
    node = compose([]).logger.wandb
    assert (node.project, node.entity) == ("spo", None)
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setenv("WANDB_ENTITY", "us")
    assert (node.project, node.entity) == ("mine", "us")
    assert compose(["logger.wandb.project=typed"]).logger.wandb.project == "typed"


def test_wandb_names_of_the_environment_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"WANDB_NAME": "my run", "WANDB_RUN_GROUP": "ours", "WANDB_JOB_TYPE": "try", "WANDB_TAGS": "b,a"}
    for with_names in (False, True):
        for name, value in names.items():
            monkeypatch.setenv(name, value) if with_names else monkeypatch.delenv(name, raising=False)
        tracker = WandbTracker("p", None, "disabled", str(tmp_path))
        tracker.describe(described(tmp_path))
        found = [tracker._wandb_init[key] for key in ("name", "group", "job_type", "tags")]
        assert found == (["my run", "ours", "try", ["a", "b"]] if with_names else ["n", "g", "j", ["a"]])
        tracker.close()


@pytest.mark.slow
def test_wandb_receives_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "planted-token")
    monkeypatch.setattr(sys, "argv", ["spo", "train", "+logger.x.api_key=planted-typed", "tags=[planted-token]"])
    tracker = WandbTracker("p", None, "offline", str(tmp_path))
    tracker.describe(
        described(tmp_path, name="planted-token", tags=["planted-token"], config={"a": {"b": ["x planted-token"]}})
    )
    assert sys.argv[2].endswith("planted-typed")  # Lightning starts further ranks with it.
    tracker.conclude({"x": 1.0}, [{"prompt": "planted-token", "reward": 1.0}])
    tracker.close()
    assert list(tmp_path.rglob("*.wandb")) and not files_with(tmp_path, "planted-")


@pytest.mark.slow
def test_a_sweep_with_an_endpoint_that_repeats_the_key_writes_no_secret(
    tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    enter(tmp_path, cache_dir, monkeypatch)
    monkeypatch.setenv("ODD_NAME", "planted-judge")
    monkeypatch.setenv("MY_TOKEN", "planted-token")
    words = [
        "judge=openai",
        "judge.model=m",
        "judge.key_variable=ODD_NAME",
        "judge.max_retries=0",
        "optimizer.lr=0.05",  # The policy must answer otherwise than the reference, or the judge is not asked.
        "+judge.request.headers.Authorization=Bearer planted-typed",
        "tags=['${oc.env:MY_TOKEN}']",
    ]
    with serving() as endpoint:
        body = json.dumps({"error": {"message": "x" * 250 + " planted-judge planted-typed planted-token"}})
        endpoint.script = lambda *_: Reply(status=400, body=body.encode())
        monkeypatch.setattr(sys, "argv", ["spo", "train", "-m", *words])
        status = cli.main(
            ["train", "-m", "+debug=tiny", "seed=1", f"judge.base_url={endpoint.url}", *words, "hydra.sweep.dir=sweep"]
        )
    shown = capsys.readouterr()
    assert status == 1 and "planted-" not in shown.out + shown.err
    [run] = tmp_path.glob("sweep/*/failure.json")
    assert "400" in json.loads(run.read_text())["error"] and (tmp_path / "sweep/multirun.yaml").is_file()
    assert list(tmp_path.rglob("*.wandb")) and not files_with(tmp_path / "sweep", "planted-")
    assert not files_with(cache_dir, "planted-")
