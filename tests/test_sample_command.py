"""``spo sample`` and ``spo chat``: seeds, models, prompts, the choice by a judge, and errors in words."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from spo import cli
from spo.config.compose import compose
from spo.records.files import write_jsonl
from spo.records.policy import write_policy_digests
from spo.runs.claim import claim
from spo.sampling import contents, sample
from spo.sampling.linear_alignment import sample_aligned
from spo.signals import Interrupted
from spo.stages.sample_request import SampleRequest, TrustedOverrides
from spo.stages.sampled_model import SampledModel, load_sampled
from spo.types import Sequences
from tests.commands import spo, sweep
from tests.helpers import EOS, tiny_llama, tiny_tokenizer

PROMPT = "w4 w5 w6"
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}w9 {{ m.content }} w10{% elif m.role == 'system' %}w11 "
    "{{ m.content }} w12 {% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
SHORT = ("--max-new-tokens", "8")


def save(folder: Path, seed: int, template: str | None = None) -> Path:
    tiny_llama(seed, dtype=torch.float32, scale=0.3).save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a base model, a chat model, and a run whose reference is the base model."""
    folder = tmp_path_factory.mktemp("models")
    save(folder / "base", 4)
    save(folder / "chat", 5, TEMPLATE)
    save_run(folder / "run", folder / "base")
    return folder


def save_run(run_dir: Path, base: Path, template: str | None = None, *overrides: str) -> Path:
    """Write what a finished run has, with a policy of other weights than its reference."""
    words = ["model=hf", f"model.path={base}", "sft.max_steps=0", "trainer.max_steps=1", *overrides]
    with claim(run_dir, compose(words, run_dir=run_dir)):
        save(run_dir / "policy", 6, template)
        write_policy_digests(run_dir)
    return run_dir


def lengths(prompts: Sequence[str], completions: Sequence[str]) -> dict[str, list[float]]:
    """Reward long completions."""
    assert set(prompts) == {PROMPT}
    return {"reward": [float(len(text)) for text in completions]}


def printed(capsys: pytest.CaptureFixture[str], *words: object) -> list[dict[str, Any]]:
    """Run ``spo sample ... --json`` in this process, and return the array."""
    assert cli.main(["sample", *map(str, words), *SHORT, "--json"]) == 0, capsys.readouterr().err
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return found


def texts_of(drawn: Sequences) -> list[str]:
    """Return completions as the tokenizer writes them, without the spaces between words."""
    return ["".join(f"w{token}" for token in tokens if token > EOS) for tokens in contents(drawn, [EOS])]


def loaded(path: Path, **changes: Any) -> SampledModel:
    return load_sampled(SampleRequest(path, PROMPT, max_new_tokens=8, **changes), TrustedOverrides())[0]


# --- completions ---------------------------------------------------------------------------------------------------


def test_completions_are_those_of_the_sampler(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = printed(capsys, models / "run", PROMPT, "-n", "6", "--seed", "3", "--temperature", "0.7", "--top-p", "0.9")
    policy = tiny_llama(6, dtype=torch.float32, scale=0.3)
    ids = [1, 4, 5, 6]
    drawn = sample(
        policy,
        [ids] * 6,
        max_new_tokens=8,
        temperature=0.7,
        top_p=0.9,
        stop_ids=[EOS],
        pad_token_id=0,
        seeds=range(3, 9),
        sampler="static",
    )
    texts = texts_of(drawn)
    assert [row["completion"].replace(" ", "") for row in found] == texts
    assert [row["tokens"] for row in found] == drawn.completion_length.tolist()
    assert [row["seed"] for row in found] == [*range(3, 9)]
    assert [set(row) for row in found] == [{"prompt", "completion", "tokens", "seed"}] * 6
    assert {row["prompt"] for row in found} == {PROMPT} and len({row["completion"] for row in found}) > 3
    for count, seed in ((1, 3), (2, 5)):
        words = ("-n", count, "--seed", seed, "--temperature", "0.7", "--top-p", "0.9")
        assert printed(capsys, models / "run", PROMPT, *words) == found[seed - 3 : seed - 3 + count]


def test_temperature_and_length_are_those_of_the_evaluation(models: Path, tmp_path: Path) -> None:
    own = save_run(tmp_path / "run", models / "base", None, "evaluation.temperature=0.5", "evaluation.max_new_tokens=7")
    model = load_sampled(SampleRequest(own, PROMPT), TrustedOverrides())[0]
    assert (model.temperature, model.max_new_tokens, model.top_p) == (0.5, 7, 1.0)
    assert loaded(own, temperature=0.0).temperature == 0.0


def test_policy_beside_its_reference(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = printed(capsys, models / "run", PROMPT, "-n", "2", "--against", "reference")
    assert [(row.pop("model"), row["seed"]) for row in both] == [
        ("policy", 0),
        ("policy", 1),
        ("reference", 0),
        ("reference", 1),
    ]
    assert both[:2] == printed(capsys, models / "run", PROMPT, "-n", "2")
    assert both[2:] == printed(capsys, models / "base", PROMPT, "-n", "2")
    other = printed(capsys, models / "base", PROMPT, "-n", "2", "--against", models / "run")
    assert [row["model"] for row in other] == [str(models / "base")] * 2 + [str(models / "run")] * 2
    assert [row["completion"] for row in other] == [row["completion"] for row in both[2:] + both[:2]]


def test_two_models_stand_beside_each_other_in_the_terminal(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["sample", str(models / "run"), PROMPT, "-n", "2", *SHORT]
    assert cli.main([*words, "--against", "reference"]) == 0
    table = capsys.readouterr().out
    assert "policy" in table and "reference" in table and table.count("seed 0") == table.count("seed 1") == 2
    assert cli.main(words) == 0
    alone = capsys.readouterr().out
    assert alone.count("seed 0") == alone.count("seed 1") == 1 and "policy" not in alone


# --- prompts -------------------------------------------------------------------------------------------------------


def test_prompt_of_a_chat_model_is_a_message(models: Path) -> None:
    chat = loaded(models / "chat")
    assert chat.is_chat and chat.ids_of(chat.prompt_of(PROMPT)) == (9, 4, 5, 6, 10)
    with_system = chat.prompt_of(PROMPT, "w7 w8")
    assert chat.ids_of(with_system) == (11, 7, 8, 12, 9, 4, 5, 6, 10)
    plain = loaded(models / "chat", plain=True)
    assert plain.ids_of(plain.prompt_of(PROMPT)) == (1, 4, 5, 6)
    base = loaded(models / "base")
    assert not base.is_chat and base.ids_of(base.prompt_of(PROMPT, "w7")) == (1, 7, 4, 5, 6)


def test_prompt_comes_from_the_standard_input(
    models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", piped(f" {PROMPT}\nw7 \n\n".encode()))
    found = printed(capsys, models / "base", "-", "-n", "1")
    assert found == printed(capsys, models / "base", f" {PROMPT}\nw7 \n", "-n", "1")
    assert found[0]["prompt"] == f" {PROMPT}\nw7 \n"
    for content, message in (
        (b"\n", "the prompt is empty"),
        (b"w4 \xff\n", "the prompt is not valid UTF-8 after 'w4 '"),
    ):
        monkeypatch.setattr(sys, "stdin", piped(content))
        assert cli.main(["sample", str(models / "base"), "-"]) == 2
        assert message in capsys.readouterr().err


def test_principle_stands_in_the_message_without_a_system_role(tmp_path: Path) -> None:
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
    chat = loaded(save(tmp_path / "chat", 5, refuses))
    assert chat.ids_of(chat.prompt_of(PROMPT, "w7 w8")) == (9, 7, 8, 4, 5, 6, 10)


def test_prompts_of_a_run_are_as_in_its_record(models: Path, tmp_path: Path) -> None:
    run_dir = save_run(tmp_path / "run", models / "chat", TEMPLATE)
    assert loaded(run_dir).is_chat
    write_jsonl(run_dir / "samples.jsonl", [{"prompt": "w3 w4"}])
    assert not loaded(run_dir).is_chat
    write_jsonl(run_dir / "samples.jsonl", [{"prompt": "w11 w8 w12 w9 w3 w10"}])
    assert loaded(run_dir).is_chat


# --- principles and judges -----------------------------------------------------------------------------------------


def test_principle_is_linear_alignment(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("-n", "4", "--principle", "w7 w8")
    for flags, ratio, nucleus in (
        ((), 2.0, "principled"),
        (("--ratio", "5", "--nucleus", "contrast"), 5.0, "contrast"),
    ):
        found = printed(capsys, models / "run", PROMPT, *words, "--top-p", "0.9", *flags)
        drawn = sample_aligned(
            tiny_llama(6, dtype=torch.float32, scale=0.3),
            [[1, 7, 8, 4, 5, 6]] * 4,
            [[1, 4, 5, 6]] * 4,
            ratio=ratio,
            nucleus=nucleus,  # type: ignore[arg-type]
            max_new_tokens=8,
            temperature=1.0,
            top_p=0.9,
            stop_ids=[EOS],
            pad_token_id=0,
            seeds=range(4),
        )
        texts = texts_of(drawn)
        assert [row["completion"].replace(" ", "") for row in found] == texts
    none = printed(capsys, models / "run", PROMPT, *words, "--ratio", "0")
    assert [row["completion"] for row in none] == [
        row["completion"] for row in printed(capsys, models / "run", f"w7 w8 {PROMPT}", "-n", "4")
    ]


def test_best_of_takes_the_best_candidate_by_the_judge(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    judge = ("judge=function", f"judge.reward._target_={__name__}.lengths")
    best = printed(capsys, models / "run", PROMPT, "-n", "2", "--best-of", "3", *judge)
    all_six = printed(capsys, models / "run", PROMPT, "-n", "6")
    for place, row in enumerate(best):
        candidates = all_six[3 * place : 3 * place + 3]
        expected = max(candidates, key=lambda one: len(one["completion"]))
        assert row.pop("reward") == len(expected["completion"]) and row == expected
    folder = printed(capsys, models / "base", PROMPT, "-n", "1", "--best-of", "2", *judge)
    assert folder[0]["reward"] == len(folder[0]["completion"])


# --- the conversation ----------------------------------------------------------------------------------------------


def talk(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], lines: str, *words: object
) -> tuple[list[str], str]:
    """Run ``spo chat`` in this process on lines of input, and return the lines of its output, and its errors."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    assert cli.main(["chat", *map(str, words), *SHORT]) == 0
    captured = capsys.readouterr()
    return captured.out.splitlines(), captured.err


def test_chat_streams_the_completions_of_the_sampler(
    models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sampled = [row["completion"] for row in printed(capsys, models / "run", PROMPT, "-n", "2")]
    reference = [row["completion"] for row in printed(capsys, models / "base", PROMPT, "-n", "2")]
    found, _ = talk(monkeypatch, capsys, f"{PROMPT}\n\n{PROMPT}\n/reset\n{PROMPT}\n/quit\n{PROMPT}\n", models / "run")
    assert found == [*sampled, "(a new conversation)", sampled[0]]
    found, _ = talk(monkeypatch, capsys, f"{PROMPT}\n{PROMPT}", models / "run", "--against", "reference")
    expected = [
        f"[{name}] {text}"
        for pair in zip(sampled, reference, strict=True)
        for name, text in zip(("policy", "reference"), pair, strict=True)
    ]
    assert found == expected


def test_chat_models_see_their_own_conversation(
    models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = loaded(models / "chat")
    first = chat.draw(chat.prompt_of("w3"), [0])[0].text
    history = (*chat.prompt_of("w3"), {"role": "assistant", "content": first}, *chat.prompt_of("w4"))
    second = chat.draw(history, [1])[0].text  # type: ignore[arg-type]
    found, _ = talk(monkeypatch, capsys, "w3\nw4\n", models / "chat")
    assert found == [first, second]
    assert second != chat.draw(chat.prompt_of("w4"), [1])[0].text


def test_chat_goes_on_after_a_line_without_room(
    models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found, errors = talk(monkeypatch, capsys, f"{'w5 ' * 60}\n{PROMPT}\n", models / "base")
    assert len(found) == 1 and "leaves no room for 8 new ones in the context of 64 tokens" in errors


def piped(content: bytes) -> io.TextIOWrapper:
    """Return a standard input that refuses bytes that are not UTF-8, as in most locales."""
    return io.TextIOWrapper(io.BytesIO(content), encoding="utf-8")


def test_chat_answers_mistyped_commands_and_other_encodings_with_a_message(
    models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected, _ = talk(monkeypatch, capsys, f"{PROMPT}\n/ w4\n", models / "base")
    lines = b"caf\xe9 \xff\n/resett\n  " + PROMPT.encode() + b" \n/ w4\n"
    monkeypatch.setattr(sys, "stdin", piped(lines))
    assert cli.main(["chat", str(models / "base"), *SHORT]) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines() == expected and len(expected) == 2
    assert captured.err.splitlines() == [
        "spo: the line is not valid UTF-8 after 'caf': write it in this encoding",
        "spo: there is no command /resett: the commands are /reset and /quit",
    ]


@pytest.mark.parametrize("interruption", [KeyboardInterrupt(), Interrupted(signal.SIGINT)])
def test_an_interrupt_ends_a_chat_cleanly(
    models: Path, interruption: BaseException, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(_: str) -> str:
        raise interruption

    monkeypatch.setattr("builtins.input", interrupt)
    assert cli.main(["chat", str(models / "base")]) == 0
    assert "Traceback" not in capsys.readouterr().err


def test_pieces_of_a_stream_are_whole_characters(models: Path) -> None:
    model = loaded(models / "base")
    pieces: list[str] = []

    class Bytes:
        """A renderer whose tokens are the bytes of UTF-8."""

        stop_ids = (EOS,)
        tokenizer = model.renderer.tokenizer

        def prompt_ids(self, prompt: str) -> tuple[int, ...]:
            return (1, 4)

        def decode(self, ids: Sequence[int]) -> str:
            return b"".join("é".encode()[i % 2 : i % 2 + 1] for i in range(len(ids))).decode(errors="replace")

    whole = replace(model, renderer=Bytes()).stream("w4", 0, pieces.append)  # type: ignore[arg-type]
    assert "".join(pieces) == whole.text and set(pieces[:-1]) == {"é"}


# --- errors --------------------------------------------------------------------------------------------------------

WRONG = [
    (("run", "  "), 2, "the prompt is empty"),
    (("run",), 2, "usage: spo sample RUN"),
    (("run", "w4", "-n", "0"), 2, "-n 0: must be at least 1"),
    (("run", "w4", "--seed", "-1"), 2, "--seed -1: must be 0 or more"),
    (("run", "w4", "--ratio", "2"), 2, "--ratio 2.0 is a setting of Linear Alignment: add --principle TEXT"),
    (("run", "w4", "--nucleus", "contrast"), 2, "--nucleus contrast is a setting of Linear Alignment"),
    (("run", "caf\udce9 x"), 2, "the prompt is not valid UTF-8 after 'caf': write it in this encoding"),
    (("run", "w4", "--principle", "\udcff"), 2, "--principle is not valid UTF-8"),
    (("run", "w4", "--principle", " "), 2, "--principle is empty"),
    (("run", "w4", "--principle", "w5", "--ratio", "inf"), 2, "--ratio inf: must be a finite number"),
    (("run", "w4", "--temperature", "-1"), 2, "--temperature -1: must be finite and 0 or more"),
    (("run", "w4", "--top-p", "0"), 2, "--top-p 0: must be above 0 and at most 1"),
    (("run", "w4", "--max-new-tokens", "0"), 2, "--max-new-tokens 0: must be at least 1"),
    (("run", "w4", "--best-of", "0"), 2, "--best-of 0: must be at least 1"),
    (("run", "w4", "judge=gold"), 2, "judge=gold: a judge chooses among several completions: add --best-of N"),
    (("nowhere", "w4"), 1, "nowhere: there is no such folder"),
    (("empty", "w4"), 1, "empty is neither a run directory"),
    ((".", "w4"), 1, ". holds several runs: name one of them, such as run"),
    (("unfinished", "w4"), 1, "does not have a policy yet: finish it with spo train --resume unfinished"),
    (("removed", "w4"), 1, "removed/policy is missing: restore the files"),
    (("base", "w4", "--against", "reference"), 1, "base is a model folder, and only a run has a reference"),
    (("run", "w4", "--against", "nowhere"), 1, "nowhere: there is no such folder"),
]


def test_wrong_commands_are_answered_without_importing_torch(models: Path, tmp_path: Path) -> None:
    for name in ("base", "run"):
        shutil.copytree(models / name, tmp_path / name)
    for name in ("empty", "unfinished", "removed"):
        (tmp_path / name).mkdir()
    (tmp_path / "unfinished" / "composed.yaml").touch()
    (tmp_path / "removed" / "metrics.json").write_text('{"a": 1}')
    code = (
        "import json, sys, io, contextlib, spo.cli\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    with contextlib.redirect_stderr(io.StringIO()) as errors:\n"
        "        status = spo.cli.main(['sample', *words])\n"
        "    print(json.dumps([status, errors.getvalue(), 'torch' in sys.modules]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps([words for words, _, _ in WRONG])],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(cli.__file__).parent.parent)},
        capture_output=True,
        text=True,
        check=True,
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    for (words, status, message), (got, errors, imports_torch) in zip(WRONG, found, strict=True):
        assert (got, imports_torch) == (status, False) and message in errors, (words, errors)


def fails(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert cli.main(["sample", *map(str, words)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def test_only_a_prompt_is_missing_in_a_command_without_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sample", "RUN"]) == 2
    assert "arguments are required: PROMPT\nusage: spo sample RUN" in capsys.readouterr().err


def test_errors_of_loading_and_choosing(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, base = models / "run", models / "base"
    assert "leaves no room for 80 new ones in the context of 64 tokens (policy)" in fails(capsys, run, PROMPT)
    words = (PROMPT, *SHORT, "--best-of", "2")
    assert "a model folder does not have a judge: name one" in fails(capsys, base, *words)
    assert "the run does not have a judge: name one" in fails(capsys, run, *words, "judge=none")
    assert "an evaluation can change" in fails(capsys, run, PROMPT, "optimizer.lr=1")
    assert "judge.path" in fails(capsys, run, *words, "judge=reward_model")
    own = save_run(tmp_path / "run", base)
    with (own / "policy" / "config.json").open("a") as file:
        file.write(" ")
    assert "config.json was changed" in fails(capsys, own, PROMPT)


def test_run_of_somebody_else_must_be_allowed(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = save_run(tmp_path / "run", models / "base")
    file = run / "composed.yaml"
    file.write_text(file.read_text().replace("trust_remote_code: false", "trust_remote_code: true", 1))
    assert "lets code in a model folder run" in fails(capsys, run, PROMPT)
    assert "lets code in a model folder run" in fails(capsys, models / "base", PROMPT, *SHORT, "--against", run)
    file.write_text(file.read_text().replace("spo.evaluation.judges.reward_judge", "os.system"))
    best_of = (PROMPT, "--best-of", "2", "model.trust_remote_code=false")
    assert "runs os.system as judge" in fails(capsys, run, *best_of)


# Key of the configuration -> words with which the part there would run.
FOREIGN_PARTS = {
    "judge.reward": ("--best-of", "2"),
    "method.loss": ("--best-of", "2"),
    "callbacks.mine": ("--best-of", "2"),
    "data.source": ("--against", "reference"),
    "data.reward": ("--against", "reference"),
    "model.initial": (),
    "data.tokenizer": (),
    "strategy.plugin": (),
    "extra.mine": (),
}


@pytest.mark.parametrize("key", FOREIGN_PARTS)
def test_only_what_a_command_builds_must_be_allowed(
    key: str, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = save_run(tmp_path / "run", models / "base")
    cfg = OmegaConf.load(run / "composed.yaml")
    OmegaConf.update(cfg, key, {"_target_": "os.system", "command": f"touch {tmp_path / 'ran'}"}, force_add=True)
    cfg.tags = [f"${{{key}.command}}"]  # Values can still be read.
    OmegaConf.save(cfg, run / "composed.yaml")
    words = FOREIGN_PARTS[key]
    assert f"runs os.system as {key}" in fails(capsys, run, PROMPT, *words)
    if words:
        assert printed(capsys, run, PROMPT, "-n", "1") == printed(capsys, models / "run", PROMPT, "-n", "1")
        assert len(printed(capsys, models / "base", PROMPT, "-n", "1", "--against", run)) == 2
    if words[:1] == ("--best-of",):
        assert len(printed(capsys, run, PROMPT, "-n", "1", "--against", "reference")) == 2
    assert not (tmp_path / "ran").exists()


def test_an_unused_part_cannot_run_through_another_key(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = save_run(tmp_path / "run", models / "base")
    cfg = OmegaConf.load(run / "composed.yaml")
    cfg.judge = {"_target_": "os.system", "command": f"touch {tmp_path / 'ran'}"}
    cfg.model.initial = "${judge}"
    OmegaConf.save(cfg, run / "composed.yaml")
    cli.main(["sample", str(run), PROMPT, *SHORT])
    assert not (tmp_path / "ran").exists()
    assert cli.main(["sample", str(run), PROMPT, *SHORT, "--allow", "os.system"]) == 0
    assert not (tmp_path / "ran").exists()
    capsys.readouterr()


# --- the real command ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_commands_with_a_trained_run(
    tmp_path_factory: pytest.TempPathFactory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    trained = sweep(tmp_path_factory)
    run = str(trained.directory("dpo"))
    words = ["sample", run, "One morning, Mia", "-n", "2", "--max-new-tokens", "12", "--best-of", "2"]
    done = spo(*words, "--against", "reference", "--json", folder=tmp_path, cache=trained.cache)
    found = json.loads(done.stdout)
    assert [row["model"] for row in found] == ["policy"] * 2 + ["reference"] * 2
    assert all(row["tokens"] <= 12 and isinstance(row["reward"], float) for row in found)
    monkeypatch.setenv("SPO_CACHE_DIR", str(trained.cache))
    unjudged = printed(capsys, run, "One morning, Mia", "-n", "2", "--against", "reference")
    assert [row["model"] for row in unjudged] == ["policy"] * 2 + ["reference"] * 2
    monkeypatch.setenv("SPO_CACHE_DIR", str(tmp_path / "cache"))
    assert f"spo evaluate {run} makes it again" in fails(capsys, *words[1:], "--against", "reference")
